"""The learner as its users run it: launched, killed, continued, on two processes, with damaged files."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arr_course.learner import Learner, TrainConfig
from arr_course.runs import CheckpointError, checkpoints, newest, read_log

root = Path(__file__).resolve().parent.parent
SCRIPT = '''
import atexit, os, sys, time, torch, numpy as np
from pathlib import Path
from torch import nn
from arr_course.learner import Learner, TrainConfig

class Data:
    "Generated from the index alone."
    def __len__(self): return 10**9
    def __getitem__(self, i):
        x = np.random.default_rng(i).standard_normal((8, 8)).astype(np.float32)
        return dict(x=x, y=np.int64(x.sum() > 0))

class Net(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(drop),
                                  nn.Linear(32, 2))
        self.teacher = nn.Linear(64, 32).requires_grad_(False)           # a frozen part that the steps move
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x): return self.body(x)

def loss_fn(model, batch):
    z = model(batch["x"])
    return nn.functional.cross_entropy(z, batch["y"]), dict(right=(z.argmax(-1) == batch["y"]).float().mean())

def after_step(model, step):
    model.seen += 1
    model.teacher.weight.lerp_(model.body[1].weight.detach(), 0.1)
    time.sleep(float(sys.argv[4]))

def make(out, steps, drop=0.0):
    torch.manual_seed(0)
    cfg = TrainConfig(steps, 32, lr=1e-2, warmup=5, ema=0.9, accumulate=2, precision="bf16", log_every=7, save_every=5)
    return Learner(Net(drop), loss_fn, Data(), cfg, out, after_step)

if __name__ == "__main__":
    atexit.register(lambda: Path(sys.argv[1], f"threads-{os.environ.get('RANK', 0)}").write_text(
        " ".join(p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm"))))
    learner = make(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    learner.fit()
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("learner") / "train.py"
    path.write_text(SCRIPT)
    return path


def command(script, out, *how, steps=40, drop=0.0, sleep=0.0):
    env = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    env = {k: v for k, v in env.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return dict(args=[sys.executable, *how, str(script), str(out), str(steps), str(drop), str(sleep)], env=env)


def launch(script, out, *how, **kwargs):
    done = subprocess.run(**command(script, out, *how, **kwargs), timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return state(out)


def state(out):
    "Weights, averages and log of a finished run, and its manifest."
    folder = newest(out)
    log = [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in read_log(out / "log.jsonl")]
    return load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors"), log, \
        json.loads((folder / "manifest.json").read_text())


def test_killed_and_continued_equals_uninterrupted(script, tmp_path):
    "SIGKILL at any moment; the run that continues ends with the same bits: weights, averages, frozen parts, buffers, log."
    whole = launch(script, tmp_path / "whole", drop=0.2)
    out = tmp_path / "killed"
    process = subprocess.Popen(**command(script, out, drop=0.2, sleep=0.2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while len(checkpoints(out)) < 2 and time.monotonic() < end: time.sleep(0.05)
    process.send_signal(signal.SIGKILL); process.wait()
    stopped = json.loads((newest(out) / "manifest.json").read_text())["step"]
    assert 10 <= stopped < 40, "it was not interrupted in the middle"
    again = launch(script, out, drop=0.2)
    for a, b in zip(whole[:2], again[:2], strict=True): assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert whole[2] == again[2] and again[3]["step"] == 40
    assert whole[0]["seen"] == 40 and len(checkpoints(out)) == 2


@pytest.mark.parametrize("how", [
    ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
     "--dynamo_backend", "no", "--main_process_port", "0"),
], ids=["torchrun", "accelerate"])
def test_two_processes_equal_one(script, tmp_path, how):
    "The same global batch, the same weights up to rounding."
    if torch.cuda.is_available(): pytest.skip("a CPU test: with GPUs each process would take one")
    one = launch(script, tmp_path / "one", steps=20)
    two = launch(script, tmp_path / "two", *how, steps=20)
    assert (one[3]["processes"], two[3]["processes"]) == (1, 2)
    for rank in (0, 1):  # a thread of the group that outlives it may bring the process down at exit, now and then
        assert "gloo" not in (tmp_path / "two" / f"threads-{rank}").read_text()
    for a, b in zip(one[:2], two[:2], strict=True):
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-3
    for a, b in zip(one[2], two[2], strict=True):
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) < 2e-3 and abs(a["right"] - b["right"]) < 0.02


class Ones:
    def __len__(self): return 10
    def __getitem__(self, i): return torch.ones(3) * i


def small(out, **changes):
    torch.manual_seed(0)
    cfg = TrainConfig(**dict(dict(steps=6, batch_size=2, save_every=2, log_every=1, precision="no", ema=0.5), **changes))
    return Learner(torch.nn.Linear(3, 1), lambda m, x: m(x).square().mean(), Ones(), cfg, out)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "ema.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, name, how):
    expected = small(None).fit()
    small(tmp_path).fit(until=4)
    path = tmp_path / "step-00000004" / name
    data = bytearray(path.read_bytes())
    if how == "flipped": data[-1] ^= 1
    path.write_bytes(data[:-10] if how == "cut" else data)
    if how == "gone": path.unlink()
    learner = small(tmp_path)
    told = rf"step-00000004/{name} is (damaged|missing).*Going back to step-00000002"
    with pytest.warns(UserWarning, match=told): rows = learner.fit()
    assert [r["loss"] for r in rows] == [r["loss"] for r in expected]


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    small(tmp_path).fit(until=4)
    for folder in checkpoints(tmp_path): (folder / "manifest.json").write_text("{")
    told = "step-00000004/manifest.json.*step-00000002/manifest.json.*delete these folders"
    with pytest.raises(CheckpointError, match=told): small(tmp_path).fit()


def test_unfinished_checkpoint_does_not_count(tmp_path):
    small(tmp_path).fit(until=4)
    (tmp_path / "step-00000004/manifest.json").unlink()
    learner = small(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.start()
    assert learner.step == 2 and [r["step"] for r in learner.logs] == [1, 2]


def test_another_run_is_refused_and_a_longer_one_is_not(tmp_path):
    small(tmp_path).fit()
    with pytest.raises(ValueError, match="lr was 0.001, now 0.1.*another `out`"): small(tmp_path, lr=0.1).fit()
    longer = small(tmp_path, steps=8)
    assert [r["step"] for r in longer.fit()] == list(range(1, 9))


def test_finished_run_is_not_trained_again(tmp_path):
    before = small(tmp_path).fit()
    stamp = (newest(tmp_path) / "manifest.json").stat().st_mtime_ns
    assert small(tmp_path).fit() == before and (newest(tmp_path) / "manifest.json").stat().st_mtime_ns == stamp


def test_optimizer_file_holds_no_code(tmp_path):
    "A checkpoint from a stranger cannot run anything: the file is read with `weights_only=True`."
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path / "ran",))
    small(tmp_path).fit(until=2)
    folder = newest(tmp_path)
    torch.save(dict(optimizer=Evil(), recent={}), folder / "optimizer.pt")
    info = json.loads((folder / "manifest.json").read_text())
    from arr_course.core import sha256, write_json
    info["sha256"]["optimizer.pt"] = sha256(folder / "optimizer.pt")
    write_json(folder / "manifest.json", info)
    with pytest.raises(Exception, match="(?i)weights.only"): small(tmp_path).fit()
    assert not (tmp_path / "ran").exists()


def test_nan_names_the_step_and_is_never_saved(tmp_path):
    class Bad(Ones):
        def __getitem__(self, i): return torch.full((3,), float("nan")) if i == 5 else super().__getitem__(i)
    learner = small(tmp_path)
    learner.batches.dataset = Bad()
    with pytest.raises(FloatingPointError, match="loss is nan in step 3"): learner.fit()
    assert learner.step == 2 and all(p.isfinite().all() for p in learner.model.parameters())
    assert newest(tmp_path).name == "step-00000002"
