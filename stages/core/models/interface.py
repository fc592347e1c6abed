"""What every model family offers to the stages: what it must decide, and what it may."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.loading import ModelError, Source

Geometry = Int[Tensor, "row six"]
"""Original height and width, top and left of the crop, target height and width, in pixels."""


class ModelFamily(ABC):
    """The interface of an adapter, one subclass a family."""

    denoiser_part: str
    """Folder of the denoiser in diffusers' layout."""
    denoiser_class: Any
    """Class of the denoiser."""
    vae_class: Any
    """Class of the VAE."""
    encoder_parts: tuple[str, ...]
    """Parts that only encoding text needs."""
    same_in_family: tuple[str, ...]
    """Keys of the denoiser's config in which a policy must agree with its base."""
    family: str
    """What the config and a model card call the family; workflow/schemas/config.schema.yaml lists what each offers."""
    samplers: tuple[str, ...]
    """Names of its samplers."""
    losses: tuple[str, ...] = ("sigmoid", "ipo", "mapo", "kto")
    """Names of the losses that its policies may be trained with."""
    exports: tuple[str, ...] = ("diffusers", "lora-diffusers", "lora-kohya", "single-file")
    """Layouts in which its policies are written for other tools."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers that a LoRA adapts unless the config names others."""

    source: Source
    device: torch.device
    dtype: torch.dtype
    """Precision of the networks."""

    @property
    def base(self) -> str:
        """How the config names the model."""
        return self.source.base

    # What a family decides

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """Length of the noise schedule."""

    @property
    @abstractmethod
    def signal_to_noise(self) -> Float[Tensor, " timestep"]:
        """How many times the signal's power is the noise's, at each timestep."""

    @property
    @abstractmethod
    def latents_shape(self) -> tuple[int, ...]:
        """Channels, height and width of the latents of one image; of a video frames too."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images this model makes."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, cut to the text encoder's length."""

    @abstractmethod
    def unconditional(self) -> Conditioning:
        """One row: what guidance moves away from."""

    @abstractmethod
    def num_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the text encoder reads."""

    @abstractmethod
    def place(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """The conditioning with each row's image size and crop, where the family uses them."""

    @abstractmethod
    def encode_images(
        self, images: Float[Tensor, "image rgb height width"]
    ) -> Float[Tensor, "image ..."]:
        """Scaled latents of images in [-1, 1]."""

    @abstractmethod
    def decode_latents(
        self, latents: Float[Tensor, "image ..."]
    ) -> Float[Tensor, "image rgb height width"]:
        """Images in [0, 1], float32, on the CPU, of scaled latents."""

    @abstractmethod
    def add_noise(
        self,
        latents: Float[Tensor, "row ..."],
        noise: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row ..."]:
        """The latents noised to their timesteps."""

    @abstractmethod
    def target(
        self,
        latents: Float[Tensor, "row ..."],
        noise: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row ..."]:
        """What the denoiser should return for the noised latents."""

    @abstractmethod
    def predict_at(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row ..."],
        times: Num[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row ..."]:
        """What the denoiser sees in the latents at some times, as the sampler counts them."""

    @abstractmethod
    def sampler(self, name: str) -> Any:
        """A fresh sampler, on this model's noise schedule. ModelError for an unknown name."""

    @abstractmethod
    def step_arguments(self, scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
        """What this sampler's step wants besides prediction, timestep and latents."""

    def check_sampler(self, name: str) -> None:
        """ModelError for a sampler that the family does not have."""
        if name not in self.samplers:
            raise ModelError(
                f"{self.base}: sampler is {name!r}; models of {self.family} have {', '.join(self.samplers)}"
            )

    def check_loss(self, name: str) -> None:
        """ModelError for a loss that means nothing for the family."""
        if name not in self.losses:
            raise ModelError(
                f"{self.base}: loss is {name!r}, which is not there for models of {self.family}; use one of "
                f"{', '.join(self.losses)}"
            )

    # What a family may decide

    @property
    def sampling_dtype(self) -> torch.dtype:
        """Precision of the latents between two sampler steps."""
        return self.dtype

    def set_steps(self, scheduler: Any, num_inference_steps: int) -> None:
        """Spread a sampler's steps over the noise schedule. ModelError for more steps than it has room for.

        Diffusers puts the first of 1,000 steps at timestep 1,000 where steps_offset is 1, past the last one, 999.
        """
        if 1 <= num_inference_steps <= self.num_timesteps:
            scheduler.set_timesteps(num_inference_steps)
            if int(scheduler.timesteps.max()) < self.num_timesteps:
                return
        offset = scheduler.config.steps_offset
        room = self.num_timesteps - (
            offset if scheduler.config.timestep_spacing == "leading" else 0
        )
        raise ModelError(
            f"{self.base}: num_inference_steps is {num_inference_steps}, but its noise schedule has the timesteps 0 to "
            f"{self.num_timesteps - 1} and begins at {offset} (steps_offset in scheduler/scheduler_config.json): take "
            f"1 to {room}"
        )

    def times(self, timesteps: Int[Tensor, " row"]) -> Num[Tensor, " row"]:
        """Timesteps, which count the rows of the noise schedule, as the denoiser is told of them."""
        return timesteps

    def predict(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row ..."]:
        """What the denoiser sees in latents that were noised to these timesteps."""
        return self.predict_at(denoiser, latents, self.times(timesteps), context)

    def guided(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row ..."],
        times: Num[Tensor, " row"],
        text: Conditioning,
        unconditional: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "row ..."]:
        """What a sampler's step goes by: here with classifier-free guidance, none where the scale is 1.

        Ho and Salimans, "Classifier-Free Diffusion Guidance", Eq. 6 in diffusers' form.
        """
        is_guided = guidance_scale != 1.0
        if not is_guided:
            return self.predict_at(denoiser, latents, times, text)
        context = unconditional.join(text)
        prediction = self.predict_at(
            denoiser, torch.cat([latents, latents]), times.repeat(2), context
        )
        without, with_text = prediction.chunk(2)
        return without + guidance_scale * (with_text - without)

    def tell_guidance(self, context: Conditioning, guidance: float) -> Conditioning:
        """The conditioning with the guidance that a distilled model is told.

        ModelError for another guidance than 1 where the family is told none.
        """
        if guidance != 1.0:
            raise ModelError(
                f"{self.base}: embedded_guidance is {guidance:g}, but models of {self.family} are told no "
                "guidance; leave it at 1"
            )
        return context

    def error_weights(self, name: str) -> Float[Tensor, " timestep"]:
        """What the denoising error counts at each timestep: 1 for 'uniform'. ModelError for others."""
        if name != "uniform":
            raise ModelError(
                f"{self.base}: weights {name!r} are those of flow matching, and {self.family} has none; use "
                "'uniform'"
            )
        return torch.ones(self.num_timesteps)

    def encode_ahead(self, batches: Iterable[Sequence[str]]) -> None:
        """Where text encoders are large: encode these batches now, keep that, and forget the encoders.

        A denoiser that is loaded after this has their memory. Other families do nothing.
        """
        return

    def check_trainable(self) -> None:
        """ModelError for a model of the family whose training would mean nothing."""
        return
