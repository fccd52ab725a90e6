"""From selection to first word without padding: milliseconds by stage, packed against padded, selection against memory.

    python benchmarks/packed.py            # about a minute on one thread of a CPU; writes results/packed.json
    python benchmarks/packed.py --quick    # a few small rounds, to see that it works; nothing is stored

It runs on the best device at hand. Ways that are compared take turns within a round, so that a neighbour on the machine disturbs
all alike; reported are medians over rounds, and of ratios the median with a bootstrap 95 % interval. On one thread of a CPU the
clock counts the seconds in which that thread worked; on a GPU the queue is emptied before the clock is read."""
import argparse
import os
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from arr_course import packed
from arr_course.arr import alike, arr_2
from arr_course.bench import by_length, clock, counted, smollm2, taken
from arr_course.connectors import keep
from arr_course.core import device, provenance, set_seed, write_json
from arr_course.relevance import look
from arr_course.select import facility_location
from arr_course.vit import Features
from arr_course.vlm import VLM, VLMConfig, load_vlm, read_picture
from arr_course.vqa_evaluate import Exam
from arr_course.world import render

GRID, N = (24, 24), 576


def alternate(ways, rounds):
    "Seconds of each way, name -> (rounds,); they take turns, in alternating order. One round before does not count."
    now, seen = clock(), {k: [] for k in ways}
    for r in range(rounds + 1):
        for k in list(ways)[::1 if r % 2 else -1]:
            start = now()
            ways[k]()
            if r: seen[k].append(now() - start)
    return seen


def median(seconds): return 1e3 * statistics.median(seconds)


