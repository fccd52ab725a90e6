"""The evaluation against what is known: oracles, scikit-learn, brute force, and a model that goes through its file."""
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers"), pytest.importorskip("emoji"), pytest.importorskip("resvg_py")

from arr_course import evaluate as ev  # noqa: E402
from arr_course import zoo  # noqa: E402
from arr_course.concepts import CONCEPTS, HELD_OUT, TRAINED, names_of  # noqa: E402
from arr_course.dense import miou_interval  # noqa: E402
from arr_course.grounding import (  # noqa: E402
    QUERIES,
    Sample,
    figure,
    grounding,
    macro_auroc,
    mean_figure,
    paraphrases,
    patch_scores,
    read,
    score_scene,
    shown,
    weighted_auroc,
)
from arr_course.images import Preprocess  # noqa: E402
from arr_course.joint import Joint, JointConfig, JointEncoder  # noqa: E402
from arr_course.probes import concept_crops, random_vit  # noqa: E402
from arr_course.vit import ViTConfig  # noqa: E402
from arr_course.world import Scene, Thing, paint  # noqa: E402
from arr_course.zoo import load_text  # noqa: E402

PRE = Preprocess((336, 336), (.5,) * 3, (.5,) * 3, resize="squash")
SMALL = dict(patch_size=14, embed_dim=24, depth=4, num_heads=2, pos_embed="sincos")
TINY = ViTConfig(img_size=336, class_token=False, global_pool="avg", **SMALL)
FEW = dict(crops=(208, 104, 104), scenes=(10, 6))
FACTS = dict(recipe="none", command="none", data="none", steps=0, seconds=0.0, licence="Apache-2.0")


@pytest.fixture(scope="module")
def joint():
    torch.manual_seed(0)
    return Joint(JointConfig(vit=TINY, joint_dim=16))


@pytest.fixture(scope="module")
def text(): return load_text(device="cpu")


def encoder(model, text): return JointEncoder("arr/tiny", model, PRE, device="cpu", text=lambda: text)


# --- numbers --------------------------------------------------------------------------------------------------------

def test_auroc_over_scenes_is_scikit_learns():
    sk = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(1)
    s, p = torch.randint(0, 5, (50, 7), generator=g) / 4, torch.rand(50, 7, generator=g) < .3
    times = torch.randint(0, 3, (4, 50), generator=g).float()
    for j in range(7):
        want = [sk.roc_auc_score(p[:, j], s[:, j], sample_weight=w) for w in times]
        np.testing.assert_allclose(weighted_auroc(s[:, j], p[:, j], times), want, atol=1e-6)
    assert macro_auroc(s, p)["value"] == pytest.approx(sk.roc_auc_score(p, s, average="macro"), abs=1e-4)


def test_macro_auroc_draws_scenes_not_words():
    "The interval is that of a plain bootstrap over rows, computed here one draw after another."
    sk = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(2)
    p = torch.rand(80, 3, generator=g) < .4
    s = p + torch.randn(80, 3, generator=g)
    rng, boot = np.random.default_rng(5), []
    for _ in range(400):
        i = rng.integers(80, size=80)
        boot.append(sk.roc_auc_score(p[i], s[i], average="macro"))
    found = macro_auroc(s, p)
    assert [found["low"], found["high"]] == pytest.approx(list(np.quantile(boot, [.025, .975])), abs=.02)


def test_macro_auroc_leaves_out_what_has_none():
    s, p = torch.rand(20, 3), torch.zeros(20, 3, dtype=torch.bool)
    p[:, 0] = True; p[:7, 1] = True
    assert macro_auroc(s, p)["words"] == 1
    assert macro_auroc(s[:, [0, 2]], p[:, [0, 2]]) is None


def test_figures_hold_their_value():
    assert figure(.5, .6, .7, 3) == dict(value=.5, low=.5, high=.7, n=3)
    assert mean_figure([None, 1.]) is None
    assert mean_figure([None, 1., 0.])["n"] == 2


