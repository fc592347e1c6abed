r"""Which step should early stopping keep, by so few held-out pairs? Rules beside the truth, on the embedded world.

Example (a run of the tuning fold, then about four minutes an arm on one CPU core):
    snakemake --cores 2 --configfile config/config.yaml benchmarks/tuning.yaml
    python -m benchmarks.stopping --run results/tuning --output benchmarks/stopping.md

Each arm trains to its end on the first pairs of the same human ones. Every `every_steps` steps it judges the
held-out pairs and draws the captions, so that every rule can be asked afterwards what it would have kept, by any
number of held-out pairs, and what that was truly worth.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import tyro
from jaxtyping import Float
from pyarrow import parquet

from benchmarks.small_data import ATTENTION, first_rows
from benchmarks.world import Pictures
from stages.core.artifacts.files import replacing, write_text
from stages.core.artifacts.images import decode_image
from stages.core.artifacts.schemas import PAIR_LATENTS, PREFERENCES
from stages.core.method.calibration import log_losses, softened_log_loss
from stages.core.method.objective import PairErrors, preference_logit
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser, LoraSettings
from stages.core.policies.generation import SamplingSettings, generate
from stages.core.policies.pair_files import human_pairs
from stages.core.training.early_stopping import kept_score
from stages.core.training.held_out import HeldOut, HeldOutFiles, Progress
from stages.core.training.loop import Training
from stages.core.training.pair_data import encode
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from stages.shapes.oracle import total

DPO_BETA = 5000.0


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arms, and what each is asked on the way."""

    run: Path = Path("results/tuning")
    """A run of the embedded world: its stages `seed` and its evaluation's prompts."""
    guidance_scale: float = 5.0
    """The run's guidance scale."""
    numbers: tuple[int, ...] = (50, 100, 300, 512)
    """Pairs that an arm trains on."""
    lora_rate: float = 3e-4
    """Learning rate of LoRA 16."""
    full_rate: float = 5e-6
    """Learning rate of the full fine-tune."""
    steps: int = 160
    """Optimizer steps of each arm, with batches of 32 pairs."""
    every_steps: int = 20
    """Steps between two scores."""
    held_out: int = 200
    """Held-out pairs that are judged."""
    draws: int = 8
    """Draws of each; a rule may take the first few."""
    captions: int = 100
    """Captions that are drawn at each score, one picture of each."""
    seeds: tuple[int, ...] = (101,)
    """Seeds of the trainings."""
    threads: int = 1
    """CPU threads."""
    read_only: bool = False
    """Report the arms that are there and train none."""
    work: Path = Path("work/stopping")
    """Where each arm's scores go; an arm that is there is not trained again."""
    output: Path = Path("benchmarks/stopping.md")
    """Where the tables go (Markdown)."""


@dataclass(frozen=True, kw_only=True)
class Scored(HeldOut):
    """Held-out pairs that keep what each said at each step, and what the policy draws then."""

    draw: Callable[[Denoiser], Float[np.ndarray, " caption"]]
    rows: list[dict[str, object]]
    """What was found at each score."""

    def score(
        self, model: DiffusionModel, policy: Denoiser, reference: Denoiser | None,
        settings: TrainingSettings, *, step: int,
    ) -> Progress:  # fmt: skip
        """As every training does; what is drawn joins the row that `errors` began."""
        point = super().score(model, policy, reference, settings, step=step)
        totals = self.draw(policy)
        self.rows[-1] |= {"step": step, "totals": totals.tolist()}
        print(
            f"  step {step}: total {totals.mean():.4f}, log-loss {point.log_loss:.4f}", flush=True
        )
        return point

    def errors(
        self,
        model: DiffusionModel,
        policy: Denoiser,
        reference: Denoiser | None,
        settings: TrainingSettings,
    ) -> PairErrors:
        """As every training does, and kept."""
        errors = super().errors(model, policy, reference, settings)
        self.rows.append({"logits": preference_logit(errors, DPO_BETA).double().tolist()})
        return errors


@dataclass(frozen=True)
class Arm:
    """One training to its end."""

    rank: int
    num_pairs: int
    seed: int

    @property
    def kind(self) -> str:
        """In words."""
        return f"LoRA {self.rank}" if self.rank else "full"

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind.replace(' ', '')}-{self.num_pairs}-{self.seed}"


