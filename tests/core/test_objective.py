"""The loss against hand numbers, its symmetries, and an implementation written from the equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.core.objective import denoising_error, dpo_loss, preference_logit

BETA = 5000.0
Array = NDArray[np.float64]


def predictions(scale: float = 0.02) -> dict[str, Array]:
    """Predictions of both models for winner and loser near one noise, float64."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((4, 2, 3, 3))
    names = ("policy_w", "policy_l", "reference_w", "reference_l")
    near = {name: noise + scale * rng.standard_normal(noise.shape) for name in names}
    return {"noise": noise, **near}


def loss_by_hand(values: dict[str, Array]) -> tuple[float, dict[str, Array]]:
    """Eq. 9's loss and its gradient to the policy's predictions, with a sigma of its own."""
    noise = values["noise"]
    size = noise[0].size
    error = {k: ((v - noise) ** 2).sum(axis=(1, 2, 3)) / size for k, v in values.items()}
    delta = (error["policy_w"] - error["reference_w"]) - (error["policy_l"] - error["reference_l"])
    sigma = 1 / (1 + np.exp(BETA / 2 * delta))
    weight = BETA / 2 * (1 - sigma) / len(delta)  # d loss / d delta
    slope = {
        "policy_w": weight[:, None, None, None] * 2 * (values["policy_w"] - noise) / size,
        "policy_l": -weight[:, None, None, None] * 2 * (values["policy_l"] - noise) / size,
    }
    return float(-np.log(sigma).mean()), slope


def logit_of(values: dict[str, torch.Tensor], beta: float = BETA) -> torch.Tensor:
    errors = {
        name: denoising_error(values[name], values["noise"]) for name in values if name != "noise"
    }
    return preference_logit(
        policy_error_w=errors["policy_w"],
        policy_error_l=errors["policy_l"],
        reference_error_w=errors["reference_w"],
        reference_error_l=errors["reference_l"],
        dpo_beta=beta,
    )


def test_policy_equal_to_reference_has_logit_0_and_loss_ln_2_exactly() -> None:
    values = {name: torch.tensor(value) for name, value in predictions().items()}
    values["reference_w"], values["reference_l"] = values["policy_w"], values["policy_l"]
    logit = logit_of(values)
    assert torch.equal(logit, torch.zeros(4, dtype=torch.float64))
    assert (dpo_loss(logit) == math.log(2)).all()


def test_exchanging_winner_and_loser_flips_the_sign_of_the_logit() -> None:
    values = {name: torch.tensor(value) for name, value in predictions().items()}
    swapped = {
        "noise": values["noise"],
        "policy_w": values["policy_l"],
        "policy_l": values["policy_w"],
        "reference_w": values["reference_l"],
        "reference_l": values["reference_w"],
    }
    assert (logit_of(values) != 0).all()
    assert torch.equal(logit_of(swapped), -logit_of(values))


def test_loss_and_gradient_equal_the_equations_in_float64() -> None:
    values = predictions()
    expected, slope = loss_by_hand(values)
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    for name in slope:
        tensors[name].requires_grad_()
    loss = dpo_loss(logit_of(tensors)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    for name, by_hand in slope.items():
        gradient = tensors[name].grad
        assert gradient is not None
        np.testing.assert_allclose(gradient.numpy(), by_hand, rtol=1e-9, atol=1e-12)


def test_loss_of_hand_worked_errors() -> None:
    logit = preference_logit(
        policy_error_w=torch.tensor([0.5], dtype=torch.float64),
        reference_error_w=torch.tensor([0.6], dtype=torch.float64),
        policy_error_l=torch.tensor([0.7], dtype=torch.float64),
        reference_error_l=torch.tensor([0.65], dtype=torch.float64),
        dpo_beta=10.0,
    )
    # gains -0.1 and +0.05: the logit is -5 * -0.15, the loss ln(1 + e^-0.75)
    assert logit.item() == pytest.approx(0.75, rel=1e-12)
    assert dpo_loss(logit).item() == pytest.approx(0.386871006114900, rel=1e-12)


def test_loss_of_a_hopeless_pair_is_finite_and_linear() -> None:
    loss = dpo_loss(torch.tensor([-1000.0, 1000.0]))
    assert loss.tolist() == [1000.0, 0.0]


def test_denoising_error_is_the_mean_square_of_hand_numbers() -> None:
    prediction = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    target = torch.tensor([[[[0.0, 0.0], [3.0, 2.0]]], [[[0.0, 0.0], [0.0, 2.0]]]])
    assert denoising_error(prediction, target).tolist() == [(1 + 4 + 0 + 4) / 4, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_denoising_error_of_halves_is_that_of_the_same_numbers_in_float32(
    dtype: torch.dtype,
) -> None:
    rng = torch.Generator().manual_seed(0)
    prediction = (300 * torch.randn((2, 4, 8, 8), generator=rng)).to(dtype)  # squares pass 65504
    target = torch.randn((2, 4, 8, 8), generator=rng).to(dtype)
    error = denoising_error(prediction, target)
    assert error.dtype == torch.float32
    assert torch.equal(error, denoising_error(prediction.float(), target.float()))
    assert torch.isfinite(error).all()
