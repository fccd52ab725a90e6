"""pytest --nbval over notebooks that nbdev cleans. Kernels inherit this environment."""
import os
import re
from configparser import ConfigParser
from pathlib import Path

os.environ.setdefault("IN_TEST", "1")  # nbdev_export() in a notebook returns at once: workers must not rewrite modules
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("ARR_PROFILE", "ci")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm misses ipywidgets, which nothing here needs
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
# two workers on two cores; and one thread sums in one order, so that printed numbers repeat
for o in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[o] = "1"

_cfg = ConfigParser(delimiters=["="])
_cfg.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
_flags = _cfg["DEFAULT"].get("tst_flags", "").split()
_off = re.compile(r"^#\s*\|\s*(eval:\s*false|" + "|".join(map(re.escape, _flags)) + r")\s*$", re.M | re.I)


def pytest_itemcollected(item):
    cell = getattr(item, "cell", None)
    if cell is None or cell.get("cell_type") != "code": return
    # nbdev_clean drops execution counts, which nbval reads as "never run": put one back, in memory only
    if cell.get("execution_count") is None: cell["execution_count"] = 0
    # the cells that nbdev_test skips, nbval skips too
    if _off.search(cell.source): item.options["skip"] = True
