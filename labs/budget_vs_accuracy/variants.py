"""What the lab tries beside the methods of the package: ARR-2 with one part changed, and methods with other settings.

A setting is chosen on validation questions (`results/validation.jsonl`), one for all budgets, and then stands as NAME+tuned
beside NAME with its published setting on the test questions."""

import json
from dataclasses import replace
from functools import partial

import numpy as np

from arr_course.arr import Weight, arr_1, arr_2, position
from arr_course.harness import accuracy_of, difference, right_of
from arr_course.metrics import paired_bootstrap
from arr_course.peers import PEERS, conditional, cover_both, dpp, each, entropy_weight, three_wishes, word_attention
from arr_course.reducers import REDUCERS, dart, holov, scope, vispruner, zip_merge, zip_targets
from arr_course.relevance import mean_similarity, saliency, surprisal
from arr_course.select import Reducer

TUNED_AT = (64, 32)
SAME = "arr-2 same mean"  # thresholds from the 540 validation questions, so that it keeps as many as it is asked for


def reindexed(c, tokens):
    "What ARR-2 keeps, with places as if there were no other patches."
    return position(arr_2()(c, tokens), "reindex")


ABLATIONS = {  # each gives every question the same number of tokens; compare with arr-2:fixed
    "arr-2 no relevance": arr_2(q=0.0),
    "arr-2 nothing stands out": arr_2(cover=0.0),
    "arr-2 saliency alone": arr_2(salience=saliency),
    "arr-2 surprisal alone": arr_2(salience=surprisal),
    "arr-2 outstanding too": arr_2(p=1.0),
    "arr-2 novelty too": arr_2(s=1.0),
    "arr-2 mean relevance": arr_2(relevant=mean_similarity),
    "arr-2 only exploits": arr_2(explore=0.0),
    "arr-2 only explores": arr_2(explore=1.0),
    "arr-2 top-k": arr_2(diversify=0.0),
    "arr-2 most diverse": arr_2(diversify=1.0),
    "arr-2 dpp": Reducer("arr-2 dpp", Weight(), lambda c, w, k: dpp(c, w / w.amax(1, keepdim=True), k), uses_query=True),
    "arr-2 recycles": arr_2(compress=0.25),
    "arr-2 reindexed": reindexed,
}


EXTRA = {"arr-1 same mean": arr_1(share=0.5)}  # half of the questions get more by ARR-1's rule: here others get less


def visionzip(contextual, average=False):
    "VisionZip with another share of merged tokens; with `average`, these are true means."
    choose, merge = partial(zip_targets, contextual=contextual), partial(zip_merge, contextual=contextual, average=average)
    return dict(choose=choose, merge=merge)


def power_of(p):
    "CDPruner's relevance to a power: the paper has none, which is 1."
    return lambda c: conditional(c) ** p


GRID = {  # method: label -> what is changed; each method's own setting is tried as well
    "scope": {f"alpha={a}": dict(choose=partial(scope, alpha=a)) for a in (0.5, 2.0, 4.0)},
    "vispruner": {f"important={a}": dict(choose=partial(vispruner, important=a)) for a in (0.1, 0.25, 0.75)},
    "visionzip": {f"contextual={a}": visionzip(a) for a in (0.0, 0.08, 0.3)} | {"average": visionzip(10 / 64, True)},
    "holov": {f"runs={r} alpha={a}": dict(choose=partial(holov, runs=r, alpha=a)) for r in (8, 36) for a in (0.09, 0.5)},
    "dart": {f"pivots={p}": dict(choose=partial(dart, pivots=p)) for p in (2, 4, 16)},
    "cdpruner": {f"power={p}": dict(score=power_of(p)) for p in (0.5, 2.0, 4.0)},
    "eadp": {
        f"mix={m} power={p}": dict(score=partial(entropy_weight, mix=m, power=p))
        for m in (0.0, 0.5)
        for p in (4.0, 8.0, 16.0)
        if (m, p) != (0.5, 4.0)
    },
    "mmtok": {
        f"alpha={a} text={t}": dict(choose=partial(cover_both, alpha=a, text=t)) for a in (0.25, 0.75) for t in (0.02, 0.05)
    },
    "tops": {
        f"cover={a} novel={b}": dict(choose=each(partial(three_wishes, cover=a, novel=b)))
        for a, b in ((0.1, 1.0), (0.5, 0.5), (0.5, 1.0))
    },
    "sieve": {f"tau={t}": dict(score=partial(word_attention, tau=t)) for t in (0.02, 0.1, 0.2)},
    "arr-2": {
        f"q={q} explore={e} diversify={d}": dict(arr=dict(q=q, explore=e, diversify=d))
        for q in (4.0, 8.0, 16.0)
        for e in (0.15, 0.3)
        for d in (0.5, 0.75)
        if (q, e, d) != (8.0, 0.3, 0.5)
    }
    | {f"{f.__name__} alone": dict(arr=dict(salience=f)) for f in (saliency, surprisal)},
}


