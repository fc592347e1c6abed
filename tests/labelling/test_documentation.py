"""Every layout that docs/labelling.md shows is read, and makes the pairs that the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.core.labelling.pairs import choose_pairs
from stages.core.labelling.places import find_images
from tests.test_own_labels import write_example

PAGE = Path(__file__).resolve().parents[2] / "docs" / "labelling.md"
MAKES = re.compile(r"This makes (\d+) pairs?")


def examples() -> list[tuple[str, int]]:
    """(text, number of pairs) of every example."""
    section = PAGE.read_text(encoding="utf-8").split("## Images that are there\n")[1]
    section = section.split("\n## ")[0]
    places = [(match.start(), match.end(), int(match[1])) for match in MAKES.finditer(section)]
    starts = [0, *(end for _, end, _ in places)]
    return [(section[start:stop], n) for start, (stop, _, n) in zip(starts, places, strict=False)]


def test_there_are_three_layouts() -> None:
    assert len(examples()) == 3


@pytest.mark.parametrize(("text", "num_pairs"), examples())
def test_an_example_makes_the_pairs_that_the_page_says(
    tmp_path: Path, text: str, num_pairs: int
) -> None:
    write_example(text, tmp_path)
    prompts = find_images([tmp_path])
    assert len(choose_pairs(prompts, pairs_per_prompt=1, common_share=0.0, seed=0)) == num_pairs
    every = choose_pairs(prompts, pairs_per_prompt=9, common_share=0.0, seed=0)
    assert len(every) == num_pairs + 2 * ("images.csv" in text)


def test_every_key_of_the_page_is_one_of_the_script() -> None:
    script = (PAGE.parents[1] / "stages/core/labelling/static/label.js").read_text()
    table = PAGE.read_text(encoding="utf-8").split("## Keys\n")[1].split("\n## ")[0]
    arrows = {"←": "ArrowLeft", "→": "ArrowRight", "↑": "ArrowUp", "↓": "ArrowDown"}
    keys = re.findall(
        r"`(.)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    )
    assert len(keys) == 11
    for key in keys:
        assert re.search(rf'\b{arrows.get(key, key)}: "|"{key}"', script), key


def test_every_key_of_a_ranking_is_one_of_the_script() -> None:
    script = (PAGE.parents[1] / "stages/core/labelling/static/rank.js").read_text()
    section = PAGE.read_text(encoding="utf-8").split("## Rank several images\n")[1]
    table = section.split("\n## ")[0]
    arrows = {"→": "ArrowRight", "↑": "ArrowUp", "↓": "ArrowDown"}
    named = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    keys = set(re.findall(r"`(\S)`", "".join(named))) - set("1234un")
    assert keys == {"=", "↓", "→", "0", "↑", "s"}
    for key in (*keys, "Enter"):
        assert f'key === "{arrows.get(key, key)}"' in script, key
