"""The paper's tables as the repository has them: how many numbers, and some of them by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from stages.core.evaluation.paper import Column, PaperRow, read_paper_tables


def find(table: int, model: str, method: str) -> PaperRow:
    (row,) = [
        row
        for row in read_paper_tables()
        if (row.table, row.model, row.method) == (table, model, method)
    ]
    return row


def test_every_table_has_its_rows_and_numbers() -> None:
    rows = read_paper_tables()
    assert Counter(row.table for row in rows) == {1: 13, 2: 5, 3: 5, 4: 4, 5: 4, 6: 5}
    numbers = Counter[int]()
    for row in rows:
        numbers[row.table] += len(row.values)
    assert numbers == {1: 13 * 8, 2: 5 * 4, 3: 5 * 8, 4: 4 * 3, 5: 4 * 3, 6: 5 * 3}
    assert Counter(row.model for row in rows) == {"sd15": 30, "sdxl": 6}


@pytest.mark.parametrize(
    ("table", "model", "method", "column", "value"),
    [
        (1, "sd15", "base", Column("pickapic", "imagereward"), -0.0130),
        (1, "sd15", "SAIL (Iter3)", Column("hpsv2", "hpsv2", "photo"), 27.79),
        (1, "sdxl", "MaPO", Column("pickapic", "aesthetics"), 6.16),
        (1, "sdxl", "SAIL (Iter2)", Column("pickapic", "pickscore"), 22.51),
        (2, "sd15", "SAIL (Iter3)", Column("partiprompts", "hpsv2"), 27.26),
        (3, "sd15", "SAIL* (Iter2)", Column("hpsv2", "hpsv2", "anime"), 28.08),
        (4, "sd15", "OnlineDPO-Aes (Iter1)", Column("pickapic", "aesthetics"), 5.53),
        (5, "sd15", "SAIL (Iter1), random", Column("pickapic", "hpsv2"), 26.40),
        (6, "sd15", "SAIL (Iter2), without mixup", Column("pickapic", "imagereward"), 0.1564),
    ],
)
def test_numbers_are_the_papers(
    table: int, model: str, method: str, column: Column, value: float
) -> None:
    assert find(table, model, method).values[column] == value


def test_table_2_is_numbered_by_iteration_and_keeps_its_printed_labels() -> None:
    rows = [row for row in read_paper_tables() if row.table == 2]
    assert [row.policy for row in rows] == ["base", "iter00", "iter01", "iter02", "iter03"]
    assert [row.printed_as for row in rows] == [
        "",
        "",
        "SAIL (Iter2)",
        "SAIL (Iter3)",
        "SAIL (Iter4)",
    ]


def test_the_gains_that_table_1_prints_are_those_of_its_rows() -> None:
    """The last line of each half, which the file leaves out."""
    gains = {
        ("sd15", "SAIL (Iter3)"): [0.65, 0.51, 0.63, 0.38, 0.38, 0.2459, 0.11, 0.54],
        ("sdxl", "SAIL (Iter2)"): [0.71, 0.63, 0.56, 0.59, 0.38, 0.2953, 0.12, 0.52],
    }
    for (model, method), expected in gains.items():
        base, last = find(1, model, "base").values, find(1, model, method).values
        assert [last[c] - base[c] for c in base] == pytest.approx(expected, abs=1e-9)


def test_the_base_is_the_same_in_every_table_of_a_prompt_set() -> None:
    bases = [r for r in read_paper_tables() if r.policy == "base" and r.model == "sd15"]
    whole = find(1, "sd15", "base").values
    for row in bases:
        if row.table != 2:
            assert all(whole[column] == value for column, value in row.values.items())
