"""The plan of a run: names and files of a config, and every problem that shows before the first job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core.plan import pool
from stages.core.plan.configuration import check_config
from stages.core.plan.pool import count_free, small_pool_problems
from stages.core.plan.problems import problems_of
from stages.core.plan.run import Problem, RunPlan, files_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which names of files are relative to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def world(**changes: Any) -> RunPlan:
    """The embedded world's config, with whole blocks replaced."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    return RunPlan(config=check_config({**config, **changes}))


def own(folder: Path, *, sizes: list[int], evaluation: str = "a fox\n") -> RunPlan:
    """A config of files in a folder: labels, a pool of five prompts of which one is a repeat."""
    (folder / "labels.parquet").touch()
    (folder / "pool.txt").write_text("a cat\na dog\nA  Cat\na fox\nan owl\n")
    (folder / "evaluation.txt").write_text(evaluation)
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    del config["shapes"]
    config["iterations"] = len(sizes)
    config["preferences"]["files"] = ["labels.parquet"]
    config["prompts"] = {"pool": "pool.txt", "per_iteration": sizes}
    config["evaluation"]["prompt_sets"] = {"mine": "evaluation.txt"}
    return RunPlan(config=check_config(config))


def keys(problems: Any) -> list[str]:
    return [problem.key for problem in problems]


def test_the_worlds_names() -> None:
    plan = world()
    assert plan.iterations == [1, 2, 3]
    assert plan.trained == [0, 1, 2, 3]
    assert plan.policies == ["base", "iter00", "iter01", "iter02", "iter03"]
    assert plan.prompt_sets == plan.excluded_sets == ["shapes"]
    assert plan.metrics_in_use == ["total", "caption_match", "appeal"]
    assert plan.prompts_wanted == [140, 140, 140]
    assert list(plan.data_files()) == list(plan.file_problems()) == []


def test_an_online_method_names_its_judge_and_wants_prompts() -> None:
    assert not world().is_online
    plan = world(online={"method": "spo", "judge": "sharpness", "num_prompts": 421})
    assert plan.is_online
    assert plan.metric_keys["sharpness"] == "online.judge"
    [problem] = plan.pool_problems(420)
    assert (problem.key, "421 different prompts are wanted" in problem.text) == (
        "online.num_prompts", True,
    )  # fmt: skip
    assert list(plan.pool_problems(421)) == []
    plan = world(online={"method": "spo", "judge": "spm", "num_prompts": 4})
    [problem] = plan.metric_problems(["total", "caption_match", "appeal"], [], "perceptual")
    assert problem.key == "metrics.spm.weights"
    plan = world(
        online={"method": "spo", "judge": "spm", "num_prompts": 4}, step_judge={"clip": "a/clip"}
    )
    assert plan.trains_step_judge
    assert list(plan.metric_problems(["total", "caption_match", "appeal"], [], "perceptual")) == []
    own_judge = world(online={"method": "spo", "judge": "self", "num_prompts": 4})
    assert "self" not in own_judge.metrics_in_use


def test_the_captions_of_human_pairs_are_no_pool() -> None:
    plan = world(
        select_pairs=world().config["select_pairs"] | {"strategy": "spin"},
        online={"method": "spo", "judge": "sharpness", "num_prompts": 8},
    )
    assert list(plan.pool_problems(0)) == []


def test_a_run_that_its_guards_have_ended_has_fewer_iterations() -> None:
    plan = RunPlan(config=world().config, last=1)
    assert (plan.policies, plan.prompts_wanted) == (["base", "iter00", "iter01"], [140])


def test_an_adopted_policy_is_not_trained_and_sets_may_be_left_to_training(here: Path) -> None:
    plan = own(here, sizes=[1])
    plan.config["train_seed"]["policy"] = "elsewhere"
    plan.config["evaluation"] |= {"exclude_from_training": [], "prompt_sets": {"b": "", "a": ""}}
    assert (plan.trained, plan.prompt_sets, plan.excluded_sets) == ([1], ["a", "b"], [])


