"""How a stage starts: it looks for no garbage in what it imports, and imports no network that it has no use for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    path
    for path in (ROOT / "stages").rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
    and not path.stem.startswith("warm_")  # the one imports little, the other collects never
)
WITHOUT_TORCH = (
    "check_collapse", "check_leakage", "compare", "doctor", "export_preferences", "import_preferences",
    "inspect", "status", "measure_diversity", "mix_preferences", "write_report", "score_metric", "select_evaluation_prompts",
    "record_experiment", "select_pairs", "select_prompts", "start_iteration", "summarise_evaluation",
    "summarise_guards", "summarise_laboratory", "write_model_cards", "label",
)  # fmt: skip

AT_EXIT = """
import atexit, gc

@atexit.register
def tell():
    print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""


def python(*words: str, beside: Path | None = None) -> str:
    """What a Python of its own prints, however it ends; modules in `beside` come first."""
    path = os.pathsep.join(str(folder) for folder in (beside, ROOT) if folder is not None)
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_collects_garbage_once_all_is_imported(path: Path) -> None:
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    calls = [node.func for node in ast.walk(last) if isinstance(node, ast.Call)]
    assert {"run_stage", "collect_garbage"} & {ast.unparse(call) for call in calls}


def test_a_started_stage_works_with_a_collector_that_spares_what_was_imported(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    flags = ("--gate", "none", "--policies", "none", "--output", str(tmp_path / "start"))
    assert python("-m", "stages.start_iteration", "--help", beside=tmp_path).endswith("False False")
    assert python("-m", "stages.start_iteration", *flags, beside=tmp_path) == "True True"


def test_a_program_that_only_imports_stages_keeps_its_collector(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import gc, stages.select_pairs; print(gc.isenabled())")
    assert python("-m", "program", beside=tmp_path) == "True"
    assert python("-c", "import gc, stages.select_pairs; print(gc.isenabled())") == "True"


def test_stages_without_a_network_do_not_import_torch() -> None:
    names = ", ".join(f"stages.{name}" for name in WITHOUT_TORCH)
    assert python("-c", f"import sys, {names}; print('torch' in sys.modules)") == "False"
