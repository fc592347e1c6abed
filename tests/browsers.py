"""Headless Chromium for the tests of pages: screens of any size, by day and by night, and what axe says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
AXE = os.environ.get("SAIL_AXE")
"""axe.min.js of the npm package axe-core."""
SERIOUS = ("serious", "critical")
SECONDS = 60
"""So long a page may take on a busy machine."""

NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver on the PATH"
)
NEEDS_AXE = pytest.mark.skipif(not AXE, reason="SAIL_AXE names no axe.min.js (npm pack axe-core)")


@contextmanager
def browser(width: int = 1280, height: int = 800, *, is_dark: bool = False) -> Iterator[Any]:
    """A headless Chromium of this size, with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        set_screen(driver, width, height, is_dark=is_dark)
        yield driver
    finally:
        driver.quit()


def set_screen(driver: Any, width: int, height: int, *, is_dark: bool = False) -> None:
    """Show pages as a screen of this size does; a narrow one is a phone."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def ask(driver: Any, expression: str) -> Any:
    """What an expression gives, asked past the page's content policy."""
    answer = driver.execute_cdp_cmd(
        "Runtime.evaluate",
        {
            "expression": expression,
            "awaitPromise": True,
            "returnByValue": True,
            "allowUnsafeEvalBlockedByCSP": True,
        },
    )
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


def problems(driver: Any) -> list[str]:
    """What the browser has complained of since it was asked last."""
    return [line["message"] for line in driver.get_log("browser")]


def serious_findings(driver: Any) -> list[tuple[str, str]]:
    """(rule, the first element it is about) of each serious finding of axe on the page that is shown."""
    ask(driver, Path(str(AXE)).read_text(encoding="utf-8"))
    found = json.loads(ask(driver, "axe.run().then(found => JSON.stringify(found))"))
    assert len(found["passes"]) > 10
    return [
        (rule["id"], rule["nodes"][0]["html"][:200])
        for rule in found["violations"]
        if rule["impact"] in SERIOUS
    ]
