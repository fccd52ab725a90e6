"""Budget against accuracy on easy-VQA, a set that we did not write: one shape on each picture, 64 x 64 pixels, enlarged.

    python labs/budget_vs_accuracy/shapes.py                        # trains, answers all of the test split
    python labs/budget_vs_accuracy/shapes.py --seed 1               # begins as arr/vlm-mlp-s1, and so --seed 2
    python labs/budget_vs_accuracy/shapes.py --seeds                # the three seeds together: easy_vqa-seeds.json
    python labs/budget_vs_accuracy/shapes.py --quick --out x.json   # a few steps and questions, to see that it runs

The encoder stays as it is; its patches are computed once and kept (`--features FOLDER`). A VLM that begins as arr/vlm-mlp learns
the train split with all patches in half of the steps and a few random ones in the others, so that it can read any subset; it
goes on from its last checkpoint (`--runs FOLDER`). Its weights are not shipped: this command makes them again. Each result is
written at once to easy_vqa.jsonl, right or wrong for each question; easy_vqa.json and easy_vqa.png are made of these lines."""
import argparse
import copy
import hashlib
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "frozen_or_trainable"), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from shapes import PUBLISHED, Shapes, prior, transfer  # noqa: E402
from shapes_report import facts, report, together  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from arr_course.arr import arr_1, arr_2, kind, outstanding  # noqa: E402
from arr_course.bench import by_length, clock, taken  # noqa: E402
from arr_course.connectors import keep_all  # noqa: E402
from arr_course.core import atomic_path, cache_dir, provenance, sha256, write_json  # noqa: E402
from arr_course.harness import read_lines, right_of, write_line  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.papers import Sight, oracle_score, with_thresholds  # noqa: E402
from arr_course.peers import PEERS  # noqa: E402
from arr_course.reducers import REDUCERS  # noqa: E402
from arr_course.relevance import cue_words, evidence_auroc, look, novelty, pixel_entropy, query, saliency, surprisal  # noqa: E402
from arr_course.select import Reducer  # noqa: E402
from arr_course.tuning import answer_loss  # noqa: E402
from arr_course.vit import Features  # noqa: E402
from arr_course.vlm import answer_ids, read_picture  # noqa: E402
from arr_course.vqa import collate_lessons, draw_budget, select_rows  # noqa: E402
from arr_course.zoo import WeightsError, load, read_card  # noqa: E402

METHODS = ("full", "random", "uniform", "pool", "fastervlm", "divprune", "scope", "cdpruner", "mmtok", "eadp", "vispruner",
           "visionzip", "sieve", "holov", "arr-1", "arr-2:fixed", "arr-2", "oracle", "arr-2+saliency:fixed",
           "arr-2+surprisal:fixed")
QUICK = ("full", "random", "arr-1", "arr-2:fixed", "arr-2")
BUDGETS = (72, 36, 18, 9)
HELD_OUT = 108                                       # pictures at the end of the train split, for thresholds


class Stored(Shapes):
    "Questions and the patches of their pictures `(n, d)`, as the encoder sees them."
    def __getitem__(self, i): return dict(super().__getitem__(i), features=self.seen["patches"][i])

    def part(self, first, last):
        "Some of the pictures."
        out = copy.copy(self)
        out.ids, out.pixels = self.ids[first:last], self.pixels[first:last]
        out.rows = {i: self.rows[i] for i in out.ids}
        return out

    def asked(self) -> list[tuple]:
        "All questions: picture, question, answer, type."
        return [(k, *r) for k, i in enumerate(self.ids) for r in self.rows[i]]


def normal(pixels): return pixels.float() / 127.5 - 1


@torch.no_grad()
def encode(encoder, pixels, batch=40) -> dict[str, torch.Tensor]:
    "Patches, saliency, queries and keys of all pictures in half precision."
    out = defaultdict(list)
    for i in tqdm(range(0, len(pixels), batch), "pictures", leave=False):
        with torch.autocast("cpu", torch.bfloat16): c = look(encoder, normal(pixels[i:i + batch]), keys=True)
        for k, x in dict(patches=c.patches, queries=c.queries, keys=c.keys).items(): out[k].append(x.half())
        out["saliency"].append(c.features.saliency.float())
    return {k: torch.cat(x).contiguous() for k, x in out.items()}


