"""The answers as a table of labels that `import_preferences` reads, in the layout `comparisons`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.artifacts.schemas import HUMAN_LABELS
from stages.core.artifacts.tables import write_rows
from stages.core.data.prompts import prompt_id
from stages.core.labelling.answers import Answer
from stages.core.labelling.gallery import Gallery, digest_of_image

WINNERS = {"left": "image_a", "right": "image_b", "tie": "tie"}
"""Of the answers that become labels; pairs that were both bad or skipped say nothing to a training."""
AT_ONCE = 64
"""Labels whose images are in memory together."""


@dataclass
class Exported:
    """What became of the answers."""

    preferences: int = 0
    ties: int = 0
    both_bad: int = 0
    skipped: int = 0
    stale: int = 0
    """About images that have changed since, or are gone."""

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.preferences + self.ties

    def __str__(self) -> str:
        text = (
            f"{self.preferences} preferences and {self.ties} ties; left out are {self.both_bad} pairs "
            f"of which both are bad and {self.skipped} that were skipped"
        )
        return text + (
            f", and {self.stale} answers about images that have changed since or are gone"
            if self.stale
            else ""
        )


def write_labels(
    path: Path, gallery: Gallery, answers: Sequence[Answer], *, arguments: object, journal: Path
) -> Exported:
    """Write the labels, complete or not at all; how many of each kind there are."""
    done = Exported(
        both_bad=sum(answer.choice == "both_bad" for answer in answers),
        skipped=sum(answer.choice == "skip" for answer in answers),
    )
    write_rows(
        path, _rows(gallery, answers, done), HUMAN_LABELS, stage="label", arguments=arguments,
        inputs=[journal],
    )  # fmt: skip
    return done


def _rows(gallery: Gallery, answers: Sequence[Answer], done: Exported) -> Iterator[dict[str, Any]]:
    wanted = [answer for answer in answers if answer.choice in WINNERS]
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        names = {side.name for answer in some for side in (answer.left, answer.right)}
        places = {gallery.places[name] for name in names if name in gallery.places}
        found = {place.name: data for place, data in gallery.read(places) if data}
        for answer in some:
            left, right = (found.get(side.name) for side in (answer.left, answer.right))
            if not (_is_same(left, answer.left.digest) and _is_same(right, answer.right.digest)):
                done.stale += 1
                continue
            done.ties += answer.choice == "tie"
            done.preferences += answer.choice != "tie"
            yield {
                "prompt_id": prompt_id(answer.prompt),
                "prompt": answer.prompt,
                "image_a": {"bytes": left, "path": None},
                "image_b": {"bytes": right, "path": None},
                "winner": WINNERS[answer.choice],
                "labeller": answer.labeller,
                "labelled_at": answer.at.isoformat(timespec="milliseconds"),
                "is_common": answer.is_common,
                "image_a_name": answer.left.name,
                "image_b_name": answer.right.name,
            }


def _is_same(data: bytes | None, digest: str) -> bool:
    return data is not None and digest_of_image(data) == digest
