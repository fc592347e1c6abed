"""A GPU gives what the CPU gives: text, images, errors, trainings; and keeps to its lease."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.core.execution.runtime import choose_device
from stages.core.method.derivative import Derivative
from stages.core.method.noising import generator, reward_draws
from stages.core.method.sampling import sample_latents
from stages.core.method.scoring import Difference, draw_errors
from stages.core.method.secant import Secant
from stages.core.models.adapter import MATRICES, DiffusionModel
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.loop import Training
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from tests import flow_models, tiny_models
from tests.builders import FULL, LORA, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU = torch.device("cpu")
PROMPTS = ["a cat in a hat", "an oil painting of a ship in a storm"]
TRAINING = TrainingSettings(
    dpo_beta=500.0,
    learning_rate=1e-4,
    batch_pairs=4,
    passes=2.0,
    warmup_share=0.0,
    gradient_clip=1.0,
    weight_decay=0.01,
    caption_dropout=0.5,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd15": tiny_models.sd15(folder / "sd15"),
        "sdxl": tiny_models.sdxl(folder / "sdxl"),
        "v": tiny_models.sd15(folder / "v", prediction_type="v_prediction"),
    }


@pytest.fixture(scope="module")
def flow_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flow-bases")
    return {name: getattr(flow_models, name)(folder / name) for name in ("sd3", "flux", "sana")}


@pytest.fixture(params=["sd15", "sdxl", "v"])
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    return bases[request.param]


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    """cuDNN rounds float32 convolutions to TF32 unless it is told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def loaded(base: Path, device: str, dtype: str = "float32") -> DiffusionModel:
    return load_model(settings(base, dtype), device=torch.device(device))


def pairs_of(model: DiffusionModel) -> EncodedPairs:
    both = torch.randn((2, 4, *model.latents_shape), generator=generator(2))
    return EncodedPairs(
        winner=both[0],
        loser=both[1],
        caption=torch.tensor([0, 1, 0, 1]),
        text=model.encode_text([*PROMPTS, ""]).to(CPU),
        winner_geometry=model.native_geometry(4),
        loser_geometry=model.native_geometry(4),
    )


def sampled(model: DiffusionModel, sampler: str) -> torch.Tensor:
    latents = sample_latents(
        model, model.load_denoiser(), text=model.encode_text(PROMPTS),
        unconditional=model.unconditional(), seeds=[5, 6], sampler=sampler,
        num_inference_steps=4, guidance_scale=5.0,
    )  # fmt: skip
    return latents.float().cpu()


