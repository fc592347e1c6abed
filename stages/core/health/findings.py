"""What may be wrong with an installation, with the processes of a run, and with its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    """'ok', 'note' (worth knowing) or 'problem' (something will fail or be wrong)."""
    what: str
    """What was looked at and what was found."""
    remedy: str = ""
    """The command that puts it right; empty if there is nothing to do."""
