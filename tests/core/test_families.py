"""Stable Diffusion 1.5 and SDXL, full and LoRA: images as diffusers makes them, the loss by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from stages.core.errors import UserError
from stages.core.method.noising import generator, reward_draws, training_draws
from stages.core.method.sampling import sample_latents
from stages.core.method.scoring import Difference, draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LORA_FILE, Denoiser, LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from stages.core.models.policy import Policy
from stages.core.models.stable_diffusion import StableDiffusion
from stages.core.models.stable_diffusion_xl import StableDiffusionXL
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.loop import Training, TrainingError
from stages.core.training.optimizers import make_optimizer
from stages.core.training.pair_losses import batch_loss
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from tests import tiny_models
from tests.builders import FULL, LORA, settings

CPU = torch.device("cpu")
PROMPTS = ["a cat in a hat", "Gandalf, oil on canvas, 4k, by Rembrandt", ""]
TRAINING = TrainingSettings(
    dpo_beta=500.0,
    learning_rate=1e-3,
    batch_pairs=4,
    passes=2.0,
    warmup_share=0.0,
    gradient_clip=1.0,
    weight_decay=0.01,
    caption_dropout=0.0,
)
ROUNDED = TRAINING.dpo_beta * 2 * float(np.finfo(np.float32).eps)
"""Two units in the last place of an error: with gradients on, some CPUs' kernels round a Linear otherwise."""


@dataclass(frozen=True)
class Family:
    """A model family, with what diffusers itself calls it."""

    base: Path
    adapter: type[DiffusionModel]
    pipeline: Any

    def load(self, dtype: str = "float32") -> DiffusionModel:
        """The adapter on the CPU."""
        return load_model(settings(self.base, dtype), device=CPU)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Random models of three kinds, as folders."""
    folder = tmp_path_factory.mktemp("families")
    base = tiny_models.sd15(folder / "v", prediction_type="v_prediction")
    return {
        "sd15": Family(tiny_models.sd15(folder / "sd15"), StableDiffusion, StableDiffusionPipeline),
        "sdxl": Family(
            tiny_models.sdxl(folder / "sdxl"), StableDiffusionXL, StableDiffusionXLPipeline
        ),
        "v": Family(base, StableDiffusion, StableDiffusionPipeline),
    }


@pytest.fixture(params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    """The paper's two."""
    return families[request.param]


@pytest.fixture(params=["sd15", "sdxl", "v"])
def any_family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    """With a model that predicts velocities, as Stable Diffusion 2.1 does."""
    return families[request.param]


def pairs_of(model: DiffusionModel, count: int = 4) -> EncodedPairs:
    """Random latents with a geometry of their own for each image."""
    both = torch.randn((2, count, *model.latents_shape), generator=generator(2))
    sizes = torch.tensor([[90 + 3 * row, 80, row, 0, 64, 64] for row in range(2 * count)])
    return EncodedPairs(
        winner=both[0],
        loser=both[1],
        caption=torch.arange(count) % 2,
        text=model.encode_text(PROMPTS),
        winner_geometry=sizes[:count],
        loser_geometry=sizes[count:],
    )


def trained(
    model: DiffusionModel,
    work: Path,
    lora: LoraSettings,
    *,
    how: Execution | None = None,
    **changes: Any,
) -> tuple[Denoiser, Denoiser, list[Any]]:
    policy, reference = model.load_for_training(None, None, lora, seed=1)
    steps, _ = Training(
        model,
        policy,
        reference,
        pairs_of(model),
        replace(TRAINING, **changes),
        seed=3,
        work=work,
        identity="one",
        processes=Processes(CPU),
        execution=how or Execution(),
    ).run()
    return policy, reference, steps


def test_the_family_is_recognised(any_family: Family) -> None:
    model = any_family.load()
    assert type(model) is any_family.adapter
    assert model.latents_shape == (4, 8, 8)
    assert model.image_size == (64, 64)
    assert model.native_geometry(2).tolist() == [[64, 64, 0, 0, 64, 64]] * 2


