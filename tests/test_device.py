"""What runs on a GPU is what runs on the CPU: features, choices, answers, training.

Where there is no GPU, one is pretended (`pretend.py`), which finds tensors that are on the wrong device."""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("emoji"), pytest.importorskip("resvg_py"), pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pretend  # noqa: E402

from arr_course.arr import arr_1, arr_2  # noqa: E402
from arr_course.connectors import keep  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.packed import never_wait, on_device, packed_prefix, parity, read_packed  # noqa: E402
from arr_course.papers import Paper, methods_of, read_part  # noqa: E402
from arr_course.peers import PEERS, Threshold, calibrated  # noqa: E402
from arr_course.practice import RECIPE, run_practice  # noqa: E402
from arr_course.questions import TEXTS  # noqa: E402
from arr_course.reducers import REDUCERS  # noqa: E402
from arr_course.relevance import Context, Query  # noqa: E402
from arr_course.tuning import start  # noqa: E402
from arr_course.vit import Features  # noqa: E402
from arr_course.vlm import VLM, answer_ids, load_vlm, read_picture  # noqa: E402
from arr_course.vqa import FeatureStore, Objectness, StoredScenes  # noqa: E402
from arr_course.vqa_evaluate import Exam, examine, vlm_config  # noqa: E402
from arr_course.world import render, sample_scene  # noqa: E402
from arr_course.zoo import load  # noqa: E402

SELECTORS = REDUCERS | PEERS | {r.name: r for r in (arr_1(), arr_2())}


@pytest.fixture(params=["cuda", pretend.NAME])
def where(request):
    if request.param == "cuda":
        if not torch.cuda.is_available(): pytest.skip("torch sees no GPU here")
        yield torch.device("cuda")
        return
    if why := pretend.setup(): pytest.skip(why)
    with pretend.pretended() as device: yield device


@pytest.fixture
def trains(where, monkeypatch):
    "Learners train there; Accelerate finds a real GPU by itself."
    if where.type == "cuda": return
    monkeypatch.setattr("arr_course.learner.device", lambda: where)
    monkeypatch.setattr("accelerate.Accelerator.device", property(lambda self: where))


def there(x, d):
    "The same tensors, in the same dataclasses, on another device."
    if torch.is_tensor(x): return x.to(d)
    if isinstance(x, Features | Context | Query): return replace(x, **{k: there(v, d) for k, v in vars(x).items()})
    return x


