"""The network that is trained, and its LoRA adapters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.core.models.weight_files import save_weights

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for LoRA weights in a folder."""
LORA_METADATA = "lora_adapter_metadata"
"""The key of a LoRA file's header under which diffusers keeps rank and alpha."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters instead of a full fine-tune."""

    rank: int = 0
    """Rank of the update of each weight; 0 is a full fine-tune."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Ends of the names of the layers that are adapted; none takes the family's own."""


class Denoiser:
    """The network that is trained, seen through one of its LoRA adapters or through none.

    Several denoisers may share one network: a policy and its reference are then one copy of the
    base's weights. Each selects its adapter before it predicts.
    """

    def __init__(self, network: Any, adapter: str | None = None) -> None:
        self.network, self.adapter = network, adapter
        self.forward = network
        """What is called: the network, or what wraps it for several processes."""
        self.is_trainable = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, with this denoiser's adapter."""
        self.select()
        return self.forward(*args, **kwargs)

    def compile(self) -> Denoiser:
        """The same denoiser, whose network torch compiles for batches of its first call's size.

        Batches of other sizes, as a shard's last, go through the network as it is: compiling takes about
        as long as a hundred calls. Results differ from the plain network's by rounding.
        """
        for harmless in (
            "Dynamo detected a call to a `functools.lru_cache`",  # diffusers' test of torch's version
            "TensorFloat32 tensor cores",  # the precision is model.dtype's to say
        ):
            warnings.filterwarnings("ignore", harmless, UserWarning)
        network, compiled = self.forward, torch.compile(self.network, dynamic=False)
        rows: list[int] = []

        def forward(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not rows:
                rows.append(len(latents))
            return (compiled if rows == [len(latents)] else network)(latents, *args, **kwargs)

        self.forward = forward
        return self

    def select(self) -> None:
        """Make the network see this denoiser's adapter, or none."""
        if not getattr(self.network, "peft_config", None):
            return
        from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import: only for LoRA

        for module in self.network.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(self.adapter is not None)
                if self.adapter is not None:
                    module.set_adapter([self.adapter], inference_mode=not self.is_trainable)

    def named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The weights that belong to this denoiser alone: its adapter's, or all of the network's."""
        own = (f".lora_A.{self.adapter}.", f".lora_B.{self.adapter}.")
        for name, parameter in self.network.named_parameters():
            if self.adapter is None or any(part in name for part in own):
                yield name, parameter

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights of `named_weights`."""
        return (parameter for _, parameter in self.named_weights())

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of `named_weights` by name; the tensors themselves, no copies."""
        return {name: parameter.data for name, parameter in self.named_weights()}

    @torch.no_grad()
    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights by name into this denoiser's. KeyError if one is missing."""
        for name, parameter in self.named_weights():
            parameter.copy_(weights[name])

    def trainable(self) -> list[torch.nn.Parameter]:
        """The weights to train, in training mode and with gradients; the rest stays frozen.

        Nothing is dropped out, whatever the model's config or an adopted LoRA says: policy and reference
        would no longer be equal where they are the same, and they may share this network.
        """
        self.is_trainable = True
        self.network.requires_grad_(False).train()
        for module in self.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        parameters = list(self.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def freeze(self) -> Denoiser:
        """The same denoiser, in evaluation mode and without gradients."""
        self.is_trainable = False
        self.network.eval().requires_grad_(False)
        return self

    def save(self, folder: Path, part: str) -> None:
        """Write the full network in diffusers' layout under folder/part, or its LoRA file."""
        if self.adapter is None:
            self.network.save_pretrained(folder / part, safe_serialization=True)
            return
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.network, adapter_name=self.adapter)
        config = self.network.peft_config[self.adapter].to_dict()
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        header = {f"{part}.{key}": value for key, value in plain.items()}
        save_weights(
            {f"{part}.{key}": value for key, value in weights.items()},
            folder / LORA_FILE,
            {"format": "pt", LORA_METADATA: json.dumps(header, sort_keys=True)},
        )
