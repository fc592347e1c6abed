"""From a table of preference pairs to a finished policy folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.artifacts import (
    BASE,
    policy_digest,
    policy_files,
    provenance,
    write_manifest,
    write_table,
)
from stages.core.disk import writing
from stages.core.errors import UserError
from stages.core.held_out_curve import HeldOut, Progress, best_step
from stages.core.images import decode_image, to_model_input
from stages.core.locks import held
from stages.core.models import Conditioning, Denoiser, DiffusionModel, LoraSettings
from stages.core.pair_losses import EncodedPairs
from stages.core.processes import Processes
from stages.core.schemas import HELD_OUT_CURVE, TRAINING
from stages.core.stopping import STOP
from stages.core.training import Step, train_dpo
from stages.core.training_settings import Execution, TrainingSettings, needs_reference

log = logging.getLogger(__name__)

RUN_TIME = ("execution", "threads", "trackers", "work")
"""Arguments that change how a training runs and not what it ends with."""

CAPTIONS_PER_BATCH = 64
IMAGES_PER_BATCH = 8


def policy_path(policy: str) -> Path | None:
    """The folder of a finished policy, or None for 'base'. ArtifactError unless it is complete."""
    if policy == BASE:
        return None
    policy_digest(Path(policy))
    return Path(policy)


def load_denoiser(model: DiffusionModel, policy: str) -> Denoiser:
    """The denoiser of a finished policy folder, or the base model's for 'base'."""
    return model.load_denoiser(policy_path(policy))


def load_denoisers(model: DiffusionModel, policy: str, reference: str) -> tuple[Denoiser, Denoiser]:
    """(policy, reference), which share one network where they differ by LoRA adapters only."""
    return model.load_denoisers(policy_path(policy), policy_path(reference))


def latents_tensor(
    column: pa.ChunkedArray, shape: tuple[int, ...], where: str
) -> Float[Tensor, "row channel height width"]:
    """The latents in a column. UserError if they are not of this model's shape."""
    parts = [np.asarray(chunk.flatten(), dtype=np.float32) for chunk in column.chunks]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if len(flat) != len(column) * int(np.prod(shape)):
        raise UserError(
            f"{where}: latents of {len(column)} images have {len(flat)} values, expected {shape} "
            "each; they were made with another base model. Make the file anew."
        )
    return torch.from_numpy(flat).reshape(len(column), *shape)


def encode_captions(model: DiffusionModel, captions: Sequence[str]) -> Conditioning:
    """Conditioning of each caption, on the CPU; says how many are cut to the encoder's length."""
    truncated = model.num_truncated(captions)
    if truncated:
        log.warning(
            "%d of %d captions are longer than the text encoder reads and are cut",
            truncated, len(captions),
        )  # fmt: skip
    cpu = torch.device("cpu")
    parts = [
        model.encode_text(captions[start : start + CAPTIONS_PER_BATCH]).to(cpu)
        for start in range(0, len(captions), CAPTIONS_PER_BATCH)
    ]
    whole = parts[0]
    names = whole.tensors
    return Conditioning({name: torch.cat([part[name] for part in parts]) for name in names})


def encode_pairs(
    model: DiffusionModel, table: pa.Table, where: str, *, is_live: bool = False
) -> EncodedPairs:
    """Latents and caption conditionings of a table with prompt, geometry and latents columns.

    Live encoding takes the images instead of the latents. Neither VAE nor text encoder is kept.
    """
    prompts: list[str] = table.column("prompt").to_pylist()
    different = sorted(set(prompts))
    row_of = {prompt: row for row, prompt in enumerate(different)}
    text = encode_captions(model, [*different, ""])
    sides = {
        side: _encode_live(model, table.column(side)) if is_live else
        latents_tensor(table.column(f"{side}_latents"), model.latents_shape, where)
        for side in ("winner", "loser")
    }  # fmt: skip
    model.release("vae", *model.encoder_parts)
    return EncodedPairs(
        winner=sides["winner"],
        loser=sides["loser"],
        caption=torch.tensor([row_of[prompt] for prompt in prompts]),
        text=text,
        winner_geometry=_geometry(table.column("winner_geometry")),
        loser_geometry=_geometry(table.column("loser_geometry")),
    )


