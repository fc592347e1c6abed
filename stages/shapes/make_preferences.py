"""Captions in; labelled pairs out in the Pick-a-Pic v2 columns, as if people had been asked.

The base model samples two images of each pair; the known taste labels them through a
Bradley-Terry coin, so that some labels are wrong, as people's are, and calls near-equal ones ties.

Example: paste the line from logs/<run>/world/make_preferences.log
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image

from stages.core.artifacts.files import replacing
from stages.core.artifacts.images import decode_image
from stages.core.artifacts.schemas import PICKAPIC
from stages.core.data.prompts import prompt_id, read_prompts
from stages.core.execution.runtime import choose_device, log, run_stage, stage
from stages.core.method.seeding import seed_of
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.generation import SamplingSettings, generate
from stages.shapes.oracle import total


@dataclass(frozen=True, kw_only=True)
class Args:
    """Captions in, labelled pairs out in the Pick-a-Pic v2 columns."""

    captions: Path
    """Captions of the embedded world, one a line."""
    model: ModelSettings
    """The pretrained model."""
    settings: SamplingSettings
    """The sampler."""
    pairs_per_caption: int
    """Labelled pairs of each caption."""
    label_temperature: float
    """p(first wins) = sigmoid(taste difference / temperature); 0 would never err."""
    tie_below: float
    """Taste differences smaller than this are labelled a tie."""
    seed: int
    """Run seed: decides images and coins."""
    output: Path
    """Where the pairs go (Parquet, Pick-a-Pic v2 columns)."""
    prompts_per_batch: int = 4
    """Captions sampled at a time."""
    threads: int = 1
    """CPU threads."""
    jobs_per_gpu: int = 1
    """Jobs of this kind that may share a GPU; 1 has it alone."""


def main(args: Args) -> None:
    """Sample, let the taste and the coin decide, write."""
    with stage("make_preferences") as run:
        captions = read_prompts(args.captions)
        model = load_model(args.model, device=choose_device(args.threads, args.jobs_per_gpu))
        images = list(
            generate(
                model,
                model.load_denoiser(),
                [(prompt_id(caption), caption) for caption in captions],
                args.settings,
                images_per_prompt=2 * args.pairs_per_caption,
                seed_parts=(args.seed, "make_preferences"),
                prompts_per_batch=args.prompts_per_batch,
                keep_latents=False,
            )
        )
        data = [row["image"]["bytes"] for row in images]  # type: ignore[index]
        prompts = [str(row["prompt"]) for row in images]
        pixels = np.stack([np.asarray(decode_image(item)) for item in data])
        taste = total((pixels / 255).astype(np.float32), prompts).astype(np.float64)
        labels, is_wrong = label(taste[0::2], taste[1::2], args)
        is_tie = labels == 0.5
        log.info(
            "make_preferences: %d pairs, %d ties, %.1f %% of the other labels are wrong",
            len(labels), is_tie.sum(), 100 * is_wrong[~is_tie].mean(),
        )  # fmt: skip
        rows = [
            to_row(number, caption, data[2 * number : 2 * number + 2], float(labels[number]), args)
            for number, caption in enumerate(prompts[0::2])
        ]
        with replacing(args.output) as part:
            table = pa.Table.from_pylist(rows, schema=PICKAPIC)
            pq.write_table(table, part, row_group_size=100)
        run.rows_in, run.rows_out = len(captions), len(rows)


def label(
    first: Float[np.ndarray, " pair"],
    second: Float[np.ndarray, " pair"],
    args: Args,
) -> tuple[Float[np.ndarray, " pair"], NDArray[np.bool_]]:
    """label_0 of each pair (1 the first image wins, 0 the second, 0.5 a tie), and which err."""
    gap = first - second
    rng = np.random.default_rng(seed_of(args.seed, "label"))
    probability = np.exp(-np.logaddexp(0.0, -gap / max(args.label_temperature, 1e-9)))
    label_0 = (rng.random(len(gap)) < probability).astype(np.float64)
    is_wrong = (label_0 == 1) != (gap > 0)
    return np.where(np.abs(gap) < args.tie_below, 0.5, label_0), is_wrong


def to_row(
    number: int, caption: str, images: Sequence[bytes], label_0: float, args: Args
) -> dict[str, object]:
    """One row in the Pick-a-Pic v2 columns; the images are JPEG files, as there."""
    uids = [f"{args.seed}-{number}-{side}" for side in (0, 1)]
    best = {1.0: uids[0], 0.0: uids[1]}.get(label_0, "tie")
    return {
        "are_different": label_0 != 0.5,
        "best_image_uid": best,
        "caption": caption,
        "created_at": datetime(2026, 1, 1),
        "has_label": True,
        **{f"image_{side}_uid": uids[side] for side in (0, 1)},
        **{f"image_{side}_url": "" for side in (0, 1)},
        **{f"jpg_{side}": _jpeg(images[side]) for side in (0, 1)},
        "label_0": label_0,
        "label_1": 1 - label_0,
        "model_0": "shapes",
        "model_1": "shapes",
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": args.pairs_per_caption,
        "__index_level_0__": number,
    }


def _jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
