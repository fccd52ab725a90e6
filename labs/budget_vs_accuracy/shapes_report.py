"""The table and the picture of shapes.py: shares with intervals over pictures, paired differences, accuracy against tokens."""
import json
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from arr_course.core import atomic_path, write_json  # noqa: E402
from arr_course.harness import best_peer, headroom_of, read_lines, right_of, tokens_of  # noqa: E402
from arr_course.metrics import paired_bootstrap  # noqa: E402
from arr_course.relevance import cue_words  # noqa: E402


def facts(right, picture) -> dict:
    "A share with its interval over pictures."
    f = paired_bootstrap(right.astype(float), np.zeros(len(right)), picture)
    return {k: round(f[k], 4) for k in ("value", "low", "high")} | dict(questions=len(right), pictures=f["n"])


def difference(a, b, picture) -> dict:
    "How much more a is right than b on the same questions, with its interval over pictures."
    f = paired_bootstrap(a.astype(float), b.astype(float), picture)
    return {k: round(f[k], 4) for k in ("value", "low", "high")}


def row(line, lines, asked) -> dict:
    "A result as the table shows it, beside the others."
    r, t, peer = right_of(line), tokens_of(line), best_peer(line, lines)
    picture, types = np.array([o[0] for o in asked]), np.array([o[3] for o in asked])
    cued = np.array([bool(cue_words(o[1])) for o in asked])
    full = next((o for o in lines if o["method"] == "full"), None)
    some = {k: types == k for k in dict.fromkeys(types)}
    return dict(method=line["method"], budget=line["budget"],
                mean_tokens=round(float(t.mean()), 2), std_tokens=round(float(t.std()), 2),
                accuracy=facts(r, picture), by_type={str(k): facts(r[w], picture[w]) for k, w in some.items()},
                named=facts(r[cued], picture[cued]), diff_to_full=full and difference(r, right_of(full), picture),
                best_peer=peer and peer["method"], diff_to_best_peer=peer and difference(r, right_of(peer), picture),
                seconds=line["seconds"], selections=line["selections"])


def headroom(lines) -> list[dict]:
    "What an oracle of budgets gains with a method over the best mix that does not look at the question."
    found = SimpleNamespace(lines=lines, found=lambda m, b, _: next(o for o in lines if (o["method"], o["budget"]) == (m, b)))
    names = [m for m in ("random", "arr-2:fixed", "oracle") if any(o["method"] == m for o in lines)]
    return [dict(method=m) | headroom_of(found, m, "") for m in names]


def picture(results, path=None):
    "Accuracy against tokens, a line for each method; peers are dashed."
    fig, ax = plt.subplots(figsize=(8, 4.6))
    bold = ("arr-1", "arr-2", "arr-2+saliency:fixed", "oracle", "random")
    shades, marks = iter(plt.get_cmap("tab20b")(np.linspace(0, 1, 20))), cycle("sv^<>dPXphH*")
    names = {r["method"] for r in results["rows"]} - {"full", "arr-2:fixed"}                 # the latter lies on arr-2
    for m in sorted(names, key=lambda m: (m not in bold, m)):
        some = sorted((r["mean_tokens"], 100 * r["accuracy"]["value"]) for r in results["rows"] if r["method"] == m)
        own = dict(lw=2.6, marker="o", ls="-", color=f"C{bold.index(m)}") if m in bold else None
        ax.plot(*zip(*some, strict=True), label=m, **(own or dict(lw=1, marker=next(marks), ls="--", ms=5, color=next(shades))))
    for r in results["rows"]:
        if r["method"] == "full": ax.axhline(100 * r["accuracy"]["value"], color="k", ls=":", label=f"all {r['budget']}")
    guess = 100 * results["controls"]["question_only"]["value"]
    ax.set(xscale="log", xlabel="visual tokens, on average", ylabel="right, % of the test split",
           title=f"easy-VQA (from the question alone: {guess:.0f} %)")
    ticks = sorted({r["budget"] for r in results["rows"]})
    ax.set_xticks(ticks, ticks, minor=False)
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, .5))
    if path:
        with atomic_path(path) as tmp: fig.savefig(tmp, dpi=72, bbox_inches="tight", format="png")
    plt.close(fig)
    return fig


def report(lines, asked, a, **more):
    "The table, what it rests on, and the picture."
    wanted = [o for o in lines if o["method"] == "full" or (o["method"] in a.methods and o["budget"] in a.budgets)]
    out = more | dict(rows=[row(o, wanted, asked) for o in wanted], headroom=headroom(wanted))
    write_json(a.out, out)
    picture(out, a.out.with_suffix(".png"))
    for r in out["rows"]: print(r["method"], r["budget"], r["mean_tokens"], r["accuracy"]["value"], r["diff_to_best_peer"])


def together(folder: Path, data) -> None:
    "easy_vqa-seeds.json: each method's right answers averaged over the three seeds, beside ARR-2's and those of all patches."
    picture, seeds, begins = np.array([k for k, i in enumerate(data.ids) for _ in data.rows[i]]), [], []
    for s in ("", "-s1", "-s2"):
        begins.append(json.loads((folder / f"easy_vqa{s}.json").read_text(encoding="utf-8"))["trained"]["begins"])
        found = [o for o in read_lines(folder / f"easy_vqa{s}.jsonl") if o["n"] == len(picture)]
        seeds.append({(o["method"], o["budget"]): right_of(o) for o in found})
    mean = {k: np.mean([o[k] for o in seeds], 0) for k in seeds[0] if all(k in o for o in seeds)}
    full, rows = next(v for (m, _), v in mean.items() if m == "full"), []
    for (m, b), right in mean.items():
        alone = [round(float(o[m, b].mean()), 4) for o in seeds]
        ours = mean.get(("arr-2", b))
        gaps = dict(diff_to_full=difference(right, full, picture))
        gaps |= dict(arr_2_minus_it=None if ours is None else difference(ours, right, picture))
        rows.append(dict(method=m, budget=b, accuracy=facts(right, picture), seeds=alone) | gaps)
    write_json(folder / "easy_vqa-seeds.json", dict(begins=begins, rows=rows))
    for r in sorted(rows, key=lambda r: (-r["budget"], -r["accuracy"]["value"])):
        print(r["method"], r["budget"], r["accuracy"]["value"], r["seeds"], r["arr_2_minus_it"])
