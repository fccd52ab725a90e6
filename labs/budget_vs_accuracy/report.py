"""Tables, plots and one self-contained page from the lab's results."""

import base64
import html
import io

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from arr_course.bench import counted, first_token, medians, smollm2, stages  # noqa: E402
from arr_course.core import atomic_path, write_json  # noqa: E402
from arr_course.decoder import Decoder  # noqa: E402
from arr_course.harness import tokens_of  # noqa: E402
from arr_course.papers import methods_of, read_part  # noqa: E402
from arr_course.world import render  # noqa: E402
from arr_course.zoo import load  # noqa: E402

POINTS = (16, 64, 128, 198, 256, 400, 576)
PROMISED = (
    ("full", 576, "full 576", 0.821, 1.0),
    ("arr-2:fixed", 256, "fixed 256", 0.813, 2.3),
    ("arr-2", 198, "adaptive 64-400", 0.818, 2.9),
)


def timing(rounds=5):
    "Milliseconds to the first word with a SmolLM2-135M-sized decoder, batch 1, and multiply-adds, at several numbers of tokens."
    encoder, picture = load("arr/filip-ti", device="cpu"), torch.zeros(1, 3, 336, 336)
    decoder = Decoder(smollm2()).to(torch.bfloat16).eval().requires_grad_(False)

    def see():
        with torch.autocast("cpu", torch.bfloat16):
            encoder.encode(picture)

    seconds = medians({"encode": see} | {v: first_token(decoder, v) for v in POINTS}, rounds)
    macs = counted(lambda: encoder.encode(picture))
    work = {v: sum(stages(smollm2(), v, encoder=macs).values()) for v in POINTS}
    return dict(
        encode=seconds["encode"],
        prefill={v: seconds[v] for v in POINTS},
        macs=work,
        decoder="SmolLM2-135M shape, random weights, bf16, batch 1, 24 words of text",
        threads=torch.get_num_threads(),
    )


def at(points, tokens):
    "The mean over questions of what is known at some numbers of tokens, interpolated between them."
    x = sorted(points, key=int)
    return float(np.interp(tokens, list(map(int, x)), [points[k] for k in x]).mean())


def promised(rows, lines, t):
    "The course's table: full, fixed, adaptive, with ratios of tokens, work and measured time."
    out = []
    full = next((r for r in rows if r["method"] == "full"), None)
    for method, budget, name, target, speed in PROMISED:
        r = next((r for r in rows if (r["method"], r["budget"]) == (method, budget)), None)
        if r is None or full is None:
            continue
        line = next(o for o in lines if (o["method"], o["budget"], o["model"]) == (method, budget, r["model"]))
        k, ms = tokens_of(line), r["seconds"]["select"]
        ttft = lambda v, extra=0.0: t["encode"] + extra + at(t["prefill"], v)
        out.append(
            dict(
                setting=name,
                mean_tokens=r["mean_tokens"],
                accuracy=r["accuracy"],
                ci=r["ci"],
                relative=round(r["accuracy"] / full["accuracy"], 4),
                token_ratio=round(576 / r["mean_tokens"], 2),
                flop_ratio=round(at(t["macs"], [576]) / at(t["macs"], k), 2),
                measured_speedup=round(ttft([576]) / ttft(k, ms), 2),
                expected_accuracy=target,
                expected_speedup=speed,
            )
        )
    return out


def picture(fig):
    "A figure as an <img> that needs no file."
    b = io.BytesIO()
    fig.savefig(b, format="png", dpi=72, bbox_inches="tight")
    plt.close(fig)
    return f'<img src="data:image/png;base64,{base64.b64encode(b.getvalue()).decode()}">'


