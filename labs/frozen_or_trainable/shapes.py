"""easy-VQA, a set that we did not write: one shape on each picture. Trained on its train split, examined on its whole test split.

    python labs/frozen_or_trainable/shapes.py                      # four runs; writes results/easy_vqa.json
    python labs/frozen_or_trainable/shapes.py --only trainable     # one of them
    python labs/frozen_or_trainable/shapes.py --quick --out x.json # a few steps, to see that it runs

Every finished run is kept at once. With `--runs FOLDER` one that was stopped goes on from its last checkpoint."""
import argparse
import copy
import json
import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from together import Cost, Together  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from arr_course.connectors import keep_all  # noqa: E402
from arr_course.core import provenance, write_json  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.metrics import wilson  # noqa: E402
from arr_course.pairs import easy_vqa  # noqa: E402
from arr_course.tuning import answer_loss, start  # noqa: E402
from arr_course.vit import Features  # noqa: E402
from arr_course.vlm import VLM, answer_ids, load_vlm, read_picture  # noqa: E402
from arr_course.vocab import Vocabulary  # noqa: E402
from arr_course.vqa import EOS, Line, collate_lessons, pack  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE = Path(__file__).resolve().parent
PUBLISHED = dict(accuracy=.938, epochs=8, what="small CNN and bag of words; its validation data is the test split",
                 url="https://victorzhou.com/blog/easy-vqa/", code="https://github.com/vzhou842/easy-VQA-keras",
                 also="the same page names .995 for a larger model, trained on twice as many pictures of another draw")
RUNS = {  # name: the encoder's learning rate, as a share of the others', and whether connector and decoder begin as arr/vlm-mlp
    "frozen": (0., True), "low rate": (.1, True), "trainable": (1., True), "from nothing": (0., False)}


class Shapes(Dataset):
    "Pictures `(3, size, size)`, bytes, with `ask` of their questions or all; turned and mirrored: no question asks for a place."
    def __init__(self, split, size, n=None, vocab=None, turn=False, ask=None):
        rows = easy_vqa(split, n)
        ids, self.turn, self.ask = rows["image_id"], turn, ask
        first = {i: k for k, i in reversed(list(enumerate(ids)))}
        self.rows, kinds = {i: [] for i in first}, {"exists": "yes or no", "colour": "colour", "name": "shape"}
        columns = (rows[k] for k in ("question", "multiple_choice_answer", "question_type"))
        for q, a, t, i in zip(*columns, ids, strict=True): self.rows[i].append((q, a, kinds[t]))
        self.ids = list(self.rows)
        images = rows.select([first[i] for i in self.ids])["image"]
        larger = (np.asarray(o.convert("RGB").resize((size, size), 3)) for o in images)
        self.pixels = torch.from_numpy(np.stack([o.transpose(2, 0, 1) for o in larger]))
        self.vocab = vocab or Vocabulary.of([t for i in self.ids for q, a, _ in self.rows[i] for t in (q, a)])

    def __len__(self): return len(self.ids)

    def __getitem__(self, i):
        x = self.pixels[i]
        if self.turn:
            k = int(torch.randint(8, ()))
            x = x.rot90(k % 4, (1, 2)).flip(2) if k > 3 else x.rot90(k, (1, 2))
        rows = self.rows[self.ids[i]]
        rows = [rows[k] for k in torch.randperm(len(rows)).tolist()]
        kinds = [t for *_, t in rows]
        rows = sorted(rows, key=lambda r: kinds.index(r[2]) != rows.index(r))[:self.ask]     # one of each type first
        return dict(pack([Line(self.vocab.encode(q), self.vocab.encode(a) + [EOS]) for q, a, _ in rows]), features=x)


@torch.no_grad()
def transfer(words, name: str = "arr/vlm-mlp") -> VLM:
    "A VLM with other words: words that it knows keep their vectors, new ones are random and as long."
    old = load_vlm(name, device="cpu").model
    new = VLM(replace(old.cfg, words=words)).requires_grad_(True)
    new.load_state_dict({k: v for k, v in old.state_dict().items() if k != "decoder.embed.weight"}, strict=False)
    table, known = old.decoder.embed.weight, [w for w in words if w in old.vocab.index]
    new.decoder.embed.weight.normal_(std=float(table.norm(dim=1).mean()) * table.shape[1] ** -.5)
    new.decoder.embed.weight[[new.vocab.index[w] for w in known]] = table[[old.vocab.index[w] for w in known]]
    return new


def nothing(words, encoder) -> VLM:
    "The same shape with the first weights that arr/vlm-mlp had."
    return start(VLM(replace(load_vlm("arr/vlm-mlp", device="cpu").model.cfg, words=words)), encoder)


def loss(model, batch, grid):
    "Cross-entropy of the answers' words, and the share of them that is right."
    labelled, s = batch["labels"] >= 0, keep_all(Features(model.see(batch["features"]), grid))
    logits = model.vlm(s, batch["tokens"], batch["segments"], batch["places"], labelled=labelled)
    out, right = answer_loss(logits, batch["labels"][labelled])
    return out, dict(right=right)


@torch.no_grad()
def features(model, data: Shapes, batch=50) -> torch.Tensor:
    "Patches of all pictures, `(n, patches, d)`."
    out = []
    for i in range(0, len(data), batch):
        with torch.autocast("cpu", torch.bfloat16): out.append(model.see(data.pixels[i:i + batch]).half())
    return torch.cat(out)