def with_setting(name, change):
    "A method with something changed."
    if "arr" in change:
        return arr_2(**change["arr"])
    return replace((REDUCERS | PEERS)[name], **change)


def candidates():
    "Everything that is tried on validation questions: name -> reducer. A method's bare name is its published setting."
    out = {n: arr_2() if n == "arr-2" else (REDUCERS | PEERS)[n] for n in GRID}
    return out | {f"{n} {label}": with_setting(n, change) for n, some in GRID.items() for label, change in some.items()}


def chosen(runner, model="arr/vlm-mlp"):
    "Of each method that was tried the setting with the most right answers over both budgets; if as good, the published one."
    out = {}
    for name in GRID:
        tried = {k: [runner.found(f"{name} {k}".strip(), b, model) for b in TUNED_AT] for k in ("", *GRID[name])}
        if None in sum(tried.values(), []):
            continue
        tried = {k: [float(right_of(o).mean()) for o in lines] for k, lines in tried.items()}
        best = max(tried, key=lambda k: (round(sum(tried[k]), 6), not k))
        rounded = {k or "published": [round(x, 4) for x in v] for k, v in tried.items()}
        out[name] = dict(setting=best or "published", tried=rounded)
    return out


def tuned(path):
    "NAME+tuned -> reducer, from tuned.json; nothing where the published setting was best, or no file is there."
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["methods"]
    return {f"{n}+tuned": with_setting(n, GRID[n][o["setting"]]) for n, o in found.items() if o["setting"] != "published"}


def paired(line, other, **more):
    "A result beside another on the same questions: accuracy, and the difference with its interval."
    right = right_of(line)
    acc = accuracy_of(right)
    facts = dict(budget=line["budget"], accuracy=acc["value"], ci=[acc["low"], acc["high"]])
    return facts | dict(difference=difference(right, right_of(other))) | more


def ablations(runner, model):
    "Each change to ARR-2 beside ARR-2, with the same number of tokens for each question."
    found = lambda name, b: runner.found(name, b, model)
    pairs = [(n, found(n, b), found("arr-2:fixed", b)) for b in TUNED_AT for n in ABLATIONS]
    return [dict(method=n, model=model) | paired(o, base) for n, o, base in pairs if o and base]


def settings(runner, path, model="arr/vlm-mlp"):
    "Each method with its tuned setting beside the published one on the test questions, and ARR-2 beside both."
    if not path.is_file():
        return []
    out = []
    for name, o in json.loads(path.read_text(encoding="utf-8"))["methods"].items():
        for b in (*TUNED_AT, 16):
            first = runner.found(name if name != "arr-2" else "arr-2:fixed", b, model)
            best, ours = runner.found(f"{name}+tuned", b, model) or first, runner.found("arr-2:fixed", b, model)
            if first and ours:
                gap = difference(right_of(ours), right_of(best))
                published = round(float(right_of(first).mean()), 4)
                out.append(dict(method=name, setting=o["setting"], published=published) | paired(best, first, arr_2_minus_it=gap))
    return out


def learned(runner, model, queries):
    "A VLM whose connector makes so few tokens by itself, beside `model` with all patches and with as many chosen ones."
    full, out = runner.found("full", 576, model), []
    for name in queries:
        b, line = int(name.rpartition("-")[2]), runner.found("full", 576, name)
        picked = runner.found("arr-2:fixed", b, model)
        if line and full and picked:
            gap = difference(right_of(line), right_of(picked))
            out.append(dict(model=name) | paired(line, full, minus_arr_2=gap) | dict(budget=b))
    return out


def seeds(runner, models):
    "ARR-2 (`same_mean`: held to the mean) beside each method that all models answered with: means of models, intervals of pairs."
    out = []
    for b in sorted({o["budget"] for o in runner.lines} - {576}, reverse=True):
        tried = dict.fromkeys((o["method"], o["budget"]) for o in runner.lines if o["budget"] == b or o["method"] == "full")
        every = {k: [runner.found(*k, m) for m in models] for k in tried}
        mean = {k: np.mean([right_of(o) for o in v], 0) for k, v in every.items() if None not in v}
        us = next((k for k in (("arr-2", b), ("arr-2:fixed", b)) if k in mean), None)
        for k, right in mean.items():
            if us in (None, k):
                continue
            facts = dict(method=k[0], budget=b, asked=k[1], accuracy=float(right.mean()), arr_2=float(mean[us].mean()))
            for name, ours in dict(arr_2=us, same_mean=(SAME, b)).items():
                if ours in mean and ours != k:
                    gap = paired_bootstrap(mean[ours], right, np.arange(len(right)) // 2)
                    facts[f"{name}_minus_it"] = {key: gap[key] for key in ("value", "low", "high")}
            out.append(facts)
    return sorted(out, key=lambda r: (-r["budget"], -r["accuracy"]))
