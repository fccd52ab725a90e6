"""Which objective teaches patches where things are? Four of them, the same model, data, order and number of steps.

    python labs/localise/run.py                      # four objectives x three seeds; writes results/localise.json
    python labs/localise/run.py --quick --out x.json # a few steps of each, to see that it runs

Every finished run is kept in the results file at once: started again, only the missing ones are trained."""
import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from arr_course import zoo  # noqa: E402
from arr_course.concepts import CONCEPTS, WORDS  # noqa: E402
from arr_course.contrastive import auroc, mean_interval, siglip_loss, soft_max_pool, word_loss  # noqa: E402
from arr_course.core import git_commit, provenance, set_seed, write_json  # noqa: E402
from arr_course.joint import Joint, JointConfig  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.vit import ViTConfig  # noqa: E402
from arr_course.world import caption, paint_ids, patch_masks, render, sample_scene, words_of, words_of_thing  # noqa: E402

HERE = Path(__file__).resolve().parent
OBJECTIVES = {"caption": "CLS vector against whole captions, SigLIP",
              "word": "CLS vector against each word, a sigmoid each",
              "mean": "mean of the patch vectors against each word, a sigmoid each",
              "token": "every patch against each word, softly maximised over patches, a sigmoid each"}
KINDS = ("object", "disc", "sign", "number")


def kind(word):
    "Which kind of word it is: an object's name, a disc, the sign, a number."
    return "object" if word in CONCEPTS else word if word == "sign" else "disc" if word.endswith("disc") else "number"


def pixels(scene):
    "(3, h, w) uint8."
    return torch.from_numpy(np.array(render(scene))).permute(2, 0, 1)


class Crops(Dataset):
    "Endless training crops, other ones for every seed: pixels, which words are true, the caption."
    def __init__(self, seed): self.first = seed * 10**9

    def __len__(self): return 10**9

    def __getitem__(self, i):
        s = sample_scene(self.first + i, "crop")
        true = words_of(s)
        return pixels(s), torch.tensor([w in true for w in WORDS]), caption(s)


class Towers(nn.Module):
    "The joint model, with what an objective compares: the CLS token, the normalised mean of the patches, or every patch."
    def __init__(self, objective):
        super().__init__()
        self.objective = objective
        vit = ViTConfig(img_size=112, patch_size=14, stem="conv", embed_dim=192, depth=6, num_heads=3, class_token=True,
                        pos_embed="sincos", global_pool="token")
        self.joint = Joint(JointConfig(vit=vit))

    def vectors(self, x):
        "Pixels (b, 3, h, w) uint8 to what is compared (b, 1 or n, e) and all patches (b, n, e), unit length."
        h = self.joint.vit.forward_tokens(x.float() / 127.5 - 1)
        k = self.joint.cfg.vit.prefix
        patches = self.joint.project(h[:, k:])
        if self.objective == "token": return patches, patches
        pooled = F.normalize(patches.mean(1, keepdim=True), dim=-1) if self.objective == "mean" else self.joint.project(h[:, :1])
        return pooled, patches

    def forward(self, x, t):
        "What is compared (b, 1 or n, e), and sentence vectors (w, 384) in the joint space (w, e)."
        return self.vectors(x)[0], self.joint.texts(t)


def loss_of(objective, words, encode):
    "The loss function that the learner calls."
    def loss(model, batch):
        x, true, captions = batch
        v, t = model(x, encode(list(captions)) if objective == "caption" else words)
        j = model.joint
        if objective == "caption": return siglip_loss(v[:, 0], t, j.scale, j.logit_bias)
        return word_loss(j.logits(v, t), true)
    return loss


@torch.no_grad()
def evaluate(model, words, scenes, batch=25):
    "Per scene: query-patch AUROC by kind of word (NaN: none there), top-1 hit, and AUROC of true against other words."
    model.eval()
    rows = []
    for i in range(0, len(scenes), batch):
        part = scenes[i:i + batch]
        (v, patches), texts = model.vectors(torch.stack([pixels(s) for s in part])), model.joint.texts(words)
        logits = model.joint.logits(patches, texts)                              # (b, n, w)
        pooled = soft_max_pool(model.joint.logits(v, texts))                     # (b, w), of one vector: itself
        rows += [one_scene(s, z, p) for s, z, p in zip(part, logits, pooled, strict=True)]
    model.train()
    return rows


def one_scene(scene, logits, pooled):
    "What is measured on one scene. logits (n, w), pooled (w,)"
    masks = torch.from_numpy(patch_masks(paint_ids(scene), len(scene.things)))   # (things, n)
    true, found, hit = words_of(scene), {k: [] for k in KINDS}, []
    for i, w in enumerate(WORDS):
        if w not in true: continue
        where = torch.stack([m for t, m in zip(scene.things, masks, strict=True) if w in words_of_thing(t)]).any(0)
        if not where.any() or where.all(): continue
        found[kind(w)].append(auroc(logits[:, i], where).item())
        if kind(w) == "object": hit.append(float(where[logits[:, i].argmax()]))
    mean = lambda v: float(np.mean(v)) if v else float("nan")
    return {k: mean(v) for k, v in found.items()} | dict(
        hit=mean(hit), image=auroc(pooled, torch.tensor([w in true for w in WORDS])).item())


