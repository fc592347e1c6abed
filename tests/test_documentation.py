"""The audit snippets of docs/export.md run as they are written; what pages name and link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
from PIL import Image

from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import write_table
from stages.core.data.prompts import prompt_id
from tests.builders import CAPTIONS, encoded, image_value, picture

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "export.md"
PAGES = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "stages/README.md",
            "config/README.md",
        )
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMED_PATH = re.compile(r"(?<![\w/.-])(?:stages|core|tests)(?:/[\w.-]+)+")
"""As stages/launch.py, core/method or tests/core/test_locks.py; other folders lead to no module."""
NAMED_MODULE = re.compile(r"(?<![\w/.])stages(?:\.[a-z]\w*)+")
NAMED_IMPORT = re.compile(r"from (stages[\w.]*) import (\w+(?:, \w+)*)")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def snippets(heading: str) -> list[str]:
    """The indented blocks under a heading, as code."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", section, flags=re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]


def test_every_audit_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = [
        {
            "pair_id": f"pair-{number}",
            "prompt_id": prompt_id(caption),
            "prompt": caption,
            "winner": image_value(encoded(picture(caption))),
            "loser": image_value(encoded(picture(caption, strength=0.5))),
            "source": "generated",
            "iteration": 1,
            "probability": 0.75,
        }
        for number, caption in enumerate(CAPTIONS[:3])
    ]
    path = Path("results/shapes/iter01/preferences.parquet")
    write_table(path, rows, PREFERENCES, stage="mix_preferences", arguments={})
    found = snippets("Audit the tables as they are")
    assert len(found) == 3
    for code in found:
        exec(compile(code, str(PAGE), "exec"), {})
    assert "generated" in capsys.readouterr().out
    with Image.open("winner.png") as saved:
        assert saved.size == (64, 64)


def missing(text: str) -> list[str]:
    """Paths, modules and imported names of ours that a text names and that are not there."""
    found = []
    for path in map(str, NAMED_PATH.findall(text)):
        above = ROOT / "stages" if path.startswith("core/") else ROOT
        if not (above / path.rstrip(".")).exists():
            found.append(path)
    for module in map(str, NAMED_MODULE.findall(text)):
        place = ROOT.joinpath(*module.split("."))
        if not (place.is_dir() or place.with_suffix(".py").is_file()):
            found.append(module)
    for module, names in NAMED_IMPORT.findall(text):
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        text_of_module = path.read_text(encoding="utf-8") if path.is_file() else ""
        found += [
            f"{module} import {name}"
            for name in names.split(", ")
            if not re.search(rf"^(?:def|class) {name}\b|^{name}\b.* = ", text_of_module, re.M)
        ]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for name, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `core/runtime.py`.", ["core/runtime.py"]),
        ("in stages/core/attic/ and `stages/launch.py`", ["stages/core/attic"]),
        ("`tests/core/test_attic.py` does", ["tests/core/test_attic.py"]),
        ("python -m stages.attic --help", ["stages.attic"]),
        ("from stages.core.artifacts.tables import read_table, read_attic",
         ["stages.core.artifacts.tables import read_attic"]),
        ("The stages. `core/execution`, my/stages/attic.py and other/core/x.", []),
    ],
)  # fmt: skip
def test_what_a_page_names_and_is_not_there_is_found(text: str, found: list[str]) -> None:
    assert missing(text) == found
