"""The lab on frozen and trainable encoders: runs from end to end, ridge regression, and pixels that give the stored features."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers"), pytest.importorskip("emoji"), pytest.importorskip("resvg_py")

LAB = Path(__file__).resolve().parent.parent / "labs" / "frozen_or_trainable"
NAMES = ["low rate", "captions first", "ridge first", "flamingo"]


@pytest.fixture(scope="module")
def lab():
    "The lab's script as a module."
    sys.path.insert(0, str(LAB))
    try: module = importlib.import_module("run")
    finally: sys.path.remove(str(LAB))
    yield module
    for name in ("run", "together"): sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "Results of a quick call with a few runs, and its folder."
    folder = tmp_path_factory.mktemp("frozen")
    call(folder, ",".join(NAMES))
    return folder, json.loads((folder / "out.json").read_text(encoding="utf-8"))


def call(folder, only):
    "Run the script with --quick."
    command = [sys.executable, LAB / "run.py", *arguments(folder, only)]
    subprocess.run(command, check=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def arguments(folder, only):
    return ["--quick", "--only", only, "--features", str(folder / "features"), "--out", str(folder / "out.json")]


def test_quick_runs_are_stored_with_controls_costs_and_provenance(quick):
    runs = quick[1]["runs"]
    assert list(runs) == NAMES
    for r in runs.values():
        for d in ("dense", "sparse"):
            for k in ("accuracy", "no_image", "shuffled_image", "question_only"):
                m = r["metrics"][f"{d}/{k}"]
                assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1 and m["n"] == 4        # pairs
        assert r["cpu_seconds"] > 0 and r["curve"][-1]["step"] == r["steps"] == 3
    assert runs["low rate"]["parameters"] == runs["ridge first"]["parameters"] < runs["flamingo"]["parameters"]
    assert set(runs["captions first"]["stage1"]) == {"writer", "connector"} and runs["ridge first"]["stage1"]["explained"] <= 1
    for r in runs.values(): assert {"commit", "seed", "versions", "encoder", "command"} <= set(r["provenance"])


def test_what_is_stored_is_not_trained_again(lab, quick, monkeypatch):
    folder, before = quick
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments(folder, ",".join(NAMES))])
    monkeypatch.setattr(lab, "run", None)                                               # to call it would raise
    lab.main()
    assert json.loads((folder / "out.json").read_text(encoding="utf-8")) == before


def test_ridge_finds_the_matrix_and_shrinks_it(lab):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(400, 6, generator=g), torch.randn(3, 6, generator=g)
    assert torch.allclose(lab.ridge(x, x @ w.T, 1e-7), w, atol=1e-4)
    assert lab.ridge(x, x @ w.T, 1.).norm() < .6 * w.norm()                             # penalty = mean square: half as long
    noisy = x @ w.T + torch.randn(400, 3, generator=g)
    best, cost = lab.ridge(x, noisy, 1e-7), lambda m: (x @ m.T - noisy).square().sum()
    assert all(cost(best) < cost(best + .05 * torch.randn(3, 6, generator=g)) for _ in range(20))


def test_a_patch_is_described_by_the_words_of_what_it_shows(lab):
    from arr_course.vqa import world_vocabulary
    from arr_course.world import paint_ids, patch_masks, sample_scene, words_of_thing

    vocab = world_vocabulary()
    class Stored:
        scene = staticmethod(lambda k: sample_scene(k, "sparse"))
        def __getitem__(self, k):
            s = self.scene(k)
            return torch.arange(576.)[:, None].expand(-1, 2).half(), np.asarray(patch_masks(paint_ids(s), len(s.things)))
    table = torch.eye(len(vocab))
    x, y = lab.patches_and_words(Stored(), 5, vocab, table)
    things, masks = Stored.scene(5).things, Stored()[5][1]
    named = masks[[t.name != "clutter" for t in things]].any(0)
    assert x[:, 0].tolist() == np.flatnonzero(named).tolist() and torch.allclose(y.sum(1), torch.ones(len(y)))
    alone = next(p for p in range(576) if masks[:, p].sum() == 1 and named[p])
    words = {vocab.words[i] for i in y[x[:, 0].tolist().index(alone)].nonzero()[:, 0].tolist()}
    thing = things[int(masks[:, alone].argmax())]
    assert words == {w.removesuffix(" disc").removeprefix("number ") for w in words_of_thing(thing)}


def test_pixels_in_the_loop_are_the_features_on_disk(lab, quick):
    from arr_course.vqa import FeatureStore, Lessons, StoredScenes, world_vocabulary
    from arr_course.zoo import load

    encoder, vocab = load("arr/filip-ti"), world_vocabulary()
    stored = [StoredScenes(FeatureStore(encoder, d, 8, folder=quick[0] / "features", shard=8)) for d in ("dense", "sparse")]
    a, b = (kind(stored, vocab, seed=3)[1] for kind in (Lessons, lab.Pictures))
    assert b["features"].dtype == torch.uint8 and a["tokens"] == b["tokens"]
    with torch.no_grad(): seen = lab.Together(encoder.model.vit, torch.nn.Linear(1, 1)).see(b["features"][None])[0]
    assert torch.nn.functional.cosine_similarity(seen, a["features"].float(), dim=1).min() > .99


def test_only_a_trained_encoder_gets_gradients_and_its_own_rate(lab):
    from arr_course.vit import ViT, ViTConfig

    vlm, pixels = torch.nn.Linear(2, 2), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    cfg = ViTConfig(img_size=28, patch_size=14, embed_dim=8, depth=1, num_heads=2, class_token=False, global_pool="avg")
    still, slow = lab.Together(ViT(cfg), vlm), lab.Together(ViT(cfg), vlm, .1)
    assert not still.see(pixels).requires_grad and slow.see(pixels).requires_grad
    assert {g["lr_scale"] for g in still.groups(.05)} == {1.} and {g["lr_scale"] for g in slow.groups(.05)} == {1., .1}
