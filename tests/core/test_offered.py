"""What each family offers: the schema's list is the adapters', and a config that asks for more is refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from stages.core.export.policies import Format
from stages.core.method.objective import LossName
from stages.core.models.families import ADAPTERS
from stages.core.models.flow import FLOW_WEIGHTS, FlowModel
from stages.core.plan.configuration import ConfigError, check_config, read_config
from stages.core.plan.families import families, family_of
from stages.core.plan.run import RunPlan
from stages.core.training.settings import ErrorWeights

ROOT = Path(__file__).resolve().parents[2]


def config(**model: Any) -> dict[str, Any]:
    """The repository's own, with another model."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    values["model"] |= model
    return values


@pytest.mark.parametrize("pipeline", ADAPTERS)
def test_the_list_is_what_the_adapter_offers(pipeline: str) -> None:
    adapter = ADAPTERS[pipeline]()
    offer = families()[adapter.family]
    assert offer["pipeline"] == pipeline
    assert offer["denoiser"] == adapter.denoiser_part
    assert tuple(offer["sampling.sampler"]) == adapter.samplers
    assert tuple(offer["export.policies"]) == adapter.exports
    is_flow = issubclass(adapter, FlowModel)
    assert ("step_judge.clip" in offer) == is_flow == ("ddim" not in adapter.samplers)
    assert tuple(offer["training.weights"]) == (FLOW_WEIGHTS if is_flow else ("uniform",))
    assert set(offer["training.loss"]) <= set(get_args(LossName))
    assert tuple(offer["training.loss"]) == adapter.losses
    assert ("mapo" in adapter.losses) != is_flow
    is_told = offer["training.embedded_guidance"] is None
    assert is_told == (adapter.family == "flux")
    assert offer["score_candidates.embedded_guidance"] == offer["training.embedded_guidance"]
    assert (offer["model.max_sequence_length"] is None) == adapter.has_max_sequence_length


def test_every_family_is_listed_and_so_is_every_value() -> None:
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    properties, training = schema["properties"], schema["$defs"]["training"]["properties"]
    assert properties["model"]["properties"]["family"]["enum"] == [None, *families()]
    assert len(families()) == len(ADAPTERS)
    listed: dict[str, set[Any]] = {}
    for offer in families().values():
        for key, values in offer.items():
            if "." in key and values is not None:
                listed.setdefault(key, set()).update(values)
    assert listed["sampling.sampler"] == set(
        properties["sampling"]["properties"]["sampler"]["enum"]
    )
    assert listed["score_candidates.weights"] == set(
        properties["score_candidates"]["properties"]["weights"]["enum"]
    )
    assert (
        listed["training.weights"]
        == set(training["weights"]["enum"])
        == set(get_args(ErrorWeights))
    )
    assert listed["training.loss"] == set(training["loss"]["enum"])
    assert listed["export.policies"] == set(get_args(Format))


@pytest.mark.parametrize(
    ("family", "block", "changes", "expected"),
    [
        ("flux", "train_seed", {"loss": "mapo"}, "'train_seed.loss': 'mapo' is not there for models of flux"),
        ("sana", "update_policy", {"loss": "mapo"}, "'update_policy.loss': 'mapo' is not there"),
        ("stable-diffusion", "update_policy", {"weights": "elbo"}, "'elbo' is not there for models of stable-d"),
        ("stable-diffusion", "sampling", {"sampler": "euler"}, "which offer ddpm, ddim"),
        ("stable-diffusion-3", "sampling", {"sampler": "dpm"}, "which offer euler, euler_stochastic"),
        ("stable-diffusion", "score_candidates", {"weights": "velocity"}, "'velocity' is not there for models of"),
        ("stable-diffusion-3", "train_seed", {"embedded_guidance": 3.5}, "'train_seed.embedded_guidance': 3.5"),
        ("sana", "model", {"max_sequence_length": 77}, "'model.max_sequence_length': 77 is not there for models of"),
        ("flux", "export", {"policies": ["lora-kohya"]}, "'lora-kohya' is not there for models of flux"),
        ("sana", "online", {"method": "spo", "judge": "spm"}, "'online.judge': 'spm' is a step-aware preference"),
        ("flux", "step_judge", {"clip": "a/clip"}, "'step_judge.clip': 'a/clip' is not there for models of fl"),
        ("flux", "export", {"policies": ["single-file"]}, "which offer diffusers, lora-diffusers"),
    ],
)  # fmt: skip
def test_what_a_family_lacks_is_refused_by_its_key(
    family: str, block: str, changes: dict[str, Any], expected: str
) -> None:
    asked = config(family=family) | {"lora": {"rank": 4}}
    if family != "stable-diffusion":
        asked["sampling"]["sampler"] = "euler"
        asked["export"] = {"policies": ["diffusers", "lora-diffusers"]}
    check_config(asked)
    asked.setdefault(block, {}).update(changes)
    with pytest.raises(ConfigError) as caught:
        check_config(asked)
    assert expected in str(caught.value)
    assert str(caught.value).count("\n") == 1


def test_without_a_lora_the_layouts_of_loras_that_are_not_written_do_not_count() -> None:
    asked = config(family="flux")
    asked["sampling"]["sampler"] = "euler"
    check_config(asked)  # lora-kohya is among the defaults


def test_a_models_own_folder_says_its_family(tmp_path: Path) -> None:
    asked = check_config(config(base=str(tmp_path)))
    assert family_of(asked) is None
    assert RunPlan(config=asked).denoiser_part == "unet"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    plan = RunPlan(config=asked)
    assert plan.family == "flux"
    assert plan.denoiser_part == "transformer"
    assert plan.tokenizer is None
    [problem] = plan.family_problems()
    assert str(problem).startswith("sampling.sampler: 'ddim' is not there for models of flux")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"})
    )
    (tmp_path / "tokenizer").mkdir()
    assert plan.tokenizer == tmp_path / "tokenizer"
    assert list(plan.family_problems()) == []
    for broken in ("[]", "{", '{"_class_name": 3}'):
        (tmp_path / "model_index.json").write_text(broken)
        assert family_of(asked) is None


@pytest.mark.parametrize("name", ["sd35", "flux"])
def test_the_presets_of_flow_pass_and_name_their_family(name: str) -> None:
    checked = read_config(ROOT / "config" / f"{name}.yaml")
    assert checked["model"]["family"] == {"sd35": "stable-diffusion-3", "flux": "flux"}[name]
    with pytest.raises(ConfigError, match="'train_seed.loss': 'mapo' is not there"):
        read_config(ROOT / "config" / f"{name}.yaml", ROOT / "config" / "overlays" / "mapo.yaml")
    overlays = ROOT / "config" / "overlays"
    read_config(ROOT / "config" / f"{name}.yaml", overlays / "ddpo.yaml")
    with pytest.raises(ConfigError, match="'online.judge': 'spm' is a step-aware .* Take 'self'"):
        read_config(ROOT / "config" / f"{name}.yaml", overlays / "spo.yaml")


def test_only_the_family_that_is_told_its_guidance_is_counted_with_one_row() -> None:
    found = {name: RunPlan(config=config(family=name)).is_told_guidance for name in families()}
    assert [name for name, is_told in found.items() if is_told] == ["flux"]
    assert not RunPlan(config=config(base="a/hub-id")).is_told_guidance
