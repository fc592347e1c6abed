"""What data a run was made from, and a call that gives its name other data."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from stages.core.execution.run_record import (
    made_with,
    other_data,
    read_made_with,
    record_of,
    record_run,
)

ROOT = Path(__file__).resolve().parents[2]


def config(**changes: object) -> dict[str, object]:
    return {
        "run": "studio",
        "preferences": {"files": ["data/a.parquet"]},
        "model": {"base": "models/sd15"},
        "train_seed": {"learning_rate": 1.0},
        **changes,
    }


def test_the_same_data_again_and_settings_are_nothing_to_say(tmp_path: Path) -> None:
    assert other_data(tmp_path, config()) == []
    record_run(tmp_path, config(), ROOT)
    assert other_data(tmp_path, config(train_seed={"learning_rate": 2.0})) == []


def test_other_pairs_or_another_base_under_one_name_are_told(tmp_path: Path) -> None:
    record_run(tmp_path, config(), ROOT)
    files = {"files": ["data/b.parquet"]}
    assert other_data(tmp_path, config(preferences=files)) == [
        'preferences.files was ["data/a.parquet"], now it is ["data/b.parquet"]'
    ]
    assert other_data(tmp_path, config(model={"base": "sdxl"}, shapes={})) == [
        'model.base was "models/sd15", now it is "sdxl"'
    ]
    assert other_data(tmp_path, {**config(model={"base": "sdxl"}), "run": "other"}) == []
    record_run(tmp_path, config(preferences=files), ROOT)
    assert other_data(tmp_path, config(preferences=files)) == []


def test_a_damaged_record_says_nothing(tmp_path: Path) -> None:
    record_run(tmp_path, config(), ROOT)
    (tmp_path / ".snakemake/runs/studio.json").write_text("[]")
    assert other_data(tmp_path, config(model={"base": "sdxl"})) == []


def test_the_record_names_commit_and_versions(tmp_path: Path) -> None:
    record_run(tmp_path, config(), ROOT)
    found = read_made_with(record_of(tmp_path, "studio"))
    assert found == made_with(ROOT)
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["Python"] == platform.python_version()


def test_the_commit_is_gits_and_says_whether_files_were_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "One")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert made_with(tmp_path)["commit"] == commit
    (tmp_path / "code.py").write_text("2")
    assert made_with(tmp_path)["commit"] == f"{commit} with changes"


def test_code_that_lies_in_no_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert made_with(tmp_path)["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert made_with(ROOT)["commit"] is None


def test_no_record_and_a_damaged_one_name_no_code(tmp_path: Path) -> None:
    assert read_made_with(None) == {}
    assert read_made_with(tmp_path / "absent.json") == {}
    for text in ("{", "[]", '{"made_with": 3}', '{"run": 1}'):
        (tmp_path / "damaged.json").write_text(text)
        assert read_made_with(tmp_path / "damaged.json") == {}
