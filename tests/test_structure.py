"""The import arrows: stages -> core, never between stages, never out of core, one way between its rooms."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NO_STAGES = {"__init__", "launch", "profile"}  # these start a stage and are none
STAGES = sorted({p.stem for p in (ROOT / "stages").glob("*.py")} - NO_STAGES)
LIBRARY = ROOT / "stages" / "core"
CORE = sorted(LIBRARY.rglob("*.py"))
EVERYTHING = sorted((ROOT / "stages").rglob("*.py"))

ROOMS: dict[str, set[str]] = {
    "execution": set(),
    "models": set(),
    "plan": {"data", "method"},
    "artifacts": {"execution"},
    "method": {"models"},
    "data": {"artifacts", "execution"},
    "evaluation": {"artifacts"},
    "health": {"artifacts", "execution"},
    "inspection": {"artifacts", "data", "evaluation"},
    "progress": {"execution"},
    "policies": {"artifacts", "execution", "method", "models"},
    "training": {"artifacts", "execution", "method", "models", "policies"},
    "report": {"artifacts", "evaluation"},
    "pages": {"execution"},
    "laboratory": {"artifacts", "evaluation", "method", "plan"},
    "audit": {"artifacts", "evaluation", "pages"},
    "export": {"artifacts", "execution", "models"},
    "labelling": {
        "artifacts",
        "data",
        "evaluation",
        "execution",
        "models",
        "pages",
        "policies",
    },
    "preflight": {
        "artifacts",
        "data",
        "evaluation",
        "execution",
        "method",
        "models",
        "plan",
        "policies",
        "training",
    },
}
"""The folders of stages/core, and the rooms that each may import. All may import errors.py."""
SHARED = "errors"
"""The one module of stages/core that lies in no room."""
FILES_AND_IMAGES = {"pathlib", "pyarrow", "PIL"}
"""What the method does without."""

Graph = Mapping[str, set[str]]


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


def core_modules(core: Path) -> dict[str, Path]:
    """The modules under a folder that stands for stages/core, by their dotted names in it."""
    found = {}
    for path in sorted(core.rglob("*.py")):
        parts = path.relative_to(core).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def core_imports(core: Path) -> dict[str, set[str]]:
    """The modules of core that each of its modules imports."""
    modules = core_modules(core)
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for name in imports(path):
            if f"{name}.".startswith("stages.core."):
                parts = name.split(".")[2:]
                ends = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
                found[module].add(next((end for end in ends if end in modules), ".".join(parts)))
    return found


def room(module: str) -> str:
    """The room of a module, by its dotted name in core."""
    return module.split(".")[0]


def rooms_of(graph: Graph) -> dict[str, set[str]]:
    """Which rooms each room imports, other than itself and what all share."""
    found: dict[str, set[str]] = {}
    for module, imported in graph.items():
        others = {room(name) for name in imported} - {room(module), SHARED}
        found.setdefault(room(module), set()).update(others)
    return found


def against_the_arrows(core: Path) -> list[str]:
    """Imports that the table of rooms does not allow, and folders and modules that it does not know."""
    found = []
    folders = {path.name for path in core.iterdir() if any(path.glob("*.py"))}
    found += [f"{name}/ is in no row of the table" for name in sorted(folders - set(ROOMS))]
    found += [f"there is no folder {name}/" for name in sorted(set(ROOMS) - folders)]
    for module, imported in core_imports(core).items():
        if room(module) not in {*ROOMS, SHARED, ""}:
            found.append(f"{module} lies in no room")
        allowed = {*ROOMS.get(room(module), set()), room(module), SHARED}
        found += [
            f"{module} imports {name or 'all of core'}"
            for name in sorted(imported)
            if room(name) not in allowed
        ]
    return found


def circle(graph: Graph) -> list[str]:
    """Names that import each other in a circle; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def readers_of_files(core: Path) -> list[str]:
    """Modules of the method that import what reads files and images."""
    return [
        f"{path.stem} imports {name}"
        for path in sorted((core / "method").rglob("*.py"))
        for name in sorted(imports(path))
        if name.split(".")[0] in FILES_AND_IMAGES
    ]


def test_there_are_stages_and_core_modules_to_check() -> None:
    assert len(STAGES) > 10
    assert len(CORE) > 60


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    found = {tuple(name.split(".")[:2]) for name in imports(ROOT / "stages" / f"{stage}.py")}
    assert not found & {("stages", other) for other in STAGES}


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_core_imports_only_core_of_ours_and_neither_snakemake_nor_a_command_line(
    path: Path,
) -> None:
    for name in imports(path):
        assert not name.startswith("stages.") or name.startswith("stages.core."), name
        assert name.split(".")[0] not in ("snakemake", "tyro", "argparse", "click"), name


