"""Stable Diffusion 3.5, FLUX.1 and Sana, full and LoRA: images as diffusers makes them, the loss by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from stages.core.errors import UserError
from stages.core.method.noising import Draws, generator, reward_draws, training_draws
from stages.core.method.rewards import implicit_reward
from stages.core.method.sampling import sample_latents
from stages.core.method.scoring import Difference, draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LORA_FILE, Denoiser, LoraSettings
from stages.core.models.families import load_model
from stages.core.models.flux import Flux
from stages.core.models.loading import ModelError
from stages.core.models.policy import Policy
from stages.core.models.stable_diffusion_3 import StableDiffusion3
from stages.core.policies.encoding import EncodedPairs
from stages.core.policies.loading import load_judge
from stages.core.training.loop import Training
from stages.core.training.pair_losses import batch_loss
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from tests import flow_models
from tests.builders import FULL, settings
from tests.flow_families import CPU, PROMPTS, Family, flow_families
from tests.tiny_models import with_scheduler

LORA = LoraSettings(rank=4, alpha=8.0)
"""On the layers that each family names itself."""
TRAINING = TrainingSettings(
    dpo_beta=100.0,
    learning_rate=1e-3,
    batch_pairs=4,
    passes=2.0,
    warmup_share=0.0,
    gradient_clip=1.0,
    weight_decay=0.01,
    caption_dropout=0.0,
    draw_law="logit_normal",
)
KINDS = pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Random models of three kinds, as folders."""
    return flow_families(tmp_path_factory.mktemp("flow"))


@pytest.fixture(params=["sd3", "flux", "sana"])
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    """Each of them."""
    return families[request.param]


def pairs_of(model: DiffusionModel, count: int = 4) -> EncodedPairs:
    """Random latents."""
    both = torch.randn((2, count, *model.latents_shape), generator=generator(2))
    return EncodedPairs(
        winner=both[0],
        loser=both[1],
        caption=torch.arange(count) % 2,
        text=model.encode_text(PROMPTS),
        winner_geometry=model.native_geometry(count),
        loser_geometry=model.native_geometry(count),
    )


def trained(
    model: DiffusionModel, work: Path, lora: LoraSettings, **changes: Any
) -> tuple[Denoiser, Denoiser, list[Any]]:
    policy, reference = model.load_for_training(None, None, lora, seed=1)
    steps, _ = Training(
        model, policy, reference, pairs_of(model), replace(TRAINING, **changes),
        seed=3, work=work, identity="one", processes=Processes(CPU), execution=Execution(),
    ).run()  # fmt: skip
    return policy, reference, steps


def sampled(model: DiffusionModel, denoiser: Denoiser, **how: Any) -> torch.Tensor:
    """Latents of the same two prompts from the same noise."""
    return sample_latents(
        model, denoiser, text=model.encode_text(PROMPTS[:2]), unconditional=model.unconditional(),
        seeds=[5, 6], **how,
    )  # fmt: skip


def test_the_family_is_recognised(family: Family) -> None:
    model = family.load()
    assert type(model) is family.adapter
    assert model.latents_shape == (4, 8, 8)
    assert model.image_size == (64, 64)
    assert model.num_timesteps == 1000
    assert model.num_truncated(["word " * 400, "short"]) == 1
    other = "flux" if model.family == "sana" else "sana"
    with pytest.raises(ModelError, match=f"model.family is {other}, but .* is of {model.family}"):
        family.load(family=other)


