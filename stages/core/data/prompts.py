"""Prompts: reading them, naming them, and keeping sets of them apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.data.layouts.sources import IMAGE_SUFFIXES, NOT_LABELS, columns_of, read_rows
from stages.core.data.text_files import (
    PROBLEM,
    RECORD_SUFFIXES,
    SHEET_HINT,
    SPREADSHEETS,
    column_names,
    kind_of,
    not_utf8,
    read_lines,
    read_records,
)
from stages.core.errors import UserError

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPT_COLUMNS = ("prompt", "caption", "text")
STYLE_COLUMNS = ("style", "category")

MAX_PROMPT_LETTERS = 10_000
"""No caption of an image is longer: a longer text is a file's content in the wrong column."""


def normalise(prompt: str) -> str:
    """The prompt as it counts when sets are compared: Unicode form, case and spacing set aside."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_id(prompt: str) -> str:
    """A digest of the normalised prompt, 16 hex digits."""
    return blake2b(normalise(prompt).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A prompt where it stands in its file; of two equal prompts both are there."""

    prompt: str
    style: str | None
    """What the file calls style or category, or the name of one of several files."""
    index: int
    """Position among the items of its file."""


def read_prompts(*paths: Path) -> list[str]:
    """The different prompts of some files, in their order; see `read_items`."""
    different: dict[str, str] = {}
    for path in paths:
        for item in read_items(path):
            different.setdefault(prompt_id(item.prompt), item.prompt)
    return list(different.values())


@dataclass(frozen=True, slots=True)
class PromptPool:
    """What iterations choose their prompts from."""

    prompts: list[str]
    """The different usable ones, in their order."""
    num_read: int
    """Prompts that the files hold, repeats too."""
    num_left_out: int
    """Those that are empty, too long or no text."""


def read_pool(*paths: Path) -> PromptPool:
    """The usable prompts of some files, which may be files of labels, where some rows are bad.

    UserError for a file without any, and for whatever else `read_items` finds wrong.
    """
    different: dict[str, str] = {}
    num_read = num_left_out = 0
    for path in paths:
        if len(paths) > 1 and holds_no_prompts(path):
            continue
        items = list(_read_some(path, is_lenient=True))
        usable = [item.prompt for item in items if _is_usable(item.prompt)]
        if not usable:
            raise UserError(
                f"{path}: none of its {len(items)} prompts can be used; expected texts of 1 to "
                f"{MAX_PROMPT_LETTERS:,} letters"
            )
        for prompt in usable:
            different.setdefault(prompt_id(prompt), prompt)
        num_read += len(items)
        num_left_out += len(items) - len(usable)
    return PromptPool(list(different.values()), num_read, num_left_out)


def read_items(path: Path) -> Iterator[PromptItem]:
    """Every prompt of a file, repeats too.

    .txt has one a line; .csv, .tsv (without quotes, as PartiPrompts'), .jsonl, .json and .parquet
    have them in a column `prompt` or `caption`, and .json may be a list of texts. UserError names
    the file and the row of an empty prompt, or says that there is none at all.
    """
    for item in _read_some(path):
        if problem := _problem(item.prompt):
            raise UserError(f"{path}: the prompt in row {item.index} is {problem}")
        yield item


def read_hpsv2(path: Path) -> list[PromptItem]:
    """The HPSv2 benchmark: 800 prompts of each of four styles, 28 of them repeats.

    From the folder of the four published files, or from one file that lists them in `HPSV2_STYLES`'
    order. UserError unless every style has its 800.
    """
    if path.is_dir():
        parts = {style: list(read_items(path / f"{style}.json")) for style in HPSV2_STYLES}
    else:
        whole = list(read_items(path))
        parts = {
            style: whole[800 * number : 800 * (number + 1)]
            for number, style in enumerate(HPSV2_STYLES)
        }
        parts["more than the four styles"] = whole[3200:]
    found = {style: len(items) for style, items in parts.items() if items}
    if found != dict.fromkeys(HPSV2_STYLES, 800):
        raise UserError(f"{path} holds {found}; expected 800 prompts of each of HPSv2's styles")
    return [
        PromptItem(item.prompt, style, index)
        for style in HPSV2_STYLES
        for index, item in enumerate(parts[style])
    ]


