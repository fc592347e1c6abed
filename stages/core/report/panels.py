"""A figure with its words."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Panel:
    """A figure with its title and caption."""

    title: str
    svg: Markup
    caption: str
