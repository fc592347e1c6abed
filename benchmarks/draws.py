"""What draws of timesteps and noise can be saved: by importance, and by giving up on candidates early.

Example (a run of the tuning fold with its candidates scored by a metric, then about ten minutes on one CPU core):
    python -m benchmarks.draws --run results/tuning --output benchmarks/draws.md

The run must have the weights calibrated. Adaptive draws are replayed on the errors that the run kept: they are the same
draws. Draws by importance are made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int
from scipy import stats

from stages.calibrate_judge import HeldOut
from stages.core.artifacts.files import write_text
from stages.core.artifacts.judges import JudgeRecord, read_judge
from stages.core.artifacts.schemas import CANDIDATES, HOLDOUT_REWARDS, METRIC_SCORES, REWARDS
from stages.core.artifacts.tables import read_table, read_tables
from stages.core.evaluation.guard_tables import by_candidate
from stages.core.evaluation.statistics import compare
from stages.core.execution.runtime import choose_device
from stages.core.method.adaptive import rounds
from stages.core.method.allocation import (
    cannot_win_or_lose,
    completed,
    density_of,
    importance_weights,
    spread_order,
)
from stages.core.method.calibration import BinWeights
from stages.core.method.noising import reward_draws
from stages.core.method.scoring import draw_errors
from stages.core.method.seeding import seed_of
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import latents_tensor
from stages.core.policies.loading import load_judge


@dataclass(frozen=True, kw_only=True)
class Args:
    """What draws can be saved, by importance and by giving up early."""

    run: Path = Path("results/tuning")
    """A run of the embedded world with score_candidates.weights calibrated."""
    base: str = "stages/shapes/pipeline"
    """Its base model."""
    iterations: tuple[int, ...] = (1, 2)
    """Whose candidates are judged."""
    confidences: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    """Of giving up."""
    first_draws: int = 4
    """Draws that every candidate gets."""
    numbers: tuple[int, ...] = (3, 5, 10)
    """Draws by importance."""
    prompts: int = 60
    """Prompts of each iteration for which draws by importance are made; the replay takes all."""
    seed: int = 101
    """Of the draws by importance."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("benchmarks/draws.md")
    """Where the tables go (Markdown)."""


@dataclass(frozen=True)
class Prompt:
    """One prompt's candidates: what the run kept of them, and the truth."""

    gains: Float[np.ndarray, "candidate draw"]
    timesteps: Int[np.ndarray, " draw"]
    truth: Float[np.ndarray, " candidate"]
    record: JudgeRecord

    def weights(self) -> Float[np.ndarray, " draw"]:
        """What each draw counts by the judge, mean 1."""
        found = BinWeights(np.array(self.record.weights)).of(
            self.timesteps, self.record.num_timesteps
        )
        return np.asarray(found * len(found) / found.sum())


@dataclass(frozen=True)
class Judged:
    """Rewards by some way of drawing, and how many draws each candidate had."""

    rewards: Float[np.ndarray, " candidate"]
    num_draws: Int[np.ndarray, " candidate"]

    @property
    def ends(self) -> tuple[int, int]:
        """(best, worst) among those that had all draws."""
        full = np.flatnonzero(self.num_draws == self.num_draws.max())
        own = self.rewards[full]
        return int(full[own.argmax()]), int(full[own.argmin()])


Judge = Callable[[Prompt], Judged]


def plainly(is_weighted: bool) -> Judge:
    """All draws of the run."""

    def judged(prompt: Prompt) -> Judged:
        weights = prompt.weights() if is_weighted else np.ones(len(prompt.timesteps))
        return Judged(
            (prompt.gains * weights).mean(axis=1), np.full(len(prompt.gains), len(weights))
        )

    return judged


def giving_up(is_weighted: bool, first_draws: int, confidence: float) -> Judge:
    """The run's draws, in the order of `adaptive_errors`, for as long as a candidate needs them."""

    def judged(prompt: Prompt) -> Judged:
        order = spread_order(len(prompt.timesteps))
        weights = prompt.weights() if is_weighted else np.ones(len(order))
        parts = (prompt.gains * weights)[:, order]
        active, num_seen = np.arange(len(parts)), np.zeros(len(parts), np.int64)
        for part in rounds(len(order), first_draws):
            num_seen[active] = part.stop
            active = active[~cannot_win_or_lose(parts[active, : part.stop], confidence)]
        return Judged(completed(parts, num_seen), num_seen)

    return judged


