"""What one nearest-neighbour query costs as a folder grows to 100,000 images: exact search against approximate indexes.

    python benchmarks/neighbours.py            # about 2 minutes, one thread; writes results/neighbours.json and .png

The vectors are synthetic (`vectors` says how). How well an approximate index does depends on them: tight clusters that
have nothing to do with each other are its worst case, and the tuned index of `find_neighbours` then looks into nearly
every cell to keep its recall.
"""

import argparse
import os
import statistics
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from arr_course.core import atomic_path, provenance, write_json
from arr_course.neighbours import find_neighbours, recall, tune_index, unit_rows

HERE = Path(__file__).resolve().parent
K = 3


def vectors(n, e, clusters=300, inner=32, spread=0.8, noise=0.15, seed=0):
    "Synthetic embeddings: overlapping clusters on a 32-dimensional sheet in e dimensions, and a little noise. (n, e), unit rows."
    fixed, r = np.random.default_rng(7), np.random.default_rng(seed)
    centres, basis = fixed.normal(size=(clusters, inner)), fixed.normal(size=(inner, e)) / inner**0.5
    z = centres[r.integers(clusters, size=n)] + spread * r.normal(size=(n, inner))
    return unit_rows((z @ basis + noise * r.normal(size=(n, e))).astype(np.float32))


def build(method, x):
    "A function from queries (q, e) to the numbers (q, K) of their nearest rows of x, and the seconds that building it took."
    start, (n, e) = time.perf_counter(), x.shape
    if method == "sklearn, exact":
        knn = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(x)
        return lambda q: knn.kneighbors(q, return_distance=False), time.perf_counter() - start
    if method == "faiss flat, exact":
        index = faiss.IndexFlatIP(e)
    elif method == "faiss HNSW":
        index = faiss.IndexHNSWFlat(e, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 40, 48
    else:
        cells = max(1, int(min(4 * n**0.5, n / 39)))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(e), e, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 0
        index.train(x[np.random.default_rng(0).permutation(n)[: 64 * cells]])
    index.add(x)
    if method == "faiss IVF":
        tune_index(index, x, K)
    return lambda q: index.search(q, K)[1], time.perf_counter() - start


METHODS = "sklearn, exact", "faiss flat, exact", "faiss IVF", "faiss HNSW"


def measure(n, e, queries, rounds):
    "One row a method: microseconds a query (median over interleaved rounds), recall@3, seconds to build."
    both = vectors(n + queries, e)  # queries come from the same distribution, and are not in the folder
    x, q = both[:n], both[n:]
    search = {m: build(m, x) for m in METHODS}
    truth, times = search["faiss flat, exact"][0](q), {m: [] for m in METHODS}
    for _ in range(rounds):
        for m, (f, _) in search.items():
            start = time.perf_counter()
            f(q)
            times[m].append((time.perf_counter() - start) / queries * 1e6)
    return [
        dict(
            method=m,
            n=n,
            microseconds=round(statistics.median(times[m]), 1),
            recall=round(recall(f(q), truth), 4),
            build_seconds=round(s, 2),
        )
        for m, (f, s) in search.items()
    ]


class Peak:
    "The largest resident memory above the start, in bytes, sampled every 5 ms by a thread (`/proc`, so Linux only)."

    def __enter__(self):
        self.start, self.bytes, self.stop = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    @staticmethod
    def now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch(self):
        while not self.stop.wait(0.005):
            self.bytes = max(self.bytes, self.now() - self.start)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def whole_folder(n, e):
    "`find_neighbours` on n images: seconds, method, recall, and the memory that it took, in units of the vectors' own size."
    x = vectors(n, e, seed=1)
    with Peak() as peak:
        start = time.perf_counter()
        found = find_neighbours(x, K)
        seconds = time.perf_counter() - start
    return dict(
        n=n,
        method=found.method,
        recall=round(found.recall, 4),
        seconds=round(seconds, 1),
        peak_over_vectors=round(peak.bytes / x.nbytes, 2),
        full_matrix_over_vectors=round(n * n * 4 / x.nbytes, 1),
    )


def draw(rows, path):
    "The curve, small, for the lab's page."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 4), dpi=72)
    for m, style in zip(METHODS, ("o-", "s-", "^-", "D-"), strict=True):
        mine = [r for r in rows if r["method"] == m]
        ax.plot(
            [r["n"] for r in mine],
            [r["microseconds"] for r in mine],
            style,
            label=f"{m} (recall {mine[-1]['recall']:.2f})",
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="images in the folder",
        ylabel="microseconds a query",
        title="Cost of one query, one thread",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000])
    p.add_argument("--dim", type=int, default=384)
    p.add_argument("--queries", type=int, default=200)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=HERE / "results")
    a = p.parse_args()
    threadpool_limits(1)  # one thread for every method
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    start, folder = time.perf_counter(), whole_folder(max(a.sizes), a.dim)  # first: it measures the peak of memory
    print(f"{'method':20}{'n':>9}{'us a query':>13}{'recall@3':>10}{'build, s':>10}")
    rows = []
    for n in a.sizes:
        rows += measure(n, a.dim, a.queries, a.rounds)
        for r in rows[-len(METHODS) :]:
            print(f"{r['method']:20}{n:9,}{r['microseconds']:13.1f}{r['recall']:10.3f}{r['build_seconds']:10.2f}")
    print(
        f"whole folder of {folder['n']:,}: {folder['method']}, {folder['seconds']} s, recall {folder['recall']:.3f}, peak memory "
        f"+{folder['peak_over_vectors']} x the vectors (all pairs would be {folder['full_matrix_over_vectors']} x)"
    )
    write_json(
        a.out / "neighbours.json",
        dict(
            rows=rows,
            whole_folder=folder,
            dim=a.dim,
            queries=a.queries,
            rounds=a.rounds,
            k=K,
            **provenance(
                "faiss-cpu",
                "scikit-learn",
                "numpy",
                seed=0,
                command="python benchmarks/neighbours.py",
                wall_seconds=round(time.perf_counter() - start, 1),
            ),
        ),
    )
    draw(rows, a.out / "neighbours.png")


if __name__ == "__main__":
    main()
