"The report: hostile names, damaged folders, large folders, and the page in a real browser."
import csv
import json
import re
import shutil

import pytest
from PIL import Image

from arr_course.page import COLOURS, screenshot
from arr_course.report import as_dict, both_groupings, save_csv, save_html, save_json, table

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>document.title='owned'<", 'a" onerror="alert(1)', "'><img src=x onerror=alert(1)>", "$title ${x}", "grün 中.jpg"


def make(names, label="a cat", **more):
    "A result over these names: each one's neighbours are the next three."
    near = lambda i: [dict(path=names[(i + j) % len(names)], similarity=0.9 - j / 10) for j in (1, 2, 3) if len(names) > j]
    image = lambda i, n: dict(path=n, label=label, confidence=0.5, unsure=i % 2 == 0, group=1 + i // 2, neighbours=near(i))
    images = [image(i, n) for i, n in enumerate(names)]
    return dict(images=images, skipped=[], backbones=dict(visual="v", labels="l"), disagreements=[]) | more


def write(folder, names, size=(320, 240)):
    for i, n in enumerate(names): Image.new("RGB", size, (40 * i % 255, 90, 120)).save(folder / n, "JPEG")


class Box:
    "Stands for a `Result`."
    def __init__(self, d): self.d = d
    def to_dict(self): return self.d


@pytest.fixture
def tab():
    sync = pytest.importorskip("playwright.sync_api")
    if not BROWSER: pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = b.new_page(viewport=dict(width=1200, height=800))
        page.said, page.asked = [], []
        page.on("console", lambda m: page.said.append(m.text))
        page.on("pageerror", lambda e: page.said.append(str(e)))
        page.on("request", lambda r: page.asked.append(r.url))
        yield page
        b.close()


def test_object_and_dict_are_the_same(tmp_path):
    d = make(["a.jpg", "b.jpg"])
    assert as_dict(Box(d)) == d
    assert save_json(Box(d), tmp_path / "a.json").read_bytes() == save_json(d, tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("part", ["images", "skipped", "disagreements", "backbones"])
def test_a_missing_part_is_named(part, tmp_path):
    d = make(["a.jpg"]); d.pop(part)
    with pytest.raises(ValueError, match=f"lacks {part}"): save_json(d, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_json_and_csv_hold_the_same_images(tmp_path):
    d = make(["a,b.jpg", 'say "hi".jpg', "new\nline.jpg", "=1+1.jpg"])
    back = json.loads(save_json(d, tmp_path / "r.json").read_text(encoding="utf-8"))
    assert back == d
    with open(save_csv(d, tmp_path / "r.csv"), newline="", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    assert [r["path"] for r in rows] == ["a,b.jpg", 'say "hi".jpg', "new\nline.jpg", "./=1+1.jpg"]
    assert float(rows[0]["similarity_2"]) == pytest.approx(0.7)


def test_names_that_are_not_unicode(tmp_path):
    d = make(["f\udce9te.jpg", "b.jpg"])
    assert json.loads(save_json(d, tmp_path / "x.json").read_text(encoding="utf-8"))["images"][0]["path"] == "f\\udce9te.jpg"
    assert "f\\udce9te.jpg" in save_csv(d, tmp_path / "x.csv").read_text(encoding="utf-8")
    assert "f\\udce9te.jpg" in save_html(d, tmp_path / "x.html", tmp_path).read_text(encoding="utf-8")


def test_no_confidence_no_label_no_neighbours(tmp_path):
    d = make(["a.jpg"], label=None); d["images"][0]["confidence"] = None
    write(tmp_path, ["a.jpg"])
    page = save_html(d, tmp_path / "r.html", tmp_path).read_text(encoding="utf-8")
    assert "no label" in page and "no neighbours" in page and 'role="meter"' not in page
    assert table(d).row_count == 1


def test_hostile_names_stay_text(tmp_path):
    names = list(EVIL)
    d = make(names, label=EVIL[0], skipped=[dict(path=EVIL[1], error=EVIL[2])], backbones={EVIL[0]: EVIL[2]},
             disagreements=[dict(a=EVIL[0], b=EVIL[2], similarity=.5, visual=EVIL[2], labels=[EVIL[0], EVIL[1]])])
    page = save_html(d, tmp_path / "r.html", tmp_path).read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script") == 1
    assert "<img" not in page and '" onerror' not in page
    assert "${x}" in page


def test_no_images(tmp_path):
    d = make([], skipped=[dict(path="x.jpg", error="empty file")])
    page = save_html(d, tmp_path / "r.html", tmp_path).read_text(encoding="utf-8")
    assert "There were no images in this folder." in page and "empty file" in page
    assert 'id="cards"' not in page and table(d).row_count == 0
    assert save_csv(d, tmp_path / "r.csv").read_text().splitlines() == ["path,label,confidence,unsure"]


def test_vanished_and_broken_files_do_not_stop_it(tmp_path):
    write(tmp_path, ["a.jpg"]); (tmp_path / "b.jpg").write_bytes(b"not an image")
    page = save_html(make(["a.jpg", "b.jpg", "gone.jpg"]), tmp_path / "r.html", tmp_path).read_text(encoding="utf-8")
    assert page.count("url(data:image/webp") == 1 and page.count('<article class="card') == 3


def test_a_large_folder_makes_a_small_page(tmp_path):
    names = [f"{i:05}.jpg" for i in range(20_000)]
    write(tmp_path, names[:5])
    out = save_html(make(names), tmp_path / "r.html", tmp_path, show=50)
    page = out.read_text(encoding="utf-8")
    assert page.count('<article class="card') == 50 and "The first 50 of 20,000" in page
    assert out.stat().st_size < 2_000_000
    assert "19,950" not in page and table(make(names)).row_count == 50


def test_nothing_outside_the_file(tmp_path):
    write(tmp_path, ["a.jpg", "b.jpg"])
    page = save_html(make(["a.jpg", "b.jpg"]), tmp_path / "r.html", tmp_path).read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!data:)|https?:', page)
    assert str(tmp_path) not in page


def test_groups_hold_each_image_once():
    names = [f"{i}.jpg" for i in range(500)]
    images = make(names)["images"]
    images[0]["group"] = images[1]["label"] = None
    sight, said = both_groupings(images, most=1000)
    for groups in (sight, said): assert sorted(p for _, ps in groups for p in ps) == sorted(names)
    assert sight[-1] == ("on their own", ["0.jpg"]) and said[-1][0] == "unsure" and "1.jpg" in said[-1][1]


def test_controls_in_the_browser(tab, tmp_path):
    names = ["cat.jpg", "dog.jpg", "moon.jpg", "mug.jpg"]; write(tmp_path, names)
    d = make(names)
    labels, shares = ("a cat", "a dog", "a moon", "a cat"), (.9, .2, .5, .7)
    for im, label, c in zip(d["images"], labels, shares, strict=True): im.update(label=label, confidence=c)
    tab.goto(save_html(d, tmp_path / "r.html", tmp_path).as_uri())
    seen = lambda: tab.eval_on_selector_all(".card:not([hidden]) h3", "xs => xs.map(x => x.textContent)")
    assert seen() == names and tab.inner_text("#count") == "4 of 4"
    tab.fill("#q", "M"); assert seen() == ["moon.jpg", "mug.jpg"]
    tab.fill("#q", ""); tab.select_option("#label", "a cat"); assert seen() == ["cat.jpg", "mug.jpg"]
    tab.check("#unsure"); assert seen() == ["cat.jpg"] and tab.inner_text("#count") == "1 of 4"
    tab.evaluate("location.hash = '#i1'"); tab.wait_for_function("!document.getElementById('i1').hidden")
    tab.select_option("#sort", "low"); assert seen() == ["dog.jpg", "moon.jpg", "mug.jpg", "cat.jpg"]
    tab.focus("#q"); assert tab.evaluate("document.activeElement.id") == "q"
    assert tab.said == [] and [u for u in tab.asked if not u.startswith(("file:", "data:"))] == []


def test_hostile_page_runs_nothing(tab, tmp_path):
    d = make(list(EVIL), label=EVIL[0], skipped=[dict(path=EVIL[1], error=EVIL[2])])
    tab.on("dialog", lambda x: tab.said.append("dialog"))
    tab.goto(save_html(d, tmp_path / "r.html", tmp_path).as_uri()); tab.fill("#q", "script")
    assert "owned" not in tab.title() and tab.said == [] and tab.locator("img").count() == 0
    assert tab.inner_text("#count") == "1 of 5"


def test_policy_blocks_a_foreign_script(tab, tmp_path):
    page = save_html(make(["a.jpg"]), tmp_path / "r.html", tmp_path)
    foreign = page.read_text(encoding="utf-8").replace("</main>", "<script>document.title='owned'</script></main>")
    page.write_text(foreign, encoding="utf-8")
    tab.goto(page.as_uri())
    assert tab.title() != "owned" and any("Content Security Policy" in s for s in tab.said)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1200])
def test_no_overflow_and_the_right_colours(tab, tmp_path, scheme, width):
    names = ["a-very-long-file-name-without-a-single-space-" * 3 + ".jpg", "b.jpg", "c.jpg", "d.jpg"]; write(tmp_path, names)
    d = make(names, disagreements=[dict(a=names[0], b="b.jpg", similarity=.5, visual="apart", labels=["x" * 60, "y"])])
    tab.emulate_media(color_scheme=scheme); tab.set_viewport_size(dict(width=width, height=800))
    tab.goto(save_html(d, tmp_path / "r.html", tmp_path).as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ground = COLOURS[scheme]["ground"]
    rgb = "rgb({}, {}, {})".format(*(int(ground[i:i + 2], 16) for i in (1, 3, 5)))
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == rgb
    levels = tab.eval_on_selector_all("h1, h2, h3, h4", "xs => xs.map(x => Number(x.tagName[1]))")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), "a heading level is skipped"
    assert tab.eval_on_selector_all(".pic", "xs => xs.every(x => x.getAttribute('aria-label'))")


def test_screenshot_is_a_jpeg(tmp_path):
    if not BROWSER: pytest.skip("no Chromium on this machine")
    pytest.importorskip("playwright")
    assert screenshot(save_html(make(["a.jpg"]), tmp_path / "r.html", tmp_path), dark=True)[:2] == b"\xff\xd8"
