"""The published aesthetics head against the answers in its README; needs SAIL_TEST_DATA."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from stages.metrics.aesthetics import FILE, read_head

DATA = os.environ.get("SAIL_TEST_DATA")


@pytest.fixture(scope="module")
def path() -> Path:
    if not DATA:
        pytest.skip("SAIL_TEST_DATA names no folder with weights/")
    file = Path(DATA) / "weights" / FILE
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return file


def test_the_published_head_gives_its_known_answers(path: Path) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("21dd590f3ccdc646")
    head = read_head(path).double()
    rows = torch.stack([torch.zeros(768), torch.ones(768) / 768**0.5, torch.eye(768)[0]]).double()
    with torch.no_grad():
        found = head(rows).tolist()
    # a float64 unit vector; the README's "ones" was divided in float64 too
    rows[1] = 768**-0.5
    with torch.no_grad():
        found[1] = head(rows[1:2]).item()
    expected = [5.236645844819847, 4.883284854377318, 4.545052400553647]
    assert found == pytest.approx(expected, abs=1e-9)
