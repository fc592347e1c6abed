r"""What a seed training gains by learning rate, LoRA rank and number of pairs, on the embedded world.

Example (a run of the tuning fold, then about two minutes an arm on one CPU core):
    snakemake --cores 2 --configfile config/config.yaml benchmarks/tuning.yaml
    python -m benchmarks.small_data --run results/tuning --output benchmarks/small_data.md

Every arm trains from the base on the first pairs of the same human ones, stops by the same held-out
pairs where it may, and draws the same captions from the same noise as the base.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from jaxtyping import Float

from benchmarks.world import Pictures
from stages import train_seed
from stages.core.artifacts.files import write_text
from stages.core.artifacts.provenance import read_manifest
from stages.core.artifacts.schemas import HELD_OUT_CURVE, PAIR_LATENTS, PREFERENCES
from stages.core.artifacts.tables import read_table, write_table
from stages.core.errors import UserError
from stages.core.evaluation.statistics import compare, pixel_distance
from stages.core.models.denoiser import LoraSettings
from stages.core.models.loading import ModelSettings
from stages.core.policies.generation import SamplingSettings
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.settings import TrainingSettings
from stages.shapes.oracle import caption_match, total

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Learning rates, LoRA ranks and numbers of pairs."""

    run: Path = Path("results/shapes")
    """A run of the embedded world, at least its stages `seed` and its evaluation's prompts."""
    base: str = "stages/shapes/pipeline"
    """The run's base model."""
    guidance_scale: float = 5.0
    """The run's guidance scale."""
    seed: int = 101
    """Run seed of the trainings."""
    lora_rates: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    """Learning rates of LoRA 16, with all pairs."""
    ranks: tuple[int, ...] = (4, 64)
    """Other ranks, at the rate that gained most."""
    full_rates: tuple[float, ...] = (5e-6,)
    """Learning rates of a full fine-tune, with all pairs."""
    numbers: tuple[int, ...] = (50, 100, 300)
    """Fewer pairs, by both kinds at their best rates."""
    bfloat16: bool = True
    """Train both kinds at their best rates in bfloat16, too, which a CPU is slow at."""
    passes: float = 10.0
    """Passes over all pairs; with fewer pairs as many steps, and early stopping."""
    captions: int = 200
    """Captions that each policy draws, two pictures of each."""
    threads: int = 1
    """CPU threads."""
    work: Path = Path("work/small_data")
    """Where policies go; an arm that is there is not trained again."""
    output: Path = Path("benchmarks/small_data.md")
    """Where the table goes (Markdown)."""


@dataclass(frozen=True)
class Arm:
    """One training."""

    rate: float
    rank: int
    num_pairs: int
    stops: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def kind(self) -> str:
        """In words."""
        kind = f"LoRA {self.rank}" if self.rank else "full"
        return kind if self.dtype == "float32" else f"{kind}, {self.dtype}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind.replace(' ', '').replace(',', '-')}-{self.rate:g}-{self.num_pairs}{'-stops' if self.stops else ''}"


