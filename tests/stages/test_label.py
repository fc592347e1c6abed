"""The labelling page as a command: kill -9, Ctrl-C, two servers, bad flags, images that it makes itself."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import tyro

from stages import label
from stages.core.artifacts.images import decode_image
from stages.core.artifacts.schemas import CANDIDATES
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.core.labelling.answers import CHOICES, RANKING_CHOICES
from stages.core.pages.journal import Journal, read_journal, standing
from tests import flow_models
from tests.builders import CAPTIONS, read_rows
from tests.labelling.builders import answer_all, open_desk, write_images
from tests.labelling.servers import Person, serving
from tests.pages.forked import forked

LOST = (urllib.error.URLError, HTTPException, ConnectionError)
"""What a person sees of a server that was killed."""


def args(tmp_path: Path, **more: Any) -> label.Args:
    given = {"images": (tmp_path / "images",), "labels": tmp_path / "labels"}
    return label.Args(**{**given, "port": 0, "open_browser": False, **more})


def kill_after_any_key(tmp_path: Path, rounds: int, seed: int, *more: str) -> None:
    """Label; kill -9 at a random moment of some key; start again: all that was shown as saved is there.

    The one whose page never came back may be there or not.
    """
    rng = random.Random(seed)
    images = write_images(tmp_path / "images", len(CAPTIONS), 4)
    journal = tmp_path / "labels" / label.ANSWERS
    flags = (
        "--images",
        str(images),
        "--labels",
        str(tmp_path / "labels"),
        "--pairs-per-prompt",
        "6",
        *more,
    )
    saved: dict[str, str] = {}
    for _ in range(rounds):
        with forked("stages.label", tmp_path / "killed.log", *flags) as (process, line):
            assert process.pid is not None
            person = Person(line.split()[1], "ann")
            assert {
                e["pair"]: e["answer"] for e in standing(read_journal(journal)).values()
            } == saved
            for _ in range(rng.randrange(3)):
                take_one(person, saved, rng)
            killer = Timer(rng.uniform(0, 0.05), os.kill, (process.pid, signal.SIGKILL))
            killer.start()
            before = dict(saved)
            try:
                while True:
                    before = dict(saved)
                    take_one(person, saved, rng)
            except LOST:
                killer.join()
                process.join()
        found = {e["pair"]: e["answer"] for e in standing(read_journal(journal)).values()}
        unsure = set(found.items()) ^ set(before.items())
        assert len(unsure) <= 1, unsure
        saved.clear()
        saved.update(found)


def take_one(person: Person, saved: dict[str, str], rng: random.Random) -> None:
    """Answer, or now and then undo (on a fast machine all are answered before the end), and note what the server says is saved."""
    if person.is_done or (saved and rng.random() < 0.2):
        person.post("/undo")
        saved.pop(person.pair)
    else:
        key, is_set = person.pair, "data-ranked" in person.page
        choice = rng.choice(RANKING_CHOICES if is_set else CHOICES)
        ranks = rng.sample([1, 2, 3, 4], 4) if choice == "ranked" else []
        person.answer(choice, *ranks)
        saved[key] = choice


def test_killed_after_any_key_no_answer_is_lost(tmp_path: Path) -> None:
    kill_after_any_key(tmp_path, 10, 0)


@pytest.mark.slow
def test_killed_after_any_ranking_no_order_is_lost(tmp_path: Path) -> None:
    kill_after_any_key(tmp_path, 4, 0, "--show", "4")


def test_pairs_and_rankings_are_kept_in_folders_of_their_own(tmp_path: Path) -> None:
    images, labels = write_images(tmp_path / "images", 3, 4), tmp_path / "labels"
    flags = ("--images", str(images), "--labels", str(labels))
    with serving(*flags, "--show", "4") as (process, address):
        person = Person(address, "ann")
        person.answer("ranked", 2, 1, 1, 3)
        person.answer("all_bad")
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    assert "1 rankings; left out are 1 sets of which all are bad and 0" in log
    assert "ann chose the first image" not in log  # two were called the best
    assert [row["ranks"] for row in read_rows(labels / label.LABELS)] == [[2, 1, 1, 3]]
    label.main(args(tmp_path, export=True))  # whichever --show says
    assert [row["ranks"] for row in read_rows(labels / label.LABELS)] == [[2, 1, 1, 3]]
    with pytest.raises(UserError, match=r"answers about rankings .* and --show is 2"):
        label.main(args(tmp_path))


@pytest.mark.slow
def test_killed_a_hundred_times_no_answer_is_lost(tmp_path: Path) -> None:
    kill_after_any_key(tmp_path, 100, 1)


@pytest.mark.parametrize(
    "end", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_however_it_is_ended_the_labels_are_written(tmp_path: Path, end: signal.Signals) -> None:
    images, labels = write_images(tmp_path / "images", 5), tmp_path / "labels"
    with serving("--images", str(images), "--labels", str(labels)) as (process, address):
        person = Person(address, "ann")
        for choice in ("left", "right", "tie", "skip"):
            person.answer(choice)
        process.send_signal(end)
        _, log = process.communicate(timeout=60)
    assert "2 preferences and 1 ties; left out are 0 pairs of which both are bad and 1" in log
    assert "ann chose the left image 50 % of 2 times" in log
    assert len(read_rows(labels / label.LABELS)) == 3
    assert process.returncode == (0 if end == signal.SIGINT else 143)


def test_export_writes_the_labels_beside_a_running_server_and_after_a_kill(tmp_path: Path) -> None:
    images, labels = write_images(tmp_path / "images", 4), tmp_path / "labels"
    flags = ("--images", str(images), "--labels", str(labels))
    with serving(*flags) as (process, address):
        person = Person(address, "ann")
        person.answer("left")
        label.main(args(tmp_path, export=True))
        assert len(read_rows(labels / label.LABELS)) == 1
        person.answer("right")
        process.kill()
    label.main(args(tmp_path, export=True))
    assert len(read_rows(labels / label.LABELS)) == 2


def test_export_without_answers_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "images", 2)
    with pytest.raises(UserError, match=r"labels/answers.jsonl does not exist"):
        label.main(args(tmp_path, export=True))
    with Journal(tmp_path / "labels" / label.ANSWERS):
        pass
    with caplog.at_level(logging.INFO):
        label.main(args(tmp_path, export=True))
    assert "nothing was answered yet" in caplog.text
    assert not (tmp_path / "labels" / label.LABELS).exists()


def test_a_second_server_on_the_same_labels_is_refused_by_the_firsts_process(
    tmp_path: Path,
) -> None:
    images = write_images(tmp_path / "images", 3)
    flags = ("--images", str(images), "--labels", str(tmp_path / "labels"))
    with (
        serving(*flags) as (process, _),
        pytest.raises(UserError, match=rf"another server, process {process.pid}\b"),
    ):
        label.main(args(tmp_path))


def test_a_port_in_use_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use"):
            label.main(args(tmp_path, port=port))
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"images": ()}, "found neither"),
        ({"prompts": Path("prompts.txt")}, "found both"),
        ({"images": (), "prompts": Path("prompts.txt")}, "--prompts needs --base"),
        ({"pairs_per_prompt": 0}, "--pairs-per-prompt must be at least 1, found 0"),
        ({"images_per_prompt": 1}, "--images-per-prompt must be at least 2, found 1"),
        ({"images_per_prompt": 3, "show": 4}, "--images-per-prompt must be at least 4, found 3"),
        ({"common_share": 1.5}, "--common-share must be from 0 to 1, found 1.5"),
        ({"images": (Path("nowhere"),)}, "--images nowhere does not exist"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_refused(
    tmp_path: Path, more: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        label.main(args(tmp_path, **more))
    assert not (tmp_path / "labels").exists()


def test_a_mistake_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "stages.label", "--images", str(tmp_path / "empty"), "--labels",
         str(tmp_path / "labels"), "--port", "0"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'empty'} holds no images" in line
    assert "Traceback" not in done.stderr


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The page is not served; how often it would have been."""
    calls: list[object] = []
    monkeypatch.setattr(label, "serve", lambda app, **_: calls.append(app))
    return lambda: len(calls)


