"""From a table of preference pairs to a finished policy folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.core.artifacts.provenance import BASE, policy_files, write_manifest
from stages.core.artifacts.schemas import HELD_OUT_CURVE, TRAINING
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from stages.core.execution.locks import held
from stages.core.execution.stopping import STOP
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LoraSettings
from stages.core.policies.encoding import EncodedPairs
from stages.core.policies.like_files import LikeTables
from stages.core.policies.loading import finished
from stages.core.policies.pair_files import PairTables
from stages.core.policies.saving import save_policy
from stages.core.training.held_out import HeldOut, HeldOutFiles, Progress, kept_step
from stages.core.training.loop import Step, Training
from stages.core.training.pair_data import encode_any
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings, needs_reference
from stages.core.training.state import identity_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a training writes."""

    policy: Path
    """Policy folder (the weights and manifest.json)."""
    training: Path
    """Per-step measures (schema training)."""
    held_out_curve: Path
    """Measures of the held-out pairs on the way (schema held_out_curve)."""
    work: Path
    """Training state and encoded pairs; removed when the training has ended."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, from what, against what, and who asked for it."""

    stage: str
    """Name of the stage, for provenance."""
    arguments: object
    """Arguments of the stage that decide the result, for provenance and identity."""
    inputs: Sequence[Path]
    """Files the result depends on."""
    initial: str
    """Policy folder to start from, or 'base'."""
    reference: str
    """Policy folder the loss compares with, or 'base'."""
    lora: LoraSettings
    """Rank 0 is a full fine-tune."""
    seed: int
    """Decides order, timesteps, noise and the first LoRA weights."""
    held_out: HeldOutFiles
    """Human pairs that are scored on the way."""
    held_out_seed: int
    """Decides their timesteps and noise."""


def train_policy(
    model: DiffusionModel,
    tables: PairTables | LikeTables,
    settings: TrainingSettings,
    task: Task,
    outputs: Outputs,
    *,
    processes: Processes,
    execution: Execution,
) -> int:
    """Train and write the policy folder; the number of steps.

    Nothing is written under the policy's folder before the training has ended; the manifest comes
    last. Of several processes only the main one writes.
    """
    model.check_loss(settings.loss)
    if len(tables) < 2:
        what = "likes" if isinstance(tables, LikeTables) else "preference pairs"
        raise UserError(f"training needs at least 2 {what}, found {len(tables)}")
    if isinstance(tables, LikeTables):
        refuse_one_sided(tables, settings)
    inputs = [*task.inputs, *sorted({*policy_files(task.initial), *policy_files(task.reference)})]
    lock = outputs.work.with_name(f"{outputs.work.name}.lock")
    with held(lock, str(outputs.work)) if processes.is_main else nullcontext():
        processes.wait()  # for the main one, which may have to wait for another training
        initial, compared = finished(task.initial), finished(task.reference)
        identity = identity_of(task.stage, task.arguments, inputs)
        encoded = encode_any(
            model,
            {"trained": tables, "held_out": task.held_out.tables()},
            outputs.work / "pairs",
            identity,
            processes,
        )
        held_out = encoded.get("held_out")
        assert held_out is None or isinstance(held_out, EncodedPairs)
        policy, reference = model.load_for_training(initial, compared, task.lora, task.seed)
        if processes.count > 1:
            log.info("training on %d processes", processes.count)
        processes.start_trackers(task.stage, asdict(settings))
        with STOP.deferred():  # to the end of a step; after the last one the policy is written
            steps, curve = Training(
                model,
                policy,
                reference if needs_reference(settings) else None,
                encoded["trained"],
                settings,
                seed=task.seed,
                work=outputs.work,
                identity=identity,
                processes=processes,
                execution=execution,
                held_out=HeldOut.of(task.held_out, held_out, task.held_out_seed),
            ).run()
            processes.end_trackers()
            if settings.stop_after_no_gain and kept_step(curve) == 0:
                refuse_untouched(task, curve)
            if processes.is_main:
                facts = {
                    "base": model.base,
                    "kind": "lora" if task.lora.rank else "full",
                    "num_pairs": len(tables),
                    "num_steps": len(steps),
                    "last_loss": steps[-1].loss,
                    **({"kept_step": kept_step(curve)} if settings.stop_after_no_gain else {}),
                }
                _write_tables(steps, curve, task, outputs, inputs)
                save_policy(policy, outputs.policy, model.denoiser_part)
                write_manifest(
                    outputs.policy,
                    stage=task.stage, arguments=task.arguments, inputs=inputs, facts=facts,
                )  # fmt: skip
                shutil.rmtree(outputs.work, ignore_errors=True)
    return len(steps)


def refuse_one_sided(likes: LikeTables, settings: TrainingSettings) -> None:
    """UserError for a loss that needs pairs, for labels that all say the same, or for a share that leaves a kind out."""
    if settings.loss != "kto":
        raise UserError(
            f"train_seed.loss is {settings.loss!r}, which compares two images, and {likes.latents} holds single likes; "
            "set train_seed.loss to 'kto', or preferences.unpaired to false"
        )
    if len(set(likes.is_liked.tolist())) < 2:
        kind = "liked" if likes.is_liked[0] else "disliked"
        raise UserError(
            f"all {len(likes)} images of {likes.latents} are {kind}; KTO needs some of both kinds"
        )


def refuse_untouched(task: Task, curve: Sequence[Progress]) -> None:
    """UserError where no step judged held-out pairs better than the base does, which has no opinion.

    An update that gains nothing hands on the policy that it began with, and says so.
    """
    if task.initial == BASE:
        raise UserError(
            f"early stopping: none of {len(curve) - 1} scores on the way judged the held-out pairs better than "
            "the base, which has no opinion on them. No policy was written: it would be the base itself. Look "
            "at the labels, raise the learning rate or the passes, or set stop_after_no_gain to 0."
        )
    log.warning(
        "early stopping: no score on the way was better than the start's; %s is handed on as it was",
        task.initial,
    )


def _write_tables(
    steps: Sequence[Step],
    curve: Sequence[Progress],
    task: Task,
    outputs: Outputs,
    inputs: Sequence[Path],
) -> None:
    for path, records, schema in (
        (outputs.training, steps, TRAINING),
        (outputs.held_out_curve, curve, HELD_OUT_CURVE),
    ):
        write_table(
            path, [asdict(record) for record in records], schema,
            stage=task.stage, arguments=task.arguments, inputs=inputs,
        )  # fmt: skip
