"""What collapses without which part: short trainings of one tiny ViT, each without one part of the recipe.

    python labs/collapse/run.py                      # everything, one seed: about twelve minutes of one core
    python labs/collapse/run.py --seeds 0 1 2
    python labs/collapse/run.py --only gram          # the Gram anchoring part alone
"""
import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from arr_course.core import provenance, write_json
from arr_course.dino import DISTILL, PREPROCESS, SMALL_VIEWS, TRAIN, Twins, Views, backbone, train
from arr_course.encoder import ViTEncoder
from arr_course.learner import TrainConfig
from arr_course.probes import concept_crops, knn_classify, read_features
from arr_course.runs import read_log
from arr_course.selfsup import DistillConfig, effective_rank, entropies, gram, norm_outliers
from arr_course.vit import ViTConfig
from arr_course.world import paint, patch_cover, sample_scene

here = Path(__file__).resolve().parent
VIT = ViTConfig(img_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=2, reg_tokens=2, pos_embed="sincos", stem="conv")
KINDS = (Views(64, 2, (.4, 1.)), Views(32, 2, (.2, .5)))
CFG = TrainConfig(
    steps=1, batch_size=24, lr=1e-3, min_lr=1e-5, warmup=30, weight_decay=.04, clip=3., log_every=10, precision="no")
FULL = DistillConfig(
    steps=1, prototypes=128, hidden=128, bottleneck=64, teacher_temp=(.01, .03), temp_warmup=1., momentum=(.9, 1.),
    ibot=0., koleo=.3)
DINO = replace(FULL, balance="centre", koleo=0.)
RESTAGE = .5  # half of these pairs show one concept in two scenes; the shipped encoder never sees such a pair
VARIANTS = {
    "sinkhorn, KoLeo": FULL,
    "sinkhorn, no KoLeo": replace(FULL, koleo=0.),
    "centring and sharpening": DINO,
    "sharpening, no centring": replace(DINO, balance="none"),
    "centring, no sharpening": replace(DINO, teacher_temp=(.1, .1)),
    "no average: teacher = student": replace(DINO, momentum=(0., 0.)),
}


@torch.no_grad()
def measure(model, batch):
    "Entropies of the teacher's answers and rank of its features on held-out pictures, without updating a centre."
    model.eval()
    x = batch["globals"].transpose(0, 1).flatten(0, 1)
    cls, _ = model.teacher.tower(x)
    each, mean = entropies(model.teacher.targets(model.teacher.tower.cls_head(cls), model.temp, 0))
    model.train()
    return dict(mean_entropy=each, entropy_of_mean=mean, rank=effective_rank(cls))


def collapse(name, distill, steps, seed, every=10):
    "One training, measured every few steps on the same held-out batch."
    data = Twins(KINDS, restage=RESTAGE, patch_size=VIT.patch_size, seed=seed)
    held_out = data.collate([Twins(KINDS, "val", RESTAGE, patch_size=VIT.patch_size)[i] for i in range(64)])
    curve, start = [], time.perf_counter()
    def watch(model, step):
        if step > 1 and step % every: return
        curve.append(dict(step=step, **{k: round(v, 4) for k, v in measure(model, held_out).items()}))
    learner = train(None, steps, VIT, distill, replace(CFG, seed=seed), data, after_step=watch)
    losses = [dict(step=r["step"], dino=round(r["dino"], 4)) for r in learner.logs]
    return dict(variant=name, seed=seed, steps=steps, curve=curve, losses=losses, seconds=round(time.perf_counter() - start, 1))


@torch.no_grad()
def patch_quality(vit, scenes):
    "On fixed scenes: accuracy of a ridge probe that tells things from background, and the mean Gram matrix."
    vit.eval()
    x = torch.stack([torch.tensor(im) for im, _ in scenes])
    f, y = vit.features(x).patches, torch.stack([torch.tensor(m) for _, m in scenes])
    half, f1 = len(f) // 2, F.pad(f, (0, 1), value=1.)
    a, b = f1[:half].flatten(0, 1).double(), y[:half].flatten().double() * 2 - 1
    w = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1], dtype=a.dtype), a.T @ b)
    hit = ((f1[half:].double() @ w > 0) == y[half:]).double().mean().item()
    return hit, gram(f)


def picture(i):
    "Pixels of a held-out scene, and which patches things cover."
    image, ids = paint(s := sample_scene(i, "crop", "val"))
    return np.asarray(image, "f4").transpose(2, 0, 1) / 127.5 - 1, patch_cover(ids, len(s.things), 8).sum(0) > .5


