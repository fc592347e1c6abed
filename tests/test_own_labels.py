"""Every example of docs/own-labels.md is imported and makes the pairs that the page says."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.import_preferences import Args, main
from tests.builders import CAPTIONS, encoded, picture, read_rows

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-labels.md"
FILE = re.compile(r"^`([\w./-]+)`[^\n]*:\n\n((?:    [^\n]*\n|\n)+)", re.MULTILINE)
CODE = re.compile(r"^((?:    [^\n]*\n|\n)*    pq\.write_table[^\n]*\n)", re.MULTILINE)
IMAGE = re.compile(r"[\w./-]+\.(?:png|jpg)\b")
PAIRS = re.compile(r"This makes (\d+) pairs")
MIXES = ("folders", "suffixes")
"""Layouts whose example is all files together; other examples are one file each."""


def examples() -> Iterator[tuple[str, str, int]]:
    """(layout, text of the example, number of pairs) of every example."""
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title = section.splitlines()[0]
        layout = re.search(r": `(\w+)`$", title)
        start = 0
        for match in PAIRS.finditer(section):
            assert layout, title
            yield layout[1], section[start : match.start()], int(match[1])
            start = match.end()


def write_example(text: str, folder: Path) -> None:
    """The files that an example shows, and a different picture for each image that it names."""
    images = {*IMAGE.findall(text), *(f"images/{name}" for name in IMAGE.findall(text))}
    for number, name in enumerate(sorted(images)):
        path = folder / name
        if "images/images" not in name and ("images/" in name) == (
            "images/" in text or "Path(" in text
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(CAPTIONS[number]), "PNG"))
    for name, content in FILE.findall(text):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content).strip() + "\n", encoding="utf-8")
    for code in CODE.findall(text):
        exec(textwrap.dedent(code), {})


def test_the_page_has_an_example_of_every_layout() -> None:
    layouts = [layout for layout, _text, _pairs in examples()]
    assert set(layouts) == {
        "pickapic",
        "pairs",
        "comparisons",
        "labelstudio",
        "rankings",
        "likes",
        *MIXES,
    }
    assert len(layouts) == 12


@pytest.mark.parametrize(("layout", "text", "num_pairs"), list(examples()))
def test_an_example_makes_its_pairs(
    layout: str, text: str, num_pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    monkeypatch.chdir(data)
    write_example(text, data)
    args = Args(
        files=(data,), num_pairs=None, num_holdout=0, seed=0, preferences=out / "pairs.parquet",
        holdout=out / "holdout.parquet", summary=out / "import.json",
    )  # fmt: skip
    main(args)
    report = json.loads(args.summary.read_text())
    assert (report["layout"], report["pairs_kept"]) == (layout, num_pairs)
    for row in read_rows(args.preferences):
        assert row["winner"]["bytes"] != row["loser"]["bytes"]
        assert row["prompt"].startswith(("a red kite", "a fox"))
