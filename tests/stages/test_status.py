"""`python -m stages.status`: a run that goes on, one that was killed, one whose jobs failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages import status
from stages.core.errors import UserError
from stages.core.execution.snakemake_lock import hold_run
from stages.core.progress.journal import Job, Journal, Limits

LIMITS = Limits(cores=2, gpus=1, jobs=None)


def job(number: int, rule: str, *needs: int) -> Job:
    return Job(
        number=number,
        rule=rule,
        needs=needs,
        threads=1,
        gpus=1,
        log=f"logs/run/iter01/{rule}-{number}.log",
    )


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A call of two jobs, the first of which has taken an hour, and the second has begun."""
    jobs = [job(1, "sample"), job(2, "sample", 1), job(3, "train", 2)]
    made = Journal(tmp_path / "logs/run/jobs.jsonl", jobs, LIMITS)
    made._write({"event": "started", "time": made.call.begun, "job": 1, "group_size": 1})
    made._write({"event": "finished", "time": made.call.begun + 3600, "job": 1})
    made.note("started", job=2, group_size=1)
    return made


def told(folder: Path, capsys: pytest.CaptureFixture[str], run: str = "run") -> str:
    capsys.readouterr()
    status.main(status.Args(run=run, folder=folder))
    return capsys.readouterr().out


def test_a_run_at_work_is_told_with_what_runs_what_it_cost_and_what_is_left(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = hold_run(tmp_path, "run")
    assert lock is not None
    with lock:
        text = told(tmp_path, capsys, "results/run")
        assert "run is at work for 0 s" in text
        assert "1 of 3 jobs are done, 1 run; more than 60 min left, as none of train has" in text
        assert "runs: iter01/sample-2 for 0 s of about 60 min" in text
        assert "Finished jobs of 1 calls: 1, 1.00 GPU hours and 1.00 core hours." in text
        rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-2:]}
        assert rows == {"sample": ["1", "1", "60", "min"], "train": ["0", "1", "not", "known"]}
        # with a time for every rule there is an end
        journal._write({"event": "started", "time": journal.call.begun, "job": 3, "group_size": 1})
        journal._write({"event": "finished", "time": journal.call.begun + 60, "job": 3})
        text = told(tmp_path, capsys)
        assert "about 60 min left" in text
        assert "It ends about " in text


def test_a_run_that_was_killed_is_told_as_such(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert journal.call.ended is None
    text = told(tmp_path, capsys)
    assert "run was killed" in text
    assert "Call snakemake again; it goes on from here" in text
    assert "runs: " not in text
    assert "1 of its 3 jobs were done." in text


def test_a_failed_run_names_the_jobs_and_their_logs(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.note("failed", job=2)
    journal.end("failed")
    text = told(tmp_path, capsys)
    assert "run has failed" in text
    assert "failed: iter01/sample-2; its log is logs/run/iter01/sample-2.log" in text


def test_a_run_that_is_not_there_and_a_damaged_journal_are_refused(
    journal: Journal, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"other/jobs.jsonl cannot be read .*another name"):
        status.main(status.Args(run="other", folder=tmp_path))
    journal.path.write_text("rubbish\nmore\n")
    with pytest.raises(UserError, match=r"jobs.jsonl, line 1 is damaged .*Delete the file"):
        status.main(status.Args(run="run", folder=tmp_path))
