"""The journal of decisions: nothing that was acknowledged is lost, and one process writes."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from stages.core.errors import UserError
from stages.core.execution.disk import DiskError
from stages.core.pages import journal as module
from stages.core.pages.journal import Journal, read_journal, standing

WRITER = """
import sys
from pathlib import Path
from stages.core.pages.journal import Journal

with Journal(Path(sys.argv[1])) as journal:
    print("open", flush=True)
    for number in range(10**6):
        journal.append({"number": number, "text": "x" * (number % 700)})
        print(number, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.jsonl"


def write(path: Path, *entries: dict[str, object]) -> None:
    with Journal(path) as journal:
        for entry in entries:
            journal.append(entry)


def start_writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )


def test_entries_come_back_in_their_order_with_any_text(path: Path) -> None:
    texts = ["plain", "two\nlines", "\u2028 \x00 \x1b[31m", "\ud800", "é 漢字 🎨", '"quoted"']
    write(path, *({"text": text} for text in texts))
    assert [entry["text"] for entry in read_journal(path)] == texts
    with Journal(path) as journal:
        assert [entry["text"] for entry in journal.entries()] == texts
        assert journal.append({"text": "next"}) == len(texts)
    assert path.read_bytes().count(b"\n") == len(texts) + 1


def test_an_entry_is_synced_before_append_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    with Journal(path) as journal:
        real = os.fsync
        monkeypatch.setattr(
            module.os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), real(file))
        )
        for number in range(3):
            journal.append({"number": number})
            assert synced[-1] == path.stat().st_size
    assert len(synced) == 3


def test_an_undo_is_an_entry_and_what_it_takes_back_stays_in_the_file(path: Path) -> None:
    with Journal(path) as journal:
        first = journal.append({"answer": "left"})
        second = journal.append({"answer": "right"})
        journal.undo(second, labeller="ann")
        third = journal.append({"answer": "tie"})
        assert list(standing(journal.entries())) == [first, third]
    entries = read_journal(path)
    assert entries[1] == {"answer": "right"}
    assert entries[2] == {"undoes": second, "labeller": "ann"}


@pytest.mark.parametrize("torn", [b"{", b'{"answer": "le', b"\x00" * 40, b'{"a": "\xc3'])
def test_a_torn_last_line_is_cut_off_and_the_next_entry_follows_the_whole_ones(
    path: Path, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, {"number": 0}, {"number": 1})
    with path.open("ab") as file:
        file.write(torn)
    assert read_journal(path) == [{"number": 0}, {"number": 1}]
    write(path, {"number": 2})
    assert read_journal(path) == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert str(path) in caplog.text


def test_a_whole_last_line_that_only_lacks_its_newline_is_kept(path: Path) -> None:
    path.write_text('{"number": 0}\n{"number": 1}')
    write(path, {"number": 2})
    assert [entry["number"] for entry in read_journal(path)] == [0, 1, 2]


@pytest.mark.parametrize("line", [b"not JSON\n", b"[1]\n", b"\n", b"\xff\n"])
def test_damage_before_the_last_line_is_refused_with_its_line_and_stays(
    path: Path, line: bytes
) -> None:
    write(path, {"number": 0})
    damaged = path.read_bytes() + line + b'{"number": 1}\n'
    path.write_bytes(damaged)
    for reading in (lambda: read_journal(path), lambda: write(path)):
        with pytest.raises(UserError, match=rf"{path}, line 2: found .* expected a JSON object"):
            reading()
    assert path.read_bytes() == damaged


def test_a_journal_that_is_not_there_is_said(path: Path) -> None:
    with pytest.raises(UserError, match=f"{path} does not exist"):
        read_journal(path)


def test_a_second_opener_is_refused_by_the_firsts_process_id(path: Path) -> None:
    writer = start_writer(path)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=rf"another server, process {writer.pid}\b"):
            write(path)
    finally:
        writer.kill()
        writer.communicate()
    write(path, {"free": True})


def test_entries_of_several_threads_do_not_mix(path: Path) -> None:
    with Journal(path) as journal:
        threads = [
            Thread(target=lambda who=who: [journal.append({"who": who}) for _ in range(20)])
            for who in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(journal.entries()) == 100
    assert sorted(entry["who"] for entry in read_journal(path)) == sorted(list(range(5)) * 20)


def test_an_entry_that_the_disk_does_not_take_leaves_the_journal_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path) as journal:
        journal.append({"number": 0})
        with monkeypatch.context() as patched:
            patched.setattr(module.os, "fsync", full)
            with pytest.raises(DiskError, match="the disk is full"):
                journal.append({"number": 1})
        assert journal.entries() == [{"number": 0}]
        journal.append({"number": 2})
    assert read_journal(path) == [{"number": 0}, {"number": 2}]


def test_nan_is_refused_because_no_json_has_it(path: Path) -> None:
    with Journal(path) as journal, pytest.raises(ValueError, match="JSON"):
        journal.append({"number": float("nan")})


def kill_and_count(path: Path, rng: random.Random) -> None:
    """Start a writer, kill it at a random moment; what it acknowledged must be there."""
    before = len(read_journal(path)) if path.exists() else 0
    writer = start_writer(path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "open\n"
    time.sleep(rng.uniform(0, 0.15))
    writer.kill()
    said, _ = writer.communicate()
    whole = said.split("\n")[:-1]
    acknowledged = int(whole[-1]) + 1 if whole else 0
    found = read_journal(path)[before:]
    assert len(found) - acknowledged in (0, 1)
    assert [entry["number"] for entry in found] == list(range(len(found)))


def test_killed_at_any_moment_no_acknowledged_entry_is_lost(path: Path) -> None:
    rng = random.Random(0)
    for _ in range(5):
        kill_and_count(path, rng)
    assert json.loads(path.read_bytes().split(b"\n")[0])["number"] == 0


@pytest.mark.slow
def test_killed_at_any_of_a_hundred_moments(path: Path) -> None:
    rng = random.Random(1)
    for _ in range(100):
        kill_and_count(path, rng)
