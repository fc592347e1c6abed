"""From human pairs to a finished step-aware preference model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.core.artifacts.online_tables import STEP_JUDGE_CURVE, STEP_JUDGE_TRAINING
from stages.core.artifacts.provenance import write_manifest
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from stages.core.execution.locks import held
from stages.core.execution.stopping import STOP
from stages.core.models.adapter import DiffusionModel
from stages.core.policies.pair_files import PairTables
from stages.core.policies.saving import replace_weights
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.pair_data import encode
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution
from stages.core.training.state import identity_of
from stages.core.training.step_judge.estimates import Estimates, refuse_other_noise
from stages.core.training.step_judge.held_out import HeldOutJudgement
from stages.core.training.step_judge.loop import StepJudgeTraining
from stages.core.training.step_judge.settings import StepJudgeSettings, TrainableJudge

log = logging.getLogger(__name__)

ROWS_PER_BATCH = 16
"""Held-out pairs at once; fewer if the training's micro-batches are smaller."""


@dataclass(frozen=True, kw_only=True)
class StepJudgeTask:
    """What is trained, from what, and who asked for it."""

    stage: str
    """Name of the stage, for provenance."""
    arguments: object
    """Arguments of the stage that decide the result, for provenance and identity."""
    inputs: Sequence[Path]
    """Files that the result depends on."""
    seed: int
    """Decides order, timesteps, noise and the first weights of what is new."""
    held_out: HeldOutFiles
    """Human pairs that are judged on the way."""
    held_out_seed: int
    """Decides their noise."""


@dataclass(frozen=True, kw_only=True)
class StepJudgeOutputs:
    """Where it is written."""

    judge: Path
    """Folder of the model (weights, config.json and manifest.json)."""
    training: Path
    """Per-step measures (schema step_judge_training)."""
    curve: Path
    """Held-out pairs by timestep (schema step_judge_curve)."""
    work: Path
    """Training state and encoded pairs; removed when the training has ended."""


def train_judge(
    model: DiffusionModel,
    load: Callable[[], TrainableJudge],
    tables: PairTables,
    settings: StepJudgeSettings,
    task: StepJudgeTask,
    outputs: StepJudgeOutputs,
    *,
    processes: Processes,
    execution: Execution,
) -> int:
    """Train and write the model's folder; the number of steps. `load` gives the network as it begins.

    Nothing is written under the folder before the training has ended; the manifest comes last. Of several
    processes only the main one writes.
    """
    refuse_other_noise(model)
    if len(tables) < 2:
        raise UserError(f"training needs at least 2 preference pairs, found {len(tables)}")
    lock = outputs.work.with_name(f"{outputs.work.name}.lock")
    with held(lock, str(outputs.work)) if processes.is_main else nullcontext():
        processes.wait()  # for the main one, which may have to wait for another training
        identity = identity_of(task.stage, task.arguments, task.inputs)
        unconditional = model.unconditional()
        held_out = task.held_out.tables()
        encoded = encode(
            model, {"trained": tables, "held_out": held_out}, outputs.work / "pairs",
            identity, processes,
        )  # fmt: skip
        judge = load()
        if processes.count > 1:
            log.info("training on %d processes", processes.count)
        processes.start_trackers(task.stage, asdict(settings))
        with STOP.deferred():  # to the end of a step; after the last one the model is written
            training = StepJudgeTraining(
                judge,
                _frozen(load()) if settings.labels == "clip" else None,
                Estimates.of(model, unconditional, settings.guidance_scale),
                encoded["trained"],
                tables.prompts,
                settings,
                seed=task.seed,
                work=outputs.work,
                identity=identity,
                processes=processes,
                execution=execution,
                held_out=HeldOutJudgement.of(
                    task.held_out,
                    encoded.get("held_out"),
                    held_out.prompts if held_out else (),
                    task.held_out_seed,
                    min(ROWS_PER_BATCH, execution.micro_batch_pairs or ROWS_PER_BATCH),
                ),
            )
            training.run()
            processes.end_trackers()
            if processes.is_main:
                _write(training, len(tables), task, outputs)
                shutil.rmtree(outputs.work, ignore_errors=True)
    return len(training.steps)


def _frozen(judge: TrainableJudge) -> TrainableJudge:
    judge.network.freeze()
    return judge


def _write(
    training: StepJudgeTraining, num_pairs: int, task: StepJudgeTask, outputs: StepJudgeOutputs
) -> None:
    for path, records, schema in (
        (outputs.training, training.steps, STEP_JUDGE_TRAINING),
        (outputs.curve, training.curve, STEP_JUDGE_CURVE),
    ):
        write_table(
            path, [asdict(record) for record in records], schema,
            stage=task.stage, arguments=task.arguments, inputs=task.inputs,
        )  # fmt: skip
    replace_weights(outputs.judge, training.judge.save)
    facts = {
        "base": training.model.base,
        "num_pairs": num_pairs,
        "num_steps": len(training.steps),
        "last_loss": training.steps[-1].loss,
    }
    write_manifest(
        outputs.judge, stage=task.stage, arguments=task.arguments, inputs=task.inputs, facts=facts,
    )  # fmt: skip
