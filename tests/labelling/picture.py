"""Make the pictures of docs/labelling.md: python -m tests.labelling.picture docs/images"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep

from tests.browsers import browser
from tests.labelling.builders import write_images
from tests.labelling.servers import serving
from tests.labelling.windows import Window

PAUSE_SECONDS = 2.0
"""About as long as a person looks."""


def main(folder: Path) -> None:
    """Make both."""
    compare(folder / "label.png")
    rank(folder / "rank.png")


def rank(path: Path) -> None:
    """Rank some images, and show the page half way through an order."""
    with TemporaryDirectory() as folder:
        images, labels = write_images(Path(folder) / "images", 24, 4), Path(folder) / "labels"
        flags = ("--images", str(images), "--labels", str(labels), "--show", "4")
        with serving(*flags) as (_, address), browser(1000, 560) as driver:
            window = Window(driver, address, "ann")
            for number in range(6):
                sleep(PAUSE_SECONDS)
                window.type("231")
                window.wait(f"document.getElementById('done').textContent === '{number + 1}'")
            window.type("31")
            driver.save_screenshot(str(path))


def compare(path: Path) -> None:
    """Label some pairs as two people, and show the page of the second."""
    with TemporaryDirectory() as folder:
        images, labels = write_images(Path(folder) / "images", 24), Path(folder) / "labels"
        flags = ("--images", str(images), "--labels", str(labels), "--common-share", "0.5")
        with serving(*flags) as (_, address), browser(1000, 700) as driver:
            for name in ("ann", "bob"):
                window = Window(driver, address, name)
                for number in range(7):
                    sleep(PAUSE_SECONDS)
                    window.press("3" if number == 3 and name == "bob" else window.sharper())
            driver.save_screenshot(str(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
