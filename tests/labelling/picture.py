"""Make the picture of docs/labelling.md: python -m tests.labelling.picture docs/images/label.png"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep

from tests.labelling.builders import write_images
from tests.labelling.servers import serving
from tests.labelling.windows import Window, browser

PAUSE_SECONDS = 2.0
"""About as long as a person looks."""


def main(path: Path) -> None:
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
