"""The published networks and resizings once more, written from their papers' code in plain torch.

Nothing here goes through transformers or through `stages`: open_clip's CLIP (model.py, transformer.py),
ImageReward's BLIP (vit.py, med.py), Pillow's and torch's bicubic resizing. All in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tests.metrics.official import Weights

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def doubled(weights: Weights) -> Weights:
    return {name: value.double() for name, value in weights.items()}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Scaled dot products, one head after the other."""
    out = []
    for q, k, v in zip(*(x.chunk(heads, -1) for x in (query, key, value)), strict=True):
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out.append((logits if mask is None else logits + mask).softmax(-1) @ v)
    return torch.cat(out, -1)


def patches(weight: Tensor, pixels: Tensor) -> Tensor:
    size = weight.shape[-1]
    pieces = functional.unfold(pixels, size, stride=size).transpose(1, 2)
    return pieces @ weight.flatten(1).T


def clip_blocks(w: Weights, tower: str, x: Tensor, heads: int, mask: Tensor | None, act) -> Tensor:  # type: ignore[no-untyped-def]
    number = 0
    while f"{tower}.resblocks.{number}.ln_1.weight" in w:
        block = f"{tower}.resblocks.{number}"
        inside = norm(w, f"{block}.ln_1", x, 1e-5)
        qkv = inside @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        x = x + linear(w, f"{block}.attn.out_proj", attend(*qkv.chunk(3, -1), heads, mask))
        inside = norm(w, f"{block}.ln_2", x, 1e-5)
        x = x + linear(w, f"{block}.mlp.c_proj", act(linear(w, f"{block}.mlp.c_fc", inside)))
        number += 1
    assert number
    return x


