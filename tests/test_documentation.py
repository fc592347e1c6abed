"""The audit snippets of docs/export.md run as they are written."""

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

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"


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
