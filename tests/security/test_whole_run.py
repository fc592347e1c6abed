"""The whole DAG at its smallest on hostile prompts, without network: every text comes out as it went in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.data.prompts import normalise, prompt_id
from tests.builders import encoded, image_value, read_rows
from tests.security.hostile import PROMPTS, PWNED
from tests.security.test_pages import ELEMENTS_OF_CARDS, Page, rendered, shown
from tests.workflow.projects import ROOT, Project, environment

pytestmark = pytest.mark.xdist_group("whole run")  # one process makes its run for all

LABELS, POOL, EVALUATION = PROMPTS[0::2], PROMPTS[1::4], PROMPTS[3::4]

GUARD = """
import os, sys

def watch(event, args):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        return
    if event == "socket.connect" and isinstance(args[1], (str, bytes)):
        return  # a socket of the file system
    with open(os.environ["SAIL_NETWORK_LOG"], "a") as log:
        print(event, args[1:] if event == "socket.connect" else args[:2], sys.argv, file=log)
    raise OSError("this test has no network")

sys.addaudithook(watch)
with open(os.environ["SAIL_NETWORK_LOG"] + ".watched", "a") as log:
    print(sys.argv[:1] or "?", file=log)
"""
"""A sitecustomize.py: every process notes that it is watched, and what it asks of the network."""


@dataclass(frozen=True)
class NoNetwork:
    """Processes in `environment` can reach nothing, and what they try is noted."""

    environment: dict[str, str]
    log: Path

    @property
    def tried(self) -> str:
        """What was tried."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def num_watched(self) -> int:
        """How many Python processes there were."""
        return len(self.log.with_name(f"{self.log.name}.watched").read_text().splitlines())


@pytest.fixture(scope="module")
def no_network(tmp_path_factory: pytest.TempPathFactory) -> NoNetwork:
    place = tmp_path_factory.mktemp("no-network")
    (place / "sitecustomize.py").write_text(GUARD)
    (place / "bin").mkdir()
    # Rules set PYTHONPATH themselves; so the `python` that they find adds to it.
    (place / "bin" / "python").write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{place}:$PYTHONPATH"\nexec "{sys.executable}" "$@"\n'
    )
    (place / "bin" / "python").chmod(0o755)
    before = {
        k: v
        for k, v in environment().items()
        if not k.startswith(("HF_", "WANDB", "DISABLE_TELEMETRY"))
    }
    return NoNetwork(
        {
            **before,
            "PATH": f"{place / 'bin'}{os.pathsep}{before['PATH']}",
            "PYTHONPATH": str(place),
            "SAIL_NETWORK_LOG": str(place / "log"),
            "HF_HOME": str(place / "hub"),
        },
        place / "log",
    )


def write_data(folder: Path) -> dict[str, Any]:
    """Labels, pool and evaluation prompts, all hostile; the config's blocks that name them."""
    rng = np.random.default_rng(0)

    def image() -> dict[str, Any]:
        return image_value(encoded(rng.integers(0, 255, (48, 40, 3), np.uint8), "PNG"))

    rows = [{"prompt": text, "chosen": image(), "rejected": image()} for text in LABELS]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "labels.parquet")
    lines = [json.dumps({"prompt": text}) for text in POOL]
    (folder / "data" / "pool.jsonl").write_text("\n".join(lines))
    (folder / "data" / "evaluation.json").write_text(json.dumps(EVALUATION))
    return {
        "shapes": None,
        "iterations": 1,
        "preferences": {"files": ["data/labels.parquet"], "num_pairs": None, "num_holdout": 4},
        "prompts": {"pool": "data/pool.jsonl", "per_iteration": [len(POOL)]},
        "train_seed": {"passes": 1.0},
        "execution": {
            "save_every": 50,
            "warm_start": False,
        },  # every stage is watched from its start
        "evaluation": {
            "prompt_sets": {"mine": "data/evaluation.json"},
            "metrics": ["sharpness"],
            "primary_metric": "sharpness",
            "candidate_metric": None,
            "shards": 1,
        },
        "export": {
            "policies": ["diffusers", "single-file"],
            "preferences": ["pickapic", "imagefolder", "webdataset"],
        },
    }


