"""Mixed preference pairs and a policy in; the next policy out. Paper: SAIL Alg. 1, last step.

Example: paste the line from logs/<run>/iter01/update_policy.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts import policy_files, read_table
from stages.core.models import load_model
from stages.core.policies import encode_pairs, train_policy
from stages.core.runtime import choose_device, run_stage, stage
from stages.core.schemas import TRAINING_PAIRS
from stages.core.seeding import seed_of
from stages.core.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Args:
    """Mixed preference pairs and a policy in; the next policy out."""

    preferences: Path
    """The mix to train on (schema training_pairs)."""
    policy: str
    """Policy folder to start from."""
    reference: str
    """Policy folder the loss compares with, or 'base'."""
    base: str
    """The base model: a folder in diffusers layout or a hub id."""
    dtype: str
    """Precision of the networks: float32, bfloat16 or float16; errors are always float32."""
    settings: TrainingSettings
    """The optimisation."""
    seed: int
    """Run seed: decides order, timesteps and noise, together with the iteration."""
    iteration: int
    """Number of this iteration, from 1."""
    output: Path
    """Policy folder to write (unet/ and manifest.json)."""
    training: Path
    """Where the per-step measures go (schema training)."""
    work: Path
    """Folder for the training state; removed when the training has ended."""
    save_every: int = 50
    """Steps between two saved states."""
    threads: int = 2
    """CPU threads."""


def main(args: Args) -> None:
    """Train on the mix from the current policy, with a fresh optimizer."""
    with stage("update_policy") as run:
        device = choose_device(args.threads)
        model = load_model(args.base, device=device, dtype=args.dtype)
        columns = ["prompt", "winner_latents", "loser_latents"]
        table = read_table(args.preferences, TRAINING_PAIRS, columns)
        run.rows_in = len(table)
        files = {*policy_files(args.policy), *policy_files(args.reference)}
        run.rows_out = train_policy(
            model,
            encode_pairs(model, table, str(args.preferences)),
            args.settings,
            stage="update_policy",
            arguments=args,
            inputs=[args.preferences, *sorted(files)],
            initial=args.policy,
            reference=args.reference,
            seed=seed_of(args.seed, "update_policy", args.iteration),
            output=args.output,
            training=args.training,
            work=args.work,
            save_every=args.save_every,
        )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
