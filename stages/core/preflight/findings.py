"""What was checked before a run, and what would go wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from stages.core.execution.runtime import log
from stages.core.plan.run import Problem


@dataclass
class Findings:
    """What was checked, and what would go wrong."""

    checks: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, what: str, found: str, *, holds: bool) -> None:
        """Note a check and log it at once."""
        self.checks.append((what, found, holds))
        log.info("%s  %s: %s", "ok  " if holds else "FAIL", what, found)

    def add_all(self, problems: Iterable[Problem]) -> None:
        """Note problems of the plan; the name of each is the key that can mend it."""
        for problem in problems:
            self.add(problem.key, problem.text, holds=False)

    @property
    def failed(self) -> list[str]:
        """Names of what does not hold."""
        return [what for what, _, holds in self.checks if not holds]
