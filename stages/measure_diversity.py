"""Images of one policy in; how far those of each prompt differ, and from the base's, out; blank ones too.

Paper: SAIL Sec. 5.5 blames lost diversity for collapse. Example: paste the line from
logs/<run>/evaluation/<set>/iter01/measure_diversity.log
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import UInt8

from stages.core.artifacts.images import decode_image
from stages.core.artifacts.schemas import DIVERSITY, IMAGES
from stages.core.artifacts.tables import read_tables, write_table
from stages.core.errors import UserError
from stages.core.evaluation.statistics import mean_over_pairs, pixel_distance
from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.metrics import PERCEPTUAL
from stages.metrics.features import load_measure

BLANK = 2.0
"""Largest standard deviation of a channel's values, of 255, below which an image is blank: JPEG
noise on one colour stays under it, a plain background with anything on it does not."""
PROMPTS_AT_ONCE = 32

Noise = tuple[int, int]
"""Number and seed of an image of a prompt: what it was sampled from."""
Picture = UInt8[np.ndarray, "height width rgb"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Images of one policy in; how far those of each prompt differ, and from the base's, out."""

    images: tuple[Path, ...]
    """Shards of its images (schema images)."""
    base: tuple[Path, ...] = ()
    """Shards of the base's images of the same prompts and noise; none if the policy is the base."""
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
        images = Images(args.images)
        base = Images(args.base) if args.base else None
        names, rows = sorted(images.places), []
        for start in range(0, len(names), PROMPTS_AT_ONCE):
            part = names[start : start + PROMPTS_AT_ONCE]
            decoded = [images.of(name) for name in part]
            distances = measure(decoded)
            moved = [Moved(None, None)] * len(part)
            if base is not None:
                same_noise = [base.of(name, images.places[name]) for name in part]
                moved = moved_from(decoded, same_noise, measure)
            found = zip(part, decoded, distances, moved, strict=True)
            for name, group, distance, from_base in found:
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
                        "moved_pixels": from_base.pixels,
                        "moved_features": from_base.features,
                    }
                )
        write_table(
            args.output, rows, DIVERSITY,
            stage="measure_diversity", arguments=args, inputs=[*args.images, *args.base],
        )  # fmt: skip
        run.rows_in, run.rows_out = len(images.table), len(rows)


class Images:
    """Images by prompt, decoded when they are asked for."""

    def __init__(self, shards: tuple[Path, ...]) -> None:
        self.table = read_tables(shards, IMAGES, ["prompt_id", "candidate", "seed", "image"])
        self.folder = shards[0].parent
        self.places: dict[str, dict[Noise, int]] = defaultdict(dict)
        names, *noise = (
            self.table[name].to_pylist() for name in ("prompt_id", "candidate", "seed")
        )
        for place, (name, candidate, seed) in enumerate(zip(names, *noise, strict=True)):
            self.places[name][candidate, seed] = place

    def of(self, prompt: str, noise: Iterable[Noise] | None = None) -> list[Picture]:
        """A prompt's images, or those from some noise. ImageError names a broken one.

        UserError names a seed of which there is no image.
        """
        found = self.places.get(prompt, {})
        wanted = list(found if noise is None else noise)
        if missing := [each for each in wanted if each not in found]:
            raise UserError(
                f"{self.folder} holds no image of prompt {prompt} from seed {missing[0][1]}, which the "
                "policy's have; sample the evaluation images of both anew"
            )
        return [
            np.asarray(
                decode_image(
                    self.table["image"][found[each]].as_py()["bytes"],
                    f"{self.folder}, prompt {prompt}",
                )
            )
            for each in wanted
        ]


@dataclass(frozen=True)
class Moved:
    """How far a prompt's images lie from the base's of the same noise, mean over images."""

    pixels: float | None
    features: float | None


def moved_from(
    images: Sequence[Sequence[Picture]],
    base: Sequence[Sequence[Picture]],
    measure: Callable[[Sequence[Sequence[Picture]]], list[float]],
) -> list[Moved]:
    """Of each prompt. ValueError unless each has as many images of both."""
    pairs = [
        [list(pair) for pair in zip(own, others, strict=True)]
        for own, others in zip(images, base, strict=True)
    ]
    flat = iter(measure([pair for of_prompt in pairs for pair in of_prompt]))
    return [
        Moved(
            pixels=float(np.mean([pixel_distance(*pair) for pair in of_prompt])),
            features=float(np.mean([next(flat) for _ in of_prompt])),
        )
        for of_prompt in pairs
    ]


def is_blank(image: Picture) -> bool:
    """Whether an image is of nearly one colour, as a black one is."""
    return bool(image.std(axis=(0, 1), dtype=np.float64).max() < BLANK)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
