r"""How well judges tell unfinished images apart, step by step: beside the known taste of the embedded world.

The base samples pools as SPO does. At each comparison every judge scores the same estimates of the clean latents,
and so does the taste, of the same decoded estimates. Example, with what it needs of a run:

    snakemake --cores all --configfile config/config.yaml benchmarks/tuning.yaml \
        --config "score_candidates={weights: calibrated}" -- results/tuning/iter00/policy/manifest.json \
        results/tuning/evaluation/judges/iter00.json results/tuning/prompts/iter01.parquet
    python -m benchmarks.step_judges --policy results/tuning/iter00/policy \
        --record results/tuning/evaluation/judges/iter00.json --prompts results/tuning/prompts/iter01.parquet \
        --figure docs/images/step-judges.svg

The figure has both measures of each judge by timestep, with intervals of 95 % over pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from stages.core.artifacts.files import replacing
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.statistics import rank_correlation, wilson
from stages.core.method.gaussian_steps import ddim_schedule
from stages.core.method.seeding import seed_of
from stages.core.method.trajectories import Chains
from stages.core.models.conditioning import Conditioning
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.training.online.judges import ImageJudge, StepJudge, load_self_judge
from stages.core.training.online.rollouts import Prompt, Sampler
from stages.core.training.online.settings import JudgeSettings, OnlineSettings
from stages.metrics import load_scorer


@dataclass(frozen=True, kw_only=True)
class Args:
    """How well judges tell unfinished images apart, step by step."""

    policy: str
    """Policy folder whose implicit reward judges."""
    prompts: Path
    """Prompts of the embedded world (schema prompts)."""
    record: Path | None = None
    """Its calibrated weights."""
    truth: str = "total"
    """The metric that is the truth."""
    num_prompts: int = 48
    """The first so many."""
    candidates: int = 4
    """Of a pool."""
    num_inference_steps: int = 10
    """Steps."""
    divert_step: int = 1
    """The first step that divides."""
    num_draws: int = 4
    """Draws of an implicit reward."""
    seed: int = 101
    """Decides all noise."""
    figure: Path | None = None
    """Where a figure goes (SVG)."""
    model: ModelSettings = field(
        default_factory=lambda: ModelSettings(base="stages/shapes/pipeline", dtype="float32")
    )
    """The pretrained model."""


class Together(StepJudge):
    """The first of several judges, which keeps what all of them say."""

    def __init__(self, judges: dict[str, StepJudge]) -> None:
        self.judges = judges
        self.said: list[tuple[int, dict[str, np.ndarray]]] = []

    def __call__(
        self, clean: Tensor, prompts: Sequence[str], text: Conditioning, *, timestep: int,
        seeds: Sequence[int],
    ) -> np.ndarray:  # fmt: skip
        """See `StepJudge`."""
        scores = {
            name: judge(clean, prompts, text, timestep=timestep, seeds=seeds)
            for name, judge in self.judges.items()
        }
        self.said.append((timestep, scores))
        return next(iter(scores.values()))


def main(args: Args) -> None:
    """Print one line a timestep: for each judge, rank correlation with the truth, and best beats worst."""
    torch.set_num_threads(1)
    model = load_model(args.model, device=torch.device("cpu"))
    online = OnlineSettings(
        method="spo", rounds=1, prompts_per_update=1, candidates_per_prompt=args.candidates,
        num_inference_steps=args.num_inference_steps, guidance_scale=5.0, learning_rate=1.0,
        batch_transitions=1, ratio_clip=0.1, divert_step=args.divert_step,
    )  # fmt: skip
    plain = JudgeSettings(name="self", policy=args.policy, num_draws=args.num_draws)
    judges: dict[str, StepJudge] = {
        args.truth: ImageJudge(model=model, score=load_scorer(args.truth)),
        "self, plain": load_self_judge(model, plain, online),
    }
    if args.record is not None:
        calibrated = replace(plain, record=args.record)
        judges["self, calibrated"] = load_self_judge(model, calibrated, online)
    together = Together(judges)
    table = read_table(args.prompts, PROMPTS).slice(0, args.num_prompts).to_pylist()
    sampler = Sampler(
        chains=Chains(
            model=model, denoiser=model.load_denoiser(),
            schedule=ddim_schedule(model, args.num_inference_steps),
            unconditional=model.unconditional(), guidance_scale=5.0,
        ),
        judge=together, settings=online,
        text=model.encode_text([row["prompt"] for row in table]), round=1,
    )  # fmt: skip
    for place, row in enumerate(table):
        prompt = Prompt(
            place=place, prompt_id=row["prompt_id"], prompt=row["prompt"], caption=place,
            seed=seed_of(args.seed, "step_judges", place),
        )  # fmt: skip
        sampler.rollout([prompt])
    names = [name for name in judges if name != args.truth]
    print(
        f"| timestep | pools | {' | '.join(f'{n}: rank correlation, best beats worst' for n in names)} |"
    )
    print("|---|---|" + "---|" * len(names))
    measured: dict[str, list[Measure]] = {name: [] for name in names}
    for timestep in dict.fromkeys(each for each, _ in together.said):
        found = [scores for each, scores in together.said if each == timestep]
        for name in names:
            measured[name].append(measure(found, name, args.truth, timestep))
        cells = [measured[name][-1].cell for name in names]
        print(f"| {timestep} | {len(found)} | {' | '.join(cells)} |", flush=True)
    if args.figure is not None:
        draw(measured, args.figure)


@dataclass(frozen=True)
class Measure:
    """How well a judge tells the images of a pool apart at a timestep."""

    timestep: int
    rank: float
    """Mean rank correlation with the truth in a pool."""
    rank_error: float
    """Its standard error."""
    wins: float
    """How often the best is truly above the worst."""
    wins_low: float
    wins_high: float

    @property
    def cell(self) -> str:
        """For the table."""
        return f"{self.rank:.3f} (se {self.rank_error:.3f}), {self.wins:.3f}"


def measure(
    found: Sequence[dict[str, np.ndarray]], name: str, truth: str, timestep: int
) -> Measure:
    """Of the pools at a timestep."""
    ranks, wins = [], []
    for scores in found:
        own, true = scores[name][0], scores[truth][0]
        ranks.append(rank_correlation(own[None], true[None]))
        difference = true[int(own.argmax())] - true[int(own.argmin())]
        wins.append(0.5 if difference == 0 else float(difference > 0))
    values = np.array([rank for rank in ranks if np.isfinite(rank)])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    share = float(np.mean(wins))
    return Measure(timestep, float(values.mean()), float(error), share, *wilson(share, len(wins)))


def draw(measured: Mapping[str, Sequence[Measure]], path: Path) -> None:
    """Both measures by timestep, from noise to the finished image; a dashed line is chance."""
    colours = ("#1f5fa8", "#c4561c")
    with mpl.rc_context({"svg.hashsalt": "sail", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for shift, (name, points) in enumerate(measured.items()):
            places = np.arange(len(points)) + 0.12 * shift
            look: dict[str, Any] = {
                "color": colours[shift % 2], "marker": "o", "markersize": 3.5, "linewidth": 1.1,
                "elinewidth": 0.9, "label": name,
            }  # fmt: skip
            ranks, wins = (
                np.array([getattr(each, key) for each in points]) for key in ("rank", "wins")
            )
            errors = 1.96 * np.array([each.rank_error for each in points])
            left.errorbar(places, ranks, yerr=errors, **look)
            ends = np.array(
                [[each.wins - each.wins_low, each.wins_high - each.wins] for each in points]
            )
            right.errorbar(places, wins, yerr=ends.T, **look)
        for axes, chance, words in (
            (left, 0.0, "rank correlation with the taste"),
            (right, 0.5, "the best truly beats the worst"),
        ):
            axes.axhline(chance, color="#777777", linestyle=(0, (4, 3)), linewidth=0.9)
            axes.set_title(words, fontsize=9)
            axes.set_xticks(range(len(points)), [str(each.timestep) for each in points])
            axes.set_xlabel("timestep")
        left.legend(frameon=False, fontsize=8)
        with replacing(path) as part:
            figure.savefig(part, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