def trained(
    model: DiffusionModel, work: Path, lora: LoraSettings
) -> tuple[dict[str, torch.Tensor], list[float]]:
    AcceleratorState._reset_state(True)  # one process, first on one device, then on the other
    policy, reference = model.load_for_training(None, None, lora, seed=1)
    steps, _ = Training(
        model, policy, reference, pairs_of(model), TRAINING, seed=3, work=work, identity="one",
        processes=Processes(model.device), execution=Execution(micro_batch_pairs=2),
    ).run()  # fmt: skip
    weights = {name: weight.cpu() for name, weight in policy.state_dict().items()}
    return weights, [step.loss for step in steps]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_images_equal_the_cpus(base: Path, sampler: str) -> None:
    cpu, gpu = loaded(base, "cpu"), loaded(base, "cuda")
    latents = sampled(cpu, sampler)
    torch.testing.assert_close(sampled(gpu, sampler), latents, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(
        gpu.decode_latents(latents), cpu.decode_latents(latents), atol=2e-4, rtol=0
    )
    images = torch.rand((2, 3, 64, 64), generator=generator(4)) * 2 - 1
    torch.testing.assert_close(
        gpu.encode_images(images).cpu(), cpu.encode_images(images), atol=2e-4, rtol=1e-3
    )


def test_errors_equal_the_cpus(base: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = loaded(base, device)
        draws = reward_draws(
            1, num_draws=3, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
        )
        latents = torch.randn((2, *model.latents_shape), generator=generator(0))
        denoiser, text = model.load_denoiser(), model.encode_text(PROMPTS[:1])
        found.append(
            draw_errors(model, Difference(denoiser, denoiser), latents, text, draws).policy
        )
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("float16", 0.05)])
def test_a_derivative_equals_the_cpus(base: Path, dtype: str, close: float) -> None:
    found = []
    for device, kind in (("cpu", "float32"), ("cuda", dtype)):
        model = load_model(settings(base, kind), device=torch.device(device))
        network = model.load_denoiser().network
        exact = {name: value.data.float().cpu() for name, value in network.named_parameters()}
        rng = generator(5)
        moved = {
            name: value + 1e-3 * value.std(correction=0) * torch.randn(value.shape, generator=rng)
            for name, value in exact.items()
        }
        draws = reward_draws(
            1, num_draws=3, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
        )
        latents = torch.randn((2, *model.latents_shape), generator=generator(0))
        text = model.encode_text(PROMPTS[:1])
        errors = draw_errors(model, Derivative.between(network, moved, exact), latents, text, draws)
        found.append(errors.reference - errors.policy)
    torch.testing.assert_close(found[1], found[0], atol=close * float(found[0].abs().max()), rtol=0)


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_a_training_equals_the_cpus(base: Path, lora: LoraSettings, tmp_path: Path) -> None:
    (ours, losses), (theirs, expected) = (
        trained(loaded(base, device), tmp_path / device, lora) for device in ("cuda", "cpu")
    )
    assert losses == pytest.approx(expected, rel=1e-3)
    # Adam turns a gradient near 0 into a whole step of the learning rate, up or down.
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert float(apart.max()) <= 2 * 2 * TRAINING.learning_rate
    assert float((apart > TRAINING.learning_rate / 100).float().mean()) < 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_a_training_in_half_precision_begins_at_ln_2_and_ends_finite(
    base: Path, dtype: Any, lora: LoraSettings, tmp_path: Path
) -> None:
    weights, losses = trained(loaded(base, "cuda", dtype), tmp_path, lora)
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_images_in_half_precision_are_near_the_cpus(base: Path, dtype: str) -> None:
    exact, rough = (
        sampled(loaded(base, "cpu"), "ddim"),
        sampled(loaded(base, "cuda", dtype), "ddim"),
    )
    assert float((exact - rough).square().mean() / exact.var()) < 0.01


def test_a_stage_leases_the_device() -> None:
    assert choose_device(1).type == "cuda"


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_a_compiled_network_gives_what_the_plain_one_gives(
    bases: dict[str, Path], lora: LoraSettings
) -> None:
    model = loaded(bases["sd15"], "cuda")
    policy, _ = model.load_for_training(None, None, lora, seed=1)
    inputs = (
        torch.randn((4, *model.latents_shape), generator=generator(0)).cuda(),
        torch.tensor([1, 300, 600, 999]).cuda(),
        model.encode_text(PROMPTS * 2),
    )
    with torch.no_grad():
        expected = model.predict(policy, *inputs)
        found = model.predict(policy.compile(), *inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 0.04), ("float16", 0.1)])
def test_a_secant_equals_the_cpus_difference(base: Path, dtype: str, close: float) -> None:
    cpu, gpu = loaded(base, "cpu"), loaded(base, "cuda", dtype)
    rng = generator(5)
    reference = {n: v.data.float() for n, v in cpu.load_denoiser().network.named_parameters()}
    policy = {n: v + 1e-3 * v.std(correction=0) * torch.randn(v.shape, generator=rng)
              for n, v in reference.items()}  # fmt: skip
    draws = reward_draws(
        1, num_draws=3, num_timesteps=cpu.num_timesteps, latents_shape=cpu.latents_shape
    )
    latents = torch.randn((4, *cpu.latents_shape), generator=generator(0))
    moved = cpu.load_denoiser()
    moved.network.load_state_dict(policy, strict=False)
    expected = draw_errors(
        cpu, Difference(moved, cpu.load_denoiser()), latents, cpu.encode_text(PROMPTS[:1]), draws
    )
    secant = Secant.between(gpu, policy, reference)
    found = draw_errors(gpu, secant, latents, gpu.encode_text(PROMPTS[:1]), draws)
    gains = [(each.reference - each.policy).double() for each in (expected, found)]
    assert (gains[1] - gains[0]).abs().max() < close * gains[0].abs().max()


