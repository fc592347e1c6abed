"""The list of mutants fits the tree; `python -m tests.mutants` puts them in."""

from __future__ import annotations

import pytest

from tests.mutants.lines import MUTANTS, Mutant


def test_every_line_that_is_to_be_changed_stands_in_its_file_once() -> None:
    assert len(MUTANTS) > 130
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert [problem for mutant in MUTANTS if (problem := mutant.problem())] == []


@pytest.mark.parametrize(("right", "times"), [("no such line at all", 0), ("import", 4)])
def test_a_line_that_is_not_there_once_is_told(right: str, times: int) -> None:
    assert (
        Mutant("method/mixing.py", right, "").problem().endswith(f"it stands there {times} times")
    )
