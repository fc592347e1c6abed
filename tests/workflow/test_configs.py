"""Every config can be planned; a wrong one is refused before anything runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stages.core.plan.configuration import read_config
from tests.workflow.dry_run import overlaid, plan
from tests.workflow.projects import CONFIG, ROOT, RUN, Project, environment
from tests.workflow.warm import warm_python


def slow(*cases: tuple[Any, ...]) -> list[Any]:
    """More of the same: each is a Snakemake, of 1 to 3 CPU seconds."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@cache
def planned_by(name: str) -> dict[str, int]:
    """The jobs that a config of the folder plans; each is planned once."""
    return plan([ROOT / "config" / f"{name}.yaml"])


@pytest.mark.xdist_group("configs")  # one process plans them all
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=() if path.stem in ("config", "sd15") else pytest.mark.slow)
        for path in sorted((ROOT / "config").glob("*.yaml"))
    ],
)
def test_every_config_plans_jobs(name: str) -> None:
    """As every overlay does: .ci/run plans them all."""
    planned = planned_by(name)
    assert planned["score_holdout"] >= 1
    assert planned["write_report"] == 1


def test_the_example_for_pairs_of_ones_own_plans_a_run_on_its_own_files(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8")
    example = re.search(r"^    # studio[.]yaml\n((?:    .*\n)+)", page, flags=re.MULTILINE)
    assert example
    studio = tmp_path / "studio.yaml"
    studio.write_text(textwrap.dedent(example[1]))
    below = [ROOT / "config" / "sd15.yaml", ROOT / "config" / "overlays" / "small-data.yaml"]
    planned = plan([*below, studio])
    assert planned["select_evaluation_prompts"] == 1
    assert planned["sample_candidates"] == 3 * 4
    assert planned["score_metric"] == 5 * 2  # the base and four policies, by two metrics
    config = read_config(*below, studio)
    assert config["run"] == "studio"
    assert config["lora"]["rank"] > 0
    assert config["evaluation"]["prompt_layouts"] == {}


@pytest.mark.slow
@pytest.mark.xdist_group("configs")
def test_the_papers_settings_plan_the_papers_run() -> None:
    sd15, sdxl = planned_by("sd15"), planned_by("sdxl")
    assert (sd15["update_policy"], sdxl["update_policy"]) == (3, 2)  # Sec. 5.1
    assert sd15["sample_candidates"] == sd15["score_candidates"] == 3 * 32
    large = planned_by("sd15-large-seed")
    assert large["adopt_policy"] == 1
    assert "train_seed" not in large
    assert large["update_policy"] == 2  # Sec. 5.3
    baseline = plan(overlaid(ROOT / "config/overlays/mapo.yaml"))
    assert baseline["train_seed"] == 1
    assert "sample_candidates" not in baseline


def test_the_default_config_plans_three_iterations(tmp_path: Path) -> None:
    planned = Project(tmp_path).planned(
        config={"iterations": 3, "prompts": {"per_iteration": [4, 4, 4]}}
    )
    assert planned["update_policy"] == planned["select_pairs"] == planned["mix_preferences"] == 3
    assert planned["sample_candidates"] == planned["score_candidates"] == 3 * 2
    assert planned["generate_evaluation"] == 5
    assert planned["train_seed"] == planned["write_report"] == 1


@pytest.mark.parametrize(
    ("target", "absent"),
    [
        ("datasets", {"generate_evaluation", "write_report"}),
        *slow(
            ("seed", {"sample_candidates", "generate_evaluation", "write_report"}),
            ("evaluate", {"write_report"}),
            ("report", set()),
        ),
    ],
)
def test_named_targets_go_only_so_far(tmp_path: Path, target: str, absent: set[str]) -> None:
    planned = Project(tmp_path).planned("--", target)
    assert "train_seed" in planned
    assert not absent & set(planned)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sampling": {"guidence_scale": 3.0}}, ["'sampling.guidence_scale'", "'guidance_scale'"]),
        *slow(
            ({"iteratons": 3}, ["'iteratons'", "'iterations'"]),
            ({"sample_candidates": {"shards": "two"}}, ["'sample_candidates.shards'", "integer"]),
            ({"iterations": 3}, ["'prompts.per_iteration' lists 2 sizes", "'iterations' is 3"]),
        ),
    ],
)
def test_a_wrong_config_is_refused_by_key(
    tmp_path: Path, config: dict[str, Any], expected: list[str]
) -> None:
    done = Project(tmp_path).call("--quiet", "rules", config=config)
    assert done.returncode != 0
    for text in expected:
        assert text in done.stdout, done.stdout
    assert not (tmp_path / "results").exists()


