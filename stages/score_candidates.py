"""Candidates in; the implicit reward of each out, with every draw's errors. Paper: SAIL Eq. 8.

Example: paste the line from logs/<run>/iter01/score_candidates-0.log
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import tyro

from stages.core.artifacts.images import decode_image, to_model_input
from stages.core.artifacts.kept_rows import write_batches
from stages.core.artifacts.provenance import policy_files
from stages.core.artifacts.schemas import CANDIDATES, REWARDS
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, log, progress, run_stage, stage
from stages.core.method.derivative import Derivative, TwoPoints
from stages.core.method.noising import DrawLaw, reward_draws
from stages.core.method.rewards import ImplicitReward, implicit_reward, share_moved
from stages.core.method.scoring import Errors, draw_errors
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import latents_tensor
from stages.core.policies.loading import RewardsBy, load_judge

MAX_BEND = 0.05
"""Of the rewards' spread, that a derivative half way between may miss."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Candidates in, the implicit reward of each out, with every draw's errors."""

    candidates: Path
    """A shard of candidates (schema candidates)."""
    model: ModelSettings
    """The pretrained model."""
    policy: str
    """Policy folder that judges."""
    reference: str
    """Policy folder the reward compares with, or 'base' (Sec. 4.2)."""
    num_draws: int
    """Draws of timestep and noise, shared by all candidates of a prompt (paper: 10)."""
    reencode: bool
    """Encode the decoded images again instead of using the sampler's latents."""
    seed: int
    """Run seed."""
    iteration: int
    """Number of this iteration, from 1."""
    output: Path
    """Where the rewards go (schema rewards)."""
    rewards_by: RewardsBy = "difference"
    """'difference' of two errors, or 'secant' or 'derivative', for which half precision suffices."""
    draw_law: DrawLaw = "uniform"
    """How timesteps are drawn: 'uniform' (paper) or 'logit_normal'."""
    embedded_guidance: float = 1.0
    """The guidance that a guidance-distilled model is told where it judges."""
    rows_per_batch: int | None = None
    """Images x draws that go through the network at once; None is all of a prompt."""
    threads: int = 1
    """CPU threads."""
    jobs_per_gpu: int = 1
    """Jobs of this kind that may share a GPU; 1 has it alone."""


def main(args: Args) -> None:
    """Score prompt by prompt, so that neither batches nor shards change a reward."""
    with stage("score_candidates") as run:
        columns = ["prompt_id", "prompt", "candidate", "image" if args.reencode else "latents"]
        table = read_table(args.candidates, CANDIDATES, columns)
        model = load_model(args.model, device=choose_device(args.threads, args.jobs_per_gpu))
        inputs = [args.candidates, *policy_files(args.policy), *policy_files(args.reference)]
        run.rows_in = len(table)
        run.rows_out = write_batches(
            args.output, lambda first: score(model, table, args, first), REWARDS,
            stage="score_candidates", arguments=args, inputs=inputs,
        )  # fmt: skip


def score(
    model: DiffusionModel, table: pa.Table, args: Args, first: int = 0
) -> Iterator[list[dict[str, object]]]:
    """The rows of the rewards table of each prompt, from number `first` on."""
    names = np.array(table.column("prompt_id").to_pylist())
    starts = [row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]]
    model.encode_ahead([table.column("prompt")[start].as_py()] for start in starts[first:])
    judge = load_judge(model, args.policy, args.reference, args.rewards_by)
    ends = [*starts[1:], len(names)] if len(names) else []
    spans = list(zip(starts, ends, strict=True))
    per_prompt = len(names) // max(1, len(spans))
    for start, end in progress(spans[first:], "scoring", "images", per_prompt):
        group = table.slice(start, end - start)
        draw_seed = seed_of(args.seed, "score_candidates", args.iteration, str(names[start]))
        draws = reward_draws(
            draw_seed,
            num_draws=args.num_draws,
            num_timesteps=model.num_timesteps,
            latents_shape=model.latents_shape,
            law=args.draw_law,
        )
        text = model.encode_text([group.column("prompt")[0].as_py()])
        text = model.tell_guidance(text, args.embedded_guidance)
        errors = draw_errors(
            model, judge, candidate_latents(model, group, args), text, draws,
            rows_per_batch=args.rows_per_batch,
        )  # fmt: skip
        policy_errors, reference_errors = errors.policy.numpy(), errors.reference.numpy()
        result = implicit_reward(policy_errors=policy_errors, reference_errors=reference_errors)
        if start == 0 and isinstance(judge, Derivative):
            latents = candidate_latents(model, group, args)
            closer = draw_errors(
                model, TwoPoints.of(judge), latents, text, draws, rows_per_batch=args.rows_per_batch
            )
            tell_bend(result, closer, args)
        if not np.isfinite(result.reward).all():
            raise UserError(
                f"the rewards of prompt {names[start]} are not finite: {result.reward.tolist()}. "
                f"{args.policy} or {args.reference} has diverged, or {args.model.dtype} is too narrow."
            )
        has_error = np.isfinite(result.standard_error)
        yield [
            {
                "prompt_id": str(names[start]),
                "candidate": candidate,
                "reward": result.reward[index],
                "standard_error": result.standard_error[index] if has_error[index] else None,
                "policy_errors": policy_errors[index],
                "reference_errors": reference_errors[index],
                "timesteps": draws.timesteps.numpy(),
                "draw_seed": draw_seed,
            }
            for index, candidate in enumerate(group.column("candidate").to_pylist())
        ]


def tell_bend(found: ImplicitReward, closer: Errors, args: Args) -> None:
    """Log how far the derivative is from a closer one, on one prompt; warn where a ranking may suffer."""
    exact = implicit_reward(
        policy_errors=closer.policy.numpy(), reference_errors=closer.reference.numpy()
    ).reward
    share = share_moved(found.reward[None], exact[None])
    log.info("score_candidates: rewards_by derivative is %.1f %% of the spread off", 100 * share)
    if share > MAX_BEND:
        log.warning(
            "score_candidates: %s is so far from %s that a derivative half way between misses %.0f %% of the "
            "rewards' spread; set score_candidates.rewards_by to difference, and dtype to tf32 or float32",
            args.policy, args.reference, 100 * share,
        )  # fmt: skip


def candidate_latents(model: DiffusionModel, group: pa.Table, args: Args) -> torch.Tensor:
    """The sampler's latents of one prompt's candidates, or those of its decoded images.

    Differs from the paper: it does not say; the sampler's own latents are exact and cost nothing.
    """
    if not args.reencode:
        return latents_tensor(group.column("latents"), model.latents_shape, str(args.candidates))
    images = [decode_image(image["bytes"]) for image in group.column("image").to_pylist()]
    return model.encode_images(torch.from_numpy(to_model_input(images, model.image_size)))


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
