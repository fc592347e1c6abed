"""Train the embedded world's second pipeline from nothing: Stable Diffusion 3's kind, on the world's own VAE.

Example:
    python -m stages.shapes.train_flow_pipeline --output stages/shapes/flow_pipeline --work work/flow

Training state is saved under --work every --save-every steps; the same command continues from it, bit for bit.
Until the learning rate falls nothing depends on --steps, so that a state from before can go on to another number.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from stages.core.execution.runtime import collect_garbage
from stages.shapes.captions import CAN_BE_UNSAID, all_scenes, open_captions
from stages.shapes.counted_text import CountedText, velocity
from stages.shapes.lessons import captions_of_scenes, encode_pictures
from stages.shapes.oracle import caption_match
from stages.shapes.training_loop import Loop

log = logging.getLogger("train_flow_pipeline")

MAX_TOKENS = 13
"""As many as the longest caption has."""
TEXT_WIDTH = 48
"""Of each of the two text encoders."""
SHIFT = 2.0
"""Of the noise levels towards noise; 3 in Stable Diffusion 3.5, whose pictures are larger."""
DIFFUSERS_ZEROS = 256
"""Zeros in T5's place if diffusers' pipeline is not told `max_sequence_length`."""
UNSAID_SHARE = 0.45
"""Of the later captions that do not say the size; so for position and background."""
ALL_SAID, THEN_OPEN = 3_000, 4_000
"""Steps until which captions say everything, and from which on they leave words out."""
WARMUP = 500
FALL_SHARE = 0.2
"""Steps in which the learning rate rises, and share of the steps at the end in which it falls to 0."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train the embedded world's flow pipeline from nothing."""

    output: Path
    """Folder for the pipeline in diffusers layout, with training.json beside the weights."""
    work: Path
    """Folder for the training state; the same command continues from what lies here."""
    vae: Path = Path("stages/shapes/pipeline/vae")
    """The world's VAE, which is copied."""
    tokenizer: Path = Path("stages/shapes/pipeline/tokenizer")
    """The world's tokenizer, which is copied."""
    seed: int = 0
    """Seed of the weights, the pictures and the order."""
    num_pictures: int = 48_000
    """Pictures drawn and encoded once."""
    steps: int = 12_000
    """Updates of transformer and text encoders."""
    batch: int = 64
    """Latents of an update."""
    patch: int = 2
    """Side of the transformer's patches, in latents."""
    layers: int = 4
    """Blocks of the transformer."""
    heads: int = 4
    """Its attention heads, of 24 channels each."""
    learning_rate: float = 1.5e-3
    """Between its rise and its fall."""
    check_every: int = 1000
    """Steps between two looks at how well pictures match their captions."""
    num_checked: int = 96
    """Captions of each kind that are looked at."""
    save_every: int = 250
    """Steps between two saved training states."""
    threads: int = 1
    """CPU threads."""


