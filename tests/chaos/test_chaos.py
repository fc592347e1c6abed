"""The chaos harness's short versions: eight aimed kills, or 25 at random, and not a bit is lost."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos.contents import contents, differences
from tests.chaos.harness import AIMS, KINDS, Harness


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_of_each_kind_in_each_kind_of_stage_loses_nothing(tmp_path: Path) -> None:
    tally = Harness(tmp_path, seed=1, mean_seconds=4.0, aims=AIMS).run(len(AIMS))
    assert [kill["kind"] for kill in tally.kills] == [aim.kind for aim in AIMS]
    assert {aim.kind for aim in AIMS} == set(KINDS)
    for kill, aim in zip(tally.kills, AIMS, strict=True):
        if kill["kind"] == "stage":
            assert kill["stages"] == [aim.stage]
    assert tally.resumed >= 1
    assert tally.completed >= 1
    assert tally.files > 50
    assert tally.losses == []


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_25_kills_at_random_lose_nothing(tmp_path: Path) -> None:
    tally = Harness(tmp_path, seed=1, mean_seconds=4.0).run(25)
    assert len(tally.kills) == 25
    assert {kill["kind"] for kill in tally.kills} == set(KINDS)
    assert tally.completed >= 1
    assert tally.files > 50
    assert tally.losses == []


def test_every_difference_between_two_runs_is_seen_and_wall_times_are_none(tmp_path: Path) -> None:
    def run(name: str, speed: float, loss: float, page: str) -> dict[str, str]:
        folder = tmp_path / name
        (folder / "iter00").mkdir(parents=True)
        rows = pa.table({"loss": [loss], "pairs_per_second": [speed]})
        pq.write_table(rows, folder / "iter00" / "training.parquet")
        (folder / "report.html").write_text(page)
        return contents(folder)

    unbroken = run("unbroken", 1.0, 0.5, "page")
    assert differences(unbroken, run("faster", 2.0, 0.5, "page")) == []
    assert differences(unbroken, run("other", 1.0, 0.25, "pag?")) == [
        "iter00/training.parquet differs", "report.html differs",
    ]  # fmt: skip
    assert differences(unbroken, {}) == [
        "iter00/training.parquet is missing", "report.html is missing",
    ]  # fmt: skip
    assert differences({}, unbroken)[1] == "report.html should not be there"
