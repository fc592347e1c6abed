"""Optimizers by name, with the settings of the published Diffusion-DPO recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from stages.core.errors import UserError

OptimizerName = Literal["adamw", "adamw8bit", "adafactor"]


def make_optimizer(
    name: OptimizerName,
    parameters: Sequence[torch.nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer; its learning rate is set again at every step.

    adamw is torch's, fused on CUDA; adamw8bit is bitsandbytes's (UserError if it is not installed);
    adafactor is as in Diffusion-DPO's SDXL recipe: no relative step, no scaling by the parameters.
    """
    if name == "adamw":
        is_fused = True if parameters[0].is_cuda else None
        return torch.optim.AdamW(
            parameters, lr=learning_rate, weight_decay=weight_decay, fused=is_fused
        )
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    if name == "adamw8bit":
        return _adamw8bit(parameters, learning_rate, weight_decay)
    raise UserError(f"optimizer is {name!r}; expected adamw, adamw8bit or adafactor")


def _adamw8bit(
    parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or choose adamw or adafactor"
        ) from error
    return AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
