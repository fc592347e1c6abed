"""Images of prompts by a policy, row by row as tables hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from stages.core.artifacts.images import encode_png, to_pixels
from stages.core.errors import UserError
from stages.core.execution.runtime import progress
from stages.core.method.sampling import sample_latents
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Everything about sampling that changes an image."""

    sampler: str
    """'ddpm' or 'ddim' (with eta 0)."""
    num_inference_steps: int
    """Sampler steps."""
    guidance_scale: float
    """Weight of classifier-free guidance; 1 is none."""


def generate(
    model: DiffusionModel,
    denoiser: Denoiser,
    prompts: Sequence[tuple[str, str]],
    settings: SamplingSettings,
    **how: Any,
) -> Iterator[dict[str, object]]:
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
    first_batch: int = 0,
) -> Iterator[list[dict[str, object]]]:
    """One row for each image of each (prompt_id, prompt): schema images, or candidates with latents.

    The seed of an image follows from `seed_parts`, its prompt and its number alone. The batches
    before `first_batch` are left out.
    """
    unconditional = model.unconditional()
    starts = range(0, len(prompts), prompts_per_batch)[first_batch:]
    per_batch = images_per_prompt * prompts_per_batch
    for start in progress(starts, "sampling", "images", per_batch):
        batch = prompts[start : start + prompts_per_batch]
        text = model.encode_text([prompt for _, prompt in batch])
        items = [
            (name, prompt, number, seed_of(*seed_parts, name, number))
            for name, prompt in batch
            for number in range(images_per_prompt)
        ]
        latents = sample_latents(
            model,
            denoiser,
            text=text.repeat_each(images_per_prompt),
            unconditional=unconditional,
            seeds=[seed for *_, seed in items],
            sampler=settings.sampler,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        pixels = to_pixels(model.decode_latents(latents).numpy())
        flat = latents.float().cpu().flatten(start_dim=1).numpy()
        yield [
            {
                "prompt_id": name,
                "prompt": prompt,
                "candidate": number,
                "seed": seed,
                "image": {"bytes": encode_png(image), "path": None},
                **({"latents": row} if keep_latents else {}),
            }
            for (name, prompt, number, seed), image, row in zip(items, pixels, flat, strict=True)
        ]


def shard_of(items: Sequence[Item], shard: int, num_shards: int, per_batch: int) -> list[Item]:
    """Every `num_shards`-th batch of items, from number `shard`: what shares a batch, and with it how
    sums round, does not depend on the number of shards.

    UserError unless 0 <= shard < num_shards.
    """
    if not 0 <= shard < num_shards:
        raise UserError(f"--shard must be between 0 and {num_shards - 1}, found {shard}")
    starts = range(0, len(items), per_batch)[shard::num_shards]
    return [item for start in starts for item in items[start : start + per_batch]]
