"""The doctor from the command line: one command to type, and an exit code that scripts can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages import doctor, train_seed


def test_a_folder_without_results_is_told_how_to_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.main(doctor.Args(folder=tmp_path))
    printed = capsys.readouterr().out
    assert "nothing has been run yet" in " ".join(printed.split())


def test_a_damaged_policy_ends_with_one_command_and_exit_code_1(
    seed_trained: train_seed.Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "run" / "iter00" / "policy"
    for path in seed_trained.output.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(seed_trained.output)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    doctor.main(doctor.Args(folder=tmp_path))
    assert "1 tables and policies are whole" in " ".join(capsys.readouterr().out.split())
    weights = next(folder.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SystemExit) as ended:
        doctor.main(doctor.Args(folder=tmp_path))
    assert ended.value.code == 1
    printed = "".join(capsys.readouterr().out.split())
    assert f"Type:rm{folder}/manifest.json" in printed
