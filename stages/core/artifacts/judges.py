"""The record of a judge: what each timestep counts in its reward, and how well that judges."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class JudgeRecord:
    """What each timestep counts, of which policy, and how well it judges held-out human pairs."""

    policy: str
    """Digest of the policy that judges."""
    kind: str
    """'inverse_snr', 'epsilon', 'elbo' or 'calibrated'."""
    weights: tuple[float, ...]
    """One for each bin of timesteps of equal width, from the cleanest; mean 1."""
    log_odds: float | None
    """log-odds for each unit of reward; None where too few pairs were there to fit it."""
    num_timesteps: int
    """Length of the noise schedule."""
    num_pairs: int
    """Held-out pairs."""
    spreads: tuple[float, ...] = ()
    """Root mean square of each bin's part of a margin, before weights; none in records of earlier versions."""
    spread_power: float | None = None
    """q of the weights' shape (core/method/calibration.py); 0 with step 0 is equal weights."""
    step: float | None = None
    """How far the logarithms of neighbouring weights were let apart from it."""
    accuracy: float
    """Share of pairs that it ranks as people, by weights that were fitted to other prompts."""
    accuracy_low: float
    accuracy_high: float
    plain_accuracy: float | None = None
    """The same of the plain mean of Eq. 8."""
    accuracy_gain_low: float | None = None
    """95 % interval of the difference, pairs clustered by prompt."""
    accuracy_gain_high: float | None = None
    log_loss: float | None = None
    """Of p(winner > loser), by weights that were fitted to other prompts; a coin has 0.693."""
    plain_log_loss: float | None = None
    """The same of the plain mean, its temperature fitted to other prompts."""


def facts_of(record: JudgeRecord) -> dict[str, Any]:
    """The record of a judge, as it is written."""
    return asdict(record)


def read_judge(path: Path) -> JudgeRecord:
    """UserError names a file that is missing or is no record of a judge."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values = {"spreads": ()} | {
            name: found[name]
            for name in JudgeRecord.__dataclass_fields__
            if name != "spreads" or name in found
        }
        weights = tuple(float(weight) for weight in values["weights"])
        if not weights or not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
            raise ValueError(f"weights {weights} must be finite, none negative, and not all 0")
        spreads = tuple(float(spread) for spread in values["spreads"])
        return JudgeRecord(**{**values, "weights": weights, "spreads": spreads})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no record of a judge ({error!r}); delete it and run snakemake again"
        ) from error


def judge_of(records: Sequence[Path], policy: str) -> JudgeRecord:
    """The record that was fitted to a policy, by its digest; UserError if there is none."""
    for path in records:
        if (record := read_judge(path)).policy == policy:
            return record
    raise UserError(
        f"{', '.join(map(str, records))}: none is of the policy that judges ({policy[:12]}); delete them and "
        "run snakemake again"
    )
