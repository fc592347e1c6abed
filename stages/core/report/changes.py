"""Which prompts gained most and which lost most, and by which of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.core.evaluation.wording import number

ImageScores = Mapping[int, float]
"""A prompt's images by their number, each with its score."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one prompt."""

    prompt_id: str
    before: ImageScores
    after: ImageScores

    @property
    def mean(self) -> float:
        """The difference of the mean scores, after less before, over the images that both have."""
        return float(np.mean(list(self._differences.values())))

    @property
    def candidate(self) -> int:
        """The image that changed most in the prompt's own direction; the first of equals."""
        sign = 1 if self.mean >= 0 else -1
        return max(self._differences, key=lambda place: (sign * self._differences[place], -place))

    @property
    def _differences(self) -> dict[int, float]:
        return {i: self.after[i] - self.before[i] for i in sorted(self.before.keys() & self.after)}

    def in_words(self, decimals: int) -> list[str]:
        """The mean difference, and the scores of every image."""
        images = [
            f"image {i}: {number(self.before[i], decimals)} to {number(self.after[i], decimals)}"
            for i in self._differences
        ]
        mean = number(self.mean, decimals, sign=True)
        if len(images) == 1:
            return [mean]
        return [f"{mean} on average of {len(images)} images", *images]


def most_changed(
    before: Mapping[str, ImageScores], after: Mapping[str, ImageScores], num: int
) -> tuple[Sequence[Change], Sequence[Change]]:
    """The prompts that gained most and those that lost most, the largest change first.

    Only prompts that both scored on the same images; a prompt that did not change is in neither.
    """
    changes = [
        Change(prompt_id=name, before=before[name], after=after[name])
        for name in before
        if name in after and before[name].keys() & after[name].keys()
    ]
    ordered = sorted(changes, key=lambda change: (-change.mean, change.prompt_id))
    gained = [change for change in ordered if change.mean > 0]
    lost = [change for change in reversed(ordered) if change.mean < 0]
    return gained[:num], lost[:num]
