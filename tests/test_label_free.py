"""The label-free toolkit: what a notebook cannot say. Hub models (tiny, random), no network, two runs at once, 100,000 images."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arr_course import embed
from arr_course.embed import choose, embed_missing, hash_files, sources
from arr_course.label_free import compare, run
from arr_course.neighbours import EmbeddingStore, find_neighbours, nearest, recall, top_k, unit_rows
from arr_course.photos import sample_photos
from arr_course.zero_shot import Scores, sigmoid, softmax

sys.path.insert(0, str(Path(__file__).parent))
import tiny_hub  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
quiet = dict(progress=False)


@pytest.fixture(scope="module")
def packaged():
    return choose("packaged")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    sample_photos(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "Names of tiny random checkpoints in the hub's format."
    base = tmp_path_factory.mktemp("hub")
    for kind in ("clip", "siglip", "dinov2"):
        (base / kind).mkdir()
        tiny_hub.hf(kind, base / kind)
    return {kind: f"hf/{base / kind}" for kind in ("clip", "siglip", "dinov2")}


def coloured(folder, n, size=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (size, size), (i * 37 % 256, i * 91 % 256, i * 53 % 256)).save(folder / f"{i:03}.png")
    return folder


# ---- the models of the hub -------------------------------------------------------------------------------


def test_dinov2_sees_and_clip_names(hub, photos, tmp_path):
    r = run(photos, "dog, old bus, coins", f"{hub['dinov2']}+{hub['clip']}", cache=tmp_path, **quiet)
    models = choose(f"{hub['dinov2']}+{hub['clip']}")
    image = models.labels.embed(list_images(photos))
    caption = models.labels.encode_text(
        ["a photo of a dog.", "a photo of an old bus.", "a photo of coins.", "a photo."]
    )
    p = (models.labels.logit_scale * image @ caption.T).softmax(-1)[:, :3]
    assert np.allclose([i["confidence"] for i in r.images], p.max(1).values, atol=2e-3)
    assert [i["label"] for i in r.images] == [["dog", "old bus", "coins"][j] for j in p.argmax(1)]
    assert "softmax" in r.backbones["labels"] and r.backbones["visual"] == hub["dinov2"]
    index, s = nearest(models.visual.embed(list_images(photos)).numpy(), 3)
    names = [i["path"] for i in r.images]
    assert [[n["path"] for n in i["neighbours"]] for i in r.images] == [[names[j] for j in row] for row in index]
    assert np.allclose([[n["similarity"] for n in i["neighbours"]] for i in r.images], s, atol=2e-3)


def list_images(folder):
    from arr_course.images import ImageFolder

    return [im for _, im in ImageFolder(folder)]


def test_siglip_scores_each_label_alone(hub, photos, tmp_path):
    models = choose(hub["siglip"])
    assert models.visual is models.labels and models.scoring == "sigmoid"
    few = run(photos, "a dog, a cat", models, cache=tmp_path, **quiet)
    more = run(photos, "a dog, a cat, a rocket, a palace", models, cache=tmp_path, **quiet)
    assert more.embedded == 0, "new labels must not cost a new pass"
    image, text = (
        models.labels.embed(list_images(photos)),
        models.labels.encode_text(["a photo of a dog.", "a photo of a cat."]),
    )
    logits = (models.labels.logit_scale * image @ text.T + models.labels.logit_bias).numpy()
    assert np.allclose([i["confidence"] for i in few.images], sigmoid(logits).max(1), atol=2e-3)
    assert np.allclose([i["forced"] for i in few.images], softmax(logits).max(1), atol=2e-2)
    for a, b in zip(few.images, more.images, strict=True):
        assert b["confidence"] >= a["confidence"] - 1e-4, (
            "an independent score cannot fall because another label was added"
        )


def test_one_label_is_not_certain(hub, photos, packaged, tmp_path):
    for models in (packaged, choose(hub["clip"]), choose(hub["siglip"])):
        r = run(photos, "a cat", models, cache=tmp_path, **quiet)
        assert all(i["forced"] == 1 for i in r.images) and min(i["confidence"] for i in r.images) < 0.99
        assert [i["unsure"] for i in r.images] == [
            i["confidence"] < (0.1 if models.scoring == "sigmoid" else 0.5) for i in r.images
        ]


def test_a_lone_vision_model_is_named_by_conse(hub, photos, tmp_path):
    r = run(photos, "a cat, a rocket", hub["dinov2"], cache=tmp_path, **quiet)
    assert (
        r.backbones["visual"] == hub["dinov2"]
        and "efficientnet" in r.backbones["labels"]
        and "ConSE" in r.backbones["labels"]
    )
    assert {i["path"]: i["label"] for i in r.images}["cat.png"] == "a cat"


# ---- auto ------------------------------------------------------------------------------------------------


def test_auto_takes_hub_models_that_are_there(hub, monkeypatch):
    monkeypatch.setattr(
        embed,
        "hub_candidates",
        lambda: (dict(visual=["hf/no/such-dinov2", hub["dinov2"]], labels=[hub["siglip"]]), False),
    )
    b = choose("auto")
    assert (b.visual.name, b.labels.name, b.scoring) == (hub["dinov2"], hub["siglip"], "sigmoid")
    assert "DINOv2" in b.how and "image-text" in b.how


def test_auto_fills_up_with_packaged_models(hub, monkeypatch):
    monkeypatch.setattr(
        embed, "hub_candidates", lambda: (dict(visual=[hub["dinov2"]], labels=["hf/no/such-clip"]), False)
    )
    b = choose("auto")
    assert (b.visual.name, b.scoring) == (hub["dinov2"], "conse") and "such-clip" in b.how and "packaged" in b.how


def test_auto_survives_damaged_weights(hub, monkeypatch, tmp_path):
    bad = tmp_path / "clip"
    shutil.copytree(hub["clip"].removeprefix("hf/"), bad)
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-100])
    monkeypatch.setattr(embed, "hub_candidates", lambda: (dict(visual=[], labels=[f"hf/{bad}"]), False))
    b = choose("auto")
    assert b.scoring == "conse" and b.visual.name == embed.PACKAGED[0]


def test_auto_decides_quickly_behind_a_hub_that_never_answers(monkeypatch, tmp_path):
    "A server that accepts and stays silent is worse than none."
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    code = (
        "import time, arr_course.zoo, arr_course.hub; from arr_course.embed import hub_candidates; t = time.perf_counter(); "
        "c, online = hub_candidates(); print(time.perf_counter() - t, online, c)"
    )
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split(maxsplit=2)
    silent.close()
    assert float(out[0]) < 2.5 and out[1] == "False" and "dinov2" not in out[2]


def test_auto_without_a_hub_says_so(monkeypatch):
    monkeypatch.setattr(embed, "hub_candidates", lambda: (dict(visual=[], labels=[]), False))
    b = choose("auto")
    assert (b.visual.name, b.scoring) == (embed.PACKAGED[0], "conse")
    assert "packaged" in b.how and "does not answer" in b.how


# ---- the cache -------------------------------------------------------------------------------------------


def test_only_new_content_is_embedded(packaged, tmp_path):
    album = coloured(tmp_path / "a", 5)
    assert run(album, "a cat", packaged, cache=tmp_path / "c", **quiet).embedded == 5
    for p in list(album.iterdir()):
        p.rename(p.with_name("renamed-" + p.name))
    shutil.copy(next(album.iterdir()), album / "copy.png")
    assert run(album, "a cat", packaged, cache=tmp_path / "c", **quiet).embedded == 0
    Image.new("RGB", (9, 9), "red").save(album / "new.png")
    r = run(album, "a cat", packaged, cache=tmp_path / "c", **quiet)
    assert (r.embedded, r.cached, len(r.images)) == (1, 5, 7)
    assert run(album, "a cat", packaged, cache=False, **quiet).embedded == 6, "without a cache everything is new"


def test_the_class_names_are_read_once(packaged, tmp_path, monkeypatch):
    album, asked, real = coloured(tmp_path / "a", 5), [], packaged.text.encode
    monkeypatch.setattr(packaged.text, "encode", lambda texts: asked.append(len(texts)) or real(texts))
    first = run(album, "a cat, a red wall", packaged, cache=tmp_path / "c", **quiet)
    assert asked == [998, 2]  # a thousand classes; "crane" and "maillot" name two each
    again = run(album, "a cat, a red wall", packaged, cache=tmp_path / "c", **quiet)
    assert asked == [998, 2, 2], "only the labels are read a second time"
    assert again.to_dict() == first.to_dict()


def test_a_bar_only_where_there_is_work(packaged, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    album = coloured(tmp_path / "a", 2)
    run(album, "a cat", packaged, cache=tmp_path / "c")
    assert "2/2" in capsys.readouterr().err
    run(album, "a cat", packaged, cache=tmp_path / "c")
    run(coloured(tmp_path / "none", 0), "a cat", packaged, cache=tmp_path / "c")
    assert capsys.readouterr().err == ""


def test_damaged_shards_are_made_again(packaged, tmp_path):
    album = coloured(tmp_path / "a", 6)
    first = run(album, "a cat", packaged, cache=tmp_path / "c", batch_size=2, **quiet)
    shards = sorted((tmp_path / "c").glob("embedding-*/*.safetensors")) + sorted((tmp_path / "c").glob("top10-*/*"))
    assert len(shards) == 6
    shards[0].write_bytes(b"")
    data = bytearray(shards[-1].read_bytes())
    data[len(data) // 2] ^= 4
    shards[-1].write_bytes(data)
    with pytest.warns(UserWarning, match="damaged shard"):
        again = run(album, "a cat", packaged, cache=tmp_path / "c", **quiet)
    assert 2 <= again.embedded <= 4
    assert np.allclose([i["confidence"] for i in again.images], [i["confidence"] for i in first.images], atol=1e-3)
    assert run(album, "a cat", packaged, cache=tmp_path / "c", **quiet).embedded == 0


def test_kill_loses_nothing_that_was_stored(packaged, photos, tmp_path):
    code = (
        "import sys; from arr_course.label_free import run; "
        "run(*sys.argv[1:3], 'packaged', cache=sys.argv[3], batch_size=1, progress=False)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(photos), "a cat", str(tmp_path)], cwd=ROOT)
    while child.poll() is None and len(list(tmp_path.glob("*/*.safetensors"))) < 9:
        time.sleep(0.005)
    child.kill()
    child.wait()
    stored = [EmbeddingStore(tmp_path, packaged.visual.fingerprint, kind) for kind in ("embedding", "top10")]
    assert not any(s.damaged for s in stored)
    r = run(photos, "a cat", packaged, cache=tmp_path, **quiet)
    assert r.embedded == len(r.images) - min(map(len, stored)) and r.cached >= 4


def test_two_runs_at_once(photos, tmp_path):
    "Two real processes on one folder and one cache: both finish, and a third finds everything done."
    code = (
        "import sys; from arr_course.label_free import run; "
        "print(run(*sys.argv[1:3], 'packaged', cache=sys.argv[3], batch_size=2, "
        "progress=False).embedded)"
    )
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", code, str(photos), "a cat", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    both = [start(), start()]
    done = [p.communicate(timeout=200)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and sum(map(int, done)) >= 21
    assert not list(tmp_path.glob("*/.*.part"))
    assert run(photos, "a cat", "packaged", cache=tmp_path, **quiet).embedded == 0


def test_stores_merge_while_others_write(tmp_path):
    "Writers and merging readers in threads: nothing goes missing."
    keys = [f"{i:064x}" for i in range(240)]
    EmbeddingStore(tmp_path, "m")

    def write(part):
        s = EmbeddingStore(tmp_path, "m", merge_above=10)
        for k in part:
            s.add([k], np.full((1, 8), int(k, 16), np.float32))
        EmbeddingStore(tmp_path, "m", merge_above=10)

    threads = [threading.Thread(target=write, args=(keys[i::4],)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    final = EmbeddingStore(tmp_path, "m")
    assert len(final) == 240 and not final.damaged
    assert (final.matrix(keys)[:, 0] == np.arange(240)).all()


def test_bad_files_never_stop_a_run(packaged, tmp_path):
    album = coloured(tmp_path / "a", 3)
    good = (album / "000.png").read_bytes()
    (album / "cut.png").write_bytes(good[: len(good) // 2])
    (album / "cut copy.png").write_bytes(good[: len(good) // 2])
    (album / "nothing.jpg").touch()
    (album / "gone.png").symlink_to(album / "nowhere.png")
    (album / "sub").mkdir()
    (album / "sub" / "letter.jpg").write_text("dear reader")
    r = run(album, "a cat", packaged, cache=tmp_path / "c", **quiet)
    assert len(r.images) == 3
    assert sorted(s["path"] for s in r.skipped) == [
        "cut copy.png",
        "cut.png",
        "gone.png",
        "nothing.jpg",
        "sub/letter.jpg",
    ]
    assert all(s["error"] and str(tmp_path) not in s["error"] for s in r.skipped)
    json.dumps(r.to_dict(), allow_nan=False)


def test_links_copies_and_odd_names(packaged, tmp_path):
    "A loop of links ends, a copy is its original's nearest neighbour, and any name comes back as it was."
    album = coloured(tmp_path / "a", 3)
    odd = ["Кошка 🐈.png", "with, comma and 'quotes'.png", "ä" * 110 + ".png"]
    for i, name in enumerate(odd):
        shutil.copy(album / f"00{i}.png", album / name)
    (album / "loop").symlink_to(album, target_is_directory=True)
    r = run(album, ["ein Kätzchen 🐈", "красный цвет"], packaged, k=50, cache=tmp_path / "c", **quiet)
    near = {i["path"]: i["neighbours"] for i in r.images}
    assert set(odd) <= set(near) and len(near) == 6 and r.embedded == 3
    assert all(len(v) == 5 for v in near.values()), "k is cut to the others that there are"
    for i, name in enumerate(odd):
        assert near[name][0] == dict(path=f"00{i}.png", similarity=1.0)
    assert {i["label"] for i in r.images} <= {"ein Kätzchen 🐈", "красный цвет"}


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_small_folders(packaged, tmp_path, n):
    r = run(coloured(tmp_path / "a", n), "a cat, a dog", packaged, k=3, cache=tmp_path / "c", **quiet)
    assert [len(i["neighbours"]) for i in r.images] == [min(3, n - 1)] * n
    assert all(i["path"] not in [x["path"] for x in i["neighbours"]] for i in r.images)
    assert ("no readable image" in r.backbones["yardstick"]) == (n == 0) and (
        "too few" in r.backbones["yardstick"]
    ) == (0 < n < 5)
    assert sorted(r.to_dict()) == ["backbones", "disagreements", "images", "skipped"]


# ---- size ------------------------------------------------------------------------------------------------


class Peak:
    "Largest resident memory above the start, in bytes."

    def __enter__(self):
        now = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.bytes, self.stop, start = 0, threading.Event(), now()

        def watch():
            while not self.stop.wait(0.005):
                self.bytes = max(self.bytes, now() - start)

        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_hundred_thousand_images():
    "Vectors and scores of 100,000 images through the whole comparison: right on a sample, and never an n x n matrix (40 GB)."
    pytest.importorskip("faiss")
    n, e, r = 100_000, 64, np.random.default_rng(0)
    group = r.integers(400, size=n)
    x = unit_rows(r.normal(size=(400, e))[group] + 0.8 * r.normal(size=(n, e)))
    conf = np.full((n, 10), 0.01, np.float32)
    conf[np.arange(n), group % 10] = 0.9
    wrong = r.choice(n, 100, replace=False)
    conf[wrong] = np.roll(conf[wrong], 1, axis=1)
    names = [f"{i}.jpg" for i in range(n)]
    with Peak() as peak:
        images, found, facts = compare(names, x, Scores(conf, conf, 0.5), [f"label {i}" for i in range(10)], k=3)
    sample = r.choice(n, 200, replace=False)
    truth = top_k(x[sample], x, 3, own=sample)[0]
    got = np.array([[int(m["path"][:-4]) for m in images[i]["neighbours"]] for i in sample])
    assert recall(got, truth) > 0.95 and "ivf" in facts["neighbours"]
    assert len(images) == n and len(found) == 50 and int(facts["disagreements"].split()[0]) > 50
    assert peak.bytes < 1.5e9, f"{peak.bytes / 1e9:.2f} GB"


def test_neighbours_do_not_depend_on_the_method():
    x = unit_rows(np.random.default_rng(0).normal(size=(500, 24)))
    a, b = (find_neighbours(x, 5, m) for m in ("blocks", "sklearn"))
    assert (a.index == b.index).all() and np.allclose(a.similarity, b.similarity, atol=1e-6)
    copies = np.repeat(x[:3], 40, axis=0)
    for m in ("blocks", "sklearn", "ivf"):
        f = find_neighbours(copies, 3, m)
        assert not (f.index == np.arange(120)[:, None]).any() and np.allclose(f.similarity, 1, atol=1e-5)


def test_embedding_does_not_depend_on_the_batch(packaged, photos, tmp_path):
    paths = sorted(photos.iterdir())[:7]
    keys, _ = hash_files(paths)
    out = []
    for size in (1, 3, 32):
        src = sources(packaged, tmp_path / str(size))
        embed_missing(dict(zip(keys, paths, strict=True)), list(src.values()), size, progress=False)
        out.append(src["visual"].store.matrix(keys))
    assert np.allclose(out[0], out[1], atol=1e-4) and np.allclose(out[0], out[2], atol=1e-4)


# ---- what the lab stores ---------------------------------------------------------------------------------


def test_the_lab_still_finds_what_it_stored(packaged, photos, tmp_path):
    stored = json.loads((ROOT / "labs/label_free/results/label_free.json").read_text(encoding="utf-8"))
    lines = (ROOT / "labs/label_free/labels.txt").read_text(encoding="utf-8").splitlines()
    labels = [line for line in lines if line and not line.startswith("#")]
    r = run(photos, labels, packaged, cache=tmp_path, **quiet)
    assert labels == stored["labels"] and {"commit", "date", "versions"} <= set(stored["provenance"])
    for now, then in zip(r.images, stored["result"]["images"], strict=True):
        assert (now["path"], now["label"]) == (then["path"], then["label"])
        assert abs(now["confidence"] - then["confidence"]) < 0.03
        assert [m["path"] for m in now["neighbours"]][:1] == [m["path"] for m in then["neighbours"]][:1]


@pytest.mark.parametrize("name", ["toolkit", "neighbours"])
def test_benchmarks_met_their_targets(name):
    r = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    assert r["commit"] and r["versions"]["torch"]
    if name == "toolkit":
        ratio = {
            row["variant"].split(",")[0] + (" one" if "one" in row["variant"] else " many"): row["over_timm_one"]
            for row in r["rows"]
        }
        assert ratio["toolkit one"] >= 1.0 and ratio["toolkit many"] >= 1.5
    else:
        assert max(row["n"] for row in r["rows"]) == 100_000 and all(row["recall"] > 0.95 for row in r["rows"])
