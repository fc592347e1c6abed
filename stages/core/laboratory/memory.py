"""Runs that were measured before, in a file of the repository: nobody makes them again.

A line of JSON for each: its config, what it measured, and by which commit and machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.laboratory.experiments import OF_NO_RESULT, Run
from stages.core.plan.configuration import merged, without_defaults

Config = dict[str, Any]
Measures = dict[str, dict[str, float]]
"""By policy and measure."""


@dataclass(frozen=True)
class Measured:
    """One run that has been made, on this machine or on another."""

    config: Config
    """All of it that has to do with results."""
    measures: Measures
    command: str | None
    commit: str | None
    machine: str | None
    run_seconds: float | None

    def is_of(self, run: Run) -> bool:
        """Whether the run would be this one.

        All keys that were known then must have the same value, and newer ones their default.
        """
        now = of_results(run.config)
        newer = without_defaults(_only(now, self.config))
        return merged(now, self.config) == now and not _says_something(newer)


def _only(config: Mapping[str, Any], known: Mapping[str, Any]) -> Config:
    """The keys of a config that another one lacks."""
    found: Config = {}
    for key, value in config.items():
        if key not in known:
            found[key] = value
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping):
            found |= {key: inner} if (inner := _only(value, known[key])) else {}
    return found


def _says_something(config: Mapping[str, Any]) -> bool:
    """Whether any block has a value."""
    return any(
        _says_something(value) if isinstance(value, Mapping) else True for value in config.values()
    )


def of_results(config: Config) -> Config:
    """The blocks of a config that may change a result; where policy 0 was adopted from is none."""
    kept = {key: value for key, value in config.items() if key not in OF_NO_RESULT}
    seed = {key: value for key, value in kept["train_seed"].items() if key != "policy"}
    return kept | {"train_seed": seed}


def read_memory(path: Path) -> list[Measured]:
    """The runs of a file; none where there is no file. UserError names a line that cannot be read."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(Measured(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is no measured run ({error}); take the line out, or the file "
                "from the repository"
            ) from error
    return found


def as_text(measured: Sequence[Measured]) -> str:
    """What `read_memory` reads."""
    return "".join(json.dumps(asdict(each), sort_keys=True) + "\n" for each in measured)


def found_in(memory: Sequence[Measured], run: Run) -> Measured | None:
    """The newest record of the run, if it was made before."""
    return next((each for each in reversed(memory) if each.is_of(run)), None)


def with_new(memory: Sequence[Measured], new: Mapping[str, tuple[Run, Measured]]) -> list[Measured]:
    """The memory and what was measured since, which takes the place of an older record of the same run."""
    runs = [run for run, _ in new.values()]
    kept = [each for each in memory if not any(each.is_of(run) for run in runs)]
    return [*kept, *(measured for _, measured in new.values())]
