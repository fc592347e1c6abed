"""Finished policies in the layouts that diffusers, ComfyUI and A1111 open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import safetensors
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stages.core.artifacts.provenance import policy_digest, read_manifest
from stages.core.errors import UserError
from stages.core.export.folders import link_or_copy
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LORA_FILE, LORA_METADATA
from stages.core.models.loading import ModelError, Source, torch_dtype
from stages.core.models.original_layout import checkpoint, marks, unet_key
from stages.core.models.policy import Policy
from stages.core.models.weight_files import save_weights

Format = Literal["diffusers", "lora-diffusers", "lora-kohya", "single-file"]
Dtype = Literal["float32", "bfloat16", "float16"]

PART = re.compile(r"\w[\w-]*")
NAME = re.compile(r"\w[\w .+-]*")
"""A file's name that needs no quotes and leads nowhere else."""

KEPT = (".json", ".txt", ".model", ".safetensors")
"""Endings of the base's files that a pipeline needs; a pickle is never among them."""
OPTIONAL = ("safety_checker", "image_encoder", "feature_extractor")
"""Parts that a pipeline opens without."""
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".h5")
SD2_TEXT_WIDTH = 1024
"""Width of the text encoder by which Stable Diffusion 2.x is known."""
UNTRANSLATED = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
"""LoRA settings for which the kohya layout has no word."""


@dataclass(frozen=True, kw_only=True)
class ExportedPolicy(Policy):
    """A finished policy with the base it fits."""

    model: DiffusionModel
    name: str
    """What the exported file and the card's title are called."""

    @property
    def is_xl(self) -> bool:
        """Whether the base is of SDXL's family."""
        return self.model.family == "stable-diffusion-xl"

    @property
    def manifest(self) -> dict[str, Any]:
        """How it was made."""
        return read_manifest(self.folder)


def check_policy(policy: ExportedPolicy, kind: Format, *, is_same_base: bool) -> None:
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
    if kind not in policy.model.exports:
        raise UserError(
            f"--format is {kind}, which is not there for models of {policy.model.family}: no published layout of "
            f"that kind was compared with. Export it as {' or '.join(policy.model.exports)}."
        )
    if kind.startswith("lora-") and not policy.is_lora:
        raise UserError(
            f"{policy.folder} is a full fine-tune; {kind} can only hold a LoRA (lora.rank above "
            "0). Export it as diffusers or single-file."
        )
    if policy.is_lora:
        _check_lora(policy)
    else:
        policy.model.check_fits(policy)


def _check_lora(policy: ExportedPolicy) -> None:
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
            shape is not None
            and down is not None
            and up is not None
            and (up.shape[0], down.shape[1]) == tuple(shape[:2])
        )
        if not fits:
            raise ModelError(
                f"{policy.lora_file} does not fit {model.base}: layer {layer!r} is "
                f"{'not there' if shape is None else f'of shape {tuple(shape)}'}. A LoRA belongs "
                "to the base it was trained on; use that base."
            )


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def read_lora(policy: ExportedPolicy) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by layer, LoRA settings) of a policy, both without the part's prefix."""
    prefix = f"{policy.model.denoiser_part}."
    path = policy.lora_file
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(LORA_METADATA, "{}"))
        weights = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return weights, {key.removeprefix(prefix): value for key, value in header.items()}


def write_diffusers(policy: ExportedPolicy, folder: Path, dtype: torch.dtype) -> None:
    """A whole pipeline in diffusers' layout. All that is as in the base or the policy is linked."""
    model, source = policy.model, policy.model.source
    if source.is_file and not source.has_denoiser_only:
        _write_pipeline_of_file(source, folder)
    else:
        base = Path(source.rest)
        if not base.exists():
            base = Path(diffusers.DiffusionPipeline.download(source.rest))
        _link_base(base, folder, without=model.denoiser_part)
    if source.settings.vae is not None:
        _replace_part(folder / "vae", source.read("vae", model.vae_class, torch.float32))
    target = folder / model.denoiser_part
    if policy.is_lora:
        _replace_part(target, policy.model.fused_network(policy).to(dtype))
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
        wanted = _wanted(base / part) if (base / part).is_dir() else []
        if not (base / part).is_dir() or _lacks_weights(base / part, wanted):
            _refuse_without(base, part)
            index[part] = [None, None]  # as a safety checker that was not fetched, or is a pickle
            continue
        for file in wanted:
            link_or_copy(file, folder / part / file.name)
    if index.get("safety_checker", [None])[0] is None and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _lacks_weights(part: Path, wanted: list[Path]) -> bool:
    """Whether a part has weights, but none that are linked."""
    has_weights = any(file.suffix in WEIGHTS for file in part.iterdir())
    return has_weights and not any(file.suffix == ".safetensors" for file in wanted)


