"""Human preference pairs in; policy 0 out, trained from the base model. Paper: SAIL Alg. 1, line 1.

Example: paste the line from logs/<run>/iter00/train_seed.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts import BASE, read_table
from stages.core.models import load_model
from stages.core.policies import encode_pairs, train_policy
from stages.core.runtime import choose_device, run_stage, stage
from stages.core.schemas import PAIR_LATENTS, PREFERENCES
from stages.core.seeding import seed_of
from stages.core.tables import join_latents
from stages.core.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Args:
    """Human preference pairs in; policy 0 out, trained from the base model."""

    preferences: Path
    """Seed pairs (schema preferences)."""
    latents: Path
    """Their latents (schema pair_latents)."""
    base: str
    """The base model: a folder in diffusers layout or a hub id."""
    dtype: str
    """Precision of the networks: float32, bfloat16 or float16; errors are always float32."""
    settings: TrainingSettings
    """The optimisation."""
    seed: int
    """Run seed: decides order, timesteps and noise."""
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
    """Join pairs and latents, then train with the base model as reference."""
    with stage("train_seed") as run:
        device = choose_device(args.threads)
        model = load_model(args.base, device=device, dtype=args.dtype)
        table = join_latents(
            read_table(args.preferences, PREFERENCES, ["pair_id", "prompt"]),
            read_table(args.latents, PAIR_LATENTS),
            args.latents,
        )
        run.rows_in = len(table)
        run.rows_out = train_policy(
            model,
            encode_pairs(model, table, str(args.latents)),
            args.settings,
            stage="train_seed",
            arguments=args,
            inputs=[args.preferences, args.latents],
            initial=BASE,
            reference=BASE,
            seed=seed_of(args.seed, "train_seed"),
            output=args.output,
            training=args.training,
            work=args.work,
            save_every=args.save_every,
        )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
