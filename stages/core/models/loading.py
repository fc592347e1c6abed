"""Where a model's parts come from: a folder in diffusers' layout, a hub id, or one checkpoint file.

Weights are read as safetensors only; nothing is ever unpickled. torch and diffusers are imported where
a part needs them: a tokenizer is had in a tenth of their time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from stages.core.models.checkpoints import (
    TRANSFORMERS,
    pipeline_of_checkpoint,
    said_by_keys,
)
from stages.core.models.checkpoints import (
    ModelError as ModelError,  # here is where it is looked for
)

if TYPE_CHECKING:
    import torch

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
READERS = {
    "StableDiffusion3Pipeline": ("tokenizer_3", 256),
    "FluxPipeline": ("tokenizer_2", 512),
    "SanaPipeline": ("tokenizer", 300),
}
"""(tokenizer, tokens) of the text encoder that reads most of a prompt, where it is not the first CLIP; the tokens are
those of diffusers' pipeline unless it is told another `max_sequence_length`."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which pretrained model, and in which precision."""

    base: str
    """A folder in diffusers' layout, a hub id, or a single .safetensors checkpoint."""
    dtype: Literal["float32", "tf32", "bfloat16", "float16"]
    """Precision of the networks; denoising errors are float32 always. 'tf32' is float32 whose products
    GPUs multiply in TF32; on a CPU it is float32."""
    vae: str | None = None
    """Another VAE instead of the model's own (a folder or hub id), as SDXL's fp16-fix."""
    config: str | None = None
    """For a single-file checkpoint: folder or hub id with the configs of the same architecture; of SD3 and FLUX,
    with all parts but the transformer."""
    compile: bool = False
    """Let torch compile the network that samples and scores; changes results by rounding."""
    family: str | None = None
    """The family that the model is known to be of, as 'sd3'; None takes the one that it names itself."""
    image_size: tuple[int, ...] | None = None
    """Height and width of images in pixels; None is the model's own size."""
    max_sequence_length: int | None = None
    """Tokens that T5 reads of a prompt, as diffusers' pipeline is told; None is the family's own number."""