def clip_image(weights: Weights, pixels: Tensor, heads: int = 2, act=gelu) -> Tensor:  # type: ignore[no-untyped-def]
    """open_clip's encode_image, of length 1."""
    w = doubled(weights)
    x = patches(w["visual.conv1.weight"], pixels.double())
    first = w["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + w["visual.positional_embedding"]
    x = clip_blocks(w, "visual.transformer", norm(w, "visual.ln_pre", x, 1e-5), heads, None, act)
    x = norm(w, "visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"]
    return x / x.norm(dim=-1, keepdim=True)


def clip_text(weights: Weights, tokens: Tensor, heads: int = 2, act=gelu) -> Tensor:  # type: ignore[no-untyped-def]
    """open_clip's encode_text, of length 1."""
    w = doubled(weights)
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    mask = torch.full((77, 77), float("-inf"), dtype=torch.float64).triu(1)
    x = norm(w, "ln_final", clip_blocks(w, "transformer", x, heads, mask, act), 1e-5)
    x = x[torch.arange(len(x)), tokens.argmax(-1)] @ w["text_projection"]
    return x / x.norm(dim=-1, keepdim=True)


def as_open_clip(hf: Weights) -> Weights:
    """A transformers CLIP's tensors under open_clip's names, for `clip_image` and `clip_text`."""
    out = {"logit_scale": hf["logit_scale"]}
    for ours, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        number = 0
        while f"{theirs}.encoder.layers.{number}.layer_norm1.weight" in hf:
            old, new = f"{theirs}.encoder.layers.{number}", f"{ours}.resblocks.{number}"
            for kind in ("weight", "bias"):
                parts = [hf[f"{old}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                out[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
                out[f"{new}.attn.out_proj.{kind}"] = hf[f"{old}.self_attn.out_proj.{kind}"]
                out[f"{new}.ln_1.{kind}"] = hf[f"{old}.layer_norm1.{kind}"]
                out[f"{new}.ln_2.{kind}"] = hf[f"{old}.layer_norm2.{kind}"]
                out[f"{new}.mlp.c_fc.{kind}"] = hf[f"{old}.mlp.fc1.{kind}"]
                out[f"{new}.mlp.c_proj.{kind}"] = hf[f"{old}.mlp.fc2.{kind}"]
            number += 1
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = hf[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = hf[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = hf[f"text_model.final_layer_norm.{kind}"]
    eye, words = "vision_model.embeddings", "text_model.embeddings"
    return out | {
        "visual.class_embedding": hf[f"{eye}.class_embedding"],
        "visual.positional_embedding": hf[f"{eye}.position_embedding.weight"],
        "visual.conv1.weight": hf[f"{eye}.patch_embedding.weight"],
        "visual.proj": hf["visual_projection.weight"].T,
        "token_embedding.weight": hf[f"{words}.token_embedding.weight"],
        "positional_embedding": hf[f"{words}.position_embedding.weight"],
        "text_projection": hf["text_projection.weight"].T,
    }


def raw_image_reward(weights: Weights, pixels: Tensor, tokens: Tensor, is_word: Tensor) -> Tensor:
    """ImageReward's raw reward: vit.py's ViT, med.py's BERT with cross attention, the MLP."""
    w = doubled(weights)
    eye, words = "blip.visual_encoder", "blip.text_encoder"
    x = patches(w[f"{eye}.patch_embed.proj.weight"], pixels.double())
    x = x + w[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([w[f"{eye}.cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{eye}.pos_embed"]
    number = 0
    while f"{eye}.blocks.{number}.norm1.weight" in w:
        block = f"{eye}.blocks.{number}"
        qkv = linear(w, f"{block}.attn.qkv", norm(w, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(w, f"{block}.attn.proj", attend(*qkv, x.shape[-1] // 64, None))
        inside = linear(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", x, 1e-6))
        x = x + linear(w, f"{block}.mlp.fc2", gelu(inside))
        number += 1
    seen = norm(w, f"{eye}.norm", x, 1e-6)

    y = w[f"{words}.embeddings.word_embeddings.weight"][tokens]
    y = y + w[f"{words}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(w, f"{words}.embeddings.LayerNorm", y, 1e-12)
    mask = (1 - is_word.double())[:, None, :] * -1e9
    layer = 0
    while f"{words}.encoder.layer.{layer}.output.dense.weight" in w:
        name = f"{words}.encoder.layer.{layer}"
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            inner = f"{name}.{kind}"
            keys = y if source is None else source
            parts = (
                linear(w, f"{inner}.self.query", y),
                linear(w, f"{inner}.self.key", keys),
                linear(w, f"{inner}.self.value", keys),
            )
            out = linear(w, f"{inner}.output.dense", attend(*parts, y.shape[-1] // 64, hidden))
            y = norm(w, f"{inner}.output.LayerNorm", out + y, 1e-12)
        wide = gelu(linear(w, f"{name}.intermediate.dense", y))
        y = norm(w, f"{name}.output.LayerNorm", linear(w, f"{name}.output.dense", wide) + y, 1e-12)
        layer += 1
    return affine(
        {k.removeprefix("mlp."): v for k, v in w.items() if k.startswith("mlp.")}, y[:, 0]
    )


def affine(weights: Weights, rows: Tensor) -> Tensor:
    """The head's five linear layers in a row."""
    w = doubled(weights)
    for place in (0, 2, 4, 6, 7):
        rows = linear(w, f"layers.{place}", rows)
    return rows.squeeze(-1)


def cubic(x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Keys' cubic kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resizing(old: int, new: int, *, antialias: bool) -> NDArray[np.float64]:
    """The matrix that resizes a line of `old` pixels to `new`, bicubic."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    if antialias:  # the kernel widens with the scale; what lies outside is left out
        stretch = max(scale, 1)
        places = np.arange(old)[None, :] + 0.5 - centres[:, None]
        rows = cubic(places / stretch, -0.5)
        first = np.maximum((centres - 2 * stretch + 0.5).astype(int), 0)
        last = np.minimum((centres + 2 * stretch + 0.5).astype(int), old)
        columns = np.arange(old)[None, :]
        rows *= (columns >= first[:, None]) & (columns < last[:, None])
        return rows / rows.sum(1, keepdims=True)
    rows = np.zeros((new, old))
    for row, centre in enumerate(centres - 0.5):
        below = int(np.floor(centre))
        for tap in range(below - 1, below + 3):  # the border is repeated
            rows[row, min(max(tap, 0), old - 1)] += cubic(np.array(tap - centre), -0.75)
    return rows


def resized_as_picture(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """As Pillow does it: first the lines, then the columns, each rounded to whole pixel values."""
    across = resizing(image.shape[1], width, antialias=True)
    down = resizing(image.shape[0], height, antialias=True)
    wide = np.einsum("xw,hwc->hxc", across, image.astype(np.float64))
    wide = np.clip(np.floor(wide + 0.5), 0, 255) if image.shape[1] != width else wide
    tall = np.einsum("yh,hxc->yxc", down, wide)
    return np.clip(np.floor(tall + 0.5), 0, 255) if image.shape[0] != height else tall


def resized_as_numbers(
    image: NDArray[np.float64], height: int, width: int, *, antialias: bool
) -> NDArray[np.float64]:
    """As torch does it on floats: nothing is rounded or clipped."""
    across = resizing(image.shape[1], width, antialias=antialias)
    down = resizing(image.shape[0], height, antialias=antialias)
    return np.einsum("yh,xw,hwc->yxc", down, across, image, optimize=True)


def normalised(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Channels first, in CLIP's units; pixels in [0, 1]."""
    result: NDArray[np.float64] = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    return result
