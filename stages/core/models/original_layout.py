"""Diffusers' names of weights in the layout of the original checkpoints, as ComfyUI and A1111 read it.

The published format of CompVis' and Stability's code; the inverse of diffusers' `from_single_file`.
Only names change, save the VAE's attention (matrices there are 1 x 1 convolutions) and SDXL's second
text encoder (query, key and value are one matrix there).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
SD_TEXT_PREFIX = "cond_stage_model.transformer."
SDXL_TEXT_PREFIX = "conditioner.embedders.0.transformer."
SDXL_TEXT_2_PREFIX = "conditioner.embedders.1.model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
MARKS = {"v_prediction": "v_pred", "rescale_betas_zero_snr": "ztsnr"}
"""Keys without a value by which checkpoints say what no weight shows, as ComfyUI and A1111 read them."""
_IN_BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def checkpoint(
    unet: State, unet_config: Mapping[str, Any], vae: State, text: State, text_2: State | None
) -> State:
    """One checkpoint of the parts' weights; SDXL's where there is a second text encoder."""
    first = clip_weights(text)
    parts = {
        UNET_PREFIX: {unet_key(key, unet_config): value for key, value in unet.items()},
        VAE_PREFIX: vae_weights(vae),
        SD_TEXT_PREFIX if text_2 is None else SDXL_TEXT_PREFIX: first,
    }
    if text_2 is not None:
        parts[SDXL_TEXT_2_PREFIX] = open_clip_weights(clip_weights(text_2))
    return {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}


def marks(scheduler: Mapping[str, Any]) -> State:
    """The keys that say that a model predicts velocities, or is trained to zero signal at the last step."""
    said = {
        "v_prediction": scheduler.get("prediction_type") == "v_prediction",
        "rescale_betas_zero_snr": bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return {MARKS[name]: torch.zeros(0) for name, is_so in said.items() if is_so}


def unet_key(key: str, config: Mapping[str, Any]) -> str:
    """A UNet weight's, or a layer's, original name without prefix. KeyError for an unknown one."""
    for ours, theirs in _UNET_ENDS.items():
        if key == ours or key.startswith(f"{ours}."):
            return theirs + key[len(ours) :]
    if found := _IN_MIDDLE.fullmatch(key):
        part, number, rest = found.groups()
        if part == "attentions":
            return f"middle_block.{2 * int(number) + 1}.{rest}"
        return f"middle_block.{2 * int(number)}.{_resnet(rest)}"
    found = _IN_BLOCK.fullmatch(key)
    if found is None:
        raise KeyError(f"{key} is no weight of a Stable Diffusion or SDXL UNet")
    side, level, part, number, rest = found.groups()
    i, j, length = int(level), int(number), int(config["layers_per_block"]) + 1
    if part == "downsamplers":
        return f"input_blocks.{length * (i + 1)}.0.op{rest.removeprefix('conv')}"
    if part == "upsamplers":
        has_attention = "CrossAttn" in config["up_block_types"][i]
        return f"output_blocks.{length * i + length - 1}.{2 if has_attention else 1}.{rest}"
    block = (
        f"input_blocks.{length * i + j + 1}"
        if side == "down_blocks"
        else f"output_blocks.{length * i + j}"
    )
    return f"{block}.0.{_resnet(rest)}" if part == "resnets" else f"{block}.1.{rest}"


def _resnet(rest: str) -> str:
    head, dot, tail = rest.partition(".")
    return f"{_RESNET[head]}{dot}{tail}"


def vae_weights(state: Mapping[str, Tensor]) -> State:
    """The VAE's weights by their original names; its attention's matrices as convolutions."""
    num_levels = 1 + max(int(key.split(".")[2]) for key in state if ".up_blocks." in key)
    found: State = {}
    for key, value in state.items():
        if ".mid_block.attentions.0." in key and value.ndim == 2:
            value = value[:, :, None, None]
        found[_vae_key(key, num_levels)] = value
    return found


def _vae_key(key: str, num_levels: int) -> str:
    head, middle, tail = key.partition(".mid_block.attentions.0.")
    if middle:
        name, _, kind = tail.rpartition(".")
        return f"{head}.mid.attn_1.{_VAE_ATTENTION[name]}.{kind}"
    key = re.sub(
        r"\.mid_block\.resnets\.(\d)", lambda found: f".mid.block_{int(found[1]) + 1}", key
    )
    key = re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", key)
    key = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", key)
    key = re.sub(
        r"\.up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)",
        lambda found: (
            f".up.{num_levels - 1 - int(found[1])}."
            + ("block." if found[2] == "resnets." else "upsample.")
        ),
        key,
    )
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def clip_weights(state: Mapping[str, Tensor]) -> State:
    """A CLIP text encoder's weights by the names checkpoints have, whatever transformers' version."""
    return {
        key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": value
        for key, value in state.items()
        if not key.endswith("position_ids")
    }


def open_clip_weights(state: Mapping[str, Tensor]) -> State:
    """SDXL's second text encoder by open_clip's names; query, key and value in one matrix."""
    found: State = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    layers = {m[1] for key in state if (m := re.match(r"text_model\.encoder\.layers\.(\d+)", key))}
    for layer in layers:
        source, target = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for ours, theirs in _OPEN_CLIP.items():
                found[f"{target}.{theirs}.{kind}"] = state[f"{source}.{ours}.{kind}"]
            parts = [state[f"{source}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found
