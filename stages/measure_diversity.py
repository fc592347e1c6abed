"""Images of one policy in; how far those of each prompt differ, and how many are blank, out.

Paper: SAIL Sec. 5.5 blames lost diversity for collapse. Example: paste the line from
logs/<run>/evaluation/<set>/iter01/measure_diversity.log
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro
from jaxtyping import UInt8

from stages.core.artifacts.images import decode_image
from stages.core.artifacts.schemas import DIVERSITY, IMAGES
from stages.core.artifacts.tables import read_tables, write_table
from stages.core.evaluation.statistics import mean_over_pairs, pixel_distance
from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.metrics import PERCEPTUAL
from stages.metrics.features import load_measure

BLANK = 2.0
"""Largest standard deviation of a channel's values, of 255, below which an image is blank: JPEG
noise on one colour stays under it, a plain background with anything on it does not."""
PROMPTS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Args:
    """Images of one policy in; how far those of each prompt differ, and how many are blank, out."""

    images: tuple[Path, ...]
    """Shards of its images (schema images)."""
    features: str
    """The metric whose CLIP compares them, or 'perceptual'."""
    options: dict[str, str] = field(default_factory=dict)
    """That metric's own options, as weights: name, value, name, value, ..."""
    output: Path
    """Where the distances go (schema diversity)."""
    threads: int = 1
    """CPU threads."""
    jobs_per_gpu: int = 1
    """Jobs of this kind that may share a GPU; 1 has it alone."""


def main(args: Args) -> None:
    """Measure prompt by prompt; of a single image there is no distance."""
    with stage("measure_diversity") as run:
        device = None
        if args.features != PERCEPTUAL:
            device = choose_device(args.threads, args.jobs_per_gpu)
        measure = load_measure(args.features, args.options, device)
        table = read_tables(args.images, IMAGES, ["prompt_id", "image"])
        groups: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(table["prompt_id"].to_pylist()):
            groups[name].append(index)
        names, rows = sorted(groups), []
        for start in range(0, len(names), PROMPTS_AT_ONCE):
            part = names[start : start + PROMPTS_AT_ONCE]
            decoded = [
                [decoded_at(table, index, args.images[0].parent) for index in groups[name]]
                for name in part
            ]
            for name, group, distance in zip(part, decoded, measure(decoded), strict=True):
                is_several = len(group) > 1
                rows.append(
                    {
                        "prompt_id": name,
                        "num_images": len(group),
                        "num_blank": sum(is_blank(image) for image in group),
                        "pixel_distance": (
                            mean_over_pairs(group, pixel_distance) if is_several else None
                        ),
                        "feature_distance": distance if is_several else None,
                        "features": args.features,
                    }
                )
        write_table(
            args.output, rows, DIVERSITY,
            stage="measure_diversity", arguments=args, inputs=args.images,
        )  # fmt: skip
        run.rows_in, run.rows_out = sum(map(len, groups.values())), len(rows)


def decoded_at(table: pa.Table, index: int, folder: Path) -> UInt8[np.ndarray, "height width rgb"]:
    """The image of a row. ImageError names its shards' folder and its prompt."""
    data = table["image"][index].as_py()["bytes"]
    return np.asarray(decode_image(data, f"{folder}, prompt {table['prompt_id'][index]}"))


def is_blank(image: UInt8[np.ndarray, "height width rgb"]) -> bool:
    """Whether an image is of nearly one colour, as a black one is."""
    return bool(image.std(axis=(0, 1), dtype=np.float64).max() < BLANK)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
