"""Held-out human pairs in; how a policy's implicit reward judges them out, and its drift.

Example: paste the line from logs/<run>/iter01/score_holdout.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.artifacts.joins import join_latents
from stages.core.artifacts.provenance import policy_files
from stages.core.artifacts.schemas import HOLDOUT_REWARDS, LIKED_PAIRS, PAIR_LATENTS, PREFERENCES
from stages.core.artifacts.tables import holds, read_table, write_table
from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, progress, run_stage, stage
from stages.core.method.noising import DrawLaw, Draws, reward_draws
from stages.core.method.rewards import implicit_reward, preference_probability
from stages.core.method.scoring import Errors, Judge, draw_errors
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import latents_tensor
from stages.core.policies.loading import RewardsBy, load_judge

SIDES = ("winner", "loser")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Held-out human pairs in; how a policy's implicit reward judges them out, and its drift."""

    preferences: Path
    """Held-out pairs (schema preferences), or likes side by side (schema liked_pairs)."""
    latents: Path
    """Their latents (schema pair_latents)."""
    model: ModelSettings
    """The pretrained model."""
    policy: str
    """Policy folder that judges."""
    reference: str
    """Policy folder the reward compares with, or 'base'."""
    num_draws: int
    """Draws of timestep and noise, shared by the two images of a pair."""
    dpo_beta: float
    """For p(winner > loser), Eq. 9."""
    seed: int
    """Evaluation seed: every policy judges with the same draws."""
    output: Path
    """Where the rewards go (schema holdout_rewards)."""
    skip_pairs: int = 0
    """The first so many pairs, by which trainings were stopped, and all of their prompts are left out."""
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
    """Score winner and loser of every pair with the same draws for every policy."""
    with stage("score_holdout") as run:
        model = load_model(args.model, device=choose_device(args.threads, args.jobs_per_gpu))
        pairs, rows = read_pairs(args, model), []
        model.encode_ahead(pair.prompts for pair in pairs)
        judge = load_judge(model, args.policy, args.reference, args.rewards_by)
        for pair in progress(pairs, "scoring held-out pairs", "pairs"):
            draws = reward_draws(
                seed_of(args.seed, "score_holdout", pair.pair_id),
                num_draws=args.num_draws,
                num_timesteps=model.num_timesteps,
                latents_shape=model.latents_shape,
                law=args.draw_law,
            )
            errors = pair_errors(model, judge, pair, draws, args)
            kept = {"timesteps": draws.timesteps.numpy(), "num_timesteps": model.num_timesteps}
            rows.append(pair.names | judgement(errors, args.dpo_beta) | kept)
        files = {*policy_files(args.policy), *policy_files(args.reference)}
        inputs = [args.preferences, args.latents, *sorted(files)]
        write_table(
            args.output, rows, HOLDOUT_REWARDS,
            stage="score_holdout", arguments=args, inputs=inputs,
        )  # fmt: skip
        run.rows_in = run.rows_out = len(rows)


@dataclass(frozen=True, kw_only=True)
class HeldOutPair:
    """A pair as the network takes it, the winner first."""

    pair_id: str
    prompt_id: str
    prompts: tuple[str, ...]
    """The prompt of both images; where likes are put side by side, that of each."""
    latents: Float[Tensor, "side ..."]
    geometry: Int[Tensor, "side number"]
    """How each image was cut, for families that are told."""

    @property
    def names(self) -> dict[str, object]:
        """What the pair and its prompt are called."""
        return {"pair_id": self.pair_id, "prompt_id": self.prompt_id}


def read_pairs(args: Args, model: DiffusionModel) -> list[HeldOutPair]:
    """The held-out pairs, in their table's order. UserError if none is left."""
    texts = ["prompt", "loser_prompt"] if holds(args.preferences, LIKED_PAIRS) else ["prompt"]
    schema = LIKED_PAIRS if len(texts) > 1 else PREFERENCES
    table = join_latents(
        read_table(args.preferences, schema, ["pair_id", "prompt_id", *texts]),
        read_table(args.latents, PAIR_LATENTS),
        args.latents,
    )
    names = table.column("prompt_id").to_pylist()
    used = set(names[: args.skip_pairs])
    left = [place for place, name in enumerate(names) if name not in used]
    if not left:
        raise UserError(
            f"{args.preferences} has {len(names)} pairs, all of prompts by which trainings were stopped early "
            f"(the first {args.skip_pairs}), so none is left to measure the judge on; raise "
            "preferences.num_holdout, or lower held_out_curve.num_pairs"
        )
    table = table.take(left)
    sides = [
        latents_tensor(table.column(f"{side}_latents"), model.latents_shape, str(args.latents))
        for side in SIDES
    ]
    latents = torch.stack(sides, dim=1)
    columns = ("pair_id", "prompt_id", *(f"{side}_geometry" for side in SIDES))
    prompts = zip(*(table.column(column).to_pylist() for column in texts), strict=True)
    return [
        HeldOutPair(
            pair_id=name,
            prompt_id=prompt_id,
            prompts=both,
            latents=latents[index],
            geometry=torch.tensor(sizes),
        )
        for index, (both, (name, prompt_id, *sizes)) in enumerate(
            zip(
                prompts,
                zip(*(table.column(column).to_pylist() for column in columns), strict=True),
                strict=True,
            )
        )
    ]


def pair_errors(
    model: DiffusionModel,
    judge: Judge,
    pair: HeldOutPair,
    draws: Draws,
    args: Args,
) -> Errors:
    """Errors of both images of a pair with the same draws, and the policy's drift."""
    text = model.place(
        model.encode_text(pair.prompts).repeat(2 // len(pair.prompts)), pair.geometry
    )
    text = model.tell_guidance(text, args.embedded_guidance)
    return draw_errors(model, judge, pair.latents, text, draws, rows_per_batch=args.rows_per_batch)


def judgement(errors: Errors, dpo_beta: float) -> dict[str, object]:
    """How a policy with these errors judges a pair, the winner's first: a row but for its name."""
    winner, loser = implicit_reward(
        policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
    ).reward
    return {
        "winner_reward": winner,
        "loser_reward": loser,
        "probability": preference_probability(winner - loser, dpo_beta),
        "drift": float(errors.drift.mean()),
        **{
            f"{side}_{whose}_errors": values[number].numpy()
            for whose, values in (("policy", errors.policy), ("reference", errors.reference))
            for number, side in enumerate(SIDES)
        },
    }


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
