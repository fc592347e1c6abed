"""Decisions in the making: the journal that keeps every key, and the tables that are made of it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.core.artifacts.decisions import DECISIONS, NOTES, Subject, decisions_file, subject
from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import Schema
from stages.core.artifacts.tables import read_table, write_table
from stages.core.audit.index import identity
from stages.core.errors import UserError
from stages.core.pages.journal import Journal, standing

log = logging.getLogger(__name__)

Row = dict[str, Any]

KINDS = ("accept", "flip", "veto")
"""What may be said of a pair, one taking the place of another."""
APPLIED = ("flip", "veto")
"""Of these, what changes the mix."""
MAX_NOTE = 2000


def folder_of(run: Path) -> Path:
    """Where a run's decisions lie."""
    return run / "decisions"


def journal_of(run: Path) -> Path:
    """Where each key of an audit is kept."""
    return folder_of(run) / "journal.jsonl"


class Desk:
    """What has been decided so far. Several threads may ask and decide."""

    def __init__(self, run: Path, journal: Journal) -> None:
        self._run, self._journal = run, journal
        self._turn = threading.Lock()
        if not journal.entries():
            self._take_over()
        self._count()

    def of(self, about: Subject) -> str | None:
        """What holds of a prompt's two images: 'accept', 'flip', 'veto', or nothing yet."""
        entry = self._kinds.get(about)
        return entry["decision"] if entry else None

    def note_of(self, about: Subject) -> str:
        """What was written about them."""
        entry = self._notes.get(about)
        return str(entry["note"]) if entry else ""

    def by_identity(self, pair: Mapping[str, Any]) -> str | None:
        """As `of`, by what a pair is known by without its images."""
        return self._identities.get(identity(pair))

    def counts(self, iteration: int) -> Counter[str]:
        """How many decisions of each kind hold for an iteration, 0 for human pairs."""
        rows = self._kinds.values()
        return Counter(row["decision"] for row in rows if row["iteration"] == iteration)

    def decide(
        self, pair: Mapping[str, Any], winner: str, loser: str, kind: str, note: str = ""
    ) -> None:
        """Keep a decision or a note about a pair, whose images have these digests; on the disk on return.

        UserError for a kind that there is not, or a note that is too long.
        """
        if kind not in (*KINDS, "note"):
            raise UserError(f"found decision {kind!r}, expected one of {', '.join(KINDS)} or note")
        if len(note) > MAX_NOTE:
            raise UserError(f"the note has {len(note)} characters, at most {MAX_NOTE} are kept")
        names = ("pair_id", "iteration", "prompt_id", "prompt", "policy_digest", "winner_seed",
                 "loser_seed", "source_file", "source_row")  # fmt: skip
        entry: Row = {name: pair[name] for name in names}
        entry |= {"winner_digest": winner, "loser_digest": loser, "was_blind": False,
                  "decision": kind, "decided_at": now()}  # fmt: skip
        if kind == "note":
            entry["note"] = note
        with self._turn:
            self._journal.append(entry)
            self._add(entry)

    def undo(self) -> Row | None:
        """Take back the last decision or note that holds; what it was, None where there is none."""
        with self._turn:
            holding = standing(self._journal.entries())
            if not holding:
                return None
            last = max(holding)
            self._journal.undo(last, decided_at=now())
            self._count()
            return holding[last]

    def compact(self) -> list[Path]:
        """Write what holds into tables, those that say something else than before; these tables."""
        with self._turn:
            rows = [row for row in self._kinds.values() if row["decision"] in APPLIED]
            notes = [row for row in self._notes.values() if row["note"]]
        files = {decisions_file(self._run, row["iteration"]) for row in rows}
        files |= set(folder_of(self._run).glob("iter[0-9][0-9].parquet"))
        written = []
        for path in sorted(files):
            own = [row for row in rows if decisions_file(self._run, row["iteration"]) == path]
            if self._write(path, own, DECISIONS, "decision"):
                written.append(path)
        path = folder_of(self._run) / "notes.parquet"
        if (notes or path.exists()) and self._write(path, notes, NOTES, "note"):
            written.append(path)
        return written

    def _write(self, path: Path, rows: list[Row], schema: Schema, what: str) -> bool:
        """Write a table unless one stands there that says the same, whenever it was said."""

        def said(rows: list[Row]) -> set[tuple[str, ...]]:
            names = ("prompt_id", "winner_digest", "loser_digest", what)
            return {tuple(row[name] for name in names) for row in rows}

        try:
            if path.exists() and said(read_table(path, schema).to_pylist()) == said(rows):
                return False
        except ArtifactError as error:
            log.warning("audit: %s; it is written again from the journal", error)
        rows = sorted(rows, key=lambda row: (row["pair_id"], row["winner_digest"]))
        wanted = [{name: row[name] for name in schema.arrow.names} for row in rows]
        write_table(
            path, wanted, schema, stage="audit", arguments={"journal": journal_of(self._run)}
        )
        return True

    def _take_over(self) -> None:
        """Fill a journal that is new with what the tables say: they may have been copied without it."""
        for path in sorted(folder_of(self._run).glob("iter[0-9][0-9].parquet")):
            for row in read_table(path, DECISIONS).to_pylist():
                self._journal.append(row)
        path = folder_of(self._run) / "notes.parquet"
        lineage = ("policy_digest", "winner_seed", "loser_seed", "source_file", "source_row")
        for row in read_table(path, NOTES).to_pylist() if path.exists() else ():
            self._journal.append(
                {**dict.fromkeys(lineage), **row, "decision": "note", "was_blind": False}
            )

    def _count(self) -> None:
        self._kinds: dict[Subject, Row] = {}
        self._notes: dict[Subject, Row] = {}
        self._identities: dict[tuple[Any, ...], str] = {}
        for entry in standing(self._journal.entries()).values():
            self._add(entry)

    def _add(self, entry: Row) -> None:
        about = subject(entry["prompt_id"], entry["winner_digest"], entry["loser_digest"])
        if entry["decision"] == "note":
            self._notes[about] = entry
        else:
            self._kinds[about] = entry
            self._identities[identity(entry)] = entry["decision"]


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
