"""Reading images and folders: damaged, hostile and odd input. Every file is built at run time."""
import io
import json
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from arr_course.images import (
    ImageError,
    ImageFolder,
    Preprocess,
    is_candidate,
    montage,
    natural_key,
    open_image,
    to_8bit,
)

H, W = 20, 30
_y, _x = np.mgrid[:H, :W]
SCENE = np.stack([_x * 8, _y * 12, (_x + _y) * 5], -1).astype(np.uint8)  # asymmetric and smooth
PICTURE = Image.fromarray(SCENE)
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:PIL"),  # what Pillow says of damaged tags, beside the error
              pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")


def saved(im=PICTURE, fmt="PNG", **kw):
    f = io.BytesIO()
    im.save(f, fmt, **kw)
    return f.getvalue()


def png(w, h, depth, colour, rows, extra=b""):
    "A PNG made by hand: Pillow cannot write every kind that it can read."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(src, **kw): return np.asarray(open_image(src, **kw))


def near(a, b, most=3): return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean() <= most


# ---- what must read

FRAMES = dict(save_all=True, append_images=[ImageOps.mirror(PICTURE), ImageOps.flip(PICTURE)], duration=50)
EXACT = dict(png=saved(), bmp=saved(fmt="BMP"), ppm=saved(fmt="PPM"), qoi=saved(fmt="QOI"),
             tiff=saved(fmt="TIFF"), lzw=saved(fmt="TIFF", compression="tiff_lzw"), webp=saved(fmt="WEBP", lossless=True),
             ico=saved(PICTURE.resize((16, 16)), "ICO", sizes=[(16, 16)]),
             jp2=saved(fmt="JPEG2000"), apng=saved(**FRAMES), webp_animated=saved(fmt="WEBP", lossless=True, **FRAMES),
             tiff_pages=saved(fmt="TIFF", **FRAMES))
LOSSY = dict(jpeg=saved(fmt="JPEG", quality=95), progressive=saved(fmt="JPEG", quality=95, progressive=True),
             gif=saved(fmt="GIF"), gif_animated=saved(fmt="GIF", **FRAMES),
             cmyk=saved(PICTURE.convert("CMYK"), "JPEG", quality=95))


@pytest.mark.parametrize("kind", EXACT)
def test_lossless_formats_give_the_same_pixels(kind):
    expected = PICTURE.resize((16, 16)) if kind == "ico" else PICTURE
    im = open_image(EXACT[kind])
    assert im.mode == "RGB" and im.info == {} and type(im) is Image.Image
    assert np.array_equal(np.asarray(im), np.asarray(expected)), "the first frame, exactly"


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_are_near(kind):
    assert near(pixels(LOSSY[kind]), SCENE, 6)


def test_path_bytes_file_and_memoryview_agree(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(EXACT["png"])
    with open(path, "rb") as f:
        for src in (path, str(path), EXACT["png"], bytearray(EXACT["png"]), memoryview(EXACT["png"]), f):
            assert np.array_equal(pixels(src), SCENE)
        assert not f.closed, "a caller's file stays open"


def test_cmyk_jpeg_of_adobe_is_not_inverted():
    "Adobe stores inks inverted and says so in a marker; red must stay red."
    red = Image.new("RGB", (16, 16), (220, 30, 30)).convert("CMYK")
    r, g, b = pixels(saved(red, "JPEG", quality=95))[8, 8].astype(int)
    assert r > 150 and g < 90 and b < 90


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(fmt):
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    out = pixels(saved(Image.fromarray(deep), fmt))
    assert np.array_equal(out[..., 0], np.rint(deep / 257).astype(np.uint8))
    assert np.array_equal(out[..., 0], out[..., 2])


def test_16_bit_big_endian_colour_and_pgm():
    assert pixels(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32896, 65535, 0, 0, 0)))[0, 0].tolist() == [0, 128, 255]
    assert pixels(png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 65535, 0)))[0, 0].tolist() == [255] * 3  # transparent: white
    assert pixels(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 32896, 65535))[0, :, 0].tolist() == [0, 128, 255]
    mm = saved(Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)), "TIFF")
    assert pixels(mm)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values, expected", [
    ([0., .5, 1.], [0, 128, 255]), ([0., 7., 255.], [0, 7, 255]), ([-1., 0., 1.], [0, 128, 255]),
    ([0., 500., 1000.], [0, 128, 255]), ([np.nan, 0., 1.], [0, 0, 255]),
    ([0., 1., np.inf], [0, 255, 255]), ([np.nan] * 3, [0, 0, 0]), ([3000.] * 3, [0, 0, 0])])