@dataclass
class Bench:
    """What all arms share, and the lines of the table so far."""

    args: Args
    pictures: Pictures
    usual: SamplingSettings
    lines: list[str] = field(default_factory=list)

    def gain(self, arm: Arm) -> float:
        """Train, draw, compare with the base, add a line; the gain in total."""
        folder = self.args.work / arm.name
        if not (folder / "policy" / "manifest.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                train_seed.main(self.training(arm, folder))
            except UserError as refusal:
                self.lines.append(
                    f"| {arm.kind} | {arm.rate:.0e} | {arm.num_pairs} | refused: {refusal} | | | | | |"
                )
                print(self.lines[-1], flush=True)
                return float("-inf")
        steps = read_manifest(folder / "policy")
        curve = read_table(folder / "held_out_curve.parquet", HELD_OUT_CURVE).to_pylist()
        at = steps.get("kept_step", steps["num_steps"])
        point = next(row for row in curve if row["step"] == at)
        images = self.pictures.of(str(folder / "policy"), self.usual)
        base = self.pictures.of("base", self.usual)
        result = compare(self.by_caption(total(images, self.pictures.captions)),
                         self.by_caption(total(base, self.pictures.captions)))  # fmt: skip
        matched = caption_match(images, self.pictures.captions).mean()
        levels = [
            255 * pixel_distance(*((255 * each).round().astype(np.uint8) for each in pair))
            for pair in zip(images, base, strict=True)
        ]
        self.lines.append(
            f"| {arm.kind} | {arm.rate:.0e} | {arm.num_pairs} | {at} of {steps['num_steps']} | "
            f"{result.difference:+.3f} [{result.ci_low:+.3f}, {result.ci_high:+.3f}] | "
            f"{matched:.3f} | {np.mean(levels):.1f} | {point['log_loss']:.3f} | "
            f"{100 * point['accuracy']:.0f} % |"
        )
        print(self.lines[-1], flush=True)
        return result.difference

    def by_caption(self, values: Float[np.ndarray, " picture"]) -> Float[np.ndarray, " caption"]:
        """Mean over a caption's pictures."""
        return self.pictures.by_caption(values)

    def training(self, arm: Arm, folder: Path) -> train_seed.Args:
        """The seed training of an arm; with fewer pairs it takes as many steps as with all."""
        seed = self.args.run / "seed"
        pairs, latents = (
            first_rows(seed / name, schema, arm.num_pairs, folder / name)
            for name, schema in (
                ("preferences.parquet", PREFERENCES),
                ("preferences_latents.parquet", PAIR_LATENTS),
            )
        )
        steps = self.args.passes * self.num_pairs / 32
        return train_seed.Args(
            preferences=pairs,
            latents=latents,
            model=ModelSettings(base=self.args.base, dtype=arm.dtype),
            lora=LoraSettings(rank=arm.rank, alpha=float(arm.rank or 16), target_modules=ATTENTION),
            settings=TrainingSettings(
                dpo_beta=5000.0,
                learning_rate=arm.rate,
                batch_pairs=32,
                passes=steps * 32 / arm.num_pairs,
                warmup_share=0.25,
                gradient_clip=1.0,
                weight_decay=0.01,
                caption_dropout=0.0,
                stop_after_no_gain=4 if arm.stops else 0,
            ),
            held_out=HeldOutFiles(
                preferences=seed / "holdout.parquet",
                latents=seed / "holdout_latents.parquet",
                num_pairs=50,
                every_steps=10,
            ),
            seed=self.args.seed,
            output=folder / "policy",
            training=folder / "training.parquet",
            held_out_curve=folder / "held_out_curve.parquet",
            work=folder / "work",
            threads=self.args.threads,
        )

    @property
    def num_pairs(self) -> int:
        """All of the run's seed pairs."""
        return len(read_table(self.args.run / "seed/preferences.parquet", PREFERENCES, ["pair_id"]))


def main(args: Args) -> None:
    """Search the rates, then the ranks and the numbers of pairs at the best ones."""
    pictures = Pictures(
        run=args.run, captions=args.captions, images_per_caption=2,
        threads=args.threads,
    )  # fmt: skip
    usual = SamplingSettings(
        sampler="ddim", num_inference_steps=12, guidance_scale=args.guidance_scale
    )
    bench = Bench(args, pictures, usual)
    whole = bench.num_pairs
    full = best_of(bench, [Arm(rate, 0, whole) for rate in args.full_rates])
    lora = best_of(bench, [Arm(rate, 16, whole) for rate in args.lora_rates])
    for arm in (full, lora) if args.bfloat16 else ():
        bench.gain(replace(arm, dtype="bfloat16"))
    for rank in args.ranks:
        bench.gain(Arm(lora.rate, rank, whole))
    for number in args.numbers:
        for arm in (full, lora):
            bench.gain(Arm(arm.rate, arm.rank, number, stops=True))
    text = (
        "# Small data: learning rates, LoRA ranks, numbers of pairs\n\n"
        f"    python -m benchmarks.small_data {' '.join(sys.argv[1:])}\n\n"
        f"On two CPU cores (x86-64), the embedded world, evaluation fold of the run, {args.captions} captions, two "
        "pictures of each from the base's noise. A seed training of iteration 0 only; with fewer pairs it takes as "
        "many steps, and stops early by 50 held-out pairs. Alpha is the rank.\n\n"
        "| kind | rate | pairs | best of steps | total over base [95 %] | caption match | moved, grey levels | "
        "held-out log-loss | held-out accuracy |\n|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(bench.lines)
        + "\n"
    )
    write_text(args.output, text)


def best_of(bench: Bench, arms: list[Arm]) -> Arm:
    """The arm that gains most."""
    gains = [bench.gain(arm) for arm in arms]
    return arms[int(np.argmax(gains))]


def first_rows(source: Path, schema: Any, number: int, path: Path) -> Path:
    """A table of the first rows of another."""
    table = read_table(source, schema).slice(0, number)
    write_table(
        path, table, schema, stage="small_data", arguments={"number": number}, inputs=[source]
    )
    return path


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