def test_fewer_gpus_than_a_training_takes_are_refused_and_not_clipped(tmp_path: Path) -> None:
    config = {"execution": {"training_gpus": 2}}
    flags = ("--dry-run", "--quiet", "rules", "--resources")
    refused = Project(tmp_path).call(*flags, "gpu=1", config=config)
    assert refused.returncode != 0
    assert "execution.training_gpus = 2 GPUs, but --resources gpu=1" in refused.stdout
    assert Project(tmp_path).call(*flags, "gpu=2", config=config).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch sees a GPU")
def test_gpus_that_torch_does_not_see_are_refused_before_the_first_job(tmp_path: Path) -> None:
    target = ("--resources", "gpu=8", "--", f"results/{RUN}/world/pool.txt")
    refused = Project(tmp_path).call(*target)
    assert refused.returncode != 0
    assert "--resources gpu=8, but torch" in refused.stdout
    assert "sees no GPU here" in refused.stdout
    assert "execution.allow_cpu" in refused.stdout
    assert not (tmp_path / "results").exists()
    Project(tmp_path).make(*target, config={"execution": {"allow_cpu": True}})


@pytest.mark.slow
def test_a_runs_name_with_other_data_is_told_before_it_is_made_anew(tmp_path: Path) -> None:
    project, target = Project(tmp_path), ("--", f"results/{RUN}/world/pool.txt")
    project.make(*target)
    assert "other data" not in project.call("--dry-run", *target).stdout
    base = tmp_path / "base"
    shutil.copytree(ROOT / "stages/shapes/pipeline", base)
    done = project.call("--dry-run", *target, config={"model": {"base": str(base)}})
    assert f"The run '{RUN}' has been made from other data: model.base was" in done.stdout
    assert "--config run=another" in done.stdout


@pytest.mark.parametrize(
    ("on_collapse", "images"), [("rollback", 1), *slow(("stop", 2), ("warn", 1))]
)
def test_a_gate_that_cannot_see_diversity_is_warned_of_once(
    tmp_path: Path, on_collapse: str, images: int
) -> None:
    config = {
        "guards": {"on_collapse": on_collapse}, "evaluation": {"images_per_prompt": images},
    }  # fmt: skip
    done = Project(tmp_path).call("--dry-run", "--quiet", "rules", config=config)
    assert done.returncode == 0, done.stdout
    warned = done.stdout.count("but evaluation.images_per_prompt is 1: diversity needs two images")
    assert warned == (on_collapse == "rollback")