def select_prompts(
    pool: Iterable[str], *, excluded: set[str], shuffle_seed: int | None, skip: int, take: int
) -> list[str]:
    """`take` prompts of the pool after the first `skip`, none of them with an excluded id.

    With a shuffle seed the pool's order is drawn first; blocks of one seed never overlap.
    UserError if too few prompts are left.
    """
    free = [prompt for prompt in pool if prompt_id(prompt) not in excluded]
    if shuffle_seed is not None:
        free.sort(key=prompt_id)
        order = np.random.default_rng(shuffle_seed).permutation(len(free))
        free = [free[index] for index in order]
    chosen = free[skip : skip + take]
    if take < 1 or len(chosen) < take:
        raise UserError(
            f"{take} prompts were asked for after the first {skip}, but the pool has only "
            f"{len(free)} that no other set uses. Ask for fewer or give more prompts."
        )
    return chosen


def _problem(prompt: str) -> str | None:
    """What a prompt is instead of a text; None if it is one."""
    if not normalise(prompt):
        return "empty"
    problem = not_utf8(prompt)
    return problem and f"no text: {problem}"


def _is_usable(prompt: str) -> bool:
    """As the import of labels judges a caption."""
    return _problem(prompt) is None and len(prompt) <= MAX_PROMPT_LETTERS


def holds_no_prompts(path: Path) -> bool:
    """Whether a file of a folder of labels is an image, hidden, or tells of the folder alone."""
    is_image = kind_of(path) in IMAGE_SUFFIXES
    return is_image or path.name in NOT_LABELS or path.name.startswith(".")


def _read_some(path: Path, *, is_lenient: bool = False) -> Iterator[PromptItem]:
    """The prompts of a file as they stand there, empty ones too. UserError if there is none.

    A row that cannot be read is an empty prompt to whoever is lenient, and a UserError to others.
    """
    is_empty = True
    for item in _read_any(path, is_lenient):
        is_empty = False
        yield item
    if is_empty:
        raise UserError(f"{path} holds no prompts; expected one a line or a row")


def _read_any(path: Path, is_lenient: bool) -> Iterator[PromptItem]:
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path)
    elif kind in (".arrow", ".tar"):
        name = _named(path, columns_of(path), PROMPT_COLUMNS)
        for index, values in read_rows(path, [name], with_images=False):
            text = values.get(name)
            yield PromptItem(text if isinstance(text, str) else "", None, index)
    elif kind in (".txt", ".caption"):
        lines = (line.strip() for line in read_lines(path))
        for index, line in enumerate(line for line in lines if line):
            yield PromptItem(line, None, index)
    elif kind in RECORD_SUFFIXES:
        yield from _read_records(path, is_lenient)
    else:
        raise UserError(
            f"{path}: prompts are read from .txt, {', '.join(RECORD_SUFFIXES)}, .parquet, .arrow or "
            f".tar, found {path.suffix!r}{f'; {SHEET_HINT}' if kind in SPREADSHEETS else ''}"
        )


def _read_records(path: Path, is_lenient: bool) -> Iterator[PromptItem]:
    names = column_names(path)
    prompt = _named(path, names, PROMPT_COLUMNS)
    style = next((name for name in names if name.lower() in STYLE_COLUMNS), "")
    for index, record in enumerate(read_records(path)):
        if PROBLEM in record and not is_lenient:
            raise UserError(f"{path}, row {index}: {record[PROBLEM]}")
        text = record.get(prompt)
        text = text.strip() if isinstance(text, str) else ""
        yield PromptItem(text, record.get(style) or None, index)


def _read_parquet(path: Path) -> Iterator[PromptItem]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with naming(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        name = _named(path, file.schema_arrow.names, PROMPT_COLUMNS)
        texts = (
            text
            for batch in file.iter_batches(columns=[name])
            for text in batch.column(0).to_pylist()
        )
        for index, text in enumerate(texts):
            yield PromptItem(text if isinstance(text, str) else "", None, index)


def _named(path: Path, names: Sequence[str], wanted: Sequence[str]) -> str:
    """The first of the columns that has a wanted name, in whatever case."""
    for want in wanted:
        for name in names:
            if name.lower() == want:
                return name
    raise UserError(
        f"{path} has no column {' or '.join(map(repr, wanted))} (found: {', '.join(names)})"
    )
