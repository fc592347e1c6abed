"""Train the embedded world's Stable Diffusion pipeline from nothing: VAE, then UNet and text encoder.

Example:
    python -m stages.shapes.train_pipeline --output stages/shapes/pipeline --work work/pipeline

Training state is saved under --work every --save-every steps; the same command continues from it.
About 35 minutes on two idle CPU cores with the default numbers.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stages.core.execution.runtime import collect_garbage
from stages.shapes.captions import CAN_BE_UNSAID, IMAGE_SIZE, all_scenes
from stages.shapes.lessons import as_tensor, build_tokenizer, captions_of_scenes, encode_pictures
from stages.shapes.renderer import draw, masks, web_like
from stages.shapes.training_loop import Loop

log = logging.getLogger("train_pipeline")

MAX_TOKENS = 24
TEXT_WIDTH = 64
UNSAID_SHARE = 0.45
"""Of the last captions of a training that do not say the size; so for position and background."""
ALL_SAID, THEN_OPEN = 0.5, 0.6
"""Shares of a training until which captions say everything, and from which on they leave words out:
a network that sees them all open from the start learns no position in 12,000 steps."""
LATENT_CHANNELS = 8
"""Twice Stable Diffusion's: 4 numbers for 8 x 8 pixels held a colour or a shape, not both."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train the embedded world's Stable Diffusion pipeline from nothing."""

    output: Path
    """Folder for the pipeline in diffusers layout, with training.json beside the weights."""
    work: Path
    """Folder for the training state; the same command continues from what lies here."""
    seed: int = 0
    """Seed of the weights, the pictures and the order."""
    vae_steps: int = 3000
    """Updates of the VAE, 16 freshly drawn pictures each."""
    num_pictures: int = 48_000
    """Pictures drawn and encoded once for the denoiser."""
    denoiser_steps: int = 12_000
    """Updates of UNet and text encoder, 64 latents each."""
    save_every: int = 500
    """Steps between two saved training states."""
    threads: int = 2
    """CPU threads."""


def main(args: Args) -> None:
    """Train what is not trained yet, then write the pipeline."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_tokenizer(args.work / "tokenizer", MAX_TOKENS)
    vae, vae_record = train_vae(args, device)
    latents = encode_pictures(vae, args.num_pictures, seed=args.seed, folder=args.work)
    unet, text_encoder, record = train_denoiser(args, latents, tokenizer, device)
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=text_encoder.cpu(),
        tokenizer=tokenizer,
        unet=unet.cpu(),
        scheduler=DDIMScheduler.from_config(noise_schedule().config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.output, safe_serialization=True)
    summary = {
        "command": f"python -m stages.shapes.train_pipeline --seed {args.seed} "
        f"--vae-steps {args.vae_steps} --num-pictures {args.num_pictures} "
        f"--denoiser-steps {args.denoiser_steps}",
        "device": device.type,
        "threads": args.threads,
        "num_parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder))
        },
        "vae": vae_record,
        "denoiser": record,
    }
    (args.output / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    log.info("wrote %s", args.output)


def noise_schedule() -> DDPMScheduler:
    """Stable Diffusion's own noise schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
    )


def train_vae(args: Args, device: torch.device) -> tuple[AutoencoderKL, dict[str, float]]:
    """The autoencoder, and what its training took and reached."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        scaling_factor=1.0,  # `standardise` sees to it
    ).to(device)
    with torch.no_grad():  # a narrow posterior from the start, or its noise hides the picture
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=args.vae_steps, pct_start=0.05
    )
    loop = Loop(
        args.work / "vae.pt", args.vae_steps, [vae], optimizer, schedule, save_every=args.save_every
    )
    scenes = all_scenes()
    for step in loop.steps():
        rng = np.random.default_rng((args.seed, 1, step))
        picked = [scenes[i] for i in rng.integers(len(scenes), size=16)]
        drawings = [web_like(scene, rng) for scene in picked]
        images = as_tensor(draw(drawings)).to(device)
        weight = object_weight(torch.from_numpy(masks(drawings)).to(device))
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        difference = decoded.float() - images
        fraction = step / args.vae_steps
        squared = (weight * difference.square()).mean()
        absolute = (weight * difference.abs()).mean()
        # Without this the latents collapse to one direction, and red and orange to one colour: at
        # first, three channels are asked to hold the mean colour of their 8 x 8 pixels.
        colour = 2 * functional.avg_pool2d(images, 8)
        anchor = (posterior.mean[:, :3].float() - colour).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = squared + 0.3 * fraction * absolute + (1 - fraction) * anchor + 1e-4 * kl
        loop.update(loss, float(difference.detach().abs().mean()))
    vae = vae.eval().requires_grad_(False)
    rng = np.random.default_rng((args.seed, 3))
    sample = as_tensor(
        draw([web_like(scenes[i], rng) for i in rng.integers(len(scenes), size=512)])
    )
    standardise(vae, vae.encode(sample.to(device)).latent_dist.mode())
    return vae, loop.record("pixel_error")


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Float[Tensor, "picture channel height width"]) -> None:
    """Give every latent channel mean 0 and deviation 1 over these latents of the VAE's.

    An exact change of variables, folded into the 1 x 1 convolutions on both sides of the latents:
    what the VAE decodes of what it encodes stays the same. The denoiser then sees the shape's
    detail, which the VAE keeps in quiet channels, as loud as the colour.
    """
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    inward, outward, count = vae.quant_conv, vae.post_quant_conv, len(mean)
    inward.weight[:count] /= deviation[:, None, None, None]
    inward.bias[:count] = (inward.bias[:count] - mean) / deviation
    inward.bias[count:] -= 2 * deviation.log()
    outward.bias += (outward.weight[:, :, 0, 0] * mean).sum(dim=1)
    outward.weight *= deviation[None, :, None, None]


