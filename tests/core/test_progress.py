"""The journal of a run's jobs, what is left of it, and who is told; numbers by hand."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.core.errors import UserError
from stages.core.progress.journal import Call, Job, Journal, Limits, read_calls
from stages.core.progress.notices import notice, notify
from stages.core.progress.terminal import Teller
from stages.core.progress.time_left import (
    core_hours,
    gpu_hours,
    in_words,
    rule_seconds,
    time_left,
)

NO_LIMITS = Limits(cores=None, gpus=None, jobs=None)


def job(number: int, rule: str, *needs: int, **changes: Any) -> Job:
    usual = {"threads": 1, "gpus": 0, "log": f"{rule}.log"}
    return Job(**{"number": number, "rule": rule, "needs": needs, **usual, **changes})


def call(*jobs: Job, limits: Limits = NO_LIMITS) -> Call:
    return Call(begun=0.0, jobs={one.number: one for one in jobs}, limits=limits)


def record(event: str, **facts: Any) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", logging.INFO, "", 0, None, None, None)
    vars(made).update(event=event, **facts)
    return made


def test_what_is_left_follows_needs_and_cores() -> None:
    # 1 and 2 at once, then 3 after both: 10 s, and 5 s of 3; on one core 25 s.
    jobs = [job(1, "sample"), job(2, "sample"), job(3, "train", 1, 2)]
    known = {"sample": 10.0, "train": 5.0}
    assert time_left(call(*jobs), known, 0.0).seconds == 15
    one_core = Limits(cores=1, gpus=None, jobs=None)
    assert time_left(call(*jobs, limits=one_core), known, 0.0).seconds == 25
    # of a running job what is left of it counts: 10 - 4, then the other, then 3
    begun = call(*jobs, limits=one_core)
    begun.take({"event": "started", "time": 100.0, "job": 1, "group_size": 1})
    assert time_left(begun, known, 104.0).seconds == 6 + 10 + 5
    # one that takes longer than the others did is about to end, and never counts less than nothing
    assert time_left(begun, known, 200.0).seconds == 10 + 5
    begun.take({"event": "finished", "time": 108.0, "job": 1})
    assert begun.seconds == {1: 8.0}
    assert time_left(begun, known, 108.0).seconds == 10 + 5


def test_gpus_and_a_schedulers_places_bound_what_goes_at_once() -> None:
    jobs = [job(n, "sample", gpus=1.0, is_local=False) for n in range(4)]
    known = {"sample": 10.0}
    for limits, seconds in (
        (NO_LIMITS, 10),
        (Limits(cores=None, gpus=2, jobs=None), 20),
        (Limits(cores=None, gpus=2, jobs=1), 40),
        (Limits(cores=1, gpus=None, jobs=3), 20),
    ):
        assert time_left(call(*jobs, limits=limits), known, 0.0).seconds == seconds
    shared = [job(n, "score", gpus=1 / 3) for n in range(3)]
    limits = Limits(cores=8, gpus=1, jobs=None)
    assert time_left(call(*shared, limits=limits), {"score": 7.0}, 0.0).seconds == 7
    large = call(job(1, "train", threads=8), limits=Limits(cores=2, gpus=None, jobs=None))
    assert time_left(large, {"train": 3.0}, 0.0).seconds == 3


def test_a_rule_that_has_no_time_yet_makes_it_a_lower_bound_and_failures_are_left_out() -> None:
    found = call(job(1, "sample"), job(2, "train", 1), job(3, "report", 2), job(4, "sample"))
    left = time_left(found, {"sample": 10.0}, 0.0)
    assert (left.seconds, left.untimed) == (10, {"train": 1, "report": 1})
    assert in_words(found, left) == (
        "0 of 4 jobs are done, 0 run; more than 10 s left, as none of train, report has ended yet"
    )
    unknown = call(*(job(n, f"rule{n}") for n in range(5)), job(9, "all", 0, log=""))
    assert in_words(unknown, time_left(unknown, {}, 0.0)) == (
        "0 of 6 jobs are done, 0 run; time left not known, as none of rule0, rule1, rule2 and 2 other rules "
        "has ended yet"
    )
    found.take({"event": "failed", "time": 1.0, "job": 2})  # and with it 3
    left = time_left(found, {"sample": 10.0}, 0.0)
    assert in_words(found, left) == "0 of 4 jobs are done, 0 run, 1 failed; about 10 s left"


def test_times_are_means_of_the_last_call_that_has_some_and_device_hours_are_of_finished_jobs() -> (
    None
):
    first, second = call(job(1, "sample", threads=2, gpus=1.0)), call(job(7, "sample"), job(8, "x"))
    first.seconds[1], second.seconds[7] = 7200.0, 3600.0
    assert rule_seconds([first, second]) == {"sample": 3600.0}
    assert rule_seconds([second, first]) == {"sample": 7200.0}
    second.seconds[8] = 1.0
    both = call(job(1, "sample"), job(2, "sample"))
    both.seconds |= {1: 10.0, 2: 20.0}
    assert rule_seconds([second, both]) == {"sample": 15.0, "x": 1.0}
    assert (gpu_hours(first), core_hours(first)) == (2.0, 4.0)
    assert gpu_hours(second) == 0.0
    assert core_hours(second) == pytest.approx(1.0 + 1 / 3600)


def test_the_journal_of_snakemakes_events_is_read_back_as_it_was(tmp_path: Path) -> None:
    path, heard = tmp_path / "logs" / "jobs.jsonl", []
    jobs = [job(1, "sample", gpus=1.0, log="sample.log"), job(2, "score", 1), job(3, "train", 2)]
    journal = Journal(path, jobs, Limits(cores=4, gpus=2, jobs=None), heard.append)
    members = [SimpleNamespace(jobid=1), SimpleNamespace(jobid=2)]
    journal.emit(record("group_info", jobs=members))
    for number in (1, 2):
        journal.emit(record("job_info", jobid=number))
    time.sleep(0.2)
    for number in (1, 2):
        journal.emit(record("job_finished", job_id=number))
    journal.emit(record("job_info", jobid=3))
    assert journal.call.running == [3]
    journal.emit(record("job_error", jobid=3))
    journal.emit(record("progress", done=1))
    assert (journal.call.running, journal.call.failed) == ([], {3})
    [found] = read_calls(path)
    assert found == journal.call
    assert found.ended is None
    # two jobs of one group share its time
    assert found.seconds[1] == pytest.approx(0.1, abs=0.05)
    assert len(heard) == 2
    journal.emit(record("job_info", jobid=3))  # tried again
    assert (journal.call.running, journal.call.failed) == ([3], set())
    assert not journal.is_interrupted
    stopping = record("None")
    stopping.msg = "Terminating processes on user request, this might take some time."
    journal.emit(stopping)
    assert journal.is_interrupted
    journal.end("interrupted")
    assert read_calls(path)[-1].outcome == "interrupted"


def test_half_a_line_of_a_killed_call_is_passed_over_and_other_damage_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "jobs.jsonl"
    Journal(path, [job(1, "sample")], NO_LIMITS).note("started", job=1, group_size=1)
    whole = path.read_text()
    path.write_text(whole[:-10])
    assert read_calls(path)[0].running == []
    Journal(path, [job(1, "train")], NO_LIMITS)
    assert [call.jobs[1].rule for call in read_calls(path)] == ["sample", "train"]
    path.write_text("rubbish\n" + whole)
    assert len(read_calls(path)) == 1  # as a call follows
    path.write_text(whole + "rubbish\n" + json.dumps({"event": "failed", "job": 1}) + "\n")
    with pytest.raises(UserError, match="line 3 is damaged .*Delete the file"):
        read_calls(path)
    path.write_text("[]\n")
    with pytest.raises(UserError, match="line 1 is damaged .it is list"):
        read_calls(path)
    path.write_text('{"event": "call", "time": 0}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_calls(path)
    path.write_text("")
    with pytest.raises(UserError, match="no call"):
        read_calls(path)
    with pytest.raises(UserError, match="another name"):
        read_calls(tmp_path / "none.jsonl")


def test_a_disk_that_refuses_the_journal_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    journal = Journal(tmp_path / "logs" / "jobs.jsonl", [job(1, "sample")], NO_LIMITS)
    journal.emit(record("job_info", jobid=1))
    assert journal.call.running == [1]


def test_the_terminal_is_told_once_a_minute_and_never_when_quiet_or_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "jobs.jsonl"
    earlier = Journal(path, [job(1, "train")], NO_LIMITS)
    earlier.note("started", job=1, group_size=1)
    earlier.call.take({"event": "finished", "time": earlier.call.started[1] + 30, "job": 1})
    earlier._write({"event": "finished", "time": earlier.call.started[1] + 30, "job": 1})
    now = call(job(5, "sample"), job(6, "train"))
    now.seconds[5] = 10.0
    teller, quiet = Teller(journal=path), Teller(journal=path, is_quiet=True)
    teller(now)
    assert capsys.readouterr().err == ""
    teller.told -= 61
    quiet.told -= 61
    quiet(now)
    teller(now)
    teller(now)
    assert capsys.readouterr().err == "1 of 2 jobs are done, 0 run; about 30 s left\n"
    teller.told -= 61
    now.seconds[6] = 10.0
    teller(now)
    assert capsys.readouterr().err == ""


def told(event: Any = "failed", reason: str = "") -> Any:
    ended = call(job(1, "sample"), job(2, "train", 1, log="logs/train.log"))
    ended.begun = time.time() - 90
    ended.seconds[1] = 5.0
    ended.failed.add(2)
    return notice(event, ended, run="studio", folder=Path("/here"), reason=reason)


def test_a_command_is_told_in_json_and_in_a_sentence(tmp_path: Path) -> None:
    assert notify("cat > told.json", told(), tmp_path) is None
    found = json.loads((tmp_path / "told.json").read_text())
    assert found["event"] == "failed"
    assert found["message"] == (
        "SAIL run 'studio' has failed: 1 of 2 jobs done after 90 s; failed: train."
    )
    assert found["failed"] == [{"rule": "train", "log": "logs/train.log"}]
    assert (found["jobs_done"], found["jobs_planned"], found["results"]) == (1, 2, "results/studio")
    assert found["seconds"] == pytest.approx(90, abs=5)
    assert told("stopped", "it drifted").message.endswith("stopped by its guards: it drifted")
    assert "ended it early: it drifted" in told("finished", "it drifted").message


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("exit 3", "exit code 3"),
        ("echo first; echo no route to host >&2; exit 1", "exit code 1: no route to host"),
        ("no-such-command", "exit code 127"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_a_command_that_fails_is_a_sentence(command: str, problem: str, tmp_path: Path) -> None:
    assert problem in (notify(command, told(), tmp_path) or "")


def test_a_command_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    begun = time.monotonic()
    problem = notify("(sleep 50; touch late) & sleep 60", told(), tmp_path, timeout=0.5)
    assert problem == "it took longer than 0 s and was ended"
    assert time.monotonic() - begun < 20
    # one that leaves something behind in the background is not waited for
    assert notify("sleep 30 & true", told(), tmp_path, timeout=20.0) is None
    assert time.monotonic() - begun < 20
