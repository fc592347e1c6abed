"""The numbers of the paper's Tables 1 to 6, to put a run's own beside them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).with_name("paper_tables.csv")
FACTS = ("table", "model", "method", "policy", "data", "printed_as")

TOLERANCE: Mapping[str, float] = {"pickscore": 0.1, "hpsv2": 0.2}
"""How far an untuned base may lie from the paper's before its images or their preprocessing are
suspect, not the training. A judgement, not from the paper."""


@dataclass(frozen=True, order=True)
class Column:
    """What a column of the paper measures."""

    prompt_set: str
    metric: str
    category: str = ""
    """HPSv2's style; empty for all prompts."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of one of the paper's tables."""

    table: int
    model: str
    """sd15 or sdxl."""
    method: str
    """'base' is the untuned model."""
    policy: str
    """The policy of a run it corresponds to; empty for other methods."""
    data: str
    """Human pairs, as the paper writes them."""
    printed_as: str
    """Its label in the paper, where we name it otherwise: Table 2 prints Iter0, Iter2, Iter3,
    Iter4 for what are iterations 0 to 3."""
    values: Mapping[Column, float]


def read_paper_tables() -> list[PaperRow]:
    """All rows, table by table, in the paper's order."""
    with TABLES.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        PaperRow(
            table=int(line["table"]),
            **{name: line[name] for name in FACTS[1:]},
            values={
                Column(*name.split("/")): float(text)
                for name, text in line.items()
                if name not in FACTS and text
            },
        )
        for line in lines
    ]
