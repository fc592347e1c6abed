"""Look-alikes: the hash by hand, and every near pair found."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from stages.core.data.near_duplicates import difference_hash, distance, has_near


def test_the_hash_says_where_it_becomes_brighter_to_the_right() -> None:
    grey = np.zeros((8, 9), np.uint8)
    grey[0] = [0, 10, 20, 15, 15, 16, 0, 1, 2]  # brighter: 1 1 0 0 1 0 1 1
    grey[7] = range(9)
    assert difference_hash(Image.fromarray(grey)) == (0b11001011 << 56) | 0xFF


def test_a_larger_and_recompressed_image_has_nearly_the_same_hash_and_another_has_not() -> None:
    rng = np.random.default_rng(0)
    first, other = (
        Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize(
            (256, 256), Image.Resampling.BICUBIC
        )
        for _ in range(2)
    )
    small = first.resize((128, 128))
    hashes = np.array([difference_hash(image) for image in (first, small, other)], np.uint64)
    assert distance(hashes[:1], hashes[1:2])[0] <= 3
    assert distance(hashes[:1], hashes[2:])[0] > 10


@pytest.mark.parametrize("seed", range(4))
def test_all_near_pairs_of_two_groups_are_found_and_no_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, 300).astype(np.uint64)
    for row in range(0, 150, 2):  # neighbours at a distance of 0 to 5
        bits = rng.choice(64, size=row // 2 % 6, replace=False)
        hashes[row + 1] = hashes[row] ^ np.bitwise_or.reduce(
            np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0)
        )
    groups = rng.integers(0, 3, 300)
    expected = [
        any(
            groups[i] != groups[j] and bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= 3
            for j in range(300)
        )
        for i in range(300)
    ]
    assert has_near(hashes, groups).tolist() == expected
    assert 0 < sum(expected) < 300


def test_many_equal_hashes_are_compared_in_parts() -> None:
    hashes = np.full(1500, 7, np.uint64)
    assert has_near(hashes, np.arange(1500)).all()
    assert not has_near(hashes, np.zeros(1500, np.int64)).any()
    assert not has_near(hashes[:0], np.zeros(0, np.int64)).any()
