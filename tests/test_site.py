"""The rendered site, as a reader meets it in a browser: titles, formulas, figures, search, dark mode, a narrow phone."""
import functools
import http.server
import importlib.util
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
SITE = root / "_docs"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
PAGES = ["nbs/index.html", "nbs/02_vit.html", "nbs/09_vlm.html", "labs/label_free/label_free.html"]


def stale():
    "Is a notebook, or the site's own code, newer than the site?"
    if not (SITE / "index.html").exists(): return True
    sources = [*root.glob("nbs/**/*.ipynb"), *root.glob("labs/**/*.ipynb"), root / "_quarto.yml", *root.glob("scripts/*.py"),
               *root.glob("docs_theme/*.*")]
    return max(p.stat().st_mtime for p in sources) > (SITE / "index.html").stat().st_mtime


@pytest.fixture(scope="session")
def site():
    "The address of the built site, served on this machine."
    if stale(): subprocess.run([sys.executable, root / "scripts/docs.py"], check=True, cwd=root, stdout=subprocess.DEVNULL)
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None: pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield b
        b.close()


@pytest.fixture
def visit(browser, site):
    "Open a page of the site in a fresh tab; requests that leave this machine, and console errors, are collected."
    contexts = []

    def go(path, **kw):
        context = browser.new_context(**kw); contexts.append(context)
        page = context.new_page()
        page.problems, page.outside = [], []
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((site, "data:")) else page.outside.append(r.url))
        page.goto(f"{site}/{path}", wait_until="networkidle")
        return page

    yield go
    for c in contexts: c.close()


def test_no_broken_internal_link(site):
    spec = importlib.util.spec_from_file_location("docs", root / "scripts/docs.py")
    docs = importlib.util.module_from_spec(spec); spec.loader.exec_module(docs)
    assert docs.broken_links(SITE) == []


def test_the_link_check_finds_a_broken_link(tmp_path):
    spec = importlib.util.spec_from_file_location("docs", root / "scripts/docs.py")
    docs = importlib.util.module_from_spec(spec); spec.loader.exec_module(docs)
    (tmp_path / "a.html").write_text('<a href="b.html#x"></a><a href="c.html"></a><a href="b.html#y"></a>')
    (tmp_path / "b.html").write_text('<p id="x"></p>')
    assert docs.broken_links(tmp_path) == [("a.html", "c.html"), ("a.html", "b.html#y")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_page(visit, path, scheme):
    "Title, formulas, figures, readable contrast, nothing from outside, no console error."
    page = visit(path, color_scheme=scheme, viewport={"width": 1200, "height": 900})
    assert page.locator("h1").first.inner_text().strip()
    assert page.problems == [] and page.outside == []
    images = page.eval_on_selector_all("img", "els => els.map(e => [e.getAttribute('src').slice(0, 60), e.naturalWidth])")
    assert images and all(w > 0 for _, w in images), images
    if "vit" in path:
        assert page.locator(".katex").count() > 5, "formulas are rendered"
        assert page.locator(".katex-error").count() == 0
        assert page.locator("main img[src*='.png'], main img[src^='data:image/png']").count() >= 3, "figures are there"
    assert contrast(page) >= 4.5


def contrast(page):
    "The contrast ratio (WCAG 2.1) of a paragraph's text against what is behind it."
    fg, bg = page.evaluate("""() => {
        const p = document.querySelector('main p'); let e = p, bg = 'rgba(0, 0, 0, 0)';
        while (e && /, 0\\)$|transparent/.test(bg)) { bg = getComputedStyle(e).backgroundColor; e = e.parentElement; }
        return [getComputedStyle(p).color, bg];
    }""")

    def luminance(css):
        rgb = [float(v) / 255 for v in css[css.index("(") + 1:-1].split(",")[:3]]
        r, g, b = (c / 12.92 if c <= .03928 else ((c + .055) / 1.055) ** 2.4 for c in rgb)
        return .2126 * r + .7152 * g + .0722 * b

    a, b = sorted((luminance(fg), luminance(bg)), reverse=True)
    return (a + .05) / (b + .05)


@pytest.mark.parametrize("path", PAGES)
def test_narrow(visit, path):
    "At 380 px nothing pushes the page sideways."
    page = visit(path, viewport={"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_search_finds_patch_embed(visit):
    page = visit("nbs/index.html", viewport={"width": 1200, "height": 900})
    page.locator("#quarto-search input, .smalldocs-search input").first.click()
    page.keyboard.type("PatchEmbed", delay=20)
    found = page.locator("a[href*='02_vit']:visible", has_text="PatchEmbed")
    found.first.wait_for(timeout=5000)
    found.first.click()
    page.wait_for_url("**/02_vit*")
    assert page.problems == []
