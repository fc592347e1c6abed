"""One step of each kind of work, timed at the config's batch sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from stages.core.artifacts.images import PNG, ImageFiles, encode_image, to_pixels
from stages.core.artifacts.provenance import BASE
from stages.core.method.guidance import guided_steps
from stages.core.method.noising import reward_draws, training_draws
from stages.core.method.objective import OF_A_WHOLE_BATCH, mean_gain
from stages.core.method.sampling import sample_latents
from stages.core.method.scoring import draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.plan.costs import Rates
from stages.core.plan.run import RunPlan
from stages.core.policies.loading import load_judge
from stages.core.preflight.clock import memory, moment_bytes, seconds
from stages.core.preflight.findings import Findings
from stages.core.preflight.judge import in_precision
from stages.core.preflight.online import time_online
from stages.core.preflight.samples import PROMPTS, lora_settings, random_pairs
from stages.core.preflight.step_judge import time_step_judge
from stages.core.training.attention import without_cudnn_attention
from stages.core.training.optimizers import make_optimizer
from stages.core.training.pair_losses import batch_loss, pair_errors
from stages.core.training.settings import TrainingSettings, needs_reference
from stages.core.training.step_judge.settings import TrainableJudge


def measure(
    model: DiffusionModel,
    judge: Callable[[], TrainableJudge],
    config: Mapping[str, Any],
    findings: Findings,
) -> Rates:
    """One step of each kind of work, timed at the config's batch sizes.

    `judge` loads the step-aware preference model as it begins; it is called where the run trains one.
    """
    inference = time_inference(model, config, findings)
    precision = torch.finfo(getattr(torch, config["export"]["dtype"])).bits // 8
    others = precision * model.num_parameters()
    begun = time.perf_counter()
    denoiser = precision * sum(weight.numel() for weight in model.load_denoiser().parameters())
    loaded = time.perf_counter() - begun
    plan = RunPlan(config=config)
    online = time_online(model, config, findings) if plan.is_online else None
    step_judge = (
        time_step_judge(model, judge(), config, findings) if plan.trains_step_judge else None
    )
    model.release("vae")
    training, weights, state, caption = time_training(model, config, findings)
    return Rates(
        **asdict(inference),
        train_pair=training,
        latents_bytes=4 * math.prod(model.latents_shape),
        policy_bytes=weights,
        trained_bytes=state,
        denoiser_bytes=denoiser,
        others_bytes=others,
        caption_bytes=caption,
        load_denoiser=loaded,
        online=online,
        step_judge=step_judge,
    )


STEPS = 2
"""Of a sampler, when it is timed."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Seconds of one unit of each kind of work without a gradient; bytes of an image's files."""

    sample_image: float
    sample_candidate: float
    score_draw: float
    encode_image: float
    image_bytes: int
    candidate_bytes: int


def time_inference(
    model: DiffusionModel, config: Mapping[str, Any], findings: Findings
) -> Inference:
    """Sampling, scoring and encoding at the config's batch sizes."""
    denoiser, own = model.load_denoiser(), config["sample_candidates"]
    batch = own["candidates_per_prompt"] * config["execution"]["candidate_prompts_per_batch"]
    usual, cheap = config["sampling"], RunPlan(config=config).candidate_sampling
    some = Sampled(
        model, denoiser, model.encode_text(PROMPTS[:1]).repeat(batch), model.unconditional()
    )
    latents = some.latents(usual)
    sampled = time_sampling(some, usual)
    candidate = sampled if cheap == usual else time_sampling(some, cheap)
    decoded = model.decode_latents(latents[:1])
    decoding = seconds(model, lambda: model.decode_latents(latents[:1]))
    memory(model, "sampling and decoding", findings)
    one = latents[: own["candidates_per_prompt"]].float().cpu()
    scoring = time_scoring(model, one, config)
    memory(model, "scoring", findings)
    pixels = to_pixels(decoded.numpy())[0]
    images = torch.zeros((1, 3, *model.image_size))
    model.encode_images(images)
    return Inference(
        sample_image=sampled + decoding,
        sample_candidate=candidate + decoding,
        score_draw=scoring / (len(one) * config["score_candidates"]["num_draws"]),
        encode_image=seconds(model, lambda: model.encode_images(images)),
        image_bytes=len(encode_image(pixels, PNG)),
        candidate_bytes=len(encode_image(pixels, ImageFiles(**own["files"]))),
    )