def see(encoder, data: Stored, folder: Path, keys=True) -> Stored:
    "Give a split what the encoder sees of it: from a file whose hash is checked, or computed once and written."
    name = f"{encoder.fingerprint}-{hashlib.sha256(data.pixels.numpy().tobytes()).hexdigest()[:16]}{'-keys' if keys else ''}"
    path, note = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not note.is_file():
        found = encode(encoder, data.pixels)
        with atomic_path(path) as tmp: save_file(found if keys else dict(patches=found["patches"]), tmp)
        write_json(note, dict(sha256=sha256(path), pictures=len(data), size=data.pixels.shape[-1], precision="bf16"))
    if sha256(path) != json.loads(note.read_text(encoding="utf-8"))["sha256"]:
        raise WeightsError(f"{path.name} is damaged: delete {note.name} and start again")
    data.seen = load_file(path)
    return data


def splits(encoder, a) -> tuple[Stored, Stored, Stored]:
    "Training pictures, the held-out ones behind them, and the test split."
    whole = Stored("train", a.size, a.questions, ask=a.ask)
    test = Stored("test", a.size, a.questions, whole.vocab)
    train, held = whole.part(0, len(whole) - a.held), whole.part(len(whole) - a.held, None)
    return see(encoder, train, a.features, keys=False), see(encoder, held, a.features), see(encoder, test, a.features)


def loss(model, batch, low):
    "Cross-entropy of the answers' words behind all patches or a few random ones, and the share of them that is right."
    x = batch["features"].float()
    (b, n, _), labelled = x.shape, batch["labels"] >= 0
    index = torch.rand(b, n).topk(draw_budget(low, n, n, full=.5), 1).indices.sort(1).values
    s = select_rows(x, index, (round(n ** .5),) * 2)
    logits = model(s, batch["tokens"], batch["segments"], batch["places"], labelled=labelled)
    out, right = answer_loss(logits, batch["labels"][labelled])
    return out, dict(right=right)


def teach(train: Stored, a):
    "arr/vlm-mlp, or its seed, with this set's words, trained or from a checkpoint; and what is to be said of it."
    torch.manual_seed(a.seed)
    name = "arr/vlm-mlp" + f"-s{a.seed}" * (a.seed > 0)
    begin = read_card(name)["sha256"][:12]
    cfg = TrainConfig(steps=a.steps, batch_size=a.batch, lr=a.lr, warmup=min(50, a.steps), betas=(.9, .98), weight_decay=.05,
                      seed=a.seed, ema=.99, log_every=min(25, a.steps), save_every=100)
    learner = Learner(transfer(train.vocab.words, name), lambda m, b: loss(m, b, a.low), train, cfg,
                      a.runs / f"easy-budget-{a.size}-{len(train)}-{begin}", collate=collate_lessons, shuffle=True)
    rows = learner.fit()
    model = learner.ema.model(learner.model).eval().requires_grad_(False)
    curve = [{k: round(r[k], 4) for k in ("step", "loss", "right")} for r in rows]
    facts = {k: getattr(a, k) for k in ("steps", "batch", "lr", "ask", "low", "seed")}
    return model, facts | dict(begins=name, pictures=len(train), seconds=round(learner.seconds, 1),
                               precision=learner.precision, curve=curve)


def evidence(pixels) -> torch.Tensor:
    "Patches that show some of the shape `(b, n)`: a tenth of their pixels are not the picture's most usual colour."
    x = pixels.float()
    odd = (x - x.flatten(2).median(2).values[..., None, None]).abs().amax(1) > 24
    return odd.unflatten(1, (-1, 14)).unflatten(3, (-1, 14)).float().mean((2, 4)).flatten(1) > .1


