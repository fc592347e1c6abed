"""The report's figures: drawn with matplotlib, returned as inline SVG in the colours of the page."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Num
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stages.core.evaluation.statistics import ReliabilityBin

INK, MUTED, RULE, ACCENT, SOFT = "#010101", "#020202", "#030303", "#040404", "#050505"
COLOURS: Mapping[str, str] = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    SOFT: "var(--accent-soft)",
}
"""Stand-ins for the page's own colours, so that a figure follows its light or dark scheme."""

SETTINGS: Any = {
    "svg.hashsalt": "sail",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
}

LN_2 = math.log(2)
SHARES = FuncFormatter(lambda share, _place: f"{round(100 * share, 6):g} %")
"""Ticks of an axis of shares: '80 %', and '82.5 %' only where they lie so close."""
STYLE_OF_MATPLOTLIB = re.compile(r"<style type=\"text/css\">.*?</style>", re.DOTALL)
"""It holds for the whole page; the page's own style sheet says the same of its figures."""
MAX_POINTS = 300
"""A training curve with more steps is shown as means over neighbouring steps."""

Steps = Float[np.ndarray, " step"]
Points = Float[np.ndarray, " point"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One value per policy or iteration; a missing one is None and leaves a gap."""

    name: str
    labels: Sequence[str]
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()
    """95 % intervals, one per value; empty for none."""
    line: float | None = None
    """Where a dashed line goes, to compare with."""
    line_label: str = ""
    is_share: bool = False


def series_panel(
    series: Series, size: tuple[float, float] = (3.4, 2.1), xlabel: str = ""
) -> Markup:
    """A small plot of one quantity over policies or iterations, with intervals and a dashed line."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _draw_series(axes, series)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(xlabel)
        if len(series.labels) > 6:
            axes.tick_params(axis="x", labelrotation=60)

    return _svg(draw, size, series.name, _describe(series))


def small_panel(series: Series) -> Markup:
    """The same in one line of a table, whose other cells tell the numbers."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _draw_series(axes, series)
        axes.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
        places = list(range(0, len(series.labels), 1 + len(series.labels) // 8))
        axes.set_xticks(places, [series.labels[place] for place in places])

    return _svg(draw, (2.3, 0.95), series.name, _describe(series))


def _draw_series(axes: Axes, series: Series) -> None:
    places = np.arange(len(series.labels))
    values = np.array([np.nan if v is None else v for v in series.values], np.float64)
    for place, ends in zip(places, series.intervals, strict=False):
        if ends is not None:
            axes.vlines(place, *ends, color=ACCENT, linewidth=1.4)
    axes.plot(places, values, color=ACCENT, linewidth=1.2, marker="o", markersize=4.5)
    axes.set_xticks(places, series.labels)
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.margins(y=0.15)
    if series.is_share:
        axes.yaxis.set_major_formatter(SHARES)
    if series.line is not None:
        _dashed(axes, series.line, series.line_label)
    if series.is_share:  # room below 0 would say that a share can be negative
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))


def histogram(name: str, values: Float[np.ndarray, " pair"]) -> Markup:
    """How many pairs have which margin, with a dashed line at 0."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.hist(values, bins=min(30, max(8, len(values) // 8)), color=SOFT, edgecolor=ACCENT)
        axes.axvline(0, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlabel("margin, millionths")
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))

    low, middle, high = np.quantile(values, (0, 0.5, 1))
    text = f"{name}: {len(values)} pairs, {low:.3g} to {high:.3g}, median {middle:.3g}"
    return _svg(draw, (3.4, 1.7), name, text)


