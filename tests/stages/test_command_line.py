"""Every stage from the command line: its help, and a user's mistake as one message."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from stages.core.plan.flags import flags
from tests.builders import read_rows

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for folder in ("stages", "stages/shapes")
    for path in (ROOT / folder).glob("*.py")
    if "run_stage(main" in path.read_text(encoding="utf-8")
)


def squeezed(text: str | None) -> str:
    """Text without its layout, which help frames and wraps."""
    return "".join(character for character in text or "" if character.isalnum())


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """A stage as a person or a rule runs it; warnings are errors there too."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_there_are_stages_to_ask() -> None:
    assert len(STAGES) > 12


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_docstring_and_ends_well(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(stage)
    with pytest.raises(SystemExit) as ended:
        tyro.cli(module.Args, description=module.__doc__, args=["--help"])
    assert ended.value.code == 0
    first = (module.__doc__ or "").strip().splitlines()[0]
    assert squeezed(first) in squeezed(capsys.readouterr().out)


def test_help_of_a_stage_run_as_a_module_shows_its_docstring() -> None:
    found = run("stages.select_prompts", "--help")
    assert found.returncode == 0
    assert squeezed("A pool of prompts in; one set out") in squeezed(found.stdout)


def select(tmp_path: Path, take: int) -> subprocess.CompletedProcess[str]:
    (tmp_path / "pool with space.txt").write_text("a cat\na dog\n")
    values = {
        "pool": tmp_path / "pool with space.txt",
        "shuffle_seed": None,
        "skip": 0,
        "take": take,
        "output": tmp_path / "prompts.parquet",
    }
    return run("stages.select_prompts", *shlex.split(flags(values)))


def test_a_stage_runs_from_flags_and_logs_its_own_line_and_counts(tmp_path: Path) -> None:
    found = select(tmp_path, take=2)
    assert found.returncode == 0, found.stderr
    assert [row["prompt"] for row in read_rows(tmp_path / "prompts.parquet")] == ["a cat", "a dog"]
    assert "python -m stages.select_prompts --output" in found.stderr
    assert "select_prompts: begins" in found.stderr
    assert "select_prompts: done, 2 rows in, 2 rows out" in found.stderr
    assert found.stdout == ""


def test_a_users_mistake_is_one_message_without_a_traceback_and_exit_code_1(tmp_path: Path) -> None:
    found = select(tmp_path, take=3)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "3 prompts were asked for" in lines[0]
    assert not (tmp_path / "prompts.parquet").exists()


def test_a_missing_flag_is_named_and_exit_code_2() -> None:
    found = run("stages.select_prompts", "--skip", "0")
    assert found.returncode == 2
    assert "--pool" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "given",
    [
        ("2",),
        pytest.param(("stages.train_seed",), marks=pytest.mark.slow),
        pytest.param(("0", "stages.train_seed"), marks=pytest.mark.slow),
    ],
)
def test_the_launcher_says_what_it_needs(given: tuple[str, ...]) -> None:
    found = run("stages.launch", *given)
    assert found.returncode == 1
    assert "error: expected the number of processes and a stage, found" in found.stderr
    assert "Traceback" not in found.stderr
