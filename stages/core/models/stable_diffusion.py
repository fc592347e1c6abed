"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import diffusers.schedulers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stages.core.models.adapter import SAMPLERS, DiffusionModel, Geometry
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.loading import ModelError, Source
from stages.core.models.tokens import num_truncated

log = logging.getLogger(__name__)

PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
OTHER_VAE = (
    "Set model.dtype to bfloat16 or float32, or name a VAE that does not overflow as model.vae (of "
    "SDXL's: madebyollin/sdxl-vae-fp16-fix)."
)
OTHER_PRECISION = "Set model.dtype to bfloat16 or float32, or look whether the file is damaged."


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
    return {**whole, "clip_sample": clips}


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


def _normalisation(vae: AutoencoderKL) -> tuple[Tensor | float, Tensor | float]:
    """(mean, standard deviation) of a VAE's latents by channel, where its config names them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return 0.0, 1.0
    like = {"dtype": vae.dtype, "device": vae.device}
    return (
        torch.tensor(mean, **like).reshape(1, -1, 1, 1),
        torch.tensor(std, **like).reshape(1, -1, 1, 1),
    )


class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1.x and 2.x."""

    denoiser_part = "unet"
    denoiser_class = UNet2DConditionModel
    encoder_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    same_in_family: tuple[str, ...] = ("in_channels", "cross_attention_dim", "block_out_channels")

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
        return channels, size, size

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
        """Channels, height and width of the latents of one image at the model's own size."""
        return self._latents_shape

    @property
    def image_size(self) -> int:
        """Width and height in pixels of the images this model makes."""
        levels = self.source.config_of("vae", AutoencoderKL).get("block_out_channels", [64])
        if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= 10:
            raise ModelError(
                f"{self.base}: vae/config.json has block_out_channels {levels!r}; expected a list, one number "
                "a level"
            )
        return int(self._latents_shape[-1] * 2 ** (len(levels) - 1))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Last hidden states of each prompt, cut to the text encoder's length."""
        tokenizer = self._load("tokenizer", CLIPTokenizer)
        encoder = self._load("text_encoder", CLIPTextModel)
        tokens = self._tokens(tokenizer, encoder, prompts)
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

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "image rgb height width"]
    ) -> Float[Tensor, "image channel latent_height latent_width"]:
        """Scaled latents (the posterior's mode) of images in [-1, 1].

        Differs from the paper: the Diffusion-DPO code samples the posterior; its mode makes an
        encoding a function of the image alone, and the posterior is narrow.
        """
        vae = self._vae()
        posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        mean, std = _normalisation(vae)
        normalised = (posterior.mode() - mean) / std * vae.config.scaling_factor
        return self.finite(normalised.to(self.dtype), "the VAE's latents of an image", OTHER_VAE)

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "image channel latent_height latent_width"]
    ) -> Float[Tensor, "image rgb height width"]:
        """Images in [0, 1], float32, on the CPU, of scaled latents."""
        vae = self._vae()
        mean, std = _normalisation(vae)
        scaled = latents.to(self.device, vae.dtype) * std / vae.config.scaling_factor + mean
        decoded = self.finite(
            vae.decode(scaled).sample, "the images that the VAE decodes", OTHER_VAE
        )
        return (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()

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

    def predict(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The noise, or the velocity, that the denoiser sees in the latents."""
        return cast(
            Tensor, denoiser(latents, timesteps, encoder_hidden_states=context["text"]).sample
        )

    def sampler(self, name: str) -> DDPMScheduler | DDIMScheduler:
        """A fresh sampler, on this model's noise schedule. ValueError for an unknown name."""
        if name not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, found {name!r}")
        return SAMPLERS[name].from_config(self._own_schedule)

    def step_arguments(
        self, scheduler: DDPMScheduler | DDIMScheduler, generators: list[torch.Generator]
    ) -> dict[str, Any]:
        """What this sampler's step wants besides prediction, timestep and latents."""
        if isinstance(scheduler, DDIMScheduler):
            return {"eta": 0.0}
        return {"generator": generators}

    def _vae(self) -> AutoencoderKL:
        return self._load("vae", AutoencoderKL)

    def _tokens(self, tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
        """Token ids, cut to the encoder's length. ModelError for a tokenizer of another model."""
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        config = encoder.config
        if len(tokenizer) > config.vocab_size or (
            tokenizer.model_max_length > config.max_position_embeddings
        ):
            raise ModelError(
                f"{self.base}: the tokenizer has {len(tokenizer)} words and reads "
                f"{tokenizer.model_max_length} tokens, the text encoder knows {config.vocab_size} "
                f"and {config.max_position_embeddings}; they belong to different models"
            )
        return cast(Tensor, tokens.to(self.device))