class Source:
    """Reads a model's parts, one at a time and only when asked."""

    def __init__(self, settings: ModelSettings) -> None:
        """ModelError for a file that is no safetensors checkpoint, or a path that does not exist."""
        self.settings, self.base = settings, settings.base
        path = Path(self.base)
        self.is_local = path.exists()
        self.is_file = path.is_file()
        if path.suffix in PICKLES:
            raise ModelError(
                f"{self.base} is a pickle, which can run code when it is read; it is refused. "
                "Convert it to .safetensors and name that file."
            )
        if self.is_file and path.suffix != ".safetensors":
            raise ModelError(
                f"{self.base} is no model: expected a folder in diffusers' layout, a .safetensors "
                "checkpoint or a hub id"
            )
        if not self.is_local and not is_hub_id(self.base):
            raise ModelError(
                f"{self.base} does not exist; model.base must be a folder in diffusers' layout, a "
                ".safetensors checkpoint, or a hub id such as owner/name"
            )
        vae = settings.vae
        if vae and not Path(vae).exists() and not is_hub_id(vae):
            raise ModelError(
                f"model.vae {vae} does not exist; it must be the folder of a VAE, a .safetensors file or "
                "a hub id"
            )
        self._single: dict[str, Any] = {}
        self.has_denoiser_only = self.is_file and self.pipeline_class() in TRANSFORMERS.values()
        if self.has_denoiser_only and settings.config is None:
            raise ModelError(
                f"{self.base} is read as a transformer alone; name as model.config the folder or hub id of the "
                "whole model that it belongs to, whose text encoders, VAE and scheduler are taken"
            )

    @property
    def rest(self) -> str:
        """The folder or hub id of all parts but the denoiser."""
        return str(self.settings.config) if self.has_denoiser_only else self.base

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt that the text encoder of `READERS` reads."""
        return self.settings.max_sequence_length or READERS[self.pipeline_class()][1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the networks."""
        return torch_dtype(self.settings.dtype)

    def pipeline_class(self) -> str:
        """Name of diffusers' pipeline class for this model."""
        if self.is_file:
            return pipeline_of_checkpoint(Path(self.base))
        if self.is_local and not (Path(self.base) / "model_index.json").is_file():
            raise ModelError(
                f"{self.base} has no model_index.json (found: {_names(Path(self.base))}); expected "
                "a model in diffusers' layout, with unet/ or transformer/, vae/, text_encoder/, tokenizer/ "
                "and scheduler/"
            )
        name = self.index().get("_class_name")
        if not isinstance(name, str):
            raise ModelError(
                f"{self.base}: model_index.json has _class_name {name!r}; expected the pipeline's name, as "
                "StableDiffusionPipeline or StableDiffusionXLPipeline"
            )
        return name

    def index(self) -> Mapping[str, Any]:
        """What model_index.json says; empty for a single-file checkpoint of a whole model."""
        if self.is_file and not self.has_denoiser_only:
            return {}
        import diffusers

        _silence("diffusers")
        try:
            index = diffusers.DiffusionPipeline.load_config(self.rest, **self._options())
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.rest}: model_index.json cannot be read: {error}") from error
        return dict(index)

    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder that reads most of a prompt; its model_max_length says how much.

        ModelError as for any part.
        """
        from transformers import AutoTokenizer, CLIPTokenizer

        _silence("transformers")
        pipeline = self.pipeline_class()
        if pipeline in READERS:
            name, _ = READERS[pipeline]
            value = self.index().get(name)
            if isinstance(value, list | tuple) and value[0] is not None:
                found = _read(self.rest, name, AutoTokenizer, {})
                found.model_max_length = self.text_tokens
                return found
        if self.is_file and not self.has_denoiser_only:
            return self._part_of_file("tokenizer")
        return _read(self.rest, "tokenizer", CLIPTokenizer, {})

    def read(self, name: str, kind: Any, dtype: torch.dtype | None = None) -> Any:
        """One part of the model, a network in `dtype`. ModelError says which and what is wrong."""
        _silence("diffusers")
        _silence("transformers")
        if self.has_denoiser_only and name == "transformer":
            return self._transformer_of_file(kind, dtype or self.dtype)
        if self.is_file and not self.has_denoiser_only:
            return self._read_from_file(name, kind, dtype or self.dtype)
        if name == "vae" and self.settings.vae is not None:
            return self._other_vae(kind, dtype or self.dtype)
        return _read(self.rest, name, kind, _options_of(kind, dtype or self.dtype))

    def config_of(self, name: str, kind: Any) -> Mapping[str, Any]:
        """The configuration of one part, without its weights."""
        _silence("diffusers")
        if self.is_file and not self.has_denoiser_only:
            said = said_by_keys(Path(self.base)) if name == "scheduler" else {}
            config = {**self._part_of_file(name).config, **said}
            by_default = set(config.get("_use_default_values", ())) - said.keys()
            return {**config, "_use_default_values": sorted(by_default)}
        if Path(self.rest).exists():
            _folder(self.rest, name)
        place = {"pretrained_model_name_or_path": self.rest, "subfolder": name}
        if name == "vae" and self.settings.vae is not None:
            place = self._place_of_vae() or place
        try:
            return dict(kind.load_config(**place, **self._options()))
        except (OSError, ValueError) as error:
            raise _unreadable(self.rest, name, kind, error) from error

    def _transformer_of_file(self, kind: Any, dtype: torch.dtype) -> Any:
        """The transformer of a single file, by the config in `rest`."""
        try:
            return kind.from_single_file(
                self.base, config=self.rest, subfolder="transformer", torch_dtype=dtype,
                local_files_only=Path(self.rest).exists(),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{self.base} could not be read as the transformer of {self.rest}: "
                f"{str(error).splitlines()[0][:400]}. Name the model that it belongs to as model.config"
            ) from error

    def _other_vae(self, kind: Any, dtype: torch.dtype) -> Any:
        """The VAE that model.vae names: its folder, that of a model that has one, a hub id or a file."""
        named = str(self.settings.vae)
        path, place = Path(named), self._place_of_vae()
        if path.is_file():
            return self._vae_of_file(path, kind, dtype)
        inner = (place or {}).get("subfolder")
        return _read(named, inner, kind, _options_of(kind, dtype))

    def _place_of_vae(self) -> dict[str, str] | None:
        """Where model.vae's config is; None for a file, which has none."""
        named = str(self.settings.vae)
        if Path(named).is_file():
            return None
        is_inside = (Path(named) / "vae" / "config.json").is_file()
        return {"pretrained_model_name_or_path": named} | (
            {"subfolder": "vae"} if is_inside else {}
        )

    def _vae_of_file(self, path: Path, kind: Any, dtype: torch.dtype) -> Any:
        if path.suffix != ".safetensors":
            raise ModelError(f"model.vae {path} is no .safetensors file; others are refused")
        options: dict[str, Any] = {"torch_dtype": dtype}
        configs = self.settings.config if self.is_file else self.base
        if configs is not None:
            local = Path(configs).exists()
            options |= {"config": configs, "subfolder": "vae", "local_files_only": local}
        try:
            return kind.from_single_file(str(path), **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"model.vae {path} could not be read as a VAE: {error}") from error

    def _options(self) -> dict[str, Any]:
        return {"local_files_only": True} if Path(self.rest).exists() else {}

    def _read_from_file(self, name: str, kind: Any, dtype: torch.dtype) -> Any:
        """A part of a single-file checkpoint, a copy of its own for every caller."""
        import torch

        if self.settings.vae is not None and name == "vae":
            return self._other_vae(kind, dtype)
        part = self._part_of_file(name)
        if hasattr(kind, "from_config") and not isinstance(part, kind):
            return kind.from_config(part.config)  # another scheduler on the same schedule
        return copy.deepcopy(part).to(dtype) if isinstance(part, torch.nn.Module) else part

    def _part_of_file(self, name: str) -> Any:
        """A part as the checkpoint has it, in float32; the file is read once for all of them."""
        import diffusers
        import torch
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        _silence("diffusers")
        _silence("transformers")
        if not self._single:
            pipeline = getattr(diffusers, self.pipeline_class())  # slow to import: only here
            options: dict[str, Any] = {"torch_dtype": torch.float32}
            if self.settings.config is not None:
                options["config"] = self.settings.config
                options["local_files_only"] = Path(self.settings.config).exists()
            if self.settings.vae is not None:
                options["vae"] = self._other_vae(diffusers.AutoencoderKL, torch.float32)
            try:
                loaded = pipeline.from_single_file(self.base, **options)
            except SingleFileComponentError as error:
                raise ModelError(
                    f"{self.base} holds no weights of one of its parts: {str(error).splitlines()[0]} "
                    "A checkpoint without a VAE needs model.vae; one without text encoders is no base: "
                    "name a whole checkpoint, or a folder in diffusers' layout."
                ) from error
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                raise ModelError(
                    f"{self.base} could not be read as a {pipeline.__name__} checkpoint: {error}. "
                    "Without network, name a folder with the configs of the same architecture as "
                    "model.config."
                ) from error
            self._single = dict(loaded.components)
        return self._single[name]


