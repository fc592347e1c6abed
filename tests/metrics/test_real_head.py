"""The published aesthetics head against the answers in its README; needs SAIL_TEST_DATA."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.metrics.aesthetics import FILE, read_head
from stages.metrics.check import check_weights
from stages.metrics.weights import read_headers

DATA = os.environ.get("SAIL_TEST_DATA")
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
NORM = 17.995624776
"""Of the ten layers' one affine map."""
OF_EXAMPLES = [1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468]
"""The head's ratings of LAION's example embeddings rating0.npy to rating9.npy."""


def data(name: str) -> Path:
    """A file or folder of SAIL_TEST_DATA/weights."""
    if not DATA:
        pytest.skip("SAIL_TEST_DATA names no folder with weights/")
    path = Path(DATA) / "weights" / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def path() -> Path:
    return data(FILE)


@torch.no_grad()
def rated(path: Path, rows: torch.Tensor) -> list[float]:
    found: list[float] = read_head(path).to(rows.dtype)(rows).tolist()
    return found


def test_the_published_head_gives_its_known_answers(path: Path) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    rows = torch.zeros(3, 768, dtype=torch.float64)
    rows[1], rows[2, 0] = 768**-0.5, 1
    expected = [5.236645844819847, 4.883284854377318, 4.545052400553647]
    assert rated(path, rows) == pytest.approx(expected, abs=1e-9)
    assert rated(path, rows.float()) == pytest.approx(expected, abs=1e-4)  # as it scores


def test_the_published_head_is_the_affine_map_that_its_readme_measured(path: Path) -> None:
    bias, *columns = rated(path, torch.cat([torch.zeros(1, 768), torch.eye(768)]).double())
    slope = np.array(columns) - bias
    assert np.linalg.norm(slope) == pytest.approx(NORM, abs=1e-8)
    # by hand: the product of the five matrices in the file, without the network
    weights = torch.load(path, map_location="cpu", weights_only=True)
    product = np.eye(768)
    for place in (0, 2, 4, 6, 7):
        product = weights[f"layers.{place}.weight"].double().numpy() @ product
    assert product[0] == pytest.approx(slope, abs=1e-9)


def test_laions_ten_example_embeddings_are_rated_as_its_readme_says(path: Path) -> None:
    folder = data("vit_l_14_embeddings")
    rows = np.concatenate([np.load(folder / f"rating{k}.npy") for k in range(10)])
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    found = rated(path, torch.from_numpy(rows).double())
    assert found == pytest.approx(OF_EXAMPLES, abs=1e-4)


def test_preflight_sees_that_the_published_head_fits(path: Path) -> None:
    assert all(weight.is_meta for weight in read_head(path, read_headers).parameters())
    sizes = zip((768, 1024, 128, 64, 16), (1024, 128, 64, 16, 1), strict=True)
    parameters = sum((columns + 1) * rows for columns, rows in sizes)
    found = check_weights("aesthetics", {"weights": str(path), "clip": "openai/clip"})
    assert found.startswith(f"{path} fits, {parameters:,} parameters; clip openai/clip is a hub id")