def test_bootstrap_of_miou_is_the_dense_chapters():
    m = torch.randint(0, 60, (25, 4, 4), generator=torch.Generator().manual_seed(3)).float()
    ours = ev.drawn_figure(ev.bootstrap(m.flatten(1), ev.miou_of), 25)
    np.testing.assert_allclose([ours[k] for k in ("value", "low", "high")], miou_interval(m), atol=1e-4)


def test_paired_differences_are_narrower_than_the_two_intervals():
    hard = np.random.default_rng(0).random(500)
    a, b = (torch.from_numpy(hard < p).double()[:, None] for p in (.7, .66))
    x, y = ev.bootstrap(a, ev.accuracy_of), ev.bootstrap(b, ev.accuracy_of)
    fa, fb, d = (ev.drawn_figure(o, 500) for o in (x, y, x - y))
    assert fa["low"] < fb["high"] and d["low"] > 0
    assert d["value"] == pytest.approx(fa["value"] - fb["value"], abs=2e-4)


# --- what a scene shows ---------------------------------------------------------------------------------------------

def test_masks_are_unions_and_clutter_has_none():
    things = (Thing("cat", 28, 28, 42), Thing("cat", 84, 84, 42, colour="blue"), Thing("clutter", 84, 28, 42, code="2666"))
    scene = Scene(112, things, (0, 0, 0, 1.))
    alone = [shown(Scene(112, (t,), (0, 0, 0, 1.)), paint(Scene(112, (t,), (0, 0, 0, 1.)))[1])["cat"] for t in things[:2]]
    shows = shown(scene, paint(scene)[1])
    assert set(shows) == {"cat", "blue disc"}
    assert (shows["cat"] == alone[0] | alone[1]).all() and (shows["blue disc"] == alone[1]).all()


def test_a_hidden_thing_is_not_there():
    under, over = Thing("bee", 56, 56, 20), Thing("sign", 56, 56, 80, digit=3)
    scene = Scene(112, (under, over), (0, 0, 0, 1.))
    assert set(shown(scene, paint(scene)[1])) == {"sign", "number 3"}


def test_patch_scores_by_hand():
    z = torch.tensor([[4., 0.], [3., 1.], [2., 2.], [1., 3.]])                 # (4 patches, 2 texts)
    ends = np.array([True, False, False, True])
    k, area, hit = patch_scores(z, ("a", "b"), {"a": ends, "b": ends})
    assert (k, area.tolist(), hit.tolist()) == ([0, 1], [.5, .5], [1., 1.])
    k, area, hit = patch_scores(z, ("a", "b"), {"a": np.array([False, True, False, False])})
    assert (k, hit.tolist()) == ([0], [0.]) and area.item() == pytest.approx(2 / 3)
    assert patch_scores(z, ("a", "b"), {})[0] == []


def test_small_means_all_things_of_the_name():
    scene = Scene(112, (Thing("cat", 20, 20, 30), Thing("cat", 80, 80, 60), Thing("bee", 80, 20, 32)), (0, 0, 0, 1.))
    shows, words = shown(scene, paint(scene)[1]), ("cat", "bee")
    z = torch.zeros(64, 2)
    z[:, 1] = torch.from_numpy(shows["bee"]).float()                           # the bee is found, the cats are not
    found = score_scene(scene, shows, z, dict(name=words))
    assert found["name_small"] == 1. and found["name_auroc"] == pytest.approx(.75)


def test_the_digit_is_the_best_of_ten():
    scene = Scene(112, (Thing("sign", 56, 56, 60, digit=0),), (0, 0, 0, 1.))
    shows = shown(scene, paint(scene)[1])
    for best, right in ((0, 1.), (4, 0.)):
        z = torch.zeros(64, 10); z[30, best] = 1
        assert score_scene(scene, shows, z, dict(number=QUERIES["number"]))["number_right"] == right
    assert score_scene(scene, {}, z, dict(number=QUERIES["number"]))["number_right"] is None


