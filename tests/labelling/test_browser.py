"""A person labels by keyboard in headless Chromium; what they pressed is what the import reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stages import import_preferences, label
from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import read_table
from stages.core.pages.journal import read_journal
from tests.labelling.builders import write_images
from tests.labelling.servers import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver on the PATH"
)

SECONDS = 60
BETTER = {"left": "ArrowLeft", "right": "ArrowRight"}


@contextmanager
def browser(width: int = 1280, height: int = 800, *, is_dark: bool = False) -> Iterator[Any]:
    """A headless Chromium of this size."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


class Window:
    """A window in which somebody labels; keys go to the page as a whole."""

    def __init__(self, driver: Any, address: str, name: str) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.driver = driver
        driver.get(address)
        driver.find_element(By.ID, "labeller").send_keys(name, Keys.ENTER)
        self.wait("desk.dataset.ready")

    def script(self, expression: str) -> Any:
        """What an expression is worth on the page."""
        return self.driver.execute_script(
            f"const desk = document.getElementById('desk'); return desk && ({expression});"
        )

    def wait(self, expression: str) -> Any:
        """Wait until it is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(
            lambda _: self.script(expression)
        )

    @property
    def pair(self) -> str:
        """The pair that is shown, once both images are."""
        return str(self.wait("desk.dataset.ready"))

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, each when the page is ready."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        named = {"ArrowLeft": Keys.ARROW_LEFT, "ArrowRight": Keys.ARROW_RIGHT,
                 "ArrowUp": Keys.ARROW_UP, "ArrowDown": Keys.ARROW_DOWN,
                 "Backspace": Keys.BACKSPACE}  # fmt: skip
        for key in keys:
            before = self.pair
            ActionChains(self.driver).send_keys(named.get(key, key)).perform()
            self.wait(f"desk.dataset.ready && desk.dataset.ready !== '{before}'")

    def sharper(self) -> str:
        """The key of the side whose image has the more distinct colours at its edges: image 0."""
        edges = """[...desk.querySelectorAll('.pair img')].map((image) => {
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let most = 0;
            for (let i = 4; i < data.length; i++) most = Math.max(most, Math.abs(data[i] - data[i - 4]));
            return most;
        })"""
        left, right = self.script(edges)
        return "ArrowLeft" if left > right else "ArrowRight"


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
            problems = [line for line in driver.get_log("browser") if "favicon" not in str(line)]
            assert problems == []
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
    assert [entry["answer"] for entry in read_journal(labels / label.ANSWERS)] == ["left"]


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