def test_tables_of_other_runs_are_named_by_set_policy_and_metric() -> None:
    plan = world()
    plan.config["evaluation"] |= {"compare_with": ["results/old/iter03"], "metrics": ["total"]}
    table = "results/old/evaluation/shapes/iter03/scores/total.parquet"
    assert plan.scores_of_others == [("shapes", "old/iter03", table)]


@pytest.mark.parametrize(
    ("on_collapse", "images", "is_blind"), [("warn", 1, False), ("stop", 1, True), ("stop", 2, False)]
)  # fmt: skip
def test_a_gate_is_blind_with_one_image_a_prompt(
    on_collapse: str, images: int, is_blind: bool
) -> None:
    plan = world()
    plan.config["guards"]["on_collapse"] = on_collapse
    plan.config["evaluation"]["images_per_prompt"] = images
    assert plan.is_blind == is_blind


def test_patterns_folders_and_names_with_brackets_stand_for_files_once(here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    for name in ("a/2.txt", "a/b/1.txt", "[1].txt", "1.txt"):
        (here / name).touch()
    assert files_of(["a", "a/*.txt", "[1].txt", "none-*"]) == ["a/2.txt", "a/b/1.txt", "[1].txt"]


def test_every_missing_file_is_a_problem_of_its_key(here: Path) -> None:
    plan = own(here, sizes=[1])
    assert list(plan.file_problems()) == []
    for name in ("labels.parquet", "pool.txt", "evaluation.txt"):
        (here / name).unlink()
    plan.config["execution"]["metric_environments"] = {"total": "own.yaml"}
    found = list(plan.file_problems())
    assert keys(found) == [
        "preferences.files", "prompts.pool", "evaluation.prompt_sets.mine",
        "execution.metric_environments.total",
    ]  # fmt: skip
    assert str(found[1]) == "prompts.pool: pool.txt does not exist"


def test_a_pool_is_not_missed_where_nothing_is_generated(here: Path) -> None:
    plan = own(here, sizes=[])
    (here / "pool.txt").unlink()
    assert list(plan.file_problems()) == list(small_pool_problems(plan)) == []


def test_a_file_that_no_command_can_name_is_a_problem(here: Path) -> None:
    plan = own(here, sizes=[1])
    plan.config["prompts"]["pool"] = "data"
    (here / "data").mkdir()
    (here / "data" / "{x}.txt").touch()
    [found] = plan.file_problems()
    assert found.key == "prompts.pool"
    assert found.text.startswith("the file 'data/{x}.txt' cannot be used: it holds")


def test_metrics_that_are_not_there_and_networks_without_weights() -> None:
    plan = world()
    plan.config["select_pairs"]["ranker"] = "beauty"
    plan.config["evaluation"]["metrics"] = ["total", "net"]
    known, networks = ("total", "net", "clip"), ("net", "clip")
    found = list(plan.metric_problems(known, networks, "clip"))
    assert keys(found) == ["select_pairs.ranker", "metrics.clip.weights", "metrics.net.weights"]
    assert found[0].text == "there is no metric 'beauty'; expected one of total, net, clip"
    plan.config["metrics"] = {"clip": {"weights": "a"}, "net": {"weights": "b"}}
    assert keys(plan.metric_problems(known, networks, "clip")) == ["select_pairs.ranker"]


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("evaluation.metrics", "spm"),
        ("evaluation.metrics", "self"),
        ("evaluation.candidate_metric", "self"),
        ("evaluation.candidate_metric", "auto"),
        ("select_pairs.ranker", "spm"),
        ("select_pairs.ranker", "perceptual"),
        ("online.judge", "perceptual"),
        ("online.judge", "auto"),
    ],
)
def test_what_stands_for_no_metric_does_so_at_its_own_key_alone(key: str, word: str) -> None:
    plan = world(online={"method": "spo", "judge": "self", "num_prompts": 4})
    known = ["total", "caption_match", "appeal"]
    assert list(plan.metric_problems(known, [], "perceptual")) == []
    block, name = key.split(".")
    plan.config[block][name] = ["total", word] if name == "metrics" else word
    [problem] = plan.metric_problems(known, [], "perceptual")
    assert str(problem).startswith(f"{key}: there is no metric '{word}'")