@pytest.mark.quick("sd15-5.0-ddim", "sdxl-5.0-ddpm", "v-1.0-ddim")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_latents_and_images_equal_those_of_diffusers_own_pipeline(
    any_family: Family, sampler: str, guidance_scale: float
) -> None:
    model = any_family.load()
    pipeline = any_family.pipeline.from_pretrained(any_family.base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    kind = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    common = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    asked = {"generator": [generator(seed) for seed in (5, 6)], "output_type": "latent"}
    expected = pipeline(PROMPTS[:2], **common, **asked).images
    found = sample_latents(
        model,
        model.load_denoiser(),
        text=model.encode_text(PROMPTS[:2]),
        unconditional=model.unconditional(),
        seeds=[5, 6],
        sampler=sampler,
        **common,
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    decoded = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    images = (decoded / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode_latents(found), images.detach(), atol=1e-4, rtol=0)


@pytest.mark.quick("sd15-full", "sdxl-lora", "v-full")
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_the_loss_of_a_batch_equals_the_formulas_in_float64(
    any_family: Family, lora: LoraSettings, tmp_path: Path
) -> None:
    model = any_family.load()
    policy, reference, _ = trained(model, tmp_path / "work", lora)
    pairs, rows = pairs_of(model), torch.tensor([2, 0, 3])
    draws = training_draws(8, num_pairs=3, num_timesteps=1000, latents_shape=model.latents_shape)
    gentle = replace(TRAINING, dpo_beta=50.0)  # float32 networks are rounded; beta multiplies that
    found = batch_loss(model, policy, reference, pairs, rows, draws, gentle, torch.zeros(3).bool())
    policy.save(tmp_path / "policy", "unet")

    # independently: diffusers' own UNet and LoRA loading, formulas of the Diffusion-DPO paper
    base = UNet2DConditionModel.from_pretrained(any_family.base / "unet").double().eval()
    if lora.rank:
        pipeline = any_family.pipeline.from_pretrained(any_family.base, local_files_only=True)
        pipeline.load_lora_weights(tmp_path / "policy", weight_name=LORA_FILE)
        other = pipeline.unet.double().eval()
    else:
        other = UNet2DConditionModel.from_pretrained(tmp_path / "policy" / "unet").double().eval()
    schedule = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.tensor(np.cumprod(1 - schedule))[draws.timesteps][:, None, None, None]
    noise = draws.noise.double()
    is_v = model.sampler("ddpm").config.prediction_type == "v_prediction"

    def errors(unet: Any, latents: torch.Tensor, sizes: torch.Tensor) -> np.ndarray:
        clean = latents[rows].double()
        noised = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        target = kept.sqrt() * noise - (1 - kept).sqrt() * clean if is_v else noise
        extra: dict[str, Any] = {}
        if any_family.adapter is StableDiffusionXL:
            pooled = pairs.text["pooled"][pairs.caption[rows]].double()
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes[rows].double()}
        text = pairs.text["text"][pairs.caption[rows]].double()
        with torch.no_grad():
            out = unet(noised, draws.timesteps, encoder_hidden_states=text, **extra).sample
        return ((out - target) ** 2).mean(dim=(1, 2, 3)).numpy()

    gain_w = errors(other, pairs.winner, pairs.winner_geometry) - errors(
        base, pairs.winner, pairs.winner_geometry
    )
    gain_l = errors(other, pairs.loser, pairs.loser_geometry) - errors(
        base, pairs.loser, pairs.loser_geometry
    )
    logit = -gentle.dpo_beta / 2 * (gain_w - gain_l)
    loss = np.log1p(np.exp(-logit)).mean()
    assert abs(logit).max() > 0.01  # the case says something
    assert found["loss"].item() == pytest.approx(loss, abs=1e-5)
    assert found["winner_error"].item() == pytest.approx(gain_w.mean(), abs=1e-6)


@pytest.mark.quick("sd15-lora", "sdxl-full")
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_training_starts_at_ln_2_moves_the_policy_and_leaves_the_reference(
    any_family: Family, lora: LoraSettings, tmp_path: Path
) -> None:
    model = any_family.load()
    policy, reference, steps = trained(model, tmp_path / "work", lora)
    assert steps[0].logit == pytest.approx(0, abs=ROUNDED)
    assert steps[0].loss == pytest.approx(np.log(2), abs=ROUNDED)
    assert steps[-1].loss != steps[0].loss
    fresh = UNet2DConditionModel.from_pretrained(any_family.base / "unet").state_dict()
    if lora.rank:
        assert policy.network is reference.network  # one copy of the base in memory
        for name, value in policy.network.state_dict().items():
            if "lora_" not in name:
                assert torch.equal(value, fresh[name.replace(".base_layer", "")]), name
    else:
        assert all(torch.equal(v, fresh[k]) for k, v in reference.network.state_dict().items())
    assert any(
        float(w.abs().max()) > 0 for n, w in policy.state_dict().items() if "lora_A" not in n
    )


@pytest.mark.quick("sdxl-lora")
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_a_saved_policy_is_read_back_and_scores_as_it_was_trained(
    family: Family, lora: LoraSettings, tmp_path: Path
) -> None:
    model = family.load()
    policy, reference, _ = trained(model, tmp_path / "work", lora)
    policy.save(tmp_path / "policy", "unet")
    draws = reward_draws(5, num_draws=3, num_timesteps=1000, latents_shape=model.latents_shape)
    latents = torch.randn((2, *model.latents_shape), generator=generator(1))
    text = model.encode_text(PROMPTS[:1])
    expected = draw_errors(model, Difference(policy, reference), latents, text, draws)
    saved = Policy(tmp_path / "policy")
    again, base = family.load().load_denoisers(saved, None)
    found = draw_errors(model, Difference(again, base), latents, text, draws)
    torch.testing.assert_close(found.policy, expected.policy, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.reference, expected.reference, atol=1e-6, rtol=1e-6)
    assert (found.policy != found.reference).any()
    same, itself = family.load().load_denoisers(saved, saved)
    equal = draw_errors(model, Difference(same, itself), latents, text, draws)
    assert torch.equal(equal.policy, equal.reference)


@pytest.mark.quick("sd15-lora")
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_the_next_iteration_starts_from_the_policy_at_ln_2(
    family: Family, lora: LoraSettings, tmp_path: Path
) -> None:
    model = family.load()
    trained(model, tmp_path / "work", lora)[0].save(tmp_path / "first", "unet")
    first = Policy(tmp_path / "first")
    policy, reference = model.load_for_training(first, first, lora, 1)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    steps, _ = Training(
        model,
        policy,
        reference,
        pairs_of(model),
        TRAINING,
        seed=4,
        work=tmp_path / "next",
        identity="two",
        processes=Processes(CPU),
        execution=Execution(),
    ).run()
    assert steps[0].logit == pytest.approx(0, abs=ROUNDED)
    assert steps[0].loss == pytest.approx(np.log(2), abs=ROUNDED)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    against_base, base = model.load_for_training(first, None, lora, 1)
    steps, _ = Training(
        model,
        against_base,
        base,
        pairs_of(model),
        TRAINING,
        seed=4,
        work=tmp_path / "base",
        identity="three",
        processes=Processes(CPU),
        execution=Execution(),
    ).run()
    assert steps[0].logit != 0


@pytest.mark.quick("sd15-micro-batches-full")
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "how",
    [Execution(micro_batch_pairs=3), Execution(gradient_checkpointing=True)],
    ids=["micro-batches", "checkpointing"],
)
def test_how_a_training_runs_moves_its_weights_by_rounding_only(
    family: Family, lora: LoraSettings, how: Execution, tmp_path: Path
) -> None:
    expected, _, steps = trained(family.load(), tmp_path / "a", lora, learning_rate=1e-5)
    found, _, others = trained(family.load(), tmp_path / "b", lora, how=how, learning_rate=1e-5)
    for step, other in zip(steps, others, strict=True):
        assert other.loss == pytest.approx(step.loss, abs=2e-5)
        assert other.gradient_norm == pytest.approx(step.gradient_norm, rel=1e-2)
    weights = expected.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=4e-5, rtol=0)


