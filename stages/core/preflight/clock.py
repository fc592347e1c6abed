"""Seconds and memory of what is tried."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from stages.core.models.adapter import DiffusionModel
from stages.core.preflight.findings import Findings

GB = 1e9


def seconds(model: DiffusionModel, work: Callable[[], object]) -> float:
    """Seconds on the clock of one call, with the device's queue emptied before and after."""
    synchronise(model)
    started = time.monotonic()
    work()
    synchronise(model)
    return time.monotonic() - started


def synchronise(model: DiffusionModel) -> None:
    """Wait for the device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def memory(model: DiffusionModel, what: str, findings: Findings) -> None:
    """Note the peak of GPU memory since the last note; nothing on a CPU."""
    if model.device.type != "cuda":
        return
    peak = torch.cuda.max_memory_allocated(model.device)
    total = torch.cuda.get_device_properties(model.device).total_memory
    findings.add(
        f"GPU memory, {what}", f"{peak / GB:.1f} of {total / GB:.1f} GB", holds=peak < 0.95 * total
    )
    torch.cuda.reset_peak_memory_stats(model.device)


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what an optimizer keeps for each weight, after its first step."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values() for value in state.values()
        if isinstance(value, torch.Tensor)
    )  # fmt: skip
