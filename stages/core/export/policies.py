"""Finished policies in the layouts that diffusers, ComfyUI and A1111 open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stages.core.artifacts.provenance import policy_digest, read_manifest
from stages.core.errors import UserError
from stages.core.export.folders import link_or_copy
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LORA_FILE, LORA_METADATA
from stages.core.models.loading import ModelError, Source, torch_dtype
from stages.core.models.original_layout import checkpoint, unet_key

Format = Literal["diffusers", "lora-diffusers", "lora-kohya", "single-file"]
Dtype = Literal["float32", "bfloat16", "float16"]

PART = re.compile(r"\w[\w-]*")
NAME = re.compile(r"\w[\w .+-]*")
"""A file's name that needs no quotes and leads nowhere else."""

KEPT = (".json", ".txt", ".model", ".safetensors")
"""Endings of the base's files that a pipeline needs; a pickle is never among them."""
UNTRANSLATED = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
"""LoRA settings for which the kohya layout has no word."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A finished policy folder and the base it fits."""

    folder: Path
    model: DiffusionModel
    name: str
    """What the exported file and the card's title are called."""

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA; else it is a full fine-tune."""
        return (self.folder / LORA_FILE).is_file()

    @property
    def is_xl(self) -> bool:
        """Whether the base is of SDXL's family."""
        return "text_encoder_2" in self.model.encoder_parts

    @property
    def manifest(self) -> dict[str, Any]:
        """How it was made."""
        return read_manifest(self.folder)


def check_policy(policy: Policy, kind: Format, *, is_same_base: bool) -> None:
    """UserError unless the policy is finished, fits the base, and can be written as `kind`."""
    if not NAME.fullmatch(policy.name):
        raise UserError(
            f"--name is {policy.name!r}; expected a file's name of letters, digits, spaces and "
            "._+-, without a folder"
        )
    policy_digest(policy.folder)
    trained_on = policy.manifest.get("base")
    if trained_on not in (None, policy.model.base) and not is_same_base:
        raise UserError(
            f"{policy.folder} was trained on {trained_on}, --model.base is {policy.model.base}. "
            "Name the base it was trained on; if this is the same model in another place, add "
            "--is-same-base."
        )
    if kind.startswith("lora-") and not policy.is_lora:
        raise UserError(
            f"{policy.folder} is a full fine-tune; {kind} can only hold a LoRA (lora.rank above "
            "0). Export it as diffusers or single-file."
        )
    (_check_lora if policy.is_lora else _check_full)(policy)


def _check_full(policy: Policy) -> None:
    model = policy.model
    own = Source(replace(model.source.settings, base=str(policy.folder)))
    configs = [source.config_of(model.denoiser_part, model.denoiser_class)
               for source in (own, model.source)]  # fmt: skip
    for key in model.same_in_family:
        ours, theirs = (json.dumps(config[key]) for config in configs)
        if ours != theirs:
            raise ModelError(
                f"{policy.folder}/{model.denoiser_part} has {key} = {ours}, the base {model.base} "
                f"has {theirs}; this policy belongs to another base model"
            )


def _check_lora(policy: Policy) -> None:
    model = policy.model
    with torch.device("meta"):
        config = model.source.config_of(model.denoiser_part, model.denoiser_class)
        shapes = {
            k: v.shape for k, v in model.denoiser_class(**_public(config)).state_dict().items()
        }
    weights, _ = read_lora(policy)
    for layer in sorted({key.rpartition(".lora_")[0] for key in weights}):
        down, up = (weights.get(f"{layer}.lora_{side}.weight") for side in "AB")
        shape = shapes.get(f"{layer}.weight")
        fits = (
            shape is not None and down is not None and up is not None
            and (up.shape[0], down.shape[1]) == tuple(shape[:2])
        )  # fmt: skip
        if not fits:
            raise ModelError(
                f"{policy.folder / LORA_FILE} does not fit {model.base}: layer {layer!r} is "
                f"{'not there' if shape is None else f'of shape {tuple(shape)}'}. A LoRA belongs "
                "to the base it was trained on; use that base."
            )


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def read_lora(policy: Policy) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by layer, LoRA settings) of a policy, both without the part's prefix."""
    prefix = f"{policy.model.denoiser_part}."
    path = policy.folder / LORA_FILE
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(LORA_METADATA, "{}"))
        weights = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return weights, {key.removeprefix(prefix): value for key, value in header.items()}


def fused_network(policy: Policy) -> Any:
    """The policy's whole denoiser in float32 on the CPU, its LoRA added into the weights."""
    denoiser = policy.model.load_denoiser(policy.folder, dtype=torch.float32)
    if denoiser.adapter is not None:
        denoiser.select()
        denoiser.network.fuse_lora()
        denoiser.network.unload_lora()
    return denoiser.network


