"""All guards, and what follows from them: columns, limits, an iteration's row, warnings. SAIL Sec. 5.5.

A new guard is one `Guard` and a line in `GUARDS`. A limit that a config may set also wants its key in
the config's schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import make_dataclass
from math import isnan
from typing import Any

import pyarrow as pa

from stages.core.artifacts.schemas import Schema, column
from stages.core.errors import UserError
from stages.core.evaluation.guard import AnyLimits, Guard, Measured
from stages.core.evaluation.guard_tables import Evidence
from stages.core.evaluation.image_guards import (
    BLANK_SHARE,
    DIVERSITY,
    FEATURE_DIVERSITY,
    MOVED,
    TRUNCATED_SHARE,
)
from stages.core.evaluation.judge_guards import (
    ACCURACY_CHANGE,
    BEST_BEATS_WORST,
    CONFIDENT_SHARE,
    DRIFT,
    RANK_CORRELATION,
    REWARD_ACCURACY,
)

GUARDS = (
    REWARD_ACCURACY,
    ACCURACY_CHANGE,
    RANK_CORRELATION,
    BEST_BEATS_WORST,
    DIVERSITY,
    FEATURE_DIVERSITY,
    CONFIDENT_SHARE,
    MOVED,
    DRIFT,
    BLANK_SHARE,
    TRUNCATED_SHARE,
)
"""In the order of the report."""


def guards_table(guards: Sequence[Guard] = GUARDS) -> Schema:
    """The schema of the guards table; what is not measured in every iteration comes last."""
    in_order = sorted(guards, key=lambda guard: guard.columns[0].nullable)
    columns = [
        column("iteration", pa.int32(), "0 is the seed training"),
        column("policy", pa.string(), "the policy this iteration left"),
        *(own for guard in in_order for own in guard.columns),
    ]
    return Schema("guards", 5, pa.schema(columns))


def limits_of(guards: Sequence[Guard] = GUARDS) -> Any:
    """A dataclass with a field for each limit of the guards, which tells the command line its meaning."""
    limits = {guard.limit.key: guard.limit for guard in guards if guard.limit}
    help_texts = "\n".join(f"    {key}: {limit.meaning}" for key, limit in limits.items())
    return make_dataclass(
        "Limits",
        [
            (key, float if limit.default is not None else float | None, limit.default)
            for key, limit in limits.items()
        ],
        bases=(AnyLimits,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": f"Where a guard becomes a warning.\n\nArgs:\n{help_texts}"},
    )


GUARDS_TABLE = guards_table()
_Limits: Any = limits_of()


class Limits(_Limits):
    """Where a guard becomes a warning: one field for each limit of `GUARDS`."""


def measured(evidence: Evidence, guards: Sequence[Guard] = GUARDS) -> Measured:
    """An iteration's row of the guards table."""
    row: Measured = dict.fromkeys(guards_table(guards).arrow.names)
    row |= {"iteration": evidence.iteration, "policy": f"iter{evidence.iteration:02d}"}
    for guard in guards:
        row |= guard.measure(evidence)
    return row


def in_words(row: Measured, guards: Sequence[Guard] = GUARDS) -> str:
    """A row in one line, without what was not measured."""
    return ", ".join(
        f"{guard.title} {guard.text(row)}" + (f" ({note})" if (note := guard.note(row)) else "")
        for guard in guards
        if row[guard.name] is not None
    )


def seed_row(rows: Sequence[Measured]) -> Measured:
    """The row of iteration 0, with which diversity is compared; UserError without it."""
    for row in rows:
        if row["iteration"] == 0:
            return row
    raise UserError(
        f"the guards are those of iterations {', '.join(str(row['iteration']) for row in rows)}; "
        "iteration 0 is needed, with which diversity is compared. Make the guards anew."
    )


def warnings_of(
    row: Measured, seed: Measured, limits: AnyLimits, guards: Sequence[Guard] = GUARDS
) -> list[str]:
    """A sentence for each guard of a row that is beyond its limit; `seed` is the row of iteration 0."""
    found = (guard.warning(row, seed, limits) for guard in guards)
    return [sentence for sentence in found if sentence]


def hardly_moved(rows: Sequence[Measured], limits: AnyLimits) -> dict[str, str]:
    """The policies that hardly moved from the base, and the sentence that says so."""
    seed = seed_row(rows)
    found = {row["policy"]: MOVED.warning(row, seed, limits) for row in rows}
    return {policy: sentence for policy, sentence in found.items() if sentence}


def all_warnings(
    rows: Sequence[Measured], limits: AnyLimits, guards: Sequence[Guard] = GUARDS
) -> list[str]:
    """The warnings of all rows, iteration by iteration; the same sentence once."""
    seed = seed_row(rows)
    found = (warnings_of(row, seed, limits, guards) for row in rows)
    return list(dict.fromkeys(sentence for sentences in found for sentence in sentences))


def blindness_warning(rows: Sequence[Measured]) -> str | None:
    """A sentence if a diversity is not known (nan), so that no limit of it is ever passed."""
    names = (DIVERSITY.name, FEATURE_DIVERSITY.name)
    blind = [row["policy"] for row in rows if any(isnan(row[name]) for name in names)]
    if not blind:
        return None
    return (
        f"The diversity of {' and '.join(dict.fromkeys(blind))} is not known, so lost diversity "
        "goes unseen: it needs two images a prompt. Set evaluation.images_per_prompt to 2 or more."
    )
