"""Every way to keep fewer visual tokens, on the same questions: accuracy against tokens and against time.

    python labs/budget_vs_accuracy/run.py                       # two processes; goes on where it was stopped
    python labs/budget_vs_accuracy/run.py --quick --out FOLDER  # a minute, to see that it runs
    python labs/budget_vs_accuracy/run.py --more                # and the rest of the grid
    python labs/budget_vs_accuracy/run.py --only report         # tables, plots and report from what is there

Results: answers.jsonl (right or wrong for each question), validation.jsonl and tuned.json (settings that were tried on
validation questions, and chosen), rows.json (the table), ablations.json, headroom.json, timing.json, plots, report.html.
The phases stand in order of importance, so that a run that is stopped early is of use."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from arr_course.arr import arr_2  # noqa: E402
from arr_course.core import write_json  # noqa: E402
from arr_course.harness import Runner, headroom_of, run, table  # noqa: E402
from arr_course.papers import HELD_OUT, Paper, methods_of, read_part, with_thresholds  # noqa: E402
from arr_course.vqa_evaluate import Exam  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from variants import (  # noqa: E402
    ABLATIONS,
    EXTRA,
    GRID,
    SAME,
    TUNED_AT,
    ablations,
    candidates,
    chosen,
    learned,
    seeds,
    settings,
    tuned,
)

ALL = (400, 256, 198, 128, 64, 32, 16)
SOME = (198, 64, 32)
VALIDATION = 540  # Questions of the split `val` on which settings are chosen
FIRST = ("full", "random", "arr-2", "arr-2:fixed", "arr-2:shuffled", "oracle")
PEERS = (
    "uniform",
    "pool",
    "downsample",
    "fastervlm",
    "tome-after",
    "visionzip",
    "prumerge+",
    "divprune",
    "vispruner",
    "scope",
    "holov",
    "dart",
    "cdpruner",
    "mmtok",
    "eadp",
    "sieve",
    "tops",
    "agilepruner",
    "e-adaprune",
    "occamtoken",
    "trim",
    "cdpruner+restore",
)
INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "tome")
CORE = (
    "full",
    "random",
    "arr-1",
    "arr-2",
    "oracle",
    "uniform",
    "pool",
    "fastervlm",
    "divprune",
    "scope",
    "cdpruner",
    "mmtok",
    "eadp",
    "occamtoken",
)
ONE, OTHERS = ("arr/vlm-mlp", "reader"), ("arr/vlm-mlp-s1", "arr/vlm-mlp-s2")
BETTER = tuple(f"arr/vlm-mlp-practice{s}" for s in ("", "-s1", "-s2"))  # another recipe: does the order of the methods last?
QUERIES = tuple(f"arr/vlm-{kind}-{n}" for kind in ("qformer", "resampler") for n in (64, 32))  # make few tokens by themselves
TUNED = tuple(f"{n}+tuned" for n in GRID)
STRONG = ("uniform", "pool", "fastervlm", "visionzip", "divprune", "scope", "cdpruner", "mmtok", "sieve", "tops", "trim", "arr-1")
EVERY = (*FIRST, *PEERS, "arr-1")
PHASES = (  # (density, models, methods, budgets)
    ("dense", ONE, FIRST, SOME),
    ("dense", ONE, (*PEERS, "arr-1"), SOME),
    ("dense", ONE, ("arr-1:fixed", *EXTRA), SOME),
    ("dense", ONE, tuple(ABLATIONS), (64, 32)),
    ("dense", ONE, TUNED, (64, 32, 16)),
    ("dense", QUERIES, ("full",), (576,)),
    ("dense", ONE, FIRST, ALL),
    ("sparse", ONE, CORE, SOME),
    ("dense", OTHERS, (*CORE, "arr-2:fixed", "sieve", "vispruner", *EXTRA), (64, 32, 16)),
    ("dense", ONE, (*PEERS, "arr-1"), (128, 256, 16)),
    ("dense", ONE, INSIDE, (400, 256, 198)),
    ("dense", ONE, (*PEERS, "arr-1"), (400,)),
    ("sparse", ONE, (*FIRST, *PEERS), SOME),
    ("sparse", ONE[:1], ("random", "arr-2:fixed", "oracle", *PEERS, "arr-1"), (16,)),
    ("dense", (*ONE, *OTHERS), (*PEERS, "arr-1", *EXTRA), (64, 32, 16)),
    ("dense", BETTER, (*CORE, "arr-2:fixed", "sieve", "vispruner", *EXTRA), (64, 32, 16)),
    ("dense", (*ONE, *OTHERS, *BETTER), (SAME,), (64, 32)),
    ("sparse", BETTER, ("full", "random", "arr-2", "arr-2:fixed", "sieve", "cdpruner", "oracle"), (64, 32)),
    ("dense", BETTER, ("arr-2", "arr-2:fixed", "sieve", "cdpruner", "divprune", "arr-1 same mean"), (198,)),
    ("dense", BETTER, PEERS, (64, 32, 16)),
    ("dense", BETTER, (*CORE, "arr-2:fixed", SAME, "sieve", "vispruner", "tops", "trim", "arr-1 same mean"), (128,)),
    ("dense", (*ONE, *OTHERS), EVERY, (198, 128)),
    ("sparse", ONE, EVERY, (128,)),
    ("dense", OTHERS, ("sparsevlm",), (256, 198)),
    ("dense", OTHERS, (*FIRST[1:4], "oracle", "dart", "pool", "fastervlm", "visionzip", "divprune", "scope", "cdpruner"), (256,)),
)

MORE = (  # with --more: many tokens, where there is little to choose and each row takes longest; at 400 strong methods first
    ("dense", OTHERS, EVERY, (256,)),
    ("sparse", ONE, EVERY, (256,)),
    ("sparse", ONE, (*FIRST, *STRONG), (400,)),
    ("dense", ("reader", *OTHERS), (*FIRST, *STRONG), (400,)),
    ("dense", ONE[1:], EVERY, (256,)),
    ("sparse", ONE, EVERY, (16, 198)),
    ("dense", ("reader", *OTHERS), EVERY, (400,)),
    ("sparse", ONE, EVERY, (400,)),
)


def paper(encoder, density, a):
    return Paper(encoder, Exam(density, a.n, a.seed), a.pictures)


def practice(encoder, a):
    "The validation questions on which settings are chosen."
    return Paper(encoder, Exam("dense", 36 if a.quick else VALIDATION, 1, "val"), a.pictures)


def methods_at(encoder, density, a):
    "Every method of the phases of a density by name, with thresholds for the budgets there."
    some = [p for p in a.phases if p[0] == density]
    ours = ABLATIONS | EXTRA | tuned(a.out / "tuned.json")
    names = [m for m in dict.fromkeys(m for p in some for m in p[2]) if m not in ours and m not in TUNED and m != SAME]
    at = sorted({b for p in some for b in p[3]})
    if density == "dense" and any(SAME in p[2] for p in some):
        exam = practice(encoder, a).verify()
        ours[SAME] = with_thresholds(arr_2(), [read_part(exam, k) for k in range(len(exam))], at)
    return methods_of(encoder, names, at, a.pictures, density) | ours


def work(a):
    "What one process does: its share of the pictures, of the validation, or of the results."
    encoder = load("arr/filip-ti", device="cpu")
    if a.only == "fill":
        for density in ("dense", "sparse"):
            paper(encoder, density, a).fill(a.rank, a.world, progress=not a.rank)
            Paper(encoder, Exam(density, HELD_OUT, 0, "val"), a.pictures).fill(a.rank, a.world)
        practice(encoder, a).fill(a.rank, a.world)
        return
    if a.only == "tune":
        exam, out = practice(encoder, a).verify(), a.out / "validation.jsonl"
        names = [n for n in candidates() if not a.quick or n.startswith("scope")]
        run(Runner(exam, ONE[:1], candidates(), out, a.rank, a.world, progress=not a.rank), names, list(TUNED_AT))
        return
    methods = {d: methods_at(encoder, d, a) for d in dict.fromkeys(p[0] for p in a.phases)}
    for density, models, some, at in a.phases:
        some = [m for m in some if m.partition(":")[0] in methods[density]]  # of the tuned only those that gained by it
        runner = Runner(
            paper(encoder, density, a).verify(),
            models,
            methods[density],
            a.out / "answers.jsonl",
            a.rank,
            a.world,
            progress=not a.rank,
        )
        run(runner, some, at)
        print(density, models, f"{len(runner.lines)} results", flush=True)


def together(a, only):
    "The same command in several processes; an error when all have ended, if one of them failed."
    args = [
        sys.executable,
        __file__,
        "--only",
        only,
        "--n",
        str(a.n),
        "--seed",
        str(a.seed),
        "--out",
        str(a.out),
        "--world",
        str(a.processes),
    ]
    if a.pictures:
        args += ["--pictures", a.pictures]
    flags = ["--quick"] * a.quick + ["--more"] * a.more
    jobs = [subprocess.Popen([*args, "--rank", str(r), *flags]) for r in range(a.processes)]
    if any([j.wait() for j in jobs]):
        sys.exit(f"{only}: a process failed; what it had finished is kept")


def choose(a):
    "tuned.json: for each method the setting that was best on the validation questions."
    exam = practice(load("arr/filip-ti", device="cpu"), a)
    found = chosen(Runner(exam, ONE[:1], candidates(), a.out / "validation.jsonl"))
    about = dict(questions=exam.exam.n, seed=exam.exam.seed, split="val", density="dense", budgets=TUNED_AT, model=ONE[0])
    write_json(a.out / "tuned.json", dict(methods=found) | about)


def tables(a):
    "Rows of everything that is there, and the headroom of budgets."
    encoder, rows, room, papers, lines = load("arr/filip-ti", device="cpu"), [], [], {}, []
    for density in dict.fromkeys(p[0] for p in a.phases):
        models = dict.fromkeys(m for p in a.phases if p[0] == density for m in p[1])
        papers[density] = paper(encoder, density, a)
        runner = Runner(papers[density], list(models), {}, a.out / "answers.jsonl")
        rows += [dict(density=density) | r for r in table(runner) if r["method"] not in ABLATIONS and r["model"] not in QUERIES]
        if density == "dense":
            more = dict(ablations=[r for m in models if m not in QUERIES for r in ablations(runner, m)])
            queries = [m for m in QUERIES if m in models]
            more |= dict(settings=settings(runner, a.out / "tuned.json"), learned=learned(runner, ONE[0], queries))
            for key, some in (("seeds", (ONE[0], *OTHERS)), ("better", BETTER)):
                more[key] = seeds(runner, some) if set(some) <= set(models) else []
        elif set(BETTER) <= set(models):
            more["better_sparse"] = seeds(runner, BETTER)
        now = [o for o in runner.lines if o["density"] == density and o["model"] in models]  # of these weights, and of this exam
        lines += [o for o in now if runner.found(o["method"], o["budget"], o["model"]) is o]
        for m in (m for m in models if m not in QUERIES):
            for method in ("random", "arr-2:fixed", "oracle"):
                try:
                    room.append(dict(density=density, model=m, method=method) | headroom_of(runner, method, m))
                except LookupError as e:
                    print(e)
    write_json(a.out / "ablations.json", more)
    write_json(a.out / "rows.json", dict(rows=rows, provenance=runner.provenance, questions=a.n, seed=a.seed))
    write_json(a.out / "headroom.json", room)
    return rows, room, papers, lines, more


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--n", type=int, default=2000, help="test questions of each density, in pairs")
    p.add_argument("--seed", type=int, default=5, help="of the test scenes")
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--pictures", help="folder of the encoded pictures; default: in the cache folder")
    p.add_argument("--out", type=Path, default=HERE / "results")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--more", action="store_true", help="the rest of the grid, too: more models at many tokens")
    p.add_argument("--only", choices=("fill", "tune", "run", "report"))
    p.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    p.add_argument("--world", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if a.quick and a.out == HERE / "results":
        p.error("--quick needs --out FOLDER, so that the stored results stay as they are")
    a.phases = PHASES + MORE * a.more
    if a.quick:
        a.n, a.processes, a.phases = (
            36,
            1,
            (
                ("dense", ONE, ("full", "random", "arr-2", "arr-2:fixed", "divprune", "oracle"), (198, 64, 16)),
                ("dense", ONE, ("arr-2 top-k", "arr-2 reindexed"), (64,)),
            ),
        )
    if a.rank is not None:
        return work(a)
    if a.only in (None, "fill"):
        together(a, "fill")
    if a.only in (None, "tune"):
        together(a, "tune")
        choose(a)
    if a.only in (None, "run"):
        together(a, "run")
    if a.only in (None, "report"):
        rows, room, papers, lines, more = tables(a)
        from report import report

        report(a.out, rows, room, lines, papers, more, a.quick)


if __name__ == "__main__":
    main()
