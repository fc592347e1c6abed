"""Rows that are put on disk come back in any order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stages.core.artifacts.schemas import CANDIDATES
from stages.core.artifacts.spools import RowSpool
from stages.core.execution.disk import DiskError
from tests.builders import image_value
from tests.small_disks import mounted


def rows(first: int, count: int) -> pa.Table:
    """Candidates with images and latents of different lengths."""
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": f"p{number}",
                "prompt": "a" * number,
                "candidate": number,
                "seed": number,
                "image": image_value(bytes([number]) * number),
                "latents": [0.5 * number] * number,
            }
            for number in range(first, first + count)
        ],
        schema=CANDIDATES.arrow,
    )


def test_rows_come_back_as_they_were_in_any_order(tmp_path: Path) -> None:
    one, other = rows(1, 5), pa.concat_tables([rows(6, 2), rows(8, 3)])
    with RowSpool(tmp_path) as spool:
        assert list(spool.add(one)) == [0, 1, 2, 3, 4]
        assert list(spool.add(other.slice(1, 3))) == [5, 6, 7]
        expected = [*one.to_pylist(), *other.slice(1, 3).to_pylist()]
        for number in (7, 0, 3, 3, 5):
            assert spool.read(number) == expected[number]
        assert not list(tmp_path.iterdir())


def test_what_is_added_takes_its_own_size_and_no_more(tmp_path: Path) -> None:
    table = pa.table({"data": pa.array([b"x" * 100_000] * 50)})
    with RowSpool(tmp_path) as spool:
        for start in range(0, 50, 10):
            spool.add(table.slice(start, 10))
        spool.read(0)
        spool._file.seek(0, 2)
        assert spool._file.tell() == pytest.approx(5_000_000, rel=0.02)


def test_no_rows_are_no_file(tmp_path: Path) -> None:
    with RowSpool(tmp_path) as spool:
        assert list(spool.add(rows(1, 0))) == []


def test_a_disk_that_fills_is_named_and_nothing_stays(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(2**20)
    with mounted(tmp_path, size="1m"):
        with (
            pytest.raises(DiskError, match=f"^{tmp_path}/rows.spool .* the disk is full"),
            RowSpool(tmp_path) as spool,
        ):
            spool.add(pa.table({"data": [data[:1000]]}))
            spool.add(pa.table({"data": [data]}))
        assert not list(tmp_path.iterdir())
