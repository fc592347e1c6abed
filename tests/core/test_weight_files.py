"""Weight files: their bytes follow from their content, and other tools read them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LORA_FILE
from stages.core.models.weight_files import save_weights
from tests.builders import LORA

ROOT = Path(__file__).resolve().parents[2]
METADATA = {f'{number}.müde "{number}"\n': "ü\\\x01\x7f/" for number in range(8)}
SAVE = """
import sys, torch
from pathlib import Path
from stages.core.models.weight_files import save_weights
from tests.core.test_weight_files import METADATA
torch.manual_seed(0)
weights = {f"layer.{number}": torch.randn(3, number + 1) for number in range(9)}
weights["count"] = torch.tensor([7])
save_weights(weights, Path(sys.argv[1]), METADATA)
"""


def of_another_process(path: Path, hash_seed: int) -> bytes:
    subprocess.run(
        [sys.executable, "-c", SAVE, str(path)],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": str(hash_seed)}, check=True,
    )  # fmt: skip
    return path.read_bytes()


@pytest.mark.slow
def test_two_processes_write_equal_bytes(tmp_path: Path) -> None:
    first, second = (of_another_process(tmp_path / str(seed), seed) for seed in (1, 2))
    assert first == second  # eight entries: by chance once in 40,320


def test_the_content_is_what_was_given(tmp_path: Path) -> None:
    weights = {"b": torch.randn(2, 3).T, "a": torch.arange(5), "c": torch.randn(4).half()}
    path = tmp_path / "model.safetensors"
    save_weights(weights, path, METADATA)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == set(weights)
    for name, value in load_file(path).items():
        assert torch.equal(value, weights[name])
        assert value.dtype == weights[name].dtype
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert list(header["__metadata__"]) == sorted(METADATA)
    assert size % 8 == 0  # the tensors begin where they did


def test_a_lora_has_one_digest_and_opens_in_diffusers_and_peft(
    model: DiffusionModel, tiny_base: str, tmp_path: Path
) -> None:
    policy, _ = model.load_for_training(None, None, LORA, seed=3)
    digests = set()
    for number in range(12):  # by chance equal once in 2,048
        policy.save(tmp_path / str(number), model.denoiser_part)
        digests.add(hashlib.sha256((tmp_path / str(number) / LORA_FILE).read_bytes()).hexdigest())
    assert len(digests) == 1
    own = policy.state_dict()
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, set_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "0", adapter_name="policy")
    loaded = dict(pipeline.unet.named_parameters())
    assert own
    assert all(torch.equal(loaded[name], value.cpu()) for name, value in own.items())

    plain = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None).unet
    plain.add_adapter(
        LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.target_modules)),
        adapter_name="policy",
    )
    tensors = load_file(tmp_path / "0" / LORA_FILE)
    found = set_peft_model_state_dict(
        plain, {name.removeprefix("unet."): value for name, value in tensors.items()}, "policy"
    )
    assert not found.unexpected_keys
    loaded = dict(plain.named_parameters())
    assert all(torch.equal(loaded[name], value.cpu()) for name, value in own.items())
