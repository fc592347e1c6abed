"""The served pages as axe sees them: on a phone and a desk, by day and by night."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from tests.audit.runs import write_run
from tests.audit.test_server import serving as auditing
from tests.labelling.builders import write_images
from tests.labelling.servers import serving as labelling
from tests.labelling.windows import CHROMIUM, DRIVER, SECONDS, Window, browser

AXE = os.environ.get("SAIL_AXE")
"""axe.min.js of the npm package axe-core."""
SERIOUS = ("serious", "critical")
SCREENS = [(width, is_dark) for width in (390, 1280) for is_dark in (False, True)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver on the PATH"),
    pytest.mark.skipif(not AXE, reason="SAIL_AXE names no axe.min.js (npm pack axe-core)"),
]  # fmt: skip


def serious_findings(driver: Any) -> list[tuple[str, str]]:
    """(rule, the first element it is about) of each serious finding on the page that is shown."""

    def ask(expression: str) -> Any:
        found = driver.execute_cdp_cmd(
            "Runtime.evaluate",
            {
                "expression": expression,
                "awaitPromise": True,
                "returnByValue": True,
                "allowUnsafeEvalBlockedByCSP": True,
            },
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    ask(Path(str(AXE)).read_text(encoding="utf-8"))
    found = json.loads(ask("axe.run().then(found => JSON.stringify(found))"))
    assert len(found["passes"]) > 10
    return [
        (rule["id"], rule["nodes"][0]["html"][:200])
        for rule in found["violations"]
        if rule["impact"] in SERIOUS
    ]


@pytest.mark.parametrize(("width", "is_dark"), SCREENS)
def test_axe_finds_nothing_serious_in_the_audit(tmp_path: Path, width: int, is_dark: bool) -> None:
    run = write_run(tmp_path / "results" / "small")
    with auditing(run) as (_, address), browser(width, is_dark=is_dark) as driver:
        driver.get(address)
        links = driver.find_elements("css selector", "nav a")
        places = [link.get_attribute("href") for link in links]
        assert len(places) >= 3  # prompts, human pairs, held-out pairs
        for place in places:
            driver.get(place)
            assert serious_findings(driver) == [], place
        driver.get(places[0])
        driver.switch_to.active_element.send_keys("s")  # enlarged
        assert driver.find_elements("css selector", "#large[open]")
        assert serious_findings(driver) == []


@pytest.mark.parametrize(("width", "is_dark"), SCREENS)
def test_axe_finds_nothing_serious_in_the_labelling_page(
    tmp_path: Path, width: int, is_dark: bool
) -> None:
    images, labels = write_images(tmp_path / "images", 3), tmp_path / "labels"
    with (
        labelling("--images", str(images), "--labels", str(labels)) as (_, address),
        browser(width, is_dark=is_dark) as driver,
    ):
        driver.get(address)
        assert serious_findings(driver) == []  # the form
        window = Window(driver, address.split("?")[0], "ann")
        assert serious_findings(driver) == []  # a pair
        window.press("1", "2")
        driver.switch_to.active_element.send_keys("1")
        WebDriverWait(driver, SECONDS).until(
            lambda d: not d.find_elements("css selector", ".pair img")
        )
        assert serious_findings(driver) == []  # the end
