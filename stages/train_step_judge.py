r"""Human preference pairs and a CLIP in; a step-aware preference model out, which judges unfinished images (SPO).

On several GPUs: python -m stages.launch 4 stages.train_step_judge ... (or torchrun).
Example: paste the line from logs/<run>/step_judge/train_step_judge.log
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.core.method.seeding import seed_of
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.pair_files import human_pairs
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution
from stages.core.training.step_judge.run import StepJudgeOutputs, StepJudgeTask, train_judge
from stages.core.training.step_judge.settings import StepJudgeSettings, check_settings
from stages.metrics.step_aware import TOKENIZER
from stages.metrics.step_judge import load_judge, published
from stages.metrics.weights import MODEL_FILES


@dataclass(frozen=True, kw_only=True)
class Args:
    """Human preference pairs and a CLIP in; a step-aware preference model out, which judges unfinished images."""

    preferences: Path
    """Seed pairs (schema preferences)."""
    latents: Path
    """Their latents (schema pair_latents)."""
    model: ModelSettings
    """The pretrained model, through whose eyes the images are seen."""
    clip: str
    """The CLIP to begin with, a folder or hub id in transformers' layout (published: yuvalkirstain/PickScore_v1)."""
    held_out: HeldOutFiles
    """Human pairs that are judged on the way."""
    seed: int
    """Run seed: decides order, timesteps and noise."""
    output: Path
    """Folder of the model to write (model.safetensors, config.json and manifest.json)."""
    training: Path
    """Where the per-step measures go (schema step_judge_training)."""
    curve: Path
    """Where the accuracy on held-out pairs goes, by timestep (schema step_judge_curve)."""
    work: Path
    """Folder for the training's state and its encoded pairs; removed when the training has ended."""
    tokenizer: str = TOKENIZER
    """Folder or hub id with vocab.json and merges.txt."""
    settings: StepJudgeSettings = field(default_factory=StepJudgeSettings)
    """The optimisation, and who labels."""
    execution: Execution = field(default_factory=Execution)
    """How it runs: micro-batches, gradient checkpointing, saved states."""
    trackers: tuple[str, ...] = ()
    """Where to send each step's measures besides the table: tensorboard (in trackers/ beside it), wandb."""
    threads: int = 2
    """CPU threads."""


def main(args: Args) -> None:
    """Join pairs and latents, and train the CLIP on what the base sees of them at random timesteps."""
    with stage("train_step_judge") as run:
        check_settings(args.settings)
        processes = Processes(
            choose_device(args.threads),
            trackers=args.trackers,
            folder=args.training.parent / "trackers",
        )
        model = load_model(args.model, device=processes.device)
        pairs = human_pairs(args.preferences, args.latents)
        run.rows_in = len(pairs)
        run.rows_out = train_judge(
            model,
            lambda: load_judge(
                args.clip,
                args.tokenizer,
                seed=seed_of(args.seed, "train_step_judge", "weights"),
                device=processes.device,
            ),
            pairs,
            args.settings,
            StepJudgeTask(
                stage="train_step_judge",
                arguments=args,
                inputs=[
                    args.preferences,
                    args.latents,
                    *(args.held_out.files if args.held_out.num_pairs else []),
                    published("clip").find(args.clip, MODEL_FILES),
                ],
                seed=seed_of(args.seed, "train_step_judge"),
                held_out=args.held_out,
                held_out_seed=seed_of(args.seed, "held_out"),
            ),
            StepJudgeOutputs(
                judge=args.output, training=args.training, curve=args.curve, work=args.work
            ),
            processes=processes,
            execution=args.execution,
        )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