def is_hub_id(name: str) -> bool:
    """Whether a name that does not exist here is owner/name and no path: paths begin with a folder."""
    first = name.split("/")[0]
    is_path = first in ("", ".", "..", "~") or Path(first).is_dir() or name.endswith(".safetensors")
    return name.count("/") == 1 and not is_path


def _variant_of(folder: Path) -> str | None:
    """The variant, as fp16, that a folder's weights are of where it has no others."""
    weights = [path.name for path in folder.glob("*.safetensors")]
    variants = {name.split(".")[1] for name in weights if name.count(".") == 2}
    is_whole = any(name.count(".") == 1 for name in weights)
    return variants.pop() if len(variants) == 1 and not is_whole else None


def torch_dtype(name: str) -> torch.dtype:
    """What torch calls a precision of `ModelSettings`."""
    import torch

    names = {
        "float32": torch.float32,
        "tf32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return names[name]


@cache
def _silence(library: str) -> None:
    """What diffusers or transformers say below an error, and their progress bars."""
    logging = import_module(f"{library}.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _options_of(kind: Any, dtype: torch.dtype) -> dict[str, Any]:
    """How a class of one of the two libraries is told to read safetensors in that precision."""
    import torch

    if not issubclass(kind, torch.nn.Module):
        return {}
    ours = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    return {"use_safetensors": True, ours: dtype}


def _read(base: str, name: str | None, kind: Any, options: dict[str, Any]) -> Any:
    """One component from a local folder or the hub."""
    if Path(base).exists():
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(_folder(base, name))}
        options = options | {"local_files_only": True}
        if "use_safetensors" in options and (variant := _variant_of(_folder(base, name))):
            options["variant"] = variant
    else:
        place = {"pretrained_model_name_or_path": base, **({"subfolder": name} if name else {})}
    try:
        return kind.from_pretrained(**place, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise _unreadable(base, name or "", kind, error) from error


def _folder(base: str, name: str | None) -> Path:
    """The folder of a part of a local model. ModelError says what is there instead."""
    folder = Path(base) / name if name else Path(base)
    if not folder.is_dir():
        raise ModelError(
            f"{base} has no folder {name!r} (found: {_names(Path(base))}); expected a model in "
            "diffusers' layout, with unet/ or transformer/, vae/, text_encoder/, tokenizer/ and scheduler/"
        )
    return folder


def _unreadable(base: str, name: str, kind: Any, error: Exception) -> ModelError:
    folder = Path(base) / name
    where = str(folder) if Path(base).exists() else f"{base} ({name})"
    pickles = [p.name for p in folder.glob("*") if p.suffix in PICKLES] if folder.is_dir() else []
    hint = (
        f" It holds {', '.join(pickles)}, a pickle, which is refused: save the model anew with "
        "safe_serialization=True."
        if pickles
        else " Expected a local folder in diffusers' layout with safetensors weights, or a hub id."
        if Path(base).exists()
        else f" There is no folder {base} here, so it was taken for a hub id."
    )
    return ModelError(f"{where} could not be loaded as {kind.__name__}: {error}.{hint}")


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
