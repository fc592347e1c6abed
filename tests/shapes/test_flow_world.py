"""The embedded world's committed flow pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline

from stages.core.method.noising import generator
from stages.core.method.sampling import sample_latents
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.shapes.captions import CAN_BE_UNSAID, open_captions
from stages.shapes.oracle import caption_match
from tests.workflow.projects import CONFIG

ROOT = Path(__file__).parents[2]
FLOW = yaml.safe_load((ROOT / "config/flow.yaml").read_text())
BASE = ROOT / FLOW["model"]["base"]
CAPTIONS = [str(caption) for caption in open_captions()][::45]


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """One picture of each caption, sampled as config/flow.yaml says."""
    found = FLOW["sampling"]
    settings = ModelSettings(
        base=str(BASE), dtype="float32", family=FLOW["model"]["family"],
        max_sequence_length=FLOW["model"]["max_sequence_length"],
    )  # fmt: skip
    model = load_model(settings, device=torch.device("cpu"))
    latents = sample_latents(
        model, model.load_denoiser(), text=model.encode_text(CAPTIONS),
        unconditional=model.unconditional(), seeds=list(range(len(CAPTIONS))),
        sampler=found["sampler"], num_inference_steps=found["num_inference_steps"],
        guidance_scale=found["guidance_scale"],
    )  # fmt: skip
    images = model.decode_latents(latents)
    return images.permute(0, 2, 3, 1).float().numpy()


def test_it_draws_what_captions_say(pictures: np.ndarray) -> None:
    """The wrong captions of the same pictures match far less."""
    right, wrong = (
        float(np.mean(caption_match(pictures, captions)))
        for captions in (CAPTIONS, [*CAPTIONS[7:], *CAPTIONS[:7]])
    )
    assert right > 0.55
    assert wrong < right - 0.3


def test_diffusers_draws_the_same(pictures: np.ndarray) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        BASE,
        text_encoder_3=None,
        tokenizer_3=None,
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        CAPTIONS[:3], num_inference_steps=FLOW["sampling"]["num_inference_steps"],
        guidance_scale=FLOW["sampling"]["guidance_scale"],
        max_sequence_length=FLOW["model"]["max_sequence_length"],
        generator=[generator(seed) for seed in range(3)], output_type="np",
    ).images  # fmt: skip
    np.testing.assert_allclose(pictures[:3], theirs, atol=1e-4)


def test_its_record_is_of_these_weights() -> None:
    record = json.loads((BASE / "training.json").read_text())
    assert record["flow"]["num_steps"] == record["history"][-1]["num_steps"] == 12_000
    assert record["history"][-1]["match_open"] > 0.65
    files = sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file())
    assert files < 6_000_000


def test_both_worlds_ask_the_same_people() -> None:
    """What is not the model's is as in config/config.yaml, so that their tables can stand side by side."""
    plain = yaml.safe_load(CONFIG.read_text())
    same = ("shapes", "preferences", "select_pairs", "mix_preferences", "evaluation")
    assert {block: FLOW[block] for block in same} == {block: plain[block] for block in same}
    assert FLOW["prompts"]["per_iteration"] == plain["prompts"]["per_iteration"][:2]
    assert len(CAN_BE_UNSAID) == 3
