"""Pictures of one prompt to compare: side by side, or one in the place of the other, small or large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.core.report.thumbnails import Thumbnail

MOST_PICTURES = 24
"""The style sheet has a rule for each picture that can stand in another's place; more are left out."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture and what stands below it."""

    label: str
    image: Thumbnail
    note: str = ""
    is_extra: bool = False
    """Whether it is only shown in the place of another one, and not side by side."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Pictures of one prompt, and what is known of them."""

    prompt: str
    pictures: Sequence[Shown]
    notes: Sequence[str] = ()
    mark: str = ""
    """Why somebody should look at it; empty for no reason."""
    name: str = ""
    """What it is called in its table; empty where the prompt is enough."""


def policies_look(
    prompt: str,
    policies: Sequence[str],
    images: Sequence[Thumbnail],
    side_by_side: Sequence[str],
    notes: Sequence[str] = (),
) -> Look:
    """A prompt's picture of each policy; `side_by_side` are seen at once, the others in their place."""
    shown = [
        Shown(label=policy, image=image, note=note, is_extra=policy not in side_by_side)
        for policy, image, note in zip(policies, images, notes or [""] * len(policies), strict=True)
    ]
    kept = sorted(range(len(shown)), key=lambda place: (shown[place].is_extra, -place))
    return Look(prompt=prompt, pictures=[shown[place] for place in sorted(kept[:MOST_PICTURES])])
