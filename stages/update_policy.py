"""Mixed preference pairs and a policy in; the next policy out. Paper: SAIL Alg. 1, last step.

On several GPUs: accelerate launch --num_processes 4 -m stages.update_policy ... (or torchrun).
Example: paste the line from logs/<run>/iter01/update_policy.log
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
import tyro
from jaxtyping import Float

from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.core.method.listwise import Lists, lists_of
from stages.core.method.seeding import seed_of
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.pair_files import mixed_pairs
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.processes import Processes
from stages.core.training.run import Outputs, Task, train_policy
from stages.core.training.settings import Execution, TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Args:
    """Mixed preference pairs and a policy in; the next policy out."""

    preferences: Path
    """The mix to train on (schema training_pairs)."""
    policy: str
    """Policy folder to start from."""
    reference: str
    """Policy folder the loss compares with, or 'base'."""
    model: ModelSettings
    """The pretrained model."""
    lora: LoraSettings
    """Low-rank adapters, or a full fine-tune with rank 0."""
    settings: TrainingSettings
    """The optimisation."""
    held_out: HeldOutFiles
    """Human pairs that are scored on the way."""
    seed: int
    """Run seed: decides order, timesteps and noise, together with the iteration."""
    iteration: int
    """Number of this iteration, from 1."""
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
    """Encode the images again instead of reading their latents (a generated image's latents are
    the sampler's own, so its encoding differs a little)."""
    soft_labels: bool = False
    """Train on p(winner > loser) of generated pairs instead of taking the winner for better with certainty;
    human pairs stay certain."""
    listwise: bool = False
    """Train on whole lists, by RankDPO's loss: the generated pairs of a prompt are one, a human pair is one of
    two images. A batch and a micro-batch then count lists."""
    trackers: tuple[str, ...] = ()
    """Where to send each step's measures besides the table: tensorboard (in trackers/ beside it), wandb."""
    threads: int = 2
    """CPU threads."""


def main(args: Args) -> None:
    """Train on the mix from the current policy, with a fresh optimizer."""
    with stage("update_policy") as run:
        processes = Processes(
            choose_device(args.threads),
            trackers=args.trackers,
            folder=args.training.parent / "trackers",
        )
        model = load_model(args.model, device=processes.device)
        pairs = mixed_pairs(
            args.preferences,
            is_live=args.live_encoding,
            label=soft_labels if args.soft_labels else None,
            listed=lists_in if args.listwise else None,
        )
        run.rows_in = len(pairs)
        run.rows_out = train_policy(
            model,
            pairs,
            args.settings,
            Task(
                stage="update_policy",
                arguments=args,
                inputs=[args.preferences, *args.held_out.files],
                initial=args.policy,
                reference=args.reference,
                lora=args.lora,
                seed=seed_of(args.seed, "update_policy", args.iteration),
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


def soft_labels(table: pa.Table, path: Path) -> Float[torch.Tensor, " pair"]:
    """p(winner > loser) of generated pairs, 1 of human ones.

    UserError for a generated pair that has none.
    """
    sources, found = (table.column(name).to_pylist() for name in ("source", "probability"))
    for row, (source, probability) in enumerate(zip(sources, found, strict=True)):
        if source == "generated" and not 0 <= (-1 if probability is None else probability) <= 1:
            raise UserError(
                f"{path}, row {row}: a generated pair has the probability {probability}, expected a number from 0 "
                "to 1. Set update_policy.soft_labels to false, or let select_pairs make the pairs anew."
            )
    return torch.tensor(
        [p if source == "generated" else 1.0 for source, p in zip(sources, found, strict=True)],
        dtype=torch.float32,
    )


def lists_in(table: pa.Table, path: Path) -> Lists:
    """The generated pairs of each prompt as one list, each human pair as one that is certain.

    UserError for a generated pair whose scores are no probabilities.
    """
    columns = ("source", "prompt_id", "winner_score", "loser_score")
    rows = list(zip(*(table.column(name).to_pylist() for name in columns), strict=True))
    for place, (source, _, *scores) in enumerate(rows):
        if source == "generated" and not all(s is not None and 0 <= s <= 1 for s in scores):
            raise UserError(
                f"{path}, row {place}: a generated pair has the scores {scores}, expected probabilities from 0 to "
                "1. Lists are made by select_pairs.strategy listwise; let select_pairs make the pairs anew."
            )
    is_human = [source != "generated" for source, *_ in rows]
    return lists_of(
        [None if human else name for human, (_, name, _, _) in zip(is_human, rows, strict=True)],
        [None if human else high for human, (_, _, high, _) in zip(is_human, rows, strict=True)],
        [None if human else low for human, (_, _, _, low) in zip(is_human, rows, strict=True)],
    )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
