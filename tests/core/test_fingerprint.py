"""A stage's code version changes with what its code does, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.core.artifacts import fingerprint

STAGE = '''"""A stage."""
from stages.core import loss
from stages.core.noise import draw

def main(x):
    """Do it."""
    return loss.of(draw(x))  # both
'''
LOSS = "def of(x):\n    return 2 * x\n"
NOISE = "from stages.core.seed import seed\ndef draw(x):\n    return x + seed(x)\n"
SEED = "def seed(x):\n    return 7\n"

Version = Callable[[], str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small project of one stage that imports three modules, one of them indirectly."""
    core = tmp_path / "stages" / "core"
    core.mkdir(parents=True)
    (tmp_path / "stages" / "go.py").write_text(STAGE)
    for name, text in (("loss", LOSS), ("noise", NOISE), ("seed", SEED), ("other", LOSS)):
        (core / f"{name}.py").write_text(text)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    forget()
    yield tmp_path / "stages"
    forget()


def forget() -> None:
    for cached in (
        fingerprint.code_version, fingerprint._tree, fingerprint._imports, fingerprint._module_digest,
        fingerprint._files_in,
    ):  # fmt: skip
        cached.cache_clear()


def version_after(path: Path, text: str) -> str:
    path.write_text(text)
    forget()
    return fingerprint.code_version("stages.go")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("go.py", STAGE.replace("# both", "# loss of a draw")),
        ("go.py", STAGE.replace("Do it.", "Do it well.").replace("A stage.", "Another text.")),
        ("go.py", STAGE.replace('    """Do it."""\n', "\n\n")),
        ("core/loss.py", "# new\ndef of(x):\n    return (2 *\n        x)\n"),
        ("core/other.py", "def of(x):\n    return 3 * x\n"),
    ],
)
def test_comments_docstrings_layout_and_unused_modules_leave_the_version(
    package: Path, name: str, text: str
) -> None:
    before = fingerprint.code_version("stages.go")
    assert (package / name).read_text() != text
    assert version_after(package / name, text) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("go.py", STAGE.replace("draw(x)", "draw(-x)")),
        ("core/loss.py", LOSS.replace("2", "3")),
        ("core/noise.py", NOISE.replace("+", "-")),
        ("core/seed.py", SEED.replace("7", "8")),
        ("core/seed.py", SEED.replace("seed(x)", "seed(x=1)")),
    ],
)
def test_an_edit_of_logic_changes_the_version_directly_or_through_imports(
    package: Path, name: str, text: str
) -> None:
    before = fingerprint.code_version("stages.go")
    assert version_after(package / name, text) != before


def test_a_file_beside_a_module_that_names_it_is_part_of_the_code(package: Path) -> None:
    (package / "core" / "page.jinja").write_text("<p>")
    (package / "core" / "other.jinja").write_text("<p>")
    loss = package / "core" / "loss.py"
    before = version_after(loss, 'PAGE = "page.jinja"\n' + LOSS)
    (package / "core" / "other.jinja").write_text("<b>")
    forget()
    assert fingerprint.code_version("stages.go") == before
    (package / "core" / "page.jinja").write_text("<b>")
    forget()
    assert fingerprint.code_version("stages.go") != before


def test_the_version_is_12_hex_digits_and_two_stages_differ() -> None:
    found = fingerprint.code_version("stages.select_pairs")
    assert len(found) == 12
    assert int(found, 16) >= 0
    assert found != fingerprint.code_version("stages.score_candidates")