@pytest.fixture(scope="module")
def context():
    "Four pictures of 12 x 12 patches, with all that a selector may look at."
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g)
    unit = lambda *s: torch.nn.functional.normalize(draw(*s), dim=-1)
    f = Features(draw(4, 144, 32), (12, 12), saliency=draw(4, 144).softmax(1))
    words = ("cat",), ("dog",), ("cow",), ("owl",)
    q = Query(("how many cats?", "a dog?", "a cow?", "an owl?"), words, unit(4, 1, 8), torch.ones(4, 1, dtype=torch.bool))
    pixels = torch.rand(4, 3, 168, 168, generator=g)
    return Context(f, unit(4, 144, 8), q, draw(4, 2, 144, 16), draw(4, 2, 144, 16), pixels)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_keeps_the_same(name, context, where):
    select = SELECTORS[name]
    if isinstance(getattr(select, "budget", None), Threshold): select = calibrated(select, [context], (16, 24))
    a, b = select(context, 20), select(there(context, where), 20)
    assert b.tokens.device.type == b.index.device.type == where.type and b.lengths.device.type == "cpu"
    assert a.lengths.equal(b.lengths) and a.index.equal(b.index.cpu())
    for one, other in ((a.tokens, b.tokens), (a.pos, b.pos), (a.size, b.size)):
        torch.testing.assert_close(other.cpu(), one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_question_without_words_is_no_error_there(name, context, where):
    "Without words all patches may be worth the same, and rounding decides: only the number is fixed."
    c = there(context, where)
    c = replace(c, query=Query(("what?",) * 4, ((),) * 4, c.query.joint * 0, torch.zeros_like(c.query.mask)))
    select = SELECTORS[name]
    if isinstance(getattr(select, "budget", None), Threshold): select = calibrated(select, [there(context, where)], (16, 24))
    s = select(c, 20)
    assert len(s.lengths) == 4 and s.index.device.type == where.type and s.tokens.isfinite().all()
    if getattr(select, "budget", None) is None and getattr(select, "tau", None) is None: assert s.lengths.tolist() == [20] * 4


def test_arr_2_at_home_on_the_device_keeps_the_same_and_asks_for_nothing(context, where):
    k, c, home = torch.tensor([30, 7, 20, 12]), there(context, where), on_device(arr_2())
    kept = lambda: home.kept(c, home.gains(c, 30)[0], k)
    got = kept()                                                       # a compiler may wait, once
    assert got.index.cpu().equal(arr_2().kept(context, arr_2().gains(context, 30)[0], k).index)
    with never_wait(where): home.gains(c, 30)


@pytest.fixture(scope="module")
def pictures(): return [render(sample_scene(i, d, "val")) for i in range(2) for d in ("dense", "sparse")]


@pytest.mark.parametrize("name", ["arr/filip-ti", "arr/dino-ti"])
def test_an_encoder_sees_the_same(name, pictures, where):
    a, b = (load(name, device=d).encode(pictures, saliency=True) for d in ("cpu", where))
    for one, other in ((a.patches, b.patches), (a.saliency, b.saliency)): assert (other.cpu() - one).norm() < 1e-3 * one.norm()


QUESTIONS = ["how many cats are there?", "is there a dog?", TEXTS["describe"](), TEXTS["number"]()]


@pytest.mark.parametrize("way", ["padded", "loop", "best"])
def test_a_vlm_answers_the_same_padded_or_packed(way, pictures, where):
    here, there_ = (load_vlm("arr/vlm-mlp", device=d) for d in ("cpu", where))
    f, budgets = here.encoder.encode(pictures), (300, 64, 16, 120)
    index = [torch.randperm(576, generator=torch.Generator().manual_seed(i))[:k].sort().values for i, k in enumerate(budgets)]
    prompts, rows = [here.model.vocab.encode(q) for q in QUESTIONS], [0, 1, 2, 3]
    said = answer_ids(here.model, read_picture(here.model, keep(f, index)), prompts, rows)
    s = keep(there(f, where), [i.to(where) for i in index])
    read = dict(padded=read_picture, loop=partial(read_packed, path="loop"), best=read_packed)[way]
    assert answer_ids(there_.model, read(there_.model, s), prompts, rows).cpu().equal(said)
    with never_wait(where): packed_prefix(there_.model, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_packed_attention(where, dtype):
    found = parity(where, dtype, lengths=(130, 1, 64, 33))
    ways = {k: v for k, v in found.items() if not isinstance(v, str)}
    assert "loop" in ways and (where.type != "cuda" or dtype == torch.float32 or "varlen" in ways)
    assert max(ways.values()) < (1e-4 if dtype == torch.float32 else .03)


def test_an_exam_has_the_same_result(where):
    a, b = (examine(load_vlm("arr/vlm-mlp", device=d), n=18, seed=3, precision="fp32")["metrics"] for d in ("cpu", where))
    for k in ("accuracy", "reader", "no_image"): assert abs(a[k]["value"] - b[k]["value"]) < .06   # one of 18 may tip over


def test_methods_of_the_lab_run_where_the_encoder_is(tmp_path, where, monkeypatch):
    monkeypatch.setattr("arr_course.papers.HELD_OUT", 4)
    encoder = load("arr/filip-ti", device=where)
    paper = Paper(encoder, Exam(n=4, seed=2, split="val"), tmp_path, bf16=False).fill().verify()
    c = read_part(paper, 0, pixels=True)
    some = ["tome", "tome-after", "downsample", "oracle", "arr-1", "arr-2", "occamtoken"]
    for name, m in methods_of(encoder, some, (64, 32), tmp_path).items():
        s = m(c, 64)
        assert s.tokens.device.type == where.type and len(s.lengths) == 4 and 1 <= s.lengths.min(), name


def test_a_learner_learns_there_and_goes_on(tmp_path, where, trains):
    torch.manual_seed(0)
    data, model = [dict(x=o, y=o[:1] - o[1:2]) for o in torch.randn(64, 8)], torch.nn.Linear(8, 1)
    loss = lambda m, b: torch.nn.functional.mse_loss(m(b["x"]).float(), b["y"])
    cfg = TrainConfig(steps=60, batch_size=16, lr=.05, warmup=5, ema=.9, log_every=10, save_every=30)
    real = where.type == "cuda"                                        # what is pretended has no address, and cannot be saved
    learner = Learner(model, loss, data, cfg, tmp_path if real else None)
    rows = learner.fit()
    assert learner.acc.device.type == next(learner.model.parameters()).device.type == where.type
    assert rows[-1]["loss"] < .1 * rows[0]["loss"]
    if not real: return
    again = Learner(torch.nn.Linear(8, 1), loss, data, cfg, tmp_path)
    again.fit()                                                        # from its last checkpoint: nothing is left to do
    assert again.step == 60
    for k, w in learner.model.state_dict().items(): assert again.model.state_dict()[k].equal(w), k


@pytest.mark.parametrize("name", ["focus", "practice"])
def test_a_stage_of_a_recipe_trains_there(name, tmp_path, where, trains):
    encoder, stage = load("arr/filip-ti", device=where), RECIPE[name]
    stage = replace(stage, cfg=replace(stage.cfg, steps=2, batch_size=2, save_every=None, log_every=1))
    stored = StoredScenes(FeatureStore(encoder, "sparse", 4, folder=tmp_path, shard=4, bf16=False).fill(progress=False))
    model = start(VLM(vlm_config("vlm-mlp")), encoder)
    before = model.decoder.embed.weight.detach().clone()
    after = run_practice(model, stage, [stored], Objectness(encoder)).decoder.embed.weight.detach()
    assert after.device.type == where.type and after.isfinite().all() and not after.cpu().equal(before)
