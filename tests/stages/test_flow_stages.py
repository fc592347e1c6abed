"""The stages on flow-matching models: two processes, exports, preflight, a judge's fixed weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from stages import (
    calibrate_judge,
    encode_preferences,
    export_policy,
    preflight,
    score_candidates,
    score_holdout,
    train_seed,
)
from stages.core.artifacts.judges import read_judge
from stages.core.artifacts.provenance import write_manifest
from stages.core.errors import UserError
from stages.core.method.noising import generator
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.models.policy import Policy
from stages.core.policies.saving import save_policy
from tests import flow_models
from tests.builders import FULL, read_rows, settings
from tests.stages.test_processes import elsewhere, finish, start, without_speed

CPU = torch.device("cpu")
LORA = LoraSettings(rank=4, alpha=8.0)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion 3.5, whose card names a licence."""
    base = flow_models.sd3(tmp_path_factory.mktemp("sd3"))
    head = "license: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md\n"
    (base / "README.md").write_text(f"---\n{head}---\n# A model\n")
    return base


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX.1-dev."""
    return flow_models.flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def seed_of_sd3(
    seed_trained: train_seed.Args, sd3: Path, tmp_path_factory: pytest.TempPathFactory
) -> train_seed.Args:
    """A LoRA of SD3, two steps on the human pairs, errors weighted as the noise's."""
    folder = tmp_path_factory.mktemp("seed")
    latents = {}
    for name, pairs in (
        ("seed", seed_trained.preferences),
        ("held", seed_trained.held_out.preferences),
    ):
        latents[name] = folder / f"{name}.parquet"
        encode_preferences.main(
            encode_preferences.Args(preferences=pairs, model=settings(sd3), output=latents[name])
        )
    args = replace(
        elsewhere(seed_trained, folder, draw_law="logit_normal", weights="epsilon", dpo_beta=100.0),
        latents=latents["seed"],
        held_out=replace(seed_trained.held_out, latents=latents["held"]),
        model=settings(sd3),
        lora=LORA,
    )
    train_seed.main(args)
    return args


@pytest.mark.slow
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_two_processes_have_the_losses_of_one(
    seed_of_sd3: train_seed.Args, lora: LoraSettings, tmp_path: Path
) -> None:
    alone, shared = (
        replace(elsewhere(seed_of_sd3, tmp_path / name), lora=lora) for name in ("alone", "shared")
    )
    train_seed.main(alone)
    assert "training on 2 processes" in finish(start(shared, 2))
    found, expected = without_speed(shared.training), without_speed(alone.training)
    assert len(found) == len(expected) > 1
    for row, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_policy_judges_held_out_pairs_with_weights_of_the_bound(
    seed_of_sd3: train_seed.Args, sd3: Path, tmp_path: Path
) -> None:
    scored = score_holdout.Args(
        preferences=seed_of_sd3.held_out.preferences, latents=seed_of_sd3.held_out.latents,
        model=settings(sd3), policy=str(seed_of_sd3.output), reference="base", num_draws=10,
        dpo_beta=100.0, seed=1, output=tmp_path / "holdout.parquet", draw_law="logit_normal",
    )  # fmt: skip
    score_holdout.main(scored)
    timesteps = [row["timesteps"] for row in read_rows(scored.output)]
    uniform = [[100 * place, 100 * place + 99] for place in range(10)]
    assert any(not low <= t <= high for t, (low, high) in zip(timesteps[0], uniform, strict=True))
    for name in ("elbo", "epsilon", "inverse_snr"):
        output = tmp_path / f"{name}.json"
        calibrate_judge.main(
            calibrate_judge.Args(
                holdout=scored.output, model=settings(sd3), policy=str(seed_of_sd3.output), weights=name,  # type: ignore[arg-type]
                seed=1, judged=tmp_path / "judged.parquet", output=output, draw_law="logit_normal",
            )
        )  # fmt: skip
        s = np.array([3 * x / (1 + 2 * x) for x in (np.arange(10) * 100 + 51) / 1000])
        by_hand = {"elbo": (1 - s) / s, "epsilon": (1 - s) ** 2, "inverse_snr": s**2}[name]
        np.testing.assert_allclose(read_judge(output).weights, by_hand / by_hand.mean(), rtol=1e-4)


def test_a_reward_of_a_policy_that_is_its_own_reference_is_0(
    sampled: list[Any], sd3: Path, seed_of_sd3: train_seed.Args, tmp_path: Path
) -> None:
    """Images that another model made are encoded anew."""
    args = score_candidates.Args(
        candidates=sampled[0].output, model=settings(sd3), policy=str(seed_of_sd3.output),
        reference=str(seed_of_sd3.output), num_draws=2, reencode=True, seed=0, iteration=1,
        output=tmp_path / "rewards.parquet", draw_law="logit_normal",
    )  # fmt: skip
    score_candidates.main(args)
    assert {row["reward"] for row in read_rows(args.output)} == {0.0}
    score_candidates.main(replace(args, reference="base", output=tmp_path / "others.parquet"))
    assert len({row["reward"] for row in read_rows(tmp_path / "others.parquet")}) > 1


