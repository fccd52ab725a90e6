"""The VLM against what is known: an oracle, brute force, one picture at a time, damaged files, and runs that were stopped."""
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers"), pytest.importorskip("emoji"), pytest.importorskip("resvg_py"), pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from arr_course import tuning, zoo  # noqa: E402
from arr_course import vqa_evaluate as ve  # noqa: E402
from arr_course.abstractors import CONNECTORS  # noqa: E402
from arr_course.cli import app  # noqa: E402
from arr_course.connectors import keep, keep_all  # noqa: E402
from arr_course.core import sha256  # noqa: E402
from arr_course.images import Preprocess  # noqa: E402
from arr_course.joint import Joint, JointConfig, JointEncoder  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.practice import RECIPE, PracticeStage, run_practice  # noqa: E402
from arr_course.questions import answer as truth  # noqa: E402
from arr_course.reader import prior_of_types  # noqa: E402
from arr_course.runs import newest, read_log  # noqa: E402
from arr_course.tuning import BLOCKS, Stage, grounding_loss, lesson_loss, looks, run_stage, train_vlm  # noqa: E402
from arr_course.vit import Features, ViTConfig  # noqa: E402
from arr_course.vlm import VLM, Assistant, VLMConfig, answer, answer_ids, load_vlm, read_picture  # noqa: E402
from arr_course.vqa import (  # noqa: E402
    FeatureStore,
    Lessons,
    StoredScenes,
    collate_lessons,
    draw_budget,
    draw_subset,
    pack,
    question_line,
    select_rows,
    world_vocabulary,
)
from arr_course.world import render  # noqa: E402
from arr_course.zoo import ModelNotFound, WeightsError, load, load_text, save_card  # noqa: E402

PRE = Preprocess((336, 336), (.5,) * 3, (.5,) * 3, resize="squash")
FACTS = dict(recipe="none", command="none", data="none", steps=0, seconds=0., licence="Apache-2.0", seed=0,
             metrics=dict(none=dict(value=.5, low=.4, high=.6, n=2)))
WORDS = world_vocabulary().words
SMALL = dict(words=WORDS, encoder="arr/tiny-eyes", in_dim=24, settings=dict(hidden=16, skip=True),
             decoder=dict(embed_dim=32, depth=3, num_heads=2, num_kv_heads=1, mlp_dim=32))


def eyes(width, joint_dim):
    "An untrained joint model for scenes of 24 x 24 patches: one block."
    torch.manual_seed(0)
    vit = ViTConfig(img_size=336, patch_size=14, embed_dim=width, depth=1, num_heads=2, pos_embed="sincos", class_token=False,
                    global_pool="avg")
    return Joint(JointConfig(vit=vit, joint_dim=joint_dim))