def _geometry(column: pa.ChunkedArray) -> Int[Tensor, "row six"]:
    return torch.tensor(column.to_pylist(), dtype=torch.int64).reshape(-1, 6)


def _encode_live(
    model: DiffusionModel, column: pa.ChunkedArray
) -> Float[Tensor, "row channel height width"]:
    parts = []
    for start in range(0, len(column), IMAGES_PER_BATCH):
        data = column.slice(start, IMAGES_PER_BATCH).to_pylist()
        images = [decode_image(image["bytes"]) for image in data]
        pixels = torch.from_numpy(to_model_input(images, model.image_size))
        parts.append(model.encode_images(pixels).float().cpu())
    return torch.cat(parts)


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
    """Training state; removed when the training has ended."""


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


def train_policy(
    model: DiffusionModel,
    pairs: EncodedPairs,
    settings: TrainingSettings,
    task: Task,
    outputs: Outputs,
    *,
    processes: Processes,
    execution: Execution,
    held_out: HeldOut | None,
) -> int:
    """Train and write the policy folder; the number of steps.

    Nothing is written under the policy's folder before the training has ended; the manifest comes
    last. Of several processes only the main one writes.
    """
    if len(pairs) < 2:
        raise UserError(f"training needs at least 2 preference pairs, found {len(pairs)}")
    inputs = [*task.inputs, *sorted({*policy_files(task.initial), *policy_files(task.reference)})]
    lock = outputs.work.with_name(f"{outputs.work.name}.lock")
    with held(lock, str(outputs.work)) if processes.is_main else nullcontext():
        processes.wait()  # for the main one, which may have to wait for another training
        policy, reference = model.load_for_training(
            policy_path(task.initial), policy_path(task.reference), task.lora, task.seed
        )
        if processes.count > 1:
            log.info("training on %d processes", processes.count)
        processes.start_trackers(task.stage, asdict(settings))
        with STOP.deferred():  # to the end of a step; after the last one the policy is written
            steps, curve = train_dpo(
                model,
                policy,
                reference if needs_reference(settings) else None,
                pairs,
                settings,
                seed=task.seed,
                work=outputs.work,
                identity=_identity(task, inputs),
                processes=processes,
                execution=execution,
                held_out=held_out,
            )
            processes.end_trackers()
            if processes.is_main:
                facts = {
                    "base": model.base,
                    "kind": "lora" if task.lora.rank else "full",
                    "num_pairs": len(pairs),
                    "num_steps": len(steps),
                    "last_loss": steps[-1].loss,
                    **({"best_step": best_step(curve)} if settings.stop_after_no_gain else {}),
                }
                _write_tables(steps, curve, task, outputs, inputs)
                save_policy(policy, outputs.policy, model.denoiser_part)
                write_manifest(
                    outputs.policy,
                    stage=task.stage, arguments=task.arguments, inputs=inputs, facts=facts,
                )  # fmt: skip
                shutil.rmtree(outputs.work, ignore_errors=True)
    return len(steps)


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


def _identity(task: Task, inputs: Sequence[Path]) -> str:
    """What names a training's state: all that decides its result, not how it runs."""
    made_by = provenance(task.stage, task.arguments, inputs)
    arguments = json.loads(made_by["sail_arguments"])
    decisive = {name: value for name, value in arguments.items() if name not in RUN_TIME}
    text = json.dumps({**made_by, "sail_arguments": decisive}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def save_policy(policy: Denoiser, output: Path, part: str) -> None:
    """The policy in diffusers' layout, replacing what was there at once.

    DiskError if the disk is full or read-only; no weights of the new policy stay then.
    """
    new = output / "new.part"
    shutil.rmtree(new, ignore_errors=True)
    with writing(output):
        try:
            policy.save(new, part)
            for file in (path for path in new.rglob("*") if path.is_file()):
                with file.open("rb") as written:
                    os.fsync(written.fileno())  # before the manifest says that all is there
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    (output / "manifest.json").unlink(missing_ok=True)
    for old in [path for path in output.iterdir() if path != new]:
        _remove(old)  # also weights of the other kind
    for path in sorted(new.iterdir()):
        path.replace(output / path.name)
    new.rmdir()