def context(encoder, data: Stored, rows: list[int], questions: list[str], pixels=False) -> Sight:
    "Pictures with a question each, as every reducer gets them."
    get, grid = {k: x[rows].float() for k, x in data.seen.items()}, (data.pixels.shape[-1] // 14,) * 2
    f, x = Features(get["patches"], grid, saliency=get["saliency"]), data.pixels[rows]
    with torch.no_grad(): joint = encoder.joint(f)
    return Sight(f, joint, query(encoder, questions), get["queries"], get["keys"], normal(x) if pixels else None, evidence(x))


def some_of(data: Stored, step=1) -> tuple[list[int], list[str]]:
    "Every `step`-th picture, with one of its questions."
    rows = list(range(0, len(data), step))
    each = [data.rows[data.ids[k]] for k in rows]
    return rows, [o[k % len(o)][0] for k, o in zip(rows, each, strict=True)]


def methods_of(encoder, held: Stored, names, budgets) -> dict:
    "Methods by name; thresholds are set on held-out pictures with one of their questions each."
    base = REDUCERS | PEERS | {"arr-1": arr_1(), "arr-2": arr_2(), "oracle": Reducer("oracle", score=oracle_score)}
    base |= {f"arr-2+{f.__name__}": arr_2(salience=f) for f in (saliency, surprisal)}
    shown, out = [context(encoder, held, *some_of(held))], {}
    for name in names:
        b, _, fixed = name.partition(":")
        out[name] = replace(base[b], budget=None, tau=None) if fixed else with_thresholds(base[b], shown, budgets)
    return out


@torch.no_grad()
def shape_kept(encoder, test: Stored, methods, budgets, step=5) -> dict:
    "The mean share of a shape's patches that are kept, of methods that merge nothing, on some pictures."
    c, out = context(encoder, test, *some_of(test, step), pixels=True), {}
    for name, m in methods.items():
        if name == "full" or m.merge is not None: continue
        for b in budgets:
            s, kept = m(c, b), torch.zeros(len(c), c.n)
            kept[s.image, s.index] = 1
            share = (kept * c.evidence).sum(1) / c.evidence.sum(1).clamp(min=1)
            out.setdefault(name, {})[b] = round(float(share.mean()), 3)
    return out


def stands_out(encoder, held: Stored) -> dict:
    "How well each score that does not read the question finds the shape's patches: AUROC on the held-out pictures."
    c = context(encoder, held, *some_of(held), pixels=True)
    scores = (saliency, outstanding, pixel_entropy, novelty, surprisal)
    return {f.__name__: evidence_auroc(f(c), c.evidence)["all"] for f in scores}


def groups(asked, uses_query) -> dict[tuple, list[int]]:
    "Which questions share a selection: all of a picture, or those with the same words to look for."
    out = defaultdict(list)
    for j, (k, q, *_) in enumerate(asked): out[(k, cue_words(q), kind(q)) if uses_query else (k,)].append(j)
    return out


@torch.no_grad()
def answers(model, s, prompts: list[list[list[int]]]) -> tuple[list[list[str]], np.ndarray]:
    "Answers to several questions about each picture of a selection, and the seconds of reading and of answering."
    said, seconds, now = [[] for _ in prompts], np.zeros(2), clock()
    for rows in by_length(s.lengths, 1152):
        start = now()
        picture = read_picture(model, taken(s, rows))
        middle, owners = now(), [r for r in rows for _ in prompts[r]]
        ids = answer_ids(model, picture, [p for r in rows for p in prompts[r]], [rows.index(r) for r in owners], max_new=3)
        for r, o in zip(owners, ids, strict=True): said[r].append(model.vocab.decode(o))
        seconds += middle - start, now() - middle
    return said, seconds


def measure(encoder, model, test: Stored, name, method, budget, part=64) -> dict:
    "Every question of the test split with one method at one budget."
    asked, selections, times, now = test.asked(), 0, np.zeros(3), clock()
    right, tokens = np.zeros(len(asked), bool), np.zeros(len(asked), int)
    todo = list(groups(asked, method.uses_query).items())
    for i in tqdm(range(0, len(todo), part), f"{name} {budget}", leave=False):
        keys, js = zip(*todo[i:i + part], strict=True)
        c = context(encoder, test, [k[0] for k in keys], [asked[j[0]][1] for j in js], name == "arr-1")
        start = now()
        with torch.no_grad(): s = method(c, budget)
        times[0] += now() - start
        prompts = [[model.vocab.encode(asked[j][1]) for j in o] for o in js]
        with torch.autocast("cpu", torch.bfloat16): said, took = answers(model, s, prompts)
        times[1:] += took
        selections += len(keys)
        for o, words, m in zip(js, said, s.lengths.tolist(), strict=True):
            right[o], tokens[o] = [w == asked[j][2] for j, w in zip(o, words, strict=True)], m
    each = times / (selections, selections, len(asked))
    return dict(method=name, budget=budget, n=len(asked), right=np.packbits(right).tobytes().hex(), selections=selections,
                tokens=tokens.tolist() if len(set(tokens.tolist())) > 1 else [int(tokens[0])],
                seconds={k: round(float(v), 6) for k, v in zip(("select", "prefill", "decode"), each, strict=True)})


def controls(model, train: Stored, test: Stored) -> dict:
    "The same model without a picture and with the next one, and the answer that each question has most often in the train split."
    asked, common = test.asked(), prior(train)
    picture = np.array([k for k, *_ in asked])
    prompts = [[model.vocab.encode(q) for q, *_ in test.rows[i]] for i in test.ids]
    said = dict(question_only=[common.get(q, "yes") for _, q, *_ in asked], no_image=[], shuffled_image=[])
    x, grid = test.seen["patches"].roll(-1, 0), (test.pixels.shape[-1] // 14,) * 2
    for i in range(0, len(test), 25):
        some, rows = prompts[i:i + 25], x[i:i + 25].float()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            said["shuffled_image"] += [w for o in answers(model, keep_all(Features(rows, grid)), some)[0] for w in o]
            flat, owner = [p for o in some for p in o], [k for k, o in enumerate(some) for _ in o]
            ids = answer_ids(model, read_picture(model, None, len(some)), flat, owner, max_new=3)
            said["no_image"] += [model.vocab.decode(o) for o in ids]
    return {k: facts(np.array([w == a for w, (_, _, a, _) in zip(v, asked, strict=True)]), picture) for k, v in said.items()}


def key_of(encoder, model, test, a) -> dict:
    "What a result depends on."
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:16]
    return dict(encoder=encoder.fingerprint, weights=weights, size=a.size, n=len(test.asked()), held=a.held)


def run(encoder, model, methods, data: Stored, a, names) -> list[dict]:
    "Results of methods at all budgets on a split; those that are in the file are not computed again."
    path, key = a.out.with_suffix(".jsonl"), key_of(encoder, model, data, a)
    lines = [o for o in read_lines(path) if key.items() <= o.items()]
    have, n = {(o["method"], o["budget"]) for o in lines}, (a.size // 14) ** 2
    todo = [o for o in (("full", n), *((m, b) for b in a.budgets for m in names if m != "full")) if o not in have]
    for m, b in tqdm(todo, "methods and budgets"):
        lines.append(key | measure(encoder, model, data, m, methods[m], b))
        write_line(path, lines[-1])
    return lines


def stands_out_by(encoder, model, held: Stored, methods, a) -> dict:
    "Accuracy on all questions about the held-out pictures, by what ARR-2 takes to stand out."
    names = [n for n in methods if n.startswith("arr-2") and n.endswith(":fixed")]
    out = {n: {} for n in names}
    for o in run(encoder, model, methods, held, a, names):
        if o["method"] in out: out[o["method"]][o["budget"]] = round(float(right_of(o).mean()), 4)
    return out


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch", type=int, default=16, help="pictures in a step")
    p.add_argument("--ask", type=int, default=6, help="questions of each picture in a step, drawn anew")
    p.add_argument("--low", type=int, default=8, help="the fewest patches that training shows")
    p.add_argument("--size", type=int, default=168, help="pixels that a picture is enlarged to, a multiple of 14")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0, choices=(0, 1, 2), help="of the training, and of the model it begins as")
    p.add_argument("--seeds", action="store_true", help="nothing is run: the stored results of all seeds together")
    p.add_argument("--questions", type=int, help="the first so many of each split; default: all")
    p.add_argument("--features", type=Path, default=cache_dir("easy-vqa"), help="a folder for what the encoder saw")
    p.add_argument("--runs", type=Path, default=cache_dir("runs"), help="a folder for checkpoints")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, help="default: results/easy_vqa.json, with another seed easy_vqa-s1.json or -s2")
    a = p.parse_args()
    if a.quick and not a.out:
        p.error("--quick needs --out FILE, so that the stored results stay as they are")
    a.out = a.out or HERE / "results" / f"easy_vqa{f'-s{a.seed}' * (a.seed > 0)}.json"
    a.methods, a.budgets, a.held = METHODS, BUDGETS, HELD_OUT
    if a.quick: a.steps, a.batch, a.questions, a.held, a.budgets, a.methods = 2, 4, 100, 4, (36, 9), QUICK
    return a


def main():
    a = arguments()
    if a.seeds: return together(HERE / "results", Shapes("test", a.size, a.questions))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    encoder = load("arr/filip-ti", device="cpu")
    train, held, test = splits(encoder, a)
    model, trained = teach(train, a)
    methods = methods_of(encoder, held, a.methods, a.budgets)
    lines = run(encoder, model, methods, test, a, a.methods)
    found = provenance("easy-vqa", seed=a.seed, encoder=encoder.fingerprint, command="python labs/budget_vs_accuracy/shapes.py")
    kept = shape_kept(encoder, test, methods, a.budgets)
    report(lines, test.asked(), a, published=PUBLISHED, trained=trained, controls=controls(model, train, test), shape_kept=kept,
           auroc=stands_out(encoder, held), held_out=stands_out_by(encoder, model, held, methods, a), provenance=found)


if __name__ == "__main__": main()
