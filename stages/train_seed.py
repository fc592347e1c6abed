"""Human preference pairs in; policy 0 out, trained from the base model. Paper: SAIL Alg. 1, line 1.

From single likes (schema likes) too, with the loss 'kto'.

On several GPUs: accelerate launch --num_processes 4 -m stages.train_seed ... (or torchrun).
Example: paste the line from logs/<run>/iter00/train_seed.log
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from stages.core.artifacts.decisions import read_decisions
from stages.core.artifacts.provenance import BASE
from stages.core.artifacts.schemas import LIKES, PREFERENCES
from stages.core.artifacts.tables import holds
from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, log, run_stage, stage
from stages.core.method.seeding import seed_of
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.like_files import LikeTables, human_likes
from stages.core.policies.pair_files import PairTables, human_pairs
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.processes import Processes
from stages.core.training.run import Outputs, Task, train_policy
from stages.core.training.settings import Execution, TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Args:
    """Human preference pairs in; policy 0 out, trained from the base model."""

    preferences: Path
    """Seed pairs (schema preferences), or single likes (schema likes; loss kto)."""
    latents: Path
    """Their latents (schema pair_latents; of likes: like_latents)."""
    decisions: tuple[Path, ...] = ()
    """What a person decided about these pairs in the audit (schema decisions); none without."""
    model: ModelSettings
    """The pretrained model."""
    lora: LoraSettings
    """Low-rank adapters, or a full fine-tune with rank 0."""
    settings: TrainingSettings
    """The optimisation."""
    held_out: HeldOutFiles
    """Human pairs that are scored on the way."""
    seed: int
    """Run seed: decides order, timesteps and noise."""
    output: Path
    """Policy folder to write (weights and manifest.json)."""
    training: Path
    """Where the per-step measures go (schema training)."""
    held_out_curve: Path
    """Where the held-out measures go (schema held_out_curve)."""
    work: Path
    """Folder for the training's state and its encoded pairs; removed when the training has ended."""
    execution: Execution = field(default_factory=Execution)
    """How it runs: micro-batches, gradient checkpointing, saved states."""
    live_encoding: bool = False
    """Encode the images again instead of reading their latents; the loss is the same."""
    trackers: tuple[str, ...] = ()
    """Where to send each step's measures besides the table: tensorboard (in trackers/ beside it), wandb."""
    threads: int = 2
    """CPU threads."""


def main(args: Args) -> None:
    """Join pairs and latents, then train with the base model as reference."""
    with stage("train_seed") as run:
        processes = Processes(
            choose_device(args.threads),
            trackers=args.trackers,
            folder=args.training.parent / "trackers",
        )
        model = load_model(args.model, device=processes.device)
        pairs = read_labels(args)
        run.rows_in = len(pairs)
        if isinstance(pairs, PairTables):
            pairs = heed_decisions(pairs, args)
        run.rows_out = train_policy(
            model,
            pairs,
            args.settings,
            Task(
                stage="train_seed",
                arguments=args,
                inputs=[args.preferences, args.latents, *args.decisions, *args.held_out.files],
                initial=BASE,
                reference=BASE,
                lora=args.lora,
                seed=seed_of(args.seed, "train_seed"),
                held_out=args.held_out,
                held_out_seed=seed_of(args.seed, "held_out"),
            ),
            Outputs(
                policy=args.output,
                training=args.training,
                held_out_curve=args.held_out_curve,
                work=args.work,
            ),
            processes=processes,
            execution=args.execution,
        )


def read_labels(args: Args) -> PairTables | LikeTables:
    """The pairs or single likes of the tables. UserError for decisions about likes."""
    if not holds(args.preferences, LIKES):
        return human_pairs(args.preferences, args.latents, is_live=args.live_encoding)
    if args.decisions:
        raise UserError(
            f"--decisions names {' and '.join(map(str, args.decisions))}, and {args.preferences} holds single "
            "likes, which the audit does not decide about; set train_seed.use_decisions to false"
        )
    return human_likes(args.preferences, args.latents, is_live=args.live_encoding)


def heed_decisions(pairs: PairTables, args: Args) -> PairTables:
    """The pairs that nobody vetoed, the flipped ones exchanged; all as they are without decisions.

    UserError if all are vetoed.
    """
    if not args.decisions:
        return pairs
    decisions = read_decisions(args.decisions)
    decided = decisions.about(args.preferences, PREFERENCES)
    kept = decided.kept(len(pairs))
    if not kept:
        raise UserError(
            f"all {len(pairs)} pairs of {args.preferences} are vetoed in "
            f"{' and '.join(map(str, args.decisions))}: there is nothing to train on. Take some vetoes back "
            "with python -m stages.audit."
        )
    log.info(
        "train_seed: of %d decisions %d veto and %d flip a pair, %d ask for what is so already, %d are stale: "
        "no pair has their images", len(decisions), len(decided.vetoed), len(decided.flipped),
        decided.num_as_wished, decisions.num_stale,
    )  # fmt: skip
    return pairs.decided(kept, decided.flipped)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
