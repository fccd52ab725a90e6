"""`arr-course budget` and the harness: its rows, going on where it was stopped, and answers that are the model's."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer"), pytest.importorskip("emoji"), pytest.importorskip("resvg_py"), pytest.importorskip("scipy")

from typer.testing import CliRunner  # noqa: E402

from arr_course.bench import taken  # noqa: E402
from arr_course.cli import app  # noqa: E402
from arr_course.connectors import keep, keep_all  # noqa: E402
from arr_course.core import cache_dir  # noqa: E402
from arr_course.harness import Runner, right_of, run  # noqa: E402
from arr_course.papers import Paper, methods_of, read_part  # noqa: E402
from arr_course.vit import Features  # noqa: E402
from arr_course.vlm import answer, load_vlm  # noqa: E402
from arr_course.vqa_evaluate import Exam  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache folder of its own."
    monkeypatch.setenv("ARR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def budget(*args):
    r = CliRunner().invoke(app, ["budget", *map(str, args)])
    return r.exit_code, r.output


def test_rows_and_resumption(cache):
    "The rows of the issue; the same command again computes nothing and says the same."
    args = [
        "--density",
        "sparse",
        "--questions",
        18,
        "--seed",
        4,
        "--budgets",
        "64,32",
        "--methods",
        "full,random,arr-1,arr-2,arr-2:fixed,arr-2:shuffled,oracle",
        "--model",
        "arr/vlm-mlp,reader",
        "--precision",
        "fp32",
        "--results",
        cache / "r.jsonl",
        "--json",
        "-",
    ]
    code, out = budget(*args)
    assert code == 0, out
    rows, stored = json.loads(out)["rows"], (cache / "r.jsonl").read_text()
    assert len(rows) == 2 * (1 + 2 * 6)
    assert {"method", "budget", "mean_tokens", "accuracy", "ci", "diff_to_full", "diff_to_best_peer", "seconds"} <= rows[
        0
    ].keys()
    by = {(r["model"], r["method"], r["budget"]): r for r in rows}
    full = by["arr/vlm-mlp", "full", 576]
    assert (
        full["mean_tokens"] == 576
        and full["diff_to_full"]["value"] == 0
        and set(full["seconds"]) == {"encode", "select", "prefill", "decode"}
    )
    for m in ("arr/vlm-mlp", "reader"):
        assert by[m, "arr-2:fixed", 64]["mean_tokens"] == 64 and by[m, "oracle", 32]["std_tokens"] == 0
        assert by[m, "arr-2:shuffled", 32]["mean_tokens"] == by[m, "arr-2", 32]["mean_tokens"]
        assert by[m, "arr-1", 32]["best_peer"] == "random"
    again = budget(*args)
    assert json.loads(again[1])["rows"] == rows and (cache / "r.jsonl").read_text() == stored


def test_answers_are_those_of_the_model(cache):
    "What the harness counts as right with all patches is what `vlm.answer` says about the stored features."
    vlm = load_vlm("arr/vlm-mlp", device="cpu")
    paper = Paper(vlm.encoder, Exam("dense", 8, seed=2, split="val"), cache_dir("exams"), bf16=False).fill()
    (line,) = run(Runner(paper, ["arr/vlm-mlp"], methods_of(vlm.encoder, ["full"])), ["full"], [64])
    said = answer(vlm.model, keep_all(read_part(paper, 0).features), [i.question.text for i in paper.items])
    assert right_of(line).tolist() == [a == i.answer for a, i in zip(said, paper.items, strict=True)]
    other = Runner(paper, ["arr/vlm-mlp"])
    other.lines = [line | dict(weights="another model")]
    assert other.found("full", 576, "arr/vlm-mlp") is None


def test_two_processes_share_and_agree(cache):
    "Shares of two ranks together are the results of one, without overlap."
    vlm = load_vlm("arr/vlm-mlp", device="cpu")
    paper = Paper(vlm.encoder, Exam("sparse", 8, seed=2, split="val"), cache_dir("exams"), bf16=False).fill(0, 2)
    paper.fill(1, 2)
    methods, names = methods_of(vlm.encoder, ["full", "random", "uniform"]), ["full", "random", "uniform"]
    alone = run(Runner(paper, ["reader"], methods), names, [64, 16])
    shares = [run(Runner(paper, ["reader"], methods, cache / "a.jsonl", rank, 2), names, [64, 16]) for rank in (0, 1)]
    key = lambda o: (o["method"], o["budget"], o["right"])
    assert len(shares[0]) < len(alone) and sorted(map(key, shares[1])) == sorted(map(key, alone))
    assert np.mean([right_of(o).mean() for o in alone]) > 0


@pytest.mark.parametrize(
    "args,says",
    [
        (["--budgets", "x"], "whole numbers"),
        (["--budgets", "0"], "at least one"),
        (["--methods", "best"], "no method 'best'"),
        (["--questions", 7], "even number"),
        (["--model", "arr/filip-ti"], "not a VLM"),
        (["--model", "arr/no"], "arr/no"),
        (["--density", "full"], "neither dense nor sparse"),
        (["--methods", "random:fixed", "--questions", 4], "no budget rule"),
    ],
)
def test_mistakes(cache, args, says):
    "One line and exit code 2."
    code, out = budget(*args)
    assert code == 2 and says in out and "Traceback" not in out


LAB = Path(__file__).resolve().parent.parent / "labs" / "budget_vs_accuracy"


@pytest.fixture(scope="module")
def shapes():
    "The lab's script on easy-VQA as a module; the folder on frozen encoders has one of the same name."
    pytest.importorskip("easy_vqa"), pytest.importorskip("accelerate")
    path, threads = list(sys.path), torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("budget_shapes", LAB / "shapes.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    yield module
    sys.path[:] = path
    torch.set_num_threads(threads)
    for name in ("shapes", "shapes_report", "together"):
        sys.modules.pop(name, None)


def test_easy_vqa_runs_and_goes_on(shapes, tmp_path, monkeypatch):
    "A quick run has every row and control; the same again trains nothing, encodes nothing, answers nothing and says the same."
    out = tmp_path / "easy.json"
    folders = ["--features", str(tmp_path / "f"), "--runs", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--quick", "--out", str(out), *folders])
    shapes.main()
    found, lines = json.loads(out.read_text(encoding="utf-8")), out.with_suffix(".jsonl").read_text(encoding="utf-8")
    by = {(r["method"], r["budget"]): r for r in found["rows"]}
    assert by["full", 144]["diff_to_full"]["value"] == 0 and by["full", 144]["mean_tokens"] == 144
    assert by["arr-2:fixed", 36]["std_tokens"] == 0 < by["arr-2", 36]["std_tokens"] and by["arr-1", 9]["mean_tokens"] == 9
    assert 0 <= found["shape_kept"]["random"]["9"] < found["shape_kept"]["random"]["36"] < 1
    for r in found["rows"]:
        f, parts = r["accuracy"], r["by_type"].values()
        assert f["low"] <= f["value"] <= f["high"] and f["questions"] == sum(p["questions"] for p in parts)
        assert abs(f["value"] - sum(p["value"] * p["questions"] for p in parts) / f["questions"]) < 1e-3
    assert list(found["held_out"]) == ["arr-2:fixed"] and set(found["held_out"]["arr-2:fixed"]) == {"9", "36"}
    assert set(found["controls"]) == {"question_only", "no_image", "shuffled_image"} and len(found["trained"]["curve"]) == 1
    assert out.with_suffix(".png").stat().st_size < 60_000 and {"commit", "versions", "encoder"} <= set(found["provenance"])
    for name in ("encode", "measure"):
        monkeypatch.setattr(shapes, name, None)  # to call it would raise
    monkeypatch.setattr(shapes.Learner, "one_step", None)
    shapes.main()
    assert json.loads(out.read_text(encoding="utf-8")) == found and out.with_suffix(".jsonl").read_text(encoding="utf-8") == lines


def test_easy_vqa_seeds_are_those_of_the_single_runs():
    "The table of three seeds holds each seed's own accuracies, their mean, and differences that are 0 beside itself."
    read = lambda name: json.loads((LAB / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [read(f"easy_vqa{s}")["rows"] for s in ("", "-s1", "-s2")]
    single = [{(r["method"], r["budget"]): r["accuracy"]["value"] for r in o} for o in rows]
    table = read("easy_vqa-seeds")
    assert len(table["rows"]) == len(single[0]) and len(set(table["begins"])) == 3
    for r in table["rows"]:
        assert r["seeds"] == [pytest.approx(o[r["method"], r["budget"]], abs=1e-4) for o in single]
        assert r["accuracy"]["value"] == pytest.approx(sum(r["seeds"]) / 3, abs=1e-4)
        assert r["method"] != "arr-2" or r["arr_2_minus_it"] == dict(value=0, low=0, high=0)


def test_easy_vqa_answers_are_those_of_the_model(shapes):
    "Several questions behind one reading of a picture are answered as each would be alone, whatever the other pictures' lengths."
    vlm = load_vlm("arr/vlm-mlp", device="cpu").model
    g = torch.Generator().manual_seed(0)
    s = keep(Features(torch.randn(3, 16, 192, generator=g), (4, 4)), [torch.arange(16), torch.tensor([3]), torch.arange(5)])
    asked = [["is there a cat?"], ["is there a dog?", "how many cats are there?"], ["is there a red disc?"] * 2]
    said, _ = shapes.answers(vlm, s, [[vlm.vocab.encode(q) for q in o] for o in asked])
    for i, questions in enumerate(asked):
        assert said[i] == answer(vlm, taken(s, [i]), questions, rows=[0] * len(questions), max_new=3)


def test_easy_vqa_evidence_and_shared_selections(shapes):
    "A shape on a plain ground is found patch by patch; questions share a selection where the method cannot tell them apart."
    x = torch.full((1, 3, 56, 56), 240, dtype=torch.uint8)
    x[0, 0, 14:42, 28:42] = 0
    assert shapes.evidence(x)[0].nonzero()[:, 0].tolist() == [6, 10]
    asked = [(0, "is there a red shape?"), (0, "is there a circle?"), (0, "what shape is present?"), (1, "is there a circle?")]
    assert list(shapes.groups(asked, False).values()) == [[0, 1, 2], [3]]
    assert list(shapes.groups(asked, True).values()) == [[0], [1, 2], [3]]
