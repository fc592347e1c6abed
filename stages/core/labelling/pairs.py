"""Which images people are asked about together, in which order, and where each of them stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import combinations

from stages.core.data.layouts.labels import digest_of
from stages.core.labelling.places import Place, PromptImages


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images of a prompt, or a set of several to be ranked, in an order that nobody sees."""

    key: str
    """What names the pair: of the prompt and the names of the images."""
    prompt: str
    places: tuple[Place, ...]
    turn: int
    """How many pairs of the same prompt come before it."""
    is_common: bool
    """Whether every labeller is asked about it."""
    is_ranked: bool = False
    """Whether people put the images in an order, and do not only choose one."""
    may_be_held_out: bool = True
    """Whether chance alone decides when its prompt is asked about."""

    @property
    def first(self) -> Place:
        """The first image, which stands anywhere."""
        return self.places[0]

    @property
    def second(self) -> Place:
        """The second image."""
        return self.places[1]

    def sides(self, labeller: str) -> tuple[Place, ...]:
        """The images from left to right for a labeller, by a hash of both.

        Each image stands in each place as often.
        """
        if not self.is_ranked:
            is_turned = digest_of("side", labeller, self.key) % 2
            return self.places[::-1] if is_turned else self.places
        return tuple(
            sorted(
                self.places, key=lambda place: digest_of("place", labeller, self.key, place.name)
            )
        )


def pair_key(prompt_id: str, *places: Place) -> str:
    """What names some images of a prompt that are judged together, whichever comes first."""
    return f"{digest_of(prompt_id, *sorted(place.name for place in places)):016x}"


def choose_pairs(
    prompts: Sequence[PromptImages],
    *,
    pairs_per_prompt: int,
    common_share: float,
    seed: int,
    images_shown: int = 2,
    are_chosen: bool = False,
) -> list[Pair]:
    """Pairs drawn at random of each prompt's images, in a random order, the common ones first.

    With more than two images shown these are sets to be ranked, of so many images or as many as are left.
    Prompts take turns: all have had one pair before any has its second. Where pairs will be chosen by a
    judge (`are_chosen`), one prompt in three is kept for chance, by a hash that no seed changes.
    """  # fmt: skip
    drawn: list[tuple[int, int, str, PromptImages, tuple[Place, ...]]] = []
    for prompt in prompts:
        found = (
            _pairs_of(prompt, seed) if images_shown == 2 else _sets_of(prompt, seed, images_shown)
        )
        for turn, (place, key, images) in enumerate(
            nsmallest(pairs_per_prompt, found, key=lambda one: one[0])
        ):
            drawn.append((turn, place, key, prompt, images))
    drawn.sort(key=lambda one: one[:2])
    num_common = round(common_share * len(drawn))
    return [
        Pair(
            key, prompt.prompt, images, turn=turn, is_common=number < num_common,
            is_ranked=images_shown > 2,
            may_be_held_out=not are_chosen or digest_of("at random", prompt.prompt_id) % 3 == 0,
        )
        for number, (turn, _, key, prompt, images) in enumerate(drawn)
    ]  # fmt: skip


Drawn = tuple[int, str, tuple[Place, ...]]
"""(place in the order, key, images)."""


def _pairs_of(prompt: PromptImages, seed: int) -> Iterator[Drawn]:
    """Every pair of a prompt's images."""
    for images in combinations(prompt.places, 2):
        key = pair_key(prompt.prompt_id, *images)
        yield digest_of("pair", seed, key), key, images


def _sets_of(prompt: PromptImages, seed: int, size: int) -> Iterator[Drawn]:
    """Sets of a prompt's images, drawn at random, that share no image; the last may be smaller."""
    order = sorted(
        prompt.places, key=lambda place: digest_of("set", seed, prompt.prompt_id, place.name)
    )
    for start in range(0, len(order) - 1, size):
        images = tuple(order[start : start + size])
        key = pair_key(prompt.prompt_id, *images)
        yield digest_of("pair", seed, key), key, images


def order_of(pairs: Sequence[Pair], labeller: str) -> list[Pair]:
    """The pairs that not everybody is asked about, in an order of this labeller's own."""
    rest = [pair for pair in pairs if not pair.is_common]
    return sorted(rest, key=lambda pair: (pair.turn, digest_of("order", labeller, pair.key)))


def is_turn_of_common(num_answered: int, common_share: float) -> bool:
    """Whether the next pair is a common one, for who has answered so many: evenly, by their share."""
    before, after = ((num_answered + more) * common_share + 1e-9 for more in (0, 1))
    return int(after) > int(before)