@pytest.fixture(scope="module")
def text(): return load_text(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    "A folder of weights: an encoder, and a VLM that reads it."
    out = tmp_path_factory.mktemp("weights")
    model = eyes(24, 16)
    save_card("tiny-eyes", model, PRE, out, **FACTS)
    e = JointEncoder("arr/tiny-eyes", model, PRE, device="cpu", text=lambda: text)
    torch.manual_seed(1)
    vlm = tuning.start(VLM(VLMConfig(**SMALL)), e)
    with torch.no_grad():
        for q in vlm.decoder.blocks.parameters(): q.normal_(std=.3) if q.ndim > 1 else q       # so that it says this and that
    save_card("tiny-vlm", vlm, PRE, out, torch.float16, **FACTS)
    return out


@pytest.fixture
def shipped(folder, monkeypatch): monkeypatch.setenv("ARR_WEIGHTS", str(folder))


@pytest.fixture(scope="module")
def encoder(text): return JointEncoder("arr/tiny-eyes", eyes(24, 16), PRE, device="cpu", text=lambda: text)


def copied(folder, out, name="tiny-vlm"):
    "A copy of a model's two files, to be damaged: the weights and the card."
    files = [f"{name}.safetensors", f"{name}.json"]
    for f in files: (out / f).write_bytes((folder / f).read_bytes())
    return [out / f for f in files]


def cut(path): path.write_bytes(path.read_bytes()[:-10])


# --- stored features ------------------------------------------------------------------------------------------------

def store(encoder, folder, n=4, shard=2): return FeatureStore(encoder, "sparse", n, folder=folder, shard=shard)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("how", ["cut", "replaced", "gone"])
def test_damaged_features_are_named_and_can_be_made_again(encoder, tmp_path, suffix, how):
    s = store(encoder, tmp_path).fill(progress=False)
    before, path = StoredScenes(s)[3], s.path(1).with_suffix(suffix)
    if how == "cut": cut(path)
    if how == "replaced": path.write_bytes(s.path(0).with_suffix(suffix).read_bytes())          # whole, but of other scenes
    if how == "gone": path.unlink()
    with pytest.raises((WeightsError, FileNotFoundError), match=path.name): StoredScenes(s)
    s.path(1).with_suffix(".json").unlink()
    assert s.missing() == [1]
    with pytest.raises(FileNotFoundError, match=r"1 shards .* missing: call fill\(\)"): StoredScenes(s)
    after = StoredScenes(s.fill(progress=False))[3]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_two_processes_that_fill_the_same_store_at_once(encoder, tmp_path):
    "Both write every shard; what is left is whole, and what one process would have made."
    alone, fork = store(encoder, tmp_path / "alone").fill(progress=False), multiprocessing.get_context("fork")
    both, start = store(encoder, tmp_path / "both"), fork.Barrier(2)
    run = lambda: (start.wait(60), both.fill(progress=False))
    processes = [fork.Process(target=run) for _ in range(2)]
    for p in processes: p.start()
    for p in processes: p.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    a, b = StoredScenes(alone), StoredScenes(both)
    assert all(np.array_equal(x, y) for i in range(4) for x, y in zip(a[i], b[i], strict=True))
    assert not list(both.folder.glob(".*")), "no half-written file is left"


def test_shares_do_not_depend_on_who_comes_first(encoder, tmp_path):
    "The second process looks when the first has finished, and still does all that is its own."
    s = store(encoder, tmp_path, 4, 1)
    for rank in (0, 1): s.fill(rank, 2, progress=False)
    assert s.missing() == []


def test_training_waits_for_the_share_of_another_process(encoder, tmp_path):
    folder, stage = tmp_path / "features", replace(STAGES["one"], cfg=TrainConfig(1, 2, precision="no"))
    other = threading.Thread(target=lambda: (time.sleep(1), store(encoder, folder, 2, 2).fill(0, 2, progress=False)))
    other.start()
    how = dict(scenes=2, densities=("sparse",), features=folder, rank=1, world=2)
    train_vlm(tmp_path / "run", encoder, VLMConfig(**SMALL), dict(one=stage), **how)
    other.join()
    assert len(read_log(tmp_path / "run" / "one" / "log.jsonl")) == 1


def test_a_trial_run_does_not_spoil_the_features_of_a_real_one(encoder, tmp_path):
    "`--quick` keeps a few scenes in small files; the full run that comes after must not take those for its own."
    store(encoder, tmp_path, 2, 2).fill(progress=False)
    real = StoredScenes(store(encoder, tmp_path, 4, 4).fill(progress=False))
    assert len(real) == 4 and real[3][0].shape == (576, 24)


# --- selections -----------------------------------------------------------------------------------------------------

def picture(b=3, grid=(4, 4), d=16):
    return Features(torch.randn(b, grid[0] * grid[1], d, generator=torch.Generator().manual_seed(2)), grid, None)


@pytest.mark.parametrize("change, says", [
    (dict(lengths=torch.tensor([16, 16, 15])), "add up to 47, but there are 48"),
    (dict(lengths=torch.tensor([16, 33, -1])), "add up to"),
    (dict(tokens=torch.zeros(3, 16, 16)), "packed"),
    (dict(pos=torch.zeros(47, 2)), r"pos is \(47, 2\)"),
    (dict(size=torch.ones(48, 1)), "size is"),
    (dict(grid=(4, 3)), "cells 0 to 11"),
    (dict(index=torch.arange(16).flip(0).repeat(3)), "rise within each image"),
])
def test_selections_say_what_is_wrong(change, says):
    with pytest.raises(ValueError, match=says): replace(keep_all(picture()), **change)


@pytest.mark.parametrize("index, says", [
    ([[0], [1]], "2 images, but there are 3"), ([[0], [16], [1]], "0 to 16"), ([[0], [-1], [1]], "-1"),
    ([[0], [3, 3], [1]], "no cell twice")])
def test_keep_says_what_is_wrong(index, says):
    with pytest.raises(ValueError, match=says): keep(picture(), index)


KINDS = {"qformer": dict(num_queries=3, embed_dim=8, depth=2, num_heads=2, grid=(4, 4)), "mlp": dict(hidden=8, skip=True),
         "resampler": dict(num_queries=3, embed_dim=8, depth=2, num_heads=2, grid=(4, 4)), "linear": {}, "pixel-shuffle": {},
         "c-abstractor": dict(num_tokens=4, depth=1), "d-abstractor": dict(num_tokens=4, depth=1, num_heads=2),
         "window-concat": dict(window=(2, 2), stride=(1, 1))}
ASKED = ["is there a cat?", "a cat?", "no?"]


def tiny(kind="mlp", **changes):
    torch.manual_seed(0)
    model = VLM(VLMConfig.tiny(connector=kind, settings=KINDS[kind], **changes)).eval()
    with torch.no_grad(): model.decoder.embed.weight.normal_(std=.3)
    return model


def states(model, s, lines):
    "States `(b, t, d)` of the same packed questions behind each picture."
    o = pack(lines)
    tokens, segments, places = (torch.tensor(o[k]).expand(len(s.lengths), -1) for k in ("tokens", "segments", "places"))
    with torch.no_grad(): return model(s, tokens, segments, places)


@pytest.mark.parametrize("how", [dict(), dict(visual_ids="running", prefix="causal")], ids=["shared", "running"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_alone_for_any_patches(kind, how):
    "Three pictures with 1, 16 and 6 patches, three questions each: the same as one picture and one question at a time."
    assert set(KINDS) == set(CONNECTORS)
    from arr_course.vqa import EOS, Line
    model, f, kept = tiny(kind, **how), picture(), [[9], list(range(16)), [14, 1, 2, 7, 5, 11]]
    lines = [Line(model.vocab.encode(q), [model.vocab.index["yes"], EOS]) for q in ASKED]
    packed, ends = states(model, keep(f, kept), lines), np.cumsum([len(o.prompt) + len(o.answer) - 1 for o in lines])
    for b in range(3):
        one = keep(Features(f.patches[b:b + 1], f.grid, None), [kept[b]])
        for line, end, n in zip(lines, ends, np.diff(ends, prepend=0), strict=True):
            torch.testing.assert_close(packed[b, end - n:end], states(model, one, [line])[0], atol=2e-5, rtol=1e-4)
    said = answer(model, keep(f, kept), ASKED * 3, rows=[b for b in range(3) for _ in ASKED], max_new=5)
    for b in range(3):
        one = keep(Features(f.patches[b:b + 1], f.grid, None), [kept[b]])
        assert said[3 * b:3 * b + 3] == [answer(model, one, [q], max_new=5)[0] for q in ASKED]


def test_the_patches_decide_not_their_order_or_what_was_left_out():
    model, f, g = tiny(), picture(1), torch.Generator().manual_seed(3)
    whole = keep_all(f)
    assert torch.equal(model.visual(keep(f, [torch.randperm(16, generator=g)])).embeddings, model.visual(whole).embeddings)
    for k in (1, 5, 12, 16):
        some = torch.randperm(16, generator=g)[:k].sort().values[None]
        changed = f.patches.masked_fill(~torch.zeros(16, dtype=torch.bool).index_fill(0, some[0], True)[None, :, None], 9.)
        a, b = keep(f, some), keep(Features(changed, f.grid, None), some)
        assert torch.equal(a.tokens, select_rows(f.patches, some, f.grid).tokens)
        assert torch.equal(model.visual(a).embeddings, model.visual(b).embeddings), "what was not kept is not looked at"
        torch.testing.assert_close(model.visual(a).embeddings, model.visual(whole).embeddings[:, some[0]])


# --- cards and files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_vlm_comes_back_from_its_file(kind, folder, tmp_path, monkeypatch):
    "In half precision, with lists that were tuples, and with the same answers."
    settings = KINDS[kind] | (dict(grid=(24, 24)) if "grid" in KINDS[kind] else {})
    torch.manual_seed(0)
    model = VLM(VLMConfig(**SMALL | dict(connector=kind, settings=settings))).eval()
    save_card("v", model, PRE, tmp_path, torch.float16, **FACTS)
    monkeypatch.setenv("ARR_WEIGHTS", os.pathsep.join(map(str, (tmp_path, folder))))
    a, want = load_vlm("arr/v", device="cpu"), ve.as_shipped(model)
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in a.model.cfg.settings.items()}
    assert found == settings and a.model.vocab == model.vocab
    assert all(torch.equal(v, want.state_dict()[k]) and v.dtype == torch.float32 for k, v in a.model.state_dict().items())
    f = Features(torch.randn(1, 576, 24), (24, 24), None)
    assert answer(a.model, keep_all(f), ["Is there a cat?"]) == answer(want, keep_all(f), ["Is there a cat?"])
    assert not any(p.requires_grad for p in a.model.parameters()) and a.encoder.name == "arr/tiny-eyes"
    assert [(o.kind, o.available) for o in zoo.list_models(online=False) if o.name == "arr/v"] == [("vlm", True)]


def test_the_wrong_loader_names_the_right_one(shipped):
    with pytest.raises(TypeError, match="arr_course.vlm.load_vlm"): load("arr/tiny-vlm")
    with pytest.raises(TypeError, match="arr_course.zoo.load"): load_vlm("arr/tiny-eyes")
    with pytest.raises(ModelNotFound, match=r"no model of this name[\s\S]*load_vlm\('arr/tiny-vlm'\)"): load_vlm("arr/nothing")


def test_damaged_vlms_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ARR_WEIGHTS", os.pathsep.join(map(str, (tmp_path, folder))))
    weights, card = copied(folder, tmp_path)
    data = bytearray(weights.read_bytes()); data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(WeightsError, match="tiny-vlm.safetensors: sha256 expected"): load_vlm("arr/tiny-vlm")
    weights, card = copied(folder, tmp_path); cut(weights)
    with pytest.raises(WeightsError, match="sha256"): load_vlm("arr/tiny-vlm")
    weights, card = copied(folder, tmp_path)
    whole = json.loads(card.read_text(encoding="utf-8"))
    for change in (dict(new_switch=True), dict(decoder=whole["config"]["decoder"] | dict(depth=2)), dict(in_dim=23)):
        card.write_text(json.dumps(whole | dict(config=whole["config"] | change)), encoding="utf-8")
        with pytest.raises(WeightsError, match="do not fit this version"): load_vlm("arr/tiny-vlm")
    card.write_text(json.dumps(whole | dict(evaluation=dict(fingerprint="0123456789abcdef"))), encoding="utf-8")
    with pytest.raises(WeightsError, match="features of another"): load_vlm("arr/tiny-vlm")


def test_weights_that_are_missing_are_called_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ARR_WEIGHTS", os.pathsep.join(map(str, (tmp_path, folder))))
    copied(folder, tmp_path)[0].unlink()
    with pytest.raises(ModelNotFound, match="weights are missing"): load_vlm("arr/tiny-vlm")


def test_unknown_words_are_named(shipped):
    m = load_vlm("arr/tiny-vlm", device="cpu").model
    with pytest.raises(ValueError, match="the vocabulary has no 'zeppelin'"): answer(m, None, ["Is there a zeppelin?"])
    with pytest.raises(ValueError, match="give each question its picture"): answer(m, None, ["Is there a cat?"], rows=[0, 1])


# --- the exam -------------------------------------------------------------------------------------------------------

def with_items(f, items): return replace(keep_all(f), stats=dict(items=items))


def sits(monkeypatch, encoder, reply, n=36, **kwargs):
    "The figures of someone who answers `reply(question, scene)`, scene `None` where there is no picture; and who was asked what."
    log = []
    def answers(model, seen, prompts, rows, **decoding):
        items = log[-1] if seen is None else seen
        by_prompt = {tuple(model.vocab.encode(o.question.text)): o.question for o in items}
        out = [reply(by_prompt[tuple(p)], None if seen is None else items[r].scene) for p, r in zip(prompts, rows, strict=True)]
        return [model.vocab.encode(o) for o in out]
    def look(model, s, b=1):
        if s is not None: log.append(s.stats["items"])
        return None if s is None else s.stats["items"]
    monkeypatch.setattr(ve, "read_picture", look)
    monkeypatch.setattr(ve, "answer_ids", answers)
    a = Assistant("arr/told", VLM(VLMConfig(**SMALL)), encoder)
    return ve.examine(a, "sparse", n, 1, reduce=with_items, reader=False, precision="fp32", **kwargs)["metrics"]


def told(q, scene): return (truth(scene, q.type, q.args) if scene else None) or "no"


def test_an_oracle_is_always_right(monkeypatch, encoder):
    m = sits(monkeypatch, encoder, told, 36)
    for k in ("accuracy", "pairs", *(f"accuracy/{t}" for t in ve.TYPES)):
        assert m[k]["value"] == m[k]["low"] == m[k]["high"] == 1, k
    assert m["shuffled_image"]["value"] < .6 and m["over_shuffled_image"]["low"] > .2 and m["over_no_image"]["low"] > .5
    assert m["accuracy"]["n"] == m["pairs"]["n"] == 18 and m["accuracy/count"]["n"] == 2


def test_an_exam_decodes_as_it_is_told(monkeypatch, encoder):
    "Width and `once` reach every answer of the model, with its picture and without."
    told, real = [], ve.answer_ids
    monkeypatch.setattr(ve, "answer_ids", lambda *args, **how: (told.append(how), real(*args, **how))[1])
    a = Assistant("arr/told", VLM(VLMConfig(**SMALL)), encoder)
    out = ve.examine(a, "sparse", 4, 1, reader=False, precision="fp32", width=2, once=True)
    assert told == [dict(width=2, once=True)] * 2 and (out["width"], out["once"]) == (2, True)


@pytest.mark.parametrize("n", [36, 38, 56])
def test_whoever_does_not_look_never_gets_both(monkeypatch, encoder, n):
    "The answers of a pair differ: what is constant, and what follows from the question alone, has no pair."
    m = sits(monkeypatch, encoder, lambda q, scene: prior_of_types().answer(q), n)
    assert m["pairs"]["value"] == 0 and 0 < m["accuracy"]["value"] <= .5
    assert all(m[k] == m["accuracy"] for k in ("question_only", "no_image", "shuffled_image"))
    m = sits(monkeypatch, encoder, lambda q, scene: "yes", n)
    assert m["pairs"]["value"] == 0 and m["accuracy"]["value"] == pytest.approx(1 / 6, abs=.03), "half of three types"


@pytest.mark.parametrize("n", [4, 36, 38, 56])
def test_the_other_picture_is_of_another_pair(monkeypatch, encoder, n):
    "The control with a shuffled image shows neither the picture itself nor the other one of its pair."
    batches, seen, real = [], [], ve.sit
    monkeypatch.setattr(ve, "sit", lambda a, f, items, *more, **how: (batches.append(items), real(a, f, items, *more, **how))[1])
    sits(monkeypatch, encoder, lambda q, scene: (seen.append(scene), "no")[1], n)
    for items in batches:
        k = len(items)
        shown, other, none, seen = seen[:k], seen[k:2 * k], seen[2 * k:3 * k], seen[3 * k:]
        assert shown == [o.scene for o in items] and none == [None] * k
        assert all(a.seed != b.seed for a, b in zip(other, shown, strict=True)), "the same scene, or one that was made from it"


def test_figures_equal_brute_force(monkeypatch, encoder):
    "Of someone who is right three times in four: means and intervals over pairs, drawn here one after another."
    def lucky(q, scene): return told(q, scene) if crc32(repr((q.text, scene)).encode()) % 4 else "sign"
    said = {}
    real = ve.grade
    monkeypatch.setattr(ve, "grade", lambda items, s: (said.update(items=items, **s), real(items, s))[1])
    m, items = sits(monkeypatch, encoder, lucky, 72), said.pop("items")
    assert set(said) == {"model", "shuffled_image", "no_image", "question_only"}
    assert [i.answer for i in items] == [truth(i.scene, i.question.type, i.question.args) for i in items]
    assert items == list(ve.Exam("sparse", 72, 1).items())
    right = {k: np.array([a == i.answer for a, i in zip(v, items, strict=True)], float).reshape(-1, 2) for k, v in said.items()}
    r, types = right["model"], np.array([i.question.type for i in items[::2]])
    want = {"accuracy" if k == "model" else k: v.mean(1) for k, v in right.items()}
    want |= {f"over_{k}": (r - v).mean(1) for k, v in right.items() if k != "model"}
    want |= {f"accuracy/{t}": r[types == t].mean(1) for t in ve.TYPES} | {"pairs": r.min(1)}
    want |= {f"question_only/{t}": right["question_only"][types == t].mean(1) for t in ve.TYPES}
    assert set(m) == set(want) and .3 < m["accuracy"]["value"] < .95
    for k, rows in want.items():
        rng = np.random.default_rng(9)
        boot = [rows[rng.integers(len(rows), size=len(rows))].mean() for _ in range(2000)]
        assert m[k]["value"] == pytest.approx(rows.mean(), abs=1e-4) and m[k]["n"] == len(rows), k
        assert [m[k]["low"], m[k]["high"]] == pytest.approx(list(np.quantile(boot, [.025, .975])), abs=.51 / len(rows) + .02), k


@pytest.fixture(scope="module")
def exam(folder):
    "What `examine` says of the tiny VLM; and the items and answers."
    said, real = [], ve.grade
    with pytest.MonkeyPatch.context() as m:
        m.setenv("ARR_WEIGHTS", str(folder))
        m.setattr(ve, "grade", lambda *o: (said.extend(o), real(*o))[1])
        return ve.examine("arr/tiny-vlm", "sparse", 36, 5, precision="fp32"), *said


def test_the_exam_equals_one_question_at_a_time(shipped, exam):
    a, (x, items, s) = load_vlm("arr/tiny-vlm", device="cpu"), exam
    of_seed = lambda seed: list(ve.Exam("sparse", 36, seed).items())
    assert items == of_seed(5) != of_seed(6) and x["fingerprint"] == a.encoder.fingerprint and x["metrics"] == ve.grade(items, s)
    assert set(s) == {"model", "shuffled_image", "no_image", "question_only", "reader"} and len(set(s["model"])) > 5
    for i in range(0, 36, 5):
        assert a.ask(render(items[i].scene), items[i].question.text) == [s["model"][i]]
        assert answer(a.model, None, [items[i].question.text]) == [s["no_image"][i]]
    one = lambda i, text: answer(a.model, a.see(render(items[i].scene)), [text])[0]
    assert [one((i + 18) % 36, items[i].question.text) for i in (0, 20)] == [s["shuffled_image"][i] for i in (0, 20)]
    for k in ("no_image", "question_only"): assert s[k][::2] == s[k][1::2], "without the picture, a pair gets one answer"


@pytest.mark.parametrize("n", [4, 20])
def test_a_short_exam_has_figures_too(monkeypatch, encoder, n):
    "As few questions as `Exam` allows: some types have a single pair, or none."
    assert sits(monkeypatch, encoder, told, n)["accuracy"]["value"] == 1.


@pytest.mark.parametrize("how, says", [
    (dict(n=37), "even number"), (dict(n=2), "at least"), (dict(density="crop"), "neither dense nor sparse"),
    (dict(seed=-1), "0 or more"), (dict(precision="fp8"), "not one of auto")])
def test_exams_say_what_is_wrong(shipped, how, says):
    with pytest.raises(ValueError, match=says): ve.examine("arr/tiny-vlm", **how)


def test_the_prior_sees_no_picture():
    "It is made from training scenes alone, and what it says follows from the type of the question."
    p, items = prior_of_types(), list(ve.Exam("dense", 180, 3).items())
    said = p.answer([o.question for o in items])
    assert all(a == p.best[o.question.type] for a, o in zip(said, items, strict=True)) and set(p.best) == set(ve.TYPES)
    right = np.array([a == o.answer for a, o in zip(said, items, strict=True)]).reshape(-1, 2)
    assert not right.all(1).any() and .1 < right.mean() < .35


# --- lessons --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def batch(encoder, tmp_path_factory):
    stored = StoredScenes(store(encoder, tmp_path_factory.mktemp("features")).fill(progress=False))
    return collate_lessons([Lessons([stored], world_vocabulary())[i] for i in range(3)])


def test_grounding_teaches_attention_and_nothing_behind_it(batch):
    torch.manual_seed(0)
    model = VLM(VLMConfig(**SMALL | dict(decoder=SMALL["decoder"] | dict(depth=4))))
    stage, index = Stage(TrainConfig(1), low=300, high=301, ground=1.), draw_subset(torch.rand(3, 576), 300)
    parts = [batch[k] for k in ("tokens", "segments", "places")]
    def ground():
        weights = {b: [] for b in BLOCKS.values()}
        model(select_rows(batch["features"].float(), index, (24, 24)), *parts, weights)
        return grounding_loss(looks(weights, batch, index))
    loss, found = ground(); loss.backward()
    grads = {n: 0. if p.grad is None else p.grad.abs().max().item() for n, p in model.named_parameters()}
    assert set(found) == {"found_word", "found_pointer", "found_mark"} and all(0 < v < 1 for v in found.values())
    for b in (0, 1, 2): assert grads[f"decoder.blocks.{b}.attn.q.weight"] > 0 and grads[f"decoder.blocks.{b}.attn.k.weight"] > 0
    assert grads["connector.fc2.weight"] > 0 and grads["places.rows"] > 0
    assert all(v == 0 for n, v in grads.items() if n.startswith("decoder.blocks.3.") or n == "decoder.blocks.2.mlp.down.weight")
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(8): opt.zero_grad(); step, _ = ground(); step.backward(); opt.step()
    after = ground()[1]
    assert all(after[k] > found[k] for k in found), "it looks where it was told to"
    whole, figures = lesson_loss(model, batch, stage, lambda x: torch.rand(x.shape[:2]), (24, 24))
    plain, alone = lesson_loss(model, batch, replace(stage, ground=0.), lambda x: torch.rand(x.shape[:2]), (24, 24))
    assert set(figures) - set(alone) == set(found) and whole > figures["answer"] and plain == alone["answer"]


def test_attention_masses_equal_brute_force(batch):
    "Each evidence row looked up by hand: the word, the question mark, and what is left of the things among the kept patches."
    torch.manual_seed(0)
    index = draw_subset(torch.rand(3, 576), 100)
    t = batch["tokens"].shape[1]
    w = {b: [torch.rand(3, 2, 101 + t, 101 + t)] for b in BLOCKS.values()}
    found, want = looks(w, batch, index), {k: [] for k in BLOCKS}
    rows, own = batch["rows"].tolist(), batch["segments"]
    for i, (b, token, kind) in enumerate(rows):
        kept = [1 + j for j, p in enumerate(index[b].tolist()) if batch["evidence"][i, p]]
        same = [101 + u for c, u, word in rows if c == b and word == 0 and own[b, u] == own[b, token]]
        mass = lambda name, at, b=b, token=token: sum(w[BLOCKS[name]][0][b, :, 101 + token, a].mean().item() for a in at)
        if kept: want["mark" if kind else "word"].append(mass("mark" if kind else "word", kept))
        if kind and same: want["pointer"].append(mass("pointer", sorted(set(same))))
    assert all(len(v) > 5 for v in want.values())
    for k, v in found.items(): assert v.tolist() == pytest.approx(want[k], rel=1e-4), k


def test_lessons_ask_what_is_true(encoder, tmp_path):
    "The packed labels are the exact answers, and evidence lies where the thing is."
    from arr_course.questions import SceneIndex, ask, evidence_mask
    from arr_course.world import paint_ids, patch_masks, sample_scene
    v, n = world_vocabulary(), 0
    for seed in range(40):
        scene = sample_scene(seed, "dense")
        ix, masks = SceneIndex(scene), patch_masks(paint_ids(scene), len(scene.things))
        for q in ask(scene, seed):
            line = question_line(ix, q, masks, v)
            assert v.decode(line.prompt) == q.text.lower() and v.decode(line.answer) == q.answer == truth(scene, q.type, q.args)
            for place, kind, patches in line.evidence:
                assert place == len(line.prompt) - 1 if kind else place < len(line.prompt) - 1
                if kind: assert (patches == evidence_mask(scene, q)).all(); n += 1
    assert n > 200


def test_budgets_are_spread_evenly_on_a_logarithmic_scale():
    torch.manual_seed(0)
    k = np.array([draw_budget(16, 400, 576, .25) for _ in range(8000)])
    some = k[k < 576]
    assert (k == 576).mean() == pytest.approx(.25, abs=.02) and some.min() >= 16 and some.max() <= 400
    for a, b in ((16, 32), (32, 64), (64, 128), (128, 256)):                                  # every doubling is as frequent
        assert ((some >= a) & (some < b)).mean() == pytest.approx(np.log(2) / np.log(25), abs=.02)
    assert all(draw_budget(16, 400, 100, 0.) <= 100 for _ in range(200))
    scores = torch.rand(4, 576)
    best = scores.topk(50, 1).indices.sort(1).values
    drawn = [draw_subset(scores, 50, random=.25, noise=0.) for _ in range(800)]
    assert np.mean([bool((d == best).all()) for d in drawn]) == pytest.approx(.75, abs=.05)
    assert all((d.diff(dim=1) > 0).all() for d in drawn), "sorted, none twice"
    seen = torch.cat([d[0] for d in drawn if not (d == best).all()]).bincount(minlength=576)
    assert (seen > 0).all(), "random subsets reach every patch"


def test_an_answer_without_a_word_twice():
    "Of models that know nothing, many repeat themselves; none does where it may not, with one draft or several."
    from arr_course.vqa import EOS
    torch.manual_seed(0)
    model, repeats = VLM(VLMConfig(**SMALL)).eval(), lambda out: sum(len(set(w)) < len(w) for w in out)
    s = keep_all(Features(torch.randn(8, 576, 24), (24, 24), None))
    ids = [model.vocab.encode("Is there a cat?")] * 8
    said = lambda **how: answer_ids(model, read_picture(model, s), ids, list(range(8)), max_new=6, **how).tolist()
    words = lambda **how: [[w for w in o if w != EOS] for o in said(**how)]
    assert repeats(words()) > 0 and repeats(words(once=True)) == repeats(words(width=3, once=True)) == 0
    assert [w[0] for w in words(once=True)] == [w[0] for w in words()], "the first word of one draft is the likeliest, as before"


# --- training -------------------------------------------------------------------------------------------------------

HOW = dict(steps=2, batch_size=2, lr=1e-3, log_every=1, precision="no")
STAGES = {"one": Stage(TrainConfig(**HOW, save_every=1), low=40, high=80),
          "two": Stage(TrainConfig(**HOW, save_every=1, ema=.5), low=16, high=400, full=.25, random=.25)}
HARDER = STAGES | {"two": PracticeStage(TrainConfig(**HOW, save_every=1, ema=.5), low=16, high=400, hide=1.)}


class Stop(Exception):
    "Someone pulled the plug."


PLUGS = [(after, STAGES, run_stage) for after in (1, 2, 3)] + [(3, HARDER, run_practice)]


@pytest.mark.parametrize("after, stages, how", PLUGS)
def test_stopped_and_continued_equals_uninterrupted(encoder, tmp_path, monkeypatch, after, stages, how):
    "Stopped within the first stage, between the two, within the second: the same weights and the same log, to the bit."
    few = dict(seed=3, scenes=4, densities=("sparse",), features=tmp_path / "features")
    go = lambda out: train_vlm(out, encoder, VLMConfig(**SMALL), stages, **few, run=how)
    whole, steps, real = go(tmp_path / "whole"), [], Learner.one_step
    def pulled(self, batches):
        if len(steps) == after: raise Stop
        steps.append(1); real(self, batches)
    monkeypatch.setattr(Learner, "one_step", pulled)
    with pytest.raises(Stop): go(tmp_path / "stopped")
    monkeypatch.setattr(Learner, "one_step", real)
    again = go(tmp_path / "stopped")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    for name in STAGES:
        logs = [read_log(tmp_path / o / name / "log.jsonl") for o in ("whole", "stopped")]
        rows = [[{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in log] for log in logs]
        assert rows[0] == rows[1] and len(rows[0]) == 2 and {"answer", "right", "found_word"} <= set(rows[0][0])
    last = load_file(newest(tmp_path / "whole" / "two") / "ema.safetensors")
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in last.items()), "the average is what is returned"


def test_stages_train_what_they_say(encoder, tmp_path):
    s = StoredScenes(store(encoder, tmp_path).fill(progress=False))
    for what, moves in (("connector", ("connector.", "balance.", "places.")), ("decoder", ("decoder.",))):
        torch.manual_seed(0)
        model = VLM(VLMConfig(**SMALL))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        tuning.run_stage(model, replace(STAGES["one"], train=what), [s], lambda x: torch.rand(x.shape[:2]))
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert moved and all(k.startswith(moves) for k in moved), what


# --- the command ----------------------------------------------------------------------------------------------------

def run(*args, **env): return CliRunner(env=env).invoke(app, [*map(str, args)])


def test_evaluate_gives_the_same_figures_again(shipped, exam, tmp_path):
    "From Python, and from the command, which shows a table and writes them. (`--json -`: see the quick run.)"
    args = ["evaluate", "arr/tiny-vlm", "--density", "sparse", "--n", 36, "--seed", 5, "--precision", "fp32"]
    r = run(*args, "--json", tmp_path / "r.json")
    assert r.exit_code == 0 and "over_question_only" in r.stdout and "95 % interval" in r.stdout, r.output
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    for k in ("metrics", "model", "encoder", "fingerprint", "n", "seed", "split", "precision"): assert found[k] == exam[0][k], k


@pytest.mark.parametrize("args, says", [
    (["--parts", "knn"], "has no parts"), (["--n", "37"], "even number"), (["--density", "crop"], "neither dense nor sparse"),
    (["--precision", "fp8"], "fp8")])
def test_mistakes_get_one_line(folder, args, says):
    r = run("evaluate", "arr/tiny-vlm", *args, ARR_WEIGHTS=str(folder))
    assert r.exit_code == 2 and says in r.stderr and isinstance(r.exception, SystemExit)


def test_damaged_weights_get_one_line(folder, tmp_path):
    cut(copied(folder, tmp_path)[0])
    r = run("evaluate", "arr/tiny-vlm", ARR_WEIGHTS=os.pathsep.join(map(str, (tmp_path, folder))))
    assert r.exit_code == 2 and "sha256" in r.stderr and isinstance(r.exception, SystemExit), repr(r.exception)


def test_damaged_features_get_one_line(quick_run, tmp_path):
    out, env, _ = quick_run
    features = tmp_path / "features"
    shutil.copytree(out / "cache" / "features", features)
    cut(next(features.glob("*sparse*")) / "00000.npy")
    r = run("train", "vlm-mlp", "--quick", "--out", tmp_path / "run", **env | dict(ARR_CACHE=str(tmp_path)))
    assert r.exit_code == 2 and "00000.npy is damaged: delete 00000.json" in r.stderr, repr(r.exception)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    "`train vlm-mlp --quick`, with an encoder of one block in the place of `arr/filip-ti`: the real one takes a minute."
    out = tmp_path_factory.mktemp("quick")
    save_card("filip-ti", eyes(192, 192), PRE, out / "weights", **FACTS)
    env = dict(ARR_WEIGHTS=os.pathsep.join(map(str, (out / "run", out / "weights"))), ARR_CACHE=str(out / "cache"))
    return out, env, run("train", "vlm-mlp", "--quick", "--out", out / "run", **env)


def test_train_writes_a_card_and_evaluate_repeats_it(quick_run):
    out, env, r = quick_run
    assert r.exit_code == 0, (r.output, r.exception)
    card = json.loads((out / "run" / "vlm-mlp.json").read_text(encoding="utf-8"))
    steps = 2 * len(tuning.STAGES)
    assert (card["architecture"], card["dtype"], card["steps"], card["name"]) == ("VLM", "float16", steps, "arr/vlm-mlp")
    assert card["sha256"] == sha256(out / "run" / "vlm-mlp.safetensors")
    assert card["command"] == "arr-course train vlm-mlp --out runs/vlm-mlp --seed 0 --quick"
    assert {d.name for d in (out / "run").iterdir() if d.is_dir()} == set(tuning.STAGES)
    assert len(list((out / "cache" / "features").iterdir())) == 2
    command = card["evaluation"]["commands"]["sparse"].split()
    assert command[:3] == ["arr-course", "evaluate", "arr/vlm-mlp"]
    again = run(*command[1:], **env)
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["fingerprint"] == card["evaluation"]["fingerprint"]
    for k, m in found["metrics"].items(): assert m == pytest.approx(card["metrics"][f"sparse/{k}"], abs=2e-3), k


def test_the_longer_recipe_is_trained_by_the_same_command(quick_run, tmp_path):
    r = run("train", "vlm-mlp-practice", "--quick", "--seed", 1, "--out", tmp_path, **quick_run[1])
    assert r.exit_code == 0, (r.output, r.exception)
    card = json.loads((tmp_path / "vlm-mlp-practice-s1.json").read_text(encoding="utf-8"))
    assert (card["steps"], card["name"]) == (2 * len(RECIPE), "arr/vlm-mlp-practice-s1")
    logs = {k: read_log(tmp_path / k / "log.jsonl")[-1] for k in RECIPE}
    assert ["says_one" in o for o in logs.values()] == [False, True, True]
    assert [isinstance(s, PracticeStage) for s in RECIPE.values()] == [False, True, True]


def test_query_vlms_begin_with_the_mlps_decoder(quick_run, monkeypatch):
    out, env, _ = quick_run
    monkeypatch.setenv("ARR_WEIGHTS", env["ARR_WEIGHTS"])
    decoder = load_vlm("arr/vlm-mlp", device="cpu").model.decoder.state_dict()
    how = ve.recipe_of("vlm-qformer-32")[0]
    model = how["begin"](VLM(ve.vlm_config("vlm-qformer-32")), zoo.load("arr/filip-ti", device="cpu"))
    assert how["stages"] is tuning.QUERIES and all(torch.equal(v, decoder[k]) for k, v in model.decoder.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", tuning.SHIPPED)
def test_every_recipe_can_be_built(name):
    "And fits into the package: at most 12 MB in half precision."
    model = VLM(ve.vlm_config(name))
    assert 2 * sum(p.numel() for p in model.parameters()) < 12e6
    s = keep(Features(torch.randn(2, 576, 192), (24, 24), None), [[5, 500], range(576)])
    assert model.visual(s).embeddings.shape[::2] == (2, 256)


def test_a_wrong_number_of_questions_is_said_before_training(quick_run, tmp_path, monkeypatch):
    monkeypatch.setenv("ARR_WEIGHTS", quick_run[1]["ARR_WEIGHTS"])
    monkeypatch.setattr(ve, "train_vlm", lambda *a, **k: pytest.fail("it trains"))
    with pytest.raises(ValueError, match="even number"): ve.train_shipped("vlm-mlp", tmp_path, n=37)


@pytest.mark.parametrize("path", [p for p in zoo.shipped_files() if p.stem.startswith("vlm-")], ids=lambda p: p.stem)
def test_shipped_vlms_are_what_their_cards_say(path):
    "The card is of these weights and of the shipped encoder, and the model needs the picture."
    card = zoo.read_card(path.stem)
    a, about = load_vlm(card["name"], device="cpu"), card["evaluation"]
    assert path.stat().st_size <= 12e6 and about["fingerprint"] == a.encoder.fingerprint and about["split"] == "test"
    assert a.model.vocab == world_vocabulary() and card["parameters"] == sum(p.numel() for p in a.model.parameters())
    for d in ("dense", "sparse"):
        found = {k.partition("/")[2]: m for k, m in card["metrics"].items() if k.startswith(f"{d}/")}
        for k in ("no_image", "shuffled_image", "question_only"):
            assert found[f"over_{k}"]["low"] > .2 and found[k]["value"] <= .5, k
        assert found["pairs"]["low"] > .3
    items = list(ve.Exam("sparse", 18, 11).items())
    said = ve.sit(a, a.encoder.encode([render(o.scene) for o in items]), items, controls=False)["model"]
    assert sum(said == o.answer for said, o in zip(said, items, strict=True)) > 9, "whoever does not look has at most 9 of 18"


def test_a_start_that_does_not_fit_is_refused(encoder):
    "Words that would be cut, places without channels, attention that is taught in a block that is not there."
    joint = encoder.model.cfg.joint_dim
    vlm = lambda d: VLM(VLMConfig(**{**SMALL, "decoder": dict(SMALL["decoder"], embed_dim=d)}))
    none = dict(rows=torch.zeros(0, 3).long(), segments=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="narrower than the encoder's joint space"): tuning.start_words(vlm(joint - 4), encoder)
    with pytest.raises(ValueError, match="and 0 are left"): tuning.start_places(vlm(joint), 0)
    with pytest.raises(ValueError, match="this decoder has fewer"): looks({0: [1], 1: [1], 2: []}, none, torch.zeros(1, 4).long())
    with pytest.raises(ValueError, match="give each question its picture"): answer(vlm(joint), None, ["a cat?"], rows=[])
    with pytest.raises(ValueError, match="no recipe 'vlm-x'"): ve.vlm_config("vlm-x")
    with pytest.raises(ValueError, match="cannot be split over 8 heads"): CONNECTORS["d-abstractor"](100, 256)


@pytest.mark.parametrize("script, says", [
    (["connectors/run.py", "--only", "mlp, magic"], "no 'magic': choose from"),
    (["frozen_or_trainable/shapes.py", "--only", "magic"], "no run 'magic': choose from"),
    (["remedies/once.py", "--n", "36", "arr/vlm-mlp"], "name another with --out")])
def test_labs_refuse_before_they_work(script, says):
    labs = Path(__file__).resolve().parent.parent / "labs"
    r = subprocess.run([sys.executable, labs / script[0], *script[1:]], capture_output=True, text=True, timeout=200)
    assert r.returncode == 2 and says in r.stderr and "Traceback" not in r.stderr
