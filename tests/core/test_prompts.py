"""Prompts: what counts as the same one, reading them, and sets that never overlap."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.core.prompts import normalise, prompt_id, read_prompts, select_prompts
from tests.builders import prompt_row, write_rows

POOL = [f"prompt number {number}" for number in range(20)]


@pytest.mark.parametrize(
    "variant",
    ["A  Red\tcircle", " a red circle ", "a red CIRCLE", "a red\ncircle", "ａ red circle"],
)
def test_spellings_of_one_prompt_have_one_id(variant: str) -> None:
    assert normalise(variant) == "a red circle"
    assert prompt_id(variant) == "8cbf502735c9b035"


def test_different_prompts_have_different_ids() -> None:
    assert len({prompt_id(prompt) for prompt in [*POOL, "a red circle", "a red-circle"]}) == 22


def test_blocks_of_one_seed_are_disjoint_and_together_the_pool() -> None:
    blocks = [
        select_prompts(POOL, excluded=set(), shuffle_seed=5, skip=skip, take=take)
        for skip, take in ((0, 8), (8, 7), (15, 5))
    ]
    assert [len(block) for block in blocks] == [8, 7, 5]
    assert sorted(functools.reduce(operator.iadd, blocks, [])) == sorted(POOL)
    assert blocks[0] != POOL[:8]


def test_a_shuffled_choice_depends_on_the_seed_and_not_on_the_pools_order() -> None:
    options = {"excluded": set(), "skip": 0, "take": 6}
    first = select_prompts(POOL, shuffle_seed=1, **options)
    assert select_prompts(POOL[::-1], shuffle_seed=1, **options) == first
    assert select_prompts(POOL, shuffle_seed=2, **options) != first


def test_without_a_shuffle_seed_the_pools_order_is_kept() -> None:
    found = select_prompts(POOL, excluded=set(), shuffle_seed=None, skip=2, take=3)
    assert found == POOL[2:5]


def test_excluded_prompts_are_left_out_whatever_their_spelling() -> None:
    excluded = {prompt_id(POOL[0].upper()), prompt_id("  " + POOL[3])}
    found = select_prompts(POOL, excluded=excluded, shuffle_seed=0, skip=0, take=18)
    assert sorted(found) == sorted(set(POOL) - {POOL[0], POOL[3]})


@pytest.mark.parametrize(("skip", "take"), [(0, 19), (15, 4), (30, 1)])
def test_too_few_prompts_are_refused_with_all_three_numbers(skip: int, take: int) -> None:
    excluded = {prompt_id(prompt) for prompt in POOL[:2]}
    with pytest.raises(UserError, match=f"{take} prompts .* first {skip}, .* only 18 "):
        select_prompts(POOL, excluded=excluded, shuffle_seed=0, skip=skip, take=take)


def test_a_set_without_prompts_is_refused() -> None:
    for take in (0, -2):
        with pytest.raises(UserError, match=str(take)):
            select_prompts(POOL, excluded=set(), shuffle_seed=None, skip=0, take=take)


def test_text_files_give_one_prompt_a_line_without_blank_lines_and_repeats(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffA cat\r\n\r\n  a dog \nA  CAT\nlast é".encode())
    assert read_prompts(path) == ["A cat", "a dog", "last é"]


def test_tables_give_their_prompts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prompts.parquet", [prompt_row("a cat"), prompt_row("a dog")])
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.txt", None, "does not exist"),
        ("blank.txt", b"\n  \n", "holds no prompts"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("prompts.docx", b"a cat", "'.docx'"),
        ("prompts.csv", b"a cat", "no column 'prompt'"),
        ("prompts.parquet", b"a cat", "no readable Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_an_empty_prompt_in_a_table_is_named_with_its_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prompts.parquet", [prompt_row("a cat"), prompt_row(" ")])
    with pytest.raises(UserError, match="row 1 is empty"):
        read_prompts(path)