def main(args: Args) -> None:
    """Replay, draw, write."""
    sections = []
    for iteration in args.iterations:
        names, prompts = read_prompts(args, iteration)
        sections.append(f"## Candidates of iteration {iteration}\n")
        sections.append(replayed(prompts, args))
        sections.append(by_importance(names, prompts, iteration, args))
    text = HEAD.format(
        run=args.run, output=args.output, first=args.first_draws, prompts=args.prompts
    )
    write_text(args.output, text + "\n" + "\n".join(sections))
    print(text, *sections, sep="\n")


HEAD = """# Which draws can be saved

    snakemake --cores 2 --configfile config/config.yaml benchmarks/tuning.yaml \\
        --config "score_candidates={{weights: calibrated}}"
    python -m benchmarks.draws --run {run} --output {output}

One run of the embedded world (tuning fold, seed 101), ten draws a candidate. Draws: mean number a candidate. Same best,
worst: share of prompts in which they are those of all ten draws with the same weights. Rank correlation: Spearman's with
the truth within a prompt's candidates. Best beats worst: by the truth. Adaptive: {first} draws for all, then two a round, none
for a candidate that is told from the best and from the worst at that confidence. Importance: timesteps by the
calibrated judge's weights and spreads, on the first {prompts} prompts; its differences are paired with the ten
weighted draws of the same prompts, 95 % bootstrap over prompts.
"""


def read_prompts(args: Args, iteration: int) -> tuple[list[str], list[Prompt]]:
    """(ids, what is known) of an iteration's prompts."""
    folder = args.run / f"iter{iteration:02d}"
    judge = f"iter{iteration - 1:02d}"
    record = read_judge(args.run / f"evaluation/judges/{judge}.json")
    path = args.run / f"evaluation/holdout/{judge}.parquet"
    record = replace(record, spreads=HeldOut.of(read_table(path, HOLDOUT_REWARDS), path).spreads)
    truth = by_candidate([folder / "candidate_scores/total.parquet"], METRIC_SCORES, "score")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read_tables(sorted(folder.glob("scores/*.parquet")), REWARDS).to_pylist():
        groups.setdefault(row["prompt_id"], []).append(row)
    names = sorted(name for name in groups if np.ptp(truth[name]) > 0)
    prompts = []
    for name in names:
        rows = sorted(groups[name], key=lambda row: row["candidate"])
        gains = [np.subtract(row["reference_errors"], row["policy_errors"]) for row in rows]
        prompts.append(Prompt(np.array(gains), np.array(rows[0]["timesteps"]), truth[name], record))
    return names, prompts