def sampling(tmp_path: Path, base: str, **more: Any) -> label.Args:
    given = {
        "images": (),
        "prompts": tmp_path / "prompts.txt",
        "base": base,
        "num_inference_steps": 2,
    }
    return args(tmp_path, **{**given, **more})


def test_a_flow_model_makes_images_of_the_size_that_is_asked_for(
    tmp_path: Path, no_server: Callable[[], int]
) -> None:
    base = flow_models.sd3(tmp_path / "sd3", has_t5=False)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:3]))
    flags = ("--prompts", str(tmp_path / "prompts.txt"), "--base", str(base), "--labels", str(tmp_path / "labels"),
             "--sampler", "euler", "--image-size", "32", "64", "--num-inference-steps", "2", "--port", "0",
             "--no-open-browser")  # fmt: skip
    label.main(tyro.cli(label.Args, args=flags))
    rows = read_table(tmp_path / "labels" / label.SAMPLED, CANDIDATES).to_pylist()
    assert len(rows) == 6
    assert {decode_image(row["image"]["bytes"]).size for row in rows} == {(64, 32)}
    assert no_server() == 1


def test_prompts_and_a_model_make_the_images_once(
    tmp_path: Path, tiny_base: str, no_server: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:3]))
    label.main(sampling(tmp_path, tiny_base))
    path = tmp_path / "labels" / label.SAMPLED
    table = read_table(path, CANDIDATES).to_pylist()
    assert [(row["prompt"], row["candidate"]) for row in table] == [
        (prompt, number) for prompt in CAPTIONS[:3] for number in range(2)
    ]
    assert len({row["image"]["bytes"] for row in table}) == 6
    made = path.stat().st_mtime_ns
    time.sleep(0.01)
    with caplog.at_level(logging.INFO):
        label.main(sampling(tmp_path, tiny_base, common_share=1.0))
    assert "the 6 images" in caplog.text
    assert path.stat().st_mtime_ns == made
    assert no_server() == 2
    with pytest.raises(UserError, match=r"holds images of other prompts, or of another model"):
        label.main(sampling(tmp_path, tiny_base, guidance_scale=2.0))
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:4]))
    with pytest.raises(UserError, match=r"holds images of other prompts, or of another model"):
        label.main(sampling(tmp_path, tiny_base))
    with open_desk([path], tmp_path / "other.jsonl") as desk:
        assert len(answer_all(desk, "ann")) == 3


def test_a_sampling_that_was_stopped_goes_on_and_makes_the_same_images(
    tmp_path: Path, tiny_base: str, no_server: Callable[[], int], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from stages.core.policies import generation

    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:5]))
    label.main(sampling(tmp_path, tiny_base, labels=tmp_path / "unbroken"))
    real = generation.sample_latents
    calls = []

    def stop_at_the_fourth(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(generation, "sample_latents", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            label.main(sampling(tmp_path, tiny_base))
    assert not (tmp_path / "labels" / label.SAMPLED).exists()
    with caplog.at_level(logging.INFO):
        label.main(sampling(tmp_path, tiny_base))
    assert "batches are done and kept; going on" in caplog.text
    unbroken, resumed = (
        read_table(tmp_path / name / label.SAMPLED, CANDIDATES) for name in ("unbroken", "labels")
    )
    assert unbroken.equals(resumed)


def test_export_of_images_that_were_never_made_is_refused(tmp_path: Path, tiny_base: str) -> None:
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0])
    with pytest.raises(
        UserError, match=r"candidates.parquet does not exist; call .* without --export"
    ):
        label.main(sampling(tmp_path, tiny_base, export=True))
