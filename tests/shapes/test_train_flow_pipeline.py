"""The training of the embedded world's flow pipeline, on a few steps of a small one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPTokenizer

from stages.core.method.noising import generator
from stages.core.method.sampling import sample_latents
from stages.core.models.families import load_model
from stages.core.models.stable_diffusion_3 import StableDiffusion3
from stages.core.policies.generation import SamplingSettings
from stages.shapes import make_preferences, train_flow_pipeline
from stages.shapes.captions import all_captions
from stages.shapes.counted_text import velocity
from stages.shapes.train_flow_pipeline import Args, make_networks, rate_share, unsaid_share
from stages.shapes.training_loop import Loop
from tests.builders import settings
from tests.workflow.dry_run import plan
from tests.workflow.projects import CONFIG

CPU = torch.device("cpu")
PROMPTS = ["a green cross at the top", "an orange ring on the left on a pink background"]


def small(folder: Path) -> Args:
    """Six steps of a network of two blocks."""
    return Args(
        output=folder / "pipeline",
        work=folder / "work",
        num_pictures=64,
        steps=6,
        batch=4,
        layers=2,
        heads=2,
        check_every=4,
        num_checked=2,
        save_every=2,
    )


@pytest.fixture
def args(tmp_path: Path) -> Args:
    """A small training that nobody ran yet."""
    return small(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of an unbroken training."""
    args = small(tmp_path_factory.mktemp("whole"))
    train_flow_pipeline.main(args)
    return args.output


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files but the record, which has seconds in it."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != "training.json"}


class Killed(Exception):
    """The training was stopped here."""


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(
    whole: Path, args: Args, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual: Callable[..., None] = Loop.update

    def killed(loop: Loop, loss: torch.Tensor, error: float) -> None:
        if loop.step == 3:  # one step after the last saved state
            raise Killed
        usual(loop, loss, error)

    monkeypatch.setattr(Loop, "update", killed)
    with pytest.raises(Killed):
        train_flow_pipeline.main(args)
    assert not args.output.exists()
    monkeypatch.setattr(Loop, "update", usual)
    train_flow_pipeline.main(args)
    again, expected = files(args.output), files(whole)
    assert again.keys() == expected.keys()
    assert any(name.startswith("transformer/") for name in again)
    assert [name for name, data in expected.items() if again[name] != data] == []


def test_its_record_says_how_the_training_went(whole: Path) -> None:
    record = json.loads((whole / "training.json").read_text())
    assert "--steps 6 --batch 4 " in record["command"]
    assert record["flow"]["num_steps"] == 6
    assert [row["num_steps"] for row in record["history"]] == [4, 6]
    for row in record["history"]:
        assert 0 <= row["match_said"] <= 1
        assert 0 <= row["match_open"] <= 1


def test_the_pipeline_opens_in_diffusers_and_here_and_makes_the_same_images(whole: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        whole, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32,
        local_files_only=True,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS, num_inference_steps=3, guidance_scale=3.0, max_sequence_length=1,
        generator=[generator(5), generator(6)], output_type="latent",
    ).images  # fmt: skip
    model = load_model(settings(whole, max_sequence_length=1), device=CPU)
    assert isinstance(model, StableDiffusion3)
    assert model.encode_text(PROMPTS)["text"].shape[1] == train_flow_pipeline.MAX_TOKENS + 1
    found = sample_latents(
        model, model.load_denoiser(), text=model.encode_text(PROMPTS),
        unconditional=model.unconditional(), seeds=[5, 6], sampler="euler", num_inference_steps=3,
        guidance_scale=3.0,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert model.decode_latents(found).shape == (2, 3, 64, 64)


def test_people_are_shown_its_pictures(whole: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(PROMPTS[:1]) + "\n")
    make_preferences.main(
        make_preferences.Args(
            captions=captions,
            model=settings(whole, max_sequence_length=1),
            settings=SamplingSettings(sampler="euler", num_inference_steps=2, guidance_scale=3.0),
            pairs_per_caption=2,
            label_temperature=0.2,
            tie_below=0.0,
            seed=0,
            output=tmp_path / "human.parquet",
        )
    )
    rows = pq.read_table(tmp_path / "human.parquet").to_pylist()
    assert [row["caption"] for row in rows] == PROMPTS[:1] * 2
    assert all(row["jpg_0"] != row["jpg_1"] for row in rows)


def test_the_world_plans_a_run_on_it(whole: Path, tmp_path: Path) -> None:
    flow = tmp_path / "flow.yaml"
    flow.write_text(
        yaml.safe_dump(
            {
                "run": "flow",
                "model": {"base": str(whole), "max_sequence_length": 1},
                "sampling": {"sampler": "euler"},
                "train_seed": {"weights": "velocity", "draw_law": "logit_normal"},
                "update_policy": {"weights": "velocity", "draw_law": "logit_normal"},
                "score_candidates": {"weights": "velocity", "draw_law": "logit_normal"},
                "export": {"policies": ["diffusers"]},
            }
        )
    )
    planned = plan([CONFIG, flow])
    assert planned["make_preferences"] == planned["train_seed"] == planned["write_report"] == 1
    assert planned["update_policy"] == 3


@pytest.mark.parametrize("zeros", [1, 3, 256])
def test_one_counted_zero_is_as_many_zeros(args: Args, zeros: int) -> None:
    transformer = make_networks(args, 8, 8, CLIPTokenizer.from_pretrained(args.tokenizer))[0]
    draws = generator(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draws))
        latents = torch.randn((2, 8, 8, 8), generator=draws)
        times = 1000 * torch.rand(2, generator=draws)
        text, pooled = (
            torch.randn((2, 13, 96), generator=draws),
            torch.randn((2, 96), generator=draws),
        )
        found = velocity(transformer, latents, times, text, pooled, torch.tensor([zeros, zeros]))
        transformer.set_attn_processor(JointAttnProcessor2_0())
        expected = transformer(
            latents,
            timestep=times,
            encoder_hidden_states=torch.cat([text, torch.zeros(2, zeros, 96)], dim=1),
            pooled_projections=pooled,
        ).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert float(expected.std()) > 0.1


def test_every_caption_is_read_whole(args: Args) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    lengths = [len(ids) for ids in tokenizer([str(c) for c in all_captions()]).input_ids]
    assert max(lengths) == train_flow_pipeline.MAX_TOKENS


def test_until_the_rate_falls_the_number_of_steps_changes_nothing() -> None:
    assert rate_share(0, num_steps=1000) == pytest.approx(1 / 500)
    for step in (0, 250, 499, 700, 799):
        assert rate_share(step, num_steps=1000) == rate_share(step, num_steps=5000)
    assert rate_share(900, num_steps=1000) == pytest.approx(0.5)
    assert rate_share(999, num_steps=1000) == pytest.approx(1 / 200)


def test_captions_say_everything_first() -> None:
    assert [unsaid_share(step) for step in (0, 3000, 3500, 4000, 20_000)] == pytest.approx(
        [0, 0, 0.225, 0.45, 0.45]
    )
