"""An encoder and a VLM trained together, and what a training costs."""
import gc
import resource
import sys
import threading
import time

import torch
from torch import nn

from arr_course.learner import decay_groups


class Together(nn.Module):
    "A ViT in front of a VLM. `rate`: the ViT's learning rate as a share of the VLM's; 0: frozen."
    def __init__(self, vit, vlm, rate=0.):
        super().__init__()
        self.vit, self.vlm, self.rate = vit, vlm, rate
        self.vit.requires_grad_(rate > 0)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        "Bytes `(b, 3, h, w)` to patches `(b, n, d)`."
        with torch.set_grad_enabled(self.rate > 0 and torch.is_grad_enabled()):
            return self.vit.features(pixels.float() / 127.5 - 1).patches

    def groups(self, weight_decay: float) -> list[dict]:
        "AdamW groups: those of the VLM, and those of the ViT at its own rate."
        scaled = [g | dict(lr_scale=self.rate) for g in decay_groups(self.vit, weight_decay)] if self.rate else []
        return decay_groups(self.vlm, weight_decay) + scaled


class Cost:
    "Seconds, CPU seconds, and by how many MB the process grew at most (anonymous memory; `None` where the system does not tell)."
    def __enter__(self):
        gc.collect()
        self.first, self.end = self.now(), threading.Event()
        self.most, self.wall, self.cpu = self.first, time.perf_counter(), time.process_time()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.end.set(); self.thread.join()

    def watch(self):
        while not self.end.wait(.05): self.most = None if self.first is None else max(self.most, self.now())

    @staticmethod
    def now():
        "Megabytes of anonymous memory."
        if not sys.platform.startswith("linux"): return None
        with open("/proc/self/status", encoding="ascii") as f:
            return next((int(o.split()[1]) / 1024 for o in f if o.startswith("RssAnon")), None)

    def facts(self) -> dict:
        "What a result says of its cost. `process_mb` counts libraries and mapped files too."
        scale = 1024 if sys.platform.startswith("linux") else 1024 ** 2
        grew = None if self.first is None else round(self.most - self.first)
        return dict(seconds=round(self.wall, 1), cpu_seconds=round(self.cpu, 1), grew_mb=grew,
                    process_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale))