def make_policy(model: Any, folder: Path, lora: LoraSettings) -> Path:
    """A finished policy that differs visibly from its base."""
    policy, rng = model.load_for_training(None, None, lora, seed=3)[0], generator(5)
    with torch.no_grad():
        for name, weight in policy.named_weights():
            if lora.rank == 0 or "lora_B" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=rng))
    folder.mkdir(parents=True)
    save_policy(policy, folder, model.denoiser_part)
    facts = {"base": model.base, "kind": "lora" if lora.rank else "full", "num_steps": 7}
    write_manifest(folder, stage="train_seed", arguments={"seed": 0}, inputs=[], facts=facts)
    return folder


def picture(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator(1), output_type="np",
        height=64, width=64,
    )  # fmt: skip
    return np.asarray(made.images[0])


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_exports_open_in_a_fresh_pipeline_with_the_policys_image(
    sd3: Path, flux: Path, name: str, lora: LoraSettings, tmp_path: Path
) -> None:
    base = {"sd3": sd3, "flux": flux}[name]
    kind: Any = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}[name]
    chosen = settings(base, image_size=None if name == "sd3" else (64, 64))
    model = load_model(chosen, device=CPU)
    folder = make_policy(model, tmp_path / "policy", lora)
    opened = kind.from_pretrained(base)
    before = picture(opened)
    denoiser = model.load_denoiser(Policy(folder))
    denoiser.select()
    opened.transformer = denoiser.network
    expected = picture(opened)
    assert np.abs(expected - before).max() > 0.01
    args = export_policy.Args(
        policy=folder, model=chosen, format="diffusers", dtype="float32", name="test-iter00",
        output=tmp_path / "diffusers",
    )  # fmt: skip
    export_policy.main(args)
    np.testing.assert_allclose(
        picture(kind.from_pretrained(args.output, torch_dtype=torch.float32)), expected, atol=1e-4
    )
    refused = ["single-file", "lora-kohya"]
    if lora.rank:
        one = replace(args, format="lora-diffusers", output=tmp_path / "lora")
        export_policy.main(one)
        fresh = kind.from_pretrained(base)
        fresh.load_lora_weights(one.output)
        np.testing.assert_allclose(picture(fresh), expected, atol=1e-4)
        assert "ComfyUI knows the keys" in (one.output / "README.md").read_text()
    card = (args.output / "README.md").read_text()
    family = {"sd3": "stable-diffusion-3", "flux": "flux"}[name]
    head = yaml.safe_load(card.split("---")[1])
    assert family in head["tags"]
    assert f"from diffusers import {kind.__name__}" in card
    if name == "sd3":
        assert head["license_name"] == "stabilityai-ai-community"
    else:
        assert "the base states none" in card
    for layout in refused:
        with pytest.raises(UserError, match=f"{layout}, which is not there for models of {family}"):
            export_policy.main(replace(args, format=layout, output=tmp_path / layout))  # type: ignore[arg-type]
        assert not (tmp_path / layout).exists()


@pytest.mark.slow
def test_preflight_says_what_a_run_on_sd3_takes(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["model"]["base"] = str(sd3)
    config["sampling"] |= {"sampler": "euler", "num_inference_steps": 2}
    config["lora"] = {"rank": 4}
    for block in ("train_seed", "update_policy"):
        config[block] |= {"weights": "elbo", "draw_law": "logit_normal"}
    config["score_candidates"] |= {"draw_law": "logit_normal"}
    config["execution"] = {"micro_batch_pairs": 2}
    config["export"] = {"policies": ["diffusers"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    preflight.main(preflight.Args(config=(path,), results=tmp_path, threads=1))
    assert "device hours" in capsys.readouterr().out
    config["export"] = {"policies": ["lora-kohya"]}
    config["update_policy"]["loss"] = "mapo"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"update_policy\.loss; export\.policies"):
        preflight.main(preflight.Args(config=(path,), results=tmp_path, threads=1))


def test_a_lora_of_kohyas_scripts_is_refused_for_flow(sd3: Path, tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "kohya.safetensors"
    names = ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",)
    safetensors.torch.save_file({name: torch.zeros(4, 32) for name in names}, path)
    with pytest.raises(
        UserError, match="its keys are kohya's, which are read for Stable Diffusion"
    ):
        load_model(settings(sd3), device=CPU).load_denoiser(Policy(path))
    assert json.loads((sd3 / "model_index.json").read_text())["_class_name"].endswith("3Pipeline")
