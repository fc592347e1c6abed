"""What data a run was made from, and a call that gives its name other data."""

from __future__ import annotations

from pathlib import Path

from stages.core.execution.run_record import other_data, record_run


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
    record_run(tmp_path, config())
    assert other_data(tmp_path, config(train_seed={"learning_rate": 2.0})) == []


def test_other_pairs_or_another_base_under_one_name_are_told(tmp_path: Path) -> None:
    record_run(tmp_path, config())
    files = {"files": ["data/b.parquet"]}
    assert other_data(tmp_path, config(preferences=files)) == [
        'preferences.files was ["data/a.parquet"], now it is ["data/b.parquet"]'
    ]
    assert other_data(tmp_path, config(model={"base": "sdxl"}, shapes={})) == [
        'model.base was "models/sd15", now it is "sdxl"'
    ]
    assert other_data(tmp_path, {**config(model={"base": "sdxl"}), "run": "other"}) == []
    record_run(tmp_path, config(preferences=files))
    assert other_data(tmp_path, config(preferences=files)) == []


def test_a_damaged_record_says_nothing(tmp_path: Path) -> None:
    record_run(tmp_path, config())
    (tmp_path / ".snakemake/runs/studio.json").write_text("[]")
    assert other_data(tmp_path, config(model={"base": "sdxl"})) == []
