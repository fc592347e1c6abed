"""Images of prompts by a policy, row by row as tables hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from stages.core.artifacts.images import PNG, ImageFiles, encode_image, to_pixels
from stages.core.errors import UserError
from stages.core.execution.ahead import threads_beside
from stages.core.execution.runtime import progress
from stages.core.method.sampling import sample_latents
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser

Item = TypeVar("Item")
Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Everything about sampling that changes an image."""

    sampler: str
    """'ddpm', 'ddim' (with eta 0) or 'dpm' (DPM-Solver++); of flow matching 'euler', 'euler_stochastic', for Sana also
    'dpm'."""
    num_inference_steps: int
    """Sampler steps."""
    guidance_scale: float
    """Weight of classifier-free guidance, 1 is none; or what a guidance-distilled model is told."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """From which share of the steps on, and up to which, there is guidance; (0, 1) is always."""


def generate(
    model: DiffusionModel,
    denoiser: Denoiser,
    prompts: Sequence[tuple[str, str]],
    settings: SamplingSettings,
    **how: Any,
) -> Iterator[Row]:
    """The rows of all batches of `generate_batches`, one after the other."""
    for batch in generate_batches(model, denoiser, prompts, settings, **how):
        yield from batch


def generate_batches(
    model: DiffusionModel,
    denoiser: Denoiser,
    prompts: Sequence[tuple[str, str]],
    settings: SamplingSettings,
    *,
    images_per_prompt: int,
    seed_parts: tuple[int | str, ...],
    prompts_per_batch: int,
    keep_latents: bool,
    files: ImageFiles = PNG,
    first_batch: int = 0,
) -> Iterator[list[Row]]:
    """One row for each image of each (prompt_id, prompt): schema images, or candidates with latents.

    The seed of an image follows from `seed_parts`, its prompt and its number alone. The batches
    before `first_batch` are left out.
    """
    starts = range(0, len(prompts), prompts_per_batch)[first_batch:]
    per_batch = images_per_prompt * prompts_per_batch
    batches = [prompts[start : start + prompts_per_batch] for start in starts]
    unconditional = model.unconditional()

    def sampled(batch: Sequence[tuple[str, str]]) -> list[Callable[[], Row]]:
        items = [
            (name, prompt, number, seed_of(*seed_parts, name, number))
            for name, prompt in batch
            for number in range(images_per_prompt)
        ]
        text = model.encode_text([prompt for _, prompt in batch])
        latents = sample_latents(
            model,
            denoiser,
            text=text.repeat_each(images_per_prompt),
            unconditional=unconditional,
            seeds=[seed for *_, seed in items],
            sampler=settings.sampler,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
        )
        images = model.decode_latents(latents).numpy()
        flat = latents.float().cpu().flatten(start_dim=1).numpy()
        return [
            partial(_row, item, image, row if keep_latents else None, files)
            for item, image, row in zip(items, images, flat, strict=True)
        ]

    yield from finished(
        (sampled(batch) for batch in progress(batches, "sampling", "images", per_batch)),
        threads_beside(model.device.type),
    )


def encode_ahead(
    model: DiffusionModel, prompts: Sequence[tuple[str, str]], prompts_per_batch: int
) -> None:
    """Where text encoders are large: encode each batch of `generate_batches`, and forget the encoders.

    To be called before the denoiser is loaded, which then has their memory.
    """
    starts = range(0, len(prompts), prompts_per_batch)
    model.encode_ahead(
        [prompt for _, prompt in prompts[start : start + prompts_per_batch]] for start in starts
    )


def finished(batches: Iterable[list[Callable[[], Row]]], num_threads: int) -> Iterator[list[Row]]:
    """The rows of each batch; threads finish a batch while the next one is made.

    Encoding an image takes time that a GPU need not wait for, and Pillow lets Python go on meanwhile.
    With 0 threads each batch is finished at once. An error in making a batch is raised after the rows
    of the batch before it.
    """
    if not num_threads:
        yield from ([finish() for finish in batch] for batch in batches)
        return
    with ThreadPoolExecutor(num_threads) as threads:
        waiting: list[Future[Row]] | None = None
        failed: Exception | None = None
        made = iter(batches)
        while True:
            try:
                batch = next(made, None)
            except Exception as error:
                batch, failed = None, error
            if waiting is not None:
                yield [row.result() for row in waiting]
            if batch is None:
                break
            waiting = [threads.submit(finish) for finish in batch]
        if failed:
            raise failed


def _row(
    item: tuple[str, str, int, int],
    image: np.ndarray,
    latents: np.ndarray | None,
    files: ImageFiles,
) -> Row:
    name, prompt, number, seed = item
    return {
        "prompt_id": name,
        "prompt": prompt,
        "candidate": number,
        "seed": seed,
        "image": {"bytes": encode_image(to_pixels(image[None])[0], files), "path": None},
        **({} if latents is None else {"latents": latents}),
    }


def shard_of(items: Sequence[Item], shard: int, num_shards: int, per_batch: int) -> list[Item]:
    """Every `num_shards`-th batch of items, from number `shard`: what shares a batch, and with it how
    sums round, does not depend on the number of shards.

    UserError unless 0 <= shard < num_shards.
    """
    if not 0 <= shard < num_shards:
        raise UserError(f"--shard must be between 0 and {num_shards - 1}, found {shard}")
    starts = range(0, len(items), per_batch)[shard::num_shards]
    return [item for start in starts for item in items[start : start + per_batch]]