def measures(
    prompts: list[Prompt], judged: list[Judged], full: list[Judged]
) -> tuple[list[str], Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """(cells of the table, rank correlations, whether best beats worst)."""
    ranks = np.array(
        [stats.spearmanr(j.rewards, p.truth).statistic for p, j in zip(prompts, judged, strict=True)]
    )  # fmt: skip
    gaps = np.array([p.truth[j.ends[0]] - p.truth[j.ends[1]]
                     for p, j in zip(prompts, judged, strict=True)])  # fmt: skip
    wins = (gaps > 0) + 0.5 * (gaps == 0)
    same = np.array([np.equal(j.ends, f.ends) for j, f in zip(judged, full, strict=True)])
    draws = np.mean([j.num_draws.mean() for j in judged])
    cells = [f"{draws:.2f}", *(f"{100 * share:.0f} %" for share in same.mean(axis=0)),
             f"{ranks.mean():.3f}", f"{100 * wins.mean():.1f} %"]  # fmt: skip
    return cells, ranks, wins


COLUMNS = "draws | same best | same worst | rank correlation | best beats worst"


def replayed(prompts: list[Prompt], args: Args) -> str:
    """Adaptive draws beside all ten."""
    lines = [f"{len(prompts)} prompts.\n", f"| adaptive | {COLUMNS} |", "|" + "---|" * 6]
    for is_weighted, word in ((False, "equal weights"), (True, "calibrated weights")):
        full = [plainly(is_weighted)(prompt) for prompt in prompts]
        lines.append(f"| {word}, all ten | {' | '.join(measures(prompts, full, full)[0])} |")
        for confidence in args.confidences:
            few = giving_up(is_weighted, args.first_draws, confidence)
            cells, _, _ = measures(prompts, [few(prompt) for prompt in prompts], full)
            lines.append(f"| {word}, confidence {confidence:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_importance(names: list[str], prompts: list[Prompt], iteration: int, args: Args) -> str:
    """Draws by importance beside the ten even ones."""
    names, prompts = names[: args.prompts], prompts[: args.prompts]
    full = [plainly(True)(prompt) for prompt in prompts]
    cells, ranks, wins = measures(prompts, full, full)
    lines = [
        f"| calibrated weights | {COLUMNS} | rank correlation, difference | best beats worst, difference |",
        "|" + "---|" * 8,
        f"| ten even draws | {' | '.join(cells)} | | |",
    ]
    draw = Drawing(args, iteration)
    density = density_of(np.array(prompts[0].record.weights), np.array(prompts[0].record.spreads))
    for is_by_importance, number in [(False, 3), (False, 5)] + [(True, n) for n in args.numbers]:
        judged = [
            draw(name, prompt.record, number, density if is_by_importance else None)
            for name, prompt in zip(names, prompts, strict=True)
        ]
        cells, own_ranks, own_wins = measures(prompts, judged, full)
        gaps = [
            f"{found.difference:+.3f} [{found.ci_low:+.3f}, {found.ci_high:+.3f}]"
            for found in (compare(own_ranks, ranks), compare(own_wins, wins))
        ]
        kind = "by importance" if is_by_importance else "even"
        lines.append(f"| {number} {kind} | {' | '.join([*cells, *gaps])} |")
    shares = " ".join(f"{share:.2f}" for share in density)
    lines.append(f"\nDraws of each tenth of the timesteps, as a multiple of even ones: {shares}.")
    return "\n".join(lines) + "\n"


class Drawing:
    """Rewards of the candidates of an iteration by new draws."""

    def __init__(self, args: Args, iteration: int) -> None:
        self.args, self.iteration = args, iteration
        self.model = load_model(
            ModelSettings(base=args.base, dtype="float32"), device=choose_device(args.threads)
        )
        policy = args.run / f"iter{iteration - 1:02d}" / "policy"
        self.judge = load_judge(self.model, str(policy), "base")
        paths = sorted((args.run / f"iter{iteration:02d}").glob("candidates/*.parquet"))
        names = ["prompt_id", "prompt", "candidate", "latents"]
        self.table = read_tables(paths, CANDIDATES, names)
        self.ids = np.array(self.table.column("prompt_id").to_pylist())

    def __call__(
        self, name: str, record: JudgeRecord, number: int, density: np.ndarray | None
    ) -> Judged:
        """By `number` draws, even ones or of a density, with the judge's weights."""
        rows = self.table.take(np.flatnonzero(self.ids == name))
        rows = rows.sort_by("candidate")
        draws = reward_draws(
            seed_of(self.args.seed, "benchmarks.draws", self.iteration, name, number),
            num_draws=number, num_timesteps=self.model.num_timesteps,
            latents_shape=self.model.latents_shape, density=density,
        )  # fmt: skip
        latents = latents_tensor(rows.column("latents"), self.model.latents_shape, name)
        text = self.model.encode_text([rows.column("prompt")[0].as_py()])
        with torch.no_grad():
            errors = draw_errors(self.model, self.judge, latents, text, draws)
        steps = draws.timesteps.numpy()
        weights = BinWeights(np.array(record.weights)).of(steps, record.num_timesteps)
        if density is not None:
            weights = weights * importance_weights(steps, record.num_timesteps, density)
        gains = (errors.reference.double() - errors.policy.double()).numpy()
        return Judged((gains * weights).mean(axis=1), np.full(len(gains), number))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
