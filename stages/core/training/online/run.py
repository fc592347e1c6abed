"""From prompts and a judge to a finished policy folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.core.artifacts.online_tables import ONLINE_TRAINING, TRANSITIONS
from stages.core.artifacts.provenance import policy_files, write_manifest
from stages.core.artifacts.schemas import HELD_OUT_CURVE
from stages.core.artifacts.tables import read_table, write_table, writing_table
from stages.core.execution.locks import held
from stages.core.execution.stopping import STOP
from stages.core.models.adapter import DiffusionModel
from stages.core.policies.loading import finished
from stages.core.policies.saving import save_policy
from stages.core.training.held_out import HeldOut
from stages.core.training.online.judges import StepJudge
from stages.core.training.online.loop import OnlineTraining
from stages.core.training.online.rounds import Asked
from stages.core.training.online.settings import OnlineSettings
from stages.core.training.pair_data import encode
from stages.core.training.processes import Processes
from stages.core.training.run import Outputs, Task
from stages.core.training.settings import Execution
from stages.core.training.state import identity_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OnlineOutputs(Outputs):
    """Where an online training writes; `training` has the schema online_training."""

    transitions: Path
    """Every transition that was judged (schema transitions)."""


def train_online_policy(
    model: DiffusionModel,
    load_judge: Callable[[], StepJudge],
    asked: Asked,
    settings: OnlineSettings,
    task: Task,
    outputs: OnlineOutputs,
    *,
    processes: Processes,
    execution: Execution,
    prompts_per_batch: int,
) -> int:
    """Train and write the policy folder; the number of steps.

    Nothing is written under the policy's folder before the training has ended; the manifest comes last. Of
    several processes only the main one writes.
    """
    policies = {*policy_files(task.initial), *policy_files(task.reference)}
    inputs = [*task.inputs, *sorted(policies - {*task.inputs})]
    lock = outputs.work.with_name(f"{outputs.work.name}.lock")
    with held(lock, str(outputs.work)) if processes.is_main else nullcontext():
        processes.wait()  # for the main one, which may have to wait for another training
        initial, compared = finished(task.initial), finished(task.reference)
        identity = identity_of(task.stage, task.arguments, inputs)
        encoded = encode(
            model,
            {"held_out": task.held_out.tables()},
            outputs.work / "pairs",
            identity,
            processes,
        )
        held_out = HeldOut.of(task.held_out, encoded.get("held_out"), task.held_out_seed)
        policy, reference = model.load_for_training(initial, compared, task.lora, task.seed)
        if settings.method == "ddpo" and held_out is None:
            reference = policy  # nobody looks at it: let the other go
        if processes.count > 1:
            log.info("training on %d processes", processes.count)
        processes.start_trackers(task.stage, asdict(settings))
        with STOP.deferred():  # to the end of a round; after the last one the policy is written
            training = OnlineTraining(
                model,
                policy,
                reference,
                load_judge(),
                asked,
                settings,
                seed=task.seed,
                work=outputs.work,
                identity=identity,
                processes=processes,
                execution=execution,
                prompts_per_batch=prompts_per_batch,
                held_out=held_out,
            )
            training.run()
            processes.end_trackers()
            if processes.is_main:
                _write_tables(training, task, outputs, inputs)
                facts = {
                    "base": model.base,
                    "kind": "lora" if task.lora.rank else "full",
                    "method": settings.method,
                    "num_rounds": settings.rounds,
                    "num_steps": len(training.steps),
                    "last_loss": training.steps[-1].loss,
                }
                save_policy(policy, outputs.policy, model.denoiser_part)
                write_manifest(
                    outputs.policy,
                    stage=task.stage, arguments=task.arguments, inputs=inputs, facts=facts,
                )  # fmt: skip
                shutil.rmtree(outputs.work, ignore_errors=True)
    return len(training.steps)


def _write_tables(
    training: OnlineTraining, task: Task, outputs: OnlineOutputs, inputs: Sequence[Path]
) -> None:
    for path, records, schema in (
        (outputs.training, training.steps, ONLINE_TRAINING),
        (outputs.held_out_curve, training.curve, HELD_OUT_CURVE),
    ):
        write_table(
            path, [asdict(record) for record in records], schema,
            stage=task.stage, arguments=task.arguments, inputs=inputs,
        )  # fmt: skip
    with writing_table(
        outputs.transitions, TRANSITIONS,
        stage=task.stage, arguments=task.arguments, inputs=inputs,
    ) as table:  # fmt: skip
        for path in training.rounds:
            table.write(read_table(path, TRANSITIONS).replace_schema_metadata(None))
