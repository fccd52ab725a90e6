"""Run the lab on its photographs and store the result with its provenance. On purpose, after a change: the tests compare with it.

python labs/label_free/refresh.py            # about 20 s; writes results/label_free.json
"""

import json
import tempfile
import time
from pathlib import Path

from arr_course.core import provenance, write_json
from arr_course.label_free import run
from arr_course.photos import sample_photos

HERE = Path(__file__).resolve().parent


def main():
    labels = [o for o in (HERE / "labels.txt").read_text(encoding="utf-8").splitlines() if o and not o.startswith("#")]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as d:
        sample_photos(d)
        result = run(d, labels, "packaged", cache=False)
    facts = provenance(
        "timm",
        "transformers",
        "scikit-learn",
        "pillow",
        command="python labs/label_free/refresh.py",
        wall_seconds=round(time.perf_counter() - start, 1),
    )
    path = write_json(
        HERE / "results" / "label_free.json", dict(labels=labels, result=result.to_dict(), provenance=facts)
    )
    print(f"{result}\nwrote {path.relative_to(HERE)}, {len(json.dumps(result.to_dict()))} characters")


if __name__ == "__main__":
    main()
