"""Images that were liked or disliked one by one: which are trained on, and which are held out side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.core.data.image_spool import ImageSpool
from stages.core.data.layouts.groups import Likes
from stages.core.data.layouts.labels import Layout, Like, Place
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError


@dataclass(frozen=True, slots=True)
class LikedPair:
    """A liked image beside a disliked one, which nobody has compared; their prompts may differ."""

    liked: Like
    disliked: Like

    @property
    def file(self) -> Path:
        """Where the liked one stands."""
        return self.liked.file

    @property
    def row(self) -> int:
        """The liked one's row."""
        return self.liked.row

    @property
    def places(self) -> tuple[Place, ...]:
        """Where both images stand."""
        return self.liked.places + self.disliked.places


def layout_of_likes(layout: Layout) -> Likes:
    """The layout, if it judges each image by itself. UserError for one that compares images."""
    if isinstance(layout, Likes):
        return layout
    raise UserError(
        f"preferences.unpaired is true, and {layout.files[0]} has the layout {layout.name!r}, which compares "
        "images; only 'likes' judges each image by itself. Set preferences.unpaired to false, or import files "
        "of likes (docs/own-labels.md)"
    )


def split_likes(
    by_prompt: Mapping[str, Sequence[Like]], *, num_images: int | None, num_holdout: int
) -> tuple[list[Like], list[LikedPair]]:
    """(images to train on, held-out pairs), whole prompts at a time, in the mapping's order.

    A prompt is held out while images of a kind that it has are still wanted. Images of one prompt are put side by
    side first, the others as they come. UserError if there are too few of a kind.
    """
    counts = Counter[bool]()
    held_out: set[str] = set()  # all of such a prompt's images, which nobody trains on
    pairs: list[LikedPair] = []
    alone: dict[bool, list[Like]] = {True: [], False: []}
    for name, likes in by_prompt.items():
        if min(counts[True], counts[False]) >= num_holdout:
            break
        if not any(counts[like.is_liked] < num_holdout for like in likes):
            continue
        held_out.add(name)
        counts.update(like.is_liked for like in likes)
        liked, disliked = ([one for one in likes if one.is_liked == kind] for kind in (True, False))
        both = min(len(liked), len(disliked))
        pairs += map(LikedPair, liked[:both], disliked[:both])
        alone[True] += liked[both:]
        alone[False] += disliked[both:]
    pairs += map(LikedPair, alone[True], alone[False])
    if len(pairs) < num_holdout:
        raise UserError(
            f"{_in_words(_all(by_prompt))} are usable, and preferences.num_holdout holds out {num_holdout} pairs of "
            "one liked and one disliked image. Lower it, or label more images."
        )
    left = [like for name, likes in by_prompt.items() if name not in held_out for like in likes]
    chosen = left if num_images is None else left[:num_images]
    if len({like.is_liked for like in chosen}) < len({like.is_liked for like in left}):
        raise UserError(
            f"preferences.num_pairs keeps {_in_words(chosen)} of {_in_words(left)} to train on, and some of both "
            "kinds are needed. Raise it."
        )
    if len(chosen) < max(2, num_images or 2) or len({like.is_liked for like in chosen}) < 2:
        raise UserError(
            f"{_in_words(_all(by_prompt))} are usable; beside {num_holdout} held-out pairs {_in_words(chosen)} are "
            f"left to train on; {max(2, num_images or 2)} images are needed, and some of both kinds. Give more "
            "labels, or lower preferences.num_pairs or num_holdout."
        )
    return chosen, pairs[:num_holdout]


def like_row(like: Like, spool: ImageSpool, taken: Counter[str]) -> dict[str, object]:
    """The label as a row of a likes table; a repeated name gets a number after it."""
    return {
        "image_id": _unique(like.name, taken),
        "prompt_id": prompt_id(like.prompt),
        "prompt": like.prompt,
        "image": {"bytes": spool.read(like.places[0]), "path": None},
        "is_liked": like.is_liked,
        "source": "human",
        "source_file": str(like.file),
        "source_row": like.row,
    }


def liked_pair_row(pair: LikedPair, spool: ImageSpool, taken: Counter[str]) -> dict[str, object]:
    """The pair as a row of a liked_pairs table."""
    liked, disliked = pair.liked, pair.disliked
    images = [{"bytes": spool.read(place), "path": None} for place in pair.places]
    return {
        "pair_id": _unique(f"{liked.name}-{disliked.image:016x}", taken),
        "prompt_id": prompt_id(liked.prompt),
        "prompt": liked.prompt,
        "winner": images[0],
        "loser": images[1],
        "source": "human",
        "iteration": 0,
        "source_file": str(liked.file),
        "source_row": liked.row,
        "loser_prompt": disliked.prompt,
        "loser_source_file": str(disliked.file),
        "loser_source_row": disliked.row,
    }


def _unique(name: str, taken: Counter[str]) -> str:
    taken[name] += 1
    return f"{name}-{taken[name]}" if taken[name] > 1 else name


def _all(by_prompt: Mapping[str, Sequence[Like]]) -> list[Like]:
    return [like for likes in by_prompt.values() for like in likes]


def _in_words(likes: Iterable[Like]) -> str:
    """'3 liked and 4 disliked images'."""
    counts = Counter(like.is_liked for like in likes)
    return f"{counts[True]} liked and {counts[False]} disliked images"
