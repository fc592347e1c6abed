"""adopt_policy: a policy trained elsewhere becomes policy 0, if it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stages import adopt_policy
from stages.core.artifacts.provenance import policy_digest
from stages.core.models.adapter import DiffusionModel
from stages.core.models.loading import ModelError
from stages.core.models.policy import Policy
from tests import tiny_models
from tests.builders import settings


def test_a_unet_from_elsewhere_is_adopted_bit_for_bit(
    model: DiffusionModel, other_policy: Path, tiny_base: str, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "unet").symlink_to(other_policy / "unet")  # a model, not a policy of ours
    args = adopt_policy.Args(
        policy=str(elsewhere), model=settings(tiny_base, "bfloat16"), output=tmp_path / "policy"
    )
    adopt_policy.main(args)
    policy_digest(args.output)
    manifest = json.loads((args.output / "manifest.json").read_text())
    assert (manifest["kind"], manifest["adopted_from"]) == ("full", str(elsewhere))
    found, expected = (
        model.load_denoiser(Policy(p)).state_dict() for p in (args.output, other_policy)
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_policy_of_another_architecture_is_refused(tiny_base: str, tmp_path: Path) -> None:
    other = tiny_models.sd15(tmp_path / "other")
    args = adopt_policy.Args(
        policy=str(other), model=settings(tiny_base), output=tmp_path / "policy"
    )
    with pytest.raises(ModelError, match="belongs to another base model"):
        adopt_policy.main(args)
    assert not args.output.exists()
