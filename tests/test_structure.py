"""The import arrows: stages -> core, never between stages, never out of core."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted(p.stem for p in (ROOT / "stages").glob("*.py") if p.stem != "__init__")
CORE = sorted((ROOT / "stages" / "core").glob("*.py"))
EVERYTHING = sorted((ROOT / "stages").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_there_are_stages_and_core_modules_to_check() -> None:
    assert len(STAGES) > 10
    assert len(CORE) > 10


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    found = {tuple(name.split(".")[:2]) for name in imports(ROOT / "stages" / f"{stage}.py")}
    assert not found & {("stages", other) for other in STAGES}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_imports_only_core_of_ours_and_neither_snakemake_nor_a_command_line(
    path: Path,
) -> None:
    for name in imports(path):
        assert not name.startswith("stages.") or name.startswith("stages.core."), name
        assert name.split(".")[0] not in ("snakemake", "tyro", "argparse", "click"), name


@pytest.mark.parametrize("folder", ["shapes", "metrics"])
def test_worlds_and_metrics_import_no_stage(folder: str) -> None:
    for path in (ROOT / "stages" / folder).glob("*.py"):
        found = {tuple(name.split(".")[:2]) for name in imports(path)}
        assert not found & {("stages", other) for other in STAGES}, path


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_args_main_and_nothing_that_runs_at_import(stage: str) -> None:
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text(encoding="utf-8"))
    names = {getattr(node, "name", None) for node in tree.body}
    assert {"Args", "main"} <= names
    assert ast.get_docstring(tree)
    allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, allowed) or is_text or is_guard, ast.unparse(node)


def test_no_module_is_called_utils_helpers_or_misc() -> None:
    assert not {path.stem for path in EVERYTHING} & {"utils", "helpers", "misc", "common"}
