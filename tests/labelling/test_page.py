"""The labelling page over HTTP: what it shows of hostile texts, and what it takes from whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from stages.core.labelling.desk import Desk
from stages.core.labelling.page import MAX_NAME, STATIC, LabellingPage
from stages.core.pages.journal import read_journal
from stages.core.pages.server import build_app
from tests.builders import CAPTIONS, encoded, image_value, picture
from tests.builders import write_rows as write_parquet
from tests.labelling.builders import answer_all, open_desk, write_images
from tests.security.hostile import PAGE, PROMPTS, SHELL, UNICODE
from tests.security.test_pages import ELEMENTS, Page, shown

HERE = "http://127.0.0.1:8766"
SAME = {"origin": HERE}
MORE_ELEMENTS = {
    "button",
    "progress",
    "kbd",
    "script",
    "noscript",
    "link",
    "form",
    "input",
    "label",
}


@contextmanager
def client_of(desk: Desk) -> Iterator[TestClient]:
    app = build_app(LabellingPage(desk, "a test").routes(), token="t", static=STATIC)
    with TestClient(app, base_url=HERE) as client:
        client.get("/?token=t")
        yield client


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    images = write_images(tmp_path / "images", 12)
    with open_desk([images], tmp_path / "answers.jsonl", share=0.25) as opened:
        yield opened


@pytest.fixture
def client(desk: Desk) -> Iterator[TestClient]:
    with client_of(desk) as opened:
        yield opened


def post(client: TestClient, path: str, **asked: Any) -> Any:
    return client.post(path, json=asked, headers=SAME)


def pair_on(page: str) -> str:
    found = re.search(r'data-pair="([0-9a-f]{16})"', page)
    assert found is not None, page
    return found[1]


def check(source: str) -> Page:
    """The page; nothing on it is a script of another's, and nothing leads elsewhere."""
    page = Page(source)
    assert page.elements <= ELEMENTS | MORE_ELEMENTS, page.elements - ELEMENTS
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name, value)
        assert name != "style"
        if name in ("src", "href", "action"):
            assert value.startswith("/"), value
            assert not value.startswith("//")
    assert source.count("<script") == source.count('<script src="/static/own/')
    return page


def test_the_first_page_asks_for_a_name_and_the_next_shows_a_pair(client: TestClient) -> None:
    first = client.get("/")
    assert "Your name" in check(first.text).texts
    second = client.get("/", params={"labeller": " ann "})
    page = check(second.text)
    assert ("main", "data-labeller", "ann") in page.attributes
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 2
    for image in images:
        answer = client.get(image)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "immutable" in answer.headers["cache-control"]
    assert client.get("/image/" + "0" * 32).status_code == 404
    assert client.get("/static/own/label.js").status_code == 200


def test_nothing_on_the_page_tells_which_image_is_which(client: TestClient, desk: Desk) -> None:
    source = client.get("/", params={"labeller": "ann"}).text
    for name in desk.gallery.places:
        assert name not in source
        assert Path(name).name not in source


def test_an_answer_is_in_the_journal_before_the_next_pair_comes_back(
    client: TestClient, tmp_path: Path
) -> None:
    page = client.get("/", params={"labeller": "ann"}).text
    for number, choice in enumerate(("left", "right", "tie", "both_bad", "skip"), start=1):
        answer = post(client, "/answer", labeller="ann", pair=pair_on(page), answer=choice)
        entries = read_journal(tmp_path / "answers.jsonl")
        assert len(entries) == number
        assert (entries[-1]["answer"], entries[-1]["pair"]) == (choice, pair_on(page))
        assert answer.status_code == 200
        assert pair_on(answer.text) != pair_on(page)
        page = answer.text
    assert re.search(r'id="done">5<.*id="left">7<', page)
    undone = post(client, "/undo", labeller="ann").text
    assert pair_on(undone) == entries[-1]["pair"]
    assert read_journal(tmp_path / "answers.jsonl")[-1]["undoes"] == 4


def test_a_late_answer_of_another_window_is_told_and_not_written(
    client: TestClient, desk: Desk
) -> None:
    key = pair_on(client.get("/", params={"labeller": "ann"}).text)
    post(client, "/answer", labeller="ann", pair=key, answer="left")
    late = post(client, "/answer", labeller="ann", pair=key, answer="right")
    assert "answered in another window" in late.text
    assert pair_on(late.text) != key
    assert [answer.choice for answer in desk.answers()] == ["left"]


@pytest.mark.parametrize(
    "body",
    [b"", b"no JSON", b"[]", b"{}", b'{"labeller": 7}', b'{"labeller": ""}', b"\xff",
     b'{"labeller": "a\\nb"}', b'{"labeller": " ann"}', b'{"labeller": "\\ud800"}', b"[" * 9000],
)  # fmt: skip
def test_what_is_no_request_of_the_page_is_refused(
    client: TestClient, desk: Desk, body: bytes
) -> None:
    for path in ("/answer", "/undo"):
        assert client.post(path, content=body, headers=SAME).status_code == 400
    assert desk.answers() == []


