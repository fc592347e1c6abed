"""How work is spread over shards, and how a stage ends."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.core.execution.runtime import in_time, run_stage, work_of
from stages.core.policies.generation import shard_of


def test_shards_take_whole_batches_in_turn() -> None:
    items = list(range(7))
    assert shard_of(items, 0, 2, 2) == [0, 1, 4, 5]
    assert shard_of(items, 1, 2, 2) == [2, 3, 6]
    assert shard_of(items, 0, 1, 2) == items
    assert shard_of(items, 4, 5, 2) == []


@pytest.mark.parametrize("shard", [-1, 2])
def test_a_shard_that_is_none_is_refused(shard: int) -> None:
    with pytest.raises(UserError, match=f"--shard must be between 0 and 1, found {shard}"):
        shard_of([1, 2, 3], shard, 2, 1)


def test_a_file_that_may_not_be_read_ends_a_stage_with_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.raises(SystemExit) as stopped:
        run_stage(main, Path("data/pairs.parquet"))
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "error: data/pairs.parquet: this user may not read or write it" in said


@dataclass
class Some:
    """Arguments of some stage."""

    iteration: int | None = None
    policy: str | None = None
    metric: str | None = None
    output: Path = Path("a/table.parquet")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (Some(iteration=1, output=Path("iter01/candidates/shard-3.parquet")), "iter01 shard 3"),
        (
            Some(policy="results/r/iter02/policy", output=Path("x/shard-0.parquet")),
            "iter02 shard 0",
        ),
        (Some(policy="base"), "base"),
        (Some(metric="pickscore"), "pickscore"),
        (Some(), ""),
        (Path("no arguments at all"), ""),
    ],
)
def test_a_stage_says_whose_its_lines_are(args: object, words: str) -> None:
    assert work_of(args) == words


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99.0, "99 s"), (600.0, "10 min"), (7200.0, "2.0 h")]
)
def test_time_left_is_in_the_unit_that_one_would_say_it_in(seconds: float, text: str) -> None:
    assert in_time(seconds) == text
