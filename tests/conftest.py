"""Fixtures of the whole suite; shapes in signatures of `stages.core` are checked while it runs."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A thread that waits lets others work: two test processes have two cores, and a training with two threads
# beside one busy process makes 0.2 to 2.2 steps a second without it, 3.4 to 3.9 with it.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Set before scipy is imported: with a second thread its L-BFGS takes 88 s beside a busy machine, not 8 s.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib import import_module

import jaxtyping
import pytest
import torch

from stages.core.execution.warm_server import CLASSES, IMPORTED

torch.set_num_threads(1)
# Before the hook: a library that a hooked module imports first is compiled as if it were hooked, too, and each time
# again where Python may not write bytecode: 34 CPU seconds to collect the tests, and 19 with this.
for name in IMPORTED:
    import_module(name)
for library, names in CLASSES.items():
    for name in names:
        getattr(import_module(library), name)
CHECKED = jaxtyping.install_import_hook("stages.core", "beartype.beartype")

from stages.core.artifacts.provenance import write_manifest
from stages.core.execution.locks import held
from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from tests.builders import settings
from tests.workflow.projects import Project

ROOT = Path(__file__).resolve().parents[1]

LONGEST = (
    "tests/cluster/test_slurm.py", "tests/chaos/test_chaos.py", "tests/workflow/test_rerun_table.py",
    "tests/security/test_whole_run.py", "tests/cluster/test_kubernetes.py",
    "tests/workflow/test_gates.py", "tests/workflow/test_families.py",
    "tests/workflow/test_evaluation.py", "tests/workflow/test_reruns.py",
    "tests/workflow/test_faults.py", "tests/stages/test_processes.py", "tests/workflow/",
    "tests/cluster/",
)  # fmt: skip
"""What begins first, so that no process is left alone with a whole run at the end."""
APART = ("tests/chaos/", "tests/cluster/", "tests/workflow/", "tests/stages/test_processes.py")
"""Files of long tests that share little: their tests may go to any process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-golden", action="store_true", help="score with published weights (docs/metrics.md)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-golden"):
        reason = "needs the published weights: --run-golden, docs/metrics.md"
        for item in items:
            if "golden" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
    leave_out_of_make_test(config, items)
    keep_files_together(items)
    items.sort(key=lambda item: next(
        (place for place, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST)
    ))  # fmt: skip


def pytest_collection_finish() -> None:
    """Keep what is imported and collected from the garbage collector: it would look at it all each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Give it back: what libraries look up in the collector at the end is there."""
    gc.unfreeze()


def keep_files_together(items: list[pytest.Item]) -> None:
    """Have one process run all tests of a file, which share what its fixtures make."""
    for item in items:
        file = item.nodeid.split("::")[0]
        if not file.startswith(APART) and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(file))


def leave_out_of_make_test(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark slow the cases of a test that its mark `quick` does not name.

    UsageError for a case that there is not, save where single tests are asked for.
    """
    named: dict[str, set[str]] = {}
    found: dict[str, set[str]] = {}
    for item in items:
        if (mark := item.get_closest_marker("quick")) and isinstance(item, pytest.Function):
            test, case = item.nodeid.split("[")[0], item.callspec.id
            named[test] = {*mark.args}
            found.setdefault(test, set()).add(case)
            if case not in mark.args:
                item.add_marker(pytest.mark.slow)
    if any("::" in name for name in config.args):
        return
    for test, cases in named.items():
        if missing := cases - found[test]:
            raise pytest.UsageError(
                f"{test}: found no case {sorted(missing)}, expected some of {sorted(found[test])}"
            )


@pytest.fixture(scope="session")
def tiny_base() -> str:
    """The committed pipeline: 64 x 64 pictures, 8 x 8 latents, milliseconds a prediction."""
    return str(ROOT / "stages" / "shapes" / "pipeline")


@pytest.fixture(scope="session")
def model(tiny_base: str) -> DiffusionModel:
    """The adapter of the committed pipeline, on the CPU in float32."""
    return load_model(settings(tiny_base), device=torch.device("cpu"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The smallest DAG after an unbroken run. Tests that change something take a copy.

    One process makes the run, all others have copies of it; those of another pytest too if both are given a folder
    by SAIL_TEST_SHARED.
    """
    place = shared_folder(tmp_path_factory) / "finished"
    made = Project(place / "run")
    with held(place.with_suffix(".lock"), "the finished run"):
        if not (place / "done").exists():
            shutil.rmtree(place, ignore_errors=True)
            made.folder.mkdir(parents=True)
            made.make("--quiet", "all")
            (place / "done").touch()
    return made.copy(tmp_path_factory.mktemp("finished") / "run")


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of a session keep what one of them makes for all."""
    if "SAIL_TEST_SHARED" in os.environ:
        return Path(os.environ["SAIL_TEST_SHARED"])
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def base_denoiser(model: DiffusionModel) -> Denoiser:
    """The base's own denoiser, a fresh copy."""
    return model.load_denoiser()


@pytest.fixture
def other_denoiser(model: DiffusionModel) -> Denoiser:
    """A denoiser that predicts visibly, not wildly, differently from the base's."""
    return perturbed(model)


@pytest.fixture(scope="session")
def other_policy(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished policy folder that holds `other_denoiser`."""
    folder = tmp_path_factory.mktemp("policy") / "other"
    perturbed(model).save(folder, "unet")
    write_manifest(folder, stage="train_seed", arguments={}, inputs=[], facts={"num_steps": 1})
    return folder


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """For tests of our own messages about shapes, which the checks would come before."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A stage sets the number of threads for its whole process; give the next test one."""
    yield
    torch.set_num_threads(1)


def perturbed(model: DiffusionModel) -> Denoiser:
    denoiser, rng = model.load_denoiser(), generator(7)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.02 * weight.std(correction=0) * torch.randn(weight.shape, generator=rng))
    return denoiser