def waits(work: Callable[[], object]) -> int:
    """How often the CPU waits for the device, by torch's own count."""
    work()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which itself warns that it is a prototype
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "sana"])
@pytest.mark.parametrize("stage", ["sampling", "scoring", "training"])
def test_no_step_waits_for_the_device(
    bases: dict[str, Path],
    flow_bases: dict[str, Path],
    name: str,
    stage: str,
    tmp_path: Path,
) -> None:
    """What waits once a call or a batch may; nothing waits once a step."""
    model = loaded({**bases, **flow_bases}[name], "cuda")
    text, denoiser = model.encode_text(PROMPTS), model.load_denoiser()
    latents = torch.randn((2, *model.latents_shape), generator=generator(0))
    sampler = "euler" if name in flow_bases else "ddim"

    def sample(steps: int) -> object:
        return sample_latents(
            model, denoiser, text=text, unconditional=model.unconditional(), seeds=[5, 6],
            sampler=sampler, num_inference_steps=steps, guidance_scale=5.0,
        )  # fmt: skip

    def score(steps: int) -> object:
        draws = reward_draws(
            1, num_draws=2 * steps, num_timesteps=model.num_timesteps,
            latents_shape=model.latents_shape,
        )  # fmt: skip
        return draw_errors(
            model, Difference(denoiser, denoiser), latents, text.rows(torch.tensor([0])), draws,
            rows_per_batch=4,
        )  # fmt: skip

    def train(steps: int) -> object:
        AcceleratorState._reset_state(True)
        policy, reference = model.load_for_training(None, None, LORA, seed=1)
        pairs = EncodedPairs(
            winner=latents, loser=latents.flip(0), caption=torch.tensor([0, 1]),
            text=model.encode_text([*PROMPTS, ""]).to(CPU),
            winner_geometry=model.native_geometry(2), loser_geometry=model.native_geometry(2),
        )  # fmt: skip
        settings = replace(TRAINING, batch_pairs=2, passes=float(steps))
        return Training(
            model, policy, reference, pairs, settings, seed=3, work=tmp_path / str(steps),
            identity="one", processes=Processes(model.device),
            execution=Execution(micro_batch_pairs=2, save_minutes=10**9),
        ).run()  # fmt: skip

    work = {"sampling": sample, "scoring": score, "training": train}[stage]
    few, many = waits(partial(work, 2)), waits(partial(work, 8))
    print(f"waits of {name} {stage}: {few} for 2 steps, {many} for 8")
    assert many - few < 6


ATTENTIONS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda each: each.name.lower())
@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sd35-medium", "flux"])
def test_a_training_step_of_the_published_width_is_finite(
    name: str, norms: torch.dtype, attention: SDPBackend
) -> None:
    """Two blocks of each kind, 1,024 x 1,024 pixels, LoRA, checkpointing, matrices in bfloat16; ours has float32 norms."""
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "sd35-medium": (SD3Transformer2DModel, {**flow_models.SD35_MEDIUM, "num_layers": 2,
                                                "dual_attention_layers": (0,)}),
        "flux": (FluxTransformer2DModel, {**flow_models.FLUX_DEV, "num_layers": 2,
                                          "num_single_layers": 2}),
    }  # fmt: skip
    kind, config = kinds[name]
    with torch.device("cuda"):
        network = kind(**config).to(norms).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, MATRICES):
            module.to(torch.bfloat16)
    network.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v"]))
    network.enable_gradient_checkpointing()
    network.train()
    rows, device = 4, torch.device("cuda")
    text = torch.randn((rows, 512, config["joint_attention_dim"]), device=device)
    pooled = torch.randn((rows, config["pooled_projection_dim"]), device=device)
    times = torch.full((rows,), 0.5, device=device)
    if name == "flux":
        inputs = {
            "hidden_states": torch.randn((rows, 4096, 64), device=device), "guidance": times,
            "img_ids": torch.zeros((4096, 3), device=device),
            "txt_ids": torch.zeros((512, 3), device=device),
        }  # fmt: skip
    else:
        inputs = {"hidden_states": torch.randn((rows, 16, 128, 128), device=device)}
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(attention):
        output = network(**inputs, encoder_hidden_states=text, pooled_projections=pooled,
                         timestep=times).sample  # fmt: skip
        output.float().square().mean().backward()
    torch.cuda.synchronize()
    gradients = [each.grad for each in network.parameters() if each.grad is not None]
    assert gradients
    assert all(each.isfinite().all() for each in gradients)