def curves(rows, cost, label):
    "Accuracy against a cost, a line for each method: ours, the controls and the best peers in colour, the others grey."
    fig, ax = plt.subplots(figsize=(9, 5))
    names = {r["method"] for r in rows if r["method"] != "full" and not r["method"].endswith((":shuffled", "+tuned"))}
    bold = ("arr-1", "arr-2", "arr-2:fixed", "oracle", "random")
    others = {m for m in names if m not in bold and not m.startswith("arr-")}
    few = {m: [r["accuracy"] for r in rows if r["method"] == m and r["budget"] in (64, 32)] for m in others}
    peers = sorted((m for m in few if few[m]), key=lambda m: -np.mean(few[m]))[:5]
    for m in sorted(names, key=lambda m: (m in bold, m in peers)):
        some = sorted((cost(r), r["accuracy"]) for r in rows if r["method"] == m)
        own = dict(lw=0.8, color="0.75")
        if m in bold + tuple(peers):
            own = dict(lw=2.5 if m in bold else 1.2, color=f"C{(*bold, *peers).index(m)}", label=m)
        ax.plot(*zip(*some, strict=True), "o-", ms=3, **own)
    ax.plot([], [], color="0.75", label="other methods")
    for r in rows:
        if r["method"] == "full":
            ax.axhline(r["accuracy"], color="k", ls=":", label="all 576")
    ax.set(xscale="log", xlabel=label, ylabel="accuracy")
    low, high = ax.get_xlim()
    ticks = [t for t in (16, 32, 64, 100, 150, 200, 300, 400, 600, 800, 1200) if low <= t <= high]
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture(fig)


def budgets_by_type(line, paper):
    "How many tokens an adaptive method gives each type of question."
    k, types = tokens_of(line), np.array([i.question.type for i in paper.items])
    names = list(dict.fromkeys(types))
    fig, ax = plt.subplots(figsize=(8, 3))
    ax.boxplot([k[types == t] for t in names], tick_labels=names, showfliers=False)
    ax.set_ylabel("tokens")
    ax.tick_params(axis="x", rotation=30)
    return picture(fig)


def keep_maps(paper, names=("fastervlm", "divprune", "arr-2", "oracle"), tokens=64, rows=3):
    "What some methods keep of the first pictures."
    methods = methods_of(paper.encoder, names, (tokens,), paper.folder.parent, paper.exam.density)
    c = read_part(paper, 0)
    fig, axs = plt.subplots(rows, len(names), figsize=(2.6 * len(names), 2.8 * rows))
    for j, name in enumerate(names):
        s = methods[name](c.rows(list(range(0, 4 * rows, 4))), tokens)
        for i in range(rows):
            shade = torch.zeros(576).index_fill(0, s.index[s.image == i], 1.0).view(24, 24)
            axs[i, j].imshow(render(paper.items[4 * i].scene).resize((240, 240)))
            axs[i, j].imshow(1 - shade, alpha=0.6, extent=(0, 240, 240, 0), cmap="gray_r")
            axs[i, j].axis("off")
            axs[i, j].set_title(name if i == 0 else paper.items[4 * i].question.text, fontsize=7)
    return picture(fig)


def gain_curve(paper):
    "Gains of the greedy choice, relative to the first, for some questions."
    arr = methods_of(paper.encoder, ("arr-2",), (64,), paper.folder.parent, paper.exam.density)["arr-2"]
    c = read_part(paper, 0).rows(list(range(0, 18, 2)))
    gains = arr.gains(c, 200)[1]
    fig, ax = plt.subplots(figsize=(6, 3))
    for g, i in zip(gains, range(0, 18, 2), strict=True):
        ax.plot((g / g[0]).numpy(), label=paper.items[i].question.type)
    ax.axhline(arr.threshold(64), color="k", ls=":")
    ax.set(yscale="log", xlabel="tokens", ylabel="gain / first gain")
    ax.legend(fontsize=6)
    return picture(fig)


def as_table(rows, keys):
    "An HTML table of some keys of rows."
    plain = lambda v: f"{v:.3f}" if v < 50 else f"{v:.1f}"

    def cell(key, v):
        if isinstance(v, dict):  # a figure with its interval; differences with their sign
            sign = "+" if key.startswith("diff") or "minus" in key else ""
            return "{:{s}.3f} ({:{s}.3f} to {:{s}.3f})".format(v["value"], v["low"], v["high"], s=sign)
        if isinstance(v, list):
            return " to ".join(plain(x) for x in v)
        return plain(v) if isinstance(v, float) else "" if v is None else str(v)

    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(str(x))}</{tag}>" for x in cells) + "</tr>"
    return "<table>" + line(keys, "th") + "".join(line([cell(k, r.get(k)) for k in keys], "td") for r in rows) + "</table>"


STYLE = (
    "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}img{max-width:100%}"
    "td,th{padding:.15em .6em;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}</style>"
)