def test_paraphrases_are_new_words():
    letters = lambda s: "".join(c for c in s.casefold() if c.isalpha())
    found = paraphrases()
    used = {letters(n) for w in TRAINED for n in names_of(w)}
    for wording, word in found.items():
        assert letters(wording) not in {letters(n) for n in names_of(word)} and not CONCEPTS[word].held_out
    assert len(set(found)) == len(set(map(letters, found))) >= 30
    assert "hotdog" not in found and "four leaf clover" not in found and found["wine glass"] == "wine"
    assert len([w for w in found if letters(w) in used]) == 0, "no paraphrase is another concept's name"


# --- scenes ---------------------------------------------------------------------------------------------------------

def test_scenes_are_those_of_the_seed():
    a, b = Sample("dense", 5, seed=2), Sample("dense", 5, seed=3)
    assert [a.scene(i).seed for i in range(2)] == [20_000_000, 20_000_001] and a.scene(0).split == "test"
    assert a.scene(0) == Sample("dense", 9, seed=2).scene(0) and a.scene(0).things != b.scene(0).things
    held = a.scene(0, HELD_OUT)
    assert {t.name for t in held.named} <= {*HELD_OUT, "sign"}


@pytest.mark.parametrize("change, says", [(dict(n=1), "2 to"), (dict(precision="fp8"), "fp8")])
def test_samples_say_what_is_wrong(change, says):
    with pytest.raises(ValueError, match=says): Sample(**change)


def test_batches_do_not_matter(joint, text):
    e = encoder(joint, text)
    one, five = ([z for *_, z in read(e, ["cat", "dog"], Sample("sparse", 6, 1, batch_size=b))] for b in (1, 5))
    assert len(one) == len(five) == 6
    torch.testing.assert_close(torch.stack(one), torch.stack(five), atol=1e-4, rtol=1e-4)


def test_patches_must_tile_the_scene(text):
    torch.manual_seed(0)
    odd = Joint(JointConfig(vit=ViTConfig(img_size=100, class_token=False, global_pool="avg", **(SMALL | dict(patch_size=10)))))
    e = JointEncoder("odd", odd, Preprocess((100, 100), (.5,) * 3, (.5,) * 3, resize="squash"), device="cpu", text=lambda: text)
    with pytest.raises(ValueError, match="do not tile"): next(read(e, ["cat"], Sample("sparse", 2)))


def test_untrained_is_chance(joint, text):
    found = grounding(encoder(joint, text), Sample("sparse", 24, 1))
    assert .3 < found["query_patch_auroc"]["value"] < .7 and found["top1_patch_hit"]["value"] < .4
    assert found["query_patch_auroc"]["n"] == 24 and found["held_out_auroc"]["n"] == 6
    assert all(m["low"] <= m["value"] <= m["high"] for m in found.values())


# --- evaluate, finish, train ----------------------------------------------------------------------------------------

def test_evaluate_repeats_itself_and_another_seed_differs(joint, text):
    e, how = encoder(joint, text), dict(density="sparse", n=6, parts=["grounding"], precision="fp32")
    a, b, c = ev.evaluate(e, seed=1, **how), ev.evaluate(e, seed=1, **how), ev.evaluate(e, seed=2, **how)
    assert a["metrics"] == b["metrics"] != c["metrics"]
    assert (a["split"], a["precision"], a["seed"], a["fingerprint"]) == ("test", "fp32", 1, e.fingerprint)
    json.dumps(a, allow_nan=False)


def test_any_encoder_meets_its_opponents():
    e = random_vit(ViTConfig(img_size=112, **SMALL), seed=0)
    r = ev.evaluate(e, n=2, parts=["knn"], precision="fp32", sizes=FEW)
    assert set(r["metrics"]) == {k + "knn_top1" for k in ("", "random/", "pixels/", "over_random/", "over_pixels/")}
    assert r["metrics"]["over_random/knn_top1"] == dict(value=0, low=0, high=0, n=104), "here its opponent is itself"
    assert ev.parts_of(e) == ("knn", "dense")


def test_knn_finds_what_is_told():
    "Crops whose colour gives the class away are named right."
    crops = {s: concept_crops(104 * k, s, 1) for s, k in (("train", 2), ("val", 1), ("test", 1))}
    for images, y in crops.values():
        for i, k in enumerate(y.tolist()): images[i] = images[i].resize((112, 112)).point(lambda _, k=k: 0) if k else images[i]
    crops = {s: (ims, (y > 0).long()) for s, (ims, y) in crops.items()}
    e = random_vit(ViTConfig(img_size=112, **SMALL))
    assert ev.knn_rows(e, crops).mean() > .99


