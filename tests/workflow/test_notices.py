"""A run that ends tells a command of the config, and its journal says how far it came: real calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages import status
from stages.core.errors import UserError
from stages.core.progress.journal import read_calls
from tests.builders import human_row, write_rows
from tests.workflow.projects import Project

QUICK = "results/test/world/pool.txt"
TELL = "tee -a told.jsonl"


def tellings(project: Project) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.folder / "told.jsonl").read_text().splitlines()]


def status_of(project: Project, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    status.main(status.Args(run="results/test", folder=project.folder))
    return capsys.readouterr().out


def test_a_finished_run_tells_and_has_a_journal_even_when_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path)
    project.make("--quiet", "--", QUICK, config={"notify": TELL})
    [told] = tellings(project)
    assert (told["event"], told["run"], told["failed"], told["reason"]) == (
        "finished",
        "test",
        [],
        "",
    )
    assert told["jobs_done"] == told["jobs_planned"] == 1
    assert told["folder"] == str(tmp_path.resolve())
    [call] = read_calls(project.logs / "jobs.jsonl")
    assert [job.rule for job in call.jobs.values()] == ["split_captions"]
    assert (call.outcome, call.limits.cores, len(call.seconds)) == ("finished", 2, 1)
    assert call.jobs[0].log == "logs/test/world/split_captions.log"
    shown = status_of(project, capsys)
    assert "test has finished" in shown
    assert "1 of its 1 jobs were done" in shown
    # nothing to do tells nobody, and neither does a plan or --touch
    for flags in (["--quiet"], ["--dry-run"], ["--touch", "--force"]):
        project.make(*flags, "--", QUICK, config={"notify": TELL})
    assert len(tellings(project)) == 1
    assert len(read_calls(project.logs / "jobs.jsonl")) == 1
    with pytest.raises(UserError, match="cannot be read"):
        status.main(status.Args(run="another", folder=project.folder))


def test_a_failed_run_tells_and_a_command_that_fails_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path)
    write_rows(tmp_path / "data/pairs.parquet", [human_row("a red circle")])
    (tmp_path / "data/prompts.txt").write_text("a fern in the rain\n" * 3)
    config: dict[str, Any] = {
        "shapes": None, "iterations": 0, "preferences": {"files": ["data/pairs.parquet"]},
        "evaluation": {"prompt_sets": {"ours": "data/prompts.txt"}}, "notify": f"{TELL}; exit 5",
    }  # fmt: skip
    target = "results/test/seed/preferences.parquet"
    done = project.call("--", target, config=config)
    assert done.returncode != 0  # one pair is too few
    words = " ".join(done.stdout.split())
    assert "notify: its command has told nobody, because it ended with exit code 5" in words
    [told] = tellings(project)
    assert told["event"] == "failed"
    assert told["failed"] == [
        {"rule": "import_preferences", "log": "logs/test/seed/import_preferences.log"}
    ]
    assert told["message"].endswith("failed: import_preferences.")
    shown = status_of(project, capsys)
    assert "test has failed" in shown
    assert (
        "failed: seed/import_preferences; its log is logs/test/seed/import_preferences.log" in shown
    )
