"""Our CLIP and SigLIP losses against open_clip's: peak memory and time of one forward and backward pass, by batch size.

    python benchmarks/losses.py            # about 3 minutes; prints a table and writes results/losses.json
    python benchmarks/losses.py --quick    # batches 256 and 512 only, in under a minute; prints, writes nothing

Memory: every (loss, batch) runs alone in a fresh process; reported is how far its resident memory rises above what it was
just before the pass (the kernel's high-water mark, reset first), inputs not counted. Blocks are given back to the system
as soon as they are freed, so that the mark is what was really held at once. A row without `peak_mib`: not Linux.
Time: the losses of a batch size take turns in one process, in rotating order; reported are the median CPU time and the
median, over rounds, of its ratio to open_clip's in the same round, with a bootstrap 95 % interval."""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits must not count as CPU time

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from arr_course.contrastive import clip_loss, siglip_loss  # noqa: E402
from arr_course.core import need, provenance, write_json  # noqa: E402

HERE, DIM, CHUNK = Path(__file__).resolve().parent, 512, 256
THEIRS = {"clip": "open_clip.ClipLoss", "siglip": "open_clip.SigLipLoss"}


def losses(chunk):
    "Name -> (family, function of image vectors, text vectors, scale, bias)."
    theirs = need("open_clip.loss", "models")
    clip, siglip = theirs.ClipLoss(), theirs.SigLipLoss()
    return {"open_clip.ClipLoss": ("clip", lambda i, t, s, _: clip(i, t, s)),
            "clip_loss": ("clip", lambda i, t, s, _: clip_loss(i, t, s)),
            "open_clip.SigLipLoss": ("siglip", siglip),
            "siglip_loss": ("siglip", siglip_loss),
            f"siglip_loss, chunk={chunk}": ("siglip", lambda *a: siglip_loss(*a, chunk=chunk))}


def inputs(batch):
    "Unit vectors, a scale and a bias, all asking for a gradient."
    g = torch.Generator().manual_seed(0)
    pairs = [F.normalize(torch.randn(batch, DIM, generator=g), dim=-1) for _ in range(2)]
    return [o.requires_grad_() for o in (*pairs, torch.tensor(10.0), torch.tensor(-10.0))]


def step(loss, xs):
    "One forward and backward pass; the value."
    for x in xs: x.grad = None
    value = loss(*xs)
    value.backward()
    return value.item()


def status(key):
    "A line of /proc/self/status, in MiB."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"): return int(line.split()[1]) / 1024
    raise LookupError(key)


def peak_here(name, batch, chunk):
    "Rise of resident memory in this process during one pass, in MiB; a small pass first loads the kernels."
    torch.set_num_threads(1)
    loss, xs = losses(chunk)[name][1], inputs(batch)
    step(loss, inputs(8))
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    step(loss, xs)
    return status("VmHWM") - before


def peak(name, batch, chunk):
    "`peak_here` in a fresh process whose allocator gives blocks back at once; `None` where the system has no such mark."
    if not Path("/proc/self/clear_refs").exists(): return None
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    cmd = [sys.executable, __file__, "--peak-of", name, "--batches", str(batch), "--chunk", str(chunk)]
    return round(json.loads(subprocess.run(cmd, env=env, check=True, capture_output=True, text=True).stdout), 2)


def times(batch, chunk, seconds, least):
    "CPU seconds by name, one list over rounds each, and the losses' values."
    todo, xs = losses(chunk), inputs(batch)
    value = {k: step(f, xs) for k, (_, f) in todo.items()}
    took, end, names = {k: [] for k in todo}, time.perf_counter() + seconds, list(todo)
    while len(took[names[0]]) < least or time.perf_counter() < end:
        shift = len(took[names[0]]) % len(names)
        for k in names[shift:] + names[:shift]:
            start = time.process_time()
            step(todo[k][1], xs)
            took[k].append(time.process_time() - start)
    return took, value


def interval(ratios, n=2000):
    "Median and bootstrap 95 % interval of the median."
    draws = np.random.default_rng(0).choice(ratios, (n, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return dict(median=round(float(np.median(ratios)), 3), low=round(float(low), 3), high=round(float(high), 3))


def measure(batch, chunk, seconds, least):
    "The rows of one batch size."
    took, value = times(batch, chunk, seconds, least)
    for name, (family, _) in losses(chunk).items():
        base = THEIRS[family]
        off = abs(value[name] - value[base]) / abs(value[base])
        if off > 1e-5: raise SystemExit(f"{name} differs from {base} by {off:.1e}: nothing to compare")
        yield dict(batch=batch, loss=name, against=base, peak_mib=peak(name, batch, chunk), rounds=len(took[name]),
                   cpu_ms=round(1000 * float(np.median(took[name])), 3),
                   ratio=interval(np.array(took[name]) / np.array(took[base])))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    p.add_argument("--chunk", type=int, default=CHUNK)
    p.add_argument("--seconds", type=float, default=20, help="of timing for each batch size")
    p.add_argument("--rounds", type=int, default=5, help="at least this many for each batch size")
    p.add_argument("--quick", action="store_true", help="batches 256 and 512, 2 seconds each; nothing is written")
    p.add_argument("--out", type=Path)
    p.add_argument("--peak-of", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.peak_of: return print(json.dumps(peak_here(a.peak_of, a.batches[0], a.chunk)))
    if a.quick: a.batches, a.seconds = [256, 512], 2
    time_of = "{median:.3f} [{low:.3f}, {high:.3f}]"
    torch.set_num_threads(1)
    rows = []
    print(f"{'batch':>5} {'loss':24} {'peak MiB':>9} {'CPU ms':>9}  of open_clip's time")
    for batch in a.batches:
        for r in measure(batch, a.chunk, a.seconds, a.rounds):
            rows.append(r)
            mib = "-" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}"
            print(f"{batch:5} {r['loss']:24} {mib:>9} {r['cpu_ms']:9.2f}  {time_of.format(**r['ratio'])}", flush=True)
    out = a.out or (None if a.quick else HERE / "results" / "losses.json")
    if not out: return
    write_json(out, dict(rows=rows, dim=DIM, chunk=a.chunk, threads=1, passes="forward + backward",
                         provenance=provenance("open_clip_torch", seed=0, command="python benchmarks/losses.py")))
    print("wrote", os.path.relpath(out))


if __name__ == "__main__": main()