def object_weight(
    cover: Float[Tensor, "image height width"],
) -> Float[Tensor, "image one height width"]:
    """Weight of each pixel in the VAE's loss: 7 on the object and around its edge, else 1."""
    near = functional.max_pool2d(cover[:, None], kernel_size=5, stride=1, padding=2)
    return 1 + 6 * (near > 0).float()


def train_denoiser(
    args: Args,
    latents: Float[Tensor, "picture channel height width"],
    tokenizer: CLIPTokenizer,
    device: torch.device,
) -> tuple[UNet2DConditionModel, CLIPTextModel, dict[str, float]]:
    """Exponential moving averages of UNet and text encoder, and what their training took."""
    torch.manual_seed(args.seed + 1)
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    ).to(device)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]
    averaged = [
        torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=average, use_buffers=True)
        for module in (unet, text_encoder)
    ]
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.5e-3, total_steps=args.denoiser_steps, pct_start=0.1
    )
    modules: list[torch.nn.Module] = [unet, text_encoder, *averaged]
    loop = Loop(
        args.work / "denoiser.pt", args.denoiser_steps, modules, optimizer, schedule,
        save_every=args.save_every,
    )  # fmt: skip
    noising = noise_schedule()
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
        rows = torch.randint(len(latents), (64,), generator=generator)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (64,), generator=generator)
        dropped = torch.rand(64, generator=generator) < 0.1
        share = unsaid_share(step / args.denoiser_steps)
        unsaid = torch.rand(64, len(CAN_BE_UNSAID), generator=generator) < share
        which = (unsaid * torch.tensor([1, 2, 4])).sum(dim=1)
        caption = (rows % len(captions)) * len(captions[0]) + which
        caption = torch.where(dropped, empty, caption)
        noised = noising.add_noise(clean, noise, timesteps)
        context = text_encoder(tokens[caption].to(device)).last_hidden_state
        prediction = unet(noised.to(device), timesteps.to(device), context).sample
        loss = (prediction - noise.to(device)).square().mean()
        loop.update(loss, float(loss.detach()))
        for shadow, module in zip(averaged, (unet, text_encoder), strict=True):
            shadow.update_parameters(module)
    for shadow, module in zip(averaged, (unet, text_encoder), strict=True):
        module.load_state_dict(shadow.module.state_dict())
    return unet.eval(), text_encoder.eval(), loop.record("denoising_error")


def unsaid_share(done: float) -> float:
    """Share of captions that leave a word out when so much of the training is done."""
    return UNSAID_SHARE * min(1.0, max(0.0, (done - ALL_SAID) / (THEN_OPEN - ALL_SAID)))


if __name__ == "__main__":
    collect_garbage()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(Args, description=__doc__))
