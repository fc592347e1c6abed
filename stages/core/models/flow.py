"""Flow matching: the noise schedule, velocities, samplers and weights that SD3, FLUX and Sana share.

x_s = (1 - s) x_0 + s eps, and the denoiser predicts the velocity eps - x_0 (Liu et al., "Flow Straight and
Fast"; Esser et al., "Scaling Rectified Flow Transformers", Sec. 2). A timestep is a row of a table of s, from
the cleanest: row i holds (i + 1) / num_train_timesteps after the model's own shift towards noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int, Num
from torch import Tensor

from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.interface import Geometry
from stages.core.models.loading import ModelError, Source
from stages.core.models.tokens import num_truncated

SCHEDULE = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "time_shift_type", "shift_terminal",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
)  # fmt: skip
"""What a published scheduler says of the noise, and not of how it samples."""
FLOW_WEIGHTS = ("uniform", "velocity", "epsilon", "elbo", "inverse_snr")
"""What a velocity's error may count; the first two are one."""


def flow_schedule_of(source: Source) -> dict[str, Any]:
    """The model's own noise schedule, as FlowMatchEulerDiscreteScheduler is told it.

    Multistep schedulers on flow sigmas, as Sana's, say the same by flow_shift. ModelError for a schedule that is
    none of flow matching, or whose shift is no number above 0.
    """
    config = dict(source.config_of("scheduler", FlowMatchEulerDiscreteScheduler))
    where = f"{source.base}: scheduler/scheduler_config.json"
    name = str(config.get("_class_name"))
    if config.get("use_flow_sigmas"):
        config |= {"shift": config.get("flow_shift", 1.0), "use_dynamic_shifting": False}
    elif not name.startswith("FlowMatch"):
        raise ModelError(
            f"{where} is of {name}; expected a scheduler of flow matching, as FlowMatchEulerDiscreteScheduler, or "
            "one with use_flow_sigmas. Compare it with the one of the published model"
        )
    if config.get("invert_sigmas"):
        raise ModelError(f"{where} has invert_sigmas, for which no formula here stands")
    known = {key: config[key] for key in SCHEDULE if config.get(key) is not None}
    try:
        scheduler = FlowMatchEulerDiscreteScheduler(**known)
        is_schedule = bool(((scheduler.sigmas > 0) & (scheduler.sigmas <= 1)).all())
    except Exception as error:  # diffusers raises whatever comes of a value that it did not expect
        raise ModelError(
            f"{where} cannot be used by diffusers' FlowMatchEulerDiscreteScheduler: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}. Compare it with the one of the published model"
        ) from error
    if not is_schedule or len(scheduler.sigmas) < 2:
        raise ModelError(
            f"{where} gives no noise schedule: sigmas must be above 0 and at most 1; it has shift "
            f"{config.get('shift')!r} and num_train_timesteps {config.get('num_train_timesteps')!r}"
        )
    return known


