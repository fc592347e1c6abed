"""The report in a browser: what keys do to its pictures, on a phone and a desk, by day and by night."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from stages.write_report import main
from tests import browsers
from tests.browsers import NEEDS_AXE, NEEDS_BROWSER, ask, problems, serious_findings, set_screen
from tests.report_inputs import report_inputs

PHONE, DESK = 390, 1280

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser"), NEEDS_BROWSER]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    args = report_inputs(tmp_path_factory.mktemp("report"))
    main(args)
    return args.output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.browser() as driver:
        yield driver


def show(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    """The page as a screen of that width shows it, with everything folded open."""
    set_screen(browser, width, 844, is_dark=scheme == "dark")
    browser.get(page.as_uri())
    ask(browser, "document.querySelectorAll('details').forEach(part => { part.open = true })")


def seen(look: Any) -> list[str]:
    """The labels of the pictures that are seen."""
    pictures = look.find_elements(By.CSS_SELECTOR, ".one")
    return [
        picture.find_element(By.TAG_NAME, "strong").text
        for picture in pictures
        if picture.is_displayed()
    ]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_two_policies_are_seen_side_by_side(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    look = browser.find_element(By.CSS_SELECTOR, "#result .look")
    assert seen(look) == ["base", "iter02"]
    first, second = [
        picture.rect
        for picture in look.find_elements(By.CSS_SELECTOR, ".one")
        if picture.is_displayed()
    ]
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] < second["x"] + second["width"] <= width
    assert ask(browser, "document.documentElement.scrollWidth") <= width


def test_keys_alone_swap_pictures_in_place_and_make_them_large(browser: Any, page: Path) -> None:
    show(browser, page, DESK)
    look = browser.find_element(By.CSS_SELECTOR, "#result .look")
    together, *_ = look.find_elements(By.CSS_SELECTOR, "input[type=radio]")
    ask(browser, "document.querySelector('#result .look input').focus()")
    place = browser.switch_to.active_element
    for expected in (["base"], ["iter00"], ["iter01"], ["iter02"], ["base", "iter02"]):
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert seen(look) == expected
    assert place == together
    small = look.find_element(By.CSS_SELECTOR, ".i0 img").rect
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    one = look.find_element(By.CSS_SELECTOR, ".i0 img").rect
    assert one["width"] > 1.5 * small["width"]
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert look.find_element(By.CSS_SELECTOR, ".i1 img").rect == one  # in its very place
    browser.switch_to.active_element.send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert look.rect["width"] >= DESK - 20
    large = look.find_element(By.CSS_SELECTOR, ".i1 img").rect
    assert large["height"] > one["height"]
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert look.rect["width"] < DESK / 2


def test_boxes_that_scroll_can_be_reached_by_keys(browser: Any, page: Path) -> None:
    show(browser, page, PHONE)
    unreachable = ask(
        browser,
        """[...document.querySelectorAll('main *')].filter(part =>
            part.scrollWidth > part.clientWidth + 1
            && ['auto', 'scroll'].includes(getComputedStyle(part).overflowX)
            && !(part.tabIndex === 0 && part.getAttribute('aria-label'))
        ).map(part => part.outerHTML.slice(0, 80))""",
    )
    assert unreachable == []
    assert ask(browser, "document.querySelectorAll('.scroll').length") > 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_its_own_style_and_nothing_is_refused(
    browser: Any, page: Path, scheme: str
) -> None:
    show(browser, page, DESK, scheme)
    assert problems(browser) == []
    colour = ask(browser, "getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(247, 247, 245)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert ask(browser, "document.scripts.length") == 0


def test_a_style_of_another_text_is_refused(browser: Any, page: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    text = page.read_text(encoding="utf-8").replace(
        "</head>", "<style>body{color:red}</style></head>"
    )
    other.write_text(text, encoding="utf-8")
    show(browser, other, DESK)
    assert ask(browser, "getComputedStyle(document.body).color") == "rgb(29, 33, 39)"
    assert "Content Security Policy" in problems(browser)[0]


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@NEEDS_AXE
def test_axe_finds_nothing_serious(browser: Any, page: Path, width: int, scheme: str) -> None:
    show(browser, page, width, scheme)
    assert serious_findings(browser) == []