def test_segmentation_beats_painting_it_all_as_background(joint):
    scenes = {s: ev.labelled_scenes(n, "dense", s, 0) for s, n in (("train", 10), ("test", 4))}
    from arr_course.probes import PixelEncoder
    rows = ev.segmentation_rows(PixelEncoder(), scenes)
    assert rows.shape == (4, 144) and rows.sum() == 4 * 336 * 336
    background = (scenes["test"][1] == 0).double().mean().item()
    assert ev.bootstrap(rows, ev.miou_of)[0] > background / 12


@pytest.mark.parametrize("how, says", [
    (dict(density="crop"), "neither dense nor sparse"), (dict(seed=-1), "0 or more"), (dict(n=1), "2 to"),
    (dict(precision="fp8"), "not one of auto"), (dict(parts=["depth"]), "cannot be evaluated on 'depth'"),
])
def test_evaluate_says_what_is_wrong(joint, text, how, says):
    with pytest.raises(ValueError, match=says): ev.evaluate(encoder(joint, text), **(dict(n=2, precision="fp32") | how))


def test_cards_are_of_the_weights_that_are_shipped(joint, tmp_path, monkeypatch):
    with torch.no_grad(): joint.image_proj.weight.mul_(1 + 1e-4)               # numbers that half precision cannot hold
    before = {k: v.clone() for k, v in joint.state_dict().items()}
    path = ev.finish("tiny", joint, PRE, tmp_path, n=4, seed=7, sizes=FEW, precision="fp32", train_seed=3, **FACTS)
    assert all(torch.equal(v, before[k]) for k, v in joint.state_dict().items()), "the trained model itself is left alone"
    card = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setenv("ARR_WEIGHTS", str(tmp_path))
    e = zoo.load("arr/tiny", device="cpu")
    assert e.fingerprint == card["evaluation"]["fingerprint"] and card["dtype"] == "float16" and card["seed"] == 3
    r = ev.evaluate(e, "sparse", 4, 7, precision="fp32", sizes=FEW)
    for k, m in r["metrics"].items():
        if "knn" not in k: assert card["metrics"][f"sparse/{k}"] == m, k
    assert {k.split("/")[0] for k in card["metrics"]} == {"dense", "sparse"} and "dense/knn_top1" in card["metrics"]
    assert card["evaluation"]["commands"]["dense"].startswith("arr-course evaluate arr/tiny --density dense --n 4 --seed 7")


def test_train_knows_its_recipes(tmp_path):
    assert set(ev.RECIPES) == {"filip-ti", "dino-ti"}
    with pytest.raises(ValueError, match="no recipe"): ev.train("clip", tmp_path)


ENCODERS = [p for p in zoo.shipped_files() if zoo.read_card(p.stem)["architecture"] != "VLM"]   # those: tests/test_vlm.py


@pytest.mark.parametrize("path", ENCODERS, ids=lambda p: p.stem)
def test_shipped_cards_are_of_their_weights(path):
    card = zoo.read_card(path.stem)
    assert card["evaluation"]["fingerprint"] == zoo.load(card["name"], device="cpu").fingerprint, "measured on these very weights"
    assert path.stat().st_size <= 12e6 and card["evaluation"]["split"] == "test"
    found = {k: m["value"] for k, m in card["metrics"].items()}
    least = {"filip-ti": dict(query_patch_auroc=(.93, .95), top1_patch_hit=(.85, .95), image_auroc=(.90, .96), digits=(.8, .8))}
    for k, (dense, sparse) in least.get(path.stem, {}).items():
        assert found[f"dense/{k}"] >= dense and found[f"sparse/{k}"] >= sparse, k
    if path.stem == "dino-ti": assert found["dense/over_random/knn_top1"] > 0 and found["dense/over_random/segmentation_miou"] > 0