def write_diffusers(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """A whole pipeline in diffusers' layout. All that is as in the base or the policy is linked."""
    model, source = policy.model, policy.model.source
    if source.is_file:
        _write_pipeline_of_file(source, folder)
    else:
        base = Path(source.base) if source.is_local else Path(
            diffusers.DiffusionPipeline.download(source.base))  # fmt: skip
        _link_base(base, folder, without=model.denoiser_part)
    if source.settings.vae is not None:
        _replace_part(folder / "vae", source.read("vae", AutoencoderKL, torch.float32))
    target = folder / model.denoiser_part
    if policy.is_lora:
        _replace_part(target, fused_network(policy).to(dtype))
        return
    _remove_files(target)
    for file in _wanted(policy.folder / model.denoiser_part):
        link_or_copy(file, target / file.name)


def _link_base(base: Path, folder: Path, without: str) -> None:
    index: dict[str, Any] = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    index.pop("_name_or_path", None)
    for part, value in index.items():
        if not isinstance(value, list) or not value or value[0] is None or part == without:
            continue
        if not PART.fullmatch(part):
            raise ModelError(
                f"{base}/model_index.json names the part {part!r}; expected the name of a folder "
                "in it, as unet"
            )
        if not (base / part).is_dir():  # as a safety checker that was not fetched
            index[part] = [None, None]
            continue
        for file in _wanted(base / part):
            link_or_copy(file, folder / part / file.name)
    if index.get("safety_checker", [None])[0] is None and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _wanted(part: Path) -> list[Path]:
    """A part's files, without pickles and without variants such as model.fp16.safetensors."""
    return [
        file
        for file in sorted(part.iterdir())
        if file.suffix in KEPT and not (file.suffix == ".safetensors" and len(file.suffixes) > 1)
    ]


def _write_pipeline_of_file(source: Source, folder: Path) -> None:
    config = source.settings.config
    options: dict[str, Any] = {} if config is None else {
        "config": config, "local_files_only": Path(config).exists()}  # fmt: skip
    pipeline = getattr(diffusers, source.pipeline_class())
    pipeline.from_single_file(source.base, torch_dtype=torch.float32, **options).save_pretrained(
        folder, safe_serialization=True
    )


def _replace_part(folder: Path, network: Any) -> None:
    _remove_files(folder)
    network.save_pretrained(folder, safe_serialization=True)


def _remove_files(folder: Path) -> None:
    for file in folder.glob("*"):
        file.unlink()  # a link goes; the base's own file stays


def write_lora_diffusers(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """The LoRA as `load_lora_weights` finds it: the policy's own file, in its own precision."""
    link_or_copy(policy.folder / LORA_FILE, folder / LORA_FILE)


def write_lora_kohya(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """The LoRA in kohya's keys, in its own precision: a small update would be lost in float16."""
    weights, settings = read_lora(policy)
    untranslated = [name for name in UNTRANSLATED if settings.get(name)]
    if untranslated:
        raise UserError(
            f"{policy.folder / LORA_FILE} was trained with {', '.join(untranslated)}, which the "
            "kohya layout cannot say. Export it as diffusers or single-file, which fuse it."
        )
    config = policy.model.source.config_of(policy.model.denoiser_part, policy.model.denoiser_class)
    rank = next(value.shape[0] for key, value in weights.items() if ".lora_A." in key)
    alpha = float(settings.get("lora_alpha", rank))
    version, architecture = (
        ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base") if policy.is_xl
        else ("sd_v1", "stable-diffusion-v1")
    )  # fmt: skip
    safetensors.torch.save_file(
        kohya_weights(weights, alpha, config if policy.is_xl else None),
        folder / lora_file(policy),
        metadata={
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
            "ss_base_model_version": version,
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.title": policy.name,
        },
    )


def kohya_weights(
    weights: Mapping[str, Tensor], alpha: float, config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """A UNet's LoRA in kohya's keys; with SDXL's UNet config its layers go by their original names.

    kohya trains SD 1.x on diffusers' UNet and SDXL on Stability's, and each tool looks for those.
    """
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        layer, _, end = key.rpartition(".lora_")
        original = layer if config is None else unet_key(layer, config)
        name = "lora_unet_" + original.replace(".", "_")
        side = {"A.weight": "lora_down", "B.weight": "lora_up"}[end]
        found[f"{name}.{side}.weight"] = value.contiguous()
        found[f"{name}.alpha"] = torch.tensor(alpha, dtype=value.dtype)
    return found


def lora_file(policy: Policy) -> str:
    """Name of a file as ComfyUI lists it."""
    return f"{policy.name}.safetensors"


def write_single_file(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """One fused checkpoint in the original layout, every weight in `dtype`."""
    model, source = policy.model, policy.model.source
    network = fused_network(policy).to(dtype)
    if not policy.is_xl and network.config.cross_attention_dim == 1024:
        raise UserError(
            f"{model.base} is a Stable Diffusion 2.x, whose text encoder is not CLIP's; the "
            "single file is written for SD 1.x and SDXL. Export it as diffusers."
        )
    state = checkpoint(
        network.state_dict(),
        network.config,
        source.read("vae", AutoencoderKL, dtype).state_dict(),
        source.read("text_encoder", CLIPTextModel, dtype).state_dict(),
        source.read("text_encoder_2", CLIPTextModelWithProjection, dtype).state_dict()
        if policy.is_xl else None,
    )  # fmt: skip
    safetensors.torch.save_file(
        {key: value.detach().contiguous() for key, value in state.items()},
        folder / lora_file(policy),
        metadata={"format": "pt", "modelspec.title": policy.name},
    )


WRITERS: dict[Format, Callable[[Policy, Path, torch.dtype], None]] = {
    "diffusers": write_diffusers,
    "lora-diffusers": write_lora_diffusers,
    "lora-kohya": write_lora_kohya,
    "single-file": write_single_file,
}
"""How each format is written."""


def write_policy(policy: Policy, kind: Format, dtype: Dtype, folder: Path) -> None:
    """The policy as `kind`; weights that are written anew by fusing are in `dtype`."""
    WRITERS[kind](policy, folder, torch_dtype(dtype))