@pytest.mark.quick("sd3-1.0", "sd3-4.5", "flux-4.5", "sana-4.5")
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_images_equal_those_of_diffusers_own_pipeline(
    family: Family, guidance_scale: float
) -> None:
    model, pipeline = family.load(), family.opened()
    how = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    expected = family.drawn(pipeline, **how)
    found = sampled(model, model.load_denoiser(), sampler=family.sampler, **how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert float(expected.std()) > 0.1
    vae = pipeline.vae
    shift = vae.config.get("shift_factor") or 0.0
    with torch.no_grad():
        decoded = vae.decode(expected / vae.config.scaling_factor + shift).sample
    images = (decoded / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode_latents(found), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_shorter_text_is_what_the_pipeline_takes_when_it_is_told_so(
    families: dict[str, Family], name: str
) -> None:
    family = families[name]
    model = family.load(max_sequence_length=9)
    assert model.num_truncated(["a cat in a hat", "a"]) == 1
    how = {"num_inference_steps": 2, "guidance_scale": 1.0}
    expected = family.drawn(family.opened(), max_sequence_length=9, **how)
    found = sampled(model, model.load_denoiser(), sampler="euler", **how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    usual = family.load()
    assert model.encode_text(PROMPTS)["text"].shape[1] < usual.encode_text(PROMPTS)["text"].shape[1]


def test_a_family_whose_text_has_one_length_refuses_another(families: dict[str, Family]) -> None:
    with pytest.raises(ModelError, match="max_sequence_length is 9, but models of sana read"):
        families["sana"].load(max_sequence_length=9)


def test_images_that_are_not_square_equal_the_pipelines_too(family: Family) -> None:
    model = family.load(image_size=(64, 96))
    assert model.latents_shape == (4, 8, 12)
    how = {"num_inference_steps": 2, "guidance_scale": 3.0}
    expected = family.drawn(family.opened(), (64, 96), **how)
    found = sampled(model, model.load_denoiser(), sampler=family.sampler, **how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    pixels = torch.rand((1, 3, 64, 96), generator=generator(1)) * 2 - 1
    assert model.encode_images(pixels).shape == (1, 4, 8, 12)
    with pytest.raises(ModelError, match=r"image_size is \[50, 80\]; expected .* multiples of"):
        family.load(image_size=(50, 80))


def test_the_vaes_shift_is_taken_off_and_put_back(families: dict[str, Family]) -> None:
    model, vae = families["sd3"].load(), families["sd3"].opened().vae
    pixels = torch.rand((2, 3, 64, 64), generator=generator(1)) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    expected = (mode - 0.0609) * 1.5305
    torch.testing.assert_close(model.encode_images(pixels), expected, atol=1e-6, rtol=0)


def test_the_stochastic_sampler_draws_other_images_of_the_same_seed_alike_in_any_batch(
    family: Family,
) -> None:
    model = family.load()
    how = {"num_inference_steps": 3, "guidance_scale": 2.0}
    both = sampled(model, model.load_denoiser(), sampler="euler_stochastic", **how)
    plain = sampled(model, model.load_denoiser(), sampler="euler", **how)
    assert float((both - plain).abs().max()) > 0.1
    alone = sample_latents(
        model, model.load_denoiser(), text=model.encode_text(PROMPTS[1:2]),
        unconditional=model.unconditional(), seeds=[6], sampler="euler_stochastic", **how,
    )  # fmt: skip
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match=f"sampler is 'ddim'; models of {model.family} have"):
        model.sampler("ddim")


def test_noise_levels_by_hand(families: dict[str, Family]) -> None:
    s = np.arange(1, 1001) / 1000
    three = 3 * s / (1 + 2 * s)  # a shift of 3
    mu = 16 * 0.65 / 3840 + (0.5 - 256 * 0.65 / 3840)  # FLUX.1-dev's line, 16 patches
    dynamic = math.exp(mu) / (math.exp(mu) + 1 / s - 1)
    for name, expected in (("sd3", three), ("sana", three), ("flux", dynamic)):
        model = families[name].load()
        found = model.sigmas.numpy()  # type: ignore[attr-defined]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(model.signal_to_noise, ((1 - found) / found) ** 2, rtol=1e-5)
        times = model.times(torch.tensor([0, 499, 999]))
        np.testing.assert_allclose(times, 1000 * expected[[0, 499, 999]], rtol=1e-5)
        weights = {
            name: model.error_weights(name).numpy()
            for name in ("velocity", "epsilon", "elbo", "inverse_snr")
        }
        assert (weights["velocity"] == 1).all()
        np.testing.assert_allclose(weights["epsilon"], (1 - expected) ** 2, atol=1e-6)
        np.testing.assert_allclose(weights["elbo"], (1 - expected) / expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(weights["inverse_snr"], expected**2, rtol=1e-5)


@dataclass(frozen=True)
class Weighting:
    """How errors are drawn and weighted, and by hand."""

    law: Any
    weights: Any
    by_hand: Callable[[torch.Tensor], torch.Tensor]


WEIGHTINGS = [
    Weighting("uniform", "uniform", torch.ones_like),
    Weighting("logit_normal", "velocity", torch.ones_like),
    Weighting("logit_normal", "epsilon", lambda s: (1 - s) ** 2),
    Weighting("uniform", "elbo", lambda s: (1 - s) / s),
    Weighting("uniform", "inverse_snr", lambda s: s**2),
]


def velocity_by_hand(
    name: str, network: Any, noised: torch.Tensor, s: torch.Tensor, text: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The transformer's own call, as diffusers' pipeline of the family makes it, in float64."""
    if name == "sd3":
        return network(
            noised, timestep=1000 * s, encoder_hidden_states=text["text"],
            pooled_projections=text["pooled"],
        ).sample  # fmt: skip
    if name == "sana":
        return network(
            noised, timestep=1000 * s, encoder_hidden_states=text["text"],
            encoder_attention_mask=text["mask"],
        ).sample  # fmt: skip
    rows, channels, height, width = noised.shape
    packed = FluxPipeline._pack_latents(noised, rows, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(
        rows, height // 2, width // 2, CPU, noised.dtype
    )
    out = network(
        packed, timestep=s, guidance=torch.full((rows,), 2.5, dtype=noised.dtype),
        pooled_projections=text["pooled"], encoder_hidden_states=text["text"],
        txt_ids=torch.zeros(text["text"].shape[1], 3), img_ids=places,
    ).sample  # fmt: skip
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)


@pytest.mark.quick(
    "sd3-uniform-uniform-full", "flux-logit_normal-velocity-lora",
    "sana-logit_normal-epsilon-full", "sd3-uniform-elbo-lora",
)  # fmt: skip
@KINDS
@pytest.mark.parametrize("how", WEIGHTINGS, ids=lambda how: f"{how.law}-{how.weights}")
def test_loss_and_gradient_of_a_batch_equal_the_formulas_in_float64(
    family: Family, lora: LoraSettings, how: Weighting
) -> None:
    """The rows of a batch, two of them with the same caption, and one pair without."""
    model = family.load()
    policy, reference = model.load_for_training(None, None, lora, seed=1)
    with torch.no_grad():
        for number, weight in enumerate(policy.parameters()):
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator(number)))
    pairs, rows = pairs_of(model), torch.tensor([2, 0, 3])
    draws = training_draws(
        8, num_pairs=3, num_timesteps=1000, latents_shape=model.latents_shape, law=how.law
    )
    gentle = replace(
        TRAINING,
        dpo_beta=20.0,
        draw_law=how.law,
        weights=how.weights,
        embedded_guidance=2.5 if family.name == "flux" else 1.0,
    )
    parameters = policy.trainable()
    found = batch_loss(model, policy, reference, pairs, rows, draws, gentle, torch.zeros(3).bool())
    found["loss"].backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: value.grad.clone() for name, value in policy.named_weights() if value.grad is not None
    }
    assert len(gradients) > len(parameters) / 2

    # independently: diffusers' own transformer in float64, x_s = (1 - s) x + s eps, velocity eps - x
    own = (np.arange(1, 1001) / 1000)[draws.timesteps]
    mu = 16 * 0.65 / 3840 + (0.5 - 256 * 0.65 / 3840)
    shift = math.exp(mu) if family.name == "flux" else 3.0
    s = torch.tensor(shift * own / (1 + (shift - 1) * own))
    wide = policy.network.double()
    base = family.opened().transformer.double().eval()
    text = {
        key: value[pairs.caption[rows]].double()
        if value.is_floating_point()
        else value[pairs.caption[rows]]
        for key, value in pairs.text.tensors.items()
    }

    def errors(network: Any, latents: torch.Tensor) -> torch.Tensor:
        clean, noise, share = latents[rows].double(), draws.noise.double(), s[:, None, None, None]
        noised = (1 - share) * clean + share * noise
        apart = velocity_by_hand(family.name, network, noised, s, text) - (noise - clean)
        return how.by_hand(s) * (apart**2).mean(dim=(1, 2, 3))

    with torch.no_grad():
        ours_w, ours_l = errors(base, pairs.winner), errors(base, pairs.loser)
    policy.select()
    wide.zero_grad(set_to_none=True)
    gain_w, gain_l = errors(wide, pairs.winner) - ours_w, errors(wide, pairs.loser) - ours_l
    logit = -gentle.dpo_beta / 2 * (gain_w - gain_l)
    loss = torch.log1p(torch.exp(-logit)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(logit.abs().max().detach()) > 1e-3  # the case says something
    assert found["loss"].item() == pytest.approx(loss.item(), abs=2e-5)
    assert found["winner_error"].item() == pytest.approx(gain_w.mean().item(), abs=2e-5)
    largest = max(
        float(value.grad.abs().max())
        for _, value in policy.named_weights()
        if value.grad is not None
    )
    for name, value in policy.named_weights():
        if name in gradients:
            torch.testing.assert_close(
                gradients[name].double(), value.grad, atol=2e-4 * largest, rtol=1e-3
            )


@pytest.mark.quick("sd3-float32-full", "flux-float32-lora", "sana-bfloat16-lora")
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_at_ln_2_and_leaves_the_reference_and_the_policy_is_read_back(
    family: Family, lora: LoraSettings, dtype: str, tmp_path: Path
) -> None:
    model = family.load(dtype)
    policy, _, steps = trained(model, tmp_path / "work", lora)
    assert steps[0].logit == pytest.approx(0, abs=1e-4 if dtype == "float32" else 0)
    assert steps[0].loss == pytest.approx(np.log(2), abs=1e-4)
    assert steps[-1].loss != steps[0].loss
    assert {value.dtype for value in policy.state_dict().values()} == {torch.float32}
    policy.save(tmp_path / "policy", model.denoiser_part)
    if dtype != "float32":
        return
    draws = reward_draws(
        5, num_draws=3, num_timesteps=1000, latents_shape=model.latents_shape, law="logit_normal"
    )
    latents = torch.randn((2, *model.latents_shape), generator=generator(1))
    text = model.encode_text(PROMPTS[:1])
    saved = Policy(tmp_path / "policy")
    again, base = family.load().load_denoisers(saved, None)
    found = draw_errors(model, Difference(again, base), latents, text, draws)
    expected = draw_errors(model, Difference(policy, base), latents, text, draws)
    torch.testing.assert_close(found.policy, expected.policy, atol=1e-6, rtol=1e-6)
    assert (found.policy != found.reference).any()
    same, itself = family.load().load_denoisers(saved, saved)
    equal = draw_errors(model, Difference(same, itself), latents, text, draws)
    reward = implicit_reward(
        policy_errors=equal.policy.numpy(), reference_errors=equal.reference.numpy()
    ).reward
    assert (reward == 0).all()


@pytest.mark.quick("sd3-lora")
@KINDS
def test_a_lowered_loss_of_a_fixed_batch(family: Family, lora: LoraSettings) -> None:
    model = family.load()
    policy, reference = model.load_for_training(None, None, lora, seed=1)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3 if lora.rank else 1e-4)
    draws = training_draws(8, num_pairs=4, num_timesteps=1000, latents_shape=model.latents_shape)
    losses = []
    for _ in range(4):
        measures = batch_loss(
            model, policy, reference, pairs_of(model), torch.arange(4), draws, TRAINING,
            torch.zeros(4).bool(),
        )  # fmt: skip
        losses.append(measures["loss"].item())
        optimizer.zero_grad()
        measures["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[-1] < losses[1] < losses[0]


@pytest.mark.quick("flux")
def test_a_lora_opens_in_a_fresh_pipeline_with_the_policys_images(
    family: Family, tmp_path: Path
) -> None:
    model = family.load()
    policy, _, _ = trained(model, tmp_path / "work", LORA, learning_rate=1e-2)
    policy.save(tmp_path / "policy", model.denoiser_part)
    how = {"num_inference_steps": 3, "guidance_scale": 3.0}
    found = sampled(model, policy, sampler=family.sampler, **how)
    pipeline = family.opened()
    before = family.drawn(pipeline, **how)
    pipeline.load_lora_weights(tmp_path / "policy", weight_name=LORA_FILE)
    torch.testing.assert_close(found, family.drawn(pipeline, **how), atol=1e-5, rtol=0)
    assert float((found - before).abs().max()) > 1e-3


@pytest.mark.quick("sd3-full")
@KINDS
def test_gradient_checkpointing_moves_weights_by_rounding_only(
    family: Family, lora: LoraSettings, tmp_path: Path
) -> None:
    model = family.load()
    expected, _, _ = trained(model, tmp_path / "a", lora, learning_rate=1e-5)
    policy, reference = model.load_for_training(None, None, lora, seed=1)
    Training(
        model, policy, reference, pairs_of(model), replace(TRAINING, learning_rate=1e-5),
        seed=3, work=tmp_path / "b", identity="one", processes=Processes(CPU),
        execution=Execution(gradient_checkpointing=True, micro_batch_pairs=3),
    ).run()  # fmt: skip
    weights = expected.state_dict()
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=4e-5, rtol=0)


@pytest.mark.quick("sana-derivative")
@pytest.mark.parametrize("rewards_by", ["secant", "derivative"])
def test_every_way_to_judge_agrees_with_the_difference(
    family: Family, rewards_by: Any, tmp_path: Path
) -> None:
    from stages.core.artifacts.provenance import write_manifest

    model = family.load()
    policy, _, _ = trained(model, tmp_path / "work", LORA, learning_rate=2e-5)
    folder = tmp_path / "policy"
    policy.save(folder, model.denoiser_part)
    write_manifest(folder, stage="train_seed", arguments={}, inputs=[], facts={"num_steps": 1})
    draws = reward_draws(5, num_draws=4, num_timesteps=1000, latents_shape=model.latents_shape)
    latents = torch.randn((3, *model.latents_shape), generator=generator(1))
    text = model.encode_text(PROMPTS[:1])
    gains = []
    for way in ("difference", rewards_by):
        errors = draw_errors(
            model, load_judge(model, str(folder), "base", way), latents, text, draws
        )
        gains.append((errors.reference - errors.policy).double())
    spread = float(gains[0].std())
    torch.testing.assert_close(gains[1], gains[0], atol=0.1 * spread, rtol=0)


def test_text_that_was_encoded_ahead_is_the_same_and_the_encoders_are_gone(family: Family) -> None:
    plain, model = family.load(), family.load()
    model.encode_ahead([PROMPTS[:2]])
    assert not set(model._parts) & set(model.encoder_parts)
    for found, expected in (
        (model.encode_text(PROMPTS[:2]), plain.encode_text(PROMPTS[:2])),
        (model.encode_text([""]), plain.encode_text([""])),
        (model.unconditional(), plain.unconditional()),
    ):
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found.tensors)
    assert not set(model._parts) & set(model.encoder_parts)


def test_flux_is_told_its_guidance_and_scores_without_it(families: dict[str, Family]) -> None:
    model = families["flux"].load()
    text = model.encode_text(PROMPTS[:2])
    assert text["guidance"].tolist() == [1.0, 1.0]
    assert model.tell_guidance(text, 3.5)["guidance"].tolist() == [3.5, 3.5]
    denoiser = model.load_denoiser()
    latents = torch.randn((2, *model.latents_shape), generator=generator(1))
    steps = torch.tensor([100, 800])
    one, other = (
        model.predict(denoiser, latents, steps, model.tell_guidance(text, told))
        for told in (1.0, 3.5)
    )
    assert float((one - other).abs().max()) > 1e-4
    sd3 = families["sd3"].load()
    plain = sd3.encode_text(PROMPTS[:1])
    assert sd3.tell_guidance(plain, 1.0) is plain
    with pytest.raises(ModelError, match="embedded_guidance is 3.5, but .* are told no guidance"):
        sd3.tell_guidance(plain, 3.5)
    with pytest.raises(
        ModelError, match="loss is 'mapo', which is not there for models of stable-diffusion-3"
    ):
        sd3.check_loss("mapo")


def test_flux_schnell_samples_and_is_not_trained(tmp_path: Path) -> None:
    base = flow_models.flux(tmp_path, is_schnell=True)
    family = Family("flux", base, Flux, FluxPipeline, "euler", (64, 64))
    model, how = family.load(), {"num_inference_steps": 2, "guidance_scale": 1.0}
    expected = family.drawn(family.opened(), **how)
    found = sampled(model, model.load_denoiser(), sampler="euler", **how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(
        ModelError, match=r"FLUX\.1-schnell .*says nothing of an image.*FLUX\.1-dev"
    ):
        model.load_for_training(None, None, LORA, 0)


def test_sd3_without_t5_is_given_zeros_as_by_diffusers(tmp_path: Path) -> None:
    base = flow_models.sd3(tmp_path, has_t5=False)
    family = Family(
        "sd3", base, StableDiffusion3, StableDiffusion3Pipeline, "euler",
        left_out=dict.fromkeys(("text_encoder_3", "tokenizer_3")),
    )  # fmt: skip
    model, how = family.load(), {"num_inference_steps": 2, "guidance_scale": 4.0}
    expected = family.drawn(family.opened(), **how)
    found = sampled(model, model.load_denoiser(), sampler="euler", **how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert model.num_truncated(["word " * 100, "short"]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "expected a scheduler of flow matching"),
        ({"shift": "much"}, "cannot be used by diffusers' FlowMatchEulerDiscreteScheduler"),
        ({"shift": -2.0}, "gives no noise schedule"),
        ({"invert_sigmas": True}, "has invert_sigmas"),
    ],
)
def test_a_schedule_that_is_none_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = with_scheduler(flow_models.sd3(tmp_path), {**flow_models.SD3_SCHEDULER, **changes})
    with pytest.raises(ModelError, match=message):
        load_model(settings(base), device=CPU)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_by_the_signal_to_noise_ratio_are_errors_of_noise_and_of_clean_latents(
    family: Family, power: float
) -> None:
    """Worked out from two guesses of the velocity: what each says of the noise and of x_0."""
    model = family.load()
    rng = generator(4)
    clean, noise, off = (
        torch.randn((5, 4, 8, 8), generator=rng, dtype=torch.float64) for _ in range(3)
    )
    timesteps = torch.tensor([3, 250, 500, 750, 990])
    s = model.sigmas.double()[timesteps].reshape(-1, 1, 1, 1)
    noised = (1 - s) * clean + s * noise
    guess = noise - clean + off
    errors = {
        "velocity": guess - (noise - clean),
        "noise": noised + (1 - s) * guess - noise,
        "clean": noised - s * guess - clean,
    }
    mean = {name: error.square().mean(dim=(1, 2, 3)) for name, error in errors.items()}
    ratio = ((1 - s) / s).square().flatten()
    expected = {0.0: mean["noise"], 0.5: mean["noise"] * ratio**-0.5, 1.0: mean["clean"]}[power]
    found = mean["velocity"] * model.snr_weights(power)[timesteps]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_weights_of_flow_are_refused_for_a_family_that_has_none(model: DiffusionModel) -> None:
    with pytest.raises(UserError, match="those of flow matching, and stable-diffusion has none"):
        model.error_weights("elbo")


class PowerCut(RuntimeError):
    """What breaks a training off."""


@pytest.mark.quick("sd3-full")
@KINDS
def test_a_training_that_was_killed_goes_on_and_ends_bit_identical(
    family: Family, lora: LoraSettings, tmp_path: Path
) -> None:
    def run(work: Path, stop_at: int) -> tuple[list[Any], dict[str, torch.Tensor]]:
        model, calls = family.load(), iter(range(1, 100))
        add_noise = model.add_noise

        def failing(*args: torch.Tensor) -> torch.Tensor:
            if next(calls) == stop_at:
                raise PowerCut
            return add_noise(*args)

        model.add_noise = failing  # type: ignore[method-assign]
        policy, reference = model.load_for_training(None, None, lora, seed=1)
        steps, _ = Training(
            model, policy, reference, pairs_of(model),
            replace(TRAINING, passes=4.0, caption_dropout=0.5, weights="elbo"),
            seed=3, work=work, identity="one", processes=Processes(CPU),
            execution=Execution(save_every=1),
        ).run()  # fmt: skip
        return [replace(step, pairs_per_second=0.0) for step in steps], policy.state_dict()

    unbroken, expected = run(tmp_path / "unbroken", 0)
    with pytest.raises(PowerCut):
        run(tmp_path / "work", 3)
    steps, weights = run(tmp_path / "work", 0)
    assert steps == unbroken
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_draws_of_a_batch_do_not_depend_on_its_share(families: dict[str, Family]) -> None:
    """Each pair's error is that of its own draw, whatever rows stand beside it."""
    model = families["sd3"].load()
    policy, reference = model.load_for_training(None, None, LORA, seed=1)
    pairs, rows = pairs_of(model), torch.arange(4)
    draws = training_draws(
        8, num_pairs=4, num_timesteps=1000, latents_shape=model.latents_shape, law="logit_normal"
    )
    whole = batch_loss(
        model, policy, reference, pairs, rows, draws, TRAINING, torch.zeros(4).bool()
    )
    alone = [
        batch_loss(
            model, policy, reference, pairs, rows[i : i + 1],
            Draws(draws.timesteps[i : i + 1], draws.noise[i : i + 1]), TRAINING, torch.zeros(1).bool(),
        )["loss"].item()
        for i in range(4)
    ]  # fmt: skip
    assert whole["loss"].item() == pytest.approx(np.mean(alone), abs=1e-4)
