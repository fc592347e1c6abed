"""From a table of preference pairs to a finished policy folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from stages.core.artifacts import BASE, policy_digest, provenance, write_manifest, write_table
from stages.core.errors import UserError
from stages.core.models import Denoiser, StableDiffusion
from stages.core.schemas import TRAINING
from stages.core.training import EncodedPairs, TrainingSettings, train_dpo


def load_denoiser(model: StableDiffusion, policy: str) -> Denoiser:
    """The denoiser of a finished policy folder, or the base model's for 'base'."""
    if policy == BASE:
        return model.load_denoiser()
    policy_digest(Path(policy))
    return model.load_denoiser(Path(policy))


def latents_tensor(
    column: pa.ChunkedArray, shape: tuple[int, ...], where: str
) -> Float[Tensor, "row channel height width"]:
    """The latents in a column. UserError if they are not of this model's shape."""
    flat = np.array(column.combine_chunks().flatten(), dtype=np.float32)
    if len(flat) != len(column) * int(np.prod(shape)):
        raise UserError(
            f"{where}: latents of {len(column)} images have {len(flat)} values, expected {shape} "
            "each; they were made with another base model. Make the file anew."
        )
    return torch.from_numpy(flat).reshape(len(column), *shape)


def encode_pairs(model: StableDiffusion, table: pa.Table, where: str) -> EncodedPairs:
    """Latents and caption conditionings of a table with prompt and latents columns."""
    prompts: list[str] = table.column("prompt").to_pylist()
    different = sorted(set(prompts))
    row_of = {prompt: row for row, prompt in enumerate(different)}
    text = model.encode_text([*different, ""])
    model.release("text_encoder", "tokenizer")
    return EncodedPairs(
        winner=latents_tensor(table.column("winner_latents"), model.latents_shape, where),
        loser=latents_tensor(table.column("loser_latents"), model.latents_shape, where),
        caption=torch.tensor([row_of[prompt] for prompt in prompts]),
        text=text,
    )


def train_policy(
    model: StableDiffusion,
    pairs: EncodedPairs,
    settings: TrainingSettings,
    *,
    stage: str,
    arguments: object,
    inputs: Sequence[Path],
    initial: str,
    reference: str,
    seed: int,
    output: Path,
    training: Path,
    work: Path,
    save_every: int,
) -> int:
    """Train from `initial` against `reference` and write the policy folder; the number of steps.

    Nothing is written under `output` before the training has ended; the manifest comes last.
    """
    if len(pairs) < 2:
        raise UserError(f"training needs at least 2 preference pairs, found {len(pairs)}")
    made_by = provenance(stage, arguments, inputs)
    identity = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    policy = load_denoiser(model, initial)
    steps = train_dpo(
        model,
        policy,
        load_denoiser(model, reference),
        pairs,
        settings,
        seed=seed,
        work=work,
        identity=identity,
        save_every=save_every,
    )
    records = [asdict(step) for step in steps]
    write_table(training, records, TRAINING, stage=stage, arguments=arguments, inputs=inputs)
    _save(policy, output)
    facts = {"num_pairs": len(pairs), "num_steps": len(steps), "last_loss": steps[-1].loss}
    write_manifest(output, stage=stage, arguments=arguments, inputs=inputs, facts=facts)
    shutil.rmtree(work, ignore_errors=True)
    return len(steps)


def _save(policy: Denoiser, output: Path) -> None:
    """The denoiser in diffusers layout under output/unet, replacing what was there at once."""
    (output / "manifest.json").unlink(missing_ok=True)
    part = output / "unet.part"
    shutil.rmtree(part, ignore_errors=True)
    policy.save_pretrained(part, safe_serialization=True)
    shutil.rmtree(output / "unet", ignore_errors=True)
    part.rename(output / "unet")
