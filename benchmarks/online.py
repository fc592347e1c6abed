r"""SAIL beside SPO, DDPO and Diffusion-DPO at equal numbers of denoiser calls, on the embedded world.

Example (people's pairs of the tuning fold, then at most five minutes an arm and seed on one CPU core):
    snakemake --cores 1 --configfile config/config.yaml benchmarks/tuning.yaml -- \
        results/tuning/{seed/{preferences,holdout}_latents,prompts/iter01,evaluation/shapes/prompts}.parquet
    python -m benchmarks.online --seeds 101 --arms spo-metric     # an arm that is finished is not run again
    python -m benchmarks.online --seeds 101 102 103 --read-only   # the table of what is finished

A call is one row through a denoiser in a forward pass: policy, reference or judge, sampling, scoring or training.
Every arm starts from the base. What needs people's policy, SAIL and SPO(self), pays for its training of the same
calls and goes on from it.
"""

from __future__ import annotations

import functools
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from diffusers import UNet2DConditionModel

from benchmarks.small_data import ATTENTION, first_rows
from benchmarks.world import Pictures, row
from stages import (
    mix_preferences,
    sample_candidates,
    score_candidates,
    select_pairs,
    train_online,
    train_seed,
    update_policy,
)
from stages.core.artifacts.files import write_text
from stages.core.artifacts.online_tables import ONLINE_TRAINING
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import num_rows, read_table
from stages.core.errors import UserError
from stages.core.evaluation.statistics import compare, pixel_distance
from stages.core.models.denoiser import LoraSettings
from stages.core.models.loading import ModelSettings
from stages.core.plan.online_costs import count_round
from stages.core.policies.generation import SamplingSettings
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.online.settings import JudgeSettings, OnlineSettings
from stages.core.training.settings import TrainingSettings
from stages.shapes.oracle import ORACLES
from stages.shapes.renderer import Images

ArmName = Literal["sail", "spo-self", "spo-metric", "ddpo-metric", "dpo"]
IN_WORDS: Mapping[ArmName, str] = {
    "sail": "SAIL",
    "spo-self": "SPO(self)",
    "spo-metric": "SPO(total)",
    "ddpo-metric": "DDPO(total)",
    "dpo": "DiffusionDPO",
}

SEED_PASSES, PASSES, BATCH_PAIRS, SEED_FRACTION = 10, 6, 32, 0.25
CANDIDATES, DRAWS = 12, 10
"""As config/config.yaml has them."""
DPO_BETA = 5000.0
FULL_RATE = 3e-5
"""Of SPO in a full fine-tune."""
LORA = LoraSettings(rank=8, alpha=8.0, target_modules=ATTENTION)
USUAL = SamplingSettings(sampler="ddim", num_inference_steps=12, guidance_scale=5.0)
SPO = OnlineSettings(
    method="spo", rounds=1, prompts_per_update=8, candidates_per_prompt=4, num_inference_steps=5,
    guidance_scale=5.0, learning_rate=3e-3, batch_transitions=20, ratio_clip=0.1, divert_step=0,
    inner_steps=2, dpo_beta=DPO_BETA,
)  # fmt: skip
DDPO = OnlineSettings(
    method="ddpo", rounds=1, prompts_per_update=8, candidates_per_prompt=8, num_inference_steps=5,
    guidance_scale=5.0, learning_rate=2e-3, batch_transitions=160, ratio_clip=1e-4,
    prompt_buffer=8, prompt_min_count=8,
)  # fmt: skip


HEAD = """# SAIL beside SPO, DDPO and Diffusion-DPO at equal numbers of denoiser calls

    python -m benchmarks.online --read-only

The embedded world, tuning fold. A row is one training; [docs/online.md](../docs/online.md) says what of it.

"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arms and seeds, and how much each may compute."""

    arms: tuple[ArmName, ...] = ("sail", "spo-self", "spo-metric", "ddpo-metric", "dpo")
    """Which arms."""
    seeds: tuple[int, ...] = (101, 102, 103)
    """Run seeds of the trainings."""
    run: Path = Path("results/tuning")
    """A run of the embedded world: its people's pairs, its first prompts and its evaluation's prompts."""
    base: str = "stages/shapes/pipeline"
    """The run's base model."""
    calls: int = 41_000
    """Denoiser calls of each arm. SAIL takes as many prompts as they allow after people's policy, which takes
    20,480; as shipped its first iteration ends with 98,888."""
    captions: int = 200
    """Captions that each policy draws."""
    images_per_caption: int = 2
    """Pictures of each; diversity is between them."""
    read_only: bool = False
    """Make the table of what is finished, and run nothing."""
    threads: int = 1
    """CPU threads."""
    work: Path = Path("work/online")
    """Where policies and results go; an arm whose result is there is not run again."""
    output: Path = Path("benchmarks/online.md")
    """Where the table goes (Markdown), and beside it the results (JSON)."""


