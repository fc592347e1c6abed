"""CLIP's tokens against the original tokenizer's algorithm, with the real vocabulary.

SAIL_TEST_BPE names bpe_simple_vocab_16e6.txt.gz (in the wheel of open_clip_torch), SAIL_TEST_DATA a
folder with prompts/.
"""

from __future__ import annotations

import gzip
import html
import json
import os
from functools import cache
from itertools import pairwise
from pathlib import Path

import ftfy
import pytest
import regex
from transformers import CLIPTokenizer

from stages.metrics.hpsv2 import clean_prompt

PATTERN = regex.compile(
    r"""<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
    regex.IGNORECASE,
)


class Original:
    """OpenAI's simple_tokenizer.py as open_clip carries it, written once more."""

    def __init__(self, path: Path) -> None:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        self.merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
        codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
        table = {code: chr(code) for code in codes}
        for code in range(256):
            table.setdefault(code, chr(256 + len(table) - len(codes)))
        self.table = table
        words = [*table.values(), *(f"{letter}</w>" for letter in table.values())]
        words += ["".join(pair) for pair in self.merges] + ["<start_of_text>", "<end_of_text>"]
        self.place = {word: number for number, word in enumerate(words)}
        self.rank = {pair: number for number, pair in enumerate(self.merges)}
        self.pieces = cache(self._pieces)

    def _pieces(self, word: str) -> tuple[str, ...]:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.rank.get(pair, 10**9))
            if best not in self.rank:
                break
            merged: list[str] = []
            i = 0
            while i < len(parts):
                is_pair = tuple(parts[i : i + 2]) == best
                merged.append("".join(parts[i : i + 2]) if is_pair else parts[i])
                i += 2 if is_pair else 1
            parts = merged
        return tuple(parts)

    def __call__(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        tokens = [self.place["<start_of_text>"]]
        for word in PATTERN.findall(text):
            letters = "".join(self.table[byte] for byte in word.encode())
            tokens += [self.place[piece] for piece in self.pieces(letters)]
        return [*tokens[:76], self.place["<end_of_text>"]]


@pytest.fixture(scope="module")
def original() -> Original:
    name = os.environ.get("SAIL_TEST_BPE", "")
    if not Path(name).is_file():
        pytest.skip("SAIL_TEST_BPE names no bpe_simple_vocab_16e6.txt.gz")
    return Original(Path(name))


@pytest.fixture(scope="module")
def tokenizer(original: Original) -> CLIPTokenizer:
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in original.place.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=original.merges)


def prompts(name: str) -> list[str]:
    data = os.environ.get("SAIL_TEST_DATA")
    if not data:
        pytest.skip("SAIL_TEST_DATA names no folder with prompts/")
    path = Path(data) / "prompts" / name
    if path.suffix == ".tsv":
        return [line.split("\t")[0] for line in path.read_text().splitlines()[1:]]
    found = json.loads(path.read_text())
    values = found.values() if isinstance(found, dict) else [found]
    rows = [row for value in values for row in (value if isinstance(value, list) else [value])]
    return [row["prompt"] if isinstance(row, dict) else row for row in rows]


@pytest.mark.parametrize(
    ("name", "count"), [("PartiPrompts.tsv", 1632), ("hpsv2_benchmark_3200.json", 3200)]
)
def test_tokens_are_the_original_tokenizers(
    name: str, count: int, original: Original, tokenizer: CLIPTokenizer
) -> None:
    texts = prompts(name)
    assert len(texts) == count
    cleaned = [clean_prompt(text) for text in texts]
    found = tokenizer(cleaned, truncation=True, max_length=77).input_ids
    differing = [t for t, a in zip(texts, found, strict=True) if a != original(t)]
    assert not differing
