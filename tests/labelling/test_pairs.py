"""Which pairs are drawn, in which order, and on which side: balanced, and the same at every start."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from scipy.stats import binomtest

from stages.core.labelling.pairs import Pair, choose_pairs, is_turn_of_common, order_of, pair_key
from stages.core.labelling.places import Place, PromptImages


def prompts(count: int, num_images: int) -> list[PromptImages]:
    return [
        PromptImages(
            f"prompt {number}",
            tuple(
                Place(f"{number}/{image}.png", Path(f"{number}/{image}.png"))
                for image in range(num_images)
            ),
        )
        for number in range(count)
    ]


def pairs(count: int = 400, num_images: int = 2, **how: float) -> list[Pair]:
    given = {"pairs_per_prompt": 1, "common_share": 0.1, "seed": 0, **how}
    return choose_pairs(prompts(count, num_images), **given)  # type: ignore[arg-type]


def test_each_image_stands_left_half_of_the_time_for_every_labeller() -> None:
    drawn = pairs(5000)
    turned = {
        labeller: [pair.sides(labeller)[0] == pair.second for pair in drawn]
        for labeller in ("ann", "bob", "é 漢字")
    }
    for sides in turned.values():
        assert binomtest(sum(sides), len(sides)).pvalue > 0.001
    for one, other in combinations(
        turned.values(), 2
    ):  # one labeller's sides do not tell another's
        equal = [a == b for a, b in zip(one, other, strict=True)]
        assert binomtest(sum(equal), len(equal)).pvalue > 0.001
    assert [pair.sides("ann") for pair in drawn] == [pair.sides("ann") for pair in pairs(5000)]


def test_a_pair_has_one_name_in_whatever_order() -> None:
    one, other = prompts(1, 2)[0].places
    assert pair_key("p", one, other) == pair_key("p", other, one)
    assert pair_key("p", one, other) != pair_key("q", one, other)


def test_all_prompts_have_one_pair_before_any_has_its_second_and_no_pair_comes_twice() -> None:
    drawn = pairs(20, 4, pairs_per_prompt=3)
    assert len({pair.key for pair in drawn}) == len(drawn) == 60
    for turn in range(3):
        assert len({pair.prompt for pair in drawn[20 * turn : 20 * (turn + 1)]}) == 20
    order = order_of(drawn, "ann")
    assert [pair.turn for pair in order] == sorted(pair.turn for pair in order)
    assert len(pairs(5, 3, pairs_per_prompt=100)) == 5 * 3


def test_pairs_are_drawn_evenly_of_a_prompts_images() -> None:
    drawn = pairs(1200, 3)
    counts = dict.fromkeys(combinations("012", 2), 0)
    for pair in drawn:
        counts[pair.first.name[-5], pair.second.name[-5]] += 1
    assert all(binomtest(count, 1200, 1 / 3).pvalue > 0.01 for count in counts.values())


def test_another_seed_draws_other_pairs_in_another_order() -> None:
    one, other = ([pair.key for pair in pairs(100, 4, seed=seed)] for seed in (0, 1))
    assert len(set(one) & set(other)) < 50
    two = [pair.key for pair in pairs(100, 2, seed=1)]
    assert two != [pair.key for pair in pairs(100, 2, seed=0)]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 40), (0.25, 100), (1.0, 400)])
def test_the_share_of_common_pairs(share: float, count: int) -> None:
    assert sum(pair.is_common for pair in pairs(common_share=share)) == count
    turns = [is_turn_of_common(number, share) for number in range(400)]
    assert sum(turns) == count
    if share == 0.1:
        assert [number for number, is_turn in enumerate(turns) if is_turn][:3] == [9, 19, 29]


def test_everybody_has_an_order_of_their_own_for_the_other_pairs() -> None:
    drawn = pairs(100)
    ann, bob = (order_of(drawn, labeller) for labeller in ("ann", "bob"))
    assert ann != bob
    assert {pair.key for pair in ann} == {pair.key for pair in bob}
    assert len(ann) == 90