def test_the_rooms_of_core_import_along_the_arrows_and_the_method_reads_no_file() -> None:
    assert against_the_arrows(LIBRARY) == []
    assert readers_of_files(LIBRARY) == []


def test_nothing_in_core_is_imported_in_a_circle() -> None:
    assert circle(ROOMS) == []
    graph = core_imports(LIBRARY)
    assert circle(graph) == []
    assert circle(rooms_of(graph)) == []


@pytest.mark.parametrize("path", [p for p in CORE if p.name == "__init__.py"], ids=str)
def test_a_room_itself_is_a_docstring_so_that_importing_one_module_imports_no_other(
    path: Path,
) -> None:
    [only] = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of stages/core to plant imports in."""
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(LIBRARY, tmp_path / "core", ignore=ignore))


def plant(core: Path, module: str, line: str) -> None:
    with (core / module).open("a", encoding="utf-8") as file:
        file.write(f"\n\ndef planted() -> None:\n    {line}\n")


@pytest.mark.parametrize(
    ("module", "line", "refused"),
    [
        ("execution/disk.py", "from stages.core.artifacts.files import replacing",
         "execution.disk imports artifacts.files"),
        ("method/seeding.py", "from stages.core.policies import loading",
         "method.seeding imports policies.loading"),
        ("data/layouts/rows.py", "import stages.core.report.page",
         "data.layouts.rows imports report.page"),
        ("plan/flags.py", "from stages import core", "plan.flags imports all of core"),
        ("errors.py", "from stages.core.plan.flags import flags", "errors imports plan.flags"),
    ],
)  # fmt: skip
def test_a_planted_import_against_the_arrows_is_refused(
    copied: Path, module: str, line: str, refused: str
) -> None:
    assert against_the_arrows(copied) == []
    plant(copied, module, line)
    assert against_the_arrows(copied) == [refused]


def test_a_planted_folder_or_module_that_no_row_knows_is_refused(copied: Path) -> None:
    (copied / "attic").mkdir()
    (copied / "attic" / "__init__.py").touch()
    (copied / "loose.py").touch()
    assert against_the_arrows(copied) == [
        "attic/ is in no row of the table", "attic lies in no room", "loose lies in no room",
    ]  # fmt: skip
    shutil.rmtree(copied / "health")
    assert "there is no folder health/" in against_the_arrows(copied)


@pytest.mark.parametrize("line", ["import pathlib", "from PIL import Image", "import pyarrow.ipc"])
def test_a_planted_reader_of_files_in_the_method_is_refused(copied: Path, line: str) -> None:
    plant(copied, "method/rewards.py", line)
    [refused] = readers_of_files(copied)
    assert refused.startswith("rewards imports ")


def test_a_planted_circle_is_refused_in_a_room_and_between_rooms(copied: Path) -> None:
    plant(copied, "method/noising.py", "from stages.core.method.sampling import sample_latents")
    assert against_the_arrows(copied) == []
    assert set(circle(core_imports(copied))) == {"method.noising", "method.sampling"}
    assert circle(rooms_of(core_imports(copied))) == []
    plant(copied, "models/loading.py", "from stages.core.method.mixing import num_human_pairs")
    assert set(circle(rooms_of(core_imports(copied)))) == {"method", "models"}


def test_the_pages_and_the_rooms_own_words_say_the_same_arrows() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \| .* \| (.*) \|$", page, flags=re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows} == ROOMS
    for name, allowed in ROOMS.items():
        said = ast.get_docstring(ast.parse((LIBRARY / name / "__init__.py").read_text()))
        assert set(re.findall(r"`(\w+)`", said or "")) == allowed, name


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
             "minLength", "minProperties", "maxItems"}  # fmt: skip

    def check(properties: dict[str, dict[str, object]], where: str) -> None:
        for key, node in properties.items():
            assert set(node) <= known, f"{where}.{key}: {set(node) - known}"
            inner = node.get("properties")
            assert "description" in node or isinstance(inner, dict), f"{where}.{key}"
            if isinstance(inner, dict):
                check(inner, f"{where}.{key}")

    check(schema["properties"], "")
    check(schema["$defs"]["training"]["properties"], "training")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_the_processes_of_pytest_heed_which_tests_belong_together(
    request: pytest.FixtureRequest,
) -> None:
    """A pytest that pytest-xdist does not know yet sends the tests of a file anywhere, and says nothing."""
    assert request.node.nodeid.endswith("@tests/test_structure.py")


def test_every_step_that_preflight_tries_attends_as_a_training_does() -> None:
    found = 0
    for path in sorted((LIBRARY / "preflight").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and ".backward()" in ast.unparse(node):
                decorators = [ast.unparse(each) for each in node.decorator_list]
                assert decorators == ["without_cudnn_attention()"], f"{path.name}: {node.name}"
                found += 1
    assert found == 4
