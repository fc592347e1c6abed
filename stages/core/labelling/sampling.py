"""Images that are made for a labelling, as sample_candidates makes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

from stages.core.artifacts.kept_rows import write_batches
from stages.core.artifacts.provenance import policy_files, policy_name
from stages.core.artifacts.schemas import CANDIDATES
from stages.core.artifacts.tables import num_rows, read_metadata
from stages.core.data.prompts import prompt_id, read_prompts
from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, log
from stages.core.models.loading import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What decides the images."""

    model: ModelSettings
    policy: str
    """A policy folder, or 'base'."""
    images_per_prompt: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int


def sample(
    path: Path, prompts_file: Path, sampling: Sampling, *, prompts_per_batch: int, threads: int
) -> None:
    """Write the candidates of some prompts, or leave those of an earlier call as they are.

    A call that was stopped is continued. UserError if other images are there.
    """
    prompts = read_prompts(prompts_file)
    arguments = asdict(sampling) | {
        "policy": policy_name(sampling.policy),
        "prompts": _digest(prompts),
    }
    if path.is_file():
        found = read_metadata(path).get("arguments")
        if found != json.loads(json.dumps(arguments)):
            raise UserError(
                f"{path} holds images of other prompts, or of another model or setting: it has {found}, "
                f"expected {arguments}. Name another folder with --labels, or label these with --images "
                f"{path}."
            )
        log.info("label: the %d images of %s are there", num_rows(path), path)
        return
    # These bring torch, which nobody waits for whose images are there.
    from stages.core.models.families import load_model
    from stages.core.policies.generation import SamplingSettings, encode_ahead, generate_batches
    from stages.core.policies.loading import load_denoiser

    model = load_model(sampling.model, device=choose_device(threads))
    named = [(prompt_id(prompt), prompt) for prompt in prompts]
    encode_ahead(model, named, prompts_per_batch)
    batches = partial(
        generate_batches,
        model,
        load_denoiser(model, sampling.policy),
        named,
        SamplingSettings(
            sampler=sampling.sampler,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        ),
        images_per_prompt=sampling.images_per_prompt,
        seed_parts=(sampling.seed, "label"),
        prompts_per_batch=prompts_per_batch,
        keep_latents=True,
    )
    write_batches(
        path, lambda first: batches(first_batch=first), CANDIDATES, stage="label",
        arguments=arguments, inputs=[prompts_file, *policy_files(sampling.policy)],
    )  # fmt: skip


def _digest(prompts: Sequence[str]) -> str:
    return blake2b("\n".join(map(prompt_id, prompts)).encode(), digest_size=16).hexdigest()
