r"""What the embedded world proves, beyond one run's table: guidance, samplers, filters, what is liked.

Example (after `make demo`; minutes on two CPU cores):
    python -m benchmarks.world --run results/shapes --output benchmarks/world.md

A gain that the base could have by another guidance scale, or a picture by a filter that knows no caption,
would be no proof of the loop. Every picture of one caption and number is sampled from the same noise.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float
from PIL import Image, ImageDraw

from benchmarks.filters import filtered_pictures
from stages.core.artifacts.files import replacing, write_text
from stages.core.artifacts.images import decode_image
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.statistics import Comparison, compare
from stages.core.execution.runtime import choose_device
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.plan.configuration import without_defaults
from stages.core.policies.generation import SamplingSettings, generate
from stages.core.policies.loading import load_denoiser
from stages.shapes.captions import parse_caption
from stages.shapes.oracle import ORACLES, best_scene, total
from stages.shapes.renderer import Images

HEAD = """# What the embedded world proves

    python -m benchmarks.world {flags}

On two CPU cores (x86-64), after the run: {captions} captions of its evaluation fold, {images} pictures of
each, the same noise for every policy. Intervals are of 95 %, over captions.
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Guidance, samplers, filters, what is liked: by policy."""

    run: Path = Path("results/shapes")
    """A finished run of the embedded world."""
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    """Guidance scales of the curve."""
    captions: int = 200
    """How many captions of the run's evaluation fold."""
    images_per_caption: int = 2
    """Pictures of each."""
    threads: int = 2
    """CPU threads."""
    strip: int = 10
    """How many pictures of each policy a block of the strip shows."""
    only_strip: bool = False
    """Draw the strip and write no tables."""
    picture: Path = Path("work/strip.jpg")
    """Where the strip goes."""
    output: Path = Path("benchmarks/world.md")
    """Where the tables go (Markdown)."""


class Pictures:
    """What each policy draws of the captions by each sampler, each set drawn once."""

    def __init__(self, *, run: Path, captions: int, images_per_caption: int, threads: int) -> None:
        device = choose_device(threads)
        config = json.loads((run / "config.json").read_text())
        self.model = load_model(ModelSettings(**config["model"]), device=device)
        self.usual = SamplingSettings(**without_defaults(config["sampling"], "sampling"))
        self.run, self.images_per_caption = run, images_per_caption
        table = read_table(run / "evaluation/shapes/prompts.parquet", PROMPTS)
        rows = table.slice(0, captions).to_pylist()
        self.prompts = [(row["prompt_id"], row["prompt"]) for row in rows]
        self.captions = [text for _, text in self.prompts for _ in range(self.images_per_caption)]
        self.drawn: dict[tuple[str, SamplingSettings], Images] = {}

    def of(self, policy: str, settings: SamplingSettings) -> Images:
        """The pictures, values in [0, 1]."""
        if (policy, settings) not in self.drawn:
            rows = generate(
                self.model,
                load_denoiser(self.model, "base" if policy == "base" else self.folder(policy)),
                self.prompts,
                settings,
                images_per_prompt=self.images_per_caption,
                seed_parts=(1234, "generate_evaluation"),
                prompts_per_batch=8,
                keep_latents=False,
            )
            files = [row["image"]["bytes"] for row in rows]  # type: ignore[index]
            pixels = np.stack([np.asarray(decode_image(file)) for file in files])
            self.drawn[policy, settings] = (pixels / 255).astype(np.float32)
        return self.drawn[policy, settings]

    def folder(self, policy: str) -> str:
        """Where it is: of this run, or the folder itself."""
        return policy if "/" in policy else str(self.run / policy / "policy")

    def by_caption(self, values: Float[np.ndarray, " picture"]) -> Float[np.ndarray, " caption"]:
        """Mean over a caption's pictures."""
        return values.reshape(-1, self.images_per_caption).mean(axis=1)