def resources(project: Project, *flags: str, config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The resources that each rule's jobs ask for, by name."""
    done = project.call("--dry-run", "--forceall", *flags, config=config)
    assert done.returncode == 0, done.stdout
    jobs = re.findall(
        r"^rule (\w+):$.*?^    resources: (.*?)$", done.stdout, re.MULTILINE | re.DOTALL
    )
    return {rule: dict(re.findall(r"(\w+)=([^,]*)", asked)) for rule, asked in jobs}


@pytest.mark.slow
def test_shared_gpus_are_counted_in_slots_of_which_a_training_takes_all(tmp_path: Path) -> None:
    small = ("sample_candidates", "score_candidates", "score_holdout", "generate_evaluation",
             "encode_preferences", "make_preferences")  # fmt: skip
    trainings = ("train_seed", "update_policy")
    alone = resources(Project(tmp_path), config={})
    assert {(alone[rule]["gpu"], alone[rule]["gpu_slot"]) for rule in small} == {("1", "0")}
    assert {(alone[rule]["gpu"], alone[rule]["gpu_slot"]) for rule in trainings} == {("1", "0")}
    assert not any("jobs-per-gpu" in execution(alone[rule]) for rule in small)
    config = {"execution": {"jobs_per_gpu": 3, "training_gpus": 2, "allow_cpu": True}}
    shared = resources(Project(tmp_path), "--resources", "gpu=2", config=config)
    assert {(shared[rule]["gpu"], shared[rule]["gpu_slot"]) for rule in small} == {("0", "1")}
    assert {(shared[rule]["gpu"], shared[rule]["gpu_slot"]) for rule in trainings} == {("2", "6")}
    assert all("--jobs-per-gpu 3" in execution(shared[rule]) for rule in small)
    assert not any("jobs-per-gpu" in execution(shared[rule]) for rule in trainings)
    assert shared["score_metric"]["gpu_slot"] == "0"  # plain functions need none
    target = f"results/{RUN}/world/pool.txt"
    flags = ("--resources", "gpu=2", "--", target)
    done = Project(tmp_path).call(*flags, config=config)
    assert done.returncode == 0, done.stdout
    assert re.search(r"Provided resources: .*gpu_slot\D+6\b", done.stdout), done.stdout


def execution(resources: Mapping[str, str]) -> str:
    """How a job's stage is called; a group of jobs allows one rule only to call it so."""
    return resources["scoring"] if "scoring" in resources else resources["execution"]


def own_config(tmp_path: Path) -> Path:
    """A whole config of someone with labels and prompts of their own, which do not exist."""
    config = yaml.safe_load(CONFIG.read_text())
    del config["shapes"]
    config["preferences"]["files"] = ["data/labels.parquet"]
    config["prompts"]["pool"] = "data/prompts.txt"
    config["evaluation"]["prompt_sets"] = {"mine": "data/evaluation.txt"}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_config_of_ones_own_stands_alone_and_its_missing_labels_are_named(tmp_path: Path) -> None:
    python = warm_python()
    done = subprocess.run(
        [str(python), "-m", "snakemake", "--cores", "1", "--dry-run",
         "--configfile", str(own_config(tmp_path))],
        capture_output=True, text=True, env=environment(python), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    for line in (
        "preferences.files: data/labels.parquet",
        "prompts.pool: data/prompts.txt",
        "evaluation.prompt_sets.mine: data/evaluation.txt",
    ):
        assert line in done.stdout + done.stderr


def test_a_pool_with_fewer_prompts_than_the_iterations_take_is_refused_before_any_job(
    tmp_path: Path,
) -> None:
    config = {"shapes": {"num_seed_captions": 673}}  # of 1,080 captions 400 are for evaluation
    done = Project(tmp_path).call("--quiet", "rules", config=config)
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert "prompts.per_iteration: 4 + 4 = 8 different prompts are wanted, but" in said
    assert "the pool of the embedded world has only 7 that" in said
    assert not (tmp_path / "results").exists()


def test_a_stage_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    config = {"shapes": {"num_seed_captions": 2}, "preferences": {"num_pairs": 500}}
    project = Project(tmp_path)
    done = project.call("--quiet", "rules", "--", "seed", config=config)
    assert done.returncode != 0
    assert "500 seed pairs are needed" in " ".join(done.stdout.split())
    assert not (project.results / "seed" / "preferences.parquet").exists()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(
    shutil.which("python", path="/usr/bin:/bin") is not None, reason="python is everywhere"
)
def test_without_an_activated_environment_the_stages_run_by_snakemakes_python(
    tmp_path: Path,
) -> None:
    project = Project(tmp_path)
    done = subprocess.run(
        project.command("--quiet", "rules", "--", f"results/{RUN}/world/pool.txt"),
        capture_output=True, text=True, check=False, env={**environment(), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project.results / "world" / "pool.txt").is_file()


def test_a_block_given_twice_is_refused_by_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(CONFIG.read_text() + "\nlora: {rank: 4}\nlora: {alpha: 8}\n")
    python = warm_python()
    command = [
        *(str(python), "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *("--directory", str(tmp_path), "--cores", "1", "--configfile", str(path), "-n"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(python)
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "the key 'lora' stands in line" in said
    assert "make one block of the two" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_spin_samples_the_captions_of_the_human_pairs_and_lists_are_trained_on_as_such(
    tmp_path: Path,
) -> None:
    flags = ("--dry-run", "--printshellcmds")
    spin = {"select_pairs": {"strategy": "spin"}, "sample_candidates": {"candidates_per_prompt": 1}}
    text = Project(tmp_path).call(*flags, config=spin).stdout
    line = next(line for line in text.splitlines() if "stages.select_prompts --pool" in line)
    assert f"--pool results/{RUN}/seed/preferences.parquet" in line
    assert "--exclude results/test/seed/holdout.parquet" in line
    assert "--skip 0" in line
    assert f"--human results/{RUN}/seed/preferences.parquet" in text
    four = {"candidates_per_prompt": 4}
    lists = {"select_pairs": {"strategy": "listwise"}, "sample_candidates": four}
    text = Project(tmp_path).call(*flags, config=lists).stdout
    assert "--strategy listwise" in text
    assert "--listwise" in text
    assert "--listwise" not in Project(tmp_path).call(*flags).stdout


@pytest.mark.slow
def test_human_pairs_are_encoded_in_shards_and_joined(tmp_path: Path) -> None:
    """The held-out pairs are few, and stay one job."""
    planned = Project(tmp_path).planned(config={"preferences": {"shards": 3}})
    found = {rule: count for rule, count in planned.items() if "encode" in rule or "join" in rule}
    assert found == {"encode_preferences": 1, "encode_shard": 3, "join_latents": 1}


@pytest.mark.slow
def test_a_step_judge_is_trained_before_it_judges(tmp_path: Path) -> None:
    flags = ("--dry-run", "--printshellcmds")
    config = {
        "online": {"method": "spo", "judge": "spm", "num_prompts": 4, "prompts_per_update": 4},
        "step_judge": {"clip": "some/clip", "tokenizer": "some/words", "labels": "clip"},
        "held_out_curve": {"num_pairs": 8},
    }
    lines = Project(tmp_path).call(*flags, config=config).stdout.splitlines()
    [trained] = [line for line in lines if "stages.train_step_judge" in line]
    assert "--clip some/clip --tokenizer some/words" in trained
    assert "--settings.labels clip" in trained
    assert "--held-out.num-pairs 8" in trained
    assert "--held-out.every-steps 1000" in trained
    [online] = [line for line in lines if "stages.train_online" in line]
    folder = trained.split("--output ")[1].split()[0]
    assert folder.endswith("/step_judge/judge")
    assert f"--judge.options weights {folder} tokenizer some/words" in online
    alone = config | {"online": {"method": "none"}}
    lines = Project(tmp_path).call(*flags, config=alone).stdout.splitlines()
    assert any("stages.train_step_judge" in line for line in lines)
    assert not any("stages.train_online" in line for line in lines)


def test_an_online_judge_has_its_rewards_as_the_candidates_have_theirs(tmp_path: Path) -> None:
    flags = ("--dry-run", "--printshellcmds")
    online = {
        "online": {"method": "spo", "judge": "self", "num_prompts": 4, "prompts_per_update": 4}
    }
    plain = Project(tmp_path).call(*flags, config=online).stdout
    line = next(line for line in plain.splitlines() if "stages.train_online" in line)
    told = ("--judge.dtype", "--judge.rewards-by", "--judge.draw-law", "--judge.embedded-guidance")
    assert "--judge.name self" in line
    assert not any(flag in line for flag in told)
    scoring = {"dtype": "float16", "rewards_by": "secant", "draw_law": "logit_normal"}
    text = Project(tmp_path).call(*flags, config=online | {"score_candidates": scoring}).stdout
    line = next(line for line in text.splitlines() if "stages.train_online" in line)
    for words in ("dtype float16", "rewards-by secant", "draw-law logit_normal"):
        assert f"--judge.{words}" in line