@pytest.fixture(scope="module")
def project(no_network: NoNetwork, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run."""
    folder = tmp_path_factory.mktemp("hostile") / f"it's a $(touch {PWNED}) run"
    folder.mkdir()
    found = Project(folder)
    done = subprocess.run(
        found.command("--quiet", "rules", config=write_data(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=folder,
        env=no_network.environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return found


def test_the_prompts_are_many_and_stay_apart() -> None:
    names = {prompt_id(text) for text in PROMPTS}
    assert len(names) == len(PROMPTS) > 50
    assert all(normalise(text) for text in PROMPTS)
    assert not set(LABELS) & set(POOL) | set(POOL) & set(EVALUATION)
    for letters in ("\x00", "\n", "$(", "`", "'", '"', "{", "<script>", "\u202e", "|", "%"):
        assert any(letters in text for text in PROMPTS)


@pytest.mark.slow
def test_every_table_holds_the_texts_as_they_were(project: Project) -> None:
    results = project.results
    seed = [
        row["prompt"]
        for name in ("preferences", "holdout")
        for row in read_rows(results / "seed" / f"{name}.parquet")
    ]
    assert sorted(seed) == sorted(LABELS)
    chosen = [row["prompt"] for row in read_rows(results / "prompts" / "iter01.parquet")]
    assert sorted(chosen) == sorted(POOL)
    evaluated = [row["prompt"] for row in read_rows(results / "evaluation/mine/prompts.parquet")]
    assert evaluated == EVALUATION
    found: dict[str, set[str]] = {}
    for path in results.rglob("*.parquet"):
        if "prompt" in pq.read_schema(path).names:
            texts = set(pq.read_table(path, columns=["prompt"]).column("prompt").to_pylist())
            assert texts <= set(PROMPTS), path
            found[str(path.relative_to(results))] = texts
    assert found["iter01/pairs.parquet"] == set(POOL)
    assert set(POOL) < found["iter01/preferences.parquet"]
    assert len(found) > 8


@pytest.mark.slow
def test_the_report_and_the_cards_hold_them_as_texts(project: Project) -> None:
    page = Page((project.results / "report.html").read_text(encoding="utf-8"))
    page.check()
    texts = set(page.texts)
    assert len({shown(prompt) for prompt in EVALUATION} & texts) >= min(12, len(EVALUATION))
    assert len({shown(prompt) for prompt in POOL} & texts) == min(6, len(POOL))
    cards = list((project.results / "export").rglob("README.md"))
    assert len(cards) == 2 * 2 + 3
    for card in cards:
        assert rendered(card.read_text(encoding="utf-8")).elements <= ELEMENTS_OF_CARDS


@pytest.mark.slow
def test_the_exports_hold_them_too(project: Project) -> None:
    export = project.results / "export" / "iter01"
    mixed = {row["prompt"] for row in read_rows(project.results / "iter01/preferences.parquet")}
    lines = (export / "preferences-imagefolder/data/metadata.jsonl").read_text().split("\n")
    assert {json.loads(line)["prompt"] for line in lines if line} == mixed
    (table,) = (export / "preferences-pickapic/data").iterdir()
    assert {row["caption"] for row in read_rows(table)} == mixed


@pytest.mark.slow
def test_no_prompt_was_run_and_nothing_left_the_projects_folder(project: Project) -> None:
    for place in (project.folder, project.folder.parent, ROOT, Path("/tmp"), Path.home()):
        assert not list(place.glob(f"{PWNED}*")), place
    assert not list(project.folder.rglob(f"{PWNED}*"))
    top = {"data", "results", "logs", "work", "config.yaml", ".snakemake"}
    assert {path.name for path in project.folder.iterdir()} <= top


@pytest.mark.slow
def test_no_process_of_the_run_asked_anything_of_the_network(
    project: Project, no_network: NoNetwork
) -> None:
    assert no_network.num_watched > 20  # Snakemake and every stage
    assert no_network.tried == ""
    assert not list(project.folder.rglob("wandb*"))
    assert not list(project.folder.rglob("*tfevents*"))


@pytest.mark.slow
def test_the_watch_sees_what_a_process_tries_and_a_hub_id_is_tried_and_named(
    no_network: NoNetwork, tmp_path: Path
) -> None:
    environment = {**no_network.environment, "SAIL_NETWORK_LOG": str(tmp_path / "log")}
    code = """if True:
        import torch
        from stages.core.models.families import load_model
        from stages.core.models.loading import ModelError, ModelSettings
        try:
            load_model(ModelSettings(base="nobody/nothing", dtype="float32"), device=torch.device("cpu"))
        except ModelError as error:
            print(error)
    """
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            env={**environment, "HF_HUB_OFFLINE": offline},
        )
        assert "nobody/nothing: model_index.json cannot be read" in done.stdout
        tried = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
        assert ("huggingface.co" in tried) == (offline == "0"), tried
        (tmp_path / "log").unlink(missing_ok=True)
