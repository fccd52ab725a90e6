"""The command as a user meets it: a separate process, its exit code, its output."""
import json
import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-c", "from arr_course.cli import main; main()"]


def arr(*args, **kw):
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, **kw)


def test_doctor_knows_this_machine():
    r = arr("doctor", "--json")
    assert r.returncode == 0, r.stderr
    rows = {c["name"]: c for c in json.loads(r.stdout)}
    assert rows["Python"]["status"] == "OK" and rows["torch"]["status"] == "OK"
    assert {"device", "bf16", "EfficientNet-Lite0", "model hub", "cache", "disk", "extra [models]"} <= set(rows)


def test_help_names_every_command():
    out = arr("--help").stdout
    assert all(c in out for c in ("toolkit", "photos", "models", "doctor", "world", "evaluate", "train"))


@pytest.mark.parametrize("args, says", [
    (["toolkit", "no-such-folder", "--labels", "a cat"], "no-such-folder"),
    (["toolkit", "."], "--labels"),
    (["toolkit", ".", "--labels", " , ,"], "label"),
    (["world", "--density", "full", "--out", "w"], "no density 'full'"),
    (["world", "--split", "all", "--out", "w"], "no split 'all'"),
    (["evaluate", "arr/nothing"], "arr/nothing"),
    (["evaluate", "pkg/efficientnet-lite0", "--parts", "grounding"], "cannot be evaluated on 'grounding'"),
    (["evaluate", "pkg/efficientnet-lite0", "--density", "full"], "neither dense nor sparse"),
    (["evaluate", "arr/filip-ti", "--parts", ""], "cannot be evaluated on ''"),
    (["evaluate", "arr/filip-ti", "--beams", "4"], "--beams and --once are for VLMs"),
    (["evaluate", "arr/filip-ti", "--once"], "--beams and --once are for VLMs"),
    (["evaluate", "arr/filip-ti", "--json", "."], "--json . cannot be written: it is a folder"),
    (["budget", "--json", "."], "--json . cannot be written: it is a folder"),
    (["budget", "--methods", "arr-2:foo"], "variants are :fixed and :shuffled"),
    (["budget", "--budgets", "600"], "a picture has 576"),
    (["budget", "--results", "answers.json"], "kept in a .jsonl file"),
    (["train", "clip-b"], "no recipe 'clip-b'"),
    (["train", "vlm-mlp", "--n", "7", "--processes", "2"], "--n 7: questions come in pairs"),
    (["train", "vlm-mlp", "--out", "there"], "--out there cannot be written: there is a file"),
    (["budget", "--results", "there/r.jsonl"], "--results there/r.jsonl cannot be written"),
    (["budget", "--model", "pkg/minilm"], "pkg/minilm is not a VLM"),
    (["budget", "--methods", "full:fixed"], "full:fixed: `full` keeps every patch"),
    (["budget", "--budgets", "²"], "whole numbers of tokens"),
    (["toolkit", ".", "--labels", "a cat", "--csv", "there/x.csv"], "--csv there/x.csv cannot be written"),
    (["toolkit", ".", "--labels", "a cat", "--masks", "there"], "--masks there cannot be written"),
    (["toolkit", ".", "--labels", "a cat", "--backbone", "pkg/minilm"], "pkg/minilm"),
    (["toolkit", ".", "--labels-file", "latin"], "--labels-file latin is not UTF-8 text"),
    (["world", "--out", "there"], "--out there cannot be written: there is a file"),
    (["photos", "there"], "FOLDER there cannot be written: there is a file"),
])
def test_mistakes_get_one_line(args, says, tmp_path):
    (tmp_path / "there").write_text("a file")
    (tmp_path / "latin").write_bytes("Käse".encode("latin-1"))
    r = arr(*args, cwd=tmp_path)
    assert r.returncode == 2
    assert says in r.stderr and "Traceback" not in r.stderr
    assert len(r.stderr.strip().splitlines()) == 1


