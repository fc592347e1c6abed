r"""A policy that was trained elsewhere in; policy 0 of this run out. Paper: SAIL Sec. 5.3 (SAIL*).

Example:
    python -m stages.adopt_policy --policy mhdang/dpo-sd1.5-text2image-v1 \\
        --model.base stable-diffusion-v1-5/stable-diffusion-v1-5 --model.dtype bfloat16 \\
        --output results/mine/iter00/policy
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from stages.core.artifacts.provenance import write_manifest
from stages.core.execution.runtime import run_stage, stage
from stages.core.models.denoiser import LORA_FILE
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings, is_hub_id
from stages.core.models.policy import Policy
from stages.core.policies.saving import save_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args:
    """A policy that was trained elsewhere in; policy 0 of this run out."""

    policy: str
    """Folder or hub id in diffusers' layout: unet/ or transformer/, or a LoRA's pytorch_lora_weights.safetensors. Or one
    .safetensors file: a LoRA (of diffusers, peft or kohya), or a whole checkpoint."""
    model: ModelSettings
    """The pretrained model that it was trained from."""
    output: Path
    """Policy folder to write (weights and manifest.json)."""


def main(args: Args) -> None:
    """Read it as this base's policy, which checks that it fits, and write it as our own."""
    with stage("adopt_policy") as run:
        model = load_model(args.model, device=torch.device("cpu"))
        denoiser = model.load_denoiser(find_policy(args.policy), dtype=torch.float32)
        save_policy(denoiser, args.output, model.denoiser_part)
        kind = "full" if denoiser.adapter is None else "lora"
        facts = {"base": model.base, "kind": kind, "adopted_from": args.policy}
        write_manifest(args.output, stage="adopt_policy", arguments=args, inputs=[], facts=facts)
        run.rows_in = run.rows_out = sum(1 for _ in denoiser.parameters())


def find_policy(name: str) -> Policy:
    """The policy in a folder, in a file or under a hub id, whose LoRA is fetched where it has one."""
    if not Path(name).exists() and is_hub_id(name):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Policy(Path(hf_hub_download(name, LORA_FILE)).parent)
        except (HfHubHTTPError, LocalEntryNotFoundError):
            log.info("adopt_policy: %s has no %s; taken for a full fine-tune", name, LORA_FILE)
    return Policy(Path(name))


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
