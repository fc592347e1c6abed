"""Diffusion models behind one small interface: encode, noise, predict, decode.

Every line that knows Stable Diffusion lives in its adapter. Weights are read as safetensors only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from stages.core.errors import UserError

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()
log = logging.getLogger(__name__)

Denoiser: TypeAlias = UNet2DConditionModel
"""The network that is trained; the rest of a model stays frozen."""

SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}


class ModelError(UserError):
    """A model folder that cannot be used; the message names the folder, the part and what to do."""


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about each row of a batch."""

    text: Float[Tensor, "row token width"]

    def repeat(self, count: int) -> Conditioning:
        """The rows of this conditioning, `count` times over."""
        return Conditioning(self.text.repeat(count, 1, 1))

    def join(self, other: Conditioning) -> Conditioning:
        """The rows of this conditioning, then those of the other."""
        return Conditioning(torch.cat([self.text, other.text]))

    def rows(self, index: Int[Tensor, " chosen"]) -> Conditioning:
        """The chosen rows, in that order."""
        return Conditioning(self.text[index])


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x with epsilon prediction, in diffusers' folder layout.

    Loads each part when it is first asked for: a stage that never decodes holds no VAE.
    """

    def __init__(self, base: str, *, device: torch.device, dtype: torch.dtype) -> None:
        """`base` is a local folder or a hub id. ModelError if it is no model that we can train."""
        self.base, self.device, self.dtype = base, device, dtype
        self._parts: dict[str, Any] = {}
        scheduler = self._load("scheduler", DDPMScheduler)
        if scheduler.config.prediction_type != "epsilon":
            raise ModelError(
                f"{base}: scheduler/scheduler_config.json has prediction_type "
                f"{scheduler.config.prediction_type!r}; only 'epsilon' models are supported"
            )
        self._schedule = scheduler

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule."""
        return int(self._schedule.config.num_train_timesteps)

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image at the model's own size."""
        config = Denoiser.load_config(*self._place("unet"), **self._local())
        size = config["sample_size"]
        return (int(config["in_channels"]), int(size), int(size))

    @property
    def image_size(self) -> int:
        """Width and height in pixels of the images this model makes."""
        return self.latents_shape[-1] * int(self._vae_scale())

    def load_denoiser(self, policy: Path | None = None) -> Denoiser:
        """The base's denoiser, or the policy's whose folder is given; frozen, in eval mode."""
        if policy is None:
            denoiser = self._load("unet", UNet2DConditionModel, keep=False)
        else:
            denoiser = _read_part(str(policy), "unet", UNet2DConditionModel, self.dtype)
            expected = Denoiser.load_config(*self._place("unet"), **self._local())
            for key in ("in_channels", "cross_attention_dim", "block_out_channels"):
                found, wanted = denoiser.config[key], expected[key]
                if _plain(found) != _plain(wanted):
                    raise ModelError(
                        f"{policy}/unet has {key} = {found}, the base {self.base} has {wanted}; "
                        "this policy belongs to another base model"
                    )
        frozen = denoiser.to(self.device, self.dtype).eval().requires_grad_(False)
        return cast(Denoiser, frozen)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, cut to the text encoder's length."""
        tokenizer = self._load("tokenizer", CLIPTokenizer)
        encoder = self._load("text_encoder", CLIPTextModel)
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return Conditioning(encoder(tokens.to(self.device))[0])

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "image rgb height width"]
    ) -> Float[Tensor, "image channel latent_height latent_width"]:
        """Scaled latents (the posterior's mode) of images in [-1, 1].

        Differs from the paper: the Diffusion-DPO code samples the posterior; its mode makes an
        encoding a function of the image alone, and the posterior is narrow.
        """
        vae = self._load("vae", AutoencoderKL)
        posterior = vae.encode(images.to(self.device, self.dtype)).latent_dist
        return cast(Tensor, posterior.mode() * vae.config.scaling_factor)

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "image channel latent_height latent_width"]
    ) -> Float[Tensor, "image rgb height width"]:
        """Images in [0, 1], float32, on the CPU, of scaled latents."""
        vae = self._load("vae", AutoencoderKL)
        decoded = vae.decode(latents.to(self.device, self.dtype) / vae.config.scaling_factor).sample
        return cast(Tensor, (decoded.float().cpu() / 2 + 0.5).clamp(0, 1))

    def add_noise(
        self,
        latents: Float[Tensor, "row channel height width"],
        noise: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row channel height width"]:
        """The latents noised to their timesteps. Paper: SAIL Eq. 5, q_t(x_0)."""
        return cast(Tensor, self._schedule.add_noise(latents, noise, timesteps))

    def predict(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The noise that the denoiser sees in the latents."""
        return cast(Tensor, denoiser(latents, timesteps, encoder_hidden_states=context.text).sample)

    def sampler(self, name: str) -> DDPMScheduler | DDIMScheduler:
        """A fresh sampler, on this model's noise schedule. ValueError for an unknown name."""
        if name not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, found {name!r}")
        folder, options = self._place("scheduler"), self._local()
        return SAMPLERS[name].from_pretrained(*folder, **options)

    @staticmethod
    def step_arguments(
        scheduler: DDPMScheduler | DDIMScheduler, generators: list[torch.Generator]
    ) -> dict[str, Any]:
        """What this sampler's step wants besides prediction, timestep and latents."""
        if isinstance(scheduler, DDIMScheduler):
            return {"eta": 0.0}
        return {"generator": generators}

    def release(self, *names: str) -> None:
        """Forget parts that are no longer needed, to free their memory."""
        for name in names:
            self._parts.pop(name, None)

    def _vae_scale(self) -> int:
        config = AutoencoderKL.load_config(*self._place("vae"), **self._local())
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def _place(self, part: str) -> tuple[str]:
        if Path(self.base).exists():
            return (str(Path(self.base) / part),)
        return (self.base,)

    def _local(self) -> dict[str, Any]:
        return {"local_files_only": True} if Path(self.base).exists() else {}

    def _load(self, name: str, kind: Any, *, keep: bool = True) -> Any:
        if name not in self._parts:
            part = _read_part(self.base, name, kind, self.dtype)
            if isinstance(part, torch.nn.Module):
                part = part.to(self.device, self.dtype).eval().requires_grad_(False)
            if not keep:
                return part
            self._parts[name] = part
        return self._parts[name]


def _read_part(base: str, name: str, kind: Any, dtype: torch.dtype) -> Any:
    """One component of a model, from a local folder or the hub; ModelError says what is wrong."""
    folder = Path(base) / name
    options: dict[str, Any] = {}
    if issubclass(kind, torch.nn.Module):
        options = {"use_safetensors": True, "torch_dtype": dtype}
        if kind is CLIPTextModel:
            options = {"use_safetensors": True, "dtype": dtype}
    if Path(base).exists():
        if not folder.is_dir():
            found = ", ".join(sorted(p.name for p in Path(base).iterdir())) or "nothing"
            raise ModelError(
                f"{base} has no folder {name!r} (found: {found}); expected a model in diffusers "
                "layout, with unet/, vae/, text_encoder/, tokenizer/ and scheduler/"
            )
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
        options["local_files_only"] = True
    else:
        place = {"pretrained_model_name_or_path": base, "subfolder": name}
    try:
        return kind.from_pretrained(**place, **options)
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        where = folder if Path(base).exists() else f"{base} ({name})"
        raise ModelError(
            f"{where} could not be loaded as {kind.__name__}: {error}. Expected a local folder in "
            "diffusers layout with safetensors weights, or a hub id."
        ) from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_model(base: str, *, device: torch.device, dtype: str) -> StableDiffusion:
    """The adapter for the model at `base` (a local folder or a hub id)."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return StableDiffusion(base, device=device, dtype=dtypes[dtype])
