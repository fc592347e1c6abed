"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import diffusers.schedulers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int, Num
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.interface import Geometry
from stages.core.models.kl_vae import WithKlVae
from stages.core.models.loading import ModelError, Source
from stages.core.models.tokens import OTHER_PRECISION, clip_tokens, num_truncated

log = logging.getLogger(__name__)

SAMPLERS = {
    "ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler,
}  # fmt: skip
SOLVER = {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero", "thresholding": False,
    "variance_type": None, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_lu_lambdas": False,
}  # fmt: skip
"""DPM-Solver++ of the second order by several steps, whatever solver a model's own config names (Lu et al., 2022)."""
PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


def schedule_of(source: Source) -> dict[str, Any]:
    """The model's own noise schedule, complete: what its config leaves unsaid is as its class has it.

    Latents are not clipped unless the config asks for it: most published configs do not name
    clip_sample, and diffusers' DDPM and DDIM would clip to [-1, 1] at every step. ModelError for a
    schedule that is not DDPM's: no betas, or the sigmas of EDM or of flow matching.
    """
    config = dict(source.config_of("scheduler", DDPMScheduler))
    name = str(config.get("_class_name"))
    where = f"{source.base}: scheduler/scheduler_config.json"
    kind = getattr(diffusers.schedulers, name, None)
    known = inspect.signature(kind.__init__).parameters if kind is not None else {}
    is_flow = config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type"))
    if "beta_schedule" not in known or is_flow:
        raise ModelError(
            f"{where} is of {name}; expected a scheduler on DDPM's noise schedule, as DDIMScheduler, "
            "PNDMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler. Models of EDM and of "
            "flow matching are not Stable Diffusion 1.x, 2.x or XL as they were published"
        )
    if not {"beta_start", "beta_end", "beta_schedule"} <= config.keys() and not config.get(
        "trained_betas"
    ):
        raise ModelError(
            f"{where} has no beta_start, beta_end and beta_schedule; without them the noise that the model "
            "was trained on is not known. Stable Diffusion's are 0.00085, 0.012 and scaled_linear"
        )
    whole = dict(_built(kind, config, where).config)
    clips, spacing = config.get("clip_sample", False), whole.get("timestep_spacing", "leading")
    if not isinstance(clips, bool) or spacing not in SPACINGS:
        raise ModelError(
            f"{where} has clip_sample {clips!r} and timestep_spacing {spacing!r}; expected true or false, and "
            f"one of {', '.join(SPACINGS)}"
        )
    silent = [name for name in whole.get("_use_default_values", ()) if name != "clip_sample"]
    return {**whole, "clip_sample": clips, "_use_default_values": silent}


def _built(kind: Any, config: Mapping[str, Any], where: str) -> Any:
    """A scheduler with this config. ModelError where its class refuses it, or makes no schedule of it."""
    try:
        scheduler = kind.from_config(config)
        kept = torch.as_tensor(scheduler.alphas_cumprod).double()
        is_schedule = bool(((kept >= 0) & (kept <= 1)).all() and (kept.diff() <= 0).all())
    except Exception as error:  # diffusers raises whatever comes of a value that it did not expect
        first = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"{where} cannot be used by diffusers' {kind.__name__}: {type(error).__name__}: {first}. Compare "
            "it with the one of the published model"
        ) from error
    if not is_schedule or len(kept) != config.get("num_train_timesteps", 1000) or len(kept) < 2:
        raise ModelError(
            f"{where} gives no noise schedule: the share of the image that is kept must fall from 1 to 0 over "
            f"num_train_timesteps; it has {len(kept)} timesteps, beta_start {config.get('beta_start')!r}, "
            f"beta_end {config.get('beta_end')!r}, beta_schedule {config.get('beta_schedule')!r}"
        )
    return scheduler


