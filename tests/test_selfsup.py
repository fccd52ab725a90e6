"""Self-supervised losses against references computed in another way; student and teacher in one and in two processes."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arr_course import dino, selfsup
from arr_course.learner import TrainConfig
from arr_course.selfsup import DistillConfig, MaskedViT, SelfDistill
from arr_course.vit import ViTConfig

root = Path(__file__).resolve().parent.parent
TINY = ViTConfig(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, reg_tokens=1, pos_embed="sincos", stem="conv")
KINDS = (dino.Views(28, 2, (.4, 1.)), dino.Views(14, 2, (.2, .5)))
SMALL = DistillConfig(steps=6, prototypes=16, hidden=16, bottleneck=8)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def batch(n=4, kinds=KINDS, **how):
    data = dino.Twins(kinds, **how)
    return data.collate([data[i] for i in range(n)])


@pytest.mark.parametrize("g,v", [(2, 2), (2, 10), (1, 3), (3, 3)])
def test_dino_loss_is_torchs_cross_entropy_over_different_views(g, v):
    s, t = torch.randn(v, 5, 7, requires_grad=True), torch.randn(g, 5, 7).softmax(-1)
    pairs = [(i, j) for i in range(g) for j in range(v) if i != j]
    want = sum(F.cross_entropy(s[j] / .07, t[i]) for i, j in pairs) / len(pairs)
    got = selfsup.dino_loss(s, t, .07)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(o, s, retain_graph=True)[0] for o in (got, want)))


def test_a_view_is_never_its_own_lesson():
    s, t = torch.randn(3, 4, 6, requires_grad=True), torch.zeros(1, 4, 6)
    t[..., 0] = 1
    grad = torch.autograd.grad(selfsup.dino_loss(s, t), s)[0]
    assert grad[0].abs().max() == 0 and grad[1:].abs().max() > 0


@pytest.mark.parametrize("student,teacher", [
    ((1, 2, 3), (1, 2, 3)), ((3, 2, 4), (2, 2, 3)), ((2, 2, 3), (3, 2, 3)), ((3, 4, 3), (2, 2, 3))])
def test_dino_loss_says_what_does_not_fit(student, teacher):
    with pytest.raises(ValueError, match="need"): selfsup.dino_loss(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("temp,scale", [(1., 1.), (.05, 1.), (.01, 30.)])
def test_sinkhorn_is_a_scaling_of_rows_and_columns(temp, scale):
    x = torch.randn(24, 6) * scale * temp
    Q, u, v = (x.double() / temp).exp().numpy(), np.ones(24), np.ones(6)
    for _ in range(3): v = 1 / (Q.T @ u); u = 1 / (Q @ v)
    np.testing.assert_allclose(selfsup.sinkhorn(x, temp).numpy(), u[:, None] * Q * v, atol=2e-5)
    torch.testing.assert_close(selfsup.sinkhorn(x, temp).sum(1), torch.ones(24))


def test_sinkhorn_balances_and_ignores_a_bias_of_a_prototype():
    x, bias = torch.randn(64, 8), 5 * torch.randn(8)
    q = selfsup.sinkhorn(x, .3, rounds=60)
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.), atol=1e-3, rtol=0)
    torch.testing.assert_close(selfsup.sinkhorn(x + bias, .3), selfsup.sinkhorn(x, .3), atol=1e-4, rtol=1e-3)


def test_scores_are_full_precision_under_autocast():
    head, x = selfsup.DINOHead(8, 4, 8, 4), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16): assert head(x).dtype == torch.float32
    assert head(x).abs().max() <= 1 + 1e-6


def test_ibot_loss_weighs_pictures_alike():
    s, t, image = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5).softmax(-1), torch.tensor([0, 2, 2, 2, 5, 5, 2])
    want = torch.stack([F.cross_entropy(s[image == i] / .1, t[image == i]) for i in (0, 2, 5)]).mean()
    got = selfsup.ibot_loss(s, t, image)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(o, s, retain_graph=True)[0] for o in (got, want)))


def test_koleo_in_value_and_gradient():
    z = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    d = torch.cdist(F.normalize(z, dim=1), F.normalize(z, dim=1), compute_mode="donot_use_mm_for_euclid_dist") + 9 * torch.eye(12)
    want, got = -d.min(1).values.log().mean(), selfsup.koleo(z)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(o, z, retain_graph=True)[0] for o in (got, want)), atol=1e-4, rtol=1e-3)
    assert selfsup.koleo(torch.ones(3, 4)).isfinite(), "identical vectors give a large, finite loss"


def test_gram_loss_sees_relations_only():
    x, y = torch.randn(2, 9, 6), torch.randn(2, 9, 4)
    c = lambda o: F.cosine_similarity(o[:, :, None], o[:, None], dim=-1)
    torch.testing.assert_close(selfsup.gram_loss(x, y), F.mse_loss(c(x), c(y)))
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert selfsup.gram_loss(3 * x @ turn, x) < 1e-10


def test_block_masks_have_the_asked_count_and_hang_together():
    g, neighbours = torch.Generator().manual_seed(0), []
    for count in [0, 1, 5, 20, 63, 64]: assert int(selfsup.block_mask((8, 8), count, g).sum()) == count
    for _ in range(50):
        m = selfsup.block_mask((8, 8), 16, g).float()
        neighbours.append((m[1:] * m[:-1]).sum() + (m[:, 1:] * m[:, :-1]).sum())
    scattered = 2 * 7 * 8 * (16 / 64) * (15 / 63)                                   # expected pairs if patches were drawn alone
    assert np.mean(neighbours) > 2 * scattered


def test_measures_of_collapse():
    sure, same = torch.eye(6), torch.eye(6)[[1] * 6]
    assert selfsup.entropies(sure) == pytest.approx((0, math.log(6)), abs=1e-5)
    assert selfsup.entropies(same) == pytest.approx((0, 0), abs=1e-5)
    assert selfsup.effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-3)
    q = torch.linalg.qr(torch.randn(40, 5) - 0).Q
    assert selfsup.effective_rank(q - q.mean(0)) == pytest.approx(5, abs=.3)
    assert selfsup.norm_outliers(torch.ones(2, 5, 3)) == 0


def test_masks_agree_with_transformers():
    transformers = pytest.importorskip("transformers")
    from arr_course.vit_convert import from_hf
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    hf = transformers.Dinov2Model(transformers.Dinov2Config(**small)).eval()
    torch.nn.init.normal_(hf.embeddings.mask_token)
    ours = from_hf(hf)
    vit = MaskedViT(ours.cfg).eval()
    vit.load_state_dict(ours.state_dict() | {"mask_token": hf.embeddings.mask_token.data[0]})
    x, mask = torch.randn(3, 3, 32, 32), torch.rand(3, 16) < .5
    with torch.no_grad(): want, got = hf(x, bool_masked_pos=mask).last_hidden_state, vit.forward_tokens(x, mask)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert vit.hidden is None, "the mask does not stay for the next call"


@pytest.mark.parametrize("change", [
    {}, dict(ibot=0.), dict(koleo=0.), dict(balance="centre"), dict(contrast=1.), dict(gram=1., gram_from=0.)], ids=str)
def test_every_part_can_be_taken_away(change):
    model = SelfDistill(TINY, replace(SMALL, **change))
    loss, figures = model(batch())
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert ("ibot" in figures) == (change.get("ibot", 1) > 0) and ("gram" in figures) == ("gram" in change)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_the_anchor_is_the_teacher_of_its_step():
    model = SelfDistill(TINY, replace(SMALL, steps=4, gram=1., gram_from=.5, momentum=(.5, .5)))
    first = model.anchor.cls_token.clone()
    for step in range(1, 5):
        model.student.vit.cls_token.data += 1
        model.update()
        if step == 2: at_two = model.teacher.tower.vit.cls_token.clone()
        torch.testing.assert_close(model.anchor.cls_token, first if step < 2 else at_two)


def test_centre_follows_in_training_only():
    c = selfsup.Centre(3, momentum=.9)
    s = torch.randn(5, 3)
    c(s, .1); torch.testing.assert_close(c.mean, .1 * s.mean(0))
    before = c.mean.clone(); c.eval()(s, .1); torch.testing.assert_close(c.mean, before)


def test_twins_are_one_scene_on_two_backgrounds_and_share_a_concept_when_restaged():
    assert all(a.things == b.things and a.background != b.background for a, b in map(dino.twins, range(60)))
    pairs = [dino.twins(i, restage=.5) for i in range(60)]
    assert all(a.things[-1].name == b.things[-1].name and a.background != b.background for a, b in pairs)
    restaged = [a.things != b.things for a, b in pairs]
    assert .25 < np.mean(restaged) < .75
    assert dino.twins(3) == dino.twins(3) != dino.twins(3, "test")


def test_views_without_changes_are_the_picture():
    plain = dino.Views(112, 1, (1., 1.), flip=0., jitter=0., hue=0., grey=0., blur=0., solarise=0.)
    rng = np.random.default_rng(0)
    how = dino.default_collate([dino.draw_view(rng, plain) for _ in range(3)])
    how["where"][:, 0, 0] = how["where"][:, 1, 1] = 1; how["where"][:, :, 2] = 0          # draw_view may stretch a little
    x = torch.rand(3, 3, 112, 112)
    torch.testing.assert_close(dino.make_views(x, how, 112), 2 * x - 1, atol=1e-4, rtol=0)


def test_blur_is_scipys():
    from scipy.ndimage import gaussian_filter
    x = torch.rand(2, 3, 20, 20)
    got = dino.blur(x, torch.tensor([0., 1.2]))
    torch.testing.assert_close(got[0], x[0])
    want = np.stack([gaussian_filter(o.numpy(), 1.2, mode="mirror", radius=4) for o in x[1]])
    np.testing.assert_allclose(got[1].numpy(), want, atol=1e-5)


def test_hue_turns_keep_grey_and_add_up():
    m = dino.hue_matrix(.4)
    np.testing.assert_allclose(m @ [1, 1, 1], [1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(m @ dino.hue_matrix(.6), dino.hue_matrix(1.), atol=1e-12)
    np.testing.assert_allclose(dino.hue_matrix(2 * math.pi / 3) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


TRAIN = TrainConfig(steps=6, batch_size=4, lr=1e-3, log_every=3, save_every=3, precision="no")
DATA = lambda: dino.Twins(KINDS, early=(dino.Views(28, 2, (.5, 1.)), dino.Views(14, 1, (.2, .5))), switch=12)


def test_an_interrupted_training_continues(tmp_path):
    whole = dino.train(None, 6, TINY, SMALL, TRAIN, DATA())
    class Stop(Exception): pass
    def stop(model, step):
        if step == 5: raise Stop
    with pytest.raises(Stop): dino.train(tmp_path, 6, TINY, SMALL, TRAIN, DATA(), after_step=stop)
    again = dino.train(tmp_path, 6, TINY, SMALL, TRAIN, DATA())
    assert again.model.step == 6
    one, two = whole.model.state_dict(), again.model.state_dict()
    for k in one: torch.testing.assert_close(one[k], two[k], msg=k)


def test_export_loads_from_the_zoo(tmp_path, monkeypatch):
    from arr_course import zoo
    learner = dino.train(None, 2, TINY, SMALL, replace(TRAIN, steps=2), dino.Twins(KINDS))
    dino.export(learner, tmp_path)
    monkeypatch.setenv("ARR_WEIGHTS", str(tmp_path))
    encoder, x = zoo.load("arr/dino-ti"), torch.randn(2, 3, 28, 28)
    with torch.no_grad(): want = dino.backbone(learner.model).features(x)
    torch.testing.assert_close(encoder.encode(x).cls.cpu(), want.cls, atol=.02, rtol=.02)
    card = json.loads((tmp_path / "dino-ti.json").read_text())
    assert card["steps"] == 2 and "torchrun" in card["command"]


def test_two_processes_are_one(tmp_path):
    "The same global batch, cut in two: Sinkhorn and centring see both halves; KoLeo, which sees its own half, is off."
    code = f"""
