"""What `import arr_course` adds to `import torch`: timed after torch, inside fresh interpreters, in turns.

The target is 50 ms for the package itself; the modules of all chapters are timed beside it."""
import subprocess
import sys

import numpy as np

from arr_course.core import provenance, write_json

MODULES = "core images positions attention vit vit_convert zoo label_free masks report doctor".split()
CASES = {"torch + arr_course": "import arr_course",
         "torch + every chapter": "import " + ", ".join(f"arr_course.{m}" for m in MODULES)}


def milliseconds(code):
    "How long `code` takes in a fresh interpreter that has already imported torch."
    timed = f"import torch, time; t = time.perf_counter(); {code}; print((time.perf_counter() - t) * 1e3)"
    return float(subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True).stdout)


def main(rounds=15):
    for code in CASES.values(): milliseconds(code)  # the first run reads the files from the disk
    t = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, code in CASES.items(): t[name].append(milliseconds(code))
    rows = []
    for name, ms in t.items():
        boot = np.median(np.random.default_rng(0).choice(ms, (2000, rounds)), axis=1)
        rows.append(dict(case=name, milliseconds=round(float(np.median(ms)), 1),
                         ci=[round(float(o), 1) for o in np.percentile(boot, [2.5, 97.5])]))
    for r in rows: print(f"{r['case']:24} adds {r['milliseconds']:6.1f} ms {r['ci']} to import torch")
    write_json("benchmarks/results/import_time.json", dict(
        rows=rows, target_milliseconds=50,
        provenance=provenance("numpy", command="python benchmarks/import_time.py", rounds=rounds)))


if __name__ == "__main__": main()
