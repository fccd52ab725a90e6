"""Our contrastive losses against open_clip's, in value and gradient: one process, two and three, uneven tails; memory."""
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from arr_course.contrastive import clip_loss, siglip_loss


def pairs(b, e, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(b, e, generator=g), dim=-1) for _ in range(2)]


def run(loss, img, txt, scale=10.0, bias=-3.0, upstream=1.7):
    "The loss and its gradients by image, text, scale and bias."
    xs = [o.clone().requires_grad_() for o in (img, txt, torch.tensor(scale), torch.tensor(bias))]
    value = loss(*xs)
    (upstream * value).backward()
    return [value.detach()] + [torch.zeros_like(x) if x.grad is None else x.grad for x in xs]


def same(ours, theirs, **kw):
    for o, t in zip(ours, theirs, strict=True): torch.testing.assert_close(o, t, **(kw or dict(atol=2e-6, rtol=2e-5)))


@pytest.mark.parametrize("b,e", [(1, 4), (2, 3), (5, 8), (64, 32), (257, 64)])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_equals_open_clip(b, e, scale):
    theirs = pytest.importorskip("open_clip.loss").ClipLoss()
    same(run(lambda i, t, s, _: clip_loss(i, t, s), *pairs(b, e), scale=scale),
         run(lambda i, t, s, _: theirs(i, t, s), *pairs(b, e), scale=scale))


@pytest.mark.parametrize("b,chunk", [(1, 1), (2, 1), (5, 2), (5, 5), (5, 9), (64, 16), (64, 17), (257, 100), (257, None)])
@pytest.mark.parametrize("scale,bias", [(10.0, -10.0), (1.0, 0.0), (100.0, -12.0)])
def test_siglip_equals_open_clip(b, chunk, scale, bias):
    theirs = pytest.importorskip("open_clip.loss").SigLipLoss()
    same(run(lambda *a: siglip_loss(*a, chunk=chunk), *pairs(b, 32), scale=scale, bias=bias),
         run(theirs, *pairs(b, 32), scale=scale, bias=bias))


@pytest.mark.parametrize("chunk", [None, 3])
def test_siglip_gradients_by_finite_differences(chunk):
    img, txt = (o.double().requires_grad_() for o in pairs(5, 4))
    t, b = (torch.tensor(v, dtype=torch.double, requires_grad=True) for v in (7.0, -2.0))
    assert torch.autograd.gradcheck(lambda *a: siglip_loss(*a, chunk=chunk), (img, txt, t, b))


def test_numbers_as_scale_half_precision_and_no_grad():
    img, txt = pairs(9, 16)
    whole = siglip_loss(img, txt, 10, -10)
    torch.testing.assert_close(siglip_loss(img, txt, 10, -10, chunk=4), whole)
    half = siglip_loss(img.bfloat16(), txt.bfloat16(), 10, -10, chunk=4)
    assert half.dtype == torch.float32 and abs(half - whole) < 0.02 * whole
    with torch.no_grad(): assert not siglip_loss(img.requires_grad_(), txt, 10, -10, chunk=4).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        for chunk in (None, 4): torch.testing.assert_close(siglip_loss(img, txt, 10, -10, chunk=chunk), whole)
        inside = clip_loss(img, txt, 100)
    torch.testing.assert_close(inside, clip_loss(img, txt, 100))


def test_gradient_of_a_frozen_side_is_not_asked_for():
    "LiT: only one side learns; the other one's gradient is not stored."
    img, txt = pairs(9, 16)
    img.requires_grad_()
    siglip_loss(img, txt, 10.0, -10.0, chunk=4).backward()
    assert img.grad is not None and txt.grad is None


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_wrong_shapes_are_named(loss):
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"): loss(torch.ones(3, 4), torch.ones(2, 4), 10.0)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunk_must_be_positive(chunk):
    with pytest.raises(ValueError, match="at least 1"): siglip_loss(*pairs(3, 4), 10.0, chunk=chunk)


# --- two (or three) processes ---
LOSSES = {
    "clip": (lambda i, t, s, b: clip_loss(i, t, s, across=True), lambda i, t, s, b: clip_loss(i, t, s)),
    "siglip": (lambda *a: siglip_loss(*a, across=True), siglip_loss),
    "siglip chunked": (lambda *a: siglip_loss(*a, chunk=3, across=True), siglip_loss)}


def worker(rank, world, folder, b):
    "Each process holds its share of the pairs; what it finds is written to a file."
    torch.set_num_threads(1)
    try:  # before there is a group: open_clip's modules would keep it until the exit
        from open_clip.loss import ClipLoss, SigLipLoss
    except ImportError: ClipLoss = None
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    share = [o.chunk(world)[rank] for o in pairs(b * world, 16)]
    out = {k: run(across, *share) for k, (across, _) in LOSSES.items()}
    if ClipLoss:
        clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        out["open_clip clip"] = run(lambda i, t, s, b: clip(i, t, s), *share)
        for how in ("shift", "bidir"):
            out[f"open_clip siglip {how}"] = run(SigLipLoss(rank=rank, world_size=world, dist_impl=how), *share)
    else: out["open_clip"] = "missing"
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    assert not any("gloo" in p.read_text() for p in Path("/proc/self/task").glob("*/comm")), "a thread that may abort the exit"


@pytest.mark.parametrize("world,b", [(2, 1), (2, 7), (3, 4)])
def test_across_processes(tmp_path, world, b):
    "Equal to open_clip in each process; averaged over processes, equal to one process that holds the whole batch."
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(worker, (world, str(tmp_path), b), nprocs=world)
    found = [torch.load(tmp_path / f"{r}.pt") for r in range(world)]
    for name, (_, single) in LOSSES.items():
        value, d_img, d_txt, d_scale, d_bias = zip(*[f[name] for f in found], strict=True)
        mean = lambda xs: torch.stack(xs).mean(0)
        ours = [mean(value), torch.cat(d_img) / world, torch.cat(d_txt) / world, mean(d_scale), mean(d_bias)]
        same(ours, run(single, *pairs(b * world, 16)))
    for f in found:
        if "open_clip" in f: pytest.skip("open_clip is not installed")
        same(f["clip"], f["open_clip clip"])
        for ours in ("siglip", "siglip chunked"):
            for how in ("shift", "bidir"): same(f[ours], f[f"open_clip siglip {how}"])


# --- memory ---
def saved(loss, b, e=16):
    "Largest tensor, in numbers, that any operation makes or keeps, forward and backward."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for o in (out if isinstance(out, tuple | list) else [out]):
                if isinstance(o, torch.Tensor): self.size = max(self.size, o.untyped_storage().nbytes() // o.element_size())
            return out

    xs = [o.requires_grad_() for o in (*pairs(b, e), torch.tensor(10.0), torch.tensor(-10.0))]
    with Largest() as seen: loss(*xs).backward()
    return seen.size


def test_chunked_memory_is_linear_in_the_batch():
    "All at once makes b x b numbers; in chunks of c, never more than b x max(c, e), in either direction."
    for b in (64, 256):
        assert saved(siglip_loss, b) >= b * b
        assert saved(lambda *a: siglip_loss(*a, chunk=16), b) <= b * 16
