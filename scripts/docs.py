"""Build the site: nbdev's processors over nbs/ and labs/ into _proc/, then Quarto (or smalldocs) renders _proc/ into _docs/.

Same steps as `nbdev_docs`, which cannot see labs/ or a top-level _quarto.yml."""
import os, re, shutil, subprocess, sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent
REDIRECT = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={0}"><a href="{0}">{0}</a>\n'


def proc(out=Path("_proc")):
    "What `nbdev_proc_nbs` does: run nbdev's processors over nbs/ and labs/, and copy _quarto.yml and the theme."
    cfg = get_config()
    shutil.rmtree(out, ignore_errors=True)
    proc_nbs(skip_folder_re=r"^([_.]|arr_course$|scripts$)", force=True, n_workers=2)
    for f in out.iterdir():  # proc_nbs also copies the loose files of the root
        if f.is_file() and f.name != "_quarto.yml": f.unlink()
    # backtick links come out absolute, without the number (https://host/base/nbs/core.html#sym): point them at the notebook
    page = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem.lower()): p.name for p in Path("nbs").glob("*.ipynb")}
    link = re.compile(re.escape(f"{cfg.doc_host}{cfg.doc_baseurl}/nbs/") + r"(\w+)\.html")
    for p in out.rglob("*.ipynb"):
        up = "" if p.parent.name == "nbs" else "../nbs/"
        s = p.read_text(encoding="utf-8")
        p.write_text(link.sub(lambda m: up + page[m[1]] if m[1] in page else m[0], s), encoding="utf-8")


def local_katex(site):
    "Point the pages at the KaTeX in docs_theme/, so that maths works without a network."
    cdn = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist")
    shutil.copytree("docs_theme/katex", site / "site_libs/katex", dirs_exist_ok=True)
    for p in site.rglob("*.html"):
        up = "../" * (len(p.relative_to(site).parts) - 1)
        p.write_text(cdn.sub(up + "site_libs/katex", p.read_text(encoding="utf-8")), encoding="utf-8")


def run(*cmd):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(cmd, check=True, env=env)


def main():
    os.chdir(root)
    proc()
    run("smalldocs", "api", "build", "--dir", "_proc")
    quarto = shutil.which("quarto")
    run(quarto or "smalldocs", "render", "_proc")
    shutil.rmtree("_docs", ignore_errors=True)
    shutil.move("_proc/_docs", "_docs")
    local_katex(Path("_docs"))
    if not Path("_docs/index.html").exists(): Path("_docs/index.html").write_text(REDIRECT.format("nbs/index.html"))


if __name__ == "__main__": main()
