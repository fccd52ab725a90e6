"The world: determinism, promises about what is in view, questions checked against the pixels, the data set."
import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arr_course.concepts import CLUTTER, COLOURS, CONCEPTS, HELD_OUT, TRAINED, WORDS, drawing, names_of, sprite
from arr_course.pairs import as_dataset, complement, easy_vqa, in_view, question_pairs
from arr_course.questions import REGIONS, TYPES, Question, answer, ask, evidence, evidence_mask, hidden, pose
from arr_course.world import (
    DENSITIES,
    Scene,
    Thing,
    caption,
    paint,
    paint_ids,
    patch_cover,
    patch_masks,
    render,
    sample_scene,
    words_of,
)

VQAV2 = {"question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id", "question", "image"}


def digest(density, seeds=range(6)):
    h = hashlib.sha256()
    for s in seeds:
        scene = sample_scene(s, density)
        im, ids = paint(scene)
        for part in (im.tobytes(), ids.tobytes(), repr(scene).encode(), repr(ask(scene, 1)).encode(), caption(scene).encode()):
            h.update(part)
        for q in ask(scene): h.update(repr(complement(scene, q)).encode())
    return h.hexdigest()


def test_same_seed_same_world_in_another_process():
    "With another hash seed, so that no set or dict order can decide."
    code = "import sys; sys.path.insert(0, 'tests'); import test_world as t; print(*map(t.digest, t.DENSITIES))"
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root,
                         env={**os.environ, "PYTHONHASHSEED": "1"})
    assert run.stdout.split() == [digest(d) for d in DENSITIES]


def test_dense_scenes_are_dense():
    "12 to 30 things and 250 to 400 of the 576 patches covered, in each of 300 scenes."
    for seed in range(300):
        scene = sample_scene(seed, "dense", "test")
        cover = patch_cover(paint_ids(scene), len(scene.things))
        assert 12 <= len(scene.things) <= 30
        assert 250 <= (cover.sum(0) >= .25).sum() <= 400, seed
        assert (cover.sum(1) > 0).all(), "a thing that cannot be seen at all"
        assert all(20 <= t.size <= 110 for t in scene.things)
        assert {t.name == "clutter" for t in scene.things} == {True, False}, "named things and clutter"
        assert all(28 <= .7 * t.size for t in scene.things if t.name == "sign"), "a digit of at least 24 pixels"


def test_sparse_and_crop_scenes():
    for seed in range(200):
        sparse, crop = (sample_scene(seed, d) for d in ("sparse", "crop"))
        assert sparse.size == 336 and 2 <= len(sparse.things) <= 12 and sparse.named == sparse.things
        assert crop.size == 112 and 1 <= len(crop.things) <= 5 and crop.named
        assert render(crop).size == (112, 112) and render(sparse).mode == "RGB"


