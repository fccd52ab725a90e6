"""Build the site: nbdev's processors over nbs/ and labs/ into _proc/, then Quarto (or smalldocs) renders _proc/ into _docs/.

The same steps as `nbdev_docs`, which cannot see labs/ or a top-level _quarto.yml. At the end every internal link of the
site is followed; a broken one is an error."""
import ast
import os
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbdev.processors
from nbdev.config import get_config
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent
REDIRECT = """<!doctype html><meta charset="utf-8"><title>{1}</title><meta http-equiv="refresh" content="0; url={0}">
<a href="{0}">{1}</a>
"""
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def pages():
    "Module name -> the notebook that defines it, e.g. `vit` -> `nbs/02_vit.ipynb`."
    strip = lambda p: re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem.lower())
    found = {f"exercises/{strip(p)}": p for p in Path("nbs/solutions").glob("*.ipynb")}
    for p in Path("nbs").glob("*.ipynb"):
        name = re.search(r"#\| default_exp (\w+)", p.read_text(encoding="utf-8"))
        if name: found[name[1]] = p
        found[strip(p)] = p
    return found


def needed(cell, do_eval=nbdev.processors._do_eval):
    "Execute exported cells, bare imports and show_doc alone; nbdev would run each cell that has an import somewhere."
    if cell.cell_type == "code" and not {"export", "exports", "exporti"} & set(cell.directives_):
        trees = cell.parsed_() or []
        imports = trees and all(isinstance(o, ast.Import | ast.ImportFrom) for o in trees)
        if not imports and not nbdev.processors._show_docs(trees): return False
    return do_eval(cell)


def proc(out=Path("_proc")):
    "Run nbdev's processors over nbs/ and labs/ into `out`, with the site's configuration and theme."
    cfg = get_config()
    nbdev.processors._do_eval = needed
    shutil.rmtree(out, ignore_errors=True)
    proc_nbs(skip_folder_re=r"^([_.].*|arr_course|scripts|tests|benchmarks|out|[\w.-]+\.egg-info)$", force=True, n_workers=0)
    for f in out.iterdir():  # proc_nbs also copies the loose files of the root
        if f.is_file() and f.name != "_quarto.yml": f.unlink()
    # links from `backticks` come out absolute and without the number (https://host/base/nbs/vit.html#ViT)
    known = pages()
    link = re.compile(re.escape(f"{cfg.doc_host}{cfg.doc_baseurl}/") + r"(?:nbs/)?((?:exercises/|solutions/)?\w+)\.html")
    for p in out.rglob("*.ipynb"):
        here = p.relative_to(out).parent.as_posix()

        def local(m, here=here):
            page = known.get(m[1].replace("solutions/", "exercises/"))
            return posixpath.relpath(page.as_posix(), here) if page else m[0]

        p.write_text(link.sub(local, p.read_text(encoding="utf-8")), encoding="utf-8")


def offline(site):
    "Point the pages at the KaTeX and the badge in docs_theme/, and drop web fonts: the site works without a network."
    cdn = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist")
    fonts = re.compile(r"@import\s+url\([^)]*fonts\.googleapis\.com[^)]*\);?|<link[^>]*fonts\.g(?:oogleapis|static)\.com[^>]*>")
    shutil.copytree("docs_theme/katex", site / "site_libs/katex", dirs_exist_ok=True)
    shutil.copy("docs_theme/colab-badge.svg", site / "site_libs/colab-badge.svg")
    for p in [*site.rglob("*.html"), *site.rglob("*.css")]:
        up = "../" * (len(p.relative_to(site).parts) - 1) + "site_libs/"
        text = p.read_text(encoding="utf-8")
        p.write_text(fonts.sub("", cdn.sub(up + "katex", text).replace(BADGE, up + "colab-badge.svg")), encoding="utf-8")


class Page(HTMLParser):
    "The ids and the links of one page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]


def broken_links(site):
    "Every `(page, link)` of the site whose target, or whose anchor in it, does not exist."
    site = Path(site).resolve()
    parsed = {p: Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    bad = []
    for p, page in parsed.items():
        for href in page.links:
            u = urlsplit(href)
            if u.scheme or u.netloc or href in ("#", ""): continue
            to = (p.parent / unquote(u.path)).resolve() if u.path else p
            if to.is_dir(): to = to / "index.html"
            missing_anchor = to in parsed and u.fragment and unquote(u.fragment) not in parsed[to].ids
            if not to.exists() or missing_anchor: bad.append((p.relative_to(site).as_posix(), href))
    return bad


def settle(site):
    "A backtick link to a method, or to a private name, that has no anchor of its own leads to its class, or to its page."
    for page, href in broken_links(site):
        to = re.sub(r"(#\w+)\.\w+$|#_\w+$", lambda m: m[1] or "", href)
        if to == href: continue
        p = Path(site) / page
        p.write_text(p.read_text(encoding="utf-8").replace(f'href="{href}"', f'href="{to}"'), encoding="utf-8")


def run(*cmd):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(cmd, check=True, env=env)


def main():
    os.chdir(root)
    proc()
    run("smalldocs", "api", "build", "--dir", "_proc")
    run(shutil.which("quarto") or "smalldocs", "render", "_proc")
    shutil.rmtree("_docs", ignore_errors=True)
    shutil.move("_proc/_docs", "_docs")
    offline(Path("_docs"))
    settle(Path("_docs"))
    if not Path("_docs/index.html").exists():
        Path("_docs/index.html").write_text(REDIRECT.format("nbs/index.html", "ARR course"), encoding="utf-8")
    if bad := broken_links("_docs"): sys.exit("broken links:\n" + "\n".join(f"  {page}: {href}" for page, href in bad))
    print(f"_docs/index.html: {len(list(Path('_docs').rglob('*.html')))} pages, no broken link")


if __name__ == "__main__": main()
