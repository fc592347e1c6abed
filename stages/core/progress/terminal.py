"""What a run says on the terminal of the time left, now and then while it goes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from stages.core.errors import UserError
from stages.core.progress.journal import Call, read_calls
from stages.core.progress.time_left import in_words, rule_seconds, time_left

TELL_SECONDS = 60.0
"""At most one line this often."""


@dataclass(kw_only=True)
class Teller:
    """Called when a job has finished: prints how far the run is, unless it has done so lately."""

    journal: Path
    """Times of earlier calls are read from it once."""
    is_quiet: bool = False
    """Whether --quiet asks for no progress."""
    earlier: list[Call] = field(default_factory=list)
    told: float = 0.0
    """When it said something last, by the monotonic clock."""

    def __post_init__(self) -> None:
        """Read what earlier calls have left; a damaged journal tells nothing."""
        try:
            self.earlier = read_calls(self.journal)
        except UserError:
            self.earlier = []
        self.told = time.monotonic()

    def __call__(self, call: Call) -> None:
        """Say it, if it is time to, and if anything is left."""
        now = time.monotonic()
        if self.is_quiet or now - self.told < TELL_SECONDS or len(call.seconds) == len(call.jobs):
            return
        self.told = now
        known = rule_seconds([*self.earlier, call])
        print(in_words(call, time_left(call, known, time.time())), file=sys.stderr, flush=True)