def interval(ratios, n=2000):
    "Median and bootstrap 95 % interval of the median."
    draws = np.random.default_rng(0).choice(ratios, (n, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return dict(median=round(statistics.median(ratios), 3), low=round(float(low), 3), high=round(float(high), 3))


def budgets(b, low=64, high=400):
    "Unequal budgets, even on a logarithmic scale, in any order: `(b,)`."
    spread = np.exp(np.linspace(np.log(low), np.log(high), b)) if b > 1 else np.array([np.sqrt(low * high)])
    return torch.from_numpy(np.random.default_rng(0).permutation(spread.round().astype(int)))


def see(encoder, x, questions, dtype):
    "Encode pictures and questions."
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16): return look(encoder, x, questions)


def choose(context, k):
    "ARR-2 at these budgets `(b,)`: weights, similarities, greedy order, and what is kept."
    select = arr_2() if context.patches.device.type == "cpu" else packed.on_device(arr_2())
    return select.kept(context, select.gains(context, int(k.max()))[0], k)


def by_stage(assistant, batches, rounds, dtype):
    "Encode picture and question, select with ARR-2 at mixed budgets, read the tokens packed: milliseconds a picture."
    encoder, reader, out = assistant.encoder, reader_of(assistant.model, dtype), []
    items = list(Exam("dense", max(4, *batches), 5, split="val").items())
    images, questions = [render(i.scene) for i in items], [i.question.text for i in items]
    for b in batches:
        k, look_at = budgets(b), partial(see, encoder, encoder.pixels(images[:b]), questions[:b], dtype)
        c = look_at()
        read = partial(packed.read_packed, reader, typed(choose(c, k), dtype))
        ways = dict(encode=look_at, select=partial(choose, c, k), prefill=read)
        ms = {f"{w}_ms": round(median(v) / b, 3) for w, v in alternate(ways, rounds).items()}
        out.append(dict(batch=b, mean_tokens=mean(k), path=packed.best_path(encoder.device, dtype)) | ms)
        print(f"batch {b:3}: " + ", ".join(f"{w} {v:8.3f}" for w, v in ms.items()) + " a picture", flush=True)
    return out


def mean(k): return round(float(k.double().mean()), 1)


def typed(s, dtype): return type(s)(s.tokens.to(dtype), s.lengths, s.index, s.pos, s.size, s.grid)


def reader_of(model, dtype):
    "A copy of a VLM in another type."
    other = VLM(model.cfg).to(model.decoder.embed.weight.device, dtype).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


def every(read, model, parts, *args):
    "Read one batch after the other."
    for s in parts: read(model, s, *args)


def packing(name, model, pictures, batch, rounds, dtype):
    "The same pictures read in padded batches, in batches of similar length, and packed by each way that runs here."
    where, k = model.decoder.embed.weight.device, budgets(pictures)
    f = Features(torch.randn(pictures, N, model.cfg.in_dim, device=where, dtype=dtype), GRID)
    s = keep(f, [torch.randperm(N)[:n] for n in k.tolist()])
    anyhow = [taken(s, b.tolist()) for b in torch.arange(pictures).split(batch)]
    sorted_ = [taken(s, b) for b in by_length(k, 288 * batch, batch)]
    ways = {"padded": partial(every, read_picture, model, anyhow), "by length": partial(every, read_picture, model, sorted_)}
    paths = [p for p, why in packed.attention_paths(where, dtype).items() if not why and (p != "flex" or where.type == "cuda")]
    ways |= {f"packed, {p}": partial(every, packed.read_packed, model, anyhow, p) for p in paths}
    macs = {w: counted(ways[w]) for w in ("padded", "by length", "packed, loop")}       # all packed ways do the same work
    t, out = alternate(ways, rounds), []
    for w, v in t.items():
        r, work = ratios(v, t["padded"]), macs.get(w, macs["packed, loop"]) / macs["padded"]
        out.append(dict(decoder=name, way=w, pictures=pictures, batch=batch, mean_tokens=mean(k),
                        ms_a_picture=round(median(v) / pictures, 3), time_to_padded=r, work_to_padded=round(work, 3)))
        print(f"{name:13} {w:14} {median(v) / pictures:9.3f} ms a picture, {r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}] "
              f"of padded; work {work:.3f}", flush=True)
    return out


def ratios(one, other): return interval([a / b for a, b in zip(one, other, strict=True)])


def bandwidth(where, rounds, mib=256):
    "Bytes a second at which a sum reads an array that no cache holds."
    x = torch.ones(mib * 2**18, device=where)
    return x.nbytes / statistics.median(alternate({"sum": x.sum}, rounds)["sum"])


def forms(sim, weight, k):
    "The greedy choice in each form that runs where the similarities are: name -> function."
    ways, where = {"batched": partial(facility_location, sim, weight, k, batched=True)}, sim.device
    if where.type == "cpu": ways["numpy, lazy"] = partial(facility_location, sim, weight, k)
    if why := packed.compiler(str(where)):
        print("not compiled:", why)
        return ways
    chosen = partial(packed.greedy_choice, k=k, step=packed.compiled_step())
    ways["compiled"] = partial(chosen, sim, weight)
    if where.type == "cuda": ways["compiled, graph"] = partial(packed.graphed(chosen, sim, weight), sim, weight)
    return ways


def selection(where, batches, k, rounds, speed):
    "Greedy choice of k patches in each form, against the time in which memory can deliver the similarities."
    out = []
    for b in batches:
        sim = alike(SimpleNamespace(patches=torch.randn(b, N, 192, device=where), n=N))
        t, bound = alternate(forms(sim, torch.rand(b, N, device=where), k), rounds), packed.selection_bound(b, N, k, speed)
        for w, v in t.items():
            times = statistics.median(v) / bound
            out.append(dict(batch=b, k=k, way=w, ms_a_picture=round(median(v) / b, 3),
                            bound_ms_a_picture=round(1e3 * bound / b, 3),
                            times_the_bound=round(times, 2), time_to_batched=ratios(v, t["batched"])))
            print(f"batch {b:3}, {w:16} {median(v) / b:8.3f} ms a picture, {times:5.2f} times the bound", flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", type=int, nargs="+", help="default: 1 8 64, on a CPU 1 4 16")
    p.add_argument("--pictures", type=int, help="read packed and padded, in batches of 8; default: 256, on a CPU 32")
    p.add_argument("--rounds", type=int, help="default: 20, on a CPU 7")
    p.add_argument("--k", type=int, default=64, help="patches that the greedy choice takes")
    p.add_argument("--quick", action="store_true", help="a few small rounds, to see that it works; nothing is stored")
    p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "packed.json")
    a = p.parse_args()
    where = device()
    small = where.type == "cpu"
    if small: torch.set_num_threads(1)
    a.batches = a.batches or ([1, 4, 16] if small else [1, 8, 64])
    a.pictures, a.rounds = a.pictures or (32 if small else 256), a.rounds or (7 if small else 20)
    if a.quick: a.batches, a.pictures, a.rounds, a.k = [1, 2], 8, 2, 16
    set_seed(0)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32      # varlen wants half precision
    assistant = load_vlm("arr/vlm-mlp", where)
    print(f"{where}, {dtype}; attention: {packed.attention_paths(where, dtype)}")
    about = dict(rounds=a.rounds, provenance=provenance(seed=0, command="python benchmarks/packed.py"))
    paths, why = packed.attention_paths(where, dtype), packed.compiler(str(where))
    found = dict(dtype=str(dtype).removeprefix("torch."), attention_paths=paths, compiler=why)

    def keep_part(**part):
        "Each part is stored when it is done: a later one may take longer than there is time."
        found.update(part)
        if not a.quick: write_json(a.out, found | about)

    keep_part(stages=by_stage(assistant, a.batches, a.rounds, dtype))
    speed = bandwidth(where, a.rounds)
    print(f"a sum reads {speed / 1e9:.1f} GB/s")
    keep_part(bandwidth_gb_s=round(speed / 1e9, 1), selection=selection(where, a.batches, a.k, a.rounds, speed))
    keep_part(packed=packing("vlm-mlp", reader_of(assistant.model, dtype), a.pictures, 8, a.rounds, dtype))
    if not small and not a.quick:               # the shape of a language model that people use, with random weights
        c = smollm2()
        shape = {k: getattr(c, k) for k in ("embed_dim", "depth", "num_heads", "num_kv_heads", "mlp_dim", "rope_theta")}
        large = VLM(VLMConfig(words=assistant.model.cfg.words, decoder=shape)).to(where, dtype).eval().requires_grad_(False)
        keep_part(packed=found["packed"] + packing("smollm2-135m", large, a.pictures, 8, a.rounds, dtype))
    if not a.quick: print("wrote", os.path.relpath(a.out))


if __name__ == "__main__": main()
