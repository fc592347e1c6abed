"""The guards as rows of one table: a small figure, a value for each iteration, the limit, the meaning."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from stages.core.evaluation.guard import AnyLimits, Guard, Measured
from stages.core.evaluation.guards import GUARDS, seed_row
from stages.core.evaluation.wording import DASH, number, percent
from stages.core.report.figures import Series, small_panel

Row = dict[str, Any]

IN_POINTS = ("accuracy_change",)
"""Guards that are differences of shares: they are shown in points of per cent."""
TINY = 0.01
"""Where all values of a guard are smaller, they are shown as multiples of a power of ten."""
HYPHEN = re.compile(r"-(?=\d)")
"""Before a number, where a true minus belongs."""
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def guards_view(
    rows: Sequence[Measured], limits: AnyLimits, guards: Sequence[Guard] = GUARDS
) -> Row:
    """Warnings, and of each guard a row that marks what is beyond its limit."""
    seed = seed_row(rows)
    warned = {
        (row["iteration"], guard.name): guard.warning(row, seed, limits)
        for row in rows
        for guard in guards
    }
    return {
        "warnings": list(dict.fromkeys(text for text in warned.values() if text)),
        "guard_iterations": [(row["iteration"], row["policy"]) for row in rows],
        "guards": [
            guard_row(guard, rows, limits, [warned[row["iteration"], guard.name] for row in rows])
            for guard in guards
        ],
    }


def guard_row(
    guard: Guard, rows: Sequence[Measured], limits: AnyLimits, warned: Sequence[str | None]
) -> Row:
    """One guard over iterations; `warned` are its warnings."""
    line = guard.line(seed_row(rows), limits)
    factor, unit = unit_of(guard, rows)
    text = wording(guard, factor, rows)
    values = [row[guard.name] for row in rows]
    low, high = guard.interval or ("", "")
    figure_factor = 1.0 if guard.is_share else factor

    def scaled(value: float | None) -> float | None:
        return None if value is None else figure_factor * value

    series = Series(
        name=guard.title,
        labels=[str(row["iteration"]) for row in rows],
        values=[scaled(value) for value in values],
        intervals=[
            None if row[low] is None else (figure_factor * row[low], figure_factor * row[high])
            for row in rows
        ]
        if guard.interval
        else (),
        line=scaled(line.height) if line else None,
        line_label=line.label if line else "",
        is_share=guard.is_share,
    )
    notes, shared = split_shared([HYPHEN.sub("−", guard.note(row)) for row in rows])
    return {
        "title": guard.title,
        "unit": ", ".join(filter(None, [unit, shared])),
        "meaning": guard.meaning,
        "svg": small_panel(series),
        "line": {"text": text(line.height), "label": line.label} if line else None,
        "cells": [
            {"text": text(value), "note": note, "turned": bool(warning)}
            for value, note, warning in zip(values, notes, warned, strict=True)
        ],
    }


def split_shared(notes: Sequence[str]) -> tuple[list[str], str]:
    """The notes without their last part where all end in the same one, and that part, said once."""
    known = [note for note in notes if note]
    ends = {note.rpartition(", ")[2] for note in known}
    if len(known) < 2 or len(ends) != 1:
        return list(notes), ""
    (end,) = ends
    return [note.removesuffix(end).removesuffix(", ") for note in notes], end


def unit_of(guard: Guard, rows: Sequence[Measured]) -> tuple[float, str]:
    """What a guard's values are multiplied by, and the unit they then have."""
    if guard.name in IN_POINTS:
        return 100.0, "points"
    if guard.is_share:
        return 1.0, ""
    largest = largest_of(guard, rows)
    if not 0 < largest < TINY:
        return 1.0, ""
    power = math.floor(math.log10(largest))
    return 10.0**-power, f"× 10{str(power).translate(RAISED)}"


def largest_of(guard: Guard, rows: Sequence[Measured]) -> float:
    """The largest size of a guard's known values; 0 where none is known."""
    known = [abs(row[guard.name]) for row in rows if row[guard.name] is not None]
    return max((value for value in known if math.isfinite(value)), default=0.0)


def wording(guard: Guard, factor: float, rows: Sequence[Measured]) -> Callable[[float | None], str]:
    """How a guard's values are written, all with one notation: three digits of the largest."""
    largest = largest_of(guard, rows)
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 2

    def text(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return DASH
        if guard.is_share:
            return percent(value)
        shown = factor * value
        if guard.name in IN_POINTS:
            return number(shown, 0, sign=True)
        if factor != 1 and abs(shown) < 0.005:
            return "0"
        return number(shown, 2 if factor != 1 else decimals)

    return text
