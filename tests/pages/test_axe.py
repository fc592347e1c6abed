"""The served pages as axe sees them: on a phone and a desk, by day and by night."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from tests.audit.runs import write_run
from tests.audit.test_server import serving as auditing
from tests.browsers import NEEDS_AXE, NEEDS_BROWSER, SECONDS, browser, serious_findings
from tests.labelling.builders import write_images
from tests.labelling.servers import serving as labelling
from tests.labelling.windows import Window

SCREENS = [(width, is_dark) for width in (390, 1280) for is_dark in (False, True)]

pytestmark = [pytest.mark.slow, NEEDS_BROWSER, NEEDS_AXE]


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


@pytest.mark.parametrize(("width", "is_dark"), SCREENS)
def test_axe_finds_nothing_serious_where_images_are_ranked(
    tmp_path: Path, width: int, is_dark: bool
) -> None:
    images, labels = write_images(tmp_path / "images", 2, 4), tmp_path / "labels"
    with (
        labelling("--images", str(images), "--labels", str(labels), "--show", "4") as (_, address),
        browser(width, is_dark=is_dark) as driver,
    ):
        driver.get(address)
        assert serious_findings(driver) == []  # the form
        window = Window(driver, address.split("?")[0], "ann")
        assert serious_findings(driver) == []
        window.type("3=1")
        assert serious_findings(driver) == []  # two have a place
