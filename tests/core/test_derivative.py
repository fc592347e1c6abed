"""The derivative half way between two models is their difference, up to third order and far above rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.core.method.derivative import Derivative, Differentiable, TwoPoints
from stages.core.method.noising import Draws, generator, reward_draws
from stages.core.method.scoring import Difference, Errors, draw_errors
from stages.core.method.secant import Secant, best_stretch
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.policy import Policy
from stages.core.policies.loading import RewardsBy, load_judge
from stages.core.policies.saving import save_policy
from tests import tiny_models
from tests.builders import FULL, LORA, settings

CPU = torch.device("cpu")
WITHIN = {"secant": 0.04, "derivative": 0.01}
"""Of the largest reward, in float32: a secant's stretch trades rounding for curvature."""
PROMPT = "a cat in a hat"


@pytest.fixture(scope="module", params=["sd15-v", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sdxl":
        return tiny_models.sdxl(folder)
    return tiny_models.sd15(folder, prediction_type="v_prediction")


def question(model: DiffusionModel) -> tuple[Tensor, Draws]:
    latents = torch.randn((6, *model.latents_shape), generator=generator(2))
    return latents, reward_draws(
        3, num_draws=4, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )


def moved(network: torch.nn.Module, distance: float, seed: int = 1) -> dict[str, Tensor]:
    """Every weight moved at random, by `distance` of its layer's spread."""
    rng = generator(seed)
    return {
        name: value.data + distance * value.data.std(correction=0) * torch.randn(value.shape, generator=rng)
        for name, value in network.named_parameters()
    }  # fmt: skip


def with_weights(model: DiffusionModel, weights: dict[str, Tensor]) -> Denoiser:
    denoiser = model.load_denoiser()
    with torch.no_grad():
        for name, value in denoiser.network.named_parameters():
            value.copy_(weights[name])
    return denoiser


def gain(errors: Errors) -> np.ndarray:
    """Reference's minus policy's error of each image and draw, in float64."""
    return errors.reference.double().numpy() - errors.policy.double().numpy()


def wide(model: DiffusionModel, denoiser: Denoiser) -> Denoiser:
    denoiser.network.double()
    return denoiser


@pytest.mark.quick("sd15-v")
def test_halving_the_distance_makes_the_error_an_eighth(base: Path) -> None:
    """Against the difference itself, all in float64."""
    model = load_model(settings(base), device=CPU)
    latents, draws = question(model)
    text = model.encode_text([PROMPT])
    text = replace(
        text,
        tensors={k: v.double() if v.is_floating_point() else v for k, v in text.tensors.items()},
    )
    model.dtype = torch.float64
    draws = Draws(draws.timesteps, draws.noise.double())
    apart = []
    for distance in (0.004, 0.002):
        reference = wide(model, model.load_denoiser(dtype=torch.float32))
        weights = {k: v.double() for k, v in moved(reference.network.float(), distance).items()}
        reference.network.double()
        policy = wide(model, model.load_denoiser(dtype=torch.float32))
        with torch.no_grad():
            for name, value in policy.network.named_parameters():
                value.copy_(weights[name])
        ours = {name: value.data for name, value in reference.network.named_parameters()}
        exact, found = (
            gain64(model, judge, latents, text, draws)
            for judge in (
                Difference(policy, reference),
                Derivative.between(reference.network, weights, ours),
            )
        )
        apart.append(np.abs(found - exact).max())
        assert apart[-1] < 0.05 * np.abs(exact).max()
    assert 6 < apart[0] / apart[1] < 10


def gain64(model, judge, latents, text, draws) -> np.ndarray:  # type: ignore[no-untyped-def]
    rows = latents.double().repeat_interleave(len(draws.timesteps), dim=0)
    timesteps, noise = (
        draws.timesteps.repeat(len(latents)),
        draws.noise.repeat(len(latents), 1, 1, 1),
    )
    noised, target = model.add_noise(rows, noise, timesteps), model.target(rows, noise, timesteps)
    with torch.no_grad():
        policy, reference, _ = judge.errors(
            model, noised, timesteps, text.repeat(len(rows)), target
        )
    return (reference - policy).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_it_is_right_where_the_difference_is_rounding(
    base: Path, dtype: str
) -> None:
    exact_model, half = (
        load_model(settings(base, kind), device=CPU) for kind in ("float32", dtype)
    )
    latents, draws = question(exact_model)
    reference = exact_model.load_denoiser()
    weights = moved(reference.network, 1e-3)
    ours = {name: value.data for name, value in reference.network.named_parameters()}
    text = exact_model.encode_text([PROMPT])
    policy = with_weights(exact_model, weights)
    exact = gain(draw_errors(exact_model, Difference(policy, reference), latents, text, draws))
    text = half.encode_text([PROMPT])
    judges = {
        "difference": Difference(with_weights(half, weights), half.load_denoiser()),
        "secant": Secant.between(half, weights, ours),
        "derivative": Derivative.between(half.load_denoiser().network, weights, ours),
    }
    wrong = {
        name: np.abs(gain(draw_errors(half, judge, latents, text, draws)) - exact).mean()
        / np.abs(exact).mean()
        for name, judge in judges.items()
    }
    assert wrong["derivative"] < {"float16": 0.02, "bfloat16": 0.12}[dtype]
    assert wrong["difference"] > 5 * wrong["derivative"]
    assert wrong["secant"] < {"float16": 0.06, "bfloat16": 0.25}[dtype]
    assert wrong["difference"] > 4 * wrong["secant"]


@pytest.mark.quick("sd15-v-secant", "sd15-v-derivative")
@pytest.mark.parametrize("by", ["secant", "derivative"])
def test_a_model_beside_itself_has_reward_exactly_0_and_its_own_errors(
    base: Path, by: RewardsBy
) -> None:
    model = load_model(settings(base), device=CPU)
    latents, draws = question(model)
    text = model.encode_text([PROMPT])
    found = draw_errors(model, load_judge(model, "base", "base", by), latents, text, draws)
    expected = draw_errors(model, load_judge(model, "base", "base"), latents, text, draws)
    assert not gain(found).any()
    assert not found.drift.any()
    torch.testing.assert_close(found.policy, expected.policy, atol=1e-5, rtol=1e-5)


def save(model: DiffusionModel, folder: Path, lora: object, seed: int) -> Path:
    """A finished policy a little away from the base."""
    from stages.core.artifacts.provenance import write_manifest

    policy, _ = model.load_for_training(None, None, lora, seed=seed)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in policy.named_weights():
            if lora is FULL or "lora_B" in name:
                weight.add_(3e-4 * torch.randn(weight.shape, generator=generator(seed)))
    save_policy(policy, folder, "unet")
    facts = {"base": "x", "kind": "lora" if lora is LORA else "full", "num_steps": 1}
    write_manifest(folder, stage="train_seed", arguments={"seed": 0}, inputs=[], facts=facts)
    return folder


@pytest.mark.quick("sdxl-derivative-base-full")
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("against", ["base", "another"])
@pytest.mark.parametrize("by", ["secant", "derivative"])
def test_finished_policies_are_judged_as_by_their_difference(
    base: Path, tmp_path: Path, kind: str, against: str, by: RewardsBy
) -> None:
    model = load_model(settings(base), device=CPU)
    lora = {"full": FULL, "lora": LORA}[kind]
    policy = str(save(model, tmp_path / "policy", lora, 1))
    reference = str(save(model, tmp_path / "other", lora, 2)) if against == "another" else "base"
    latents, draws = question(model)
    text = model.encode_text([PROMPT])
    expected, found = (
        draw_errors(model, load_judge(model, policy, reference, way), latents, text, draws)
        for way in ("difference", by)
    )
    size = np.abs(gain(expected)).max()
    assert size > 1e-6
    np.testing.assert_allclose(gain(found), gain(expected), atol=WITHIN[by] * size)
    for name in ("policy", "reference", "drift"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=1e-4, rtol=0.02
        )


def test_attention_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    query, key, value = torch.randn((3, 2, 4, 50, 8), generator=generator(1))
    monkeypatch.setattr("stages.core.method.derivative.PRODUCTS_AT_ONCE", 7 * 2 * 4 * 50)
    with Differentiable():
        found = attention(query, key, value)
    torch.testing.assert_close(found, attention(query, key, value))


@pytest.mark.quick("sd15-v")
def test_the_policys_folder_is_known_to_the_judge(base: Path, tmp_path: Path) -> None:
    model = load_model(settings(base), device=CPU)
    folder = save(model, tmp_path / "policy", LORA, 1)
    fused = dict(model.fused_network(Policy(folder)).named_parameters())
    plain = dict(model.load_denoiser().network.named_parameters())
    assert fused.keys() == plain.keys()
    assert sum(not torch.equal(fused[name], plain[name]) for name in plain) > 10


@pytest.mark.slow
def test_two_points_come_closer_than_the_middle(base: Path) -> None:
    model = load_model(settings(base), device=CPU)
    latents, draws = question(model)
    text = model.encode_text([PROMPT])
    reference = model.load_denoiser()
    weights = moved(reference.network, 0.02)
    ours = {name: value.data for name, value in reference.network.named_parameters()}
    middle = Derivative.between(model.load_denoiser().network, weights, ours)
    exact, once, twice = (
        gain(draw_errors(model, judge, latents, text, draws))
        for judge in (
            Difference(with_weights(model, weights), reference),
            middle,
            TwoPoints.of(middle),
        )
    )
    assert np.abs(twice - exact).mean() < 0.5 * np.abs(once - exact).mean()


@pytest.mark.parametrize(
    ("rounding", "curvature"), [(1e-2, 1e-4), (0.3, 1e-3), (1e-4, 1e-2), (0.1, 1e-5)]
)
def test_the_stretch_is_near_where_rounding_and_curvature_together_are_least(
    rounding: float, curvature: float
) -> None:
    rng = np.random.default_rng(0)
    truth, bend = rng.normal(size=(2, 100_000))

    def difference(s: float) -> Tensor:
        return torch.tensor(
            truth + rounding / s * rng.normal(size=truth.shape) + curvature * s**2 * bend
        )

    def off(s: float) -> float:
        return float(np.hypot(rounding / s, curvature * s**2))

    found = best_stretch(difference)
    assert off(found) < 1.6 * min(off(s) for s in 2.0 ** np.arange(7))


def test_the_stretch_of_special_cases() -> None:
    noise = torch.randn(1000, generator=generator(0))
    assert best_stretch(lambda s: s**2 * noise) == 1
    assert best_stretch(lambda s: noise) == 1  # two equal models
    assert best_stretch(lambda s: noise * float("inf")) == 1
    assert best_stretch(lambda s: noise if s < 8 else noise * float("nan")) == 1
    assert best_stretch(lambda s: torch.randn(1000, generator=generator(int(s))) / s) == 32


@pytest.mark.quick("sd15-v")
def test_half_of_the_way_off_the_middle_is_the_policy(base: Path) -> None:
    model = load_model(settings(base), device=CPU)
    network = model.load_denoiser().network
    reference = {name: value.data for name, value in network.named_parameters()}
    policy = moved(network, 0.1)
    ahead = Derivative.between(network, policy, reference).moved(0.5).middle
    for name, value in policy.items():
        torch.testing.assert_close(ahead[name], value, atol=1e-6, rtol=1e-5)