def test_hardly_anything_is_hidden():
    "In 99.4 % of cases a thing shows at least 40 % of itself (several on top of one may hide more), and never nothing."
    shares = []
    for seed in range(120):
        scene = sample_scene(seed, "dense", "test")
        shown = np.bincount(paint_ids(scene).ravel(), minlength=len(scene.things) + 1)[1:]
        for t, n in zip(scene.things, shown, strict=True):
            alone = Scene(t.size, (replace(t, x=t.size // 2, y=t.size // 2),), scene.background)
            shares.append(n / (paint_ids(alone) > 0).sum())
    assert len(shares) > 2000 and min(shares) > .05 and np.mean(np.array(shares) < .4) < .006


def test_splits_share_no_scene():
    split = {s: {render(sample_scene(i, "crop", s)).tobytes() for i in range(60)} for s in ("train", "val", "test")}
    assert all(len(o) == 60 for o in split.values())
    assert not split["train"] & split["val"] and not split["train"] & split["test"] and not split["val"] & split["test"]


def test_held_out_concepts_stay_held_out():
    "In training, neither a scene nor a caption nor a question nor a complement ever shows or names one."
    assert len(TRAINED) >= 100 and not set(TRAINED) & set(HELD_OUT) and not set(WORDS) & set(HELD_OUT)
    for seed in range(100):
        for density in DENSITIES:
            scene = sample_scene(seed, density)
            for q in ask(scene):
                other = complement(scene, q)
                named = {t.name for s in (scene, other or scene) for t in s.things}
                named |= {q.answer, *q.args, *q.answer.split(" and ")}
                assert not named & set(HELD_OUT)
    scene = sample_scene(0, "sparse", "test", HELD_OUT)
    assert all(t.name in (*HELD_OUT, "sign") for t in scene.things)
    assert all(set(q.cue) - {"sign"} <= set(HELD_OUT) or q.cue[0].endswith("disc") for q in ask(scene) if q.cue)


def test_the_three_sets_of_drawings_are_apart():
    codes = [c.code for c in CONCEPTS.values()]
    assert len(set(codes)) == len(codes) == 120 and not set(codes) & set(CLUTTER)
    every = [n for c in CONCEPTS for n in names_of(c)]
    assert len(every) == len(set(every)), "a name for two concepts"
    looks = {c: drawing(c).tobytes() for c in (*codes, *CLUTTER)}
    assert len(set(looks.values())) == len(looks), "two codes with the same picture"


# ---- questions against the pixels: an independent rule on the id map

def look(scene):
    "From the id map alone: the centre and longer side of what shows of each thing, with what its id stands for."
    ids, out = paint_ids(scene), []
    for i, t in enumerate(scene.things):
        y, x = np.nonzero(ids == i + 1)
        if not len(x): continue
        centre = dict(x=(x.min() + x.max() + 1) / 2, y=(y.min() + y.max() + 1) / 2)
        out.append(dict(i=i, name=t.name, colour=t.colour, digit=t.digit, **centre, side=max(np.ptp(x), np.ptp(y)) + 1))
    return out


def in_pixels(scene, seen, q):
    "The answer and the evidence by brute force."
    of = lambda name: [o for o in seen if o["name"] == name]
    third = lambda o: REGIONS[3 * int(3 * o["y"] / scene.size) + int(3 * o["x"] / scene.size)]
    side = lambda o: o["side"] * (.7 if o["colour"] else 1)
    if q.type == "exists": return "yes" if of(q.args[0]) else "no", of(q.args[0])
    if q.type == "count": return str(len(of(q.args[0]))), of(q.args[0])
    if q.type == "where": return third(of(q.args[0])[0]), of(q.args[0])
    if q.type == "colour": return of(q.args[0])[0]["colour"], of(q.args[0])
    if q.type == "number": return str(of("sign")[0]["digit"]), of("sign")
    if q.type == "relation":
        a, b = of(q.args[0]) + of(q.args[2])
        return "yes" if (a["x"] < b["x"] if q.args[1] == "left of" else a["y"] < b["y"]) else "no", [a, b]
    if q.type == "compare":
        a, b = of(q.args[0]) + of(q.args[1])
        return "yes" if side(a) > side(b) else "no", [a, b]
    if q.type == "name":
        hits = [o for o in seen if o["name"] != "clutter" and q.args[0] in (third(o), f"{o['colour']} disc")]
        return (hits[0]["name"] if len(hits) == 1 else hits), hits
    two = sorted((o for o in seen if o["name"] != "clutter"), key=side)[-2:]
    return " and ".join(sorted(o["name"] for o in two)), two


@pytest.mark.parametrize("density", ["dense", "sparse"])
def test_answers_hold_in_the_pixels(density):
    "Every answer and its evidence, also of the complement, agree with the id map (partly hidden things may shift: 1 %)."
    n, wrong = Counter(), Counter()
    for seed in range(90):
        scene = sample_scene(seed, density, "val")
        seen = look(scene)
        for q in ask(scene, 7):
            for s, view in ((scene, seen), (o := complement(scene, q), o and look(o))):
                if s is None: continue
                said, found = in_pixels(s, view, q)
                n[q.type] += 1
                wrong[q.type] += said != answer(s, q.type, q.args) or {o["i"] for o in found} != set(evidence(s, q))
    assert min(n[t] for t in TYPES) >= 50
    for t in ("exists", "count", "colour", "number", "relation"): assert not wrong[t], (t, wrong[t], n[t])
    for t in ("where", "compare", "name", "describe"): assert wrong[t] <= .01 * n[t], (t, wrong[t], n[t])


@pytest.mark.parametrize("density", DENSITIES)
def test_complements(density):
    "Nearly every question has one; its answer differs, it is well posed and in view, and little else is changed."
    tried, found = Counter(), Counter()
    for seed in range(60):
        scene = sample_scene(seed, density, "test")
        for q in ask(scene, 3):
            tried[q.type] += 1
            if (other := complement(scene, q)) is None: continue
            found[q.type] += 1
            assert answer(other, q.type, q.args) not in (None, q.answer) and in_view(other, scene)
            changed = [i for i, (a, b) in enumerate(zip(scene.things, other.things, strict=True)) if a != b]
            assert len(other.things) == len(scene.things) and other.background == scene.background
            assert 1 <= len(changed) <= (4 if q.type == "exists" else 2)
            assert complement(scene, q) == other
    assert all(found[t] >= .8 * tried[t] for t in TYPES), (found, tried)


def test_complements_stay_dense():
    for p in question_pairs(90, "dense", "test", seed=5):
        cover = patch_cover(paint_ids(p.other), len(p.other.things))
        assert 250 <= (cover.sum(0) >= .25).sum() <= 400, p


def test_evidence_patches_show_the_evidence():
    for seed in range(25):
        scene = sample_scene(seed, "dense", "test")
        ids, each = paint_ids(scene), patch_masks(paint_ids(scene), len(scene.things))
        cells = ids.reshape(24, 14, 24, 14).swapaxes(1, 2).reshape(576, -1)
        for q in ask(scene):
            mask, which = evidence_mask(scene, q), evidence(scene, q)
            if not which: assert q.answer in ("no", "0") and not mask.any()
            for i in which:
                assert each[i].any() and not (each[i] & ~mask).any()
                assert (ids == i + 1).sum() * .4 < (cells[mask] == i + 1).sum(), "most of its pixels; of small things 40 %"
            assert all(np.isin(cell, np.array(which) + 1).any() for cell in cells[mask]), "a patch without evidence"


def test_answer_priors_are_flat():
    said = {t: Counter() for t in TYPES}
    for seed in range(500):
        for q in ask(sample_scene(seed, "dense", "val")): said[q.type][q.answer] += 1
    share = lambda t: max(said[t].values()) / sum(said[t].values())
    assert all(share(t) < .57 for t in ("exists", "relation", "compare"))
    most = dict(count=.33, where=.18, colour=.24, number=.18, name=.08)
    assert all(share(t) < m for t, m in most.items())


# ---- a scene made by hand

def by_hand(*things, size=336): return Scene(size, things, (0, 0, 0, 1.), "test", "sparse", 0)


def test_rules_on_a_scene_made_by_hand():
    scene = by_hand(Thing("cat", 40, 40, 60, colour="red"), Thing("dog", 280, 60, 80), Thing("fox", 60, 280, 40),
                    Thing("fox", 280, 280, 40), Thing("sign", 168, 168, 50, digit=7), Thing("clutter", 168, 40, 109, code="267B"))
    ask_of = lambda *question: answer(scene, question[0], question[1:])
    assert ask_of("exists", "cat") == "yes" and ask_of("exists", "cow") == "no"
    assert ask_of("count", "fox") == "2" and ask_of("count", "cow") == "0"
    assert ask_of("where", "cat") == "top left" and ask_of("where", "sign") == "centre" and ask_of("where", "fox") is None
    assert ask_of("colour", "cat") == "red" and ask_of("colour", "dog") is None
    assert ask_of("relation", "cat", "left of", "dog") == "yes" and ask_of("relation", "sign", "above", "cat") == "no"
    assert ask_of("relation", "cat", "above", "dog") is None, "too close to call"
    assert ask_of("relation", "cat", "above", "fox") is None, "which fox?"
    assert ask_of("compare", "dog", "cat") == "yes" and ask_of("compare", "cat", "cat") is None
    assert ask_of("name", "red disc") == "cat" and ask_of("name", "top right") == "dog"
    assert ask_of("name", "blue disc") is None and ask_of("name", "top centre") is None, "clutter has no name"
    assert ask_of("number") == "7" and ask_of("describe") == "dog and sign"
    assert evidence(scene, pose(scene, "count", ("fox",))) == (2, 3)
    assert evidence(scene, pose(scene, "exists", ("cow",))) == ()
    assert pose(scene, "exists", ("umbrella",)).text == "Is there an umbrella?"
    assert pose(scene, "count", ("cherries",)) is None, "one drawing of cherries shows two"
    assert pose(scene, "number", ()) == Question("number", "What number is on the sign?", "7", (), ("sign",))


def test_what_is_half_hidden_is_not_asked_about():
    cat, dog = Thing("cat", 100, 100, 60), Thing("dog", 110, 100, 60)
    assert hidden(by_hand(cat, dog), 0) == pytest.approx(5 / 6) and hidden(by_hand(cat, dog), 1) == 0
    assert answer(by_hand(cat, dog), "exists", ("cat",)) is None and answer(by_hand(cat, dog), "exists", ("dog",)) == "yes"


def test_close_calls_are_not_asked():
    near = lambda x: by_hand(Thing("cat", x, 40, 60), Thing("dog", 250, 280, 60))
    assert answer(near(112), "where", ("cat",)) is None and answer(near(100), "where", ("cat",)) == "top left"
    assert answer(near(112), "name", ("top left",)) is None and answer(near(112), "name", ("top centre",)) is None
    assert answer(near(225), "relation", ("cat", "left of", "dog")) is None
    same = by_hand(Thing("cat", 40, 40, 60), Thing("dog", 250, 280, 74), Thing("cow", 250, 40, 75))
    assert answer(same, "compare", ("cat", "dog")) is None and answer(same, "compare", ("cow", "cat")) == "yes"
    assert answer(same, "describe", ()) == "cow and dog"
    assert answer(by_hand(*(Thing("cat", 30 + 60 * i, 40, 40) for i in range(5))), "count", ("cat",)) is None


def test_words_agree_with_things():
    cat, sign = Thing("cat", 40, 40, 60, colour="red"), Thing("sign", 168, 168, 50, digit=0)
    scene = by_hand(cat, sign, Thing("clutter", 280, 280, 60, code="267B"))
    assert words_of(scene) == {"cat", "red disc", "sign", "number 0"} <= set(WORDS)
    assert caption(scene) == "a cat on a red disc and a sign that says 0"


BAD = {"no density 'full'": lambda s: sample_scene(0, "full"),
       "no split 'dev'": lambda s: sample_scene(0, split="dev"),
       "no question type 'why'": lambda s: answer(s, "why", ()),
       "no question type 'how'": lambda s: ask(s, types=("how",)),
       "'catt' is not a concept": lambda s: answer(s, "exists", ("catt",)),
       "'under' is not left of or above": lambda s: answer(s, "relation", ("cat", "under", "dog")),
       "'middle' is not a ninth": lambda s: answer(s, "name", ("middle",)),
       "takes 2 arguments, not 1": lambda s: answer(s, "compare", ("cat",)),
       "no split 'val'": lambda s: easy_vqa("val"),
       "no question type 'who'": lambda s: next(question_pairs(1, types=("who",))),
       "at least 0": lambda s: list(question_pairs(-1))}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message): BAD[message](sample_scene(0, "sparse"))


def test_unknown_drawings_and_words_are_named():
    with pytest.raises(FileNotFoundError, match="no drawing FFFFF"): sprite("FFFFF", 20)
    with pytest.raises(KeyError, match="neither a concept"): names_of("catt")


# ---- as a data set

def test_dataset_round_trip(tmp_path):
    "Saved and loaded it is the same; pictures are pixel-exact; pairs share a question and differ in answer and picture."
    from datasets import load_from_disk
    ds = as_dataset(18, "sparse", "test", seed=3)
    assert set(ds.column_names) == VQAV2 | {"pair_id"} and len(ds) == 36
    ds.save_to_disk(tmp_path / "ds")
    back = load_from_disk(str(tmp_path / "ds"))
    assert back.features == ds.features
    for a, b in zip(ds, back, strict=True):
        assert a.pop("image").tobytes() == b.pop("image").tobytes() and a == b
    for i, p in enumerate(question_pairs(18, "sparse", "test", seed=3)):
        one, two = ds[2 * i], ds[2 * i + 1]
        assert one["question"] == two["question"] == p.question.text and one["pair_id"] == two["pair_id"] == i
        assert one["multiple_choice_answer"] == p.question.answer != two["multiple_choice_answer"] == p.other_answer
        assert one["image"].tobytes() == render(p.scene).tobytes() and two["image"].tobytes() == render(p.other).tobytes()
        assert [o["answer"] for o in one["answers"]] == [p.question.answer] * 10
    assert len(set(ds["image_id"])) == 36 and Counter(ds["question_type"]) == dict.fromkeys(TYPES, 4)
    assert len(as_dataset(4, "crop", pairs=False)) == 4 and len(as_dataset(0)) == 0


def test_answer_types_are_vqav2s():
    rows = as_dataset(18, "sparse", pairs=False).remove_columns("image")
    kind = dict.fromkeys(TYPES, "other") | dict.fromkeys(("count", "number"), "number")
    kind |= dict.fromkeys(("exists", "relation", "compare"), "yes/no")
    assert {r["question_type"]: r["answer_type"] for r in rows} == kind


def test_easy_vqa_has_the_same_columns():
    ours, theirs = as_dataset(1, "crop"), easy_vqa("test")
    assert ours.features == theirs.features and len(theirs) == 9673
    assert Counter(theirs["question_type"]).keys() == {"exists", "colour", "name"}
    assert theirs[0]["image"].size == (64, 64) and set(theirs["multiple_choice_answer"]) >= {"circle", "teal", "yes"}


def test_colours_and_shapes_are_told_apart():
    "Six disc colours, far apart in RGB."
    rgb = np.array(list(COLOURS.values()))
    gap = np.abs(rgb[:, None] - rgb[None]).sum(-1) + 999 * np.eye(len(rgb))
    assert len(rgb) == 6 and gap.min() > 80