@dataclass
class Calls:
    """Rows that went through a denoiser."""

    rows: int = 0
    with_gradient: int = 0
    """Of them, those that can go backward."""


@contextmanager
def counted() -> Iterator[Calls]:
    """Count every row that goes through any denoiser of this process meanwhile."""
    calls, plain = Calls(), UNet2DConditionModel.forward

    @functools.wraps(plain)
    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.rows += len(sample)
        calls.with_gradient += len(sample) * torch.is_grad_enabled()
        return plain(self, sample, *args, **kwargs)

    UNet2DConditionModel.forward = forward
    try:
        yield calls
    finally:
        UNet2DConditionModel.forward = plain


@dataclass(frozen=True)
class Arm:
    """One training of one seed."""

    args: Args
    seed: int
    folder: Path
    model: ModelSettings = field(init=False)

    def __post_init__(self) -> None:
        """The run's base, in float32."""
        object.__setattr__(self, "model", ModelSettings(base=self.args.base, dtype="float32"))

    @property
    def people(self) -> Path:
        """The folder of people's pairs."""
        return self.args.run / "seed"

    @property
    def prompts(self) -> Path:
        """What is sampled in training, by every arm."""
        return self.args.run / "prompts/iter01.parquet"

    @property
    def seed_calls(self) -> int:
        """Of people's policy: winner and loser, through policy and reference."""
        return 4 * SEED_PASSES * num_rows(self.people / "preferences.parquet")

    @property
    def left(self) -> int:
        """Calls after people's policy; UserError if there are none."""
        if self.args.calls <= self.seed_calls:
            raise UserError(
                f"--calls is {self.args.calls}, but people's policy takes {self.seed_calls}; raise it"
            )
        return self.args.calls - self.seed_calls

    @property
    def held_out(self) -> HeldOutFiles:
        """None is scored."""
        return HeldOutFiles(
            preferences=self.people / "holdout.parquet",
            latents=self.people / "holdout_latents.parquet",
            num_pairs=0,
        )

    def tables(self, folder: Path) -> dict[str, Any]:
        """Where a training's tables and its state go."""
        return {
            "training": folder / "training.parquet",
            "held_out_curve": folder / "held_out_curve.parquet",
            "work": folder / "work",
        }

    def of_people(self, passes: float, rate: float = 5e-6) -> Path:
        """Train from the base on people's pairs; the policy."""
        folder = self.folder / "iter00"
        train_seed.main(
            train_seed.Args(
                preferences=self.people / "preferences.parquet",
                latents=self.people / "preferences_latents.parquet",
                model=self.model, lora=LoraSettings(), settings=training(rate, passes),
                held_out=self.held_out, seed=self.seed, output=folder / "policy",
                threads=self.args.threads, **self.tables(folder),
            )
        )  # fmt: skip
        return folder / "policy"

    def iteration(self, policy: Path) -> Path:
        """SAIL's first, as config/config.yaml has it, of as many prompts as the calls allow; the policy."""
        folder, threads = self.folder / "iter01", self.args.threads
        place: Any = {"seed": self.seed, "iteration": 1}
        each = CANDIDATES * 2 * (USUAL.num_inference_steps + DRAWS)
        each += round(4 * PASSES / (1 - SEED_FRACTION))
        prompts = first_rows(self.prompts, PROMPTS, self.left // each, folder / "prompts.parquet")
        sample_candidates.main(
            sample_candidates.Args(
                prompts=prompts, model=self.model, policy=str(policy), settings=USUAL,
                candidates_per_prompt=CANDIDATES, shard=0, num_shards=1, threads=threads,
                output=folder / "candidates.parquet", **place,
            )
        )  # fmt: skip
        score_candidates.main(
            score_candidates.Args(
                candidates=folder / "candidates.parquet", model=self.model, policy=str(policy),
                reference="base", num_draws=DRAWS, reencode=False, threads=threads,
                output=folder / "rewards.parquet", **place,
            )
        )  # fmt: skip
        select_pairs.main(
            select_pairs.Args(
                candidates=(folder / "candidates.parquet",), rewards=(folder / "rewards.parquet",),
                strategy="best_worst", candidates_per_prompt=CANDIDATES, dpo_beta=DPO_BETA,
                min_margin_in_standard_errors=0.0, policy=str(policy),
                output=folder / "pairs.parquet", **place,
            )
        )  # fmt: skip
        mix_preferences.main(
            mix_preferences.Args(
                pairs=folder / "pairs.parquet", preferences=self.people / "preferences.parquet",
                latents=self.people / "preferences_latents.parquet", seed_fraction=SEED_FRACTION,
                output=folder / "preferences.parquet", **place,
            )
        )  # fmt: skip
        update_policy.main(
            update_policy.Args(
                preferences=folder / "preferences.parquet", policy=str(policy),
                reference=str(policy), model=self.model, lora=LoraSettings(),
                settings=training(1.5e-5, PASSES), held_out=self.held_out, threads=threads,
                output=folder / "policy", **place, **self.tables(folder),
            )
        )  # fmt: skip
        return folder / "policy"

    def online(
        self, settings: OnlineSettings, judge: JudgeSettings, calls: int, initial: str = "base",
        lora: LoraSettings = LORA,
    ) -> Path:  # fmt: skip
        """Train online with as many rounds as the calls allow; the policy."""
        a_round = count_round(asdict(settings), judge=judge.name, judge_draws=judge.num_draws)
        folder = self.folder / "online"
        train_online.main(
            train_online.Args(
                prompts=self.prompts, model=self.model, lora=lora, judge=judge, policy=initial,
                settings=replace(settings, rounds=calls // a_round.calls), held_out=self.held_out,
                seed=self.seed, output=folder / "policy", prompts_per_batch=8,
                transitions=folder / "transitions.parquet", threads=self.args.threads,
                **self.tables(folder),
            )
        )  # fmt: skip
        return folder / "policy"


def training(rate: float, passes: float) -> TrainingSettings:
    """The optimisation of Diffusion-DPO, as config/config.yaml has it."""
    return TrainingSettings(
        dpo_beta=DPO_BETA, learning_rate=rate, batch_pairs=BATCH_PAIRS, passes=passes,
        warmup_share=0.25, gradient_clip=1.0, weight_decay=0.01, caption_dropout=0.0,
    )  # fmt: skip


def sail(arm: Arm) -> Path:
    """People's policy, then an iteration."""
    return arm.iteration(arm.of_people(SEED_PASSES))


def spo_self(arm: Arm) -> Path:
    """People's policy, then SPO from it with its implicit reward as the judge; a full fine-tune as that is."""
    seed = arm.of_people(SEED_PASSES)
    judge = JudgeSettings(name="self", policy=str(seed))
    settings = replace(SPO, learning_rate=FULL_RATE)
    return arm.online(settings, judge, arm.left, initial=str(seed), lora=LoraSettings())


ARMS: Mapping[ArmName, Callable[[Arm], Path]] = {
    "sail": sail,
    "spo-self": spo_self,
    "spo-metric": lambda arm: arm.online(
        SPO, JudgeSettings(name="total", scale=4.0), arm.args.calls
    ),
    "ddpo-metric": lambda arm: arm.online(DDPO, JudgeSettings(name="total"), arm.args.calls),
    "dpo": lambda arm: arm.of_people(SEED_PASSES * arm.args.calls / arm.seed_calls),
}


def main(args: Args) -> None:
    """Run what is not finished, then write the table."""
    if not args.read_only:
        bench = Bench(args)
        for seed in args.seeds:
            for name in args.arms:
                bench.run(name, seed)
                write(args)
    write(args)


class Bench:
    """What all arms are measured by."""

    def __init__(self, args: Args) -> None:
        """The captions that every policy draws."""
        self.args = args
        self.pictures = Pictures(
            run=args.run, captions=args.captions,
            images_per_caption=args.images_per_caption, threads=args.threads,
        )  # fmt: skip

    def run(self, name: ArmName, seed: int) -> None:
        """One arm of one seed, unless its result is there."""
        folder = self.args.work / str(self.args.calls) / str(seed) / name
        result = folder / "result.json"
        if result.is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)
        found = measured(ARMS[name], Arm(self.args, seed, folder))
        policy = found.pop("policy")
        write_text(
            result,
            json.dumps(
                {
                    "budget": self.args.calls,
                    "arm": name,
                    "seed": seed,
                    **found,
                    **self.scores(policy),
                },
                indent=1,
            ),
        )

    def scores(self, policy: Path) -> dict[str, Any]:
        """The taste over the base's, paired by caption, and how far a caption's pictures differ."""
        images, base = self.pictures.of(str(policy), USUAL), self.pictures.of("base", USUAL)
        captions = self.pictures.captions
        found: dict[str, Any] = {
            name: {
                key: round(value, 4)
                for key, value in asdict(
                    compare(*(self.pictures.by_caption(oracle(each, captions)) for each in (images, base)))
                ).items()
                if key in ("mean", "baseline_mean", "difference", "ci_low", "ci_high")
            }
            for name, oracle in ORACLES.items()
        }  # fmt: skip
        return found | {
            "num_captions": len(self.pictures.prompts),
            "diversity": self.diversity(images),
            "base_diversity": self.diversity(base),
        }

    def diversity(self, images: Images) -> float:
        """Mean distance of the first two pictures of a caption, in [0, 1]."""
        pixels = (255 * images).round().astype(np.uint8)
        each = self.pictures.images_per_caption
        apart = [
            pixel_distance(pixels[place], pixels[place + 1])
            for place in range(0, len(pixels), each)
        ]
        return round(float(np.mean(apart)), 4)


def measured(train: Callable[[Arm], Path], arm: Arm) -> dict[str, Any]:
    """The policy, and what it took: calls, seconds of this process, seconds on the clock, peak memory."""
    started, used = time.monotonic(), time.process_time()
    with counted() as calls:
        policy = train(arm)
    steps = [num_rows(path) for path in sorted(arm.folder.glob("*/training.parquet"))]
    online = arm.folder / "online/training.parquet"
    last = read_table(online, ONLINE_TRAINING).to_pylist()[-1] if online.is_file() else {}
    return {
        "policy": policy,
        "calls": calls.rows,
        "calls_with_gradient": calls.with_gradient,
        "cpu_seconds": round(time.process_time() - used, 1),
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "steps": sum(steps),
        "rounds": last.get("round"),
    }


def write(args: Args) -> None:
    """The table of all results, and beside it the results; UserError if there are none."""
    results = [json.loads(path.read_text()) for path in args.work.glob("*/*/*/result.json")]
    if not results:
        raise UserError(f"{args.work} has no result; run without --read-only")
    order = list(IN_WORDS)
    results.sort(key=lambda found: (found["budget"], order.index(found["arm"]), found["seed"]))
    write_text(args.output.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    budgets = sorted({found["budget"] for found in results})
    text = "\n".join(
        f"## {budget:,} calls\n\n" + table([each for each in results if each["budget"] == budget])
        for budget in budgets
    )
    write_text(args.output, HEAD + text)
    print(text)


def table(results: list[dict[str, Any]]) -> str:
    """A row for each arm and seed."""
    heads = [
        "seed", "calls", "of them with gradient", "steps", "CPU s", "total over base [95 %]",
        "caption match", "appeal", "diversity",
    ]  # fmt: skip
    lines = [row("arm", heads), "|" + "---|" * (len(heads) + 1)]
    for each in results:
        total = each["total"]
        lines.append(
            row(
                IN_WORDS[each["arm"]],
                [
                    str(each["seed"]),
                    f"{each['calls']:,}",
                    f"{each['calls_with_gradient']:,}",
                    str(each["steps"]),
                    f"{each['cpu_seconds']:.0f}",
                    f"{total['difference']:+.3f} [{total['ci_low']:+.3f}, {total['ci_high']:+.3f}]",
                    *(f"{each[part]['difference']:+.3f}" for part in ("caption_match", "appeal")),
                    f"{each['diversity']:.3f}",
                ],
            )
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
