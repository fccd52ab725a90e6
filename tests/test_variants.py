"The budget lab's variants: what is changed is changed, what is chosen is best, and every one keeps what was asked for."
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arr_course.arr import arr_2
from arr_course.relevance import look
from arr_course.vqa_evaluate import Exam
from arr_course.world import render
from arr_course.zoo import load

LAB = Path(__file__).resolve().parent.parent / "labs" / "budget_vs_accuracy"


@pytest.fixture(scope="module")
def lab():
    spec = importlib.util.spec_from_file_location("variants", LAB / "variants.py")
    sys.modules["variants"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def context():
    items = list(Exam("dense", 18, seed=2, split="val").items())
    pictures, questions = [render(o.scene) for o in items], [o.question.text for o in items]
    with torch.no_grad(): return look(load("arr/filip-ti", device="cpu"), pictures, questions, keys=True)


def kept(reducer, context):
    with torch.no_grad(): return reducer(context, 24)


def test_every_variant_keeps_what_was_asked_for_and_something_else(lab, context):
    base = kept(arr_2(), context)
    for name, reducer in (lab.ABLATIONS | lab.candidates()).items():
        s = kept(reducer, context)
        assert set(s.lengths.tolist()) == {24}, name
        changed = not torch.equal(s.index, base.index) or not torch.equal(s.pos, base.pos)
        assert changed or name not in lab.ABLATIONS, f"{name} is ARR-2 itself"


def test_the_papers_own_setting_changes_nothing(lab, context):
    published = lab.candidates()
    for name, own in (("scope", lab.partial(lab.scope, alpha=1.)), ("vispruner", lab.partial(lab.vispruner, important=.5)),
                      ("dart", lab.partial(lab.dart, pivots=8)), ("mmtok", lab.partial(lab.cover_both, alpha=.5, text=.02))):
        again = lab.with_setting(name, dict(choose=own))
        assert torch.equal(kept(again, context).index, kept(published[name], context).index), name
    again = lab.with_setting("cdpruner", dict(score=lab.power_of(1)))
    assert torch.equal(kept(again, context).index, kept(published["cdpruner"], context).index)


class Answers:
    "A runner that knows how many of 40 answers are right."
    def __init__(self, right): self.right = right

    def found(self, name, budget, model):
        n = self.right.get((name, budget), 20)
        return dict(n=40, right=np.packbits(np.arange(40) < n).tobytes().hex(), budget=budget)


def test_the_best_setting_is_chosen_over_both_budgets_and_the_published_one_if_as_good(lab):
    right = {("scope alpha=2.0", 64): 30, ("scope alpha=0.5", 32): 29, ("dart pivots=2", 64): 22, ("dart pivots=2", 32): 18}
    found = lab.chosen(Answers(right))
    assert found["scope"]["setting"] == "alpha=2.0" and found["scope"]["tried"]["alpha=2.0"] == [.75, .5]
    assert found["dart"]["setting"] == found["eadp"]["setting"] == "published"


def test_settings_are_read_back(lab, tmp_path, context):
    path = tmp_path / "tuned.json"
    assert lab.tuned(path) == {}
    path.write_text('{"methods": {"scope": {"setting": "alpha=2.0"}, "dart": {"setting": "published"}}}')
    assert list(lab.tuned(path)) == ["scope+tuned"]
    again = lab.tuned(path)["scope+tuned"]
    assert torch.equal(kept(again, context).index, kept(lab.candidates()["scope alpha=2.0"], context).index)


def test_ablations_are_paired_with_the_same_budget(lab):
    rows = lab.ablations(Answers({("arr-2:fixed", 64): 30}), "m")
    assert len(rows) == 2 * len(lab.ABLATIONS) and {r["budget"] for r in rows} == set(lab.TUNED_AT)
    for budget, gap in ((64, -.25), (32, 0)): assert {r["difference"]["value"] for r in rows if r["budget"] == budget} == {gap}


class Seeds(Answers):
    "Two models, of which the second is right five times more; ARR-2 is adaptive at 64 only."
    rows = ("full", 576), ("arr-2", 64), ("arr-2:fixed", 64), ("sieve", 64), ("arr-2:fixed", 16), ("sieve", 16)
    lines = [dict(method=m, budget=b) for m, b in rows]

    def found(self, name, budget, model):
        if (name, budget, model) == ("sieve", 16, "b"): return None
        n = self.right[name] + 5 * (model == "b")
        return dict(right=np.packbits(np.arange(40) < n).tobytes().hex(), n=40, budget=budget)


def test_seeds_are_averaged_and_a_method_that_one_seed_lacks_is_left_out(lab):
    rows = lab.seeds(Seeds({"full": 21, "arr-2": 25, "arr-2:fixed": 20, "sieve": 15}), ("a", "b"))
    assert [(r["method"], r["budget"]) for r in rows] == [("full", 64), ("arr-2:fixed", 64), ("sieve", 64), ("full", 16)]
    assert [r["asked"] for r in rows] == [576, 64, 64, 576]
    assert [round(40 * r["accuracy"], 6) for r in rows] == [23.5, 22.5, 17.5, 23.5]
    assert [round(40 * r["arr_2_minus_it"]["value"], 6) for r in rows] == [4, 5, 10, -1]
    assert not any("same_mean_minus_it" in r for r in rows)
    assert all(r["arr_2_minus_it"]["low"] <= r["arr_2_minus_it"]["value"] <= r["arr_2_minus_it"]["high"] for r in rows)


def test_arr_2_held_to_the_mean_is_compared_as_well(lab):
    some = Seeds({"arr-2": 25, "arr-2:fixed": 20, "sieve": 15, lab.SAME: 24})
    some.lines = [dict(method=m, budget=64) for m in ("arr-2", lab.SAME, "sieve")]
    rows = {r["method"]: r for r in lab.seeds(some, ("a", "b"))}
    assert set(rows) == {lab.SAME, "sieve"} and "same_mean_minus_it" not in rows[lab.SAME]
    assert round(40 * rows["sieve"]["same_mean_minus_it"]["value"], 6) == 9
    assert round(40 * rows[lab.SAME]["arr_2_minus_it"]["value"], 6) == 1
