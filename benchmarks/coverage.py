"""Synthetic scores with a known effect in; how often the 95 % intervals of `compare` hold it, out.

Example: python -m benchmarks.coverage > benchmarks/coverage.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tyro
from scipy import stats

from stages.core.evaluation.statistics import (
    clustered_share_interval,
    compare,
    share_interval,
)

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Scores and baseline of one imaginary evaluation."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Scores whose true effect is known."""

    name: str
    draw: Draw
    difference: float
    """True mean of policy minus baseline."""
    win_rate: float
    """True share of prompts won, draws counting half."""
    strata: np.ndarray | None = None
    clusters: np.ndarray | None = None


def normal(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """200 prompts that differ far more from each other than the policies do."""
    prompts = rng.normal(21, 1.2, 200)
    return prompts + 0.1 + rng.normal(0, 0.5, 200), prompts


def skewed(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Most prompts lose a little and a few gain much: exponential differences, mean 0.2."""
    baseline = rng.normal(0, 1, 200)
    return baseline + 0.2 + rng.exponential(1.0, 200) - 1.0, baseline


def drawn_often(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Half of the prompts draw, 3 of 10 win by 1, 2 of 10 lose by 1."""
    baseline = rng.normal(0, 1, 200).round(3)
    return baseline + rng.choice([0, 1, -1], 200, p=[0.5, 0.3, 0.2]), baseline


STYLES = np.repeat(np.arange(4), 80)
TEXTS = np.where(np.arange(320) % 10 == 1, np.arange(320) - 1, np.arange(320))
"""One prompt in ten repeats the text before it."""


def styled(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Four styles with gains of 0, 0.1, 0.2 and 0.3; repeated texts gain and lose together."""
    baseline = rng.normal(27, 1, 320)
    gain = 0.1 * STYLES + rng.normal(0, 0.6, 320)[TEXTS] + rng.normal(0, 0.2, 320)
    return baseline + gain, baseline


GAINS = np.array([0.0, 0.1, 0.2, 0.3])

WORLDS = (
    World(name="normal", draw=normal, difference=0.1, win_rate=float(stats.norm.cdf(0.1 / 0.5))),
    World(name="skewed", draw=skewed, difference=0.2, win_rate=float(np.exp(-0.8))),
    World(name="half draws", draw=drawn_often, difference=0.1, win_rate=0.55),
    World(
        name="4 styles, repeated texts",
        draw=styled,
        difference=0.15,
        win_rate=float(stats.norm.cdf(GAINS / np.hypot(0.6, 0.2)).mean()),
        strata=STYLES,
        clusters=TEXTS,
    ),
)


def few_clusters(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """25 texts, a fifth of which have 20 prompts each: gains are the text's."""
    baseline = rng.normal(27, 1, len(FEW))
    return baseline + 0.2 + rng.normal(0, 0.6, 25)[FEW] + rng.normal(0, 0.2, len(FEW)), baseline


def few_prompts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """10 prompts."""
    baseline = rng.normal(27, 1, 10)
    return baseline + 0.2 + rng.normal(0, 0.5, 10), baseline


FEW = np.concatenate([np.repeat(np.arange(5), 20), np.arange(5, 25)])

SMALL_WORLDS = (
    World(
        name="25 texts, 5 of them with 20 prompts",
        draw=few_clusters,
        difference=0.2,
        win_rate=float(stats.norm.cdf(0.2 / np.hypot(0.6, 0.2))),
        clusters=FEW,
    ),
    World(name="10 prompts", draw=few_prompts, difference=0.2, win_rate=float(stats.norm.cdf(0.4))),
)
"""Where a bootstrap knows too little: its intervals are too narrow, and the page says so."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Held-out pairs of a judge that is right in 65 % of them, pairs of one prompt together."""

    num_pairs: int
    pairs_per_prompt: int
    correlation: float
    """Within a prompt, between being right about one pair and about another."""

    ACCURACY: ClassVar[float] = 0.65

    def interval(self, rng: np.random.Generator) -> tuple[float, float]:
        """Of one imaginary set of held-out pairs: each prompt has a share of its own (beta-binomial)."""
        clusters = np.arange(self.num_pairs) // self.pairs_per_prompt
        number = int(clusters[-1]) + 1
        shares = np.full(number, self.ACCURACY)
        if self.correlation:
            size = 1 / self.correlation - 1
            shares = rng.beta(self.ACCURACY * size, (1 - self.ACCURACY) * size, number)
        points = (rng.random(self.num_pairs) < shares[clusters]).astype(np.float64)
        return clustered_share_interval(points, clusters)


JUDGES = tuple(
    Judge(num_pairs=pairs, pairs_per_prompt=each, correlation=correlation)
    for pairs, each in ((200, 3), (200, 14), (1000, 14), (100, 10))
    for correlation in (0.0, 0.1, 0.2)
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """How often the 95 % intervals of a comparison hold the truth."""

    repetitions: int = 1000
    """Imaginary evaluations of each world."""
    seed: int = 0
    """Of the imaginary scores."""


def main(args: Args) -> None:
    """Print one row of a Markdown table for each world."""
    print("# Coverage of the 95 % intervals")
    print(f"\n`python -m benchmarks.coverage`, {args.repetitions} repetitions of each world.")
    print("In brackets the 95 % Wilson interval of the coverage itself.\n")
    print("| scores | prompts | mean difference held | win rate held |")
    print("| --- | --- | --- | --- |")
    for number, world in enumerate((*WORLDS, *SMALL_WORLDS)):
        rng = np.random.default_rng((args.seed, number))
        found = [
            compare(*world.draw(rng), strata=world.strata, clusters=world.clusters)
            for _ in range(args.repetitions)
        ]
        held = sum(row.ci_low <= world.difference <= row.ci_high for row in found)
        wins_held = sum(row.win_low <= world.win_rate <= row.win_high for row in found)
        cells = " | ".join(in_words(hits, args.repetitions) for hits in (held, wins_held))
        print(f"| {world.name} | {found[0].num_prompts} | {cells} |", flush=True)

    print("\n## A judge's accuracy, clustered by prompt\n")
    print("| held-out pairs | of one prompt | correlation within | accuracy held |")
    print("| --- | --- | --- | --- |")
    for number, judge in enumerate(JUDGES):
        rng = np.random.default_rng((args.seed, 100 + number))
        intervals = [judge.interval(rng) for _ in range(4 * args.repetitions)]
        held = sum(low <= judge.ACCURACY <= high for low, high in intervals)
        cell = in_words(held, len(intervals))
        print(f"| {judge.num_pairs} | {judge.pairs_per_prompt} | {judge.correlation:g} | {cell} |")


def in_words(hits: int, trials: int) -> str:
    """A share in per cent with its interval."""
    low, high = share_interval(hits, trials)
    return f"{100 * hits / trials:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
