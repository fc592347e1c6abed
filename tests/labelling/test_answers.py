"""What is said of answers, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.core.labelling.answers import read_answers
from stages.core.labelling.measures import Agreement, agreement, first_share, seconds_per_pair
from tests.labelling.builders import answer


def test_alpha_of_krippendorffs_own_example_of_two_observers() -> None:
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), A: alpha = 1 - 19 * 4 / (14 * 6).
    ann, bob = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    answers = [
        answer(f"pair{number}", labeller, "right" if value else "left")
        for labeller, values in (("ann", ann), ("bob", bob))
        for number, value in enumerate(values)
    ]
    found = agreement(answers)
    assert (found.num_pairs, found.num_labellers) == (10, 2)
    assert found.raw == pytest.approx(0.6)
    assert found.alpha == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_alpha_with_three_labellers_ties_and_pairs_that_only_one_has_judged() -> None:
    # Pair 1: first, first, first. Pair 2: first, tie. Coincidences: first with first 3, first with tie 1
    # and 1; n = 5, of which first 4. Observed 2/5, expected 2 * 4 * 1 / (5 * 4) = 2/5: alpha is 0.
    answers = [
        answer("one", "ann", "left"), answer("one", "bob", "right", is_turned=True),
        answer("one", "eve", "left"),
        answer("two", "ann", "left"), answer("two", "bob", "both_bad"),
        answer("three", "eve", "tie"),
        answer("four", "ann", "left"), answer("four", "bob", "skip"),
    ]  # fmt: skip
    found = agreement(answers)
    assert (found.num_pairs, found.num_labellers) == (2, 3)
    assert found.raw == pytest.approx(3 / 4)
    assert found.alpha == pytest.approx(0)


def test_a_verdict_is_about_the_image_and_not_about_its_side() -> None:
    answers = [
        answer(f"pair{n}", who, side, is_turned=turned)
        for n, sides in enumerate((("left", "right"), ("right", "left"), ("tie", "both_bad")))
        for who, side, turned in (("ann", sides[0], False), ("bob", sides[1], True))
    ]
    assert agreement(answers) == Agreement(num_pairs=3, num_labellers=2, raw=1.0, alpha=1.0)


def test_alpha_has_no_value_where_all_verdicts_are_alike_and_nothing_has_without_answers() -> None:
    alike = [answer("one", who, "left") for who in ("ann", "bob")]
    assert agreement(alike) == Agreement(num_pairs=1, num_labellers=2, raw=1.0, alpha=None)
    assert agreement([]) == Agreement(num_pairs=0, num_labellers=0, raw=None, alpha=None)
    assert agreement(alike[:1]).raw is None


def test_the_share_of_left_choices_has_wilsons_interval_and_counts_no_ties() -> None:
    choices = ["left"] * 8 + ["right"] * 2 + ["tie", "both_bad", "skip"]
    found = first_share(answer(f"pair{n}", "ann", choice) for n, choice in enumerate(choices))
    assert found is not None
    # Wilson, 8 of 10: (0.8 + 0.19207) / 1.38415 -+ 1.95996 * sqrt(0.016 + 0.0096036) / 1.38415
    assert (found.num_choices, found.share) == (10, 0.8)
    assert (found.low, found.high) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    assert not found.is_biased
    more = first_share(answer(f"pair{n}", "ann", "left") for n in range(10))
    assert more is not None
    assert more.is_biased
    assert first_share([answer("pair", "ann", "tie")]) is None


def test_the_pace_leaves_breaks_out_and_needs_four_answers() -> None:
    times = [0, 2, 6, 9, 1000, 1003]
    answers = [answer(f"pair{n}", "ann", "left", seconds=at) for n, at in enumerate(times)]
    assert seconds_per_pair(answers) == pytest.approx((2 + 4 + 3 + 3) / 4)
    assert seconds_per_pair(reversed(answers)) == pytest.approx(3)
    assert seconds_per_pair(answers[:3]) is None


def test_an_answer_comes_back_from_its_entry() -> None:
    given = answer("one", "ann é", "both_bad", seconds=1.5)
    entries = [given.to_entry(), answer("two", "bob", "left").to_entry(), {"undoes": 1}]
    assert read_answers(Path("answers.jsonl"), entries) == {0: given}


@pytest.mark.parametrize(
    ("change", "said"),
    [({"answer": "middle"}, "'middle'; expected left, right"), ({"at": "soon"}, "soon"),
     ({"left": "a.png"}, "TypeError"), ({"pair": ...}, "KeyError")],
)  # fmt: skip
def test_an_entry_that_is_no_answer_is_refused_with_its_line(
    change: dict[str, object], said: str
) -> None:
    entry = {**answer("one", "ann", "left").to_entry(), **change}
    entry = {key: value for key, value in entry.items() if value is not ...}
    whole = answer("two", "ann", "left").to_entry()
    with pytest.raises(UserError, match=r"a/answers.jsonl, line 2 is no answer") as refused:
        read_answers(Path("a/answers.jsonl"), [whole, entry])
    assert said in str(refused.value)
