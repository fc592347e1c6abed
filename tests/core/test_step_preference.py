"""The step-aware preference model's loss, against the published code's arithmetic in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from stages.core.errors import UserError
from stages.core.method.step_preference import (
    labels_by_score,
    pair_weights,
    shares_right,
    step_preference_loss,
)
from stages.core.training.step_judge.settings import (
    StepJudgeSettings,
    check_settings,
    learning_rate,
)


def published_loss(
    scores: torch.Tensor, labels: torch.Tensor, num_examples: torch.Tensor
) -> torch.Tensor:
    """As SPO's spm_criterion.py writes it: two cross-entropies, ln 1/2 for ties, and weights by prompt."""
    zeros = torch.zeros(len(scores), dtype=torch.int64)
    first = functional.cross_entropy(scores, zeros, reduction="none")
    second = functional.cross_entropy(scores, zeros + 1, reduction="none")
    loss = labels[:, 0] * first + labels[:, 1] * second
    loss += (labels[:, 0] == labels[:, 1]).double() * math.log(0.5)
    weight = 1 / num_examples
    return (loss * weight / weight.sum()).sum()


def test_the_loss_of_a_batch_is_the_published_one_in_float64() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn((7, 2), generator=rng, dtype=torch.float64)
    label = torch.tensor([1, 0, 0.5, 1, 0.5, 0, 1], dtype=torch.float64)
    prompts = ["a", "b", "a", "c", "a", "b", "d", "a", "never in the batch", "b"]
    rows = [0, 1, 2, 3, 4, 5, 6]
    counts = torch.tensor([4, 3, 4, 1, 4, 3, 1], dtype=torch.float64)
    expected = published_loss(scores, torch.stack([label, 1 - label], dim=1), counts)
    losses = step_preference_loss(scores[:, 0], scores[:, 1], label)
    found = (losses * pair_weights(prompts, rows)).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_without_an_opinion_a_label_costs_ln_2_and_a_tie_nothing() -> None:
    same = torch.tensor([3.0, 3.0, 3.0], dtype=torch.float64)
    label = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    found = step_preference_loss(same, same, label)
    assert found.tolist() == pytest.approx([math.log(2), math.log(2), 0], abs=1e-12)
    swapped = step_preference_loss(torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([0.0]))
    plain = step_preference_loss(torch.tensor([4.0]), torch.tensor([1.0]), torch.tensor([1.0]))
    assert torch.equal(swapped, plain)
    tie = torch.tensor([0.5])
    assert float(step_preference_loss(torch.tensor([4.0]), torch.tensor([1.0]), tie)) > 0


def test_a_tie_is_a_small_gap_of_probabilities() -> None:
    first = torch.tensor([0.0, 1.0, 0.21, 0.19, -2.0], dtype=torch.float64)
    second = torch.zeros(5, dtype=torch.float64)
    probability = torch.softmax(torch.stack([first, second], dim=1), dim=1)
    gaps = (probability[:, 0] - probability[:, 1]).tolist()
    expected = [1.0 if gap > 0.1 else 0.0 if gap < -0.1 else 0.5 for gap in gaps]
    assert labels_by_score(first, second, 0.1).tolist() == expected == [0.5, 1, 1, 0.5, 0]


def test_what_is_right_by_label() -> None:
    first, second = torch.tensor([2.0, 2.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    label = torch.tensor([1.0, 0.0, 1.0, 0.5])
    assert shares_right(first, second, label).tolist() == [1, 0, 0.5, 0.5]


def test_the_learning_rate_rises_and_falls() -> None:
    settings = StepJudgeSettings(num_steps=10, warmup_steps=4, learning_rate=7.0)
    found = [learning_rate(step, settings) for step in range(1, 11)]
    assert found == pytest.approx([7 / 4, 7 / 2, 21 / 4, 7, 6, 5, 4, 3, 2, 1])
    at_once = replace(settings, warmup_steps=0, num_steps=2)
    assert [learning_rate(step, at_once) for step in (1, 2)] == pytest.approx([14 / 3, 7 / 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"batch_pairs": 0}, "batch_pairs is 0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"num_steps": 9, "warmup_steps": 10}, "warmup_steps is 10 and num_steps is 9"),
        ({"min_label_gap": 1.0}, "min_label_gap is 1.0"),
    ],
)
def test_settings_that_train_nothing_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(replace(StepJudgeSettings(), **changes))
