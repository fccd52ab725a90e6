"""Scenes per second on one core: layout, picture and id map, beside what one would use instead. Writes results/scenes.json.

Instead of the generator: (a) the same scenes drawn without its caches of sprites, discs, masks and backdrops; (b) the same scenes
stored once as JPEG (quality 92) or PNG files and decoded by Pillow, as an image folder does; (c) the same scenes as JPEGs in a
Hugging Face `Dataset`, read row by row. Rounds take the contenders in turn, a block of scenes each, so that a neighbour on the
machine disturbs all alike; CPU time counts. The contender without caches comes last, because it empties them.
Reported: scenes per CPU second, the median over rounds with a bootstrap 95 % interval."""
import argparse
import os
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from arr_course import concepts, world
from arr_course.core import need, provenance, write_json
from arr_course.questions import ask
from arr_course.world import DENSITIES, paint, render, sample_scene

CACHED = (concepts.sprite, concepts.disc, concepts.sign, concepts.drawing, world._shape, world.backdrop)


def uncached(scene):
    "The picture with every sprite, disc and backdrop drawn anew; the photographs and drawings on disk stay as they are."
    for f in CACHED: f.cache_clear()
    return render(scene)


def encoded(scene, form):
    "The bytes of a scene's picture as a JPEG or a PNG."
    out = BytesIO()
    render(scene).save(out, form, **(dict(quality=92) if form == "JPEG" else {}))
    return out.getvalue()


def stored(folder, scenes, form):
    "The scenes as files of one format."
    paths = [folder / f"{s.density}-{s.seed}.{form.lower()}" for s in scenes]
    for p, s in zip(paths, scenes, strict=True): p.write_bytes(encoded(s, form))
    return paths


def load(path):
    "One picture from disk, decoded."
    return Image.open(path).convert("RGB")


def dataset(scenes):
    "The JPEGs as an HF `Dataset` with an Image feature."
    d = need("datasets", "models")
    rows = dict(image=[{"bytes": encoded(s, "JPEG"), "path": None} for s in scenes])
    return d.Dataset.from_dict(rows, features=d.Features(image=d.Image()))


def contenders(density, block, folder):
    "Name -> a function of the i-th scene."
    scenes = [sample_scene(i, density, "test") for i in range(block)]
    jpeg, png, ds = stored(folder, scenes, "JPEG"), stored(folder, scenes, "PNG"), dataset(scenes)
    return {"layout": lambda i: sample_scene(i, density),
            "layout + picture": lambda i: render(sample_scene(i, density)),
            "layout + picture + ids": lambda i: paint(sample_scene(i, density)),
            "all questions, no picture": lambda i: ask(scenes[i % block]),
            "JPEG from disk": lambda i: load(jpeg[i % block]),
            "PNG from disk": lambda i: load(png[i % block]),
            "HF Dataset of JPEGs": lambda i: ds[i % block]["image"].load()}


def rate(f, seeds):
    "Calls per CPU second."
    start = time.process_time()
    for i in seeds: f(i)
    return len(seeds) / (time.process_time() - start)


def interval(rates, n=2000):
    "Median and bootstrap 95 % interval of the median."
    draws = np.random.default_rng(0).choice(rates, (n, len(rates)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return dict(median=round(float(np.median(rates)), 1), low=round(float(low), 1), high=round(float(high), 1))


def measure(density, block, rounds, warm, folder):
    "The rates of all contenders, in turns; generated scenes are new ones in every round, as in training."
    runs = contenders(density, block, folder)
    for i in range(warm): paint(sample_scene(10_000 + i, density))     # as after the first seconds of a training run
    rates = {name: [] for name in (*runs, "layout + picture, no caches")}
    for r in range(rounds):
        seeds = range(100_000 + r * block, 100_000 + (r + 1) * block)
        for name in list(runs)[::-1 if r % 2 else 1]: rates[name].append(rate(runs[name], seeds))
    few = max(2, block // 40)
    bare = lambda i: uncached(sample_scene(i, density))
    rates["layout + picture, no caches"] += [rate(bare, range(r * few, (r + 1) * few)) for r in range(3)]
    return {name: interval(v) for name, v in rates.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--block", type=int, default=200, help="scenes of a contender in one round")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--quick", action="store_true", help="a few scenes, two rounds: does it run?")
    p.add_argument("--out", default=str(Path(__file__).parent / "results" / "scenes.json"))
    a = p.parse_args()
    if a.quick: a.block, a.rounds = 20, 2
    warm = 100 if a.quick else 2000
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for density in DENSITIES:
            rows[density] = measure(density, a.block, a.rounds, warm, Path(folder))
            print(f"{density} ({DENSITIES[density].size} pixels): scenes per CPU second, one core")
            for name, c in rows[density].items():
                print(f"  {name:28} {c['median']:9.1f} [{c['low']:.1f}, {c['high']:.1f}]", flush=True)
    note = provenance("pillow", "datasets", "resvg-py", seed=0, command="python benchmarks/scenes.py")
    write_json(a.out, dict(rows=rows, block=a.block, rounds=a.rounds, warm=warm, provenance=note))
    print("wrote", os.path.relpath(a.out))


if __name__ == "__main__": main()