def summary(rows):
    "Mean over scenes with a 95 % interval, by measure; scenes without such a word are left out and counted."
    out = {}
    for k in rows[0]:
        v = [r[k] for r in rows if r[k] == r[k]]
        m = mean_interval(v) if len(v) > 1 else (*v, None, None, None)[:3]
        out[k] = dict(zip(("value", "low", "high"), (x if x is None else round(x, 4) for x in m), strict=True)) | dict(n=len(v))
    return out


def train(objective, seed, cfg, tests, words, encode, every):
    "One run: the model is trained and measured; the curve is measured on the first 100 crops."
    set_seed(seed)
    model, curve = Towers(objective), []
    def watch(m, step):
        if step % every == 0:
            r = summary(evaluate(m, words, tests["crop"][:100]))
            curve.append(dict(step=step, object=r["object"]["value"], hit=r["hit"]["value"], image=r["image"]["value"]))
    start, cpu = time.perf_counter(), time.process_time()
    learner = Learner(model, loss_of(objective, words, encode), Crops(seed), cfg, after_step=watch)
    log = learner.fit()
    took = dict(seconds=round(time.perf_counter() - start, 1), cpu_seconds=round(time.process_time() - cpu, 1))
    rows = {d: evaluate(model, words, scenes) for d, scenes in tests.items()}
    result = dict(objective=objective, seed=seed, precision=learner.precision, **took,
                  log=[{k: round(r[k], 4) for k in ("step", "loss")} for r in log], curve=curve,
                  metrics={d: summary(r) for d, r in rows.items()})
    return result, {d: [r["object"] for r in v] for d, v in rows.items()}


def paired(values, a, b):
    "Mean difference of two objectives' object AUROC, scene by scene, averaged over seeds first; with its 95 % interval."
    seeds = sorted({s for o, s in values if o == a} & {s for o, s in values if o == b})
    out = {}
    for d in next(iter(values.values())):
        diff = np.mean([np.subtract(values[a, s][d], values[b, s][d]) for s in seeds], axis=0)
        m, low, high = mean_interval(diff[~np.isnan(diff)])
        out[d] = dict(value=round(m, 4), low=round(low, 4), high=round(high, 4), n=int((~np.isnan(diff)).sum()), seeds=len(seeds))
    return out


def numbers(stored):
    "Stored values with null as NaN again."
    return {d: [float("nan") if x is None else x for x in xs] for d, xs in stored.items()}


def report(r):
    "One line about a finished run."
    m = {k: v["value"] for k, v in r["metrics"]["crop"].items()}
    print(f"{r['objective']:8} seed {r['seed']}: AUROC {m['object']:.3f}, hit {m['hit']:.3f}, image {m['image']:.3f}, "
          f"{r['cpu_seconds']:.0f} CPU s", flush=True)


def store(out, setting, runs, values, commit):
    "Write what there is so far, with the differences that can be formed already."
    have = {o for o, _ in values}
    less = {o: paired(values, "token", o) for o in OBJECTIVES if o != "token" and {o, "token"} <= have}
    scenes = [dict(objective=o, seed=s, object={d: [None if x != x else round(x, 4) for x in xs] for d, xs in v.items()})
              for (o, s), v in values.items()]
    facts = provenance("accelerate", "transformers", seed=sorted({s for _, s in values}), command="python labs/localise/run.py")
    write_json(out, dict(setting=setting, objectives=OBJECTIVES, runs=runs, token_minus=less,
                         provenance=facts | dict(commit=commit), scenes=scenes))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--crops", type=int, default=300, help="test crops")
    p.add_argument("--scenes", type=int, default=40, help="test scenes of 336 px, of each density")
    p.add_argument("--quick", action="store_true", help="4 steps of 8 crops, 20 test crops, 2 scenes, one seed")
    p.add_argument("--out", type=Path, default=HERE / "results" / "localise.json")
    a = p.parse_args()
    if a.quick: a.seeds, a.steps, a.batch_size, a.crops, a.scenes = [0], 4, 8, 20, 2
    cfg = dict(steps=a.steps, batch_size=a.batch_size, lr=1e-3, warmup=max(1, a.steps // 10), log_every=max(1, a.steps // 30))
    text = zoo.load_text("pkg/minilm", device="cpu")
    words = text.encode(list(WORDS))
    tests = {d: [sample_scene(i, d, "test") for i in range(n)] for d, n in
             (("crop", a.crops), ("sparse", a.scenes), ("dense", a.scenes))}
    setting = dict(config=asdict(TrainConfig(**cfg)) | dict(seed=None), tests={d: len(v) for d, v in tests.items()},
                   words=len(WORDS))
    setting = json.loads(json.dumps(setting))
    done = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else {}
    if done and done["setting"] != setting:
        raise SystemExit(f"{a.out.name} belongs to another setting: move it away, or use --out")
    runs, values = done.get("runs", []), {(v["objective"], v["seed"]): numbers(v["object"]) for v in done.get("scenes", [])}
    commit = done.get("provenance", {}).get("commit") or git_commit()  # of the code that the first run used
    for seed in a.seeds:
        for o in a.objectives:
            if (o, seed) in values: continue
            r, values[o, seed] = train(o, seed, TrainConfig(**cfg, seed=seed), tests, words, text.encode, max(1, a.steps // 10))
            runs.append(r)
            report(r)
            store(a.out, setting, runs, values, commit)
    print("wrote", os.path.relpath(a.out))


if __name__ == "__main__": main()