@pytest.mark.parametrize("answer", ["best", "", None, 1, ["left"], {"left": 1}])
def test_what_is_no_answer_is_not_written(client: TestClient, desk: Desk, answer: object) -> None:
    key = pair_on(client.get("/", params={"labeller": "ann"}).text)
    told = post(client, "/answer", labeller="ann", pair=key, answer=answer)
    assert "nothing was written down" in told.text
    assert pair_on(told.text) == key
    assert desk.answers() == []


def test_another_origin_and_a_browser_without_the_token_write_nothing(
    client: TestClient, desk: Desk
) -> None:
    key = pair_on(client.get("/", params={"labeller": "ann"}).text)
    asked = {"labeller": "ann", "pair": key, "answer": "left"}
    assert client.post("/answer", json=asked).status_code == 403
    elsewhere = {"origin": "http://elsewhere.example"}
    assert client.post("/answer", json=asked, headers=elsewhere).status_code == 403
    client.cookies.clear()
    assert client.post("/answer", json=asked, headers=SAME).status_code == 403
    assert desk.answers() == []


def test_every_hostile_prompt_is_shown_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "image": image_value(encoded(picture(CAPTIONS[0], strength=strength)))}
        for prompt in PROMPTS
        for strength in (1.0, 0.5)
    ]
    table = write_parquet(tmp_path / "table.parquet", rows)
    seen = []
    with open_desk([table], tmp_path / "answers.jsonl") as desk, client_of(desk) as client:
        source = client.get("/", params={"labeller": "ann"}).text
        for _ in PROMPTS:
            check(source)
            prompt = re.search(r'id="prompt"[^>]*>(.*?)</p>', source, re.DOTALL)
            assert prompt is not None
            seen.append(unescape(prompt[1]))
            key = pair_on(source)
            source = post(client, "/answer", labeller="ann", pair=key, answer="left").text
        assert "Nothing is left for you" in source
        assert {answer.prompt for answer in desk.answers()} == set(PROMPTS)
    assert set(seen) == {shown(text) for text in PROMPTS}


@pytest.mark.parametrize("name", [*PAGE, *SHELL])
def test_a_hostile_name_is_a_name(tmp_path: Path, name: str) -> None:
    images = write_images(tmp_path / "images", 2)
    name = name[:MAX_NAME].strip()
    with open_desk([images], tmp_path / "answers.jsonl") as desk, client_of(desk) as client:
        first = client.get("/", params={"labeller": name})
        if not name.isprintable():
            assert first.status_code == 400
            return
        assert ("main", "data-labeller", name) in check(first.text).attributes
        post(client, "/answer", labeller=name, pair=pair_on(first.text), answer="left")
        assert [answer.labeller for answer in desk.answers()] == [name]
        form = check(client.get("/").text)
        assert name in form.texts
        [link] = [v for t, n, v in form.attributes if n == "href" and "labeller" in v]
        assert ("main", "data-labeller", name) in check(client.get(link).text).attributes


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "give a name"), ("x" * 41, "41 letters"), *((text, "") for text in UNICODE)],
)
def test_a_name_that_cannot_be_shown_is_asked_for_again(
    client: TestClient, name: str, said: str
) -> None:
    answer = client.get("/", params={"labeller": name})
    if name.strip() and name.isprintable() and len(name.strip()) <= MAX_NAME:
        assert answer.status_code == 200
        return
    assert answer.status_code == 400
    assert said in check(answer.text).texts or said in answer.text
    assert 'role="alert"' in answer.text


def test_the_numbers_say_agreement_and_the_share_of_left_choices(
    client: TestClient, desk: Desk
) -> None:
    assert "nobody has judged" in client.get("/", params={"labeller": "ann"}).text
    answer_all(desk, "ann", "left")
    source = client.get("/", params={"labeller": "ann"}).text
    assert "100 % of 12 times (95 % interval 76 % to 100 %)" in source
    assert "you seem to favour one" in source
    answer_all(desk, "bob", "tie")
    text = " ".join(client.get("/", params={"labeller": "bob"}).text.split())
    assert "0 % of the verdicts on 3 pairs that 2 people judged are equal" in text
    # Each of three pairs has one verdict of an image and one tie; alpha is below chance.
    assert re.search(r"Krippendorff's alpha\s+[-−]0\.", text), text


def test_images_that_cannot_be_shown_are_told_on_the_page(
    client: TestClient, desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "images/prompt-003/0.png").write_bytes(b"broken")
    answer_all(desk, "ann")
    assert "prompt-003/0.png: the bytes are no readable image" in unescape(
        client.get("/", params={"labeller": "ann"}).text
    )
