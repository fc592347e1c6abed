"""Evaluation prompts in; a policy's images of them out, from the same noise for every policy.

Example: paste the line from logs/<run>/evaluation/<set>/iter01/generate_evaluation-0.log
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from stages.core.artifacts.kept_rows import write_batches
from stages.core.artifacts.provenance import policy_files
from stages.core.artifacts.schemas import IMAGES, PROMPTS
from stages.core.artifacts.tables import read_table
from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.generation import (
    SamplingSettings,
    encode_ahead,
    generate_batches,
    shard_of,
)
from stages.core.policies.loading import load_denoiser


@dataclass(frozen=True, kw_only=True)
class Args:
    """Evaluation prompts in; a policy's images out, from the same noise for every policy."""

    prompts: Path
    """The evaluation prompts (schema prompts)."""
    model: ModelSettings
    """The pretrained model."""
    policy: str
    """Policy folder that samples, or 'base'."""
    settings: SamplingSettings
    """The sampler."""
    images_per_prompt: int
    """Images of each prompt; 2 or more let diversity be measured."""
    seed: int
    """Evaluation seed: the same for every policy, and not the run's."""
    shard: int
    """Which part of the prompts this job takes, from 0."""
    num_shards: int
    """In how many parts the prompts are sampled; changes no image."""
    output: Path
    """Where the images go (schema images)."""
    prompts_per_batch: int = 8
    """Prompts sampled at a time; changes images only by rounding."""
    threads: int = 1
    """CPU threads."""
    jobs_per_gpu: int = 1
    """Jobs of this kind that may share a GPU; 1 has it alone."""


def main(args: Args) -> None:
    """Sample every image from its own seed, which no policy enters."""
    with stage("generate_evaluation") as run:
        table = read_table(args.prompts, PROMPTS)
        names, prompts = (table.column(name).to_pylist() for name in ("prompt_id", "prompt"))
        pairs = list(zip(names, prompts, strict=True))
        part = shard_of(pairs, args.shard, args.num_shards, args.prompts_per_batch)
        model = load_model(args.model, device=choose_device(args.threads, args.jobs_per_gpu))
        encode_ahead(model, part, args.prompts_per_batch)
        batches = partial(
            generate_batches,
            model,
            load_denoiser(model, args.policy),
            part,
            args.settings,
            images_per_prompt=args.images_per_prompt,
            seed_parts=(args.seed, "generate_evaluation"),
            prompts_per_batch=args.prompts_per_batch,
            keep_latents=False,
        )
        run.rows_in = len(part)
        run.rows_out = write_batches(
            args.output, lambda first: batches(first_batch=first), IMAGES,
            stage="generate_evaluation", arguments=args,
            inputs=[args.prompts, *policy_files(args.policy)],
        )  # fmt: skip


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
