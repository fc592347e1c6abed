"""A stage's code version changes with what its code does, and with nothing else."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
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

ROOT = Path(__file__).resolve().parents[2]
EVERY_SYNTAX = Path(__file__).with_name("every_syntax.txt")
EVERY_DIGEST = "56316db8d71308797d49a4e2160aa44970a2252a03d289ba3663a00d035ee60c"
"""Of every_syntax.txt. Another one means that all digests have changed: all results of users rerun."""
READ_TWO = """if True:
    import ast, hashlib, sys
    root, text, stage = sys.argv[1:]
    sys.path.insert(0, root)
    from stages.core.artifacts.fingerprint import canonical, code_version
    with open(text, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    print(hashlib.sha256(canonical(tree).encode()).hexdigest(), code_version(stage))
"""

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
        fingerprint.code_version,
        fingerprint._tree,
        fingerprint._imports,
        fingerprint._module_digest,
        fingerprint._files_in,
    ):
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


def test_how_a_stage_runs_is_no_part_of_the_code(package: Path) -> None:
    (package / "core" / "execution").mkdir()
    locks = package / "core" / "execution" / "locks.py"
    locks.write_text(SEED)
    (package / "core" / "executions.py").write_text(SEED)
    before = version_after(
        package / "go.py",
        "from stages.core.execution import locks\nfrom stages.core.executions import seed\n"
        + STAGE,
    )
    assert version_after(locks, "from stages.core.other import of\n" + SEED) == before
    assert version_after(package / "core" / "other.py", SEED) == before
    assert version_after(package / "core" / "executions.py", LOSS) != before


@pytest.mark.parametrize(
    "stage",
    [
        "sample_candidates",
        "score_candidates",
        "generate_evaluation",
        "score_holdout",
        "export_policy",
        "adopt_policy",
    ],
)
def test_a_stage_that_only_loads_a_policy_has_no_training_in_its_version(stage: str) -> None:
    found = fingerprint._closure(f"stages.{stage}")
    assert "stages.core.artifacts.provenance" in found
    assert not [name for name in found if name.startswith("stages.core.training")]
    assert not [name for name in found if name.startswith("stages.core.execution")]


def interpreter(version: str) -> str | None:
    """A Python of a version that is at hand, on the path or among pyenv's."""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    for path in (sys.executable, shutil.which(f"python{version}"), *map(str, pyenv)):
        code = "import sys; print(*sys.version_info[:2], sep='.')"
        if path is None:
            continue
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return path
    return None


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_python_gives_the_same_version_and_needs_no_package_for_it(version: str) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not at hand")
    stage = "stages.update_policy"
    done = subprocess.run(
        [python, "-I", "-S", "-B", "-c", READ_TWO, str(ROOT), str(EVERY_SYNTAX), stage],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [EVERY_DIGEST, fingerprint.code_version(stage)]


def test_the_text_with_every_syntax_has_it_all() -> None:
    tree = ast.parse(EVERY_SYNTAX.read_text(encoding="utf-8"))
    found = {type(node) for node in ast.walk(tree)}
    abstract_or_old = {
        "Expression",
        "FunctionType",
        "Interactive",
        "Suite",
        "TypeIgnore",  # of other modes
        "AugLoad",
        "AugStore",
        "Param",
        "Bytes",
        "Ellipsis",
        "ExtSlice",
        "Index",
        "NameConstant",
        "Num",
        "Str",
        "_ast_Ellipsis",  # of old versions
        "ParamSpec",
        "TypeAlias",
        "TypeVar",
        "TypeVarTuple",  # of versions after 3.11
    }
    missing = {
        name
        for name, kind in vars(ast).items()
        if isinstance(kind, type)
        and issubclass(kind, ast.AST)
        and not kind.__subclasses__()
        and kind not in found
    }
    assert missing <= abstract_or_old


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("x = 'ab'", "x = 'a' 'b'  # a remark"),
        ("f'a{x:>{y}}b'", "(f'a{x:>{y}}' '' 'b')"),
        ("def f():\n    'Docstring.'\n    return 1", "def f(): return (1)"),
        ("x = 0x10", "x = 16"),
    ],
)
def test_what_is_written_otherwise_and_does_the_same_has_one_text(text: str, same: str) -> None:
    assert fingerprint.canonical(ast.parse(text)) == fingerprint.canonical(ast.parse(same))


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("x = None", "x = ..."),
        ("x = 1", "x = 1.0"),
        ("x = '1'", "x = 1"),
        ("x = 1", "x = True"),
        ("x = 'a'", "x = b'a'"),
        ("{**a}", "{None: a}"),
        ("f'{a}{b}'", "f'{a} {b}'"),
        ("f'{a!r}'", "f'{a!s}'"),
        ("def f(a, /): g()", "def f(a): g()"),
        ("def f(*, a, b=1): g()", "def f(*, a=1, b): g()"),
        ("try: f()\nexcept E: g()", "try: f()\nexcept* E: g()"),
        ("async def f(): g()", "def f(): g()"),
        ("match x:\n case None: f()", "match x:\n case True: f()"),
        ("match x:\n case _: f()", "match x:\n case y: f()"),
    ],
)
def test_what_does_something_else_has_another_text(text: str, other: str) -> None:
    assert fingerprint.canonical(ast.parse(text)) != fingerprint.canonical(ast.parse(other))