def reliability_panel(name: str, bins: Sequence[ReliabilityBin]) -> Markup:
    """How often a judge is right against how sure it is; on the dashed line it is as right as sure."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        sure = [part.mean_probability for part in bins]
        for part in bins:
            ends = (part.share_low, part.share_high)
            axes.vlines(part.mean_probability, *ends, color=ACCENT, linewidth=1.4)
        right = [part.share_right for part in bins]
        axes.plot(sure, right, color=ACCENT, linewidth=1.2, marker="o", markersize=4.5)
        axes.set_xlim(0.48, 1.02)
        axes.set_xlabel("how sure")
        axes.set_ylabel("how often right")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(SHARES)
            axis.set_major_locator(MaxNLocator(5))

    text = f"{name}: " + ", ".join(
        f"{100 * p.mean_probability:.0f} % sure, {100 * p.share_right:.0f} % right of {p.num_pairs}"
        for p in bins
    )
    return _svg(draw, (3.4, 2.4), name, text)


@dataclass(frozen=True, kw_only=True)
class TrainingCurves:
    """What one training measured at its steps."""

    iteration: int
    loss: Steps
    accuracy: Steps
    held_out_steps: Num[np.ndarray, " point"]
    held_out_accuracy: Points
    """On held-out pairs with fixed draws; empty if none were scored."""
    held_out_log_loss: Points


def training_panel(name: str, curves: TrainingCurves, loss_range: tuple[float, float]) -> Markup:
    """Loss above accuracies over the steps of one training, with what chance would give.

    The thin line is of each batch, the marked one of held-out pairs with the same draws at each point.
    """
    loss, accuracy = curves.loss, curves.accuracy

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, values, line, label in (
            (upper, loss, LN_2, "ln 2"),
            (lower, accuracy, 0.5, "50 %"),
        ):
            places, means = thin_out(values)
            axes.plot(places, means, color=ACCENT, linewidth=0.5, alpha=0.5)
            axes.plot(places, running_mean(means), color=ACCENT, linewidth=1.4)
            _dashed(axes, line, label)
        upper.set_ylim(*loss_range)
        upper.set_ylabel("loss")
        lower.set_ylim(-0.03, 1.03)
        lower.yaxis.set_major_formatter(SHARES)
        if len(curves.held_out_steps):
            for axes, values in (
                (upper, curves.held_out_log_loss),
                (lower, curves.held_out_accuracy),
            ):
                axes.plot(
                    curves.held_out_steps,
                    values,
                    color=INK,
                    linewidth=1.2,
                    marker="o",
                    markersize=2.5,
                    label="held out",
                )
            lower.legend(frameon=False, fontsize=7.5, loc="lower right", handlelength=1.5)
        lower.set_ylabel("accuracy")
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    text = (
        f"{name}: {len(loss)} steps, loss {loss[0]:.3g} to {loss[-1]:.3g}, "
        f"implicit accuracy {accuracy[0]:.2f} to {accuracy[-1]:.2f}"
    )
    if len(curves.held_out_steps):
        first, last = curves.held_out_accuracy[[0, -1]]
        text += f", on held-out pairs {first:.2f} to {last:.2f}"
        first, last = curves.held_out_log_loss[[0, -1]]
        text += f", held-out log-loss {first:.3f} to {last:.3f}"
    return _svg(draw, (3.4, 3.0), name, text)


def thin_out(values: Steps) -> tuple[Steps, Steps]:
    """(step, mean) of at most MAX_POINTS groups of neighbouring steps; steps count from 1."""
    groups = np.array_split(values, min(len(values), MAX_POINTS))
    steps = np.array_split(np.arange(1.0, len(values) + 1), len(groups))
    return np.array([group.mean() for group in steps]), np.array([group.mean() for group in groups])


def running_mean(values: Steps) -> Steps:
    """Mean of each value and its neighbours, over a tenth of the curve; shorter at the ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _dashed(axes: Axes, height: float, label: str) -> None:
    """A dashed line across, and its label right of the axes, where no curve is."""
    axes.axhline(height, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(
        label,
        (1, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(3, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        color=MUTED,
        fontsize=7.5,
    )


def _describe(series: Series) -> str:
    def text(value: float | None) -> str:
        if value is None:
            return "none"
        return f"{value * 100:.0f} %" if series.is_share else f"{value:.4g}"

    values = zip(series.labels, series.values, strict=True)
    return f"{series.name}: " + ", ".join(f"{label} {text(value)}" for label, value in values)


def _svg(
    draw: Callable[[Figure], None], size: tuple[float, float], name: str, description: str
) -> Markup:
    """The drawn figure as an <svg> element that shares no id with another one of the page.

    The same input gives the same text: ids are salted and no date is written.
    """
    buffer = io.StringIO()
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg ") :], flags=re.DOTALL)
    text = STYLE_OF_MATPLOTLIB.sub("", text)
    prefix = "f" + hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()[:8]
    for before in (' id="', "url(#", 'xlink:href="#'):
        text = text.replace(before, f"{before}{prefix}-")
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    label = f'<svg role="img" aria-label="{escape(description)}" '
    return Markup(text.replace("<svg ", label, 1))
