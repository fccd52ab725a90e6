"Probes, dense probes and LoRA: what the notebooks do not say: sizes, seeds, leaks, other libraries, the lab."

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from arr_course import dense, lora, probes
from arr_course.concepts import COLOURS, HELD_OUT, TRAINED
from arr_course.vit import ViT, ViTConfig
from arr_course.vit_convert import from_timm
from arr_course.world import sample_scene


def clouds(n, d=12, c=5, spread=1.5, seed=0):
    "Overlapping Gaussian clouds and their classes."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % c
    return torch.randn(c, d, generator=g)[y] + spread * torch.randn(n, d, generator=g), y


# ---- k-NN ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (7, 0.07), (20, 1.0), (100, 0.02)])
def test_knn_equals_sklearn(k, temperature):
    x, y = clouds(220)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / temperature)
    ).fit(x[:100], y[:100])
    pred, scores = probes.knn_classify(x[:100], y[:100], x[100:], k, temperature)
    np.testing.assert_allclose(scores.numpy(), theirs.predict_proba(x[100:]), atol=2e-4)
    assert (pred.numpy() == theirs.predict(x[100:])).mean() > 0.99  # a tie may fall either way


def test_knn_in_chunks_and_scale():
    "More queries than a chunk holds; features of any length; numpy in."
    x, y = clouds(1500)
    whole = probes.knn_classify(x[:200], y[:200], x[200:])[1]
    alone = torch.cat([probes.knn_classify(x[:200], y[:200], o[None])[1] for o in x[1210:1240]])
    assert torch.allclose(whole[1010:1040], alone, atol=1e-5)
    assert torch.allclose(
        whole, probes.knn_classify(1000 * x[:200].numpy(), y[:200].numpy(), 0.01 * x[200:].numpy())[1], atol=1e-4
    )
    assert probes.knn_classify(x[:200], y[:200], x[200:], n_classes=9)[1].shape == (1300, 9)


# ---- intervals -------------------------------------------------------------------------------------------


def test_interval_covers():
    "Of 200 samples whose mean is known, about 95 % of the intervals hold it."
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        _, low, high = probes.interval(rng.random(150) < 0.7, n_boot=400, seed=i)
        hits += low <= 0.7 <= high
    assert 180 <= hits <= 199