def main(args: Args) -> None:
    """Train what is not trained yet, then write the pipeline."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.vae, local_files_only=True)
    vae.eval().requires_grad_(False)
    vae.register_to_config(shift_factor=0.0)  # diffusers' pipeline of this kind wants a number
    latents = encode_pictures(vae, args.num_pictures, seed=args.seed, folder=args.work)
    tokenizer = CLIPTokenizer.from_pretrained(
        args.tokenizer, model_max_length=MAX_TOKENS, local_files_only=True
    )
    networks, loop = train(args, latents, vae, tokenizer)
    pipeline = assemble(networks, vae, tokenizer).to(torch.float16)
    pipeline.save_pretrained(args.output, safe_serialization=True)
    names = ("transformer", "text_encoder", "text_encoder_2")
    summary = {
        "command": "python -m stages.shapes.train_flow_pipeline "
        + " ".join(
            f"--{name.replace('_', '-')} {getattr(args, name)}"
            for name in ("seed", "num_pictures", "steps", "batch", "patch", "layers", "heads", "learning_rate")
        ),
        "device": "cpu",
        "threads": args.threads,
        "num_parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in zip(names, networks, strict=True)
        },
        "flow": loop.record("velocity_error"),
        "history": loop.history,
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    log.info("wrote %s", args.output)


def make_networks(
    args: Args, channels: int, side: int, tokenizer: CLIPTokenizer
) -> list[torch.nn.Module]:
    """Transformer and both text encoders, with fresh weights by the seed."""
    torch.manual_seed(args.seed + 1)
    width = 24 * args.heads
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=args.patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=args.layers,
        attention_head_dim=24,
        num_attention_heads=args.heads,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=side // args.patch,
        qk_norm="rms_norm",
    )
    transformer.set_attn_processor(CountedText())
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoders = [CLIPTextModelWithProjection(config) for _ in range(2)]
    with torch.no_grad():
        # Blocks that begin by passing on what they are given (Peebles and Xie, "Scalable Diffusion
        # Models with Transformers", Sec. 3.2).
        for name, weight in transformer.named_parameters():
            if ("norm1" in name and "linear" in name) or name.startswith(("norm_out", "proj_out")):
                weight.zero_()
        # Words as loud as the transformer's other inputs: its text comes from before any normalisation.
        for encoder in encoders:
            for name, weight in encoder.named_parameters():
                if "embedding" in name:
                    weight.normal_(std=0.5)
    return [transformer, *encoders]


def train(
    args: Args,
    latents: Float[Tensor, "picture channel height width"],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
) -> tuple[list[torch.nn.Module], Loop]:
    """Exponential moving averages of the networks, and how their training went."""
    networks = make_networks(args, latents.shape[1], latents.shape[-1], tokenizer)
    transformer, *encoders = networks
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]
    averaged = [
        torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=average, use_buffers=True)
        for module in networks
    ]
    optimizer = torch.optim.AdamW(
        [p for module in networks for p in module.parameters()],
        lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(rate_share, num_steps=args.steps)
    )
    loop = Loop(
        args.work / "flow.pt", args.steps, [*networks, *averaged], optimizer, schedule,
        save_every=args.save_every,
    )  # fmt: skip
    captions = captions_of_scenes()
    tokens = tokenizer(
        [text for of_scene in captions for text in of_scene] + [""],
        padding="max_length",
        max_length=MAX_TOKENS,
        return_tensors="pt",
    ).input_ids
    empty = len(tokens) - 1
    for step in loop.steps():
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(len(latents), (args.batch,), generator=generator)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        share = torch.randn(args.batch, generator=generator).sigmoid()  # Esser et al., Sec. 3.1
        sigmas = SHIFT * share / (1 + (SHIFT - 1) * share)
        dropped = torch.rand(args.batch, generator=generator) < 0.1
        unsaid = torch.rand(args.batch, len(CAN_BE_UNSAID), generator=generator) < unsaid_share(
            step
        )
        is_short = torch.rand(args.batch, generator=generator) < 0.5
        which = (unsaid * torch.tensor([1, 2, 4])).sum(dim=1)
        caption = (rows % len(captions)) * len(captions[0]) + which
        text, pooled = encode(encoders, tokens[torch.where(dropped, empty, caption)])
        part = sigmas[:, None, None, None]
        predicted = velocity(
            transformer,
            (1 - part) * clean + part * noise,
            1000 * sigmas,
            text,
            pooled,
            torch.where(is_short, 1, DIFFUSERS_ZEROS),
        )
        loss = (predicted - (noise - clean)).square().mean()
        loop.update(loss, float(loss.detach()))
        for shadow, module in zip(averaged, networks, strict=True):
            shadow.update_parameters(module)
        if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
            pipeline = assemble([shadow.module for shadow in averaged], vae, tokenizer)
            loop.note(**look(pipeline, args.num_checked))
    return [shadow.module.eval() for shadow in averaged], loop


def encode(
    encoders: Sequence[torch.nn.Module], tokens: Tensor
) -> tuple[Float[Tensor, "row token channel"], Float[Tensor, "row width"]]:
    """The text as diffusers' pipeline gives it: penultimate states side by side, and both pooled texts."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return states, torch.cat([output.text_embeds for output in outputs], dim=-1)


def rate_share(step: int, *, num_steps: int) -> float:
    """Share of the learning rate at a step: it rises, stays, and falls to 0."""
    return min(1.0, (step + 1) / WARMUP, (num_steps - step) / (FALL_SHARE * num_steps))


def unsaid_share(step: int) -> float:
    """Share of captions that leave a word out at a step."""
    return UNSAID_SHARE * min(1.0, max(0.0, (step - ALL_SAID) / (THEN_OPEN - ALL_SAID)))


def assemble(
    networks: Sequence[torch.nn.Module], vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusion3Pipeline:
    """The pipeline of these networks, without T5."""
    transformer, text_encoder, text_encoder_2 = networks
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def look(pipeline: StableDiffusion3Pipeline, num_captions: int) -> dict[str, float]:
    """How well pictures match captions that say everything, and captions that leave words out."""
    said = [str(scene) for scene in all_scenes()]
    left_open = [str(caption) for caption in open_captions()]
    pipeline.set_progress_bar_config(disable=True)
    found = {}
    for name, captions in (("match_said", said), ("match_open", left_open)):
        chosen = captions[:: max(1, len(captions) // num_captions)][:num_captions]
        images = pipeline(
            chosen,
            num_inference_steps=12,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=1,
            output_type="np",
        ).images
        found[name] = round(float(caption_match(images, chosen).mean()), 4)
    return found


if __name__ == "__main__":
    collect_garbage()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
