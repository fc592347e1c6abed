"""One step of each kind of an online training's work, timed at the config's batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from stages.core.method.noising import generator
from stages.core.method.trajectories import Chains, chain_schedule
from stages.core.models.adapter import DiffusionModel
from stages.core.plan.online_costs import OnlineRates
from stages.core.preflight.clock import memory, seconds
from stages.core.preflight.findings import Findings
from stages.core.preflight.samples import PROMPTS, lora_settings
from stages.core.training.attention import without_cudnn_attention
from stages.core.training.online.losses import Learner
from stages.core.training.online.settings import OnlineSettings
from stages.core.training.online.transitions import Transitions
from stages.core.training.optimizers import make_optimizer


@without_cudnn_attention()
def time_online(
    model: DiffusionModel, config: Mapping[str, Any], findings: Findings
) -> OnlineRates:
    """Seconds of a step of sampling, of a decoding, of a step that is trained on."""
    settings, execution = online_settings(config), config["execution"]
    policy, reference = model.load_for_training(None, None, lora_settings(config), seed=0)
    text = model.encode_text([PROMPTS[0]])
    chains = Chains(
        model=model, denoiser=policy, guidance_scale=settings.guidance_scale,
        schedule=chain_schedule(model, settings.num_inference_steps, settings.noise_level),
        unconditional=model.unconditional(),
    )  # fmt: skip
    rows = execution["online_prompts_per_batch"] * settings.candidates_per_prompt
    latents = torch.randn((rows, *model.latents_shape), generator=generator(3)).to(model.device)
    numbers, repeated = torch.zeros(rows, dtype=torch.int64), text.to(model.device).repeat(rows)

    def sample() -> None:
        with torch.no_grad():
            chains.step(latents, numbers, repeated)

    sample()
    sampling = seconds(model, sample) / rows
    model.decode_latents(latents[:1])
    decoding = seconds(model, lambda: model.decode_latents(latents)) / rows
    memory(model, "online sampling", findings)

    if execution["gradient_checkpointing"]:
        policy.network.enable_gradient_checkpointing()
    parameters = policy.trainable()
    optimizer = make_optimizer(
        settings.optimizer, parameters, learning_rate=1e-9, weight_decay=settings.weight_decay
    )
    learner = Learner(policy=chains, reference=chains.of(reference), settings=settings, text=text)
    batch = settings.batch_transitions
    items = some_transitions(model, settings, min(batch, execution["micro_batch_pairs"] or batch))

    def micro_batch() -> None:
        learner.losses(items)["loss"].sum().backward()  # type: ignore[no-untyped-call]

    micro_batch()
    optimizer.step()
    taken = seconds(model, micro_batch) / len(items) + seconds(model, optimizer.step) / batch
    memory(model, f"online training, {len(items)} at once", findings)
    if execution["gradient_checkpointing"]:
        policy.network.disable_gradient_checkpointing()
    return OnlineRates(
        chain_step=sampling, decode_image=decoding, trained_step=taken / items.before.shape[1]
    )


def online_settings(config: Mapping[str, Any]) -> OnlineSettings:
    """The config's block online, save who judges and where it starts."""
    block = config["online"]
    known = [field for field in fields(OnlineSettings) if field.name in block]
    values = {field.name: block[field.name] for field in known}
    values |= {field.name: float(block[field.name]) for field in known if field.type == "float"}
    return OnlineSettings(**values)


def some_transitions(model: DiffusionModel, settings: OnlineSettings, number: int) -> Transitions:
    """Steps of noise, as many as a micro-batch has; of pairs both sides."""
    sides = 1 if settings.method == "ddpo" else 2
    shape = (number, sides, *model.latents_shape)
    latents = torch.randn((2, *shape), generator=generator(4))
    places, zeros = torch.arange(number), torch.zeros(number)
    return Transitions(
        caption=torch.zeros_like(places),
        number=places % settings.num_inference_steps,
        chain=places,
        before=latents[0],
        after=latents[1],
        log_probability=zeros,
        advantage=zeros + 1,
    )