@dataclass(frozen=True)
class Sampled:
    """A batch of one caption that is sampled in two steps, all with guidance."""

    model: DiffusionModel
    denoiser: Denoiser
    text: Conditioning
    unconditional: Conditioning

    def latents(self, sampling: Mapping[str, Any]) -> torch.Tensor:
        """As a block of the config says, save the interval of guidance."""
        return sample_latents(
            self.model, self.denoiser, text=self.text, unconditional=self.unconditional,
            seeds=list(range(len(self.text))), sampler=sampling["sampler"],
            num_inference_steps=STEPS, guidance_scale=sampling["guidance_scale"],
        )  # fmt: skip


def time_sampling(some: Sampled, sampling: Mapping[str, Any]) -> float:
    """Seconds of an image's steps: those with guidance and those without, of each kind two are taken.

    ModelError for more steps than the sampler has room for.
    """
    steps = sampling["num_inference_steps"]
    some.model.set_steps(some.model.sampler(sampling["sampler"]), steps)
    guided = len(guided_steps(steps, sampling["guidance_interval"]))
    found = 0.0
    for number, scale in ((guided, sampling["guidance_scale"]), (steps - guided, 1.0)):
        if number:
            sample = partial(some.latents, {**sampling, "guidance_scale": scale})
            sample()
            found += number * seconds(some.model, sample) / STEPS / len(some.text)
    return found


def time_scoring(model: DiffusionModel, latents: torch.Tensor, config: Mapping[str, Any]) -> float:
    """Seconds to score one prompt's candidates, as the config says."""
    settings = config["score_candidates"]
    draws = reward_draws(
        1, num_draws=settings["num_draws"],
        num_timesteps=model.num_timesteps, latents_shape=model.latents_shape, law=settings["draw_law"],
    )  # fmt: skip
    with in_precision(model, settings["dtype"]) as judging:
        judge = load_judge(judging, BASE, BASE, settings["rewards_by"])
        text, rows = judging.encode_text(PROMPTS[:1]), config["execution"]["score_rows_per_batch"]
        return seconds(
            judging,
            partial(draw_errors, judging, judge, latents, text, draws, rows_per_batch=rows),
        )


@without_cudnn_attention()
def time_training(
    model: DiffusionModel, config: Mapping[str, Any], findings: Findings
) -> tuple[float, int, int, int]:
    """(seconds a pair, bytes of a policy, of a training state, of a caption's conditioning), from one step."""
    block = {
        k: v for k, v in config["update_policy"].items() if k not in ("reference", "soft_labels")
    }
    settings = TrainingSettings(**block)
    lora = lora_settings(config)
    execution = config["execution"]
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    batch = settings.batch_pairs
    number = min(batch, execution["micro_batch_pairs"] or batch)
    per_prompt = RunPlan(config=config).pairs_per_prompt  # a batch may be of lists
    batch, number = per_prompt * batch, per_prompt * number
    pairs = random_pairs(model, number)
    model.release(*model.encoder_parts)
    parameters = policy.trainable()
    if execution["gradient_checkpointing"]:
        policy.network.enable_gradient_checkpointing()
    optimizer = make_optimizer(
        settings.optimizer, parameters, learning_rate=1e-9, weight_decay=settings.weight_decay
    )
    draws = training_draws(
        2, num_pairs=number, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    kept, rows = torch.zeros(number, dtype=torch.bool), torch.arange(number)
    compared: Denoiser | None = reference if needs_reference(settings) else None

    def micro_batch() -> None:
        gain = 0.0
        if (
            settings.loss in OF_A_WHOLE_BATCH
        ):  # a training makes this pass over a batch before the others
            with torch.no_grad(), model.autocast():
                errors = pair_errors(model, policy, compared, pairs, rows, draws, kept, settings)
            gain = float(mean_gain(errors))
        with model.autocast():
            measures = batch_loss(model, policy, compared, pairs, rows, draws, settings, kept, gain)
        measures["loss"].backward()  # type: ignore[no-untyped-call]

    micro_batch()
    optimizer.step()
    pair = seconds(model, micro_batch) / number + seconds(model, optimizer.step) / batch
    optimizer.zero_grad(set_to_none=True)
    memory(model, f"training, {number} pairs at once", findings)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    caption = sum(value[0].numel() * value.element_size() for value in pairs.text.tensors.values())
    return pair, weights, weights + moment_bytes(optimizer), caption
