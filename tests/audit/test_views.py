"""What the audit shows: its views, orders and words; unfinished and damaged runs; hostile prompts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from stages.core.artifacts.schemas import TRAINING_PAIRS
from stages.core.artifacts.tables import write_table
from stages.core.audit import cells
from stages.core.audit.index import RunIndex
from stages.core.errors import UserError
from stages.core.pages.server import PICTURES
from tests.audit.conftest import auditing
from tests.audit.runs import CANDIDATES_EACH, image, write_iteration, write_run
from tests.builders import CAPTIONS, read_rows
from tests.security.hostile import PROMPTS
from tests.security.test_pages import Page

ELEMENTS = {
    *("html", "head", "meta", "title", "link", "script", "body", "header", "main", "footer", "nav"),
    *("h1", "h2", "p", "ul", "li", "a", "form", "input", "select", "option", "label", "button", "kbd"),
    *("div", "span", "strong", "br", "figure", "figcaption", "img", "dialog", "details", "summary"),
    *("dl", "dt", "dd", "code", "noscript", "svg", "g", "line", "circle", "text"),
}  # fmt: skip


def prompts_in_order(client: TestClient, **query: object) -> list[str]:
    """The prompts of a query, walked through with the key for the next one."""
    found = []
    address = "&".join(f"{name}={value}" for name, value in query.items())
    while address:
        shown = Page(client.get(f"/item?{address}").text)
        facts = {name: value for _, name, value in shown.attributes if name.startswith("data-")}
        heading = [v for tag, name, v in shown.attributes if (tag, name) == ("img", "alt")]
        if heading:
            found.append(heading[0].partition(": ")[2])
        address = facts["data-following"]
        assert len(found) < 99
    return found


def test_the_first_page_shows_the_pair_that_is_least_sure_with_all_its_candidates(
    client: TestClient,
) -> None:
    page = client.get("/").text
    assert CAPTIONS[0] in page
    sources = set(re.findall(r'src="(/image/iter01/candidates/[^"]*)"', page))
    assert len(sources) == CANDIDATES_EACH
    for words in ("▲ best", "▼ worst", "+1.00 ± 1.00", "+1.0", "0.900", "rewards in 10⁻⁶",
                  "total, winner minus loser", "policy</dt><dd>0123456789abcdef, of iteration 0",
                  "candidate 2, seed 1002", "<strong>1</strong> of 6"):  # fmt: skip
        assert words in page, words
    assert page.count("<circle") == 2 * CANDIDATES_EACH


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("metric", [0, 5, 4, 3, 2, 1]),
        ("unsure", [0, 1, 2, 3, 4, 5]),  # the last one has no standard error
        ("sure", [4, 3, 2, 1, 0, 5]),
        ("unlikely", [5, 4, 3, 2, 1, 0]),
        ("likely", [0, 1, 2, 3, 4, 5]),
        ("table", [0, 1, 2, 3, 4, 5]),
        ("no such order", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_prompts_come_in_the_order_that_is_asked_for(
    client: TestClient, order: str, expected: list[int]
) -> None:
    assert prompts_in_order(client, order=order) == [CAPTIONS[i] for i in expected]


def test_every_pair_of_a_list_is_shown_after_the_other_and_can_be_decided_about(run: Path) -> None:
    path = run / "iter01/pairs.parquet"
    rows = read_rows(path)
    inner = rows[0] | {"loser_candidate": 1, "loser_seed": 1001, "margin": 2e-7,
                       "loser": image(1, 1), "pair_id": f"{rows[0]['pair_id']}-1"}  # fmt: skip
    rows[0]["pair_id"] += "-0"
    table = [rows[0], inner, *rows[1:]]
    write_table(path, table, TRAINING_PAIRS, stage="select_pairs", arguments={})
    items = RunIndex(run).listing("pairs", 1).items
    assert [item.key for item in items] == [row["pair_id"] for row in table]
    assert [item.place.row for item in items if item.place] == list(range(7))
    assert items[0].candidates == items[1].candidates
    with auditing(run) as client:
        first = client.get(f"/item?order=table&key={rows[0]['pair_id']}").text
        second = client.get(f"/item?order=table&key={inner['pair_id']}").text
        assert "candidate 0, worst" in first
        assert "candidate 1, loser" in second
        assert "worst:" not in second
        form = {n: v for _, n, v in Page(second).attributes if n in ("data-winner", "data-loser")}
        said = client.post("/decide", data={
            "order": "table", "key": inner["pair_id"], "kind": "veto",
            **{name.removeprefix("data-"): value for name, value in form.items()},
        })  # fmt: skip
        assert said.status_code == 200
        for name, expected in ((rows[0]["pair_id"], False), (inner["pair_id"], True)):
            shown = client.get(f"/item?order=table&key={name}").text
            assert ("state veto" in shown) == expected


def test_words_of_the_prompt_choose(client: TestClient) -> None:
    word = CAPTIONS[3].split()[-1]
    expected = [c for c in CAPTIONS[:6] if word.casefold() in c.casefold()]
    assert prompts_in_order(client, q=word.upper()) == expected
    assert "no prompt has these words" in client.get("/?q=zebra").text


def test_human_pairs_show_their_file_and_row(client: TestClient) -> None:
    page = client.get("/?view=human&key=human-000004").text
    assert "labels/first.parquet, row 4 (from 0)" in page
    assert "a person&#39;s; no model has judged it" in page
    assert set(re.findall(r'src="(/image/seed/preferences.parquet/4/\w+)', page)) == {
        "/image/seed/preferences.parquet/4/winner", "/image/seed/preferences.parquet/4/loser"
    }  # fmt: skip


def test_what_a_decision_about_a_human_pair_costs_is_said_before(
    client: TestClient, run: Path
) -> None:
    dear = "trains\npolicy 0, and makes all that follows, anew"
    for config in (None, "{}", "no JSON", '{"train_seed": {"use_decisions": false}}', "[]"):
        if config is not None:
            (run / "config.json").write_text(config)
        page = client.get("/?view=human").text
        assert "The seed training keeps the pair, unless" in page
        assert dear not in page
    (run / "config.json").write_text('{"train_seed": {"use_decisions": true}}')
    assert dear in client.get("/?view=human").text
    for view in ("pairs", "holdout"):
        assert dear not in client.get(f"/?view={view}").text


def test_held_out_pairs_are_those_that_the_judge_gets_wrong_worst_first(client: TestClient) -> None:
    assert prompts_in_order(client, view="holdout") == [CAPTIONS[i] for i in (5, 3, 1)]
    assert len(prompts_in_order(client, view="holdout", only="all")) == 6
    assert "wrong: p(the people&#39;s winner) = 0.080" in client.get("/?view=holdout").text


def test_an_image_is_the_tables_own_bytes_and_stays_in_the_browser(
    client: TestClient, run: Path
) -> None:
    rows = read_rows(run / "iter01/candidates/shard-1.parquet")
    answer = client.get("/image/iter01/candidates/shard-1.parquet/4/image")
    assert answer.content == rows[4]["image"]["bytes"]
    assert answer.headers["content-type"] == "image/png"
    assert "immutable" in answer.headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "iter01/candidates/shard-1.parquet/99/image",
        "iter01/candidates/shard-7.parquet/0/image",
        "iter01/candidates/shard-1.parquet/0/prompt",
        "iter01/candidates/shard-1.parquet/0/winner",
        "../small/iter01/pairs.parquet/0/winner",
        "%2e%2e/small/iter01/pairs.parquet/0/winner",
        "/etc/passwd/0/image",
        "decisions/journal.jsonl/0/image",
    ],
)
def test_no_other_cell_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/image/{path}").status_code == 404


def test_bytes_that_are_no_image_are_not_served(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "iter01/candidates")
    path = run / "iter01/pairs.parquet"
    rows = read_rows(path)
    rows[0]["winner"]["bytes"] = b"<script>alert(1)</script>"
    from stages.core.artifacts.schemas import TRAINING_PAIRS
    from stages.core.artifacts.tables import write_table

    write_table(path, rows, TRAINING_PAIRS, stage="select_pairs", arguments={})
    with auditing(run) as client:
        answer = client.get("/image/iter01/pairs.parquet/0/winner")
    assert answer.status_code == 415
    assert answer.headers["content-type"].startswith("text/plain")
    assert "no readable image" in answer.text


def test_an_iteration_that_is_not_finished_shows_what_there_is(run: Path) -> None:
    folder = run / "iter01"
    (folder / "pairs.parquet").unlink()
    with auditing(run) as client:
        page = client.get("/").text
        assert "left out by select_pairs, or not made yet" in page
        assert "▲ best" in page  # by the rewards
        assert "data-winner" not in page
        for name in ("scores", "candidate_scores"):
            shutil.rmtree(folder / name)
        (folder / "judged.parquet").unlink()
        page = client.get("/").text
        assert "▲ best" not in page
        assert page.count("<img") == CANDIDATES_EACH


def test_pairs_alone_are_enough(run: Path) -> None:
    for name in ("candidates", "scores", "candidate_scores"):
        shutil.rmtree(run / "iter01" / name)
    with auditing(run) as client:
        page = client.get("/").text
        assert "/image/iter01/pairs.parquet/0/winner" in page
        assert "data-winner" in page


@pytest.mark.parametrize("name", ["scores/shard-0", "pairs", "candidates/shard-0", "judged"])
def test_a_damaged_table_is_named_and_the_others_are_shown(run: Path, name: str) -> None:
    path = run / f"iter01/{name}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with auditing(run) as client:
        answer = client.get("/")
    assert answer.status_code == 200
    assert str(path) in answer.text
    assert "delete it and call snakemake again" in answer.text
    assert "<img" in answer.text


def test_a_row_group_that_is_damaged_later_leaves_its_image_out(run: Path) -> None:
    path = run / "iter01/candidates/shard-0.parquet"
    chunks = pq.ParquetFile(path).metadata.row_group(0)
    images = next(
        chunk
        for chunk in (chunks.column(i) for i in range(chunks.num_columns))
        if chunk.path_in_schema == "image.bytes"
    )
    data = bytearray(path.read_bytes())
    end = images.data_page_offset + images.total_compressed_size
    data[end - 40 : end] = bytes(40)
    path.write_bytes(bytes(data))
    with auditing(run) as client:
        assert client.get("/").status_code == 200
        answer = client.get("/image/iter01/candidates/shard-0.parquet/0/image")
    assert answer.status_code == 500
    assert "it may be damaged" in answer.text


def test_a_table_that_is_made_anew_is_read_anew(client: TestClient, run: Path) -> None:
    first = client.get("/").text
    write_iteration(run, CAPTIONS[10:16], 1, policy="another")
    second = client.get("/").text
    assert CAPTIONS[0] in first
    assert CAPTIONS[0] not in second
    assert "another, of iteration 0" in second


def test_a_folder_without_results_is_refused_with_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent is no folder; expected a run's results"):
        RunIndex(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no tables of a run: expected iter01/candidates"):
        RunIndex(tmp_path)


def test_human_pairs_alone_are_a_run_to_look_at(run: Path) -> None:
    for name in ("iter01", "evaluation"):
        shutil.rmtree(run / name)
    with auditing(run) as client:
        page = client.get("/?view=pairs").text
        assert "labels/first.parquet, row 0" in page
        assert "view=pairs" not in page
        assert "has not looked at it" in client.get("/?view=holdout").text


def test_what_is_kept_in_memory_is_bounded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "KEPT_BYTES", 1)
    opened = cells.Cells(run)
    rows = read_rows(run / "iter01/pairs.parquet")
    for number, row in enumerate(rows):
        for side in ("winner", "loser"):
            data = opened.read("iter01/pairs.parquet", number, f"{side}.bytes")
            assert data == row[side]["bytes"]
            assert len(opened._kept) == 1


def test_every_prompt_stays_a_text_in_every_view(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", PROMPTS)
    shown = set()
    with auditing(run) as client:
        for view in ("pairs", "human", "holdout"):
            for key in [row["pair_id"] for row in read_rows(keys_of(run, view))]:
                answer = client.get("/", params={"view": view, "key": key, "only": "all", "q": ""})
                page = Page(answer.text)
                assert page.elements <= ELEMENTS, page.elements - ELEMENTS
                for tag, name, value in page.attributes:
                    assert not name.startswith("on"), (tag, name, value)
                    if name in ("src", "href", "action"):
                        assert value.startswith("/"), value
                        assert not value.startswith("//"), value
                shown |= {(view, text) for text in page.texts}
        hostile = client.get("/", params={"q": PROMPTS[0] + '"><script>alert(1)</script>'})
        assert Page(hostile.text).elements <= ELEMENTS
    for view in ("pairs", "human", "holdout"):
        for prompt in PROMPTS:
            assert (view, prompt.translate(PICTURES)) in shown, (view, prompt)


def keys_of(run: Path, view: str) -> Path:
    names = {"pairs": "iter01/pairs", "human": "seed/preferences", "holdout": "seed/holdout"}
    return run / f"{names[view]}.parquet"