@pytest.mark.quick("sdxl-lora-float16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_in_half_precision_policy_and_reference_still_start_equal_and_weights_are_float32(
    family: Family, lora: LoraSettings, dtype: str, tmp_path: Path
) -> None:
    model = family.load(dtype)
    policy, _, steps = trained(model, tmp_path / "work", lora)
    # On CPUs torch takes another float16 attention where gradients are asked for.
    assert abs(steps[0].logit) <= (0.01 if dtype == "float16" else 0.0)
    assert steps[0].loss == pytest.approx(np.log(2), abs=0.005 if dtype == "float16" else ROUNDED)
    assert steps[-1].logit != steps[0].logit
    assert {value.dtype for value in policy.state_dict().values()} == {torch.float32}


@pytest.mark.quick("sd15-lora-kto-adafactor", "sdxl-lora-ipo-adamw", "sdxl-full-mapo-adafactor")
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "mapo", "kto"])
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_every_optimizer_lowers_every_loss_of_a_fixed_batch(
    family: Family, optimizer: str, loss: str, lora: LoraSettings
) -> None:
    model = family.load()
    policy, reference = model.load_for_training(None, None, lora, seed=1)
    parameters = policy.trainable()
    rate = (1e-3 if lora.rank else 1e-5) * (0.1 if loss == "ipo" else 1)
    step = make_optimizer(optimizer, parameters, learning_rate=rate, weight_decay=0.0)  # type: ignore[arg-type]
    settings = replace(TRAINING, loss=loss)  # type: ignore[arg-type]
    draws = training_draws(8, num_pairs=4, num_timesteps=1000, latents_shape=model.latents_shape)
    losses = []
    for _ in range(6):
        measures = batch_loss(
            model,
            policy,
            reference,
            pairs_of(model),
            torch.arange(4),
            draws,
            settings,
            torch.zeros(4).bool(),
        )
        losses.append(measures["loss"].item())
        step.zero_grad()
        measures["loss"].backward()  # type: ignore[no-untyped-call]
        step.step()
    assert losses[-1] < losses[1] < losses[0]


