"""Candidates in; the implicit reward of each out, with every draw's errors. Paper: SAIL Eq. 8.

Example: paste the line from logs/<run>/iter01/score_candidates-0.log
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import tyro

from stages.core.artifacts.images import decode_image, to_model_input
from stages.core.artifacts.judges import JudgeRecord, judge_of
from stages.core.artifacts.kept_rows import write_batches
from stages.core.artifacts.provenance import policy_files, policy_name
from stages.core.artifacts.schemas import CANDIDATES, REWARDS
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, log, progress, run_stage, stage
from stages.core.method.adaptive import adaptive_errors, prefixes, spread
from stages.core.method.allocation import completed, density_of, importance_weights
from stages.core.method.calibration import BinWeights
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
    judges: tuple[Path, ...] = ()
    """What each timestep counts, of this policy and perhaps of others; for allocation and adaptive draws."""
    allocation: Literal["uniform", "importance"] = "uniform"
    """'importance' draws more timesteps where the judge's weight and spread are larger."""
    adaptive_confidence: float = 0.0
    """A candidate that is below the best and above the worst, each with this confidence, gets no more draws; 0 draws
    all of each (paper)."""
    first_draws: int = 4
    """Draws that every candidate gets, with adaptive_confidence."""
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
        inputs += args.judges
        run.rows_in = len(table)
        run.rows_out = write_batches(
            args.output, lambda first: score(model, table, args, first), REWARDS,
            stage="score_candidates", arguments=args, inputs=inputs,
        )  # fmt: skip


def score(
    model: DiffusionModel, table: pa.Table, args: Args, first: int = 0
) -> Iterator[list[dict[str, object]]]:
    """The rows of the rewards table of each prompt, from number `first` on."""
    record = judge_of(args.judges, policy_name(args.policy)) if args.judges else None
    density = density_for(record, args)
    num_drawn = num_asked = 0
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
            density=density,
        )
        text = model.encode_text([group.column("prompt")[0].as_py()])
        text = model.tell_guidance(text, args.embedded_guidance)
        latents = candidate_latents(model, group, args)
        num_seen = np.full(len(latents), args.num_draws)
        if args.adaptive_confidence:
            draws = spread(draws)
            errors, num_seen = adaptive_errors(
                model, judge, latents, text, draws,
                weights=weights_of(draws.timesteps.numpy(), record, density, model.num_timesteps),
                first_draws=args.first_draws, confidence=args.adaptive_confidence,
                rows_per_batch=args.rows_per_batch,
            )  # fmt: skip
        else:
            errors = draw_errors(
                model, judge, latents, text, draws, rows_per_batch=args.rows_per_batch
            )
        num_drawn, num_asked = num_drawn + num_seen.sum(), num_asked + len(latents) * args.num_draws
        policy_errors, reference_errors = (
            prefixes(values, num_seen) for values in (errors.policy, errors.reference)
        )
        result = plain_reward(errors, draws.timesteps.numpy(), num_seen, density, model)
        if start == 0 and isinstance(judge, Derivative):
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
                "timesteps": draws.timesteps.numpy()[: num_seen[index]],
                "draw_seed": draw_seed,
            }
            for index, candidate in enumerate(group.column("candidate").to_pylist())
        ]
    if args.adaptive_confidence and num_asked:
        log.info(
            "score_candidates: %d of %d draws were needed (%.0f %%)",
            num_drawn, num_asked, 100 * num_drawn / num_asked,
        )  # fmt: skip


def density_for(record: JudgeRecord | None, args: Args) -> np.ndarray | None:
    """How often a timestep of each bin is drawn; None for evenly. UserError without a judge to go by."""
    if args.allocation == "uniform":
        return None
    if record is None or len(record.spreads) != len(record.weights):
        raise UserError(
            "--allocation importance goes by what each timestep counts: give --judges, made by today's "
            "calibrate_judge (score_candidates.weights calibrated or inverse_snr)"
        )
    return density_of(np.array(record.weights), np.array(record.spreads))


def weights_of(
    timesteps: np.ndarray,
    record: JudgeRecord | None,
    density: np.ndarray | None,
    num_timesteps: int,
) -> np.ndarray:
    """What each draw counts in the reward that ranks."""
    weights = np.ones(len(timesteps))
    if record is not None:
        weights = BinWeights(np.array(record.weights)).of(timesteps, record.num_timesteps)
    if density is not None:
        weights = weights * importance_weights(timesteps, num_timesteps, density)
    return weights


def plain_reward(
    errors: Errors,
    timesteps: np.ndarray,
    num_seen: np.ndarray,
    density: np.ndarray | None,
    model: DiffusionModel,
) -> ImplicitReward:
    """The reward of Eq. 8, in which all timesteps count alike, however they were drawn."""
    policy, reference = errors.policy.numpy(), errors.reference.numpy()
    if density is not None:
        shares = importance_weights(timesteps, model.num_timesteps, density)
        policy, reference = policy * shares, reference * shares
    if (num_seen == policy.shape[1]).all():
        return implicit_reward(policy_errors=policy, reference_errors=reference)
    gains = reference.astype(np.float64) - policy
    spreads = [row[:seen].std(ddof=1) for row, seen in zip(gains, num_seen, strict=True)]
    return ImplicitReward(completed(gains, num_seen), np.array(spreads) / np.sqrt(num_seen))


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
