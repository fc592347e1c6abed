"""The transformer of a Stable Diffusion 3 by the names of Stability's own checkpoints, as single files have it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "model.diffusion_model."

_OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_INSIDE = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_JOINED = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
}


def original_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' weights by the original names; query, key and value in one matrix, two layers' halves turned."""
    last = max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+?)(\.weight|\.bias)", key)
        if block is None:
            layer, end = (
                (key, "")
                if key in _OUTSIDE
                else (key.rpartition(".")[0], "." + key.rpartition(".")[2])
            )
            new = _OUTSIDE[layer] + end
            is_turned = layer == "norm_out.linear"
        else:
            number, layer, end = block.groups()
            is_turned = layer == "norm1_context.linear" and int(number) == last
            if layer in _INSIDE:
                new = f"joint_blocks.{number}.{_INSIDE[layer]}{end}"
            else:
                pattern = next(p for p in _JOINED if any(layer == p.format(x) for x in "qkv"))
                if layer != pattern.format("q"):
                    continue
                parts = [
                    state[f"transformer_blocks.{number}.{pattern.format(x)}{end}"] for x in "qkv"
                ]
                new, value = f"joint_blocks.{number}.{_JOINED[pattern]}{end}", torch.cat(parts)
        found[PREFIX + new] = torch.cat(value.chunk(2)[::-1]) if is_turned else value
    return found
