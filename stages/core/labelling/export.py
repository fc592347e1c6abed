"""The answers as a table of labels that `import_preferences` reads: `comparisons`, or `rankings`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.artifacts.schemas import HUMAN_LABELS, HUMAN_RANKINGS
from stages.core.artifacts.tables import write_rows
from stages.core.data.prompts import prompt_id
from stages.core.labelling.answers import ALL_BAD, RANKED, SKIP, Answer, Side
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
    rankings: int = 0
    both_bad: int = 0
    """Pairs of which both images are bad, or sets of which all are."""
    skipped: int = 0
    stale: int = 0
    """About images that have changed since, or are gone."""

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.preferences + self.ties + self.rankings

    def __str__(self) -> str:
        kept, bad = (
            f"{self.preferences} preferences and {self.ties} ties",
            "pairs of which both are bad",
        )
        if self.rankings:
            kept, bad = f"{self.rankings} rankings", "sets of which all are bad"
        text = f"{kept}; left out are {self.both_bad} {bad} and {self.skipped} that were skipped"
        return text + (
            f", and {self.stale} answers about images that have changed since or are gone"
            if self.stale
            else ""
        )


def write_labels(
    path: Path, gallery: Gallery, answers: Sequence[Answer], *, arguments: object, journal: Path
) -> Exported:
    """Write the labels, complete or not at all; how many of each kind there are.

    The schema is human_rankings where images were ranked, else human_labels.
    """
    done = Exported(
        both_bad=sum(answer.choice in ("both_bad", ALL_BAD) for answer in answers),
        skipped=sum(answer.choice == SKIP for answer in answers),
    )
    schema = HUMAN_RANKINGS if any(answer.is_ranking for answer in answers) else HUMAN_LABELS
    write_rows(
        path, _rows(gallery, answers, done), schema, stage="label", arguments=arguments,
        inputs=[journal],
    )  # fmt: skip
    return done


def _rows(gallery: Gallery, answers: Sequence[Answer], done: Exported) -> Iterator[dict[str, Any]]:
    wanted = [answer for answer in answers if answer.choice in (*WINNERS, RANKED)]
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        names = {side.name for answer in some for side in answer.shown}
        places = {gallery.places[name] for name in names if name in gallery.places}
        found = {place.name: data for place, data in gallery.read(places) if data}
        for answer in some:
            data = [found.get(side.name) for side in answer.shown]
            if not all(map(_is_same, data, answer.shown)):
                done.stale += 1
                continue
            done.rankings += answer.is_ranking
            done.ties += answer.choice == "tie"
            done.preferences += answer.choice in ("left", "right")
            images = [{"bytes": image, "path": None} for image in data]
            yield {
                "prompt_id": prompt_id(answer.prompt),
                "prompt": answer.prompt,
                "labeller": answer.labeller,
                "labelled_at": answer.at.isoformat(timespec="milliseconds"),
                "is_common": answer.is_common,
                "may_be_held_out": answer.may_be_held_out,
                **(_ranked(answer, images) if answer.is_ranking else _compared(answer, images)),
            }


def _compared(answer: Answer, images: Sequence[object]) -> dict[str, Any]:
    return {
        "image_a": images[0],
        "image_b": images[1],
        "winner": WINNERS[answer.choice],
        "image_a_name": answer.left.name,
        "image_b_name": answer.right.name,
    }


def _ranked(answer: Answer, images: Sequence[object]) -> dict[str, Any]:
    return {
        "images": images,
        "ranks": list(answer.ranks),
        "image_names": [side.name for side in answer.shown],
    }


def _is_same(data: bytes | None, side: Side) -> bool:
    return data is not None and digest_of_image(data) == side.digest
