"""Which of torch's attention kernels a training on a GPU goes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def leave_out_cudnn_attention() -> None:
    """Have this process attend by torch's other kernels, forward and backward.

    Since 2.11 torch takes cuDNN's by itself on Hopper and Blackwell. Its backward pass made gradients NaN there
    (pytorch/pytorch#196678), and the first training of FLUX.1 ended in an illegal memory access (benchmarks/gpu.md).
    Older versions do not take it. Sampling and scoring have no backward pass and keep it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """The same for a while: where a step of a training is tried."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    leave_out_cudnn_attention()
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
