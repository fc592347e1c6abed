"""What the doctor looks at: each kind of trouble is found, and nothing where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.core.artifacts.provenance import write_manifest
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import write_table
from stages.core.execution.locks import try_lock
from stages.core.execution.snakemake_lock import lock_of_this_host
from stages.core.execution.stopping import SNAKEMAKE
from stages.core.health import files, installation, jobs
from stages.core.health.findings import Finding

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt_id": "a", "prompt": "a cat"}]


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def table(path: Path, *inputs: Path) -> Path:
    write_table(path, ROWS, PROMPTS, stage="select_prompts", arguments={}, inputs=inputs)
    return path


def test_a_whole_table_in_step_with_its_inputs_has_no_findings(tmp_path: Path) -> None:
    source = tmp_path / "pool.txt"
    source.write_text("a cat\n")
    path = table(tmp_path / "prompts.parquet", source)
    assert levels(files.check_artifact(path, tmp_path)) == []
    source.write_text("a dog\n")
    [finding] = files.check_artifact(path, tmp_path)
    assert finding.level == "problem"
    assert f"was made from another {source}" in finding.what
    assert finding.remedy == f"rm {path}"


@pytest.mark.parametrize("at", [0.3, 0.5, 0.9])
def test_a_table_with_damaged_bytes_is_found(tmp_path: Path, at: float) -> None:
    rows = [{"prompt_id": f"{i:064x}", "prompt": f"a cat number {i * 7919}"} for i in range(500)]
    path = tmp_path / "prompts.parquet"
    write_table(path, rows, PROMPTS, stage="select_prompts", arguments={}, inputs=[])
    data = bytearray(path.read_bytes())
    start = int(at * len(data))
    for place in range(start, start + 64):
        data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    [finding] = files.check_artifact(path, tmp_path)
    assert finding.level == "problem"
    assert f"{path} is damaged" in finding.what


def test_a_policy_with_other_weights_than_listed_is_found(tmp_path: Path) -> None:
    weights = tmp_path / "policy" / "unet" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    path = write_manifest(
        tmp_path / "policy", stage="train_seed", arguments={}, inputs=[], facts={}
    )
    assert levels(files.check_artifact(path, tmp_path)) == []
    weights.write_bytes(b"Weights")
    [finding] = files.check_artifact(path, tmp_path)
    assert "weights.safetensors is missing or is not what manifest.json lists" in finding.what


def test_unfinished_policies_and_what_a_killed_process_left_are_noted(tmp_path: Path) -> None:
    (tmp_path / "iter01" / "policy" / "unet").mkdir(parents=True)
    assert levels(files.check_policies(tmp_path)) == ["note"]
    (tmp_path / "iter01" / "policy" / "manifest.json").write_text("{}")
    assert levels(files.check_policies(tmp_path)) == []
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".prompts.parquet.{gone.pid}.part"
    left.touch()
    [finding] = files.check_leftovers(tmp_path)
    assert finding.remedy == f"rm {left}"


def test_low_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(files.check_disk(tmp_path)) == ["ok"]
    monkeypatch.setattr(files, "LOW_DISK", 1e18)
    assert levels(files.check_disk(tmp_path)) == ["problem"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "-m", "stages.train_seed", "--seed", "0"], "train_seed"),
        (["/env/bin/python", "-u", "-m", "stages.shapes.split_captions"], "shapes.split_captions"),
        (["python", "-m", "stages.launch", "4", "stages.train_seed", "--seed", "0"], "train_seed"),
        (["python", "-m", "pytest", "stages.train_seed"], None),
        (["bash", "-c", "python -m stages.train_seed"], None),
    ],
)
def test_a_stage_is_known_by_its_command_line(words: list[str], expected: str | None) -> None:
    assert jobs.stage_name(words) == expected


def test_a_lock_is_shown_with_its_holder_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "0.lock"
    hold = (
        "import sys, time; from pathlib import Path; from stages.core.execution.locks import try_lock\n"
        "file = try_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    [finding] = jobs.check_locks([path], "GPU")
    assert f"GPU 0 is held by process {holder.pid}" in finding.what
    holder.kill()
    holder.communicate()
    assert list(jobs.check_locks([path], "GPU")) == []
    assert path.read_text() == f"{holder.pid}\n"
    file = try_lock(path)  # looking has not locked it
    assert file is not None
    file.close()


def test_a_lock_of_a_snakemake_that_is_gone_is_a_problem(tmp_path: Path) -> None:
    assert list(jobs.check_snakemake_lock(tmp_path)) == []
    lock = tmp_path / ".snakemake" / "locks" / "0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    [finding] = jobs.check_snakemake_lock(tmp_path)
    assert (finding.level, finding.remedy) == ("problem", "snakemake --unlock")
    mine = lock_of_this_host(tmp_path)
    mine.parent.mkdir()
    mine.touch()
    [finding] = jobs.check_snakemake_lock(tmp_path)
    assert (finding.level, finding.remedy) == ("note", "snakemake --cores all")


def test_a_stage_whose_snakemake_is_gone_is_noted_and_one_that_a_person_started_left_alone(
    tmp_path: Path,
) -> None:
    package = tmp_path / "stages"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sleep.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    for started_by, remedy in ((None, ""), ("1", "kill {}")):
        environment = {key: value for key, value in os.environ.items() if key != SNAKEMAKE}
        environment |= {SNAKEMAKE: started_by} if started_by else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.sleep"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1)
        [finding] = jobs.check_stages(tmp_path)
        assert finding.remedy == remedy.format(process.pid)
        assert f"process {process.pid} runs sleep" in finding.what
        assert ("started by a person" in finding.what) == (started_by is None)
        assert list(jobs.check_stages(tmp_path / "stages")) == []
        process.kill()
        process.communicate()


def test_packages_are_held_against_their_pins(tmp_path: Path) -> None:
    assert levels(installation.check_packages("sail-diffusion")) == ["ok"]
    info = tmp_path / "odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: odd\nVersion: 1.0\nRequires-Dist: numpy>=99\n"
        "Requires-Dist: no-such-package\nRequires-Dist: pytest; extra == 'test'\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        found = [finding.what for finding in installation.check_packages("odd")]
    finally:
        sys.path.remove(str(tmp_path))
    assert len(found) == 2
    assert "expected >=99" in found[0]
    assert "no-such-package is not installed" in found[1]


def test_a_missing_distribution_is_a_problem() -> None:
    [finding] = installation.check_packages("sail-nowhere")
    assert finding.level == "problem"
