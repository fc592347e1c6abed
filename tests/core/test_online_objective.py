"""The losses of SPO, D3PO and DDPO by hand, their clips, and DDPO's advantages against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.core.method.online_objective import (
    PromptStatistics,
    clipped_share,
    is_clear,
    policy_gradient_loss,
    preference_loss,
)

BETA, CLIP = 10.0, 0.1


def rows(*values: float, needs_gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=needs_gradient)


def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    return preference_loss(w, l, beta=BETA, ratio_clip=CLIP)


def test_where_policy_equals_reference_the_loss_is_ln_2_with_the_unclipped_gradient() -> None:
    w, l = rows(0.0, needs_gradient=True), rows(0.0, needs_gradient=True)  # noqa: E741
    value = loss(w, l)
    assert value.tolist() == pytest.approx([math.log(2)], abs=1e-15)
    value.sum().backward()
    assert w.grad is not None
    assert l.grad is not None
    assert (float(w.grad), float(l.grad)) == (-BETA / 2, BETA / 2)  # of -log sigmoid(beta (w - l))


def test_exchanging_winner_and_loser_flips_the_logit() -> None:
    there, back = loss(rows(0.05), rows(-0.02)), loss(rows(-0.02), rows(0.05))
    logit = BETA * 0.07
    assert float(there) == pytest.approx(math.log(1 + math.exp(-logit)), rel=1e-12)
    assert float(back - there) == pytest.approx(logit, rel=1e-12)


def test_the_loss_stays_within_its_bounds_and_has_no_gradient_beyond_the_clip() -> None:
    w, l = rows(5.0, -5.0, needs_gradient=True), rows(-5.0, 5.0)  # noqa: E741
    values = loss(w, l)
    largest = BETA * (math.log(1.1) - math.log(0.9))
    assert largest == pytest.approx(2.007, abs=1e-3)
    assert values.tolist() == pytest.approx(
        [math.log(1 + math.exp(-largest)), math.log(1 + math.exp(largest))]
    )
    values.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [0.0, 0.0]


def test_the_clip_is_of_the_ratio_as_the_published_code_writes_it() -> None:
    ratios = rows(-0.3, -0.05, 0.05, 0.3)
    expected = -torch.nn.functional.logsigmoid(
        BETA * (ratios.exp().clamp(0.9, 1.1).log() - rows(0.0, 0.0, 0.0, 0.0))
    )
    torch.testing.assert_close(loss(ratios, rows(0.0, 0.0, 0.0, 0.0)), expected)


@pytest.mark.parametrize(("gap", "threshold"), [(0.619, 0.3), (0.847, 0.4)])
def test_a_pair_is_clear_by_the_difference_of_its_softmax(gap: float, threshold: float) -> None:
    assert is_clear(20.0 + gap + 1e-3, 20.0, threshold)
    assert not is_clear(20.0 + gap - 1e-3, 20.0, threshold)
    softmax = torch.tensor([gap, 0.0]).softmax(dim=0)
    assert float(softmax[0] - softmax[1]) == pytest.approx(threshold, abs=1e-3)


def test_ddpo_is_minus_the_advantage_at_first_and_its_gradient_minus_advantage_times_that_of_the_log() -> (
    None
):
    ratio = rows(0.0, 0.0, needs_gradient=True)
    values = policy_gradient_loss(ratio, rows(2.0, -3.0), ratio_clip=1e-4)
    assert values.tolist() == [-2.0, 3.0]
    values.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [-2.0, 3.0]
    assert float(clipped_share(ratio.detach(), 1e-4)) == 0.0


def test_ddpo_gains_nothing_beyond_its_clip_but_loses_without_bound() -> None:
    up = math.log(1.5)
    ratio = rows(up, up, -up, -up, needs_gradient=True)
    values = policy_gradient_loss(ratio, rows(1.0, -1.0, 1.0, -1.0), ratio_clip=0.1)
    assert values.tolist() == pytest.approx([-1.1, 1.5, -1 / 1.5, 0.9])
    values.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == pytest.approx([0.0, 1.5, -1 / 1.5, 0.0])
    assert float(clipped_share(ratio.detach(), 0.1)) == 1.0
    assert float(clipped_share(rows(0.0, 0.2), 0.1)) == 0.5


def test_advantages_are_of_the_round_until_a_prompt_is_known_and_then_of_its_last_rewards() -> None:
    statistics = PromptStatistics(buffer_size=3, min_count=2)
    first = np.array([1.0, 5.0, 3.0], dtype=np.float32)
    found = statistics.advantages(["cat", "dog", "cat"], first)
    of_cat, of_all = np.array([1.0, 3.0]), np.array([1.0, 5.0, 3.0])
    assert found == pytest.approx(
        [
            (1 - of_cat.mean()) / (of_cat.std() + 1e-6),
            (5 - of_all.mean()) / (of_all.std() + 1e-6),
            (3 - of_cat.mean()) / (of_cat.std() + 1e-6),
        ]
    )
    second = np.array([9.0, 7.0, 2.0], dtype=np.float32)
    found = statistics.advantages(["cat", "cat", "dog"], second)
    of_cat, of_dog = np.array([3.0, 9.0, 7.0]), np.array([5.0, 2.0])  # the 1 is forgotten
    assert found == pytest.approx(
        [
            (9 - of_cat.mean()) / (of_cat.std() + 1e-6),
            (7 - of_cat.mean()) / (of_cat.std() + 1e-6),
            (2 - of_dog.mean()) / (of_dog.std() + 1e-6),
        ]
    )


def test_without_a_buffer_every_advantage_is_of_the_round() -> None:
    statistics = PromptStatistics(buffer_size=0, min_count=1)
    rewards = np.array([1.0, 2.0, 6.0])
    for _ in range(2):
        found = statistics.advantages(["cat", "cat", "dog"], rewards)
        assert found == pytest.approx((rewards - 3) / (rewards.std() + 1e-6))


def test_equal_rewards_have_no_advantage() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=1)
    assert statistics.advantages(["cat", "cat"], np.array([2.0, 2.0])).tolist() == [0.0, 0.0]