def test_float_tiff(values, expected):
    assert pixels(saved(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))[0, :, 0].tolist() == expected


def test_32_bit_integers():
    assert to_8bit(np.array([0, 257, 65535], dtype=np.int32)).tolist() == [0, 1, 255]
    assert to_8bit(np.array([2570, 25700], dtype=np.uint16)).tolist() == [10, 100], "16 bits are scaled, not stretched"
    assert to_8bit(np.array([-100, 0, 100], dtype=np.int32)).tolist() == [0, 128, 255]
    assert to_8bit(np.array([0, 2**30], dtype=np.int32)).tolist() == [0, 255]
    assert pixels(saved(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)), "TIFF"))[0, :, 0].tolist() == [0, 255]


def test_transparency_lies_on_white():
    glass = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 0]]], dtype=np.uint8)
    for fmt, kw in (("PNG", {}), ("WEBP", dict(lossless=True)), ("TIFF", {})):
        assert pixels(saved(Image.fromarray(glass), fmt, **kw))[0].tolist() == [[200, 0, 0], [255] * 3, [255] * 3]
    half = pixels(saved(Image.fromarray(np.array([[[0, 0, 0, 128]]], dtype=np.uint8))))
    assert half[0, 0].tolist() == [127] * 3
    la = Image.merge("LA", [Image.new("L", (2, 1), 10), Image.fromarray(np.array([[255, 0]], dtype=np.uint8))])
    assert pixels(saved(la))[0, :, 0].tolist() == [10, 255]


def test_palette_with_transparency_and_one_bit():
    pal = Image.new("P", (3, 1))
    pal.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    pal.putdata([0, 1, 2])
    for fmt in ("PNG", "GIF"):
        assert pixels(saved(pal, fmt, transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    rgb = saved(PICTURE, transparency=tuple(int(o) for o in SCENE[3, 4]))  # a colour key, tRNS
    assert pixels(rgb)[3, 4].tolist() == [255] * 3 and pixels(rgb)[0, 0].tolist() == SCENE[0, 0].tolist()
    assert pixels(png(8, 1, 1, 0, b"\0\xaa"))[0, :, 0].tolist() == [255, 0] * 4


# ---- orientation

TURN = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],  # what a camera stores
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1)}
SAVE = dict(PNG={}, TIFF={}, WEBP=dict(lossless=True), JPEG=dict(quality=95))


@pytest.mark.parametrize("fmt", SAVE)
@pytest.mark.parametrize("o", range(1, 9))
def test_all_eight_orientations(o, fmt):
    "Whatever way the camera was held, the picture comes back upright: once, not twice."
    exif = Image.Exif()
    exif[0x0112] = o
    stored = Image.fromarray(np.ascontiguousarray(TURN[o](SCENE)))
    out = open_image(saved(stored, fmt, exif=exif, **SAVE[fmt]))
    assert out.size == (W, H)
    assert near(out, SCENE, 4 if fmt == "JPEG" else 0)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(out)), np.asarray(out)), "nobody can turn it again"


@pytest.mark.parametrize("o", [0, 9, 255, 65535])
def test_orientations_that_do_not_exist_are_upright(o):
    exif = Image.Exif()
    exif[0x0112] = o
    assert np.array_equal(pixels(saved(exif=exif)), SCENE)