def main(args: Args) -> None:
    """Draw, measure, write."""
    pictures = Pictures(
        run=args.run, captions=args.captions, images_per_caption=args.images_per_caption,
        threads=args.threads,
    )  # fmt: skip
    policies = ["base", *sorted(path.parent.name for path in args.run.glob("iter*/policy"))]
    usual = pictures.usual
    with replacing(args.picture) as part:
        shown = [policies[0], policies[1], policies[-1]]
        strip_of(pictures, shown, usual, args.strip).save(part, format="JPEG", quality=90)
    if args.only_strip:
        return
    flags = f"--run {args.run} --output {args.output}"
    text = HEAD.format(flags=flags, captions=len(pictures.prompts), images=args.images_per_caption)
    text += f"\n{parts_table(pictures, policies, usual)}"
    text += f"\n{liked_table(pictures, policies, usual)}"
    text += f"\n{settings_table(pictures, [policies[0], policies[1], policies[-1]], args, usual)}"
    text += f"\n{filter_table(pictures, [policies[1], policies[-1]], usual)}"
    write_text(args.output, text)
    print(text)


SIDE, GAP, MARGIN, HEADING, WORDS = 96, 4, 60, 26, 46
"""Of the strip, in pixels: a picture, between two, the policies' names, a block's name, its captions."""


