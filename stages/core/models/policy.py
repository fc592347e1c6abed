"""Where the weights of a policy lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.core.models.denoiser import LORA_FILE
from stages.core.models.lora_files import is_lora_file


@dataclass(frozen=True)
class Policy:
    """Trained weights in diffusers' layout: a full fine-tune, or a LoRA. None stands for the base."""

    folder: Path
    """Where they lie; also one file of them; for a full fine-tune also a hub id."""

    def __str__(self) -> str:
        """The folder, the file or the hub id."""
        return str(self.folder)

    @property
    def lora_file(self) -> Path:
        """The file of a LoRA's weights."""
        return self.folder if self.folder.is_file() else self.folder / LORA_FILE

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA; else it is a full fine-tune."""
        if self.folder.is_file():
            return is_lora_file(self.folder)
        return self.lora_file.is_file()
