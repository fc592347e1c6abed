"""The import arrows: stages -> core, never between stages, never out of core."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NO_STAGES = {"__init__", "launch"}  # the launcher starts a stage and is none
STAGES = sorted({p.stem for p in (ROOT / "stages").glob("*.py")} - NO_STAGES)
CORE = sorted((ROOT / "stages" / "core").rglob("*.py"))
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


def test_the_configs_page_is_in_step_with_schema_and_config() -> None:
    done = subprocess.run([sys.executable, "config/describe.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python config/describe.py"


def test_the_stages_page_lists_every_stage() -> None:
    page = (ROOT / "stages" / "README.md").read_text(encoding="utf-8")
    shapes = {
        p.stem for p in (ROOT / "stages/shapes").glob("*.py") if "run_stage(" in p.read_text()
    }
    for stage in (*STAGES, *(f"shapes.{name}" for name in shapes)):
        assert f"| `{stage}` |" in page, stage


def test_every_key_of_the_schema_is_described_and_nothing_else_slipped_in() -> None:
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    known = {"type", "enum", "default", "description", "items", "properties", "required", "allOf",
             "additionalProperties", "unevaluatedProperties", "propertyNames", "pattern", "minimum",
             "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "uniqueItems",
             "minLength", "minProperties"}  # fmt: skip

    def check(properties: dict[str, dict[str, object]], where: str) -> None:
        for key, node in properties.items():
            assert set(node) <= known, f"{where}.{key}: {set(node) - known}"
            inner = node.get("properties")
            assert "description" in node or isinstance(inner, dict), f"{where}.{key}"
            if isinstance(inner, dict):
                check(inner, f"{where}.{key}")

    check(schema["properties"], "")
    check(schema["$defs"]["training"]["properties"], "training")
