"""Another package's metric, by the example of docs/metrics.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from stages import metrics
from stages.core.errors import UserError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's package, installed in a folder of its own."""
    code = re.search(r"    # my_metrics\.py\n(.*?)\n    # the config", PAGE.read_text(), re.S)
    assert code
    (tmp_path / "my_metrics.py").write_text(dedent(code[1]))
    info = tmp_path / "my_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-metrics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sail.metrics]\ndarkness = my_metrics:load\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    metrics._plugins.cache_clear()
    yield info
    metrics._plugins.cache_clear()
    sys.modules.pop("my_metrics", None)


def test_the_pages_example_is_a_metric_by_name(package: Path) -> None:
    assert metrics.metric_names()[-1] == "darkness"
    assert metrics.needs_gpu("darkness")
    scorer = metrics.load_scorer("darkness", {"white": "250"})
    images = np.full((2, 4, 4, 3), 50, np.uint8)
    assert scorer(images=images, prompts=["a", "b"]).tolist() == pytest.approx([0.8, 0.8])
    assert metrics.spec_of(scorer) == {"version": "1"}


def test_a_name_that_is_taken_is_refused(package: Path) -> None:
    (package / "entry_points.txt").write_text("[sail.metrics]\nhpsv2 = my_metrics:load\n")
    with pytest.raises(UserError, match="two metrics are called 'hpsv2'"):
        metrics.metric_names()


def test_a_metric_that_cannot_be_imported_is_named(package: Path) -> None:
    (package / "entry_points.txt").write_text("[sail.metrics]\ndarkness = my_metrics:absent\n")
    with pytest.raises(UserError, match=r"'darkness' \(my_metrics:absent\) cannot be loaded"):
        metrics.load_scorer("darkness")


def test_an_unknown_metric_is_told_the_names() -> None:
    with pytest.raises(UserError, match="no metric 'pikscore'; expected one of .*pickscore"):
        metrics.load_scorer("pikscore")


def test_a_metric_without_weights_has_no_options() -> None:
    with pytest.raises(UserError, match="metric 'sharpness' has no options"):
        metrics.load_scorer("sharpness", {"radius": "2"})
