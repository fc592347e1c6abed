"""The audit as a process: killed at any moment it loses nothing; a port in use; by keyboard alone."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from stages.core.artifacts.decisions import decisions_file
from stages.core.audit.desk import journal_of
from stages.core.pages.journal import read_journal
from tests.audit.test_deciding import shown
from tests.browsers import NEEDS_BROWSER, browser
from tests.builders import CAPTIONS, read_rows
from tests.pages.forked import forked

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(run: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The audit of a run on a free port, and its address with the token."""
    command = [sys.executable, "-m", "stages.audit", str(run), "--port", "0", "--no-open-browser"]
    server = subprocess.Popen(
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("open http"), server.communicate()
        yield server, line.split()[1]
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
        assert "Traceback" not in errors, errors


def decide_until_refused(address: str, kept: list[tuple[str, str]]) -> None:
    """Decide at random as fast as the server answers; each answer names what it has kept."""
    chance = random.Random(len(kept))
    place = httpx.URL(address)
    origin = f"http://{place.host}:{place.port}"
    with httpx.Client(base_url=origin, headers={"origin": origin}, follow_redirects=True) as client:
        try:
            text = client.get("/", params={"token": place.params["token"]}).text
            while True:
                facts = shown(text)
                kind = chance.choice(("veto", "flip", "accept"))
                body = {"kind": kind, "winner": facts["data-winner"], "loser": facts["data-loser"]}
                content = facts["data-query"] + "".join(f"&{n}={v}" for n, v in body.items())
                answer = client.post("/decide", content=content)
                assert answer.status_code == 200, answer.text
                kept.append((facts["data-winner"], kind))
                text = answer.text if shown(answer.text)["data-following"] else client.get("/").text
        except httpx.TransportError:
            return


def kill_often(run: Path, times: int) -> None:
    """Start the server, decide, kill it at a random moment; what it had answered is in the journal."""
    chance = random.Random(0)
    kept: list[tuple[str, str]] = []
    log = run.with_name("killed.log")
    for _ in range(times):
        with forked("stages.audit", log, str(run)) as (server, line):
            address, before = line.split()[1], len(kept)
            person = threading.Thread(target=decide_until_refused, args=(address, kept))
            person.start()
            while len(kept) == before and person.is_alive():
                time.sleep(0.002)
            time.sleep(chance.random() * 0.2)
            server.kill()
            person.join()
        found = [(row["winner_digest"], row["decision"]) for row in read_journal(journal_of(run))]
        assert len(kept) > before
        # One more may be on the disk, whose answer the kill has cut off: it was not lost either.
        extra = len(found) - len(kept)
        assert extra in (0, 1)
        assert found[: len(kept)] == kept
        kept = found


def test_a_server_that_is_killed_loses_no_decision(run: Path) -> None:
    kill_often(run, 10)
    with serving(run):
        pass
    holding = {row["winner_digest"]: row["decision"] for row in read_journal(journal_of(run))}
    wanted = {digest: kind for digest, kind in holding.items() if kind != "accept"}
    rows = read_rows(decisions_file(run, 1))
    assert {row["winner_digest"]: row["decision"] for row in rows} == wanted


@pytest.mark.slow
def test_a_server_that_is_killed_a_hundred_times_loses_no_decision(run: Path) -> None:
    kill_often(run, 100)


@pytest.mark.slow
def test_the_stages_own_process_that_is_killed_keeps_whole_what_it_has_acknowledged(
    run: Path,
) -> None:
    """`python -m stages.audit` as a person starts it, where the kills above are of forks."""
    kept: list[tuple[str, str]] = []
    for _ in range(2):
        with serving(run) as (server, address):
            before = len(kept)
            person = threading.Thread(target=decide_until_refused, args=(address, kept))
            person.start()
            while len(kept) < before + 5 and person.is_alive():
                time.sleep(0.002)
            server.kill()
            assert server.wait(60) == -signal.SIGKILL
            person.join()
        assert len(kept) >= before + 5
        with serving(run) as (_, address), httpx.Client(follow_redirects=True) as client:
            entries = [json.loads(line) for line in journal_of(run).read_bytes().splitlines()]
            found = [(entry["winner_digest"], entry["decision"]) for entry in entries]
            assert len(found) - len(kept) in (0, 1)  # whose answer the kill has cut off
            assert found[: len(kept)] == kept
            assert {*map(frozenset, entries)} == {frozenset(entries[0])}
            holding = {entry["pair_id"]: entry["decision"] for entry in entries}
            client.get(address)
            for pair_id, kind in holding.items():
                text = client.get(httpx.URL(address).join("/"), params={"key": pair_id}).text
                assert f'<span class="state {kind}">' in text
            kept = found
    applied = {pair_id: kind for pair_id, kind in holding.items() if kind != "accept"}
    rows = read_rows(decisions_file(run, 1))
    assert {row["pair_id"]: row["decision"] for row in rows} == applied


def test_a_port_in_use_and_a_second_audit_are_one_message(run: Path) -> None:
    with serving(run) as (_, address):
        port = str(httpx.URL(address).port)
        command = [
            sys.executable,
            "-m",
            "stages.audit",
            "--no-open-browser",
            "--port",
            port,
            str(run),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "is written by another server, process" in done.stderr
    with serving(run) as (_, address):
        other = run.parent / "other"
        (other / "seed").mkdir(parents=True)
        (other / "seed/preferences.parquet").hardlink_to(run / "seed/preferences.parquet")
        command[-2:] = [str(httpx.URL(address).port), str(other)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "is in use, perhaps by another such page. Give another" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_browser_that_goes_away_disturbs_nothing(run: Path) -> None:
    with serving(run) as (_, address):
        place = httpx.URL(address)
        for words in (
            b"",
            b"GET / HT",
            b"POST /decide HTTP/1.1\r\nContent-Length: 100\r\n\r\nkind=ve",
        ):
            with socket.create_connection((place.host, place.port or 0)) as gone:
                gone.sendall(words)
        with httpx.Client(follow_redirects=True) as client:
            assert CAPTIONS[0] in client.get(address).text


@pytest.mark.slow
@NEEDS_BROWSER
def test_by_keyboard_alone_in_a_browser(run: Path) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    with serving(run) as (server, address), browser() as driver:
        driver.get(address)
        assert "token" not in driver.current_url

        def press(*keys: str) -> None:
            driver.switch_to.active_element.send_keys(*keys)

        def wait(position: int, said: str = "") -> None:
            """Until this item is shown, this was said, and its pictures are decoded."""
            WebDriverWait(driver, 20, ignored_exceptions=[StaleElementReferenceException]).until(
                lambda b: (
                    b.find_element(By.CSS_SELECTOR, ".where strong").text == str(position)
                    and said in b.find_element(By.ID, "said").text
                    and b.execute_script(
                        "return [...document.images].every(i => i.complete && i.naturalWidth == 64)"
                    )
                )
            )

        def large() -> str:
            figures = driver.find_elements(By.CSS_SELECTOR, "#large figure")
            [seen] = [figure.text for figure in figures if figure.is_displayed()]
            return seen

        wait(1)
        press("s")
        assert "winner" in large()
        press("s")
        assert "loser" in large()
        press("s")
        assert "winner" in large()
        press("v")  # the next pair comes large too
        wait(2, "vetoed")
        assert "winner" in large()
        press(Keys.ESCAPE)
        assert not driver.find_elements(By.CSS_SELECTOR, "#large[open]")
        press("j")
        wait(3)
        press("f")
        wait(4, "flipped")
        press("k")
        wait(3)
        assert "flipped" in driver.find_element(By.CSS_SELECTOR, ".facts").text
        press(Keys.ARROW_RIGHT)
        wait(4)
        press("n")
        press("vfau are letters here", Keys.ENTER)
        wait(4, "note kept")
        press("a")
        wait(5, "accepted")
        press("v")
        wait(6, "vetoed")
        press("u")
        wait(5, "taken back: veto")
        press(Keys.CONTROL, "v")  # not the key without a modifier
        wait(5)
        errors = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
        assert errors == []
        server.kill()
        server.wait()
        press("v")
        WebDriverWait(driver, 20).until(
            lambda b: "does not answer" in b.find_element(By.ID, "said").text
        )
    with serving(run):
        pass
    pairs = read_rows(run / "iter01/pairs.parquet")
    found = {row["pair_id"]: row["decision"] for row in read_rows(decisions_file(run, 1))}
    assert found == {pairs[0]["pair_id"]: "veto", pairs[2]["pair_id"]: "flip"}
    [note] = read_rows(run / "decisions/notes.parquet")
    assert (note["pair_id"], note["note"]) == (pairs[3]["pair_id"], "vfau are letters here")
