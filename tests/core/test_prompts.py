"""Prompts: what counts as the same one, reading them, and sets that never overlap."""

from __future__ import annotations

import functools
import json
import operator
import os
from pathlib import Path

import pytest

from stages.core.data.prompts import (
    HPSV2_STYLES,
    MAX_PROMPT_LETTERS,
    normalise,
    prompt_id,
    read_hpsv2,
    read_items,
    read_pool,
    read_prompts,
    select_prompts,
)
from stages.core.errors import UserError
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


def test_a_pool_leaves_out_what_the_import_of_labels_would_refuse(tmp_path: Path) -> None:
    longest = "x" * MAX_PROMPT_LETTERS
    texts = ["a cat", None, "", " \t", longest + "x", longest, "A  cat"]
    labels = write_rows(tmp_path / "train.parquet", [{"caption": text} for text in texts])
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"prompt": "a dog"}\n{"prompt": null}\n{}\n{"prompt": "half \\ud800"}\n')
    pool = read_pool(labels, lines)
    assert pool.prompts == ["a cat", longest, "a dog"]
    assert (pool.num_read, pool.num_left_out) == (11, 7)
    assert read_pool(lines).prompts == ["a dog"]
    for path in (labels, lines):
        with pytest.raises(UserError, match="row 1 is empty"):
            read_prompts(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('["", " "]', "none of its 2 prompts can be used; expected texts of 1 to 10,000 letters"),
        ("[]", "no column"),
        ("[1, 2]", "no column|none of its 2 prompts"),
    ],
)
def test_a_file_without_a_usable_prompt_is_no_pool(
    tmp_path: Path, content: str, reason: str
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.json"
    good.write_text("a cat")
    bad.write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_pool(good, bad)
    assert str(bad) in str(caught.value)


READABLE = {
    "prompts.csv": 'Prompt,Style\n"a ""big"" cat, asleep",photo\na dog,anime\n"a\ncat",photo\n',
    "prompts.tsv": 'Prompt\tCategory\n"a" "big" cat\tAnimals\na dog\tAnimals\n',
    "prompts.jsonl": '{"prompt": "a cat", "style": "photo"}\n\n{"prompt": "a \\"dog\\""}\n',
    "texts.json": '["a cat", "a \\"dog\\""]',
    "objects.json": '[{"caption": "a cat", "category": "photo"}, {"caption": "a dog"}]',
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "prompts.csv",
            [('a "big" cat, asleep', "photo"), ("a dog", "anime"), ("a\ncat", "photo")],
        ),
        ("prompts.tsv", [('"a" "big" cat', "Animals"), ("a dog", "Animals")]),
        ("prompts.jsonl", [("a cat", "photo"), ('a "dog"', None)]),
        ("texts.json", [("a cat", None), ('a "dog"', None)]),
        ("objects.json", [("a cat", "photo"), ("a dog", None)]),
    ],
)
def test_every_kind_of_file_gives_its_prompts_and_styles(
    tmp_path: Path, name: str, expected: list[tuple[str, str | None]]
) -> None:
    path = tmp_path / name
    path.write_text(READABLE[name], encoding="utf-8")
    items = list(read_items(path))
    assert [(item.prompt, item.style) for item in items] == expected
    assert [item.index for item in items] == list(range(len(expected)))


def test_label_files_give_their_captions(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.parquet", [{"caption": "a cat", "label_0": 1.0}] * 3)
    assert read_prompts(path, path) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '{"prompt": "a cat"}', "holds dict; expected a list"),
        ("a.json", '["a cat", 1]', "row 1: expected an object or a text, found int"),
        ("a.json", "[", "no readable JSON"),
        ("a.jsonl", '{"prompt": "a cat"}\n{"prompt"', "row 1: the line is no readable JSON"),
        ("a.jsonl", '{"prompt": "a cat"}\n{"prompt": " "}', "row 1 is empty"),
        ("a.csv", "prompt,style\na cat\n", "row 0: 1 cells under a head of 2"),
        ("a.csv", "", "no column 'prompt'"),
        ("a.tsv", "prompt\tstyle\n", "holds no prompts"),
    ],
)
def test_a_row_that_holds_no_prompt_is_named(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_text_that_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes(b"prompt\na cat\na caf\xe9\n")
    with pytest.raises(UserError, match=r"line 3: byte 6 of the line is 0xe9; the file is not UTF"):
        read_prompts(path)


@pytest.fixture(scope="module")
def shared_prompts() -> Path:
    """The folder of real prompt sets."""
    if "SAIL_TEST_DATA" not in os.environ:
        pytest.skip("SAIL_TEST_DATA names no folder of real prompt sets")
    return Path(os.environ["SAIL_TEST_DATA"]) / "prompts"


def test_partiprompts_are_1632_with_their_quotes(shared_prompts: Path) -> None:
    path = shared_prompts / "PartiPrompts.tsv"
    items = list(read_items(path))
    raw = path.read_bytes().decode().splitlines()[1:]
    assert [item.prompt for item in items] == [line.split("\t")[0].strip() for line in raw]
    assert len(items) == len(read_prompts(path)) == 1632
    assert sum('"' in item.prompt for item in items) == 22
    assert any(item.prompt.startswith('"G I G G L E"') for item in items)
    assert len({item.style for item in items}) == 12


def test_hpsv2_is_3200_and_its_28_repeats_are_kept_apart(
    shared_prompts: Path, tmp_path: Path
) -> None:
    path = shared_prompts / "hpsv2_benchmark_3200.json"
    items = read_hpsv2(path)
    assert len({(item.style, item.index) for item in items}) == len(items) == 3200
    assert len({item.prompt for item in items}) == 3200 - 28
    for style in HPSV2_STYLES:  # the four files as published: lists of texts
        texts = [item.prompt for item in items if item.style == style]
        assert len(texts) == 800
        (tmp_path / f"{style}.json").write_text(json.dumps(texts))
    assert read_hpsv2(tmp_path) == items


def test_hpsv2_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hpsv2.json"
    path.write_text(json.dumps([f"prompt {number}" for number in range(3199)]))
    with pytest.raises(UserError, match="'photo': 799.*expected 800 prompts of each"):
        read_hpsv2(path)


def test_25432_pickapic_captions_are_split_into_disjoint_sets(shared_prompts: Path) -> None:
    pool = read_prompts(shared_prompts / "pickapic_v1_flowgrpo_train.txt")
    held = read_prompts(shared_prompts / "pickapic_v2_test_dedup_487.json")
    excluded = {prompt_id(prompt) for prompt in held}
    assert len(held) == 487
    lines = (shared_prompts / "pickapic_v1_flowgrpo_train.txt").read_bytes().splitlines()
    assert len(lines) == 25432
    assert len(pool) == len({prompt_id(line.decode()) for line in lines})
    sizes = [5000, 10000, 9000]
    sets = [
        select_prompts(pool, excluded=excluded, shuffle_seed=3, skip=sum(sizes[:n]), take=size)
        for n, size in enumerate(sizes)
    ]
    ids = [{prompt_id(prompt) for prompt in some} for some in sets]
    assert [len(some) for some in ids] == sizes
    assert len(set.union(*ids, excluded)) == sum(sizes) + 487
