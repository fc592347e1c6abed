"""A pretrained model: what no family changes, as policies, LoRA and what is kept in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import safetensors
import torch
from torch import Tensor

from stages.core.models.denoiser import Denoiser, LoraSettings
from stages.core.models.interface import Geometry, ModelFamily
from stages.core.models.loading import ModelError, Source
from stages.core.models.lora_files import read_lora
from stages.core.models.policy import Policy

MATRICES = torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d
"""Layers whose weights are held in the model's precision; norms stay in float32."""


class DiffusionModel(ModelFamily):
    """One pretrained model. Loads each part when it is first asked for."""

    has_max_sequence_length = False
    """Whether `model.max_sequence_length` says how much of a prompt is read."""

    def __init__(self, source: Source, *, device: torch.device) -> None:
        """ModelError for a max_sequence_length that the family has not."""
        length = source.settings.max_sequence_length
        if length is not None and not self.has_max_sequence_length:
            raise ModelError(
                f"{source.base}: model.max_sequence_length is {length}, but models of {self.family} read as much of "
                "a prompt as their tokenizer says; leave the key out"
            )
        self.source, self.device, self.dtype = source, device, source.dtype
        self._parts: dict[str, Any] = {}

    def finite(self, values: Tensor, what: str, remedy: str) -> Tensor:
        """The values. ModelError if one of them is not a finite number."""
        if not torch.isfinite(values).all():
            raise ModelError(
                f"{self.base}: {what} are not finite in {str(values.dtype)[6:]}. {remedy}"
            )
        return values

    def native_geometry(self, count: int) -> Geometry:
        """The geometry of images that the model itself makes: its own size, nothing cropped."""
        height, width = self.image_size
        return torch.tensor([[height, width, 0, 0, height, width]]).repeat(count, 1)

    def load_denoiser(
        self, policy: Policy | None = None, dtype: torch.dtype | None = None
    ) -> Denoiser:
        """The base's denoiser, or that of a policy; frozen, in evaluation mode."""
        if policy is not None and policy.is_lora:
            return self._adapted(self._network(dtype), policy, "policy").freeze()
        return Denoiser(self._full_network(policy, dtype))

    def load_denoisers(
        self, policy: Policy | None, reference: Policy | None
    ) -> tuple[Denoiser, Denoiser]:
        """(policy, reference), sharing one network wherever they differ by LoRA adapters at most."""
        if policy == reference:
            denoiser = self.load_denoiser(policy)
            return denoiser, denoiser
        if any(each is not None and not each.is_lora for each in (policy, reference)):
            return self.load_denoiser(policy), self.load_denoiser(reference)
        network = self._network()
        found = [
            self._adapted(network, each, name).freeze()
            for name, each in (("policy", policy), ("reference", reference))
        ]
        return found[0], found[1]

    def fused_network(self, policy: Policy | None) -> Any:
        """The policy's whole network in float32, its LoRA added into the weights."""
        denoiser = self.load_denoiser(policy, torch.float32)
        if denoiser.adapter is not None:
            denoiser.select()
            denoiser.network.fuse_lora()
            denoiser.network.unload_lora()
        return denoiser.network

    def load_for_training(
        self, initial: Policy | None, reference: Policy | None, lora: LoraSettings, seed: int
    ) -> tuple[Denoiser, Denoiser]:
        """(policy to train, frozen reference); with LoRA both share one copy of the base.

        Trained weights are float32. What is frozen is held in the model's dtype, save for the
        norms, so that under `autocast` both go through the same arithmetic. A LoRA's first matrices
        are drawn from `seed`, its second ones are 0: it starts as the base.
        ModelError if `initial` is a full fine-tune and LoRA is asked for, or the other way round, and for a
        model that cannot be trained.
        """
        self.check_trainable()
        if initial is not None and initial.is_lora != (lora.rank > 0):
            found = "a LoRA" if initial.is_lora else "a full fine-tune"
            raise ModelError(
                f"{initial} is {found}, but lora.rank is {lora.rank} (0 is a full fine-tune); a run "
                "keeps one kind from its seed training on. Set lora.rank back or start another run."
            )
        if lora.rank == 0:
            policy = Denoiser(self._training_network(initial, is_frozen=False))
            return policy, self._training_reference(reference)
        network = self._training_network(None, is_frozen=True)
        if initial is None:
            policy = self._new_lora(network, lora, seed)
        else:
            policy = self._adapted(network, initial, "policy")
        _to_float32(policy)
        if reference is None:
            frozen = Denoiser(network)
        elif reference.is_lora:
            frozen = self._adapted(network, reference, "reference")
            _to_float32(frozen)
        else:
            frozen = self._training_reference(reference)
        return policy.freeze(), frozen.freeze()

    def _training_reference(self, policy: Policy | None) -> Denoiser:
        if policy is None or not policy.is_lora:
            return Denoiser(self._training_network(policy, is_frozen=True))
        network = self._training_network(None, is_frozen=True)
        return self._adapted(network, policy, "reference").freeze()

    def _training_network(self, policy: Policy | None, *, is_frozen: bool) -> Any:
        """A full network with float32 weights; a frozen one's matrices in the model's dtype.

        They are made narrow before the device sees them: FLUX.1 in float32 alone would fill 48 GB of it.
        """
        network = self._read_full_network(policy, torch.float32)
        if is_frozen:
            for module in network.modules():
                if isinstance(module, MATRICES):
                    module.to(self.dtype)
        return self._frozen(network)

    def _new_lora(self, network: Any, lora: LoraSettings, seed: int) -> Denoiser:
        """The network seen through a fresh LoRA, the adapter "policy"."""
        from peft import LoraConfig

        targets = lora.target_modules or self.lora_targets
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                network.add_adapter(config, "policy")
            except ValueError as error:
                raise ModelError(
                    f"lora.target_modules {', '.join(targets)} fit no layer of {self.base}: {error}"
                ) from error
        return Denoiser(network, "policy")

    def _adapted(self, network: Any, policy: Policy | None, name: str) -> Denoiser:
        """The network seen through a policy's LoRA, the adapter `name`; for the base through none."""
        if policy is None:
            return Denoiser(network)
        self.add_lora(network, policy, name)
        return Denoiser(network, name)

    def add_lora(self, network: Any, policy: Policy, name: str) -> None:
        """Load a policy's LoRA as the adapter `name`. ModelError if it does not fit."""
        path = policy.lora_file
        try:
            file = read_lora(path, network.config if "lora-kohya" in self.exports else None)
            alphas = {"network_alphas": file.alphas} if file.alphas else {}
            with warnings.catch_warnings():
                # A second adapter, the reference's, is what we want.
                warnings.filterwarnings("error", "While injecting the PEFT", RuntimeWarning)
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                network.load_lora_adapter(
                    file.weights, prefix=self.denoiser_part, adapter_name=name,
                    metadata=file.metadata, **alphas,
                )  # fmt: skip
            if name not in getattr(network, "peft_config", {}):
                raise ValueError(f"it has no keys that begin with {self.denoiser_part}.")
        except (
            ValueError,
            RuntimeError,
            KeyError,
            RuntimeWarning,
            safetensors.SafetensorError,
        ) as error:
            first = str(error).strip().splitlines()[0][:400]
            raise ModelError(
                f"{path} does not fit {self.base}: {first}. A LoRA belongs to the base it was "
                "trained on; use that base, or train anew."
            ) from error
        network.to(self.device)

    def num_parameters(self) -> int:
        """Parameters of the parts that are in memory now, the denoisers aside."""
        modules = [part for part in self._parts.values() if isinstance(part, torch.nn.Module)]
        return sum(weight.numel() for module in modules for weight in module.parameters())

    def release(self, *names: str) -> None:
        """Forget parts that are no longer needed, to free their memory."""
        for name in names:
            self._parts.pop(name, None)

    def autocast(self) -> AbstractContextManager[Any]:
        """Where float32 weights are trained with `dtype` arithmetic; nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _network(self, dtype: torch.dtype | None = None) -> Any:
        return self._frozen(self.source.read(self.denoiser_part, self.denoiser_class, dtype))

    def _full_network(self, policy: Policy | None, dtype: torch.dtype | None = None) -> Any:
        """The base's network, or that of a full policy, which is known to fit the base."""
        return self._frozen(self._read_full_network(policy, dtype))

    def _read_full_network(self, policy: Policy | None, dtype: torch.dtype | None) -> Any:
        if policy is None:
            return self.source.read(self.denoiser_part, self.denoiser_class, dtype)
        source = Source(replace(self.source.settings, base=str(policy)))
        found = source.read(self.denoiser_part, self.denoiser_class, dtype)
        self._check_family(policy, found.config)
        return found

    def check_fits(self, policy: Policy) -> None:
        """ModelError if a full policy belongs to another base; its weights are not read."""
        source = Source(replace(self.source.settings, base=str(policy)))
        self._check_family(policy, source.config_of(self.denoiser_part, self.denoiser_class))

    def _check_family(self, policy: Policy, config: Mapping[str, Any]) -> None:
        expected = self.source.config_of(self.denoiser_part, self.denoiser_class)
        for key in self.same_in_family:
            ours, theirs = _plain(expected[key]), _plain(config[key])
            if ours != theirs:
                raise ModelError(
                    f"{policy}/{self.denoiser_part} has {key} = {theirs}, the base {self.base} has "
                    f"{ours}; this policy belongs to another base model"
                )

    def _latents_size(
        self, own: tuple[int, int], vae_factor: int, patch: int = 1
    ) -> tuple[int, int]:
        """Height and width of the latents: the model's own, or those of model.image_size.

        ModelError unless the image is a whole number of the VAE's pixels and the denoiser's patches.
        """
        asked = self.source.settings.image_size
        if asked is None:
            return own
        step = vae_factor * patch
        if len(asked) != 2 or any(side < step or side % step for side in asked):
            raise ModelError(
                f"{self.base}: model.image_size is {list(asked)}; expected [height, width], both multiples of "
                f"{step} pixels"
            )
        height, width = asked
        return height // vae_factor, width // vae_factor

    def _frozen(self, module: Any) -> Any:
        return module.to(self.device).eval().requires_grad_(False)

    def _load(self, name: str, kind: Any, dtype: torch.dtype | None = None) -> Any:
        if name not in self._parts:
            part = self.source.read(name, kind, dtype)
            self._parts[name] = self._frozen(part) if isinstance(part, torch.nn.Module) else part
        return self._parts[name]


def _to_float32(denoiser: Denoiser) -> None:
    """Its own weights in float32."""
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.float()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