@pytest.mark.parametrize("junk", [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"not exif at all", b"Exif\0\0" + b"X" * 20,
                                  b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 30])
def test_a_damaged_exif_block_does_not_cost_the_image(junk):
    assert near(pixels(saved(fmt="JPEG", quality=95, exif=junk)), SCENE, 4)


@pytest.mark.parametrize("error", [SyntaxError("not a TIFF file"), struct.error("unpack"), KeyError(1), EOFError()])
def test_no_error_of_the_exif_reader_costs_the_image(monkeypatch, error):
    def getexif(self): raise error
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert np.array_equal(pixels(EXACT["png"]), SCENE)


# ---- what must not read

def reason(src, **kw):
    with pytest.raises(ImageError) as e: open_image(src, **kw)
    assert str(e.value) == f"{e.value.name}: {e.value.reason}"
    return e.value.reason


@pytest.mark.parametrize("kind", [*EXACT, *LOSSY])
def test_a_cut_file_is_perfect_or_an_error(kind):
    "Never a picture of which a part is silently missing."
    data = {**EXACT, **LOSSY}[kind]
    whole, n, several = pixels(data), len(data), kind in ("apng", "webp_animated", "gif_animated", "tiff_pages")
    for cut in sorted({*range(0, 40, 3), *(n * i // 25 for i in range(25)), *range(max(0, n - 12), n)}):
        try: out = pixels(data[:cut])
        except ImageError: continue
        assert np.array_equal(out, whole), f"{kind} cut at {cut} of {n} gave a damaged picture"
        assert several or cut > n - 30, f"{kind} is whole after {cut} of {n} bytes: the test cuts nothing"


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif_animated", "webp", "tiff", "bmp", "qoi"])
def test_flipped_bytes_raise_nothing_but_image_error(kind):
    data, rng = {**EXACT, **LOSSY}[kind], np.random.RandomState(0)
    for _ in range(60):
        bad = bytearray(data)
        for i in rng.randint(0, len(bad), rng.choice([1, 4, 16])): bad[i] = rng.randint(256)
        try: assert open_image(bytes(bad), max_pixels=10**6).mode == "RGB"
        except ImageError: pass


def test_the_reason_is_specific(tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.touch()
    assert "empty (0 bytes)" in reason(empty) and "empty (0 bytes)" in reason(b"")
    text = tmp_path / "text.jpg"
    text.write_text("a shopping list")
    assert "not an image" in reason(text) and "a shoppi" in reason(text)
    assert "not an image" in reason(np.random.RandomState(0).bytes(4000))
    assert "No such file" in reason(tmp_path / "nowhere.jpg")
    assert "ImageFolder" in reason(tmp_path)
    assert "null" in reason("a\0b.jpg")
    assert "HEIC" in reason(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic")
    assert "truncated" in reason(LOSSY["jpeg"][:400])
    for odd in (42, None, io.StringIO("text")): assert "binary mode" in reason(odd)


def test_formats_that_run_programs_are_refused():
    assert "not an image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_decompression_bombs_are_refused_before_decoding():
    assert "bomb" in reason(png(60_000, 60_000, 8, 2, b""))
    zeros = png(12_000, 12_000, 1, 0, bytes(1501) * 12_000)  # 144 million real pixels in few bytes
    assert len(zeros) < 40_000
    assert "12000 x 12000 pixels, the limit is 1,000,000" in reason(zeros, max_pixels=10**6)
    assert f"{W} x {H} pixels" in reason(EXACT["png"], max_pixels=W * H - 1)
    assert open_image(EXACT["png"], max_pixels=W * H).size == (W, H)


def test_no_pixels_at_all():
    reason(png(0, 5, 8, 2, b""))
    reason(b"GIF89a\0\0\0\0\0\0\0;")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in reason(tmp_path / "pipe.jpg")
    folder = ImageFolder(tmp_path)
    assert len(folder) == 0 and [p.name for p, _ in folder.skipped] == ["pipe.jpg"]


def test_image_error_survives_pickling():
    e = pickle.loads(pickle.dumps(ImageError("a.jpg", "gone")))
    assert (e.name, e.reason, str(e)) == ("a.jpg", "gone", "a.jpg: gone")


# ---- folders

@pytest.fixture
def album(tmp_path):
    "Good and bad files, nested, in several scripts."
    for name in ("img10.png", "img2.png", "IMG1.PNG", "sub/été 1.png", "sub/写真.webp", "sub/deep/😀.gif", "wrong-suffix.jpg",
                 "no_suffix"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(EXACT["png"])
    (tmp_path / "bad.jpg").write_text("text")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.jpg").write_bytes(LOSSY["jpeg"][:300])
    for name in ("notes.txt", "report.pdf", ".hidden.png", "README"): (tmp_path / name).write_text("nothing to see")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.png").write_bytes(EXACT["png"])
    return tmp_path


def test_folder_lists_sorts_reads_and_reports(album):
    folder = ImageFolder(album)
    names = [p.relative_to(album).as_posix() for p in folder.paths]
    assert names == ["bad.jpg", "cut.jpg", "empty.png", "IMG1.PNG", "img2.png", "img10.png", "no_suffix", "sub/deep/😀.gif",
                     "sub/été 1.png", "sub/写真.webp", "wrong-suffix.jpg"]
    assert len(folder) == 11 and folder.skipped == []
    read = list(folder)
    assert len(read) == 8 and all(np.array_equal(np.asarray(im), SCENE) for _, im in read)
    assert [p.name for p, _ in folder.skipped] == ["bad.jpg", "cut.jpg", "empty.png"]
    assert [s.error.split(":")[0].split(";")[0] for s in folder.skipped] == [
        "not an image in a format we read", "damaged or truncated", "the file is empty (0 bytes)"]
    assert len(list(folder)) == 8 and len(folder.skipped) == 3, "a second pass reports nothing twice"
    assert folder.read(0) is None and folder.read(-1).size == (W, H)
    assert "11 images, 3 skipped" in repr(folder)


def test_a_repaired_file_is_no_longer_skipped(album):
    folder = ImageFolder(album)
    assert folder.read(0) is None and len(folder.skipped) == 1
    (album / "bad.jpg").write_bytes(EXACT["png"])
    assert folder.read(0) is not None and folder.skipped == []


def test_a_file_that_vanishes_is_reported(album):
    folder = ImageFolder(album)
    (album / "img2.png").unlink()
    assert len(list(folder)) == 7
    assert "No such file" in dict(folder.skipped)[album / "img2.png"]


def test_not_recursive(album):
    assert {p.parent for p in ImageFolder(album, recursive=False).paths} == {album}


def test_empty_missing_and_not_a_folder(tmp_path, album):
    (tmp_path / "void").mkdir()
    assert len(ImageFolder(tmp_path / "void")) == 0 and list(ImageFolder(tmp_path / "void")) == []
    with pytest.raises(FileNotFoundError, match="no such folder"): ImageFolder(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="open_image"): ImageFolder(album / "img2.png")


@needs_links
def test_links_neither_loop_nor_repeat(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for p in (inside / "a.png", inside / "sub" / "b.png", outside / "c.png", tmp_path / "above.png"): p.write_bytes(EXACT["png"])
    (inside / "A-link.png").symlink_to(inside / "a.png")        # the same file again, first in order
    (inside / "sub" / "loop").symlink_to(inside)                # a circle
    (inside / "sub" / "up").symlink_to(tmp_path)                # a folder that holds this one
    (inside / "0-link").symlink_to(inside / "sub")              # a folder twice
    (inside / "there").symlink_to(outside)                      # another folder: entered, once
    (inside / "there too").symlink_to(outside)
    (inside / "self.png").symlink_to(inside / "self.png")       # links to itself
    (inside / "broken.png").symlink_to(inside / "gone.png")
    (inside / "broken").symlink_to(inside / "gone")
    folder = ImageFolder(inside)
    assert [p.relative_to(inside).as_posix() for p in folder.paths] == ["a.png", "sub/b.png", "there/c.png"]
    assert len(list(folder)) == 3
    assert {p.name for p, _ in folder.skipped} == {"self.png", "broken.png"}
    assert [p.name for p in ImageFolder(tmp_path).paths] == ["above.png", "a.png", "b.png", "c.png"]


@needs_links
def test_a_link_as_the_folder_itself(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(EXACT["png"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [p.name for p, _ in ImageFolder(tmp_path / "link")] == ["a.png"]


def test_an_unreadable_folder_and_file_are_reported(album, monkeypatch):
    "Permissions, simulated: the tests may run as root, who may read everything."
    scandir, real_open = os.scandir, open
    def no_scan(path):
        if Path(path).name == "sub": raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    def no_open(path, *a, **kw):
        if isinstance(path, os.PathLike) and Path(path).name == "img2.png": raise PermissionError(13, "Permission denied")
        return real_open(path, *a, **kw)
    monkeypatch.setattr(os, "scandir", no_scan)
    monkeypatch.setattr("builtins.open", no_open)
    folder = ImageFolder(album)
    assert len(list(folder)) == 4
    assert {"sub": "Permission denied", "img2.png": "Permission denied"}.items() <= {p.name: e for p, e in folder.skipped}.items()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_real_permissions(album):
    (album / "img2.png").chmod(0)
    (album / "sub").chmod(0)
    folder = ImageFolder(album)
    assert len(list(folder)) == 4 and {"img2.png", "sub"} <= {p.name for p, _ in folder.skipped}
    (album / "sub").chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes exist on Linux alone")
def test_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/b\xe9b\xe9.png", "wb") as f: f.write(EXACT["png"])
    with open(os.fsencode(tmp_path) + b"/bad\xe9.png", "wb") as f: f.write(b"text")
    folder = ImageFolder(tmp_path)
    assert len(list(folder)) == 1
    with pytest.raises(ImageError) as e: open_image(folder.skipped[0].path)
    assert str(e.value).encode("utf-8"), "the message can be printed"


def test_natural_order_and_candidates(tmp_path):
    names = ["b/1.png", "10.png", "9.png", "a", "A2", "a10", "²", "1e3", "e\u0301", "é"]
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key), "a total order"
    assert sorted(["x10y2", "x10y10", "x9y1"], key=natural_key) == ["x9y1", "x10y2", "x10y10"]
    order = sorted(names, key=natural_key).index
    assert order("a") < order("A2") < order("a10")
    assert [is_candidate(Path(o)) for o in ("x.JPeG", "x.heic", "x.txt", "x")] == [True, True, False, False]


def test_a_limit_on_pixels_holds_for_a_folder(album):
    folder = ImageFolder(album, max_pixels=10)
    assert list(folder) == [] and len(folder.skipped) == 11


# ---- preprocessing

@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (223, 225), (3, 700)])
def test_any_shape_gives_one_finite_shape(resize, size):
    x = Preprocess((32, 48), resize=resize, crop_pct=0.9)(Image.new("RGB", size, (200, 100, 50)))
    assert x.shape == (3, 32, 48) and torch.isfinite(x).all()


def test_a_long_strip_does_not_explode(monkeypatch):
    "The shortest side of 1 pixel becomes 224; the longest must not become 14 million."
    sizes, resize = [], Image.Image.resize
    def spy(self, size, *a, **kw):
        sizes.append(size)
        assert size[0] * size[1] < 5e6, f"resizes to {size}"
        return resize(self, size, *a, **kw)
    monkeypatch.setattr(Image.Image, "resize", spy)
    for size in ((65_000, 1), (1, 65_000)): assert Preprocess(224)(Image.new("RGB", size)).shape == (3, 224, 224)
    assert len(sizes) == 2


def test_any_mode_goes_in():
    pre = Preprocess(16)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "La", "RGBa", "PA"):
        assert pre(Image.new(mode, (20, 30))).shape == (3, 16, 16), mode


def test_upscaled_crop_pct_above_one_gets_a_border():
    im = Preprocess(32, crop_pct=2.0, fill=(9, 9, 9)).image(PICTURE)
    assert im.getpixel((0, 0)) == (9, 9, 9) and im.getpixel((16, 16)) != (9, 9, 9)


@pytest.mark.parametrize("bad", [dict(size=0), dict(size=(1, 2, 3)), dict(resize="stretch"), dict(interpolation="best"),
                                 dict(crop_pct=0), dict(std=0.0), dict(mean=(0.5, 0.5)), dict(crop_pct=float("nan"))])
def test_bad_recipes_are_refused(bad):
    with pytest.raises(ValueError): Preprocess(**dict(size=8) | bad)


def test_equal_recipes_are_equal_and_hashable():
    assert Preprocess(224, mean=[0.5] * 3) == Preprocess((224, 224), mean=0.5)
    assert len({Preprocess(224), Preprocess([224, 224])}) == 1


@pytest.mark.parametrize("bad", [
    {}, dict(size={"longest_edge": 8}), dict(size=8, rescale_factor=1.0), dict(size=8, do_resize=False),
    dict(size=8, do_pad=True), dict(size={"shortest_edge": 8}), dict(size="big"),
    dict(size={"shortest_edge": 8}, do_center_crop=True, crop_size={"height": 8, "width": 4})])
def test_configs_that_we_cannot_honour_are_refused(bad):
    with pytest.raises(ValueError): Preprocess.from_hf(dict(image_mean=[.5] * 3, image_std=[.5] * 3) | bad)


def test_hf_config_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="preprocessor_config"): Preprocess.from_hf(tmp_path)
    cfg = dict(size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_processor=cfg)))
    assert Preprocess.from_hf(tmp_path) == Preprocess(8, 0.5, 0.5, "bilinear", "squash", floor=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(cfg))
    assert Preprocess.from_hf(tmp_path) == Preprocess.from_hf(tmp_path / "preprocessor_config.json")


def test_older_spellings_of_hf_configs():
    "Integers for `size` mean the shortest side for CLIP, both sides for ViT and DeiT, the crop for ConvNeXT."
    norm, crop = dict(image_mean=[.5] * 3, image_std=[.5] * 3), dict(crop_size=224, do_center_crop=True)
    clip = Preprocess.from_hf(dict(feature_extractor_type="CLIPFeatureExtractor", size=256, **crop, **norm))
    assert (clip.size, clip.resize, clip.crop_pct, clip.interpolation) == ((224, 224), "crop", 0.875, "bicubic")
    vit = Preprocess.from_hf(dict(feature_extractor_type="ViTFeatureExtractor", size=224, **norm))
    assert (vit.size, vit.resize, vit.interpolation) == ((224, 224), "squash", "bilinear")
    deit = Preprocess.from_hf(dict(feature_extractor_type="DeiTFeatureExtractor", size=256, **crop, **norm))
    assert (deit.size, deit.resize, deit.crop_pct) == ((224, 224), "squash", 0.875)
    convnext = Preprocess.from_hf(dict(feature_extractor_type="ConvNextFeatureExtractor", size=224, crop_pct=0.875, **norm))
    assert (convnext.size, convnext.resize, convnext.crop_pct) == ((224, 224), "crop", 0.875)


def test_montage_of_nothing_and_of_anything():
    assert montage([]).size[0] > 0
    out = montage([PICTURE, Image.new("RGBA", (1, 900)), Image.new("L", (900, 1))], ["写真 " * 20, "\udce9", ""], cols=2, size=40)
    assert out.size == (2 * 46, 2 * 62)
    with pytest.raises(ValueError, match="1 images, but 2 titles"): montage([PICTURE], ["a", "b"])
