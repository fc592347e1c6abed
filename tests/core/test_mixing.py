"""Mixup: the share of human pairs, and drawing them without replacement."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.method.mixing import choose_without_replacement, num_human_pairs


def test_a_quarter_of_a_mix_with_300_generated_pairs_is_100_human_ones() -> None:
    assert num_human_pairs(300, 0.25) == 100


@pytest.mark.parametrize("seed_fraction", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("num_generated", [1, 2, 7, 100, 999, 10_000])
def test_human_share_is_the_nearest_that_whole_pairs_allow(
    num_generated: int, seed_fraction: float
) -> None:
    found = num_human_pairs(num_generated, seed_fraction)
    exact = seed_fraction * num_generated / (1 - seed_fraction)
    assert abs(found - exact) <= 0.5 + 1e-9
    assert abs(found / (found + num_generated) - seed_fraction) <= 0.5 / num_generated


def test_no_human_pairs_at_fraction_0() -> None:
    assert num_human_pairs(12_345, 0.0) == 0


@pytest.mark.parametrize("seed_fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fractions_that_leave_no_generated_pairs_are_refused(seed_fraction: float) -> None:
    with pytest.raises(ValueError, match=str(seed_fraction)):
        num_human_pairs(10, seed_fraction)


@pytest.mark.parametrize(("available", "wanted"), [(100, 30), (100, 100), (5, 0), (1, 1)])
def test_chosen_rows_are_as_many_as_wanted_in_range_and_never_twice(
    available: int, wanted: int
) -> None:
    for seed in range(20):
        chosen = choose_without_replacement(available, wanted, seed)
        assert len(chosen) == len(set(chosen.tolist())) == wanted
        assert (np.diff(chosen) > 0).all()
        assert all(0 <= row < available for row in chosen)


def test_every_row_is_chosen_when_more_are_wanted_than_there_are() -> None:
    assert choose_without_replacement(5, 9, seed=1).tolist() == [0, 1, 2, 3, 4]


def test_a_seed_decides_the_choice_and_every_row_has_the_same_chance() -> None:
    assert (choose_without_replacement(50, 9, 3) == choose_without_replacement(50, 9, 3)).all()
    counts = np.zeros(10)
    for seed in range(2000):
        counts[choose_without_replacement(10, 3, seed)] += 1
    assert (np.abs(counts - 600) < 100).all()  # a binomial deviation is 20.5


def test_rows_that_are_left_out_make_room_and_leave_the_others_alone() -> None:
    before = choose_without_replacement(20, 8, seed=3).tolist()
    gone = before[2:4]
    after = choose_without_replacement(20, 8, seed=3, left_out=gone).tolist()
    assert len(after) == 8
    assert set(before) - set(after) == set(gone)
    assert choose_without_replacement(20, 30, seed=3, left_out=gone).tolist() == [
        row for row in range(20) if row not in gone
    ]
