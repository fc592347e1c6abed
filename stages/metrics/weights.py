"""Weight files of metrics as they are published: found, read without pickle, loaded strictly.

A scorer whose weights did not load still gives numbers. So every tensor of the network must be in the
file under its published name and shape, and every tensor of the file must be used or expected to be
left over.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.core.artifacts.provenance import digest
from stages.core.errors import UserError

Tensors = Mapping[str, Tensor]
Reader = Callable[[Path], dict[str, Tensor]]

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in a transformers folder, the preferred name first."""


READ_ERRORS = (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a network's tensor comes from in the published file."""

    name: str
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """What of the published tensor it is."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a metric's option names, and where it is published; for messages."""

    metric: str
    option: str
    address: str
    block: str = "metrics."
    """What the config's key begins with."""

    @property
    def key(self) -> str:
        """The config's key."""
        return f"{self.block}{self.metric}.{self.option}"

    def beside(self, source: str, name: str) -> Path:
        """The file `name` of a folder or hub id, or in the folder of a file that `source` names."""
        is_file = Path(source).is_file()
        return self.find(str(Path(source).parent) if is_file else source, [name])

    def find(self, source: str, names: Sequence[str]) -> Path:
        """The file that `source` names: a file, a folder with one of `names`, or a hub id with one."""
        path = Path(source)
        if path.is_file():
            return path
        if path.is_dir():
            for name in names:
                if (path / name).is_file():
                    return path / name
            raise self._missing(source, f"the folder has no {' or '.join(names)}")
        if self.is_remote(source):
            return self._download(source, names)
        raise self._missing(source, "there is no such file or folder")

    def is_remote(self, source: str) -> bool:
        """Whether `source` is a hub id, which is fetched when it is first needed."""
        path = Path(source)
        if path.exists() or path.suffix in SUFFIXES:
            return False
        return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None

    def _download(self, source: str, names: Sequence[str]) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        for name in names:
            try:
                return Path(hf_hub_download(source, name))
            except EntryNotFoundError:
                continue
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise self._missing(
                    source, f"{name} could not be had from the hub ({error})"
                ) from (error)
        raise self._missing(source, f"the hub's repository has no {' or '.join(names)}")

    def _missing(self, source: str, why: str) -> UserError:
        return UserError(
            f"{self.key} is {source!r}: {why}. Get it from {self.address} and set {self.key} to "
            "its path (relative to the project's folder) or to its hub id."
        )


def read_options(
    metric: str, given: Mapping[str, str], defaults: Mapping[str, str | None], addresses: str
) -> dict[str, str]:
    """The metric's options, defaults filled in; a default of None must be given.

    UserError names an unknown option, and one that is missing with where its file is published.
    """
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UserError(
            f"metric {metric!r} has no option {unknown[0]!r} (metrics.{metric}.{unknown[0]} in the "
            f"config); it has {', '.join(defaults)}"
        )
    options = {**defaults, **given}
    for name, value in options.items():
        if value is None:
            raise UserError(
                f"metric {metric!r} needs metrics.{metric}.{name} in the config: a path or a hub "
                f"id. It is published at {addresses}."
            )
    return {name: str(value) for name, value in options.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file, which may keep them in 'state_dict'.

    On the CPU, float32. Nothing in the file is run; UserError if it holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise _no_tensors(path, error) from error
    named = _by_name(found, path)
    return {name: value.float() if value.is_floating_point() else value for name, value in named.items()}  # fmt: skip


def read_headers(path: Path) -> dict[str, Tensor]:
    """The same tensors by name and shape alone, on the device 'meta': no weight is read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {
                    name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                    for name in file.keys()  # noqa: SIM118
                }
        found: Any = torch.load(path, map_location="meta", weights_only=True)
    except READ_ERRORS as error:
        raise _no_tensors(path, error) from error
    return _by_name(found, path)


def shape_of(tensors: Tensors, name: str, path: Path) -> tuple[int, ...]:
    """Shape of the tensor that sizes are read from; UserError if the file lacks it."""
    if name not in tensors:
        raise UserError(f"{path} has no tensor {name!r}; is it the published file?")
    return tuple(tensors[name].shape)


def count_layers(tensors: Tensors, prefix: str, width: int, published: Mapping[int, int]) -> int:
    """How many layers there should be: as in the published network of that width, if it is known.

    For other widths one more than the highest number that follows `prefix` in the names. So a
    published file that has lost its last layers is not taken for a shallower network.
    """
    if width in published:
        return published[width]
    numbers = [
        int(match[1])
        for name in tensors
        if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))
    ]
    return max(numbers, default=-1) + 1


def load_strictly(
    module: nn.Module,
    tensors: Tensors,
    path: Path,
    *,
    origin: Callable[[str], Origin] = lambda name: Origin(name=name),
    unused: Sequence[str] = (),
) -> None:
    """Fill every tensor of a module (made on the device 'meta') from a published file.

    `origin` says where each comes from; `unused` are patterns of the file's tensors that may be left.
    UserError names the tensors that are missing, left over, or of another shape.
    """
    wanted = {name: origin(name) for name in module.state_dict()}
    sources = {source.name for source in wanted.values()}
    missing = sorted(sources - set(tensors))
    extra = sorted(
        name
        for name in set(tensors) - sources
        if not any(fnmatchcase(name, pattern) for pattern in unused)
    )
    if missing or extra:
        raise UserError(
            f"{path} does not fit: missing {_few(missing)}; unexpected {_few(extra)}. A network "
            "with a tensor out of place scores noise, so it is refused; download the file again."
        )
    filled: dict[str, Tensor] = {}
    for name, expected in module.state_dict().items():
        source = wanted[name]
        value = _take(source, tensors[source.name])
        if value is None or value.shape != expected.shape:
            raise UserError(
                f"{path}: tensor {source.name!r} has shape {tuple(tensors[source.name].shape)}, "
                f"which does not fit {name} of shape {tuple(expected.shape)}; download it again"
            )
        filled[name] = value.contiguous()
    module.load_state_dict(filled, strict=True, assign=True)
    _fill_positions(module)


def ready(module: nn.Module, device: torch.device) -> nn.Module:
    """The module for scoring on the device, in float32 proper: convolutions without TF32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return module.to(device).eval().requires_grad_(False)


def spec_of(
    metric: str, options: Mapping[str, str], files: Mapping[str, Path], scale: str
) -> dict[str, Any]:
    """What made a score: files with digests, options, precision and versions; kept with the scores."""
    return {
        "metric": metric,
        "scale": scale,
        "precision": "float32",
        "options": dict(options),
        "weights": {name: digest(path) for name, path in files.items()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
        },
    }


def _by_name(found: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds {type(found).__name__}; expected tensors by name")
    return dict(found)


def _no_tensors(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is no file of plain tensors ({str(error).splitlines()[0]}). Files that would "
        "run code are not read; download it again, or convert it to .safetensors."
    )


def _take(source: Origin, tensor: Tensor) -> Tensor | None:
    try:
        return source.take(tensor)
    except (RuntimeError, ValueError, IndexError):
        return None


def _fill_positions(module: nn.Module) -> None:
    """The numbers 0, 1, 2, ... that transformers keeps beside the weights and in no file."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            assert name.endswith("position_ids"), name
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:4])) or "nothing"
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