def test_the_worlds_captions_are_counted_without_files() -> None:
    plan = world()
    assert list(plan.pool_problems(576)) == []
    [found] = plan.pool_problems(390)
    assert found == Problem(
        key="prompts.per_iteration",
        text="140 + 140 + 140 = 420 different prompts are wanted, but the pool of the embedded world "
        "has only 390 that can be used and that no evaluation set holds: lower "
        "prompts.per_iteration, or lower shapes.num_seed_captions",
    )
    [found] = plan.pool_problems(-20)
    assert "has only 0 that" in found.text


def test_repeats_and_evaluation_prompts_do_not_count() -> None:
    assert count_free(["a cat", "A  Cat", "a dog", "a fox"], ["A FOX", "an owl"]) == 2


def test_a_small_pool_is_counted_with_its_evaluation_sets(here: Path) -> None:
    # five lines, a repeat, and a fox that is evaluated on: a cat, a dog and an owl
    assert list(small_pool_problems(own(here, sizes=[2, 1]))) == []
    [found] = small_pool_problems(own(here, sizes=[2, 2]))
    assert found.key == "prompts.per_iteration"
    assert "2 + 2 = 4 different prompts are wanted, but prompts.pool has only 3" in found.text
    plan = own(here, sizes=[2, 2])
    plan.config["evaluation"]["exclude_from_training"] = []
    assert list(small_pool_problems(plan)) == []


def test_a_pool_or_a_set_that_cannot_be_read_is_a_problem(here: Path) -> None:
    plan = own(here, sizes=[1], evaluation="")
    [found] = small_pool_problems(plan)
    assert str(found) == (
        "evaluation.prompt_sets.mine: evaluation.txt holds no prompts; expected one a line or a row"
    )
    (here / "pool.txt").write_bytes(b"a cat\n\xff\n")
    [found] = small_pool_problems(plan)
    assert found.key == "prompts.pool"
    assert "pool.txt, line 2: byte 1" in found.text


def test_a_large_pool_is_left_to_preflight(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = own(here, sizes=[9])
    assert keys(small_pool_problems(plan)) == ["prompts.per_iteration"]
    monkeypatch.setattr(pool, "MAX_BYTES", 10)
    assert list(small_pool_problems(plan)) == []


METRICS = ("total", "caption_match", "appeal")


def test_a_worlds_prompts_are_what_its_seed_captions_leave() -> None:
    asked: list[int] = []

    def world_pool(num_seed_captions: int) -> int:
        asked.append(num_seed_captions)
        return 419

    plan = world()
    [found] = problems_of(plan, METRICS, [], "perceptual", world_pool=world_pool)
    assert found.key == "prompts.per_iteration"
    assert asked == [plan.config["shapes"]["num_seed_captions"]]
    assert problems_of(plan, METRICS, [], "perceptual", world_pool=lambda _: 420) == []


def test_prompts_are_counted_only_where_all_else_is_right(here: Path) -> None:
    def no_world(num_seed_captions: int) -> int:
        raise AssertionError(num_seed_captions)

    plan = own(here, sizes=[2, 2])
    found = problems_of(plan, METRICS, [], "perceptual", world_pool=no_world)
    assert keys(found) == ["prompts.per_iteration"]
    (here / "labels.parquet").unlink()
    found = problems_of(plan, ("total",), [], "perceptual", world_pool=no_world)
    assert keys(found) == ["preferences.files", "evaluation.metrics", "evaluation.metrics"]
