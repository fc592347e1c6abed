"""Evaluation sets in their layouts, on small files and on the real ones."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from stages.core.data.evaluation_prompts import read_evaluation_prompts, shared_prompts
from stages.core.data.prompts import HPSV2_STYLES, prompt_id
from stages.core.errors import UserError

DATA = os.environ.get("SAIL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SAIL_TEST_DATA does not name the shared data")
HEADER = "Prompt\tCategory\tChallenge\tNote\n"


def partiprompts(path: Path, text: str) -> Path:
    path.write_text(HEADER + text, encoding="utf-8")
    return path


def hpsv2(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps([{"prompt": text, "metadata": {}} for text in texts]))
    return path


def test_plain_files_keep_different_prompts_under_their_usual_ids(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\nA  cat\na dog\n")
    rows = read_evaluation_prompts([path], "plain")
    assert [row.prompt for row in rows] == ["a cat", "a dog"]
    assert [row.prompt_id for row in rows] == [prompt_id("a cat"), prompt_id("a dog")]
    assert [(row.category, row.item) for row in rows] == [(None, None)] * 2


def test_quotes_of_partiprompts_belong_to_the_prompt(tmp_path: Path) -> None:
    path = partiprompts(tmp_path / "p.tsv", '"G I G G L E" in ink\tAbstract\tBasic\tnote\n')
    (row,) = read_evaluation_prompts([path], "partiprompts")
    assert row.prompt == '"G I G G L E" in ink'
    assert (row.category, row.challenge, row.item) == ("Abstract", "Basic", None)


def test_equal_prompts_of_hpsv2_stay_apart(tmp_path: Path) -> None:
    texts = [f"prompt {number % 797}" for number in range(3200)]
    rows = read_evaluation_prompts([hpsv2(tmp_path / "h.json", texts)], "hpsv2")
    assert len({row.prompt_id for row in rows}) == 3200
    assert Counter(row.category for row in rows) == dict.fromkeys(HPSV2_STYLES, 800)
    assert (rows[801].category, rows[801].item, rows[801].prompt) == ("concept-art", 1, "prompt 4")


def test_the_folder_of_four_files_is_the_same_set(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(3200)]
    for number, style in enumerate(HPSV2_STYLES):
        part = texts[800 * number : 800 * (number + 1)]
        (tmp_path / f"{style}.json").write_text(json.dumps(part))
    parts = sorted(tmp_path.glob("*.json"))
    one = read_evaluation_prompts([hpsv2(tmp_path / "all.json", texts)], "hpsv2")
    assert read_evaluation_prompts(parts, "hpsv2") == one


@pytest.mark.parametrize(
    ("name", "layout", "content", "reason"),
    [
        ("h.json", "hpsv2", json.dumps(["a"] * 3199), "'photo': 799.*expected 800 prompts of each"),
        ("h.json", "hpsv2", json.dumps([]), "has no column 'prompt'"),
        ("h.json", "hpsv2", json.dumps({"a": 1}), "list"),
        ("h.json", "hpsv2", json.dumps(["a", 3]), "row 1"),
        ("h.json", "hpsv2", "[", "h.json"),
        ("p.tsv", "partiprompts", "Prompt\tNote\na\tb\n", "no column 'Category' .found: Prompt"),
        ("p.tsv", "partiprompts", "", "found: nothing"),
        ("p.tsv", "partiprompts", HEADER + " \tA\tB\tC\n", "row 0: the prompt is empty"),
    ],
)
def test_what_is_no_such_file_is_refused(
    tmp_path: Path, name: str, layout: str, content: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        read_evaluation_prompts([path], layout)  # type: ignore[arg-type]


def test_shared_prompts_are_found_whatever_their_case_and_spacing() -> None:
    evaluation = ["A  Cat", "a dog", "ａ bird", "a cat"]
    assert shared_prompts(evaluation, ["a cat ", "A BIRD", "a fish"]) == ["a cat", "ａ bird"]


@needs_data
def test_the_real_hpsv2_has_four_styles_and_its_repeats() -> None:
    path = Path(DATA or "") / "prompts" / "hpsv2_benchmark_3200.json"
    rows = read_evaluation_prompts([path], "hpsv2")
    assert Counter(row.category for row in rows) == dict.fromkeys(HPSV2_STYLES, 800)
    assert len({row.prompt_id for row in rows}) == 3200
    assert len({row.prompt for row in rows}) == 3172


@needs_data
def test_the_real_partiprompts_have_12_categories_and_11_challenges() -> None:
    path = Path(DATA or "") / "prompts" / "PartiPrompts.tsv"
    rows = read_evaluation_prompts([path], "partiprompts")
    assert len(rows) == len({row.prompt_id for row in rows}) == 1632
    assert len({row.category for row in rows}) == 12
    assert len({row.challenge for row in rows}) == 11
    assert sum('"' in row.prompt for row in rows) == 22


@needs_data
def test_215_of_the_487_test_captions_are_also_training_captions() -> None:
    """The data's own page counts 214 of equal bytes; normalised, one more is the same."""
    folder = Path(DATA or "") / "prompts"
    captions = json.loads((folder / "pickapic_v2_test_dedup_487.json").read_text())
    evaluation = [row["prompt"] for row in captions]
    training: list[str] = []
    for part in ("train", "test"):
        path = folder / f"pickapic_v1_flowgrpo_{part}.txt"
        training += path.read_text().splitlines()
    assert len(set(evaluation) & set(training)) == 214
    assert len(shared_prompts(evaluation, training)) == 215
