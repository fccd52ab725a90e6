"""Training images a second: our Learner against a plain PyTorch loop, same model, same data. Writes results/learner.json.

Each round trains a few steps with both, one right after the other, in alternating order, and gives one ratio of CPU times and
one of wall times, so that a neighbour on the machine disturbs both alike. Reported: ours / plain in images a second, the median
ratio over rounds with a bootstrap 95 % interval. The plain loop has what a careful user would write: DataLoader, autocast,
clipping, fused AdamW, the same schedule; no log, no checks, no checkpoints."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits must not count as CPU time

import argparse  # noqa: E402
import copy  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from arr_course.core import provenance, set_seed, write_json  # noqa: E402
from arr_course.learner import Learner, TrainConfig, decay_groups, lr_at  # noqa: E402
from arr_course.vit import ViT, ViTConfig  # noqa: E402


class Images:
    "Labelled noise in memory, so that the loops are measured and not the data."
    def __init__(self, n, size):
        self.x, self.y = torch.randn(n, 3, size, size), torch.randint(100, (n,))

    def __len__(self): return len(self.x)
    def __getitem__(self, i): return dict(x=self.x[i], y=self.y[i])


def loss_fn(model, batch):
    z = model(batch["x"])
    return nn.functional.cross_entropy(z, batch["y"]), dict(right=(z.argmax(-1) == batch["y"]).float().mean())


def plain(model, data, cfg, precision):
    "A generator that trains `n` steps each time it is sent `n`."
    opt = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=cfg.lr, betas=cfg.betas, fused=True)
    params, done, n = list(model.parameters()), 0, (yield)
    while True:
        loader = DataLoader(data, cfg.batch_size)
        for batch in loader:
            for g in opt.param_groups: g["lr"] = lr_at(done, cfg)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): loss, _ = loss_fn(model, batch)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, cfg.clip)
            opt.step()
            done, n = done + 1, n - 1
            if n == 0: n = yield


def interval(ratios, n=2000):
    "Median and bootstrap 95 % interval of the median."
    draws = np.random.default_rng(0).choice(ratios, (n, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return dict(median=round(statistics.median(ratios), 4), low=round(float(low), 4), high=round(float(high), 4))


def compare(precision, a):
    "Interleaved rounds of `a.steps` steps each."
    set_seed(0)
    model = ViT(ViTConfig.preset(a.size, img_size=a.pixels, patch_size=14, num_classes=100))
    data, cfg = Images(a.batch * 16, a.pixels), TrainConfig(10**6, a.batch, warmup=100, precision=precision, log_every=a.steps)
    learner, loop = Learner(copy.deepcopy(model), loss_fn, data, cfg), plain(copy.deepcopy(model), data, cfg, precision)
    next(loop)
    runs = dict(ours=lambda: learner.fit(until=learner.step + a.steps), plain=lambda: loop.send(a.steps))
    for run in runs.values(): run()
    rounds, end = [], time.perf_counter() + a.seconds / 2
    while len(rounds) < a.rounds or time.perf_counter() < end:
        took = {}
        for name in list(runs)[::1 if len(rounds) % 2 else -1]:
            start = np.array([time.process_time(), time.perf_counter()])
            runs[name]()
            took[name] = np.array([time.process_time(), time.perf_counter()]) - start
        rounds.append(took)
    ratios = np.array([r["plain"] / r["ours"] for r in rounds])          # (rounds, 2): images a second, ours / plain
    best = {k: round(a.batch * a.steps / float(min(r[k][1] for r in rounds)), 1) for k in runs}
    return dict(precision=precision, size=a.size, pixels=a.pixels, batch=a.batch, rounds=len(rounds), cpu=interval(ratios[:, 0]),
                wall=interval(ratios[:, 1]), best_images_per_s=best)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", default="Ti")
    p.add_argument("--pixels", type=int, default=112)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--steps", type=int, default=4, help="steps in a round")
    p.add_argument("--rounds", type=int, default=8, help="at least this many rounds for each row")
    p.add_argument("--seconds", type=float, default=120, help="about how long the whole run takes")
    p.add_argument("--quick", action="store_true", help="a few small rounds, to see that it works; nothing is stored")
    p.add_argument("--out", default=str(Path(__file__).parent / "results" / "learner.json"))
    a = p.parse_args()
    if a.quick: a.batch, a.steps, a.rounds, a.seconds = 4, 2, 3, 0
    rows = []
    print(f"{'precision':9} {'rounds':>6}  images/s, ours / plain: by CPU time      by wall time            best images/s")
    for precision in ("no", "bf16"):
        r = compare(precision, a); rows.append(r)
        both = "   ".join(f"{r[k]['median']:.3f} [{r[k]['low']:.3f}, {r[k]['high']:.3f}]" for k in ("cpu", "wall"))
        print(f"{precision:9} {r['rounds']:6}  {'':25}{both}   {r['best_images_per_s']}", flush=True)
    if a.quick: return
    write_json(a.out, dict(rows=rows, provenance=provenance("accelerate", seed=0, command="python benchmarks/learner.py")))
    print("wrote", os.path.relpath(a.out))


if __name__ == "__main__": main()
