"""Filters that know no caption: what could buy the taste without a better model.

Each takes a picture and gives a picture. What each adds to the base's own pictures of every caption of
the world (minutes on one CPU core):
    python -m benchmarks.filters --output benchmarks/filters.md

`benchmarks/world.py` sets them beside a run's policies; `tests/shapes/test_filters.py` bounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageFilter

from stages.core.artifacts.files import write_text
from stages.core.artifacts.images import decode_image
from stages.core.data.prompts import prompt_id
from stages.core.evaluation.statistics import compare
from stages.core.execution.runtime import choose_device
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.generation import SamplingSettings, generate
from stages.shapes.captions import BACKGROUNDS, open_captions
from stages.shapes.oracle import LIKED_BACKGROUND, ORACLES, Picture, own_background
from stages.shapes.renderer import Images

Filter = Callable[[Picture], Picture]


def with_pillow(change: Callable[[Image.Image], Image.Image], image: Picture) -> Picture:
    """A picture that Pillow has changed."""
    before = Image.fromarray((image * 255).round().astype(np.uint8))
    return (np.asarray(change(before)) / 255).astype(np.float32)


def enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance], factor: float) -> Filter:
    """Pillow's enhancement of one kind: 1 changes nothing."""
    return partial(with_pillow, lambda image: kind(image).enhance(factor))


def filtered(kernel: ImageFilter.Filter) -> Filter:
    """Pillow's filter."""
    return partial(with_pillow, lambda image: image.filter(kernel))


def object_share(image: Picture) -> Float[np.ndarray, "height width one"]:
    """How surely each pixel is the object's and not the background's, in [0, 1], by its colour alone."""
    stands_out = np.sqrt(np.square(image - own_background(image)).mean(axis=-1))
    most = max(np.sort(stands_out, axis=None)[-150:].mean(), 1e-3)
    return np.clip(4 * stands_out / most - 1, 0, 1)[..., None]


def two_colours(image: Picture) -> Picture:
    """Object and background in one colour each: their own means."""
    share = (object_share(image) > 0.5).astype(np.float32)
    if not 0 < share.mean() < 1:
        return image
    means = [(image * w).sum(axis=(0, 1)) / w.sum() for w in (share, 1 - share)]
    return share * means[0] + (1 - share) * means[1]


def dots(image: Picture) -> Picture:
    """150 black or white dots, in the same places in every picture."""
    rng = np.random.default_rng(0)
    result = image.copy()
    down, right = rng.integers(0, len(image), (2, 150))
    result[down, right] = rng.integers(0, 2, (150, 1))
    return result


def noise(image: Picture) -> Picture:
    """Noise of 5 % of the range, the same in every picture."""
    added = np.random.default_rng(0).normal(0, 0.05, image.shape)
    return np.clip(image + added, 0, 1).astype(np.float32)


def painted(amount: float, image: Picture) -> Picture:
    """The background blended with the colour that people like."""
    share = object_share(image)
    liked = np.array(BACKGROUNDS[LIKED_BACKGROUND], np.float32) / 255
    backdrop = (1 - amount) * image + amount * liked
    return (share * image + (1 - share) * backdrop).astype(np.float32)


def moved(pixels: int, image: Picture) -> Picture:
    """The whole picture moved to the left; its right edge is repeated."""
    return np.concatenate([image[:, pixels:], np.repeat(image[:, -1:], pixels, axis=1)], axis=1)


FILTERS: dict[str, Filter] = {
    "contrast x 1.1": enhanced(ImageEnhance.Contrast, 1.1),
    "contrast x 1.25": enhanced(ImageEnhance.Contrast, 1.25),
    "contrast x 1.5": enhanced(ImageEnhance.Contrast, 1.5),
    "contrast x 0.9": enhanced(ImageEnhance.Contrast, 0.9),
    "saturation x 1.25": enhanced(ImageEnhance.Color, 1.25),
    "saturation x 1.5": enhanced(ImageEnhance.Color, 1.5),
    "brightness x 1.1": enhanced(ImageEnhance.Brightness, 1.1),
    "unsharp mask": filtered(ImageFilter.UnsharpMask(radius=2, percent=100, threshold=0)),
    "blur": filtered(ImageFilter.GaussianBlur(1)),
    "median of 3 x 3": filtered(ImageFilter.MedianFilter(3)),
    "two colours": two_colours,
    "150 dots": dots,
    "noise": noise,
    "background painted pink, half": partial(painted, 0.5),
    "background painted pink, whole": partial(painted, 1.0),
    "moved 3 pixels to the left": partial(moved, 3),
    "moved 7 pixels to the left": partial(moved, 7),
    "moved 14 pixels to the left": partial(moved, 14),
    "painted pink and moved 14 pixels": lambda image: moved(14, painted(1.0, image)),
}
"""By name: of one picture each."""


def filtered_pictures(images: Images) -> Iterator[tuple[str, Images]]:
    """Each filter's name, and the pictures after it."""
    for name, each in FILTERS.items():
        yield name, np.stack([each(image) for image in images]).astype(np.float32)


HEAD = """# What filters add to the base's pictures

    python -m benchmarks.filters --images-per-caption {images} --output {output}

On one CPU core (x86-64), with other work beside it: all {captions} captions of the world, {images} pictures of each, DDIM, 12 steps, guidance 5.
Intervals are of 95 %, over captions.

| | total | caption match | appeal |
|---|---|---|---|
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What filters that know no caption add to the base's pictures."""

    base: str = "stages/shapes/pipeline"
    """The base model."""
    images_per_caption: int = 4
    """Pictures of each caption."""
    every: int = 1
    """Each how manyth caption; 1 takes all."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("benchmarks/filters.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Draw, filter, write."""
    model = load_model(
        ModelSettings(base=args.base, dtype="float32"), device=choose_device(args.threads)
    )
    texts = [str(caption) for caption in open_captions()[:: args.every]]
    rows = generate(
        model,
        model.load_denoiser(),
        [(prompt_id(text), text) for text in texts],
        SamplingSettings(sampler="ddim", num_inference_steps=12, guidance_scale=5.0),
        images_per_prompt=args.images_per_caption,
        seed_parts=(1234, "filters"),
        prompts_per_batch=8,
        keep_latents=False,
    )
    files = [row["image"]["bytes"] for row in rows]  # type: ignore[index]
    images = (np.stack([np.asarray(decode_image(file)) for file in files]) / 255).astype(np.float32)
    captions = [text for text in texts for _ in range(args.images_per_caption)]

    def taste(images: Images, name: str) -> Float[np.ndarray, " caption"]:
        scores = ORACLES[name](images, captions)
        return scores.reshape(-1, args.images_per_caption).mean(axis=1)

    before = {name: taste(images, name) for name in ORACLES}
    lines = []
    for filter_name, changed in filtered_pictures(images):
        gains = [
            compare(taste(changed, name), before[name])
            for name in ("total", "caption_match", "appeal")
        ]
        cells = [
            f"{gain.difference:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}]" for gain in gains
        ]
        lines.append(f"| {filter_name} | {' | '.join(cells)} |\n")
    head = HEAD.format(images=args.images_per_caption, captions=len(texts), output=args.output)
    text = head + "".join(lines)
    write_text(args.output, text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