def test_adamw8bit_without_bitsandbytes_says_what_to_install() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            make_optimizer("adamw8bit", [weight], learning_rate=1e-3, weight_decay=0.0)
    else:
        assert make_optimizer("adamw8bit", [weight], learning_rate=1e-3, weight_decay=0.0)


@pytest.mark.quick("sd15")
def test_float16_that_overflows_stops_with_what_to_do(family: Family, tmp_path: Path) -> None:
    model = family.load("float16")
    policy, reference = model.load_for_training(None, None, FULL, seed=1)
    with torch.no_grad():
        policy.network.conv_out.weight.mul_(1e6)  # past 65504
    with pytest.raises(TrainingError, match="loss nan.*No policy was written.*dtype float32"):
        Training(
            model,
            policy,
            reference,
            pairs_of(model),
            TRAINING,
            seed=3,
            work=tmp_path / "work",
            identity="one",
            processes=Processes(CPU),
            execution=Execution(),
        ).run()


@pytest.mark.quick("sd15")
def test_an_average_of_the_weights_is_not_the_last_weights(family: Family, tmp_path: Path) -> None:
    last, _, _ = trained(family.load(), tmp_path / "a", LORA)
    average, _, _ = trained(family.load(), tmp_path / "b", LORA, ema_decay=0.9)
    weights = last.state_dict()
    assert any(
        not torch.equal(value, weights[name]) for name, value in average.state_dict().items()
    )


@pytest.mark.quick("sd15")
def test_a_lora_of_another_base_is_refused(family: Family, tmp_path: Path) -> None:
    trained(family.load(), tmp_path / "work", LORA)[0].save(tmp_path / "policy", "unet")
    other = tiny_models.sd15(tmp_path / "other")
    unet = UNet2DConditionModel.from_config(
        {
            **UNet2DConditionModel.load_config(other / "unet"),
            "cross_attention_dim": 40,
            "block_out_channels": (8, 16, 16, 16),
        }
    )
    unet.save_pretrained(other / "unet")
    with pytest.raises(ModelError, match="does not fit .*A LoRA belongs to the base"):
        load_model(settings(other), device=CPU).load_denoiser(Policy(tmp_path / "policy"))


@pytest.mark.quick("sd15")
def test_a_run_keeps_one_kind_of_training(family: Family, tmp_path: Path) -> None:
    model = family.load()
    trained(model, tmp_path / "work", LORA)[0].save(tmp_path / "policy", "unet")
    with pytest.raises(ModelError, match="is a LoRA, but lora.rank is 0"):
        model.load_for_training(Policy(tmp_path / "policy"), None, FULL, 0)
    trained(model, tmp_path / "work2", FULL)[0].save(tmp_path / "full", "unet")
    with pytest.raises(ModelError, match="is a full fine-tune, but lora.rank is 4"):
        model.load_for_training(Policy(tmp_path / "full"), None, LORA, 0)


def test_lora_targets_that_fit_nothing_are_named(family: Family) -> None:
    with pytest.raises(ModelError, match="lora.target_modules nowhere fit no layer"):
        family.load().load_for_training(None, None, replace(LORA, target_modules=("nowhere",)), 0)


def test_a_long_prompt_is_cut_and_counted(family: Family) -> None:
    model = family.load()
    prompts = ["word " * 400, "short"]
    assert model.num_truncated(prompts) == 1
    assert model.encode_text(prompts)["text"].shape[:2] == (2, 77)


@pytest.mark.quick("sd15-full", "sdxl-lora")
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_nothing_is_dropped_out_in_a_training(
    family: Family, lora: LoraSettings, tmp_path: Path
) -> None:
    """Whatever an adopted LoRA's file or the UNet's config says: policy and reference begin equal."""
    model = family.load()
    policy, _ = model.load_for_training(None, None, lora, 1)
    for module in policy.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if lora.rank and hasattr(module, "lora_dropout"):
            module.lora_dropout["policy"] = torch.nn.Dropout(0.5)
    with torch.no_grad():
        for name, weight in policy.named_weights():
            if "lora_B" in name:
                weight.fill_(0.01)
    policy.trainable()
    latents = torch.randn((2, *model.latents_shape), generator=generator(1))
    text = model.encode_text(["a cat", "a dog"])
    steps = torch.tensor([10, 900])
    with torch.no_grad():
        once, again = (model.predict(policy, latents, steps, text) for _ in range(2))
    assert policy.network.training
    assert torch.equal(once, again)
