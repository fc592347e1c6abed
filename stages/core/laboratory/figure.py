"""What the arms of an experiment measured, policy by policy, as a figure."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.core.laboratory.experiments import Experiment
from stages.core.laboratory.results import CALLS
from stages.core.laboratory.verdicts import Values, interval

PANELS = {
    "total": "what people like (total)",
    "rank_correlation": "the judge: rank correlation with the truth",
    "diversity": "diversity of a prompt's images",
}
"""Measures, and what their panels are called."""
COLOURS = ("#1f5fa8", "#c4561c", "#2f7d4f", "#8a4fa3", "#6b6b6b")
LOOK: Any = {
    "svg.hashsalt": "sail", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False,
    "axes.spines.right": False, "savefig.facecolor": "white",
}  # fmt: skip


def figure(experiment: Experiment, values: Values) -> bytes | None:
    """An SVG: the mean over seeds of each measure, a line for each arm, with 95 % bootstrap intervals.

    By policy, or by the denoiser calls until a policy was made, as the experiment says. None where nothing was
    measured. Equal values give equal bytes.
    """
    measures = [name for name in PANELS if any(key[3] == name for key in values)]
    if not measures:
        return None
    policies = sorted({key[2] for key in values}, key=lambda name: (name != "base", name))
    with mpl.rc_context(LOOK):
        drawing = Figure(figsize=(3.1 * len(measures), 2.7), layout="constrained")
        panels = drawing.subplots(1, len(measures), squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            for number, arm in enumerate(experiment.arms):
                places = places_of(experiment, arm, number, policies, values)
                draw_arm(axes, number, arm, measure, places, values)
            axes.set_title(PANELS[measure], fontsize=8)
            if experiment.by == "policy":
                axes.set_xticks(range(len(policies)), policies)
                axes.set_xlim(-0.3, len(policies) - 0.5)
            else:
                axes.set_xlabel("thousand denoiser calls", fontsize=8)
        drawing.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center",
            ncols=len(experiment.arms), frameon=False,
        )  # fmt: skip
        file = BytesIO()
        drawing.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def places_of(
    experiment: Experiment, arm: str, number: int, policies: list[str], values: Values
) -> dict[str, float]:
    """Where each policy of an arm stands on the axis: by its number, a little beside other arms, or by its calls."""
    if experiment.by == "policy":
        return {policy: place + 0.06 * number for place, policy in enumerate(policies)}
    return {
        policy: calls / 1000
        for (of, _, policy, measure), calls in values.items()
        if (of, measure) == (arm, CALLS)
    }


def draw_arm(
    axes: Axes, number: int, arm: str, measure: str, places: dict[str, float], values: Values
) -> None:
    """One line."""
    at, means, below, above = list[float](), list[float](), list[float](), list[float]()
    for policy, place in sorted(places.items(), key=lambda each: each[1]):
        found = [v for (a, _, p, m), v in values.items() if (a, p, m) == (arm, policy, measure)]
        if found:
            mean, (low, high) = float(np.mean(found)), interval(found)
            at.append(place)
            means.append(mean)
            below.append(mean - low)
            above.append(high - mean)
    look: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3, "linewidth": 1.1,
        "elinewidth": 0.9, "label": arm,
    }  # fmt: skip
    if at:
        axes.errorbar(at, means, yerr=[below, above], **look)
