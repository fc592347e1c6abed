"""A table that is made batch by batch: what one process finished, the next does not do again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages.core.artifacts import kept_rows
from stages.core.artifacts.kept_rows import Batch, KeptRows, write_batches
from stages.core.artifacts.schemas import METRIC_SCORES
from stages.core.execution.stopping import Stopped

NUM_BATCHES = 7


class Work:
    """Batches of three rows, which can end early as a process does."""

    def __init__(self, ends_at: int | None = None, by: BaseException | None = None) -> None:
        self.ends_at, self.by = ends_at, by
        self.made: list[int] = []

    def batches(self, first: int) -> Iterator[Batch]:
        for number in range(first, NUM_BATCHES):
            if number == self.ends_at:
                assert self.by is not None
                raise self.by
            self.made.append(number)
            yield [
                {"prompt_id": f"p{number}", "candidate": i, "metric": "m", "score": number + i / 7}
                for i in range(3)
            ]


def write(path: Path, work: Work, arguments: object = "a") -> int:
    return write_batches(
        path, work.batches, METRIC_SCORES, stage="score_metric", arguments={"all": arguments}
    )


def kept(path: Path) -> list[Path]:
    return sorted(path.parent.glob(".*/*/*.parquet"))


@pytest.fixture
def unbroken(tmp_path: Path) -> bytes:
    path = tmp_path / "unbroken" / "t.parquet"
    assert write(path, Work()) == 3 * NUM_BATCHES
    assert not kept(path)
    return path.read_bytes()


@pytest.mark.parametrize("by", [KeyboardInterrupt(), Stopped("so"), RuntimeError("out of memory")])
@pytest.mark.parametrize("ends_at", [0, 1, 5])
def test_however_a_process_ends_the_next_goes_on_and_the_file_is_the_same(
    tmp_path: Path, unbroken: bytes, by: BaseException, ends_at: int
) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(type(by)):
        write(path, Work(ends_at, by))
    assert not path.exists()
    work = Work()
    write(path, work)
    assert work.made == list(range(ends_at, NUM_BATCHES))
    assert path.read_bytes() == unbroken
    assert sorted(each.name for each in tmp_path.iterdir()) == ["t.parquet", "unbroken"]


def test_a_process_may_end_many_times(tmp_path: Path, unbroken: bytes) -> None:
    path = tmp_path / "t.parquet"
    for ends_at in (2, 2, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            write(path, Work(ends_at, KeyboardInterrupt()))
    work = Work()
    write(path, work)
    assert work.made == [6]
    assert path.read_bytes() == unbroken


def test_what_kill_9_leaves_is_what_was_kept_now_and_then(
    tmp_path: Path, unbroken: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.parquet"
    monkeypatch.setattr(kept_rows, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(KeptRows, "remove", lambda self: None)  # as if it were killed just before
    write(path, Work())
    assert len(kept(path)) == NUM_BATCHES
    path.unlink()
    monkeypatch.undo()
    work = Work()
    write(path, work)
    assert work.made == []
    assert path.read_bytes() == unbroken
    assert not kept(path)


def test_rows_that_something_else_made_are_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(KeyboardInterrupt):
        write(path, Work(5, KeyboardInterrupt()), arguments="other")
    assert len(kept(path)) == 1
    work = Work()
    write(path, work)
    assert work.made == list(range(NUM_BATCHES))
    assert not kept(path)


def test_a_damaged_part_is_made_again_with_all_that_follows(
    tmp_path: Path, unbroken: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.parquet"
    monkeypatch.setattr(kept_rows, "KEEP_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        write(path, Work(5, KeyboardInterrupt()))
    monkeypatch.undo()
    damaged = kept(path)[2]
    content = bytearray(damaged.read_bytes())
    scores = pq.read_metadata(damaged).row_group(0).column(3)
    start = scores.dictionary_page_offset or scores.data_page_offset
    content[start + scores.total_compressed_size - 1] ^= 1
    damaged.write_bytes(content)
    work = Work()
    write(path, work)
    assert work.made == [2, 3, 4, 5, 6]
    assert path.read_bytes() == unbroken
