"""Kept code digests are those of the code as it is, whatever lies in their place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.core.artifacts import fingerprint, kept_versions
from stages.core.artifacts.kept_versions import kept_file, kept_version
from tests.core.test_fingerprint import LOSS, forget, package

__all__ = ["package"]

MODULE = "stages.go"


@pytest.fixture(autouse=True)
def place(package: Path) -> Iterator[Path]:
    """A project of which nothing is known yet."""
    forget_all()
    yield package
    forget_all()


def forget_all() -> None:
    """As a new process."""
    forget()
    kept_versions._source.cache_clear()
    kept_versions._read.cache_clear()


def in_a_new_process() -> str:
    forget_all()
    return kept_version(MODULE)


def test_it_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept_version(MODULE)
    assert first == fingerprint.code_version(MODULE)
    forget_all()
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "code_version", None)
        assert kept_version(MODULE) == first


@pytest.mark.parametrize("name", ["core/loss.py", "core/seed.py", "go.py"])
def test_an_edit_is_seen_though_size_and_time_are_as_before(place: Path, name: str) -> None:
    path = place / name
    before, state = kept_version(MODULE), path.stat()
    path.write_text(path.read_text().replace("x", "y"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    after = in_a_new_process()
    assert after != before
    forget()
    assert after == fingerprint.code_version(MODULE)


def test_what_is_edited_while_it_is_worked_out_is_not_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = fingerprint.code_version, (place / "go.py").read_text()

    def edited_meanwhile(module: str) -> str:
        (place / "go.py").write_text(before.replace("draw(x)", "draw(-x)"))
        return real(module)

    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "code_version", edited_meanwhile)
        edited = kept_version(MODULE)
    assert not kept_file().exists()
    (place / "go.py").write_text(before)
    assert in_a_new_process() != edited


def test_a_file_beside_a_module_is_seen(place: Path) -> None:
    (place / "core/loss.py").write_text('PAGE = "page.jinja"\n' + LOSS)
    (place / "core/page.jinja").write_text("<p>")
    before = in_a_new_process()
    (place / "core/page.jinja").write_text("<b>")
    assert in_a_new_process() != before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"source": 1}', '{"versions": {}}'])
def test_anything_else_in_its_place_is_written_over(text: str) -> None:
    expected = fingerprint.code_version(MODULE)
    kept_file().parent.mkdir()
    kept_file().write_text(text)
    assert in_a_new_process() == expected
    assert json.loads(kept_file().read_text())["versions"] == {MODULE: expected}


def test_where_nothing_can_be_kept_it_is_worked_out_each_time(place: Path) -> None:
    (place / "__pycache__").touch()
    expected = fingerprint.code_version(MODULE)
    assert in_a_new_process() == in_a_new_process() == expected
