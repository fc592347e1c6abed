"""CLIP's tokens against the original tokenizer itself, as open_clip_torch carries it.

The wheel is installed without what it depends on (`make test` does), since only its tokenizer's file and
vocabulary are read. SAIL_TEST_DATA names a folder with prompts/.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from stages.metrics.clip import Prompts
from stages.metrics.hpsv2 import clean_prompt

HARD = [
    "",
    " two\tspaces  and\nlines ",
    "It's a DOG’S life, isn’t it?",
    "“curly quotes” and ‚low‘ ones",
    "ｆｕｌｌ－ｗｉｄｔｈ，commas、and 。",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m",
    "schÃ¶n mojibake",
    "a &amp;amp; b &lt;tag&gt; &quot;x&quot;",
    "1234567890 3.14 10,000 50%",
    "👩‍👩‍👧‍👦 🐈 ☃ emoji",
    "日本語 の 猫 Кошка قطة",
    "snake_case-and/or\\path #tag @you (a:1.2) [b]",
    "supercalifragilisticexpialidocious floccinaucinihilipilification",
    "word " * 90,
    "!!!???...---",
]


@pytest.fixture(scope="module")
def original() -> Any:
    """open_clip's SimpleTokenizer, from its file alone: the package itself imports torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        pytest.skip("needs `pip install --no-deps open_clip_torch` for the original tokenizer")
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.fixture(scope="module")
def tokenizer(original: Any) -> CLIPTokenizer:
    """Ours, with the real vocabulary under the names that transformers' files have."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in original.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(original.bpe_ranks))


def differing(texts: list[str], original: Any, tokenizer: CLIPTokenizer) -> list[str]:
    """The prompts whose tokens, cleaned and cut as HPSv2's scorer does, are not the original's."""

    class Text:
        config = type("", (), {"text_config": type("", (), {"max_position_embeddings": 77})})

    prompts = Prompts(Text(), tokenizer, torch.device("cpu"), clean=clean_prompt)
    ends = original(texts) == original.eot_token_id
    is_text = (ends.cumsum(dim=1) - ends.long()) == 0  # up to the first end mark; the rest is padding
    same = (prompts.tokens(texts) == original(texts)) | ~is_text
    return [text for text, is_same in zip(texts, same.all(dim=1).tolist(), strict=True) if not is_same]


def prompts_of(name: str) -> list[str]:
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


def test_tokens_of_hard_texts_are_the_original_tokenizers(
    original: Any, tokenizer: CLIPTokenizer
) -> None:
    assert not differing(HARD, original, tokenizer)


@pytest.mark.parametrize(
    ("name", "count"), [("PartiPrompts.tsv", 1632), ("hpsv2_benchmark_3200.json", 3200)]
)
def test_tokens_of_the_prompt_sets_are_the_original_tokenizers(
    name: str, count: int, original: Any, tokenizer: CLIPTokenizer
) -> None:
    texts = prompts_of(name)
    assert len(texts) == count
    assert not differing(texts, original, tokenizer)


def test_without_the_cleaning_some_would_differ(original: Any, tokenizer: CLIPTokenizer) -> None:
    """So the comparison can fail: PickScore's prompts are not cleaned, as its processor's are not."""
    raw = tokenizer(HARD, padding="max_length", truncation=True, max_length=77).input_ids
    found = [list(row) for row in raw]
    assert any(a[:8] != b[:8] for a, b in zip(found, original(HARD).tolist(), strict=True))
