"""The implicit reward and its standard errors against hand numbers; the probability's properties."""

from __future__ import annotations

import itertools
import math

import jaxtyping
import numpy as np
import pytest

from stages.core.method.rewards import (
    implicit_reward,
    margin_standard_error,
    preference_probability,
    share_moved,
)

POLICY = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]], np.float32)
REFERENCE = np.array([[2.0, 4.0, 6.0], [4.0, 5.0, 3.0]], np.float32)
# gains: [1, 2, 3] and [0, 1, -1]


def test_reward_is_exactly_0_where_errors_are_equal() -> None:
    errors = np.random.default_rng(0).random((5, 10)).astype(np.float32)
    result = implicit_reward(policy_errors=errors, reference_errors=errors.copy())
    assert (result.reward == 0).all()
    assert (result.standard_error == 0).all()


def test_reward_and_standard_error_of_hand_numbers() -> None:
    result = implicit_reward(policy_errors=POLICY, reference_errors=REFERENCE)
    assert result.reward.tolist() == [2.0, 0.0]
    # both rows of gains have standard deviation 1 over three draws
    np.testing.assert_allclose(result.standard_error, [1 / math.sqrt(3)] * 2, rtol=1e-15)


def test_weighted_reward_and_standard_error_of_hand_numbers() -> None:
    weights = np.array([1.0, 2.0, 5.0])
    result = implicit_reward(policy_errors=POLICY, reference_errors=REFERENCE, weights=weights)
    # (1 + 2 x 2 + 5 x 3) / 8, and (0 + 2 - 5) / 8
    assert result.reward.tolist() == [2.5, -0.375]
    # weighted deviations -1.5, -1, 2.5: squares 9.5; and 0.375, 2.75, -3.125: squares 17.46875
    expected = [math.sqrt(squares * 3 / 2) / 8 for squares in (9.5, 17.46875)]
    np.testing.assert_allclose(result.standard_error, expected, rtol=1e-12)


def test_margin_standard_error_of_hand_numbers_keeps_what_draws_share() -> None:
    found = margin_standard_error(policy_errors=POLICY, reference_errors=REFERENCE, best=0, worst=1)
    # differences 1, 1, 4: mean 2, squared deviations 1 + 1 + 4 over 2 = 3
    assert found == pytest.approx(math.sqrt(3 / 3), rel=1e-15)


def test_margin_standard_error_is_0_when_draws_move_both_images_alike() -> None:
    shared = np.array([[1.0, 5.0, 9.0], [0.0, 4.0, 8.0]])
    zero = np.zeros_like(shared)
    assert margin_standard_error(
        policy_errors=zero, reference_errors=shared, best=0, worst=1
    ) == pytest.approx(0, abs=1e-15)


def test_one_draw_has_no_standard_error() -> None:
    result = implicit_reward(policy_errors=POLICY[:, :1], reference_errors=REFERENCE[:, :1])
    assert result.reward.tolist() == [1.0, 0.0]
    assert np.isnan(result.standard_error).all()
    assert math.isnan(
        margin_standard_error(
            policy_errors=POLICY[:, :1], reference_errors=REFERENCE[:, :1], best=0, worst=1
        )
    )


def test_errors_of_different_images_are_refused_by_the_signature() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        implicit_reward(policy_errors=POLICY, reference_errors=REFERENCE[:1])


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_of_different_images_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 3\)"):
        implicit_reward(policy_errors=POLICY, reference_errors=REFERENCE[:1])


def test_probability_is_one_half_at_0_and_a_hand_number() -> None:
    assert preference_probability(0.0, 5000.0) == 0.5
    assert preference_probability(2 * math.log(3) / 5000, 5000.0) == pytest.approx(0.75, rel=1e-12)


def test_probability_rises_and_its_two_sides_add_up_to_1() -> None:
    margins = np.linspace(-0.01, 0.01, 41)
    values = [preference_probability(float(margin), 5000.0) for margin in margins]
    assert all(low < high for low, high in itertools.pairwise(values))
    np.testing.assert_allclose(np.array(values) + np.array(values[::-1]), 1, rtol=1e-12)


def test_probability_of_huge_margins_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert preference_probability(1e6, 5000.0) == 1.0
        assert preference_probability(-1e6, 5000.0) == 0.0


def test_share_moved_of_hand_numbers_counts_only_what_ranks() -> None:
    exact = np.array([[1.0, 3.0], [0.0, 2.0]])  # each spread is 1
    assert share_moved(exact + np.array([[5.0], [-7.0]]), exact) == 0
    assert share_moved(np.array([[1.0, 3.4], [0.0, 2.0]]), exact) == pytest.approx(0.2 / np.sqrt(2))
    assert share_moved(np.zeros((1, 2)), np.zeros((1, 2))) == 0
