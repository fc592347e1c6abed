"""A training's steps, with progress lines and a saved state from which the same command goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("training_loop")


class Loop:
    """Steps with a progress line, a gradient clip, and a saved state to continue from."""

    def __init__(
        self,
        path: Path,
        num_steps: int,
        modules: Sequence[torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        *,
        save_every: int,
    ) -> None:
        """Continue from the state at `path`, where there is one."""
        self.path, self.num_steps, self.save_every = path, num_steps, save_every
        self.modules, self.optimizer, self.schedule = modules, optimizer, schedule
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.step, self.seconds, self.recent = 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []
        if path.exists():
            state = torch.load(path, weights_only=True)
            for module, weights in zip(modules, state["modules"], strict=True):
                module.load_state_dict(weights)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            self.step, self.seconds, self.recent = state["step"], state["seconds"], state["recent"]
            self.history = state["history"]
            log.info("%s: continuing at step %d", path.stem, self.step)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to do; saves the state on the way."""
        while self.step < self.num_steps:
            start = time.monotonic()
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - start
            if self.step % 100 == 0:
                rate = self.step / self.seconds
                left = (self.num_steps - self.step) / rate / 60
                log.info(
                    "%s: step %d of %d, error %.4f, %.1f steps/s, %.0f min left",
                    self.path.stem, self.step, self.num_steps, self.recent, rate, left,
                )  # fmt: skip
            if self.step % self.save_every == 0 or self.step == self.num_steps:
                self.save()

    def update(self, loss: Tensor, error: float) -> None:
        """One optimizer step on the loss; `error` is what the progress line shows."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.recent = error if self.step == 0 else 0.99 * self.recent + 0.01 * error

    def note(self, **measured: float) -> None:
        """Keep what was measured after the present step, and say it."""
        row = {"num_steps": self.step + 1, "error": round(self.recent, 5), **measured}
        self.history.append(row)
        log.info("%s: %s", self.path.stem, ", ".join(f"{k} {v:g}" for k, v in row.items()))

    def save(self) -> None:
        """Write the whole state beside its place, then move it there."""
        state: dict[str, Any] = {
            "modules": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "recent": self.recent,
            "history": self.history,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def record(self, name: str) -> dict[str, float]:
        """Steps, seconds and the running mean of the error at the end."""
        return {
            "num_steps": self.step,
            "seconds": round(self.seconds),
            name: round(self.recent, 5),
        }
