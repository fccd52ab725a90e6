"""Images per second from files to unit vectors: the toolkit against the plain timm loop that one would write instead.

    python benchmarks/toolkit.py               # about a minute; writes results/toolkit.json

The same weights, the same photographs, the same transform; variants take turns in every round, and ratios are taken per round.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from PIL import Image

from arr_course.core import provenance, write_json
from arr_course.embed import Source, embed_missing
from arr_course.images import open_image
from arr_course.neighbours import EmbeddingStore
from arr_course.photos import sample_photos
from arr_course.zoo import load

HERE = Path(__file__).resolve().parent


@torch.no_grad()
def plain_one(model, transform, paths):
    "What one writes first: open, transform, forward, one image at a time."
    out = []
    for p in paths:
        z = model.forward_head(model.forward_features(transform(Image.open(p).convert("RGB"))[None]), pre_logits=True)
        out.append(torch.nn.functional.normalize(z, dim=-1))
    return torch.cat(out)


@torch.no_grad()
def plain_batched(model, transform, paths, batch_size):
    "The same in batches: read a batch, then compute it."
    out = []
    for i in range(0, len(paths), batch_size):
        x = torch.stack([transform(Image.open(p).convert("RGB")) for p in paths[i : i + batch_size]])
        out.append(
            torch.nn.functional.normalize(model.forward_head(model.forward_features(x), pre_logits=True), dim=-1)
        )
    return torch.cat(out)


def ours_one(encoder, paths):
    return torch.cat([encoder.embed(open_image(p)) for p in paths])


def ours_batched(encoder, paths, batch_size):
    "The toolkit's own pass: threads that read ahead, batches, and each batch stored safely on the disk."
    with tempfile.TemporaryDirectory() as d:
        store = EmbeddingStore(d, "benchmark")
        keys = [f"{i:064x}" for i in range(len(paths))]
        embed_missing(
            dict(zip(keys, paths, strict=True)), [Source(encoder, "embedding", store)], batch_size, progress=False
        )
        return torch.from_numpy(store.matrix(keys))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--repeat", type=int, default=3, help="how often each photograph is embedded in a round")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path, default=HERE / "results" / "toolkit.json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    encoder = load("pkg/efficientnet-lite0", device="cpu")
    model = load("pkg/efficientnet-lite0", device="cpu").model  # the same weights, untouched by the toolkit
    encoder.model.to(memory_format=torch.channels_last)  # as `embed.sources` does
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with tempfile.TemporaryDirectory() as d:
        paths = sample_photos(d) * a.repeat
        variants = {
            "timm loop, one image a call": lambda: plain_one(model, transform, paths),
            "toolkit, one image a call": lambda: ours_one(encoder, paths),
            f"timm loop, batches of {a.batch_size}": lambda: plain_batched(model, transform, paths, a.batch_size),
            f"toolkit, batches of {a.batch_size}": lambda: ours_batched(encoder, paths, a.batch_size),
        }
        start, outs = (
            time.perf_counter(),
            {k: f() for k, f in variants.items()},
        )  # a warm-up, and a check that all agree
        base = outs["timm loop, one image a call"]
        error = {k: float((v - base).abs().max()) for k, v in outs.items()}
        assert max(error.values()) < 0.02, error
        rounds = []
        for _ in range(a.rounds):
            row = {}
            for k, f in variants.items():
                t = time.perf_counter()
                f()
                row[k] = len(paths) / (time.perf_counter() - t)
            rounds.append(row)
    names = list(variants)
    ratio = lambda x, y: round(statistics.median(r[x] / r[y] for r in rounds), 3)
    rows = [
        dict(
            variant=k,
            images_per_second=round(statistics.median(r[k] for r in rounds), 1),
            over_timm_one=ratio(k, names[0]),
            over_timm_batched=ratio(k, names[2]),
            max_difference=round(error[k], 6),
        )
        for k in names
    ]
    print(f"{'variant':32}{'images/s':>10}{'x one':>8}{'x batched':>11}{'max diff':>10}")
    for r in rows:
        print(
            f"{r['variant']:32}{r['images_per_second']:10.1f}{r['over_timm_one']:8.2f}{r['over_timm_batched']:11.2f}{r['max_difference']:10.5f}"
        )
    write_json(
        a.out,
        dict(
            rows=rows,
            rounds=[{k: round(v, 2) for k, v in r.items()} for r in rounds],
            images=len(paths),
            batch_size=a.batch_size,
            threads=a.threads,
            targets={"toolkit one / timm one": 1.0, "toolkit batched / timm one": 1.5},
            **provenance(
                "timm",
                "pillow",
                seed=None,
                command="python benchmarks/toolkit.py",
                wall_seconds=round(time.perf_counter() - start, 1),
            ),
        ),
    )


if __name__ == "__main__":
    main()