class FlowModel(DiffusionModel):
    """A model of flow matching. A family adds its text, its latents and its denoiser's call."""

    samplers: tuple[str, ...] = ("euler", "euler_stochastic")
    exports = ("diffusers", "lora-diffusers")
    losses: tuple[str, ...] = ("sigmoid", "ipo", "kto")
    """Not MaPO: its odds multiply an error of noise by the number of DDPM's timesteps."""

    def __init__(self, source: Source, *, device: torch.device) -> None:
        """ModelError if the model's schedule is none of flow matching."""
        super().__init__(source, device=device)
        self._own_schedule = flow_schedule_of(source)
        self._kept_text: dict[tuple[str, ...] | None, Conditioning] = {}

    # What a family decides

    @property
    @abstractmethod
    def image_tokens(self) -> int:
        """Patches of an image, by which a dynamic shift goes."""

    @abstractmethod
    def encode_now(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, by the text encoders."""

    def encode_unconditional(self) -> Conditioning:
        """One row, by the text encoders: what guidance moves away from."""
        return self.encode_now([""])

    # The noise

    @property
    def num_timesteps(self) -> int:
        """Rows of the noise schedule."""
        return int(self._own_schedule.get("num_train_timesteps", 1000))

    @property
    def dynamic_shift(self) -> float | None:
        """mu: the logarithm of the shift at this image size; None where the shift is a constant.

        Linear in the number of patches, as diffusers' pipelines have it.
        """
        own = self._own_schedule
        if not own.get("use_dynamic_shifting"):
            return None
        first, last = own.get("base_image_seq_len", 256), own.get("max_image_seq_len", 4096)
        low, high = own.get("base_shift", 0.5), own.get("max_shift", 1.15)
        slope = (high - low) / (last - first)
        return float(self.image_tokens * slope + (low - slope * first))

    @cached_property
    def sigmas(self) -> Float[Tensor, " timestep"]:
        """Noise levels s of the timesteps, rising to 1: the noise's share."""
        scheduler = FlowMatchEulerDiscreteScheduler(**self._own_schedule)
        rising = scheduler.sigmas.flip(0)
        if self.dynamic_shift is None:
            return cast(Tensor, rising)
        return cast(Tensor, scheduler.time_shift(self.dynamic_shift, 1.0, rising))

    def times(self, timesteps: Int[Tensor, " row"]) -> Num[Tensor, " row"]:
        """Noise levels of some timesteps on the sampler's scale, 0 to num_timesteps."""
        return self.sigmas.to(timesteps.device)[timesteps] * self.num_timesteps

    @property
    def signal_to_noise(self) -> Float[Tensor, " timestep"]:
        """((1 - s) / s)^2 at each timestep."""
        return ((1 - self.sigmas) / self.sigmas).square()

    def error_weights(self, name: str) -> Float[Tensor, " timestep"]:
        """What the velocity's squared error counts at each timestep.

        'velocity' (or 'uniform'): 1. 'epsilon': (1 - s)^2, which makes it the error of the noise, since x_s is
        given. 'elbo': (1 - s) / s, the weight of the variational bound under uniform s: half the slope of the
        log-SNR, 2 log((1 - s) / s), times (1 - s)^2 (Kingma and Gao, "Understanding Diffusion Objectives as the
        ELBO"). It is not divided by the density of s that a shift and a law of draws make. 'inverse_snr': s^2, the
        error of the clean latents (`snr_weights` at power 1). ModelError for another name.
        """
        s = self.sigmas.double()
        weights = {
            "uniform": torch.ones_like(s),
            "velocity": torch.ones_like(s),
            "epsilon": (1 - s).square(),
            "elbo": (1 - s) / s,
            "inverse_snr": s.square(),
        }
        if name not in weights:
            raise ModelError(f"weights are {name!r}; expected one of {', '.join(FLOW_WEIGHTS)}")
        return weights[name].float()

    def snr_weights(self, power: float) -> Float[Tensor, " timestep"]:
        """What the velocity's squared error counts if the noise's error counts (1/SNR)^power.

        (1 - s)^(2 - 2 power) s^(2 power). Power 0 is 'epsilon'; power 1 is s^2, the error of the clean latents,
        since x_0 = x_s - s v. Infinite at s = 1 above that.
        """
        s = self.sigmas.double()
        return ((1 - s) ** (2 - 2 * power) * s ** (2 * power)).float()

    def add_noise(
        self,
        latents: Float[Tensor, "row ..."],
        noise: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row ..."]:
        """(1 - s) of the latents and s of the noise."""
        s = self.sigmas.to(latents.device, latents.dtype)[timesteps]
        s = s.reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - s) * latents + s * noise

    def target(
        self,
        latents: Float[Tensor, "row ..."],
        noise: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row ..."]:
        """The velocity: noise minus latents.

        Differs from the paper: it knows epsilon prediction only; here the same errors are taken of velocities.
        """
        return noise - latents

    # Sampling

    def sampler(self, name: str) -> Any:
        """A fresh sampler, on this model's noise schedule. ModelError for an unknown name.

        'euler' solves the flow's equation. 'euler_stochastic' draws new noise at each step, so that one prompt's
        images differ more.
        """
        self.check_sampler(name)
        return FlowMatchEulerDiscreteScheduler(
            **self._own_schedule, stochastic_sampling=name == "euler_stochastic"
        )

    def set_steps(self, scheduler: Any, num_inference_steps: int) -> None:
        """Spread a sampler's steps over the noise schedule, as diffusers' pipeline of the family does."""
        mu = self.dynamic_shift
        scheduler.set_timesteps(num_inference_steps, **({} if mu is None else {"mu": mu}))

    def step_arguments(self, scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
        """What this sampler's step wants besides prediction, timestep and latents."""
        if getattr(scheduler.config, "stochastic_sampling", False):
            return {"generator": generators}
        return {}

    # Text

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, cut to the text encoders' length; what was encoded ahead is taken."""
        return self._text(tuple(prompts))

    def unconditional(self) -> Conditioning:
        """One row: what guidance moves away from."""
        return self._text(None)

    def encode_ahead(self, batches: Iterable[Sequence[str]]) -> None:
        """Encode these batches of prompts now, keep that on the CPU, and forget the text encoders."""
        cpu = torch.device("cpu")
        for batch in (None, ("",), *(tuple(batch) for batch in batches)):
            if batch not in self._kept_text:
                self._kept_text[batch] = self._text(batch).to(cpu)
        self.release(*self.encoder_parts)

    def _text(self, prompts: tuple[str, ...] | None) -> Conditioning:
        if prompts in self._kept_text:
            return self._kept_text[prompts].to(self.device)
        with torch.no_grad():
            return self.encode_unconditional() if prompts is None else self.encode_now(prompts)

    def num_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the text encoder reads that reads most."""
        return num_truncated(self.source.tokenizer(), prompts)

    def place(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """The conditioning as it is: these families are told nothing of an image's size."""
        return conditioning


def whole_number(config: Mapping[str, Any], key: str, where: str) -> int:
    """A number of a denoiser's config. ModelError unless it is a whole one above 0."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where} has {key} {value!r}; expected a whole number above 0")
    return value