def test_interval_of_large_samples_and_of_one():
    v = np.r_[np.ones(3000), np.zeros(3000)]
    mean, low, high = probes.interval(v, n_boot=300)
    assert mean == 0.5 and 0.48 < low < high < 0.52
    assert probes.interval([1.0]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least one image"):
        probes.interval([])


# ---- linear ----------------------------------------------------------------------------------------------


def test_linear_probe_near_logistic_regression():
    x, y = clouds(900, d=20, c=6)
    sets = lambda a, b: {"x": x[a:b]}
    grid = probes.linear_grid(sets(0, 300), y[:300], sets(300, 500), y[300:500])
    s = probes.Standard(x[:300])
    theirs = LogisticRegression(max_iter=3000).fit(s(x[:300])[:, :-1], y[:300]).score(s(x[500:])[:, :-1], y[500:])
    assert abs((grid.predict(sets(500, 900)) == y[500:]).float().mean().item() - theirs) < 0.03


def test_heads_do_not_touch_each_other():
    "A head's weights are the same whatever else is trained beside it."
    x, y = clouds(120)
    s = probes.Standard(x)
    many = probes.train_heads({"a": s(x), "b": s(x)[:, :5]}, y, 5, (0.01, 0.1, 1.0), epochs=5)
    one = probes.train_heads({"b": s(x)[:, :5]}, y, 5, (0.1,), epochs=5)
    assert torch.allclose(many["b"][:, 1], one["b"][:, 0], atol=1e-6)


def test_grid_does_not_see_the_test_images():
    "Whatever is predicted on, choice and weights are made from training and validation alone."
    x, y = clouds(300)
    grid = probes.linear_grid({"x": x[:150]}, y[:150], {"x": x[150:200]}, y[150:200])
    a = grid.logits({"x": x[200:]})
    b = torch.cat([grid.logits({"x": o[None]}) for o in x[200:]])
    assert torch.allclose(a, b, atol=1e-5)


def test_grid_with_constant_features_and_missing_classes():
    "A dimension that never varies, and a class that only validation has."
    x, y = clouds(200)
    x[:, 0] = 3.0
    kept = y < 4
    grid = probes.linear_grid({"x": x[:120][kept[:120]]}, y[:120][kept[:120]], {"x": x[120:]}, y[120:])
    assert grid.weight.shape == (13, 5) and grid.weight.isfinite().all()


# ---- attentive -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, heads", [(8, 1), (24, 3), (64, 8)])
def test_attentive_equals_multihead_attention(dim, heads):
    torch.manual_seed(0)
    mha, probe, q, x = (
        nn.MultiheadAttention(dim, heads, batch_first=True),
        probes.AttentiveProbe(dim, 3, heads),
        torch.randn(dim),
        torch.randn(4, 9, dim),
    )
    with torch.no_grad():
        mha.in_proj_bias.normal_()
        mha.out_proj.weight.copy_(torch.eye(dim))
        mha.out_proj.bias.zero_()
        wq, wk, wv = mha.in_proj_weight.chunk(3)
        query = (wq @ q + mha.in_proj_bias[:dim]).view(heads, 1, -1) / (dim // heads) ** 0.5
        probe.query.copy_((query @ wk.view(heads, -1, dim)).squeeze(1))
        probe.value.weight.copy_(wv)
        probe.value.bias.copy_(mha.in_proj_bias[2 * dim :])
        want, weights = mha(q.expand(4, 1, dim), x, x, average_attn_weights=False)
        assert torch.allclose(probe.gather(x), want[:, 0], atol=1e-5) and torch.allclose(
            probe.attention(x), weights[:, :, 0], atol=1e-5
        )


def test_attentive_starts_as_mean_pooling():
    probe, x = probes.AttentiveProbe(8, 3, 2), torch.randn(2, 5, 8)
    assert torch.allclose(probe.gather(x), probe.value(x.mean(1)), atol=1e-6)
    with pytest.raises(ValueError, match="cannot be split over 3 heads"):
        probes.AttentiveProbe(8, 3, 3)


# ---- crops and features ----------------------------------------------------------------------------------


def test_crops_are_of_one_large_thing():
    scenes, y = probes.crop_scenes(208, "test", 3)
    assert y.bincount().tolist() == [2] * 104 and all(
        s.named == s.things[-1:] and s.things[-1].name == TRAINED[c] for s, c in zip(scenes, y, strict=True)
    )
    assert all(s.things[-1].size >= 56 for s in scenes) and {s.split for s in scenes} == {"test"}
    assert {s.things[-1].colour for s in scenes} == {*COLOURS, None}


def test_crops_are_the_same_from_the_same_seed_and_differ_by_split():
    a, b, c = (probes.concept_crops(20, s, 1, HELD_OUT)[0] for s in ("train", "train", "test"))
    assert all(p.tobytes() == q.tobytes() for p, q in zip(a, b, strict=True)) and all(
        p.tobytes() != q.tobytes() for p, q in zip(a, c, strict=True)
    )


def test_features_do_not_depend_on_the_batch():
    crops, _ = probes.concept_crops(7, "val")
    enc = probes.random_vit(ViTConfig(img_size=112, patch_size=28, embed_dim=32, depth=4, num_heads=2))
    a, ta = probes.read_features(enc, crops, patches=True, batch_size=3)
    b, tb = probes.read_features(enc, crops, patches=True)
    assert set(a) == {
        "own",
        "last/cls",
        "last/mean",
        "last/max",
        "layer -4/mean",
        "layer -4/max",
        "layer -2/mean",
        "layer -2/max",
    }
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a) and ta.shape == tb.shape == (7, 16, 32)
    assert probes.read_features(enc, crops, size=56, patches=True)[1].shape == (7, 4, 32)


def test_random_vit_leaves_the_generator_alone():
    torch.manual_seed(5)
    a = torch.rand(1)
    torch.manual_seed(5)
    probes.random_vit(ViTConfig.tiny())
    b = torch.rand(1)
    assert a == b


# ---- dense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_miou_equals_sklearn(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randint(6, (3, 15, 17), generator=g), torch.randint(6, (3, 15, 17), generator=g)
    m = dense.confusion(a, b, 6)
    np.testing.assert_allclose(dense.iou(m.sum(0)), jaccard_score(b.ravel(), a.ravel(), average=None), atol=1e-6)
    np.testing.assert_allclose(
        dense.miou_interval(m)[0], jaccard_score(b.ravel(), a.ravel(), average="macro"), atol=1e-6
    )


def test_absent_classes_are_left_out_of_the_mean():
    m = dense.confusion(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), 3)
    assert dense.iou(m[0])[0] == 1 and dense.iou(m[0])[1:].isnan().all() and dense.miou_interval(m) == (1, 1, 1)