def test_a_damaged_card_and_a_wrong_profile_are_named(tmp_path):
    for suffix in (".safetensors", ".json"): (tmp_path / f"mine{suffix}").write_text("{")
    r = arr("models", env={**os.environ, "ARR_WEIGHTS": str(tmp_path)})
    assert r.returncode == 2 and f"{tmp_path / 'mine.json'} is damaged" in r.stderr and "Traceback" not in r.stderr
    r = arr("doctor", "--json", env={**os.environ, "ARR_PROFILE": "foo"})
    found = {c["name"]: c for c in json.loads(r.stdout)}
    assert r.returncode == 1 and not found["profile"]["ok"] and "'foo' is not a profile" in str(found["profile"])


def test_without_the_app_extra_it_names_it():
    code = "import sys; sys.modules['typer'] = None; from arr_course.cli import main; main()"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.strip() == \
        "arr-course: `typer` is not installed. It comes with an extra: pip install 'arr-course[app]'"


def test_empty_folder(tmp_path):
    r = arr("toolkit", tmp_path, "--labels", "a cat, a dog", "--json", tmp_path / "out" / "r.json", "--html", tmp_path / "r.html")
    assert r.returncode == 0, r.stderr
    assert json.loads((tmp_path / "out" / "r.json").read_text())["images"] == []
    assert "no images" in (tmp_path / "r.html").read_text(encoding="utf-8").lower()


def test_world_writes_pictures_and_what_is_known(tmp_path):
    r = arr("world", "--density", "sparse", "--n", 3, "--seed", 5, "--split", "test", "--out", tmp_path / "w")
    assert r.returncode == 0, r.stderr
    from PIL import Image

    from arr_course.world import render, sample_scene
    files = sorted((tmp_path / "w").iterdir())
    assert [f.suffix for f in files] == [".json", ".png"] * 3
    d, scene = json.loads(files[2].read_text(encoding="utf-8")), sample_scene(50_000_001, "sparse", "test")
    assert (d["seed"], d["split"], len(d["things"])) == (50_000_001, "test", len(scene.things))
    assert d["caption"] and d["questions"] and all(q["answer"] for q in d["questions"])
    assert Image.open(files[3]).tobytes() == render(scene).tobytes()


@pytest.mark.parametrize("name, processes", [("dino-ti", 1), ("filip-ti", 2)])
def test_train_writes_a_card(tmp_path, name, processes):
    "A few steps of each recipe, in one process or two; as many really ran, and `evaluate` repeats the card's figures."
    out = tmp_path / "run"
    r = arr("train", name, "--out", out, "--processes", processes, "--quick")
    assert r.returncode == 0, r.stderr
    card = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    ran = {json.loads(p.read_text(encoding="utf-8"))["processes"] for p in out.rglob("manifest.json")}
    assert ran == {processes} == {card["processes"]}
    if name == "dino-ti": return
    e = card["evaluation"]
    r = arr("evaluate", f"arr/{name}", "--density", "sparse", "--n", e["n"], "--seed", e["test_seed"],
            "--precision", e["precision"], "--parts", "grounding", "--json", "-", env={**os.environ, "ARR_WEIGHTS": str(out)})
    assert r.returncode == 0, r.stderr
    found = json.loads(r.stdout)                                               # the JSON and nothing else
    assert found["fingerprint"] == e["fingerprint"]
    for k, m in found["metrics"].items(): assert m == pytest.approx(card["metrics"][f"sparse/{k}"], abs=2e-3), k


def test_a_run_of_other_settings_is_not_continued(tmp_path):
    "What a folder holds decides: a quick run is not the start of a real one."
    from arr_course import filip
    from arr_course.evaluate import quick
    from arr_course.joint import Joint
    from arr_course.learner import Learner
    cfg = quick(filip.STAGES["crops"][1], True)
    Learner(Joint(filip.CONFIG), None, [0], cfg, tmp_path / "crops").save()
    r = arr("train", "filip-ti", "--out", tmp_path)
    assert r.returncode == 2 and "is of another run" in r.stderr and "Traceback" not in r.stderr
