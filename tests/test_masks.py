"Masks: awkward images, invariances of the two groupings, and the Segment Anything adapter on a tiny checkpoint."
import numpy as np
import pytest
import torch
from PIL import Image

from arr_course.hub import ModelNotFound
from arr_course.images import Preprocess
from arr_course.masks import (
    Mask,
    affinity,
    auto_masks,
    choose_k,
    cluster,
    foreground,
    grid_features,
    iou,
    load_sam,
    overlay,
    parts,
    sam_masks,
    second_vector,
    to_pixels,
    tokencut,
    unit,
)
from arr_course.vit import Features


class MeanColour:
    "An encoder whose patch vector is the patch's mean colour, and a constant."
    def __init__(self, patch=8, size=(128, 128)):
        self.patch, self.preprocess, self.seen = patch, Preprocess(size, (0, 0, 0), (1, 1, 1)), []

    def encode(self, x, layers=(), saliency=False):
        self.seen.append(tuple(x.shape))
        p = torch.nn.functional.avg_pool2d(x, self.patch)
        b, _, h, w = p.shape
        return Features(torch.cat([p, p.new_full((b, 1, h, w), 0.05)], 1).flatten(2).transpose(1, 2), (h, w))


def two_things(w=300, h=200):
    "A red square on blue, and the square's mask."
    mask = np.zeros((h, w), bool); mask[h // 4:3 * h // 4, w // 3:2 * w // 3] = True
    return Image.fromarray(np.where(mask[..., None], [250, 10, 10], [10, 10, 250]).astype(np.uint8)), mask


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (128, 128)])
def test_both_find_a_square_in_its_place(size):
    im, true = two_things(*size)
    assert iou(foreground(im, MeanColour()).pixels, true) > 0.8
    found = auto_masks(im, MeanColour(), k=2)
    assert len(found) == 2 and max(iou(m.pixels, true) for m in found) > 0.8
    assert sum(m.pixels.astype(int) for m in found).max() == 1, "regions overlap"


def test_silhouette_chooses_two_for_two_things():
    px = np.full((128, 128, 3), (10, 10, 250), np.uint8); px[32:96, 32:96] = 250, 10, 10     # along the borders of patches
    assert choose_k(grid_features(Image.fromarray(px), MeanColour())[0])[0] == 2


def test_split_parts_are_connected_and_not_small():
    px = np.zeros((128, 128, 3), np.uint8); px[..., 2] = 200
    for y, x in ((8, 8), (8, 88), (88, 48)): px[y:y + 32, x:x + 32] = 255, 0, 0
    found = auto_masks(Image.fromarray(px), MeanColour(), k=2)
    assert len(found) == 4 and len(auto_masks(Image.fromarray(px), MeanColour(), k=2, split=False)) == 2
    assert all(len(parts(m.pixels, 0)) == 1 for m in found)
    assert len(auto_masks(Image.fromarray(px), MeanColour(), k=2, min_area=0.2)) == 1


@pytest.mark.parametrize("mode, size", [("RGB", (50, 40)), ("L", (1, 1)), ("RGBA", (3, 500)), ("P", (64, 64))])
def test_blank_and_tiny_images_do_not_fail(mode, size):
    im = Image.new(mode, size)
    found = auto_masks(im, MeanColour())
    assert [m.area for m in found] == [1.0] and found[0].pixels.shape == im.size[::-1]
    assert foreground(im, MeanColour()).pixels.shape == im.size[::-1]


def test_a_coarse_encoder_sees_a_larger_input_and_a_fine_one_its_own():
    coarse, fine = MeanColour(patch=32), MeanColour(patch=8)
    assert grid_features(two_things()[0], coarse)[1] == (20, 20) and coarse.seen[-1] == (1, 3, 640, 640)
    assert grid_features(two_things()[0], fine)[1] == (16, 16) and fine.seen == [(1, 3, 128, 128)]
    assert grid_features(two_things()[0], fine, scale=2)[1] == (32, 32)


def test_groups_do_not_depend_on_the_lengths_of_vectors():
    rng = np.random.default_rng(0); x = rng.normal(size=(60, 6)) + np.repeat(np.eye(6)[:3] * 8, 20, 0)
    longer = x * rng.uniform(.1, 10, (60, 1))
    assert (cluster(x, 3) == cluster(longer, 3)).all() and (affinity(x) == affinity(longer)).all()
    assert np.bincount(cluster(x, 3)).tolist() == [20, 20, 20]


def test_zero_vectors_give_no_nan():
    x = np.zeros((30, 4)); x[:10, 0] = 1
    assert np.isfinite(unit(x)).all() and np.isfinite(second_vector(affinity(x))[1]).all()
    assert cluster(x, 2).max() == 1


