"""What `import arr_course` adds to `import torch`: fresh processes, interleaved, the difference of the medians.

The target is 50 ms for the package itself; the modules of the chapters are timed beside it, all in one process."""
import subprocess
import sys
import time

import numpy as np

from arr_course.core import provenance, write_json

MODULES = "core images positions attention vit zoo label_free masks report doctor".split()
CASES = {
    "torch": "import torch",
    "torch + arr_course": "import torch, arr_course",
    "torch + every chapter": "import torch, " + ", ".join(f"arr_course.{m}" for m in MODULES),
}


def seconds(code):
    "Wall time of a fresh interpreter that runs `code`."
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main(rounds=15):
    for code in CASES.values(): seconds(code)  # the first run reads the files from the disk
    t = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, code in CASES.items(): t[name].append(seconds(code))
    base = np.array(t["torch"])
    rows = []
    for name in list(CASES)[1:]:
        extra = (np.array(t[name]) - base) * 1e3
        boot = np.median(np.random.default_rng(0).choice(extra, (2000, rounds)), axis=1)
        rows.append(dict(case=name, over="torch", milliseconds=round(float(np.median(extra)), 1),
                         ci=[round(float(o), 1) for o in np.percentile(boot, [2.5, 97.5])]))
    for r in rows: print(f"{r['case']:24} adds {r['milliseconds']:6.1f} ms {r['ci']} to import torch")
    write_json("benchmarks/results/import_time.json", dict(
        rows=rows, torch_seconds=round(float(np.median(base)), 3), target_milliseconds=50,
        provenance=provenance("numpy", command="python benchmarks/import_time.py", rounds=rounds)))


if __name__ == "__main__": main()
