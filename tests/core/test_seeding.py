"""Seeds: distinct, type-sensitive, in range, and frozen, since every result hangs on them."""

from __future__ import annotations

from itertools import product

import pytest

from stages.core.method.seeding import seed_of


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        ((0,), 626511579),
        (("0",), 3339753906),
        ((1234, "generate_evaluation", "7f3a", 0), 3451861014),
        ((0, "sample_candidates", 1, "0123456789abcdef", 7), 2239204395),
        (("é",), 579745000),
    ],
)
def test_seed_of_these_parts_never_changes(parts: tuple[int | str, ...], frozen: int) -> None:
    assert seed_of(*parts) == frozen


def test_different_parts_have_different_seeds_in_32_bits() -> None:
    parts = list(product((0, 1), ("sample", "score"), range(1, 4), ("a", "b", "ab"), range(8)))
    seeds = [seed_of(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_number_and_its_digits_and_the_order_and_the_cut_of_parts_all_count() -> None:
    seeds = [seed_of(1), seed_of("1"), seed_of(1, 2), seed_of(2, 1), seed_of(12), seed_of("1", "2")]
    assert len(set(seeds)) == len(seeds)