def test_segmentation_on_grids_that_do_not_divide():
    "Features on 5 x 5, labels on 12 x 12; two sets of maps, of which one knows the answer."
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(2, (40, 1, 5, 5), generator=g)
    y = torch.nn.functional.interpolate(coarse.float(), (12, 12), mode="nearest")[:, 0].long()
    good, bad = (
        torch.cat([coarse, 1 - coarse], 1).float() + 0.05 * torch.randn(40, 2, 5, 5, generator=g),
        torch.randn(40, 2, 5, 5, generator=g),
    )
    r = dense.segmentation_probe(
        {"bad": bad[:30], "good": good[:30]}, y[:30], {"bad": bad[30:], "good": good[30:]}, y[30:], 2, batch_size=64
    )
    assert (
        r["chosen"][0] == "good"
        and r["miou"] > 0.6
        and r["pred"].shape == (10, 12, 12)
        and r["low"] <= r["miou"] <= r["high"]
    )


def test_depth_probe_finds_what_is_linear_and_only_that():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, 8, 8, generator=g)
    depth = (x * torch.randn(6, generator=g).view(1, 6, 1, 1)).sum(1)
    depth[:, 0] = torch.nan
    good = dense.depth_probe(x[:30], depth[:30], x[30:], depth[30:])
    none = dense.depth_probe(torch.randn_like(x[:30]), depth[:30], torch.randn_like(x[30:]), depth[30:])
    assert good["r2"] > 0.99 and abs(none["r2"]) < 0.05 and good["low"] <= good["r2"] <= good["high"]


@pytest.mark.parametrize("density", ["dense", "sparse", "crop"])
def test_haze(density):
    "Same seed, same depths; contrast falls with depth; nearer things are painted later."
    for seed in range(3):
        scene = sample_scene(seed, density, "test")
        image, depth, ids = dense.hazy(scene)
        again = dense.hazy(scene)
        assert image.tobytes() == again[0].tobytes() and (depth == again[1]).all() and (depth[ids == 0] == 1).all()
        assert 0 < depth.min() and depth.max() <= 1 and image.size == (scene.size, scene.size)
        near, far = (np.asarray(dense.hazy(scene, beta=b)[0]).astype(float).std() for b in (0.5, 3.0))
        assert near > far


def test_depth_is_not_told_by_size():
    "Across scenes, depth and size are uncorrelated: the cue is the haze."
    size, depth = [], []
    for seed in range(40):
        scene = sample_scene(seed, "dense")
        _, d, ids = dense.hazy(scene)
        for i, t in enumerate(scene.things):
            if (ids == i + 1).any():
                size.append(t.size), depth.append(d[ids == i + 1][0])
    assert abs(np.corrcoef(size, depth)[0, 1]) < 0.12


# ---- LoRA ------------------------------------------------------------------------------------------------

TIMM = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4)


