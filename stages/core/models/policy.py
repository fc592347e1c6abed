"""Where the weights of a policy lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.core.models.denoiser import LORA_FILE


@dataclass(frozen=True)
class Policy:
    """Trained weights in diffusers' layout: a full fine-tune, or a LoRA. None stands for the base."""

    folder: Path
    """Where they lie; for a full fine-tune also a hub id."""

    def __str__(self) -> str:
        """The folder, or the hub id."""
        return str(self.folder)

    @property
    def lora_file(self) -> Path:
        """The file of a LoRA's weights."""
        return self.folder / LORA_FILE

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA; else it is a full fine-tune."""
        return self.lora_file.is_file()
