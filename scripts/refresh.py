"Run notebooks from top to bottom, two at a time, and store their outputs, cleaned by nbdev_clean."
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

root = Path(__file__).resolve().parent.parent
ENV = dict(IN_TEST="1", TQDM_DISABLE="1", ARR_PROFILE="ci", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
           PYDEVD_DISABLE_FILE_VALIDATION="1", PYTHONWARNINGS="ignore:IProgress not found",  # tqdm misses ipywidgets
           OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

_cfg = ConfigParser(delimiters=["="])
_cfg.read(root / "settings.ini", encoding="utf-8")
_flags = _cfg["DEFAULT"].get("tst_flags", "").split()
OFF = re.compile(r"^#\s*\|\s*(eval:\s*false|" + "|".join(map(re.escape, _flags)) + r")\s*$", re.M | re.I)


class Client(NotebookClient):
    "Runs a notebook as the tests do: cells marked `eval: false`, or with a flag of settings.ini, are passed over."
    async def async_execute_cell(self, cell, *args, **kwargs):
        if cell.cell_type == "code" and OFF.search(cell.source): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def run(path):
    "Execute one notebook in its own folder, and write it back with its outputs, cleaned."
    start, nb = time.perf_counter(), nbformat.read(path, 4)
    client = Client(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                    coalesce_streams=True, extra_arguments=["--log-level=ERROR"])
    try: client.execute()
    except CellExecutionError as e:
        raise SystemExit(f"{path}: a cell failed\n" + re.sub(r"\x1b\[[0-9;]*m", "", str(e))[-3000:]) from None
    nbformat.write(nb, path)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], check=True, cwd=root)
    return path, time.perf_counter() - start


def notebooks():
    "Every notebook of the course and of the labs."
    found = [p.relative_to(root) for top in ("nbs", "labs") for p in (root / top).rglob("*.ipynb")]
    return sorted(root / p for p in found if not any(o.startswith((".", "_")) or o == "out" for o in p.parts))


if __name__ == "__main__":
    os.environ.update({k: os.environ.get(k, v) for k, v in ENV.items()})
    paths = [Path(o).resolve() for o in sys.argv[1:]] or notebooks()
    with ThreadPoolExecutor(2) as pool:
        for path, seconds in pool.map(run, paths): print(f"ran {path.relative_to(root)} in {seconds:.0f} s")
