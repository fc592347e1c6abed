"""What a guard is: a quantity that turns when self-training goes wrong. SAIL Sec. 5.5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.core.evaluation.guard_tables import Evidence
from stages.core.evaluation.wording import percent, significant

Measured = dict[str, Any]
"""One iteration's row of the guards table; None stands where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A threshold: a key of the config's block `guards`, and a flag of the stages that judge."""

    key: str
    """As min_reward_accuracy."""
    default: float | None
    """None never warns."""
    meaning: str
    """When the guard warns."""


class AnyLimits:
    """The values of guards' limits, each under its key."""


@dataclass(frozen=True)
class Line:
    """The dashed line in a guard's figure."""

    height: float
    """In the guard's unit."""
    label: str = "limit"
    """What stands beside it."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How a quantity is measured, how it is shown, and when it warns.

    Where a row is compared with that of iteration 0, the latter is called `seed`.
    """

    columns: tuple[pa.Field, ...]
    """Its columns of the guards table. The first one holds its value and names it."""
    title: str
    """Over its figure and over its column in the report."""
    meaning: str
    """What it tells someone who has not read the paper."""
    measure: Callable[[Evidence], Measured]
    """The values of its columns; empty for an iteration that left nothing to measure it on."""
    limit: Limit | None = None
    """Its threshold; None never warns."""
    sentence: Callable[[Measured, Measured, float], str | None] = lambda row, seed, limit: None
    """What is said of a row beyond the limit; None for one within it."""
    advice: str = ""
    """What to do then, in a sentence that follows."""
    limit_line: Callable[[float, Measured], Line] = lambda limit, seed: Line(limit)
    """Where its limit lies in its figure."""
    fixed_line: Line | None = None
    """The line in its figure if it has no limit."""
    is_share: bool = False
    """Whether it is shown in per cent."""
    interval: tuple[str, str] | None = None
    """The columns of its 95 % interval."""
    note: Callable[[Measured], str] = lambda row: ""
    """What stands below its value."""
    tells_of_collapse: bool = True
    """Whether a value beyond its limit stops a run or rolls it back (`guards.on_collapse`)."""

    @property
    def name(self) -> str:
        """The column of its value."""
        return str(self.columns[0].name)

    def text(self, row: Measured) -> str:
        """Its value as it is shown; an en dash where it was not measured."""
        return (percent if self.is_share else significant)(row[self.name])

    def limit_in(self, limits: AnyLimits) -> float | None:
        """The value of its limit among a stage's limits; None if it never warns."""
        return None if self.limit is None else getattr(limits, self.limit.key)

    def warning(self, row: Measured, seed: Measured, limits: AnyLimits) -> str | None:
        """A sentence and advice if the row is beyond the limit; None otherwise, or without a limit."""
        limit = self.limit_in(limits)
        found = None if limit is None else self.sentence(row, seed, limit)
        return f"{found} {self.advice}".rstrip() if found else None

    def line(self, seed: Measured, limits: AnyLimits) -> Line | None:
        """The line in its figure; None for none."""
        limit = self.limit_in(limits)
        return self.fixed_line if limit is None else self.limit_line(limit, seed)
