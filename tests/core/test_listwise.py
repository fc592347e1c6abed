"""RankDPO's loss by hand, against an implementation in plain floats, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stages.core.method.listwise import (
    lists_of,
    listwise_loss,
    rank_weights,
)
from stages.core.method.objective import LossSettings, PairErrors, dpo_loss
from stages.core.method.selection import folded, win_probabilities


def published(
    policy: list[float], reference: list[float], preference: list[float], beta: float
) -> float:
    """Eq. 5 to 7 of RankDPO, image by image, in Python's floats."""
    rank = [1 + sum(other > own for other in preference) for own in preference]
    total = 0.0
    for i, first in enumerate(preference):
        for j, second in enumerate(preference):
            if not first > second:
                continue
            gains = abs((2**first - 1) - (2**second - 1))
            discounts = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
            s_i, s_j = policy[i] - reference[i], policy[j] - reference[j]
            sigma = 1 / (1 + math.exp(beta * (s_i - s_j)))
            total -= gains * discounts * math.log(sigma)
    return total


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weights_of_three_images_by_hand() -> None:
    weights = rank_weights(tensor([1.0, 0.0, 0.5]))
    # ranks 1, 3, 2; gains 1, 0, sqrt 2 - 1; discounts 1/ln 2, 1/ln 4, 1/ln 3
    one, two, three = 1 / math.log(2), 1 / math.log(3), 1 / math.log(4)
    root = math.sqrt(2) - 1
    assert weights[0, 1].item() == pytest.approx(one - three, rel=1e-12)
    assert weights[0, 2].item() == pytest.approx((1 - root) * (one - two), rel=1e-12)
    assert weights[1, 2].item() == pytest.approx(root * (two - three), rel=1e-12)
    assert torch.equal(weights, weights.T)
    assert (weights.diagonal() == 0).all()


def test_loss_equals_the_published_formula_in_float64() -> None:
    rng = np.random.default_rng(4)
    for size in (2, 3, 8):
        policy, reference = (list(map(float, 0.1 + 1e-3 * rng.standard_normal(size))) for _ in "ab")
        preference = list(map(float, rng.random(size)))
        found = listwise_loss(tensor(policy), tensor(reference), tensor(preference), 5000.0)
        expected = published(policy, reference, preference, 2500.0)
        assert found.item() == pytest.approx(expected, rel=1e-10)


def test_a_list_of_two_is_the_dpo_loss_times_a_constant() -> None:
    policy, reference = tensor([0.5, 0.7]), tensor([0.6, 0.65])
    pair = PairErrors(policy[:1], policy[1:], reference[:1], reference[1:])
    settings = LossSettings(dpo_beta=10.0, label_smoothing=0.0, num_timesteps=1000)
    constant = 1 / math.log(2) - 1 / math.log(3)
    found = listwise_loss(policy, reference, tensor([1.0, 0.0]), 10.0).item()
    assert found == pytest.approx(constant * dpo_loss(pair, settings).item(), rel=1e-12)


def test_order_in_the_list_does_not_matter_and_equal_images_count_nothing() -> None:
    policy, reference = tensor([0.5, 0.7, 0.6]), tensor([0.6, 0.65, 0.6])
    preference, turned = tensor([0.9, 0.1, 0.5]), torch.tensor([2, 0, 1])
    found = listwise_loss(policy, reference, preference, 10.0).item()
    again = listwise_loss(policy[turned], reference[turned], preference[turned], 10.0).item()
    assert again == pytest.approx(found, rel=1e-12)
    assert listwise_loss(policy, reference, tensor([0.5, 0.5, 0.5]), 10.0).item() == 0.0


def test_the_gradient_pulls_the_best_images_error_down_and_pushes_the_worsts_up() -> None:
    policy = tensor([0.1, 0.1, 0.1, 0.1]).requires_grad_()
    loss = listwise_loss(policy, tensor([0.1] * 4), tensor([0.2, 0.9, 0.4, 0.6]), 10.0)
    (slope,) = torch.autograd.grad(loss, policy)
    assert slope[1] > 0 > slope[0]
    assert abs(slope.sum().item()) < 1e-12


def test_folding_puts_the_best_against_the_worst_and_leaves_a_middle_out() -> None:
    assert folded(np.array([0.1, 0.5, -0.2, 0.3])) == [(1, 2), (3, 0)]
    assert folded(np.array([3.0, 1.0, 2.0])) == [(0, 1)]
    assert folded(np.array([1.0, 1.0])) == [(0, 1)]


def test_probabilities_of_winning_by_hand_and_by_a_metric() -> None:
    scores = np.array([math.log(3), 0.0])
    np.testing.assert_allclose(win_probabilities(scores, 1.0), [0.75, 0.25], rtol=1e-12)
    np.testing.assert_allclose(
        win_probabilities(np.array([5.0, 5.0, 1.0]), math.inf), [0.75, 0.75, 0]
    )
    found = win_probabilities(np.random.default_rng(0).standard_normal(7), 2.0)
    assert found.mean() == pytest.approx(0.5, rel=1e-12)


def test_lists_hold_the_rows_of_one_name_and_certain_pairs_stand_alone() -> None:
    lists = lists_of(
        ["a", None, "a", "b"], [0.9, None, 0.6, 0.3], [0.1, None, 0.4, 0.7]
    )  # the last is exchanged
    assert [rows.tolist() for rows in lists.rows] == [[0, 2], [1], [3]]
    assert lists.winner.tolist() == pytest.approx([0.9, 1.0, 0.6, 0.7])
    assert lists.loser.tolist() == pytest.approx([0.1, 0.0, 0.4, 0.3])
    rows, owner = lists.members(torch.tensor([2, 0]))
    assert (rows.tolist(), owner.tolist()) == ([3, 0, 2], [0, 1, 1])
