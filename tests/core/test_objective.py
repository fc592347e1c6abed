"""The loss against hand numbers, its symmetries, and an implementation written from the equations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.core.method.objective import (
    LOSSES,
    LossSettings,
    PairErrors,
    denoising_error,
    dpo_loss,
    ipo_loss,
    kto_loss,
    mapo_loss,
    mean_gain,
    preference_logit,
    wrong_shares,
)

BETA = 5000.0
PLAIN = LossSettings(dpo_beta=BETA, label_smoothing=0.0, num_timesteps=1000)
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


def errors_of(values: dict[str, torch.Tensor]) -> PairErrors:
    return PairErrors(
        **{
            name: denoising_error(values[name], values["noise"])
            for name in values
            if name != "noise"
        }
    )


def logit_of(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return preference_logit(errors_of(values), BETA)


def errors(policy_w: float, policy_l: float, reference_w: float, reference_l: float) -> PairErrors:
    numbers = (policy_w, policy_l, reference_w, reference_l)
    return PairErrors(*(torch.tensor([number], dtype=torch.float64) for number in numbers))


def test_policy_equal_to_reference_has_logit_0_and_loss_ln_2_exactly() -> None:
    values = {name: torch.tensor(value) for name, value in predictions().items()}
    values["reference_w"], values["reference_l"] = values["policy_w"], values["policy_l"]
    logit = logit_of(values)
    assert torch.equal(logit, torch.zeros(4, dtype=torch.float64))
    assert (dpo_loss(errors_of(values), PLAIN) == math.log(2)).all()
    assert (ipo_loss(errors_of(values), PLAIN) == 0.25).all()


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
    loss = dpo_loss(errors_of(tensors), PLAIN).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    for name, by_hand in slope.items():
        gradient = tensors[name].grad
        assert gradient is not None
        np.testing.assert_allclose(gradient.numpy(), by_hand, rtol=1e-9, atol=1e-12)


# gains -0.1 and +0.05 with beta 10: the logit is -5 * -0.15 = 0.75
WORKED = errors(policy_w=0.5, policy_l=0.7, reference_w=0.6, reference_l=0.65)


def worked(**changes: float) -> LossSettings:
    values = {"dpo_beta": 10.0, "label_smoothing": 0.0, "num_timesteps": 1000, **changes}
    return LossSettings(**values)  # type: ignore[arg-type]


def test_losses_of_hand_worked_errors() -> None:
    assert preference_logit(WORKED, 10.0).item() == pytest.approx(0.75, rel=1e-12)
    # ln(1 + e^-0.75) and ln(1 + e^0.75)
    right, wrong = 0.386871006114900, 1.136871006114900
    assert dpo_loss(WORKED, worked()).item() == pytest.approx(right, rel=1e-12)
    smooth = dpo_loss(WORKED, worked(label_smoothing=0.2)).item()
    assert smooth == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-12)
    assert ipo_loss(WORKED, worked()).item() == pytest.approx(0.25**2, rel=1e-12)


def test_a_soft_label_is_the_expected_loss_and_least_at_its_log_odds() -> None:
    right, wrong = 0.386871006114900, 1.136871006114900
    both = PairErrors(*(torch.cat([value, value]) for value in vars(WORKED).values()))
    probability = torch.tensor([1.0, 0.7], dtype=torch.float64)
    soft = LossSettings(
        dpo_beta=10.0, label_smoothing=wrong_shares(probability, 0.0), num_timesteps=1000
    )
    expected = [right, 0.7 * right + 0.3 * wrong]
    np.testing.assert_allclose(dpo_loss(both, soft).numpy(), expected, rtol=1e-12)
    # a tenth of the labels exchanged: the winner is preferred with 0.9 x 0.7 + 0.1 x 0.3 = 0.66
    smoothed = wrong_shares(probability, 0.1)
    np.testing.assert_allclose(torch.as_tensor(smoothed).numpy(), [0.1, 0.34], rtol=1e-12)
    assert wrong_shares(None, 0.1) == 0.1
    # the gradient vanishes where the logit is ln(0.7 / 0.3): policy_l higher by 2 / beta times that
    gain = torch.tensor([2 / 10.0 * math.log(0.7 / 0.3)], dtype=torch.float64, requires_grad=True)
    still = torch.zeros(1, dtype=torch.float64)
    at_best = PairErrors(policy_w=still, policy_l=gain, reference_w=still, reference_l=still)
    own = LossSettings(
        dpo_beta=10.0, label_smoothing=wrong_shares(probability[1:], 0.0), num_timesteps=1000
    )
    (slope,) = torch.autograd.grad(dpo_loss(at_best, own).sum(), gain)
    assert abs(slope.item()) < 1e-12


def test_spins_published_loss_is_the_dpo_loss_with_the_policy_before_as_reference() -> None:
    """Yuan et al., with l(t) = log(1 + exp(-t)): l(-lambda (gain of the person's image - gain of the own sample))."""
    values = predictions()
    error = {
        name: ((values[name] - values["noise"]) ** 2).mean(axis=(1, 2, 3))
        for name in values
        if name != "noise"
    }
    lam = 37.0
    moved = (error["policy_w"] - error["reference_w"]) - (error["policy_l"] - error["reference_l"])
    published = np.log1p(np.exp(lam * moved))
    settings = LossSettings(dpo_beta=2 * lam, label_smoothing=0.0, num_timesteps=1000)
    ours = dpo_loss(errors_of({name: torch.tensor(v) for name, v in values.items()}), settings)
    np.testing.assert_allclose(ours.numpy(), published, rtol=1e-12)


def test_ipo_is_the_published_square_times_beta_squared() -> None:
    log_ratio = -0.5 * (
        -0.1 - 0.05
    )  # h of Azar et al.: half the gain of the loser over the winner's
    published = (log_ratio - 1 / (2 * 10.0)) ** 2
    assert ipo_loss(WORKED, worked()).item() == pytest.approx(10.0**2 * published, rel=1e-12)


def test_conservative_dpo_with_half_the_labels_wrong_is_least_at_logit_0() -> None:
    nearly = worked(label_smoothing=0.4999999)
    at_zero = dpo_loss(errors(0.5, 0.5, 0.5, 0.5), nearly).item()
    assert at_zero == pytest.approx(math.log(2), rel=1e-6)
    assert dpo_loss(WORKED, nearly).item() > at_zero


def test_mapo_equals_its_published_formula_in_plain_floats() -> None:
    def odds(error: float) -> float:
        return 0.5 * error / (math.exp(0.5 * error) - 1)

    pair = errors(policy_w=0.1234, policy_l=0.1237, reference_w=math.nan, reference_l=math.nan)
    margin = 1000 * (odds(0.1234) - odds(0.1237))
    expected = 0.1234 - 0.1 * math.log(1 / (1 + math.exp(-margin)))
    assert mapo_loss(pair, PLAIN).item() == pytest.approx(expected, rel=1e-9)
    assert math.isfinite(mapo_loss(pair, PLAIN).item())  # it never looks at the reference


def test_kto_takes_each_image_by_itself_and_equals_its_published_formula_in_float64() -> None:
    rng = np.random.default_rng(5)
    values = {name: 0.1 + 4e-4 * rng.standard_normal(6) for name in PairErrors.__annotations__}
    gains = {side: values[f"reference_{side}"] - values[f"policy_{side}"] for side in "wl"}
    both = np.concatenate([gains["w"], gains["l"]])
    pair = PairErrors(**{name: torch.from_numpy(value) for name, value in values.items()})
    assert mean_gain(pair).item() == pytest.approx(both.mean(), rel=1e-12)
    for shift in (both.mean(), 3e-4, -3e-4):
        sign = np.repeat([1.0, -1.0], 6)
        utility = 1 / (1 + np.exp(-sign * BETA * (both - max(0.0, shift))))
        settings = LossSettings(
            dpo_beta=BETA, label_smoothing=0.0, num_timesteps=1000, mean_gain=float(shift)
        )
        found = kto_loss(pair, settings)
        assert found.tolist() == pytest.approx(((1 - utility)[:6] + (1 - utility)[6:]) / 2)
    assert kto_loss(errors(0.1, 0.2, 0.1, 0.2), PLAIN).item() == 0.5  # as the reference


def test_ktos_liked_share_is_the_published_loss_of_a_batch_with_so_many_liked_images() -> None:
    """Four liked images in five, each with its sign, and the base by the whole batch: train_kto_sd_v1.5.py."""
    rng = np.random.default_rng(6)
    values = {name: 0.1 + 4e-4 * rng.standard_normal(5) for name in PairErrors.__annotations__}
    gains = {side: values[f"reference_{side}"] - values[f"policy_{side}"] for side in "wl"}
    batch = np.concatenate([np.repeat(gains["w"], 4), gains["l"]])
    sign = np.concatenate([np.ones(20), -np.ones(5)])
    base = max(0.0, batch.mean())
    expected = (1 - 1 / (1 + np.exp(-sign * BETA * (batch - base)))).mean()
    pair = PairErrors(**{name: torch.from_numpy(value) for name, value in values.items()})
    settings = LossSettings(
        dpo_beta=BETA, label_smoothing=0.0, num_timesteps=1000,
        mean_gain=float(mean_gain(pair, 0.8)), liked_share=0.8,
    )  # fmt: skip
    assert float(mean_gain(pair, 0.8)) == pytest.approx(batch.mean(), rel=1e-12)
    assert float(kto_loss(pair, settings).mean()) == pytest.approx(expected, rel=1e-12)
    same = replace(PLAIN, liked_share=0.8)
    assert kto_loss(errors(0.1, 0.2, 0.1, 0.2), same).item() == 0.5  # as the reference


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_pulls_the_winners_error_down_and_pushes_the_losers_up(name: str) -> None:
    numbers = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.1, 0.1)]
    reference = torch.tensor([0.1], dtype=torch.float64)
    loss = LOSSES[name](PairErrors(*numbers, reference, reference), PLAIN).mean()  # type: ignore[index]
    loss.backward()  # type: ignore[no-untyped-call]
    assert numbers[0].grad is not None
    assert numbers[1].grad is not None
    assert numbers[0].grad.item() > 0
    assert numbers[1].grad.item() < 0


def test_loss_of_a_hopeless_pair_is_finite_and_linear() -> None:
    settings = worked(dpo_beta=2000.0)
    assert dpo_loss(errors(1.0, 0.0, 0.0, 0.0), settings).item() == pytest.approx(1000.0)
    assert dpo_loss(errors(0.0, 1.0, 0.0, 0.0), settings).item() == 0.0


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