def strip_of(
    pictures: Pictures, policies: Sequence[str], usual: SamplingSettings, number: int
) -> Image.Image:
    """Pictures from the same noise, a row for each policy: chosen ones, then some that nobody chose.

    Of the chosen ones the last policy's total is furthest above the base's, one of a caption; the others are
    evenly spaced over the captions.
    """
    first, last = (
        total(pictures.of(each, usual), pictures.captions) for each in (policies[0], policies[-1])
    )
    per_caption = pictures.images_per_caption
    gains = (last - first).reshape(-1, per_caption)
    best = gains.argmax(axis=1) + per_caption * np.arange(len(gains))
    chosen = best[np.argsort(-gains.max(axis=1))[:number]]
    others = (np.arange(number) * len(gains) // number) * per_caption
    blocks = {
        f"The {number} captions that gain most": chosen,
        f"{number} captions evenly spaced": others,
    }
    height = HEADING + len(policies) * (SIDE + GAP) + WORDS
    strip = Image.new("RGB", (MARGIN + number * (SIDE + GAP), len(blocks) * height), "white")
    pen = ImageDraw.Draw(strip)
    for block, (name, places) in enumerate(blocks.items()):
        top = block * height
        pen.text((4, top + 6), name, fill="black", font_size=14)
        for row_number, policy in enumerate(policies):
            line = top + HEADING + row_number * (SIDE + GAP)
            pen.text((4, line + SIDE // 2 - 8), policy, fill="black", font_size=14)
            for column, place in enumerate(places):
                pixels = (pictures.of(policy, usual)[place] * 255).round().astype(np.uint8)
                cell = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                strip.paste(cell, (MARGIN + column * (SIDE + GAP), line))
        for column, place in enumerate(places):
            words = "\n".join(textwrap.wrap(pictures.captions[place], 16))
            at = (MARGIN + column * (SIDE + GAP), top + height - WORDS)
            pen.multiline_text(at, words, fill="black", font_size=10, spacing=1)
    return strip


def parts_table(pictures: Pictures, policies: Sequence[str], usual: SamplingSettings) -> str:
    """The taste and its parts, by policy."""
    lines = ["## The taste and its parts\n", *header("", policies)]
    for name, oracle in ORACLES.items():
        means = [oracle(pictures.of(each, usual), pictures.captions).mean() for each in policies]
        lines.append(row(name, [f"{mean:.3f}" for mean in means]))
    return "\n".join(lines) + "\n"


def liked_table(pictures: Pictures, policies: Sequence[str], usual: SamplingSettings) -> str:
    """Of the pictures whose caption leaves a thing unsaid, the share that shows each choice."""
    shares: dict[tuple[str, str], dict[str, float]] = {}
    asked = [parse_caption(caption) for caption in pictures.captions]
    for policy in policies:
        images = pictures.of(policy, usual)
        scenes = [best_scene(i, c) for i, c in zip(images, pictures.captions, strict=True)]
        for part in ("background", "position", "size"):
            values = [
                getattr(scene, part)
                for scene, caption in zip(scenes, asked, strict=True)
                if getattr(caption, part) is None
            ]
            for value in dict.fromkeys(sorted(values)):
                shares.setdefault((part, value), {})[policy] = values.count(value) / len(values)
    lines = [
        "## What is drawn where the caption leaves it open\n",
        "People like pink backgrounds and objects on the left, and do not care about the size.\n",
        *header("unsaid", policies),
    ]
    for (part, value), of in shares.items():
        lines.append(row(f"{part}: {value}", [f"{100 * of.get(p, 0):.0f} %" for p in policies]))
    return "\n".join(lines) + "\n"


def settings_table(
    pictures: Pictures, policies: Sequence[str], args: Args, usual: SamplingSettings
) -> str:
    """Totals by guidance scale, and by sampler at the run's scale."""
    last, start = policies[-1], policies[1]
    ways = {
        f"guidance {scale:g}": replace(usual, guidance_scale=scale)
        for scale in args.guidance_scales
    }
    others = {"ddim": "ddpm", "euler": "euler_stochastic"}
    for sampler, steps in ((usual.sampler, 25), (others.get(usual.sampler, usual.sampler), 25)):
        ways[f"guidance {usual.guidance_scale:g}, {in_words(sampler)}, {steps} steps"] = replace(
            usual, sampler=sampler, num_inference_steps=steps
        )
    lines = [
        "## At other guidance scales and samplers\n",
        f"Total. The run samples with {in_words(usual.sampler)}, {usual.num_inference_steps} steps, at guidance "
        f"{usual.guidance_scale:g}.\n",
        *header("", [*policies, f"{last} - {start}"]),
    ]
    for name, settings in ways.items():
        totals = {
            policy: pictures.by_caption(total(pictures.of(policy, settings), pictures.captions))
            for policy in policies
        }
        gain = compare(totals[last], totals[start])
        cells = [f"{totals[policy].mean():.3f}" for policy in policies]
        lines.append(row(name, [*cells, interval(gain)]))
    return "\n".join(lines) + "\n"


def in_words(sampler: str) -> str:
    """A sampler as tables name it."""
    return sampler.upper() if sampler.startswith("dd") else sampler.replace("_", " ").capitalize()


def filter_table(pictures: Pictures, policies: Sequence[str], usual: SamplingSettings) -> str:
    """What a filter that knows no caption adds to the base's pictures, beside the loop."""
    images, captions = pictures.of("base", usual), pictures.captions
    before = {name: oracle(images, captions) for name, oracle in ORACLES.items()}
    changed = itertools.chain(
        ((policy, pictures.of(policy, usual)) for policy in policies), filtered_pictures(images)
    )
    lines = [
        "## What filters add to the base's pictures\n",
        *header("", ["total", "caption match", "appeal"]),
    ]
    for name, others in changed:
        gains = gains_over(before, others, pictures)
        cells = [interval(gains["total"])]
        cells += [f"{gains[part].difference:+.3f}" for part in ("caption_match", "appeal")]
        lines.append(row(name, cells))
    return "\n".join(lines) + "\n"


def gains_over(
    before: Mapping[str, Float[np.ndarray, " picture"]], images: Images, pictures: Pictures
) -> dict[str, Comparison]:
    """Each part of the taste of these pictures against that before, paired by caption."""
    return {
        name: compare(
            pictures.by_caption(oracle(images, pictures.captions)),
            pictures.by_caption(before[name]),
        )
        for name, oracle in ORACLES.items()
    }


def header(first: str, names: Sequence[str]) -> list[str]:
    """A Markdown table's first two lines."""
    return [row(first, names), "|" + "---|" * (len(names) + 1)]


def row(first: str, cells: Sequence[str]) -> str:
    """A Markdown table's line."""
    return f"| {first} | {' | '.join(cells)} |"


def interval(gain: Comparison) -> str:
    """A paired difference with its interval."""
    return f"{gain.difference:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}]"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