def test_second_vector_follows_a_permutation():
    rng = np.random.default_rng(3); w = rng.random((25, 25)); w += w.T; order = rng.permutation(25)
    (a, y), (b, z) = second_vector(w), second_vector(w[np.ix_(order, order)])
    assert a == pytest.approx(b) and np.allclose(y[order], z, atol=1e-8)


def test_second_vector_against_a_sparse_solver():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    rng = np.random.default_rng(0); w = affinity(rng.normal(size=(60, 4)), eps=1e-2); d = w.sum(1)
    val, vec = linalg.eigsh(np.diag(d) - w, k=2, M=np.diag(d), sigma=-1e-3)
    lam, y = second_vector(w)
    assert lam == pytest.approx(val[1], abs=1e-9) and abs(vec[:, 1] @ y) / np.linalg.norm(vec[:, 1]) == pytest.approx(1, abs=1e-6)


def test_tokencut_keeps_one_connected_part():
    x = np.tile([0.0, 1.0], (64, 1)).reshape(8, 8, 2); x[1:4, 1:4] = x[6:8, 6:8] = 1.0, 0.0
    front, y = tokencut(x.reshape(64, 2), (8, 8))
    assert len(parts(front, 0)) == 1 and front.sum() in (9, 4) and y.shape == (8, 8)


def test_to_pixels_keeps_every_group_and_both_axes():
    grid = np.arange(6).reshape(2, 3)
    out = to_pixels(grid, (200, 90))
    assert out.shape == (200, 90) and set(np.unique(out)) == set(range(6))
    assert out[10, 10] == 0 and out[10, 80] == 2 and out[190, 10] == 3
    assert to_pixels(np.zeros((1, 1), int), (5, 7)).shape == (5, 7)


def test_overlay_leaves_the_image_alone():
    im, mask = two_things()
    before = im.tobytes()
    assert overlay(im, []).tobytes() == before
    out = np.asarray(overlay(im, [Mask(mask, 1.0)], alpha=0.5))
    assert im.tobytes() == before and (out[~mask] == np.asarray(im)[~mask]).all() and (out[mask] != np.asarray(im)[mask]).any()
    with pytest.raises(ValueError, match=r"mask 0 is \(3, 3\)"): overlay(im, [np.ones((3, 3), bool)])


def test_parts_of_nothing():
    assert parts(np.zeros((5, 5), bool)) == []


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0); folder = tmp_path_factory.mktemp("sam")
    v = tf.SamVisionConfig(hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, mlp_dim=64,
                           image_size=64, patch_size=8, window_size=4, global_attn_indexes=[1], num_pos_feats=8)
    p = tf.SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    d = tf.SamMaskDecoderConfig(hidden_size=16, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)
    tf.SamModel(tf.SamConfig(vision_config=v, prompt_encoder_config=p, mask_decoder_config=d)).save_pretrained(folder)
    pixels = tf.SamImageProcessor(size=dict(longest_edge=64), pad_size=dict(height=64, width=64),
                                  mask_size=dict(longest_edge=16), mask_pad_size=dict(height=16, width=16))
    tf.SamProcessor(pixels).save_pretrained(folder)
    return folder


ALL = dict(points=4, pred_iou_thresh=-10, stability_score_thresh=0)


def test_sam_from_a_folder(sam):
    im, _ = two_things(90, 60)
    found = sam_masks(im, sam, min_area=0, **ALL)
    assert found and all(m.pixels.shape == (60, 90) and m.pixels.dtype == bool and np.isfinite(m.score) for m in found)
    assert [m.area for m in found] == sorted((m.area for m in found), reverse=True)
    assert len(sam_masks(im, sam, min_area=found[0].area, **ALL)) < len(found)
    assert overlay(im, found).size == im.size


def test_sam_is_what_the_pipeline_says(sam):
    pipe, (im, _) = load_sam(sam), two_things(90, 60)
    out = pipe(im, points_per_crop=4, pred_iou_thresh=-10, stability_score_thresh=0)
    ours = sam_masks(im, pipe, min_area=0, **ALL)
    assert sorted(m.score for m in ours) == pytest.approx(sorted(float(s) for s in out["scores"]))
    assert sum(m.pixels.sum() for m in ours) == sum(int(np.asarray(m).sum()) for m in out["masks"])


@pytest.mark.parametrize("name", ["facebook/no-such-sam", "not a name!", "/no/such/folder"])
def test_no_sam_says_what_to_do(name):
    with pytest.raises(ModelNotFound, match="give a local folder"): load_sam(name)


def test_sam_takes_no_pickle(sam, tmp_path):
    for f in sam.glob("*.json"): (tmp_path / f.name).write_bytes(f.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="Could not load model"): load_sam(tmp_path)
