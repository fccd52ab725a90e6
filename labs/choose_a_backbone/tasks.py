"""The pictures and the labels of the lab's tasks: what is asked of every backbone."""

import re
from dataclasses import replace

import numpy as np
import torch

from arr_course import dense, probes
from arr_course.concepts import COLOURS, HELD_OUT, TRAINED
from arr_course.core import need
from arr_course.images import open_image
from arr_course.world import SIZES, Thing, render, sample_scene

SPLITS = ("train", "val", "test")
SIZE = dict(
    concepts=(1560, 520, 1040),
    held=(320, 160, 1056),
    cells=(1200, 400, 1040),
    easy=(1200, 400, 1000),
    segmentation=(240, 160),
    depth=(160, 120),
    learned=(320, 640),
    kept=(1040, 1040),
)  # images for training, choosing (within training for dense tasks) and testing
# the classes of the segmentation
SEEN = (
    "cat",
    "dog",
    "elephant",
    "apple",
    "banana",
    "car",
    "guitar",
    "umbrella",
    "key",
    "sunflower",
)


def cells_scene(split, seed):
    "A 112-pixel scene of 3 x 3 cells: a sign in one, one to six named things in others."
    base, rng = sample_scene(seed, "crop", split), np.random.default_rng([SPLITS.index(split), seed])
    order, k = rng.permutation(9), int(rng.integers(1, 7))
    spot = lambda c, s: dict(
        x=int(19 + 37 * (c % 3) + rng.integers(-2, 3)), y=int(19 + 37 * (c // 3) + rng.integers(-2, 3)), size=s
    )
    size = lambda low, high: int(rng.choice([s for s in SIZES if low <= s <= high]))
    things = [Thing(TRAINED[rng.integers(len(TRAINED))], **spot(c, size(20, 34))) for c in order[1 : k + 1]]
    things.append(Thing("sign", **spot(order[0], size(32, 40)), digit=int(rng.integers(10))))
    return replace(base, things=tuple(things))


def easy_images(split):
    "easy-VQA's images with shape and colour, read out of its questions: file and labels for every image where both are told."
    e = need("easy_vqa", "offline")
    ask, paths = (
        (e.get_train_questions, e.get_train_image_paths)
        if split != "test"
        else (e.get_test_questions, e.get_test_image_paths)
    )
    shapes = ("circle", "rectangle", "triangle")
    names = tuple(a for a in sorted(e.get_answers()) if a not in (*shapes, "yes", "no"))
    told = {}
    for q, a, i in zip(*ask(), strict=True):
        words, fact = set(re.findall(r"\w+", q)), told.setdefault(i, {})
        true = (
            words | {a} if a not in ("yes", "no") else words if (a == "yes") != bool(words & {"no", "not"}) else set()
        )
        for kind, values in (("shape", shapes), ("colour", names)):
            if found := true & set(values):
                fact[kind] = values.index(found.pop())
    path = paths()
    both = [(path[i], f["shape"], f["colour"]) for i, f in sorted(told.items()) if len(f) == 2]
    order = np.random.default_rng(0).permutation(len(both))
    a, b, c = SIZE["easy"]
    return [both[i] for i in order[{"train": slice(a), "val": slice(a, a + b), "test": slice(c)}[split]]]


def crops_of(name, split):
    "Images and labels (task -> `(n,)`) of one of the four sets of small pictures."
    n, at = SIZE[name][SPLITS.index(split)], SPLITS.index(split)
    if name == "easy":
        rows = easy_images(split)
        return [open_image(p).resize((112, 112)) for p, _, _ in rows], {
            k: torch.tensor([r[j] for r in rows]) for j, k in ((1, "shape"), (2, "colour"))
        }
    if name == "cells":
        scenes = [cells_scene(split, 10_000 + i) for i in range(n)]
        sign = [s.things[-1] for s in scenes]
        return [render(s) for s in scenes], dict(
            digit=torch.tensor([t.digit for t in sign]),
            count=torch.tensor([len(s.things) - 2 for s in scenes]),
            position=torch.tensor([t.y // 38 * 3 + t.x // 38 for t in sign]),
        )
    scenes, y = probes.crop_scenes(n, split, 20 + at, TRAINED if name == "concepts" else HELD_OUT)
    colour = torch.tensor([[*COLOURS, None].index(s.things[-1].colour) for s in scenes])
    return [render(s) for s in scenes], dict(concept=y, colour=colour)


def big_scenes(name, split, n):
    "Pictures of 336 pixels and dense labels: classes, or depths with NaN on the background."
    images, labels = [], []
    for i in range(n):
        if name == "segmentation":
            scene = sample_scene(50_000 + i, "dense", split, SEEN)
            image, ids = dense.paint(scene)
            images.append(image), labels.append(dense.class_map(scene, ids, SEEN))
        else:
            image, depth, ids = dense.hazy(sample_scene(60_000 + i, "dense", split))
            images.append(image), labels.append(np.where(ids > 0, depth, np.nan).astype(np.float32))
    return images, torch.from_numpy(np.stack(labels))
