"""Whole optimizer steps, and the time that a device takes for them."""

from __future__ import annotations

import time
from typing import Any

import torch

RATE = 1e-4


class Stepper:
    """Whole optimizer steps: forward, backward, clipping, AdamW."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=RATE, weight_decay=0.0, fused=True)

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, still on the device."""
        loss: torch.Tensor = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Clock:
    """Seconds between two moments of the device, read when all is done."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.ends: list[Any] = []
        self._mark()

    def _mark(self) -> None:
        if self.cuda:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def stop(self) -> Clock:
        self._mark()
        return self

    def seconds(self) -> float:
        if not self.cuda:
            return float(self.ends[1] - self.ends[0])
        self.ends[1].synchronize()
        return float(self.ends[0].elapsed_time(self.ends[1])) / 1e3
