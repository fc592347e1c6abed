"""How well judges tell unfinished images apart, step by step: beside the known taste of the embedded world.

The base samples pools as SPO does. At each comparison every judge scores the same estimates of the clean latents,
and so does the taste, of the same decoded estimates. Example, with the run of benchmarks/tuning.yaml:

    python -m benchmarks.step_judges --policy results/tuning/iter00/policy \
        --record results/tuning/evaluation/judges/iter00.json --prompts results/tuning/prompts/iter01.parquet
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.statistics import rank_correlation
from stages.core.method.seeding import seed_of
from stages.core.method.trajectories import Chains, ddim_schedule
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
    for timestep in dict.fromkeys(each for each, _ in together.said):
        found = [scores for each, scores in together.said if each == timestep]
        cells = [_cell(found, name, args.truth) for name in names]
        print(f"| {timestep} | {len(found)} | {' | '.join(cells)} |", flush=True)


def _cell(found: Sequence[dict[str, np.ndarray]], name: str, truth: str) -> str:
    """Mean rank correlation in a pool with its standard error; how often the best is truly above the worst."""
    ranks, wins = [], []
    for scores in found:
        own, true = scores[name][0], scores[truth][0]
        ranks.append(rank_correlation(own[None], true[None]))
        difference = true[int(own.argmax())] - true[int(own.argmin())]
        wins.append(0.5 if difference == 0 else float(difference > 0))
    values = np.array([rank for rank in ranks if np.isfinite(rank)])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{values.mean():.3f} (se {error:.3f}), {np.mean(wins):.3f}"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
