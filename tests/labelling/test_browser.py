"""A person labels by keyboard in headless Chromium; what they pressed is what the import reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages import import_preferences, label
from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import read_table
from stages.core.pages.journal import read_journal
from tests.browsers import NEEDS_BROWSER, SECONDS, browser, problems
from tests.labelling.builders import write_images
from tests.labelling.servers import serving
from tests.labelling.windows import Window

pytestmark = [pytest.mark.slow, NEEDS_BROWSER]


def test_twenty_pairs_by_keyboard_are_what_the_import_reads(tmp_path: Path) -> None:
    images, labels = write_images(tmp_path / "images", 24), tmp_path / "labels"
    with serving("--images", str(images), "--labels", str(labels)) as (process, address):
        with browser() as driver:
            window = Window(driver, address, "ann")
            for _ in range(16):
                window.press(window.sharper())
            window.press("3", "0", "s", "2")  # equal, both bad, skip, the second
            window.press("u", "Backspace", "s", "1")  # two taken back, and both answered anew
            assert window.script("document.getElementById('done').textContent") == "20"
            assert problems(driver) == []
        process.terminate()
        process.communicate(timeout=SECONDS)
    entries = read_journal(labels / label.ANSWERS)
    assert [entry.get("answer", "undo") for entry in entries[16:]] == [
        "tie", "both_bad", "skip", "right", "undo", "undo", "skip", "left",
    ]  # fmt: skip
    for entry in entries[:16]:
        assert entry[entry["answer"]]["name"].endswith("0.png")
    import_preferences.main(
        import_preferences.Args(
            files=(labels / label.LABELS,), num_pairs=None, num_holdout=4, seed=0,
            preferences=tmp_path / "preferences.parquet", holdout=tmp_path / "holdout.parquet",
            summary=tmp_path / "import.json",
        )
    )  # fmt: skip
    rows = read_table(tmp_path / "preferences.parquet", PREFERENCES).to_pylist()
    rows += read_table(tmp_path / "holdout.parquet", PREFERENCES).to_pylist()
    report = json.loads((tmp_path / "import.json").read_text())
    assert (len(rows), report["ties_dropped"]) == (17, 1)
    folders = {(folder / "prompt.txt").read_text().strip(): folder for folder in images.iterdir()}
    sharp = [
        row["winner"]["bytes"] == (folders[row["prompt"]] / "0.png").read_bytes() for row in rows
    ]
    assert sum(sharp) >= 16


def test_keys_do_nothing_while_a_name_is_typed_or_with_another_key_held(tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    images, labels = write_images(tmp_path / "images", 3), tmp_path / "labels"
    flags = ("--images", str(images), "--labels", str(labels))
    with serving(*flags) as (_, address), browser(390, 844, is_dark=True) as driver:
        window = Window(driver, address, "su 123")
        assert window.script("desk.dataset.labeller") == "su 123"
        held = ActionChains(driver)
        for key in (Keys.CONTROL, Keys.ALT, Keys.META):
            held = held.key_down(key).send_keys(Keys.ARROW_LEFT).key_up(key)
        held.perform()
        assert window.script("document.getElementById('done').textContent") == "0"
        assert window.script("document.documentElement.scrollWidth") == 390
        driver.find_element(By.CSS_SELECTOR, ".side").click()
        window.wait("document.getElementById('done').textContent === '1'")
        window.press("2", "2")
        assert window.pair == "none"
        window.press("u")
        assert window.pair != "none"
    entries = read_journal(labels / label.ANSWERS)
    assert [entry.get("answer") for entry in entries] == ["left", "right", "right", None]


def test_a_server_that_ends_is_told_and_loses_nothing(tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    images, labels = write_images(tmp_path / "images", 3), tmp_path / "labels"
    flags = ("--images", str(images), "--labels", str(labels))
    with serving(*flags) as (process, address), browser() as driver:
        window = Window(driver, address, "ann")
        window.press("2")
        process.kill()
        process.wait()
        ActionChains(driver).send_keys("1").perform()
        window.wait("!document.getElementById('trouble').hidden")
        said = window.script("document.getElementById('trouble').textContent")
        assert "does not answer" in said
        assert window.script("desk.querySelectorAll('.pair img').length") == 2
    assert [entry["answer"] for entry in read_journal(labels / label.ANSWERS)] == ["right"]


def test_four_images_are_ranked_by_keyboard(tmp_path: Path) -> None:
    images, labels = write_images(tmp_path / "images", 8, 4), tmp_path / "labels"
    flags = ("--images", str(images), "--labels", str(labels), "--show", "4")
    with serving(*flags) as (process, address), browser() as driver:
        window = Window(driver, address, "ann")
        asked = "document.getElementById('asked').textContent"
        badges = "[...desk.querySelectorAll('.rank')].map((rank) => rank.textContent).join()"
        window.type("42")
        assert window.script(asked) == "Image 2 is 2nd. Which comes next?"
        assert window.script(badges) == ",2nd,,1st"
        window.type("u2=")  # a place taken back and given again
        assert window.script(asked) == "Which is as good as image 2?"
        window.press("1")  # 4 > 2 = 1 > 3
        window.type("3")
        window.press("Enter")  # the best alone
        window.type("1=2=3")  # three are equal, and the last follows
        window.wait("document.getElementById('done').textContent === '3'")
        window.press("ArrowRight", "0", "s")  # all equal, all bad, nothing said
        window.press("u", "Backspace")
        window.type(["ArrowDown", "ArrowLeft", "u"])  # neither means anything yet; the third undo
        window.wait("document.getElementById('done').textContent === '3'")
        driver.find_elements("css selector", ".side")[2].click()
        driver.find_elements("css selector", ".side")[0].click()
        driver.find_element("css selector", "[data-rest]").click()
        window.wait("document.getElementById('done').textContent === '4'")
        assert problems(driver) == []
        process.terminate()
        process.communicate(timeout=SECONDS)
    entries = read_journal(labels / label.ANSWERS)
    assert [(entry.get("answer"), entry.get("ranks")) for entry in entries] == [
        ("ranked", [2, 2, 3, 1]), ("ranked", [2, 2, 1, 2]), ("ranked", [1, 1, 1, 2]),
        ("ranked", [1, 1, 1, 1]), ("all_bad", []), ("skip", []),
        (None, None), (None, None), (None, None), ("ranked", [2, 3, 1, 3]),
    ]  # fmt: skip