@dataclass(frozen=True)
class Curve:
    """What an arm's held-out pairs said at each score, and what its pictures were worth."""

    arm: Arm
    steps: list[int]
    logits: Float[np.ndarray, "score draw pair"]
    totals: Float[np.ndarray, "score caption"]


Rule = Callable[[Float[np.ndarray, "score pair"], int, int], int]
"""From the logits of some held-out pairs, the number of scores that are the warmup's and the patience: the place
of the score whose weights are kept."""


def main(args: Args) -> None:
    """Train what is not there yet, then ask every rule."""
    arms = [
        Arm(rank, number, seed)
        for seed in args.seeds
        for number in args.numbers
        for rank in (0, 16)
    ]
    pictures = Pictures(
        run=args.run,
        captions=args.captions,
        images_per_caption=1,
        threads=args.threads,
    )
    curves = []
    for arm in arms:
        path = args.work / f"{arm.name}.parquet"
        if args.read_only and not path.is_file():
            continue
        if not path.is_file():
            print(arm.name, flush=True)
            table = pa.Table.from_pylist(train(args, arm, pictures))
            with replacing(path) as part:
                parquet.write_table(table, part)
        curves.append(read_curve(path, arm, args.draws))
    write_text(args.output, report(args, curves))
    print(report(args, curves))


def train(args: Args, arm: Arm, pictures: Pictures) -> list[dict[str, object]]:
    """The arm's scores on the way."""
    model = pictures.model
    seed = args.run / "seed"
    folder = args.work / arm.name
    preferences, latents = (
        first_rows(seed / name, schema, arm.num_pairs, folder / name)
        for name, schema in (
            ("preferences.parquet", PREFERENCES),
            ("preferences_latents.parquet", PAIR_LATENTS),
        )
    )
    files = HeldOutFiles(
        preferences=seed / "holdout.parquet", latents=seed / "holdout_latents.parquet",
        num_pairs=args.held_out, num_draws=args.draws, every_steps=args.every_steps,
    )  # fmt: skip
    processes = Processes(model.device)
    encoded = encode(
        model,
        {"trained": human_pairs(preferences, latents), "held_out": files.tables()},
        folder / "pairs",
        arm.name,
        processes,
    )
    held_out = HeldOut.of(files, encoded["held_out"], seed_of(arm.seed, "held_out"))
    usual = SamplingSettings(
        sampler="ddim", num_inference_steps=12, guidance_scale=args.guidance_scale
    )
    rows: list[dict[str, object]] = []
    scored = Scored(
        **{part.name: getattr(held_out, part.name) for part in fields(HeldOut)},
        draw=lambda policy: totals_of(model, policy, pictures, usual),
        rows=rows,
    )
    settings = TrainingSettings(
        dpo_beta=DPO_BETA,
        learning_rate=args.lora_rate if arm.rank else args.full_rate,
        batch_pairs=32,
        passes=args.steps * 32 / arm.num_pairs,
        warmup_share=0.25,
        gradient_clip=1.0,
        weight_decay=0.01,
        caption_dropout=0.0,
    )
    lora = LoraSettings(rank=arm.rank, alpha=float(arm.rank or 16), target_modules=ATTENTION)
    policy, reference = model.load_for_training(None, None, lora, seed_of(arm.seed, "train_seed"))
    Training(
        model, policy, reference, encoded["trained"], settings,
        seed=seed_of(arm.seed, "train_seed"), work=folder / "state", identity=arm.name,
        processes=processes, execution=Execution(save_every=10**9), held_out=scored,
    ).run()  # fmt: skip
    shutil.rmtree(folder)
    return rows


@torch.no_grad()
def totals_of(
    model: DiffusionModel, policy: Denoiser, pictures: Pictures, settings: SamplingSettings
) -> Float[np.ndarray, " caption"]:
    """The taste's total of what the policy draws now, from the same noise at every score."""
    rows = generate(
        model, policy, pictures.prompts, settings, images_per_prompt=1,
        seed_parts=(1234, "generate_evaluation"), prompts_per_batch=10, keep_latents=False,
    )  # fmt: skip
    images = np.stack([np.asarray(decode_image(row["image"]["bytes"])) for row in rows])  # type: ignore[index]
    return total((images / 255).astype(np.float32), pictures.captions)


def read_curve(path: Path, arm: Arm, draws: int) -> Curve:
    """What `train` kept."""
    rows = parquet.read_table(path).to_pylist()
    return Curve(
        arm,
        [row["step"] for row in rows],
        np.stack([np.reshape(row["logits"], (draws, -1)) for row in rows]),
        np.array([row["totals"] for row in rows]),
    )


