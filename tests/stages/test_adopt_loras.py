"""A LoRA of any layout becomes policy 0 with the weights it stands for; its text encoder's part is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from stages import adopt_policy, export_policy
from stages.core.artifacts.provenance import write_manifest
from stages.core.method.noising import generator
from stages.core.models.denoiser import LORA_FILE
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from stages.core.models.policy import Policy
from stages.core.policies.saving import save_policy
from tests import tiny_models
from tests.builders import LORA, settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = {"sd15": tiny_models.sd15, "sdxl": tiny_models.sdxl}[request.param]
    return build(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy folder of ours with a LoRA that is not zero; alpha is twice its rank."""
    folder = tmp_path_factory.mktemp("trained")
    policy, _ = load_model(settings(base), device=CPU).load_for_training(None, None, LORA, seed=3)
    with torch.no_grad():
        for name, weight in policy.named_weights():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape, generator=generator(5)))
    save_policy(policy, folder, "unet")
    facts = {"base": str(base), "kind": "lora", "num_steps": 1}
    write_manifest(folder, stage="train_seed", arguments={"seed": 0}, inputs=[], facts=facts)
    return folder


def updates(base: Path, policy: Path) -> dict[str, Tensor]:
    """What a LoRA adds to each matrix: scale x B x A, whatever rank and alpha its file names."""
    network = load_model(settings(base), device=CPU).load_denoiser(Policy(policy)).network
    return {
        name: module.get_delta_weight("policy")
        for name, module in network.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def kohya(base: Path, trained: Path, folder: Path) -> Path:
    export_policy.main(
        export_policy.Args(
            policy=trained, model=settings(base), format="lora-kohya", dtype="float32", name="own",
            output=folder / "kohya",
        )
    )  # fmt: skip
    return folder / "kohya" / "own.safetensors"


def renamed(trained: Path, folder: Path, **more: Tensor) -> Path:
    """As diffusers' training scripts wrote LoRAs in 2023: no header, rank as alpha, other names."""
    folder.mkdir()
    weights = safetensors.torch.load_file(trained / LORA_FILE)
    old = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
        for key, value in weights.items()
    }
    safetensors.torch.save_file({**old, **more}, folder / LORA_FILE)
    return folder


def adopt(base: Path, policy: Path | str, folder: Path) -> Path:
    adopt_policy.main(
        adopt_policy.Args(policy=str(policy), model=settings(base, "bfloat16"), output=folder)
    )
    return folder


@pytest.mark.quick("sdxl-file", "sd15-kohya")
@pytest.mark.parametrize("kind", ["folder", "file", "kohya"])
def test_it_adds_to_the_weights_what_it_was_trained_to_add(
    base: Path, trained: Path, tmp_path: Path, kind: str
) -> None:
    place = {
        "folder": lambda: trained,
        "file": lambda: trained / LORA_FILE,
        "kohya": lambda: kohya(base, trained, tmp_path),
    }[kind]()
    expected, found = (
        updates(base, policy) for policy in (trained, adopt(base, place, tmp_path / "out"))
    )
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_an_old_file_without_a_header_has_its_rank_as_alpha(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    found = updates(base, adopt(base, renamed(trained, tmp_path / "old"), tmp_path / "out"))
    for name, value in updates(base, trained).items():  # alpha 8 at rank 4
        torch.testing.assert_close(found[name], value / 2, atol=1e-5, rtol=1e-5)


def test_one_that_lies_in_the_hubs_cache_is_found_by_its_id(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--their-lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / LORA_FILE).symlink_to(trained / LORA_FILE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = updates(base, adopt(base, "someone/their-lora", tmp_path / "out"))
    for name, value in updates(base, trained).items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_text_encoders_part_is_refused_and_not_left_out(
    base: Path, trained: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "diffusers":
        key = (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"
        )
        place = renamed(trained, tmp_path / "old", **{key: torch.ones(2, 2)})
    else:
        place = kohya(base, trained, tmp_path)
        weights = safetensors.torch.load_file(place)
        key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
        safetensors.torch.save_file({**weights, key: torch.ones(2, 2)}, place)
    with pytest.raises(ModelError, match=r"also changes a text encoder \(1 keys, as .*Fuse it"):
        adopt(base, place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_bases_lora_is_refused(tmp_path: Path) -> None:
    other = tiny_models.sdxl(tmp_path / "other")
    policy, _ = load_model(settings(other), device=CPU).load_for_training(None, None, LORA, seed=3)
    save_policy(policy, tmp_path / "policy", "unet")
    with pytest.raises(ModelError, match="does not fit"):
        adopt(tiny_models.sd15(tmp_path / "base"), tmp_path / "policy", tmp_path / "out")