def prior(train: Shapes) -> dict[str, str]:
    "For each question the answer that it has most often in the train split."
    said = defaultdict(Counter)
    for rows in train.rows.values():
        for q, a, _ in rows: said[q][a] += 1
    return {q: c.most_common(1)[0][0] for q, c in said.items()}


@torch.no_grad()
def exam(model, data: Shapes, common: dict[str, str], grid, batch=25) -> dict:
    "Exact match on every question, by type, and controls; Wilson's interval."
    model.eval()
    vlm, seen, right = model.vlm, features(model, data), defaultdict(list)
    say = lambda picture, prompts, rows: [vlm.vocab.decode(o) for o in answer_ids(vlm, picture, prompts, rows, max_new=3)]
    for i in range(0, len(data), batch):
        ids = data.ids[i:i + batch]
        asked = [(q, a, t, k) for k, o in enumerate(ids) for q, a, t in data.rows[o]]
        prompts, rows = [vlm.vocab.encode(q) for q, *_ in asked], [k for *_, k in asked]
        with torch.autocast("cpu", torch.bfloat16):
            picture = read_picture(vlm, keep_all(Features(seen[i:i + batch].float(), grid)))
            blank, others = read_picture(vlm, None, len(ids)), [(k + 1) % len(ids) for k in rows]
            said = dict(accuracy=say(picture, prompts, rows), shuffled_image=say(picture, prompts, others),
                        no_image=say(blank, prompts, rows), question_only=[common.get(q, "yes") for q, *_ in asked])
        for name, words in said.items():
            hits = [w == a for w, (_, a, *_) in zip(words, asked, strict=True)]
            right[name] += hits
            if name == "accuracy":
                for hit, (*_, t, _) in zip(hits, asked, strict=True): right[f"accuracy/{t}"].append(hit)
    share = lambda v: dict(zip(("value", "low", "high", "n"), (sum(v) / len(v), *wilson(sum(v), len(v)), len(v)), strict=True))
    return {k: share(v) for k, v in right.items()}


def run(name, encoder, train, test, a) -> dict:
    "Train on the train split, sit the test; figures and costs."
    (rate, taught), grid = RUNS[name], (a.size // 14,) * 2
    torch.manual_seed(a.seed)
    vlm = transfer(train.vocab.words) if taught else nothing(train.vocab.words, encoder)
    model = Together(copy.deepcopy(encoder.model.vit), vlm, rate)
    steps = max(1, round(a.epochs * len(train) / a.batch))
    cfg = TrainConfig(steps=steps, batch_size=a.batch, lr=a.lr, warmup=min(50, steps), betas=(.9, .98), weight_decay=.05,
                      seed=a.seed, log_every=min(25, steps), save_every=100 if a.runs else None)
    folder = Path(a.runs) / f"easy-{name.replace(' ', '-')}" if a.runs else None
    learner = Learner(model, lambda m, b: loss(m, b, grid), train, cfg, folder, collate=collate_lessons, shuffle=True,
                      groups=model.groups(cfg.weight_decay))
    with Cost() as cost: rows = learner.fit()
    metrics = exam(model, test, prior(train), grid)
    curve = [{k: round(r[k], 4) for k in ("step", "loss", "right")} for r in rows]
    facts = dict(encoder_rate=rate, begins="arr/vlm-mlp" if taught else "nothing", steps=steps)
    facts |= {k: getattr(a, k) for k in ("lr", "size", "batch", "ask", "epochs")}
    cost = cost.facts() | dict(train_seconds=round(learner.seconds, 1), precision=learner.precision)
    return facts | dict(pictures=len(train)) | cost | dict(metrics=metrics, curve=curve)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--epochs", type=float, default=5., help="passes over the 4,000 training pictures")
    p.add_argument("--steps", type=int, help="instead of epochs")
    p.add_argument("--ask", type=int, default=6, help="questions of each picture in a step, drawn anew")
    p.add_argument("--batch", type=int, default=16, help="pictures in a step")
    p.add_argument("--size", type=int, default=112, help="pixels that a picture is enlarged to, a multiple of 14")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", help="names, with commas between")
    p.add_argument("--runs", help="a folder for checkpoints; a run that was stopped is continued")
    p.add_argument("--questions", type=int, help="the first so many of each split; default: all")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, default=HERE / "results" / "easy_vqa.json")
    a = p.parse_args()
    if a.quick: a.steps, a.batch, a.questions = 2, 4, 200
    names = [o.strip() for o in a.only.split(",")] if a.only else list(RUNS)
    if wrong := [o for o in names if o not in RUNS]: p.error(f"no run {wrong[0]!r}: choose from {', '.join(RUNS)}")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    encoder = load("arr/filip-ti")
    train = Shapes("train", a.size, a.questions, turn=True, ask=a.ask)
    test = Shapes("test", a.size, a.questions, train.vocab)
    if a.steps: a.epochs = a.steps * a.batch / len(train)
    for name in names:
        out = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(runs={})
        if name in out["runs"]: continue
        found = run(name, encoder, train, test, a)
        out = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(runs={})
        out["runs"][name], out["published"] = found, PUBLISHED
        out["provenance"] = provenance("easy-vqa", seed=a.seed, encoder=encoder.fingerprint,
                                       command="python labs/frozen_or_trainable/shapes.py")
        write_json(a.out, out)
        print(name, found["seconds"], {k: round(v["value"], 4) for k, v in found["metrics"].items()}, flush=True)


if __name__ == "__main__": main()
