"""Diffusion models behind one small interface: encode, noise, predict, decode.

Every line that knows one model family lives in its adapter; a new family is a new module here and a
line in `ADAPTERS`. An adapter is imported when a model asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stages.core.models.adapter import DiffusionModel
from stages.core.models.loading import ModelError, ModelSettings, Source
from stages.core.models.stable_diffusion import StableDiffusion
from stages.core.models.stable_diffusion_xl import StableDiffusionXL


def _stable_diffusion_3() -> type[DiffusionModel]:
    from stages.core.models.stable_diffusion_3 import StableDiffusion3

    return StableDiffusion3


def _flux() -> type[DiffusionModel]:
    from stages.core.models.flux import Flux

    return Flux


def _sana() -> type[DiffusionModel]:
    from stages.core.models.sana import Sana

    return Sana


ADAPTERS: dict[str, Callable[[], type[DiffusionModel]]] = {
    "StableDiffusionPipeline": lambda: StableDiffusion,
    "StableDiffusionXLPipeline": lambda: StableDiffusionXL,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "SanaPipeline": _sana,
}
"""The adapter of each pipeline class that a model's model_index.json can name."""


def load_model(settings: ModelSettings, *, device: torch.device) -> DiffusionModel:
    """The adapter for a model, in whose arithmetic this process goes on.

    ModelError if it is of a family that has none, or of another than the settings name.
    """
    use_arithmetic(settings)
    source = Source(settings)
    pipeline = source.pipeline_class()
    if pipeline not in ADAPTERS:
        raise ModelError(
            f"{settings.base} is a {pipeline}; supported are {', '.join(ADAPTERS)}. A new family is "
            "one adapter in stages/core/models."
        )
    adapter = ADAPTERS[pipeline]()
    if settings.family not in (None, adapter.family):
        raise ModelError(
            f"model.family is {settings.family}, but {settings.base} is of {adapter.family} ({pipeline}); name "
            "the other one, or leave it out"
        )
    return adapter(source, device=device)


def use_arithmetic(settings: ModelSettings) -> None:
    """Say to torch whether it may multiply in TF32; by itself it does so in convolutions."""
    is_allowed = settings.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed


@contextmanager
def arithmetic_of(settings: ModelSettings) -> Iterator[None]:
    """Multiply as one model asks, and afterwards as before: for a second model of the same process."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    use_arithmetic(settings)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
