"""Writes a model's parts as one checkpoint in the original key layout, as ComfyUI users have them.

From diffusers' names to those of Stability's code; the inverse of what `from_single_file` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

State = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write(pipeline: Any, path: Path) -> Path:
    """The pipeline's UNet, VAE and text encoders in one safetensors file."""
    is_xl = hasattr(pipeline, "text_encoder_2")
    has_attention = ["attentions" in str(dict(b.named_children()).keys())
                     for b in pipeline.unet.up_blocks]  # fmt: skip
    state = prefixed("model.diffusion_model.", unet(pipeline.unet.state_dict(), has_attention))
    state |= prefixed("first_stage_model.", vae(pipeline.vae.state_dict()))
    first = named_text_model(pipeline.text_encoder.state_dict())
    if is_xl:
        state |= prefixed("conditioner.embedders.0.transformer.", first)
        second = named_text_model(pipeline.text_encoder_2.state_dict())
        state |= prefixed("conditioner.embedders.1.model.", open_clip(second))
    else:
        state |= prefixed("cond_stage_model.transformer.", first)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in state.items()}


def named_text_model(state: Mapping[str, Tensor]) -> State:
    """CLIP's keys with the prefix that checkpoints have, whatever the version of transformers."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": value
        for name, value in state.items()
        if not name.endswith("position_ids")
    }


def unet(state: Mapping[str, Tensor], up_has_attention: list[bool]) -> State:
    """UNet keys; two resnets a level down, three up."""

    def rename(name: str) -> str:
        for ours, theirs in UNET_ENDS.items():
            if name.startswith(f"{ours}."):
                return theirs + name[len(ours) :]
        kind, _, rest = name.partition(".")
        if kind == "mid_block":
            part, number, inner = re.match(r"(resnets|attentions)\.(\d+)\.(.*)", rest).groups()  # type: ignore[union-attr]
            place = 1 if part == "attentions" else 2 * int(number)
            return f"middle_block.{place}.{resnet(inner) if part == 'resnets' else inner}"
        level, part, number, inner = re.match(r"(\d+)\.(\w+)\.(\d+)\.(.*)", rest).groups()  # type: ignore[union-attr]
        i, j = int(level), int(number)
        if part == "downsamplers":
            return f"input_blocks.{3 * (i + 1)}.0.op.{inner.removeprefix('conv.')}"
        if part == "upsamplers":
            return f"output_blocks.{3 * i + 2}.{2 if up_has_attention[i] else 1}.{inner}"
        block = f"input_blocks.{3 * i + j + 1}" if kind == "down_blocks" else (
            f"output_blocks.{3 * i + j}")  # fmt: skip
        return f"{block}.0.{resnet(inner)}" if part == "resnets" else f"{block}.1.{inner}"

    return {rename(name): value for name, value in state.items()}


def resnet(name: str) -> str:
    head, _, tail = name.partition(".")
    return f"{RESNET[head]}.{tail}"


def vae(state: Mapping[str, Tensor]) -> State:
    """VAE keys; the attention's matrices are 1 x 1 convolutions there."""
    found: State = {}
    for name, value in state.items():
        name = re.sub(
            r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", name
        )
        name = re.sub(
            r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name
        )
        up = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name)
        if up:
            level, part, number, rest = up.groups()
            middle = f"block.{number}" if part == "resnets" else "upsample"
            name = f"decoder.up.{3 - int(level)}.{middle}.{rest}"
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(
            r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m.group(1)) + 1}", name
        )
        if "mid_block.attentions.0." in name:
            head, tail = name.split("mid_block.attentions.0.")
            for ours, theirs in VAE_ATTENTION.items():
                if tail.startswith(f"{ours}."):
                    tail = theirs + tail[len(ours) :]
                    break
            if tail.endswith("weight") and not tail.startswith("norm"):
                value = value[:, :, None, None]
            name = f"{head}mid.attn_1.{tail}"
        found[name] = value
    return found


def open_clip(state: Mapping[str, Tensor]) -> State:
    """SDXL's second text encoder, in open_clip's keys with query, key and value in one matrix."""
    found: State = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    layers = {
        m.group(1) for k in state if (m := re.match(r"text_model\.encoder\.layers\.(\d+)", k))
    }
    for layer in layers:
        source, target = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                found[f"{target}.{theirs}.{kind}"] = state[f"{source}.{ours}.{kind}"]
            parts = [state[f"{source}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found