import sys, torch; sys.path.insert(0, {str(root / 'tests')!r}); torch.set_num_threads(1)
from test_selfsup import *
for balance in ("sinkhorn", "centre"):
    distill, cfg = replace(SMALL, koleo=0., contrast=1., balance=balance), replace(TRAIN, steps=3, batch_size=8, lr=1e-4)
    learner = dino.train(None, 3, TINY, distill, cfg, dino.Twins(KINDS))
    assert learner.acc.num_processes == int(os.environ.get("WORLD_SIZE", 1)) == (2 if "two-" in sys.argv[1] else 1)
    if learner.acc.is_main_process: torch.save(learner.model.state_dict(), sys.argv[1] + balance)
"""
    (tmp_path / "t.py").write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tmp_path / "t.py", tmp_path / "one-"], check=True, env=env, cwd=root)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    subprocess.run([sys.executable, *launch, tmp_path / "t.py", tmp_path / "two-"], check=True, env=env, cwd=root)
    for balance in ("sinkhorn", "centre"):
        one, two = (torch.load(tmp_path / f"{n}-{balance}", weights_only=True) for n in ("one", "two"))
        for k in one: torch.testing.assert_close(one[k], two[k], atol=2e-4, rtol=1e-3, msg=lambda m, k=k: f"{k}: {m}")
