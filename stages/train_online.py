r"""Prompts, a policy and a judge in; the policy out that was trained on what it sampled meanwhile: SPO, DDPO, D3PO.

On several GPUs: python -m stages.launch 4 stages.train_online ... (or torchrun).
Example: paste the line from logs/<run>/online/train_online.log
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from stages.core.artifacts.provenance import BASE, policy_files
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.core.method.seeding import seed_of
from stages.core.method.trajectories import chain_schedule
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError, ModelSettings
from stages.core.policies.encoding import encode_captions
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.online.judges import ImageJudge, StepJudge, load_self_judge
from stages.core.training.online.rounds import Asked
from stages.core.training.online.run import OnlineOutputs, train_online_policy
from stages.core.training.online.settings import (
    SELF,
    SPM,
    JudgeSettings,
    OnlineSettings,
    check_settings,
)
from stages.core.training.processes import Processes
from stages.core.training.run import Task
from stages.core.training.settings import Execution
from stages.metrics import load_scorer


@dataclass(frozen=True, kw_only=True)
class Args:
    """Prompts, a policy and a judge in; the policy out that was trained on what it sampled meanwhile."""

    prompts: Path
    """The prompts that are trained on (schema prompts)."""
    model: ModelSettings
    """The pretrained model."""
    lora: LoraSettings
    """Low-rank adapters, or a full fine-tune with rank 0."""
    settings: OnlineSettings
    """The method, its sampling and its optimisation."""
    judge: JudgeSettings
    """Who judges."""
    held_out: HeldOutFiles
    """Human pairs that are scored on the way."""
    seed: int
    """Run seed: decides order, noise and the first LoRA weights."""
    output: Path
    """Policy folder to write (weights and manifest.json)."""
    training: Path
    """Where the per-step measures go (schema online_training)."""
    transitions: Path
    """Where every judged transition goes (schema transitions)."""
    held_out_curve: Path
    """Where the held-out measures go (schema held_out_curve)."""
    work: Path
    """Folder for the training state; removed when the training has ended."""
    policy: str = BASE
    """Policy folder to start from, or 'base' (published)."""
    reference: str = BASE
    """Policy folder that spo and d3po compare with, or 'base' (published)."""
    execution: Execution = field(default_factory=Execution)
    """How it runs: micro-batches (of transitions), gradient checkpointing, saved states."""
    prompts_per_batch: int = 4
    """Prompts that are sampled together; changes what they give by rounding only."""
    trackers: tuple[str, ...] = ()
    """Where to send each step's measures besides the table: tensorboard (in trackers/ beside it), wandb."""
    threads: int = 2
    """CPU threads."""


def main(args: Args) -> None:
    """Encode the prompts, then go through the rounds."""
    with stage("train_online") as run:
        check_settings(args.settings, args.judge)
        processes = Processes(
            choose_device(args.threads),
            trackers=args.trackers,
            folder=args.training.parent / "trackers",
        )
        model = load_model(args.model, device=processes.device)
        check_model(model, args)  # before prompts are encoded
        asked = read_prompts(model, args)
        run.rows_in = len(asked.prompts)
        run.rows_out = train_online_policy(
            model,
            lambda: load_step_judge(model, args),
            asked,
            args.settings,
            Task(
                stage="train_online",
                arguments=args,
                inputs=inputs_of(args),
                initial=args.policy,
                reference=args.reference,
                lora=args.lora,
                seed=seed_of(args.seed, "train_online"),
                held_out=args.held_out,
                held_out_seed=seed_of(args.seed, "held_out"),
            ),
            OnlineOutputs(
                policy=args.output,
                training=args.training,
                held_out_curve=args.held_out_curve,
                work=args.work,
                transitions=args.transitions,
            ),
            processes=processes,
            execution=args.execution,
            prompts_per_batch=args.prompts_per_batch,
        )


def check_model(model: DiffusionModel, args: Args) -> None:
    """ModelError for a model whose steps have no probability, or whose timesteps the judge does not know."""
    chain_schedule(model, args.settings.num_inference_steps, args.settings.noise_level)
    if args.judge.name == SPM and "ddim" not in model.samplers:
        raise ModelError(
            f"{model.base}: the judge is 'spm', a step-aware preference model, which has learnt what DDIM sees at a "
            f"timestep; models of {model.family} have other timesteps. Take 'self' or a metric as online.judge"
        )


def inputs_of(args: Args) -> list[Path]:
    """The files that decide the result."""
    return [
        args.prompts,
        *(args.held_out.files if args.held_out.num_pairs else []),
        *judge_files(args.judge),
    ]


def judge_files(judge: JudgeSettings) -> list[Path]:
    """The files that stand for a judge that a run has trained; none for a metric."""
    if judge.name == SELF:
        return [*policy_files(judge.policy), *([judge.record] if judge.record else [])]
    own = Path(judge.options.get("weights", "")) / "manifest.json"
    return [own] if judge.name == SPM and own.is_file() else []


def read_prompts(model: DiffusionModel, args: Args) -> Asked:
    """The prompts with their conditioning; UserError if there is none."""
    table = read_table(args.prompts, PROMPTS)
    names, prompts = (table.column(name).to_pylist() for name in ("prompt_id", "prompt"))
    if not prompts:
        raise UserError(f"{args.prompts} has no prompt; online training needs at least one")
    return Asked(
        prompts=list(zip(names, prompts, strict=True)),
        text=encode_captions(model, prompts),
        unconditional=model.unconditional(),
    )


def load_step_judge(model: DiffusionModel, args: Args) -> StepJudge:
    """Who judges; UserError for a metric that does not exist, or whose weights are missing."""
    settings = args.judge
    if settings.name == SELF:
        return load_self_judge(model, settings, args.settings)
    if settings.name == SPM:
        from stages.metrics.step_aware import StepAwarePreference  # slow to import

        spm = StepAwarePreference(settings.options, model.device)
        return ImageJudge(model=model, score=spm, scale=settings.scale, sees_timestep=True)
    scorer = load_scorer(settings.name, settings.options, model.device)
    return ImageJudge(model=model, score=scorer, scale=settings.scale)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