def last(logits: Float[np.ndarray, "score pair"], num_early: int, patience: int) -> int:
    """No early stopping."""
    return len(logits) - 1


def lowest(logits: Float[np.ndarray, "score pair"], num_early: int, patience: int) -> int:
    """The lowest softened log-loss before the patience ran out."""
    best = 0
    losses = [softened_log_loss(each)[0] for each in logits]
    for place, loss in enumerate(losses):
        if loss < losses[best]:
            best = place
        if place + 1 - max(1 + best, num_early) >= patience:
            break
    return best


def latest_no_worse(logits: Float[np.ndarray, "score pair"], num_early: int, patience: int) -> int:
    """What `stop_after_no_gain` keeps: the latest that is not worse than the lowest by a standard error."""
    scores = [log_losses(softened_log_loss(each)[1] * each) for each in logits]
    for count in range(1, len(scores) + 1):
        if count - max(1 + kept_score(scores[:count]), num_early) >= patience:
            break
    return kept_score(scores[:count])


RULES: dict[str, Rule] = {
    "the last step": last,
    "lowest log-loss": lowest,
    "latest within a standard error": latest_no_worse,
}


def report(args: Args, curves: list[Curve]) -> str:
    """Each arm's curve, then what each rule keeps by 50, 100 and all held-out pairs."""
    lines = [
        "# Which step does early stopping keep?\n",
        f"    python -m benchmarks.stopping {' '.join(sys.argv[1:])}\n",
        f"On two CPU cores (x86-64), the embedded world, tuning fold, {args.captions} captions, a picture of each from "
        f"the base's noise. Every arm takes {args.steps} steps of 32 pairs; log-loss: softened, of {args.held_out} "
        f"held-out pairs and {args.draws} draws.\n",
        "## Curves: total over base (log-loss)\n",
    ]
    steps = curves[0].steps
    lines += [
        "| arm | seed | " + " | ".join(map(str, steps[1:])) + " |",
        "|" + "---|" * (len(steps) + 1),
    ]
    for curve in curves:
        gains = (curve.totals - curve.totals[0]).mean(axis=1)
        losses = [softened_log_loss(each.mean(axis=0))[0] for each in curve.logits]
        cells = [f"{g:+.3f} ({loss:.3f})" for g, loss in zip(gains[1:], losses[1:], strict=True)]
        lines.append(
            f"| {curve.arm.kind}, {curve.arm.num_pairs} pairs | {curve.arm.seed} | {' | '.join(cells)} |"
        )
    lines += [
        "\n## What a rule keeps\n",
        "Total over base of what is kept, mean over 40 random sets of held-out pairs; in brackets the share of sets "
        "in which it is 0 or less. Best: of the steps that were scored, by the truth. A patience of 4 scores after the warmup.\n",
        "| arm | seed | held-out pairs, draws | " + " | ".join(RULES) + " | best |",
        "|" + "---|" * (len(RULES) + 4),
    ]
    sums: dict[tuple[str, str], list[float]] = {}
    for curve in curves:
        gains = (curve.totals - curve.totals[0]).mean(axis=1)
        num_early = sum(step <= 0.25 * args.steps for step in curve.steps)
        for number, draws in ((50, 4), (50, 8), (100, 4), (200, 8)):
            cells = []
            for name, rule in RULES.items():
                rng = np.random.default_rng(0)
                kept = []
                for _ in range(40):
                    chosen = rng.choice(curve.logits.shape[2], number, replace=False)
                    kept.append(
                        gains[
                            rule(curve.logits[:, :draws][:, :, chosen].mean(axis=1), num_early, 4)
                        ]
                    )
                cells.append(f"{np.mean(kept):+.3f} ({100 * np.mean(np.array(kept) <= 0):.0f} %)")
                sums.setdefault((f"{number}, {draws}", name), []).append(float(np.mean(kept)))
            lines.append(
                f"| {curve.arm.kind}, {curve.arm.num_pairs} pairs | {curve.arm.seed} | {number}, {draws} | "
                + " | ".join(cells)
                + f" | {gains.max():+.3f} |"
            )
    for which in dict.fromkeys(key for key, _ in sums):
        means = [f"**{np.mean(sums[which, name]):+.3f}**" for name in RULES]
        lines.append(f"| mean | | {which} | {' | '.join(means)} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