def _number(config: Mapping[str, Any], key: str, where: str, default: int) -> int:
    """A whole number above 0. ModelError for anything else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where} has {key} {value!r}; expected a whole number above 0")
    return value


class StableDiffusion(WithKlVae):
    """Stable Diffusion 1.x and 2.x."""

    denoiser_part = "unet"
    denoiser_class = UNet2DConditionModel
    encoder_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    same_in_family: tuple[str, ...] = ("in_channels", "cross_attention_dim", "block_out_channels")
    family = "stable-diffusion"
    samplers = tuple(SAMPLERS)

    def __init__(self, source: Source, *, device: torch.device) -> None:
        """ModelError if the model predicts something that no formula here covers."""
        super().__init__(source, device=device)
        self._own_schedule = schedule_of(source)
        where = f"{self.base}: scheduler/scheduler_config.json"
        self._schedule = _built(DDPMScheduler, self._own_schedule, where)
        self.prediction_type = self._schedule.config.prediction_type
        if self.prediction_type not in PREDICTIONS:
            raise ModelError(
                f"{self.base}: scheduler/scheduler_config.json has prediction_type "
                f"{self.prediction_type!r}; supported are {', '.join(PREDICTIONS)}"
            )
        if self.prediction_type == "epsilon" and not self._schedule.alphas_cumprod[-1] > 0:
            raise ModelError(
                f"{self.base}: scheduler/scheduler_config.json has rescale_betas_zero_snr, by which the last "
                "timestep is pure noise, and prediction_type epsilon, by which nothing can be seen in it: "
                "one of the two is wrong. Models of zero terminal SNR predict v (v_prediction)"
            )
        self._latents_shape = self._shape_of(source.config_of("unet", UNet2DConditionModel))

    def _shape_of(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """The latents' shape by the UNet's config. ModelError for a UNet that is given more than latents."""
        where = f"{self.base}: unet/config.json"
        size = config.get("sample_size")
        channels, out = (_number(config, f"{side}_channels", where, 4) for side in ("in", "out"))
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ModelError(
                f"{where} has sample_size {size!r}; expected one number, the side of the latents: 64 for "
                "SD1.5, 128 for SDXL. Write it there"
            )
        if channels != out:
            raise ModelError(
                f"{where} has in_channels {channels} and out_channels {out}: it is "
                "also given a mask or an image, as for inpainting. Name a text-to-image model"
            )
        if config.get("time_cond_proj_dim") is not None:
            raise ModelError(
                f"{where} has time_cond_proj_dim {config['time_cond_proj_dim']}: the guidance scale is "
                "embedded in this model (LCM and its kind), which no formula here covers. Name the model "
                "that it was distilled from"
            )
        return channels, *self._latents_size((size, size), self.vae_factor)

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule."""
        return int(self._schedule.config.num_train_timesteps)

    @property
    def signal_to_noise(self) -> Float[Tensor, " timestep"]:
        """How many times the signal's power is the noise's, at each timestep."""
        signal = self._schedule.alphas_cumprod
        return cast(Tensor, signal / (1 - signal))

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image."""
        return self._latents_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images this model makes."""
        _, height, width = self._latents_shape
        return height * self.vae_factor, width * self.vae_factor

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Last hidden states of each prompt, cut to the text encoder's length."""
        tokenizer = self._load("tokenizer", CLIPTokenizer)
        encoder = self._load("text_encoder", CLIPTextModel)
        tokens = clip_tokens(self.base, tokenizer, encoder, prompts).to(self.device)
        text = self.finite(encoder(tokens)[0], "the text encoder's states", OTHER_PRECISION)
        return Conditioning({"text": text})

    def unconditional(self) -> Conditioning:
        """The empty prompt."""
        return self.encode_text([""])

    def num_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the text encoder reads."""
        return num_truncated(self._load("tokenizer", CLIPTokenizer), prompts)

    def place(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """The conditioning as it is: this family is told nothing of an image's size."""
        return conditioning

    def add_noise(
        self,
        latents: Float[Tensor, "row channel height width"],
        noise: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row channel height width"]:
        """The latents noised to their timesteps. Paper: SAIL Eq. 5, q_t(x_0)."""
        return cast(Tensor, self._schedule.add_noise(latents, noise, timesteps))

    def target(
        self,
        latents: Float[Tensor, "row channel height width"],
        noise: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row channel height width"]:
        """The noise, or the velocity of a v-prediction model.

        Differs from the paper: it knows epsilon prediction only; with v the same errors are taken
        in v's space, as diffusers' DPO script does.
        """
        if self.prediction_type == "epsilon":
            return noise
        return cast(Tensor, self._schedule.get_velocity(latents, noise, timesteps))

    def predict_at(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        times: Num[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The noise, or the velocity, that the denoiser sees in the latents."""
        return cast(Tensor, denoiser(latents, times, encoder_hidden_states=context["text"]).sample)

    def sampler(self, name: str) -> Any:
        """A fresh sampler, on this model's noise schedule. ModelError for an unknown name, or one that cannot clip."""
        self.check_sampler(name)
        if name == "dpm":
            if self._own_schedule["clip_sample"]:
                raise ModelError(
                    f"{self.base}: sampler is 'dpm', which does not clip, and scheduler/scheduler_config.json has "
                    "clip_sample true; use ddpm or ddim"
                )
            return DPMSolverMultistepScheduler.from_config(self._own_schedule, **SOLVER)
        return SAMPLERS[name].from_config(self._own_schedule)

    def set_steps(self, scheduler: Any, num_inference_steps: int) -> None:
        """See `ModelFamily`. A solver's spacing has one step more, at the cleanest end."""
        room = self.num_timesteps - 1 - scheduler.config.get("steps_offset", 0)
        if isinstance(scheduler, DPMSolverMultistepScheduler) and num_inference_steps > room:
            raise ModelError(
                f"{self.base}: num_inference_steps is {num_inference_steps}, but the sampler dpm has room for 1 to "
                f"{room} on this noise schedule"
            )
        super().set_steps(scheduler, num_inference_steps)

    def step_arguments(self, scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
        """What this sampler's step wants besides prediction, timestep and latents."""
        if isinstance(scheduler, DDIMScheduler):
            return {"eta": 0.0}
        return {"generator": generators} if isinstance(scheduler, DDPMScheduler) else {}