def long_run(weight, steps, seed, every):
    "A long training with Gram anchoring of this weight from its middle on: probe and drift of the Gram matrices since then."
    scenes = [picture(i) for i in range(80)]
    distill = replace(FULL, ibot=1., gram=weight, gram_from=.5)
    curve, anchor = [], {}
    def watch(model, step):
        if step % every and step != steps: return
        hit, g = patch_quality(model.teacher.tower.vit, scenes)
        if step == steps // 2: anchor["gram"] = g
        drift = (g - anchor["gram"]).square().mean().item() if anchor else None
        curve.append(dict(step=step, probe=round(hit, 4), drift=drift and round(drift, 6)))
        model.train()
    start = time.perf_counter()
    data = Twins(KINDS, restage=RESTAGE, patch_size=VIT.patch_size, seed=seed)
    train(None, steps, VIT, distill, replace(CFG, seed=seed, lr=2e-3), data, after_step=watch)
    return dict(gram=weight, seed=seed, steps=steps, curve=curve, seconds=round(time.perf_counter() - start, 1))


def registers(number, steps, seed):
    "A training with this many registers: how far do the norms of patches stand out afterwards?"
    start, vit = time.perf_counter(), replace(VIT, reg_tokens=number)
    data = Twins(KINDS, restage=RESTAGE, patch_size=VIT.patch_size, seed=seed)
    learner = train(None, steps, vit, replace(FULL, ibot=1.), replace(CFG, seed=seed, lr=2e-3), data)
    x = torch.stack([torch.tensor(picture(i)[0]) for i in range(80)])
    with torch.no_grad(): f = backbone(learner.model).features(x).patches
    norm = f.norm(dim=-1)
    return dict(registers=number, seed=seed, steps=steps, outliers=round(norm_outliers(f), 5),
                largest_over_median=round((norm.max() / norm.median()).item(), 3), seconds=round(time.perf_counter() - start, 1))


def first_minutes(weight, steps, seed):
    "The recipe of arr/dino-ti on small views with this weight of the contrastive term: k-NN on concept crops after a few steps."
    start = time.perf_counter()
    cfg = replace(TRAIN, batch_size=24, seed=seed)
    data = Twins(SMALL_VIEWS, restage=RESTAGE, seed=seed)
    learner = train(None, steps, distill=replace(DISTILL, contrast=weight), cfg=cfg, data=data)
    encoder = ViTEncoder("pilot", backbone(learner.model), PREPROCESS, "none")
    (a, ya), (b, yb) = concept_crops(1040, "train", seed=5), concept_crops(520, "test", seed=6)
    za, zb = (read_features(encoder, o, layers=())["last/cls"] for o in (a, b))
    hits = (knn_classify(za, ya, zb, 20)[0] == yb).float()
    return dict(contrast=weight, seed=seed, steps=steps, pairs=steps * cfg.batch_size, n=len(hits),
                knn=round(hits.mean().item(), 4), seconds=round(time.perf_counter() - start, 1))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--long", type=int, default=400)
    p.add_argument("--first", type=int, default=220)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--only", choices=["collapse", "gram", "registers", "contrast"])
    p.add_argument("--thin", type=Path, metavar="RUN", help="only store every fifth row of the log of this run of arr/dino-ti")
    p.add_argument("--out", type=Path, default=here / "results")
    a = p.parse_args()
    torch.set_num_threads(1)
    facts = lambda: provenance("numpy", "accelerate", seed=a.seeds[0], command="python labs/collapse/run.py")
    if a.thin:
        rows = [{k: round(v, 4) for k, v in r.items()} for r in read_log(a.thin / "log.jsonl")[::5]]
        command = "python labs/collapse/run.py --thin runs/dino-ti"
        return write_json(a.out / "dino-ti-log.json", dict(rows=rows, **provenance(command=command)))
    if a.only in (None, "collapse"):
        runs = []
        for seed in a.seeds:
            for name, distill in VARIANTS.items():
                runs.append(collapse(name, distill, a.steps, seed))
                print(name, runs[-1]["curve"][-1], runs[-1]["seconds"], flush=True)
                log_k = round(math.log(FULL.prototypes), 4)
                write_json(a.out / "collapse.json", dict(runs=runs, log_prototypes=log_k, **facts()))
    if a.only in (None, "gram"):
        runs = []
        for seed in a.seeds:
            for weight in (0., 10.):
                runs.append(long_run(weight, a.long, seed, a.long // 16))
                print(weight, runs[-1]["curve"][-1], runs[-1]["seconds"], flush=True)
                write_json(a.out / "gram.json", dict(runs=runs, **facts()))
    if a.only in (None, "registers"):
        runs = [registers(n, a.long // 2, seed) for seed in a.seeds for n in (0, 4)]
        write_json(a.out / "registers.json", dict(runs=runs, **facts())); print(runs)
    if a.only in (None, "contrast"):
        runs = [first_minutes(w, a.first, seed) for seed in a.seeds for w in (0., 2.)]
        write_json(a.out / "contrast.json", dict(runs=runs, **facts())); print(runs)


if __name__ == "__main__": main()
