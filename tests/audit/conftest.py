"""A small run, and the audit of it behind a test client that has the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from stages.core.audit.app import audit_app
from stages.core.audit.desk import Desk, journal_of
from stages.core.audit.index import RunIndex
from stages.core.pages.journal import Journal
from tests.audit.runs import write_run

HERE = "http://127.0.0.1:8765"


@contextmanager
def auditing(run: Path) -> Iterator[TestClient]:
    """A client of a run's audit, as between start and exit of the stage."""
    with ExitStack() as opened:
        desk = Desk(run, opened.enter_context(Journal(journal_of(run))))
        desk.compact()
        app = audit_app(RunIndex(run), desk, "a-token")
        client = TestClient(app, base_url=HERE, headers={"origin": HERE})
        client.get("/", params={"token": "a-token"})
        opened.callback(desk.compact)
        yield client


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "results" / "small")


@pytest.fixture
def client(run: Path) -> Iterator[TestClient]:
    with auditing(run) as found:
        yield found
