"""Cases of a target, run one after the other, and how they ended."""

from __future__ import annotations

import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from stages.core.errors import UserError
from tests.fuzz.targets import Target

MAX_MESSAGE_LETTERS = 30_000
"""A message that nobody could read is not clear."""


@dataclass
class Ending:
    """How many cases ended in what."""

    results: int = 0
    errors: int = 0
    seconds: float = 0.0
    tracebacks: list[str] = field(default_factory=list)
    """Of bugs, each place of the code once."""

    @property
    def cases(self) -> int:
        """All of them."""
        return self.results + self.errors + len(self.tracebacks)

    def __iadd__(self, other: Ending) -> Ending:
        self.results += other.results
        self.errors += other.errors
        self.seconds += other.seconds
        self.tracebacks += other.tracebacks
        return self


def fuzz(target: Target, cases: int, random_seed: int) -> Ending:
    """How `cases` cases of a target ended; the same cases for the same seed."""
    ending, started = Ending(), time.monotonic()
    while ending.cases < cases:
        _round(target, cases - ending.cases, random_seed, ending)
        random_seed += 1_000_003
    ending.seconds = time.monotonic() - started
    return ending


def _round(target: Target, cases: int, random_seed: int, ending: Ending) -> None:
    @seed(random_seed)
    @settings(
        max_examples=cases, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.cases)
    def one(case: Any) -> None:
        run(target, case, ending)

    one()


def run(target: Target, case: Any, ending: Ending) -> None:
    """Run a case in a folder of its own and count how it ended."""
    with tempfile.TemporaryDirectory(prefix="sail-fuzz-") as place:
        folder = Path(place) / "data"
        folder.mkdir()
        try:
            target.read(case, folder)
        except UserError as error:
            message = str(error)
            if not message.strip() or len(message) > MAX_MESSAGE_LETTERS:
                ending.tracebacks.append(f"{target.name}: no clear message: {message[:300]!r}")
            else:
                ending.errors += 1
        except Exception:
            ending.tracebacks.append(
                f"{target.name}: {repr(case)[:600]}\n{traceback.format_exc()[-3000:]}"
            )
        else:
            ending.results += 1
