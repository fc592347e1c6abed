"""Which pairs of images people are asked about, in which order, and on which side each image stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import combinations

from stages.core.data.layouts.labels import digest_of
from stages.core.labelling.places import Place, PromptImages


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images of a prompt, in an order that nobody sees."""

    key: str
    """What names the pair: of the prompt and the names of both images."""
    prompt: str
    first: Place
    second: Place
    turn: int
    """How many pairs of the same prompt come before it."""
    is_common: bool
    """Whether every labeller is asked about it."""

    def sides(self, labeller: str) -> tuple[Place, Place]:
        """(left, right) for a labeller, by a hash of both: each image stands left as often as not."""
        is_turned = digest_of("side", labeller, self.key) % 2
        return (self.second, self.first) if is_turned else (self.first, self.second)


def pair_key(prompt_id: str, one: Place, other: Place) -> str:
    """What names the pair of two images, whichever comes first."""
    return f"{digest_of(prompt_id, *sorted((one.name, other.name))):016x}"


def choose_pairs(
    prompts: Sequence[PromptImages], *, pairs_per_prompt: int, common_share: float, seed: int
) -> list[Pair]:
    """Pairs drawn at random of each prompt's images, in a random order, the common ones first.

    Prompts take turns: all have had one pair before any has its second.
    """
    drawn: list[tuple[int, int, str, PromptImages, tuple[Place, Place]]] = []
    for prompt in prompts:
        keyed = (
            (digest_of("pair", seed, key := pair_key(prompt.prompt_id, *pair)), key, pair)
            for pair in combinations(prompt.places, 2)
        )
        for turn, (place, key, pair) in enumerate(
            nsmallest(pairs_per_prompt, keyed, key=lambda one: one[0])
        ):
            drawn.append((turn, place, key, prompt, pair))
    drawn.sort(key=lambda one: one[:2])
    num_common = round(common_share * len(drawn))
    return [
        Pair(key, prompt.prompt, *pair, turn=turn, is_common=number < num_common)
        for number, (turn, _, key, prompt, pair) in enumerate(drawn)
    ]


def order_of(pairs: Sequence[Pair], labeller: str) -> list[Pair]:
    """The pairs that not everybody is asked about, in an order of this labeller's own."""
    rest = [pair for pair in pairs if not pair.is_common]
    return sorted(rest, key=lambda pair: (pair.turn, digest_of("order", labeller, pair.key)))


def is_turn_of_common(num_answered: int, common_share: float) -> bool:
    """Whether the next pair is a common one, for who has answered so many: evenly, by their share."""
    before, after = ((num_answered + more) * common_share + 1e-9 for more in (0, 1))
    return int(after) > int(before)
