"""Our ViT against timm's at equal config: forward, and forward + backward. Prints a table, writes results/vit.json.

Each round runs both, one right after the other, in alternating order, and gives one ratio of CPU times, so that a neighbour
on the machine who comes or goes disturbs both alike. Reported: the median ratio over rounds with a bootstrap 95 % interval."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits must not count as CPU time

import argparse  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from arr_course.core import need, provenance, set_seed, write_json  # noqa: E402
from arr_course.vit import ViT, ViTConfig  # noqa: E402

NAMES = {"Ti": "vit_tiny_patch16_224", "S": "vit_small_patch16_224"}


def step(model, x, backward):
    "One forward pass, or one forward and backward pass."
    with torch.set_grad_enabled(backward): y = model(x)
    if backward:
        y.square().mean().backward()
        model.zero_grad(set_to_none=True)


def clock(model, x, backward):
    "CPU seconds and wall seconds of one step."
    cpu, wall = time.process_time(), time.perf_counter()
    step(model, x, backward)
    return np.array([time.process_time() - cpu, time.perf_counter() - wall])


def interval(ratios, n=2000):
    "Median and bootstrap 95 % interval of the median."
    draws = np.random.default_rng(0).choice(ratios, (n, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return dict(median=round(statistics.median(ratios), 4), low=round(low, 4), high=round(high, 4))


def compare(size, threads, backward, batch, seconds, least):
    "Interleaved rounds for `seconds`, at least `least` of them."
    torch.set_num_threads(threads)
    set_seed(0)
    ours = ViT(ViTConfig.preset(size, num_classes=1000)).train(backward)
    theirs = need("timm", "models").create_model(NAMES[size]).train(backward)
    x, times, end = torch.randn(batch, 3, 224, 224), [], time.perf_counter() + seconds
    for model in (ours, theirs): step(model, x, backward)
    while len(times) < least or time.perf_counter() < end:
        pair = (ours, theirs)[::1 if len(times) % 2 else -1]
        took = {model: clock(model, x, backward) for model in pair}
        times.append((took[ours], took[theirs]))
    cpu, wall = ([float(o[i] / t[i]) for o, t in times] for i in (0, 1))
    best = [min(float(t[who][0]) for t in times) for who in (0, 1)]
    return dict(size=size, batch=batch, threads=threads, backward=backward, rounds=len(times),
                cpu=interval(cpu), wall=interval(wall),
                best_cpu_s=dict(ours=round(best[0], 4), timm=round(best[1], 4)), best_ratio=round(best[0] / best[1], 4))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seconds", type=float, default=70, help="about how long the whole run takes")
    p.add_argument("--rounds", type=int, default=4, help="at least this many rounds for each row")
    p.add_argument("--out", default=str(Path(__file__).parent / "results" / "vit.json"))
    a = p.parse_args()
    threads = sorted({1, os.cpu_count() or 1})
    share = {("Ti", False): 2, ("Ti", True): 3, ("S", False): 3, ("S", True): 5}
    unit, rows = a.seconds / sum(share.values()) / len(threads), []
    print(f"{'model':8} {'pass':18} {'threads':>7} {'rounds':>6}  CPU time, ours / timm   wall   best")
    for t in threads:
        for (size, backward), weight in share.items():
            r = compare(size, t, backward, a.batch, unit * weight, a.rounds)
            rows.append(r)
            c = r["cpu"]
            what = "forward + backward" if backward else "forward"
            print(f"ViT-{size:4} {what:18} {t:7} {r['rounds']:6}  "
                  f"{c['median']:.3f} [{c['low']:.3f}, {c['high']:.3f}]   "
                  f"{r['wall']['median']:.3f}  {r['best_ratio']:.3f}", flush=True)
    write_json(a.out, dict(rows=rows, provenance=provenance("timm", seed=0, command="python benchmarks/vit.py")))
    print("wrote", os.path.relpath(a.out))


if __name__ == "__main__": main()
