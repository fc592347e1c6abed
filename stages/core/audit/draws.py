"""A small plot: what each draw says of each image. SVG made of numbers alone, coloured by the page's style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from stages.core.evaluation.wording import number

WIDTH, ROW, LEFT, RIGHT = 560, 20, 80, 12


@dataclass(frozen=True)
class Draws:
    """One image: what its row is called, and each draw's reference error minus policy error."""

    label: str
    values: Sequence[float]
    kind: str = ""
    """'best', 'worst', or nothing."""
    reward: float | None = None
    """What all draws together say; drawn as a tick."""


def draws_plot(rows: Sequence[Draws], exponent: int) -> Markup | None:
    """A row an image, a dot a draw, a tick for the reward; None without draws.

    Values beyond the 2nd and 98th percentile are drawn at the border: one draw may be a thousand times
    the others.
    """
    values = np.array([v for row in rows for v in row.values if np.isfinite(v)], np.float64)
    if not len(values):
        return None
    rewards = [row.reward for row in rows if row.reward is not None and np.isfinite(row.reward)]
    ends = (0.0, *np.quantile(values, (0.02, 0.98)), *rewards)
    low, high = min(ends), max(ends)
    span = high - low or 1.0

    def x(value: float) -> str:
        share = min(max((value - low) / span, 0.0), 1.0)
        return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"

    height = ROW * len(rows) + 22
    parts = [
        Markup('<svg class="draws" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, height, f"what each draw says of {len(rows)} images; a dot to the right of the line "
            "speaks for the image"),
        Markup('<line class="zero" x1="{0}" x2="{0}" y1="0" y2="{1}"/>').format(x(0.0), height - 18),
    ]  # fmt: skip
    for place, row in enumerate(rows):
        y = ROW * place + ROW / 2
        parts.append(
            Markup('<g class="{}"><text x="0" y="{}">{}</text>').format(row.kind, y + 4, row.label)
        )
        parts += [
            Markup('<circle cx="{}" cy="{}" r="3"/>').format(x(value), y)
            for value in row.values if np.isfinite(value)
        ]  # fmt: skip
        if row.reward is not None and np.isfinite(row.reward):
            parts.append(Markup('<line class="reward" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                x(row.reward), y - 8, y + 8))  # fmt: skip
        parts.append(Markup("</g>"))
    for value, anchor in ((low, "start"), (high, "end")):
        label = number(value / 10**exponent, 1, sign=True)
        parts.append(Markup('<text class="end" x="{}" y="{}" text-anchor="{}">{}</text>').format(
            x(value), height - 4, anchor, label))  # fmt: skip
    return Markup("").join([*parts, Markup("</svg>")])
