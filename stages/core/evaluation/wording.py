"""Numbers as text of a report."""

from __future__ import annotations

import math

DASH = "–"


def number(value: float | None, decimals: int, *, sign: bool = False) -> str:
    """The value with a true minus, if asked also with a plus; an en dash for a missing one."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A share as whole per cent; an en dash for a missing one."""
    return DASH if value is None or not math.isfinite(value) else f"{value * 100:.0f} %"


def significant(value: float | None) -> str:
    """The value with three significant digits; an en dash for a missing one."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.3g}".replace("-", "−")


def p_value(value: float) -> str:
    """'0.012', or '< 0.001'."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