@pytest.mark.parametrize(
    "targets, theirs", [(r"attn\.qkv$", ["qkv"]), (r"attn\.proj$|mlp\.", ["attn.proj", "fc1", "fc2"])]
)
def test_lora_equals_peft_on_a_vit(targets, theirs):
    torch.manual_seed(0)
    tm = timm.models.VisionTransformer(**TIMM).eval()
    ours = from_timm(tm).eval()
    names = lora.add_lora(ours, r=3, alpha=7, targets=targets + r"|^never$")
    names = [n for n in names if n != "head"]
    pm = peft.get_peft_model(tm, peft.LoraConfig(r=3, lora_alpha=7, target_modules=theirs, lora_dropout=0.0)).eval()
    wrapped = {n.removeprefix("base_model.model."): m for n, m in pm.named_modules() if hasattr(m, "lora_A")}
    assert set(names) == set(wrapped)
    for n in names:
        low = ours.get_submodule(n).parametrizations.weight[0]
        with torch.no_grad():
            low.B.normal_(std=0.1)
            wrapped[n].lora_A["default"].weight.copy_(low.A[0])
            wrapped[n].lora_B["default"].weight.copy_(low.B[0])
    x = torch.randn(2, 3, 32, 32)
    a, b = ours(x), pm(x)
    assert torch.allclose(a, b, atol=1e-4)
    a.square().sum().backward()
    b.square().sum().backward()
    for n in names:
        low = ours.get_submodule(n).parametrizations.weight[0]
        assert torch.allclose(low.A.grad[0], wrapped[n].lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4)
        assert torch.allclose(low.B.grad[0], wrapped[n].lora_B["default"].weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", lora.METHODS)
def test_each_method_trains_what_it_says(method):
    "What is frozen stays to the last bit; what is trained moves; merged, the network is an ordinary one with the same outputs."
    torch.manual_seed(0)
    cfg = ViTConfig.tiny()
    model = lora.prepare(lora.Tuned(ViT(cfg), 64, 3), method)
    before, trained = (
        {k: v.clone() for k, v in model.state_dict().items()},
        {k for k, p in model.named_parameters() if p.requires_grad},
    )
    x, y = torch.randn(24, 3, 32, 32), torch.arange(24) % 3
    losses = lora.fine_tune(model, x, y, lora.RATES[method], steps=25, batch_size=24)
    assert losses[-1] < losses[0]
    moved = {
        k
        for k, v in model.state_dict().items()
        if not torch.equal(v, before[k]) and "running" not in k and "num_batches" not in k
    }
    assert (
        moved <= trained and "head.weight" in moved and (method == "linear") == (moved == {"head.weight", "head.bias"})
    )
    with torch.no_grad():
        want = model(x)
    lora.merge_lora(model)
    assert set(model.trunk.state_dict()) == set(ViT(cfg).state_dict())
    with torch.no_grad():
        assert torch.allclose(model(x), want, atol=1e-4)


def test_lora_can_be_saved_and_put_back():
    torch.manual_seed(0)
    cfg, x = ViTConfig.tiny(), torch.randn(2, 3, 32, 32)
    base = ViT(cfg).state_dict()
    a, b = ViT(cfg).eval(), ViT(cfg).eval()
    for m in (a, b):
        m.load_state_dict(base)
        lora.add_lora(m, r=2, parts=(True, False, True))
    for k, v in lora.lora_state(a).items():
        torch.nn.init.normal_(a.get_parameter(k) if v.requires_grad else dict(a.named_parameters())[k], std=0.1)
    assert not torch.allclose(a(x), b(x), atol=1e-3)
    b.load_state_dict(lora.lora_state(a), strict=False)
    assert torch.equal(a(x), b(x))


def test_adapters_that_are_passed_by_are_noticed():
    model = from_timm(timm.models.VisionTransformer(**TIMM)).eval()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(RuntimeError, match="past their wrappers"):
        lora.check_adapters(wrapped, torch.randn(1, 3, 32, 32))


def test_bad_ranks_and_parts():
    for shape, r, parts, message in (
        ((4, 3), 4, (True,), "choose 1..3"),
        ((4, 3), 0, (True,), "choose 1..3"),
        ((4, 3), 1, (True,) * 3, "equal blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.LowRank(shape, r, 1, parts)


# ---- the lab ---------------------------------------------------------------------------------------------

LAB = Path(__file__).resolve().parent.parent / "labs" / "choose_a_backbone"


@pytest.fixture(scope="module")
def lab():
    "The lab's program, as a module."
    sys.path.insert(0, str(LAB))
    spec = importlib.util.spec_from_file_location("choose_a_backbone_run", LAB / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(LAB))


@pytest.fixture(scope="module")
def stored():
    return json.loads((LAB / "results" / "choose_a_backbone.json").read_text(encoding="utf-8"))


def test_lab_result_is_whole(lab, stored):
    "Five backbones, twelve tasks, each value inside its interval; and every prediction scored as it was written."
    written = json.loads((LAB / "predictions.json").read_text(encoding="utf-8"))["predictions"]
    assert tuple(stored["models"]) == lab.MODELS and all(
        set(m["tasks"]) == {p["task"] for p in written} for m in stored["models"].values()
    )
    for m in stored["models"].values():
        assert all(t["low"] <= t["value"] <= t["high"] and t["n"] >= 100 for t in m["tasks"].values())
    for p, s in zip(written, stored["scores"], strict=True):
        value = {m: o["tasks"][p["task"]]["value"] for m, o in stored["models"].items()}
        assert (s["task"], s["said"], s["over"]) == (p["task"], p["winner"], p["over"])
        assert s["hit"] == (max(value, key=value.get) == p["winner"]) and s["pair_hit"] == (
            value[p["winner"]] > value[p["over"]]
        )


def test_lab_measures_the_same_again(lab, stored):
    "Held-out concepts by k-NN on raw pixels, measured anew."
    import tasks

    sets, y = {}, {}
    for split in ("train", "val", "test"):
        images, labels = tasks.crops_of("held", split)
        sets[split], y[split] = probes.read_features(probes.PixelEncoder(), images), labels["concept"]
    (name, k), _ = probes.knn_grid(sets["train"], y["train"], sets["val"], y["val"])
    guess, _ = probes.knn_classify(sets["train"][name], y["train"], sets["test"][name], k)
    assert (
        abs(
            (guess == y["test"]).float().mean().item()
            - stored["models"]["pixels"]["tasks"]["held-out concepts, k-NN"]["value"]
        )
        < 0.02
    )


def test_lab_draws_are_paired(lab):
    "Two models that differ on a few images: their difference has a narrow interval, as every resample holds the same images."
    rng = np.random.default_rng(0)
    a = (rng.random(500) < 0.5).astype(float)
    b = a.copy()
    b[np.flatnonzero(a)[:10]] = 0
    (v, d), (w, e) = lab.draws(a), lab.draws(b)
    low, high = np.quantile(d - e, [0.025, 0.975])
    assert abs(v - w - 0.02) < 1e-9 and 0 < low < 0.02 < high < 0.04 and np.ptp(np.quantile(d, [0.025, 0.975])) > 0.08


def test_lab_scores(lab):
    "A clear hit, and a miss within the noise."
    rng = np.random.default_rng(0)
    noise = lambda mean: mean + 0.01 * rng.standard_normal(500)
    models = {
        m: {"tasks": {"t": {"value": v}, "u": {"value": w}}}
        for m, v, w in (("a", 0.9, 0.5), ("b", 0.5, 0.502), ("c", 0.1, 0.1))
    }
    boot = {m: {k: noise(t["value"]) for k, t in o["tasks"].items()} for m, o in models.items()}
    said = [dict(task=t, winner="a", over="c", because="") for t in "tu"]
    t, u = lab.score(said, models, boot)
    assert (
        t["hit"]
        and t["clear"]
        and t["rival"] == "b"
        and not u["hit"]
        and not u["clear"]
        and u["won"] == "b"
        and u["pair_hit"]
        and u["pair_clear"]
    )


def test_easy_vqa_labels(lab):
    "What is read out of the questions agrees with the pictures: the middle of the shape has the colour that was told."
    import tasks
    from PIL import Image

    rows = tasks.easy_images("test")[:60]
    names = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
    mean = {}
    for path, _, colour in rows:
        a = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(float)
        far = np.abs(a - np.median(a, 0)).sum(1)
        mean.setdefault(names[colour], []).append(a[far > 0.7 * far.max()].mean(0))
    assert len(mean) == 8
    for k, v in mean.items():
        inner = np.linalg.norm(np.array(v) - np.mean(v, 0), axis=1).mean()
        nearest = min(np.linalg.norm(np.mean(v, 0) - np.mean(w, 0)) for j, w in mean.items() if j != k)
        assert inner < 60 and nearest > 15, (k, inner, nearest)
