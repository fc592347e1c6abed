"""A person in headless Chromium, at the labelling page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.browsers import SECONDS


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
        for key in keys:
            before = self.pair
            self.type([key])
            self.wait(f"desk.dataset.ready && desk.dataset.ready !== '{before}'")

    def type(self, keys: Iterable[str]) -> None:
        """Press keys one after the other, whatever comes of them."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        named = {"ArrowLeft": Keys.ARROW_LEFT, "ArrowRight": Keys.ARROW_RIGHT,
                 "ArrowUp": Keys.ARROW_UP, "ArrowDown": Keys.ARROW_DOWN,
                 "Backspace": Keys.BACKSPACE, "Enter": Keys.ENTER}  # fmt: skip
        for key in keys:
            ActionChains(self.driver).send_keys(named.get(key, key)).perform()

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
