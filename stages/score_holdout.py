"""Held-out human pairs in; how a policy's implicit reward judges them out, and its drift.

Example: paste the line from logs/<run>/iter01/score_holdout.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from stages.core.artifacts.joins import join_latents
from stages.core.artifacts.provenance import policy_files
from stages.core.artifacts.schemas import HOLDOUT_REWARDS, PAIR_LATENTS, PREFERENCES
from stages.core.artifacts.tables import read_table, write_table
from stages.core.execution.runtime import choose_device, progress, run_stage, stage
from stages.core.method.noising import reward_draws
from stages.core.method.rewards import implicit_reward, preference_probability
from stages.core.method.scoring import draw_errors
from stages.core.method.seeding import seed_of
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import latents_tensor
from stages.core.policies.loading import load_denoisers

SIDES = ("winner", "loser")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Held-out human pairs in; how a policy's implicit reward judges them out, and its drift."""

    preferences: Path
    """Held-out pairs (schema preferences)."""
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
        policy, reference = load_denoisers(model, args.policy, args.reference)
        pairs = join_latents(
            read_table(args.preferences, PREFERENCES, ["pair_id", "prompt"]),
            read_table(args.latents, PAIR_LATENTS),
            args.latents,
        )
        sides = [
            latents_tensor(pairs.column(name), model.latents_shape, str(args.latents))
            for name in (f"{side}_latents" for side in SIDES)
        ]
        rows = []
        for index in progress(range(len(pairs)), "scoring held-out pairs", "pairs"):
            name, prompt = (pairs.column(c)[index].as_py() for c in ("pair_id", "prompt"))
            draws = reward_draws(
                seed_of(args.seed, "score_holdout", name),
                num_draws=args.num_draws,
                num_timesteps=model.num_timesteps,
                latents_shape=model.latents_shape,
            )
            latents = torch.stack([side[index] for side in sides])
            sizes = [pairs.column(f"{side}_geometry")[index].as_py() for side in SIDES]
            text = model.place(model.encode_text([prompt]).repeat(2), torch.tensor(sizes))
            errors = draw_errors(
                model, policy, reference, latents, text, draws, rows_per_batch=args.rows_per_batch
            )
            reward = implicit_reward(
                policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
            ).reward
            rows.append(
                {
                    "pair_id": name,
                    "winner_reward": reward[0],
                    "loser_reward": reward[1],
                    "probability": preference_probability(reward[0] - reward[1], args.dpo_beta),
                    "drift": float(errors.drift.mean()),
                }
            )
        files = {*policy_files(args.policy), *policy_files(args.reference)}
        inputs = [args.preferences, args.latents, *sorted(files)]
        write_table(
            args.output, rows, HOLDOUT_REWARDS,
            stage="score_holdout", arguments=args, inputs=inputs,
        )  # fmt: skip
        run.rows_in, run.rows_out = len(pairs), len(rows)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