def report(out, rows, room, lines, papers, more, quick=False):
    "timing.json, promised.json and report.html from rows, headroom, stored answers and the exams."
    t = timing(2 if quick else 7)
    write_json(out / "timing.json", t)
    first = [r for r in rows if r["density"] == "dense" and r["model"] == "arr/vlm-mlp"]
    own = [
        o
        for o in lines
        if o["density"] == "dense" and o["n"] == papers["dense"].exam.n and o["seed"] == papers["dense"].exam.seed
    ]
    table = promised(first, own, t)
    write_json(out / "promised.json", table)
    page = [
        STYLE,
        "<h1>Budget against accuracy</h1>",
        "<h2>What the course promised</h2>",
        as_table(table, list(table[0]) if table else []),
        "<p>Expected figures are targets; their speed-ups are ratios of tokens. "
        "Measured: encoder, selection and a SmolLM2-135M-sized decoder, to the first word.</p>",
        "<h2>What could an adaptive budget gain?</h2>",
        as_table(
            room, ["density", "model", "method", "accuracy", "tokens", "blind", "shuffled", "lasting", "lasting_tokens"]
        ),
    ]
    adaptive = next((o for o in own if o["method"] == "arr-2" and o["model"] == "arr/vlm-mlp" and o["budget"] == 64), None)
    for d, m in dict.fromkeys((r["density"], r["model"]) for r in rows):
        some = sorted(
            (r for r in rows if (r["density"], r["model"]) == (d, m)), key=lambda r: (-r["budget"], -r["accuracy"])
        )
        page += [
            f"<h2>{d}, {m}</h2>",
            curves(some, lambda r: r["mean_tokens"], "mean tokens"),
            curves(
                some,
                lambda r: 1e3 * (t["encode"] + r["seconds"]["select"] + at(t["prefill"], [r["mean_tokens"]])),
                "ms to the first word (measured stages)",
            ),
        ]
        if adaptive and (d, m) == ("dense", "arr/vlm-mlp"):
            page += ["<h3>Budgets by type, arr-2 at 64</h3>", budgets_by_type(adaptive, papers[d])]
        page.append(
            as_table(
                some,
                [
                    "method",
                    "budget",
                    "mean_tokens",
                    "p5_tokens",
                    "p95_tokens",
                    "accuracy",
                    "ci",
                    "cueless",
                    "diff_to_full",
                    "best_peer",
                    "diff_to_best_peer",
                ],
            )
        )
    base = ["budget", "accuracy", "ci", "difference"]
    page += [
        "<h2>Three seeds of the VLM together</h2>",
        "<p>Right answers averaged over the seeds, and ARR-2 minus it; at 16 tokens ARR-2 gives each question the same. "
        "Held to the mean asked by thresholds from more held-out questions, it is <i>arr-2 same mean</i>.</p>",
        as_table(more["seeds"], ["budget", "method", "asked", "accuracy", "arr_2", "arr_2_minus_it", "same_mean_minus_it"]),
        "<h2>Another recipe of the VLM</h2>",
        "<p>The same with arr/vlm-mlp-practice and its two further seeds, which answer more: does the order last?</p>",
        as_table(more["better"], ["budget", "method", "asked", "accuracy", "arr_2", "arr_2_minus_it", "same_mean_minus_it"]),
        "<h3>The same on sparse scenes</h3>",
        as_table(more.get("better_sparse", []), ["budget", "method", "asked", "accuracy", "arr_2", "arr_2_minus_it"]),
        "<h2>ARR-2 with one part changed</h2>",
        "<p>Difference to ARR-2 with as many tokens for each question (arr-2:fixed), on the same questions.</p>",
        as_table(more["ablations"], ["method", "model", *base]),
        "<h2>Settings chosen on validation questions</h2>",
        "<p>Accuracy with the chosen setting, its difference to the published one, and ARR-2 (as shipped) minus it.</p>",
        as_table(more["settings"], ["method", "setting", "published", *base, "arr_2_minus_it"]),
        "<h2>Connectors that make few tokens by themselves</h2>",
        "<p>Difference to arr/vlm-mlp with all patches, and with as many patches chosen by ARR-2.</p>",
        as_table(more["learned"], ["model", *base, "minus_arr_2"]),
        "<h2>What is kept, at 64 tokens</h2>",
        keep_maps(papers["dense"]),
        "<h2>Gain curves</h2>",
        gain_curve(papers["dense"]),
    ]
    title = "<!doctype html><meta charset='utf-8'><title>Budget against accuracy</title>"
    with atomic_path(out / "report.html") as tmp:
        tmp.write_text(title + "\n".join(page), encoding="utf-8")
    print(*table, f"report: {out.name}/report.html", sep="\n")
