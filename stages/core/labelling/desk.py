"""The desk at which people label: which pair each of them sees next, and what happens to an answer."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import RLock

from stages.core.artifacts.images import ImageError
from stages.core.labelling.answers import SKIP, Answer, Side, read_answers
from stages.core.labelling.choosing import Chooser, is_turn_of_random
from stages.core.labelling.gallery import Gallery, Picture
from stages.core.labelling.measures import seconds_per_pair
from stages.core.labelling.pairs import Pair, is_turn_of_common, order_of
from stages.core.labelling.places import Place
from stages.core.pages.journal import Journal

log = logging.getLogger(__name__)

RESERVED_SECONDS = 600.0
"""So long a pair that one labeller sees is shown to no other."""


@dataclass(frozen=True)
class Shown:
    """A pair as a labeller sees it."""

    pair: Pair
    pictures: tuple[Picture, ...]
    """From left to right."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a labeller is, and all of them together."""

    num_mine: int
    """Pairs that this labeller has answered, skipped ones too."""
    num_left: int
    """Pairs that are left for them."""
    num_labelled: int
    """Pairs that anybody has answered, skipped ones not."""
    num_pairs: int
    num_common: int
    pairs_per_minute: float | None
    seconds_left: float | None


class Desk:
    """Hands out pairs and takes answers; several threads may ask, one at a time is served."""

    def __init__(
        self,
        gallery: Gallery,
        pairs: Sequence[Pair],
        journal: Journal,
        *,
        common_share: float,
        chooser: Chooser | None = None,
    ) -> None:
        self.gallery, self.pairs, self._journal = gallery, list(pairs), journal
        self._common_share, self._chooser = common_share, chooser
        self._answers = read_answers(journal.path, journal.entries())
        self._by_key = {pair.key: pair for pair in pairs}
        self._orders: dict[str, list[Pair]] = {}
        self._shown: dict[str, tuple[str, float]] = {}
        self._turn = RLock()
        self.unusable: dict[str, str] = {}
        """Why some pairs are not shown, by their keys."""
        self.stale = self._find_stale()
        """Answers about images that have changed since, or are gone: they count for nothing here."""

    def answers(self) -> list[Answer]:
        """The answers that count, in their order."""
        with self._turn:
            return [answer for number, answer in self._answers.items() if number not in self.stale]

    def labellers(self) -> list[str]:
        """Who has answered something."""
        return sorted({answer.labeller for answer in self.answers()})

    def find(self, key: object) -> Pair | None:
        """The pair of this name."""
        return self._by_key.get(key) if isinstance(key, str) else None

    def current(self, labeller: str) -> Shown | None:
        """The pair before this labeller; None if none is left for them."""
        with self._turn:
            key, _ = self._shown.get(labeller, ("", 0.0))
            if key in self._by_key and key not in self.unusable and key not in self._of(labeller):
                pair: Pair | None = self._by_key[key]
            else:
                pair = self._choose(labeller, ())
            while pair is not None:
                if (shown := self._show(pair, labeller)) is not None:
                    self._shown[labeller] = (pair.key, time.monotonic())
                    return shown
                pair = self._choose(labeller, ())
            self._shown.pop(labeller, None)
            return None

    def upcoming(self, labeller: str) -> Shown | None:
        """The pair that will probably follow, so that the browser can fetch its images."""
        with self._turn:
            key, _ = self._shown.get(labeller, ("", 0.0))
            pair = self._choose(labeller, (key,), num_more=1)
            return None if pair is None else self._show(pair, labeller)

    def answer(self, labeller: str, key: str, choice: str, ranks: tuple[int, ...] = ()) -> bool:
        """Write down an answer; False if this pair is not before the labeller (any more)."""
        with self._turn:
            shown = self.current(labeller)
            if shown is None or shown.pair.key != key:
                return False
            sides = zip(shown.pair.sides(labeller), shown.pictures, strict=True)
            answer = Answer(
                labeller=labeller,
                pair=key,
                prompt=shown.pair.prompt,
                shown=tuple(Side(place.name, picture.digest) for place, picture in sides),
                choice=choice,
                at=datetime.now(UTC),
                is_common=shown.pair.is_common,
                is_ranking=shown.pair.is_ranked,
                may_be_held_out=shown.pair.may_be_held_out,
                ranks=ranks,
            )
            number = self._journal.append(answer.to_entry())
            self._answers[number] = answer
            self._shown.pop(labeller)
            return True

    def undo(self, labeller: str) -> bool:
        """Take back the labeller's last answer and show its pair again; False if there is none."""
        with self._turn:
            numbers = [n for n, answer in self._answers.items()
                       if answer.labeller == labeller and n not in self.stale]  # fmt: skip
            if not numbers:
                return False
            self._journal.undo(numbers[-1], labeller=labeller, at=datetime.now(UTC).isoformat())
            answer = self._answers.pop(numbers[-1])
            self._shown[labeller] = (answer.pair, time.monotonic())
            return True

    def progress(self, labeller: str) -> Progress:
        """How far the labeller is."""
        with self._turn:
            answers = self.answers()
            mine = [answer for answer in answers if answer.labeller == labeller]
            pace = seconds_per_pair(mine)
            num_left = len(self._left(labeller, ()))
            return Progress(
                num_mine=len(mine),
                num_left=num_left,
                num_labelled=len({answer.pair for answer in answers if answer.choice != "skip"}),
                num_pairs=len(self.pairs),
                num_common=sum(pair.is_common for pair in self.pairs),
                pairs_per_minute=60 / pace if pace else None,
                seconds_left=num_left * pace if pace else None,
            )

    def counts(self) -> Counter[str]:
        """How many answers there are of each kind."""
        return Counter(answer.choice for answer in self.answers())

    def _of(self, labeller: str) -> set[str]:
        """The pairs that a labeller has answered."""
        return {answer.pair for answer in self.answers() if answer.labeller == labeller}

    def _left(self, labeller: str, excluded: Collection[str]) -> list[Pair]:
        """The pairs that are left for a labeller: the common ones, then the others in their order."""
        answers = self.answers()
        gone = {*excluded, *self.unusable, *self._of(labeller)}
        taken = {answer.pair for answer in answers if answer.choice != "skip"}
        now = time.monotonic()
        taken |= {
            key
            for other, (key, since) in self._shown.items()
            if other != labeller and now - since < RESERVED_SECONDS
        }
        if labeller not in self._orders:
            self._orders[labeller] = order_of(self.pairs, labeller)
        common = [pair for pair in self.pairs if pair.is_common and pair.key not in gone]
        own = [
            pair
            for pair in self._orders[labeller]
            if pair.key not in gone and pair.key not in taken
        ]
        return [*common, *own]

    def _choose(
        self, labeller: str, excluded: Collection[str], *, num_more: int = 0
    ) -> Pair | None:
        """The next pair of who has answered so many more than the journal says."""
        left = self._left(labeller, excluded)
        done = len(self._of(labeller)) + num_more
        turn = is_turn_of_common(done, self._common_share)
        fitting = [pair for pair in left if pair.is_common == turn] or left
        if self._chooser is None or not fitting or fitting[0].is_common:
            return fitting[0] if fitting else None
        num_own = done - int(done * self._common_share + 1e-9)
        at_random = is_turn_of_random(num_own)
        some = [pair for pair in fitting if pair.may_be_held_out == at_random] or fitting
        if some[0].may_be_held_out:
            return some[0]
        return self._chooser.choose(some, self._seen_images(excluded))

    def _seen_images(self, more: Collection[str]) -> set[str]:
        """The images of pairs that somebody has judged or has before them, and of some more pairs."""
        judged = {
            side.name for answer in self.answers() if answer.choice != SKIP for side in answer.shown
        }
        keys = {*more, *(key for key, _ in self._shown.values())}
        pairs = [self._by_key[key] for key in keys if key in self._by_key]
        return judged | {place.name for pair in pairs for place in pair.places}

    def _show(self, pair: Pair, labeller: str) -> Shown | None:
        """The pair with its pictures; None, and a note of it, if one cannot be shown."""
        try:
            sides = pair.sides(labeller)
            pictures = tuple(map(self.gallery.picture, sides))
        except ImageError as error:
            self._leave_out(pair, str(error))
            return None
        seen: dict[str, Place] = {}
        for place, picture in sorted(
            zip(sides, pictures, strict=True), key=lambda one: one[0].name
        ):
            if picture.digest in seen:
                self._leave_out(pair, f"{seen[picture.digest]} and {place} are the same image")
                return None
            seen[picture.digest] = place
        return Shown(pair, pictures)

    def _leave_out(self, pair: Pair, reason: str) -> None:
        self.unusable[pair.key] = reason
        log.warning("label: a pair is left out: %s", reason)

    def _find_stale(self) -> set[int]:
        return stale_numbers(self.gallery, self._answers.items())


def stale_numbers(gallery: Gallery, answers: Iterable[tuple[int, Answer]]) -> set[int]:
    """The answers about images that have changed since, or are no longer there."""
    numbered = dict(answers)
    names = {side.name for answer in numbered.values() for side in answer.shown}
    digests = gallery.digests(names)
    return {
        number
        for number, answer in numbered.items()
        if any(digests.get(side.name) != side.digest for side in answer.shown)
    }
