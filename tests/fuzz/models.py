"""A model's own configs with something wrong in them: it is refused, or sampled on the schedule they say."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from hypothesis import strategies as st

from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from tests import tiny_models
from tests.fuzz.strategies import FATES, JSON

FILES = {
    "scheduler/scheduler_config.json": 5,
    "unet/config.json": 2,
    "vae/config.json": 2,
    "model_index.json": 1,
}
"""A model's configs, and how often each is changed, in parts."""
LIKELY: dict[str, list[Any]] = {
    "_class_name": [
        "DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "KarrasVeScheduler",
        "EDMEulerScheduler", "DPMSolverMultistepScheduler", "StableDiffusionXLPipeline",
        "StableDiffusionInpaintPipeline", "os.system", None,
    ],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction", None],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "nonsense"],
    "rescale_betas_zero_snr": [True, False],
    "clip_sample": [True, False, None],
    "timestep_spacing": ["leading", "trailing", "linspace", "backwards"],
    "num_train_timesteps": [1000, 10, 1, 0, -1],
    "beta_start": [0.00085, 0, 2, -1], "beta_end": [0.012, 0, 1, 5],
    "trained_betas": [None, [0.1] * 1000, [0.1]], "use_flow_sigmas": [True],
    "sample_size": [8, [8, 8], None, 0, -8], "in_channels": [4, 9, 0], "out_channels": [4, 8],
    "time_cond_proj_dim": [None, 256], "block_out_channels": [[16, 32], [], None],
    "latents_mean": [None, [0.0] * 4, [0.0]], "latents_std": [None, [1.0] * 4, [0.0] * 4],
    "scaling_factor": [0.18215, 0, None], "force_upcast": [True, False],
}  # fmt: skip
Case = tuple[str, list[tuple[str, str, Any]]]
"""A family, and the changes: file, key, value. The value GONE removes the key."""
GONE = "a key that is gone"


@cache
def _bases() -> dict[str, Path]:
    """A model of each family for this process, in a folder of its own."""
    folder = Path(tempfile.gettempdir()) / f"sail-fuzz-models-{os.getpid()}"
    return {
        "sd15": tiny_models.sd15(folder / "sd15"), "sdxl": tiny_models.sdxl(folder / "sdxl")
    }  # fmt: skip


@st.composite
def model_configs(draw: st.DrawFn) -> Case:
    """Some changes of a model's configs: likely values, junk, or no value at all."""
    changes = []
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        file = draw(st.sampled_from([name for name, parts in FILES.items() for _ in range(parts)]))
        key = draw(st.sampled_from(list(LIKELY)))
        values = st.one_of(st.sampled_from(LIKELY[key]), st.just(GONE))
        value = draw(JSON if draw(FATES) in range(11, 17) else values)
        changes.append((file, key, value))
    return draw(st.sampled_from(["sd15", "sdxl"])), changes


def load(case: Case, folder: Path) -> object:
    """Read it as every stage does, up to its weights.

    AssertionError where it is read on another schedule than its config says.
    """
    family, changes = case
    base = _bases()[family]
    shutil.copytree(base, folder, dirs_exist_ok=True, copy_function=_link)
    for file, key, value in changes:
        path = folder / file
        config = json.loads(path.read_text())
        config[key] = copy.deepcopy(value)
        if value == GONE:
            del config[key]
        path.unlink()
        path.write_text(json.dumps(config))
    model = load_model(ModelSettings(base=str(folder), dtype="float32"), device=torch.device("cpu"))
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    known = {k: config[k] for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps",
             "trained_betas", "rescale_betas_zero_snr") if k in config}  # fmt: skip
    ours, theirs = model.sampler("ddim"), DDPMScheduler(**known)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.config.clip_sample == bool(config.get("clip_sample", False))
    return model.latents_shape, model.image_size, model.num_timesteps


def _link(source: str, target: str) -> None:
    os.link(source, target)
