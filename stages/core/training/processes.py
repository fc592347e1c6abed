"""The processes of one training: one, or several that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from stages.core.errors import UserError
from stages.core.models.denoiser import Denoiser
from stages.core.training.attention import leave_out_cudnn_attention

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""


def end_with_launcher() -> None:
    """Have the kernel end this process when the one that launched it ends, however that ends.

    Otherwise the workers of a killed `torchrun` train on. Does nothing for a process that no launcher
    started, and nothing outside Linux.
    """
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Processes:
    """What a training does differently when it is not alone."""

    def __init__(
        self, device: torch.device, *, trackers: tuple[str, ...] = (), folder: Path | None = None
    ) -> None:
        """UserError for a tracker that is not installed."""
        known = {tracker.value for tracker in get_available_trackers()}
        for name in trackers:
            if name not in known:
                raise UserError(
                    f"tracker {name} is not installed: pip install {name}, or leave it out"
                )
        end_with_launcher()
        if device.type == "cuda":
            leave_out_cudnn_attention()
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",  # the adapter's autocast sees to it, for the reference too
            log_with=list(trackers) or None,
            project_dir=folder,
        )
        self._device = device
        self._folder = folder
        self.has_trackers = bool(trackers)

    @property
    def device(self) -> torch.device:
        """The device of this process: the one given to it, or its own of several."""
        return self._device if self.count == 1 else self._accelerator.device

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this one, from 0."""
        return int(self._accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return bool(self._accelerator.is_main_process)

    def wrap(self, denoiser: Denoiser) -> None:
        """Have the denoiser's gradients averaged over all processes."""
        if self.count > 1:
            denoiser.forward = self._accelerator.prepare_model(denoiser.network)

    def unwrap(self, denoiser: Denoiser) -> None:
        """Undo `wrap`."""
        denoiser.forward = denoiser.network

    def without_averaging(self, denoiser: Denoiser) -> AbstractContextManager[Any]:
        """Where gradients are only added up, for all micro-batches but the last."""
        if self.count == 1:
            return nullcontext()
        return self._accelerator.no_sync(denoiser.forward)

    def share(self, num_items: int) -> slice:
        """The part of a batch for this process. UserError unless all parts are equally long."""
        if num_items % self.count:
            raise UserError(
                f"batch_pairs is {num_items}, which {self.count} processes cannot share equally; "
                f"make it a multiple of {self.count}"
            )
        size = num_items // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each value over all processes."""
        if self.count == 1:
            return {name: float(value.detach()) for name, value in values.items()}
        stacked = torch.stack([value.detach().float() for value in values.values()])
        reduced = self._accelerator.reduce(stacked, reduction="mean")
        return dict(zip(values, reduced.tolist(), strict=True))

    def wait(self) -> None:
        """Go on when all have come this far."""
        self._accelerator.wait_for_everyone()

    def start_trackers(self, name: str, settings: Mapping[str, Any]) -> None:
        """Begin a run in TensorBoard or W&B, where asked for."""
        if self.has_trackers:
            plain = {
                key: value if isinstance(value, int | float | str | bool) else str(value)
                for key, value in settings.items()
            }
            options = {}
            if self._folder is not None:  # W&B writes to the working directory otherwise
                self._folder.mkdir(parents=True, exist_ok=True)
                options = {"wandb": {"dir": str(self._folder)}}
            self._accelerator.init_trackers(name, config=plain, init_kwargs=options)

    def track(self, values: Mapping[str, float | int], step: int) -> None:
        """Send a step's values to the trackers."""
        if self.has_trackers:
            self._accelerator.log(dict(values), step=step)

    def end_trackers(self) -> None:
        """Flush and close them."""
        if self.has_trackers:
            self._accelerator.end_training()