def _refuse_without(base: Path, part: str) -> None:
    if part not in OPTIONAL:
        raise ModelError(
            f"{base / part} has no weights that can be exported (a pickle or a variant alone is left out); "
            "a pipeline does not open without them. Save the part with safe_serialization=True"
        )


def _wanted(part: Path) -> list[Path]:
    """A part's files, without pickles and without variants such as model.fp16.safetensors."""
    return [
        file
        for file in sorted(part.iterdir())
        if file.suffix in KEPT and not (file.suffix == ".safetensors" and len(file.suffixes) > 1)
    ]


def _write_pipeline_of_file(source: Source, folder: Path) -> None:
    config = source.settings.config
    options: dict[str, Any] = (
        {} if config is None else {"config": config, "local_files_only": Path(config).exists()}
    )
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


def write_lora_diffusers(policy: ExportedPolicy, folder: Path, dtype: torch.dtype) -> None:
    """The LoRA as `load_lora_weights` finds it, in its own precision.

    The policy's own file, unless alpha is not the rank: many loaders do not read the header in which
    diffusers keeps alpha, and would scale by 1. The scale then lies in the weights.
    """
    weights, settings = read_lora(policy)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not rank or alpha == rank or any(settings.get(name) for name in UNTRANSLATED):
        link_or_copy(policy.lora_file, folder / LORA_FILE)
        return
    prefix = policy.model.denoiser_part
    scaled = {
        key: value * (alpha / rank) if ".lora_B." in key else value
        for key, value in weights.items()
    }
    header = {f"{prefix}.{key}": value for key, value in {**settings, "lora_alpha": rank}.items()}
    save_weights(
        {f"{prefix}.{key}": value for key, value in scaled.items()},
        folder / LORA_FILE,
        {"format": "pt", LORA_METADATA: json.dumps(header, sort_keys=True)},
    )


def write_lora_kohya(policy: ExportedPolicy, folder: Path, dtype: torch.dtype) -> None:
    """The LoRA in kohya's keys, in its own precision: a small update would be lost in float16."""
    weights, settings = read_lora(policy)
    untranslated = [name for name in UNTRANSLATED if settings.get(name)]
    if untranslated:
        raise UserError(
            f"{policy.lora_file} was trained with {', '.join(untranslated)}, which the "
            "kohya layout cannot say. Export it as diffusers or single-file, which fuse it."
        )
    config = policy.model.source.config_of(policy.model.denoiser_part, policy.model.denoiser_class)
    rank = next(value.shape[0] for key, value in weights.items() if ".lora_A." in key)
    alpha = float(settings.get("lora_alpha", rank))
    version, architecture = base_version(policy, config)
    save_weights(
        kohya_weights(weights, alpha, config if policy.is_xl else None),
        folder / lora_file(policy),
        {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
            "ss_base_model_version": version,
            "ss_v2": str(version.startswith("sd_v2")),
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.title": policy.name,
        },
    )


def base_version(policy: ExportedPolicy, unet: Mapping[str, Any]) -> tuple[str, str]:
    """(kohya's word, Stability's modelspec) for the family of the base."""
    if policy.is_xl:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if unet.get("cross_attention_dim") != SD2_TEXT_WIDTH:
        return "sd_v1", "stable-diffusion-v1"
    scheduler = policy.model.source.config_of("scheduler", DDPMScheduler)
    if scheduler.get("prediction_type") == "v_prediction":
        return "sd_v2_v", "stable-diffusion-v2-768-v"
    return "sd_v2", "stable-diffusion-v2-512"


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
        found[f"{name}.{side}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(alpha, dtype=value.dtype)
    return found


def lora_file(policy: ExportedPolicy) -> str:
    """Name of a file as ComfyUI lists it."""
    return f"{policy.name}.safetensors"


def write_single_file(policy: ExportedPolicy, folder: Path, dtype: torch.dtype) -> None:
    """One fused checkpoint in the original layout, every weight in `dtype`."""
    model, source = policy.model, policy.model.source
    network = policy.model.fused_network(policy).to(dtype)
    if not policy.is_xl and network.config.cross_attention_dim == SD2_TEXT_WIDTH:
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
        if policy.is_xl
        else None,
    )
    state |= marks(source.config_of("scheduler", DDPMScheduler))
    save_weights(
        state,
        folder / lora_file(policy),
        {"format": "pt", "modelspec.title": policy.name},
    )


WRITERS: dict[Format, Callable[[ExportedPolicy, Path, torch.dtype], None]] = {
    "diffusers": write_diffusers,
    "lora-diffusers": write_lora_diffusers,
    "lora-kohya": write_lora_kohya,
    "single-file": write_single_file,
}
"""How each format is written."""


def write_policy(policy: ExportedPolicy, kind: Format, dtype: Dtype, folder: Path) -> None:
    """The policy as `kind`; weights that are written anew by fusing are in `dtype`."""
    WRITERS[kind](policy, folder, torch_dtype(dtype))
