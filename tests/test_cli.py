"""The command as a user meets it: a separate process, its exit code, its output."""
import json
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
    assert all(c in out for c in ("toolkit", "photos", "models", "doctor"))


@pytest.mark.parametrize("args, says", [
    (["toolkit", "no-such-folder", "--labels", "a cat"], "no-such-folder"),
    (["toolkit", "."], "--labels"),
    (["toolkit", ".", "--labels", " , ,"], "label"),
])
def test_mistakes_get_one_line(args, says, tmp_path):
    r = arr(*args, cwd=tmp_path)
    assert r.returncode == 2
    assert says in r.stderr and "Traceback" not in r.stderr


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
