"""The whole DAG on SD1.5, SDXL, SD3.5, FLUX.1 and Sana, tiny and random, full and LoRA, on 64 prompts."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    FluxPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from stages.core.artifacts import schemas
from stages.core.artifacts.provenance import policy_digest
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.guards import GUARDS_TABLE
from stages.core.method.noising import generator
from tests import flow_models, tiny_models
from tests.builders import encoded, write_rows
from tests.workflow.projects import Project

NUM_PROMPTS = 64
OWN_PROMPTS = Path(__file__).with_name("prompts.txt")
FLOW = ("sd3", "flux", "sana")
TABLES = {
    "seed/preferences.parquet": schemas.PREFERENCES,
    "seed/holdout.parquet": schemas.PREFERENCES,
    "seed/preferences_latents.parquet": schemas.PAIR_LATENTS,
    "prompts/iter*.parquet": schemas.PROMPTS,
    "iter*/candidates/shard-*.parquet": schemas.CANDIDATES,
    "iter*/scores/shard-*.parquet": schemas.REWARDS,
    "iter*/pairs.parquet": schemas.TRAINING_PAIRS,
    "iter*/preferences.parquet": schemas.TRAINING_PAIRS,
    "iter*/training.parquet": schemas.TRAINING,
    "iter*/held_out_curve.parquet": schemas.HELD_OUT_CURVE,
    "evaluation/*/*/images/shard-*.parquet": schemas.IMAGES,
    "evaluation/*/*/scores/*.parquet": schemas.METRIC_SCORES,
    "evaluation/holdout/*.parquet": schemas.HOLDOUT_REWARDS,
    "evaluation/summary.parquet": schemas.SUMMARY,
    "evaluation/guards.parquet": GUARDS_TABLE,
}


def prompts() -> list[str]:
    """64 real prompts: PartiPrompts where they are, else the project's own."""
    folder = os.environ.get("SAIL_TEST_DATA")
    if folder:
        path = Path(folder) / "prompts" / "PartiPrompts.tsv"
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [row["Prompt"] for row in rows[:: len(rows) // NUM_PROMPTS][:NUM_PROMPTS]]
    return OWN_PROMPTS.read_text().splitlines()


def write_data(folder: Path) -> dict[str, Any]:
    """Labelled pairs of noise in the Pick-a-Pic columns, and prompt files; the config's keys."""
    texts, rng = prompts(), np.random.default_rng(0)
    assert len(texts) == NUM_PROMPTS
    rows = [
        {
            "caption": text,
            "jpg_0": encoded(rng.integers(0, 256, (70, 90, 3), np.uint8)),
            "jpg_1": encoded(rng.integers(0, 256, (64, 64, 3), np.uint8)),
            "label_0": float(number % 2),
            "label_1": float(1 - number % 2),
        }
        for number, text in enumerate(texts[:16])
    ]
    write_rows(folder / "pairs.parquet", rows)
    (folder / "pool.txt").write_text("\n".join(texts[16:56]) + "\n")
    (folder / "evaluation.txt").write_text("\n".join(texts[56:]) + "\n")
    return {
        "preferences": {"files": ["pairs.parquet"], "num_pairs": 12, "num_holdout": 4},
        "prompts": {"pool": "pool.txt", "per_iteration": [20, 20]},
        "evaluation": {
            "prompt_sets": {"parti": "evaluation.txt"},
            "metrics": ["colourfulness"],
            "primary_metric": "colourfulness",
            "candidate_metric": "sharpness",
        },
    }


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        pytest.param("sd15", False, id="sd15-full", marks=pytest.mark.slow),
        pytest.param("sdxl", True, id="sdxl-lora", marks=pytest.mark.slow),
        pytest.param("sd3", True, id="sd3-lora", marks=pytest.mark.slow),
        pytest.param("flux", True, id="flux-lora", marks=pytest.mark.slow),
        pytest.param("sana", True, id="sana-lora", marks=pytest.mark.long),
        pytest.param("sd15", True, id="sd15-lora", marks=pytest.mark.long),
        pytest.param("sdxl", False, id="sdxl-full", marks=pytest.mark.long),
    ],
)
def test_the_whole_dag_runs_and_every_artifact_validates(
    tmp_path: Path, family: str, lora: bool
) -> None:
    project = Project(tmp_path)
    base = getattr(tiny_models if family in ("sd15", "sdxl") else flow_models, family)(
        tmp_path / "base"
    )
    training = {"learning_rate": 1e-4, "dpo_beta": 500.0, "batch_pairs": 8}
    if family == "sdxl":
        training["optimizer"] = "adafactor"
    config = {
        "shapes": None,
        "model": {"base": str(base), "dtype": "float32"},
        "train_seed": training,
        "update_policy": training,
        "sample_candidates": {"candidates_per_prompt": 2, "shards": 1},
        "lora": {"rank": 4 if lora else 0},
        "held_out_curve": {"num_pairs": 4, "num_draws": 2, "every_steps": 1},
        "execution": {"micro_batch_pairs": 4, "gradient_checkpointing": True},
        **write_data(tmp_path),
    }
    if family in FLOW:
        of_flow = {"weights": "elbo", "draw_law": "logit_normal"}
        config["train_seed"] = config["update_policy"] = training | of_flow
        config["score_candidates"] = {"weights": "epsilon", "draw_law": "logit_normal"}
        config["sampling"] = {"sampler": "euler"}
        config["export"] = {"policies": ["diffusers", "lora-diffusers"]}
    if family == "flux":
        config["model"]["image_size"] = [64, 64]  # no config of it names one
    project.make("--quiet", "all", config=config)
    results = project.results
    for pattern, schema in TABLES.items():
        paths = sorted(results.glob(pattern))
        assert paths, pattern
        for path in paths:
            assert len(read_table(path, schema)) > 0, path
    for name in ("iter00", "iter01", "iter02"):
        policy_digest(results / name / "policy")
        manifest = json.loads((results / name / "policy" / "manifest.json").read_text())
        assert manifest["kind"] == ("lora" if lora else "full")
    geometry = pq.read_table(results / "seed/preferences_latents.parquet").to_pylist()[0]
    sizes = {tuple(geometry["winner_geometry"]), tuple(geometry["loser_geometry"])}
    assert sizes == {(70, 90, 0, 9, 64, 64), (64, 64, 0, 0, 64, 64)}
    assert "</html>" in (results / "report.html").read_text()
    pipeline: Any = {
        "sd15": StableDiffusionPipeline,
        "sdxl": StableDiffusionXLPipeline,
        "sd3": StableDiffusion3Pipeline,
        "flux": FluxPipeline,
        "sana": SanaPipeline,
    }[family]
    size = {"height": 64, "width": 64}
    how: dict[str, Any] = {
        "flux": size, "sana": {**size, "use_resolution_binning": False}
    }.get(family, {})  # fmt: skip
    opened = pipeline.from_pretrained(base)
    policy = results / "iter02" / "policy"
    if lora:
        opened.load_lora_weights(policy, weight_name="pytorch_lora_weights.safetensors")
    else:
        opened.unet = opened.unet.from_pretrained(policy / "unet")
    opened.set_progress_bar_config(disable=True)
    exports = results / "export" / "iter02"
    kinds = {"diffusers", "lora-diffusers", "lora-kohya"} if lora else {"diffusers"}
    if family in FLOW:
        kinds -= {"lora-kohya"}
    assert {path.name for path in exports.iterdir()} == kinds
    exported = pipeline.from_pretrained(exports / "diffusers", torch_dtype=torch.float32)
    exported.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            "a cat", num_inference_steps=2, generator=generator(0), output_type="np", **how
        ).images[0]
        for pipe in (opened, exported)
    ]
    np.testing.assert_allclose(*pictures, atol=0.01)  # a fused LoRA is float16 by default
    for kind in kinds:
        card = (exports / kind / "README.md").read_text()
        assert "| parti | colourfulness |" in card
        assert "| 2 | update_policy |" in card
    assert opened("a cat", num_inference_steps=1, **how).images[0].size == (64, 64)
    assert project.planned(config=config) == {}
