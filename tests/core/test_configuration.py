"""The config's checks: what passes, and what each mistake is told."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core.evaluation.guards import Limits
from stages.core.models.denoiser import LoraSettings
from stages.core.models.loading import ModelSettings
from stages.core.plan.configuration import (
    Config,
    ConfigError,
    check_config,
    known_keys,
    merged,
    read_config,
    refuse_repeated_keys,
    without_defaults,
)
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.settings import TrainingSettings
from stages.core.training.step_judge.settings import StepJudgeSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config() -> Config:
    """The repository's own config."""
    values: Config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    return values


def change(config: Config, key: str, value: object) -> Config:
    *path, last = key.split(".")
    node: Any = config
    for part in path:
        node = node[part]
    node[last] = value
    return config


def remove(config: Config, key: str) -> Config:
    *path, last = key.split(".")
    node: Any = config
    for part in path:
        node = node[part]
    del node[last]
    return config


def complaint(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    return str(caught.value)


def test_the_repositorys_config_passes_and_gains_only_defaults(config: Config) -> None:
    before = copy.deepcopy(config)
    checked = check_config(config)
    assert config == before
    for key, value in before.items():
        kept = checked[key]
        assert ({k: kept[k] for k in value} if isinstance(value, dict) else kept) == value
    assert checked["lora"]["rank"] == 0
    assert checked["execution"]["training_gpus"] == 1


def test_settings_left_at_their_defaults_are_not_passed_on() -> None:
    block = {"dpo_beta": 5000.0, "loss": "sigmoid", "optimizer": "adafactor", "ema_decay": 0}
    kept = without_defaults(block, "train_seed")
    assert kept == {"dpo_beta": 5000.0, "optimizer": "adafactor"}


def test_a_whole_config_keeps_what_differs_and_passes_with_it_alone(config: Config) -> None:
    config["evaluation"] |= {"allow_leakage": False, "compare_with": []}
    config["guards"] = {"min_reward_accuracy": 0.5, "max_blank_share": 0.2}
    checked = check_config(config)
    kept = without_defaults(checked)
    assert kept["guards"] == {"max_blank_share": 0.2}
    assert not {"lora", "held_out_curve", "export", "metrics"} & set(kept)
    assert not {"allow_leakage", "compare_with"} & set(kept["evaluation"])
    assert check_config(kept) == checked


NO_SETTINGS = (
    "policy",
    "reference",
    "on_collapse",
    "use_decisions",
    "clip",
    "tokenizer",
    "every_steps",
)
"""Keys that rules pass on in another way."""


@pytest.mark.parametrize(
    ("block", "settings"),
    [
        ("train_seed", TrainingSettings),
        ("lora", LoraSettings),
        ("held_out_curve", HeldOutFiles),
        ("guards", Limits),
        ("model", ModelSettings),
        ("step_judge", StepJudgeSettings),
    ],
)
def test_what_is_not_passed_on_has_the_same_default_in_the_stage(
    config: Config, block: str, settings: Any
) -> None:
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    there = {field.name: field.default for field in dataclasses.fields(settings)}
    defaults = {k: v["default"] for k, v in known_keys(schema, [block]).items() if "default" in v}
    for key, default in defaults.items():
        if key not in NO_SETTINGS:
            wanted = tuple(default) if isinstance(default, list) else default
            assert there[key] == wanted, key


@pytest.mark.parametrize("names", [["shapes", "garden"], ["parti"]])
def test_sets_that_are_excluded_from_training_must_be_there(
    config: Config, names: list[str]
) -> None:
    config["evaluation"]["exclude_from_training"] = names
    assert "'evaluation.exclude_from_training' names no prompt set" in complaint(config)
    config["evaluation"]["exclude_from_training"] = ["shapes"]
    check_config(config)


def test_every_config_of_the_repository_is_an_overlay_or_passes(config: Config) -> None:
    paths = sorted((ROOT / "config").glob("*.yaml"))
    assert paths
    for path in paths:
        values = yaml.safe_load(path.read_text())
        if "model" in values and "base" in values["model"] and "evaluation" in values:
            check_config(values)


def test_defaults_are_filled_in(config: Config) -> None:
    del config["guards"]
    del config["evaluation"]["candidate_metric"]
    found = check_config(config)
    assert found["guards"] == {
        "min_reward_accuracy": 0.5,
        "max_confident_share": None,
        "min_diversity_share": 0.6,
        "max_accuracy_loss": 0,
        "min_moved_share": 0.02,
        "max_blank_share": 0.01,
        "max_truncated_share": 0.05,
        "max_drift": None,
        "on_collapse": "warn",
    }
    assert found["evaluation"]["candidate_metric"] is None
    assert "guards" not in config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("iteration", "iterations"),
        ("sampling.guidance", "guidance_scale"),
        ("train_seed.learningrate", "learning_rate"),
        ("update_policy.refrence", "reference"),
        ("update_policy.dpo_betas", "dpo_beta"),
        ("evaluation.metric", "metrics"),
        ("guards.min_diversity", "min_diversity_share"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_right_one(
    config: Config, key: str, nearest: str
) -> None:
    assert f"unknown key '{key}'; did you mean '{nearest}'?" in complaint(change(config, key, 1))


def test_a_key_like_no_other_is_told_the_known_ones(config: Config) -> None:
    text = complaint(change(config, "mix_preferences.xyz", 1))
    assert "unknown key 'mix_preferences.xyz'; known keys here are seed_fraction" in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("iterations", "three", "'iterations' is 'three' (text); expected integer"),
        ("iterations", True, "'iterations' is True (true/false); expected integer"),
        ("sampling", [1], "'sampling' is [1] (a list); expected object"),
        ("train_seed.learning_rate", "1e-6", "write a dot and a sign, as in 1.0e-06"),
        ("train_seed.learning_rate", "1e-6", "'train_seed.learning_rate' is '1e-6' (text)"),
        ("update_policy.dpo_beta", None, "(nothing); expected number"),
        ("score_candidates.reencode", "no", "'score_candidates.reencode' is 'no' (text)"),
        ("sampling.sampler", "heun", "'sampling.sampler' is 'heun'; expected one of ddpm, ddim"),
        ("mix_preferences.seed_fraction", 1.0, "'mix_preferences.seed_fraction' is 1.0"),
        ("run", "a/b", "'run' is 'a/b'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(
    config: Config, key: str, value: object, words: str
) -> None:
    assert words in complaint(change(config, key, value))


@pytest.mark.parametrize(
    "key", ["seed", "model.base", "update_policy.reference", "train_seed.passes"]
)
def test_a_missing_key_is_named(config: Config, key: str) -> None:
    assert f"key '{key}' is missing" in complaint(remove(config, key))


def test_all_mistakes_are_listed_at_once(config: Config) -> None:
    text = complaint(remove(change(change(config, "sede", 1), "iterations", -1), "model.dtype"))
    for words in ("unknown key 'sede'", "'iterations' is -1", "key 'model.dtype' is missing"):
        assert words in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("prompts.per_iteration", [256], "lists 1 sizes, but 'iterations' is 3"),
        (
            "preferences.files",
            ["a.parquet"],
            "'preferences.files' is given beside the block 'shapes'",
        ),
        ("prompts.pool", "pool.txt", "'prompts.pool' is given beside the block 'shapes'"),
        ("evaluation.prompt_sets", {"mine": "a.txt"}, "'evaluation.prompt_sets' is given beside"),
        ("score_candidates.reference", "seed", "every reward would be 0"),
        ("evaluation.primary_metric", "beauty", "'evaluation.metrics' does not list (total, "),
        ("evaluation.prompt_layouts", {"hps": "hpsv2"}, "'hps'; known keys here are none"),
    ],
)
def test_keys_that_contradict_each_other_are_told(
    config: Config, key: str, value: object, words: str
) -> None:
    assert words in complaint(change(config, key, value))


def test_soft_labels_are_for_the_loss_that_knows_them(config: Config) -> None:
    change(config, "update_policy.soft_labels", True)
    check_config(config)
    change(config, "update_policy.loss", "mapo")
    assert "'update_policy.soft_labels' is true, which the loss 'mapo' does not know" in complaint(
        config
    )


@pytest.mark.parametrize(
    ("strategy", "key", "value", "words"),
    [
        ("random", "sample_candidates.candidates_per_prompt", 1, "is 1: a pair needs 2 or more"),
        ("listwise", "sample_candidates.candidates_per_prompt", 7, "use an even number"),
        (
            "listwise",
            "update_policy.loss",
            "ipo",
            "'update_policy.loss' is 'ipo', which the list's",
        ),
        ("listwise", "update_policy.soft_labels", True, "'update_policy.soft_labels' is True"),
        ("spin", "select_pairs.ranker", "total", "'select_pairs.ranker' is 'total'"),
        ("spin", "select_pairs.min_probability", 0.6, "nobody judges a person's image"),
        ("spin", "update_policy.soft_labels", True, "'update_policy.soft_labels' is set"),
    ],
)
def test_pair_makers_go_with_what_they_know(
    config: Config, strategy: str, key: str, value: object, words: str
) -> None:
    change(config, "select_pairs.strategy", strategy)
    check_config(config)
    assert words in complaint(change(config, key, value))


@pytest.fixture
def of_likes(config: Config) -> Config:
    """A config whose human labels are single likes."""
    remove(config, "shapes")
    change(config, "prompts.pool", "prompts.txt")
    change(config, "evaluation.prompt_sets", {"ours": "evaluation.txt"})
    config["preferences"] |= {"files": ["likes.csv"], "unpaired": True}
    change(config, "train_seed.loss", "kto")
    change(config, "mix_preferences.seed_fraction", 0.0)
    return change(config, "score_candidates.weights", "uniform")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("preferences.layout", "pairs", "'preferences.layout' is 'pairs', which compares images"),
        ("train_seed.loss", "sigmoid", "'train_seed.loss' is 'sigmoid', which compares two images"),
        ("train_seed.loss", "mapo", "'train_seed.loss' is 'mapo', which compares two images"),
        ("mix_preferences.seed_fraction", 0.25, "'mix_preferences.seed_fraction' is 0.25"),
        ("score_candidates.weights", "calibrated", "'score_candidates.weights' is 'calibrated'"),
        ("select_pairs.strategy", "spin", "'select_pairs.strategy' needs pairs that people"),
        ("train_seed.use_decisions", True, "'train_seed.use_decisions' needs pairs that people"),
    ],
)
def test_single_likes_go_with_what_needs_no_pairs(
    of_likes: Config, key: str, value: object, words: str
) -> None:
    check_config(of_likes)
    text = complaint(change(of_likes, key, value))
    assert "'preferences.unpaired' is true" in text
    assert words in text


def test_the_embedded_worlds_labels_are_pairs(config: Config) -> None:
    change(config, "preferences.unpaired", True)
    text = complaint(change(config, "train_seed.loss", "kto"))
    assert (
        "'preferences.unpaired' is true beside the block 'shapes', whose human labels are" in text
    )


def test_a_run_without_iterations_or_with_a_policy_of_its_own_asks_less_of_likes(
    of_likes: Config,
) -> None:
    change(of_likes, "mix_preferences.seed_fraction", 0.25)
    change(of_likes, "iterations", 0)
    check_config(of_likes)
    change(of_likes, "iterations", 1)
    change(of_likes, "mix_preferences.seed_fraction", 0.0)
    change(of_likes, "train_seed.loss", "sigmoid")
    check_config(change(of_likes, "train_seed.policy", "policies/ours"))


def test_draws_where_the_information_is_want_somebody_who_knows_where(config: Config) -> None:
    change(config, "score_candidates.allocation", "importance")
    assert "nothing says where the information is" in complaint(config)
    check_config(change(config, "score_candidates.weights", "calibrated"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("score_candidates.first_draws", 10, "no draw would be saved"),
        ("select_pairs.strategy", "random", "'select_pairs.strategy' is 'random'"),
        ("select_pairs.ranker", "total", "'select_pairs.ranker' is 'total'"),
    ],
)
def test_adaptive_draws_are_for_best_and_worst_by_the_judge(
    config: Config, key: str, value: object, words: str
) -> None:
    check_config(change(config, "score_candidates.adaptive_confidence", 0.95))
    assert words in complaint(change(config, key, value))


def test_label_smoothing_is_for_the_loss_that_knows_it(config: Config) -> None:
    change(config, "train_seed.label_smoothing", 0.1)
    check_config(config)
    change(config, "train_seed.loss", "ipo")
    assert "'train_seed.label_smoothing' is 0.1, which the loss 'ipo' does not know" in complaint(
        config
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "spo", "candidates_per_prompt": 1}, "is 1, but spo compares candidates"),
        ({"method": "d3po", "candidates_per_prompt": 1}, "is 1, but d3po compares candidates"),
        ({"method": "spo", "divert_step": 20}, "there would be no pool of candidates"),
        (
            {"method": "ddpo", "batch_transitions": 30},
            "no multiple of 'online.num_inference_steps'",
        ),
        ({"method": "ddpo", "batch_transitions": 40, "prompt_buffer": 8}, "never have so many"),
        ({"method": "sail"}, "'online.method' is 'sail'; expected one of none, spo, ddpo, d3po"),
    ],
)
def test_an_online_method_that_cannot_work_is_told(
    config: Config, changed: dict[str, Any], words: str
) -> None:
    config["online"] = changed
    assert words in complaint(config)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_pairs": 63}, "'step_judge.batch_pairs' is 63, no multiple of"),
        ({"warmup_steps": 9, "num_steps": 8}, "'step_judge.warmup_steps' is 9 and"),
        ({"labels": "nobody"}, "'step_judge.labels' is 'nobody'; expected one of people, clip"),
    ],
)
def test_a_step_judge_that_cannot_be_trained_is_told(
    config: Config, changed: dict[str, Any], words: str
) -> None:
    config["execution"] |= {"training_gpus": 2}
    config["step_judge"] = {"clip": "some/clip", "batch_pairs": 64} | changed
    assert words in complaint(config)


def test_two_step_judges_are_refused(config: Config) -> None:
    config["step_judge"] = {"clip": "some/clip"}
    config["metrics"] = {"spm": {"weights": "some/where"}}
    assert "'metrics.spm.weights' names another" in complaint(config)


def test_what_is_wrong_with_an_online_method_that_is_off_does_not_matter(config: Config) -> None:
    config["online"] = {"candidates_per_prompt": 1, "divert_step": 20}
    assert check_config(config)["online"]["method"] == "none"


@pytest.mark.parametrize("method", ["spo", "d3po"])
def test_keys_of_ddpo_alone_do_not_matter_to_others(config: Config, method: str) -> None:
    config["online"] = {"method": method, "prompt_buffer": 8}
    assert check_config(config)["online"]["prompt_min_count"] == 16


def test_an_online_methods_prompts_are_shared_equally(config: Config) -> None:
    config["online"] = {"method": "spo", "prompts_per_update": 3}
    config["execution"] |= {"training_gpus": 2}
    assert "'online.prompts_per_update' is 3, no multiple of 'execution.training_gpus' = 2" in (
        complaint(config)
    )


def test_one_draw_has_no_standard_error_to_ask_for(config: Config) -> None:
    change(config, "select_pairs.min_margin_in_standard_errors", 1.0)
    check_config(config)
    change(config, "score_candidates.num_draws", 1)
    assert "one draw has no standard error" in complaint(config)


def test_without_the_shapes_block_a_run_names_its_own_data(config: Config) -> None:
    del config["shapes"]
    text = complaint(config)
    for key in ("preferences.files", "prompts.pool", "evaluation.prompt_sets"):
        assert f"key '{key}' is missing" in text
    change(config, "preferences.files", ["a.parquet"])
    change(config, "evaluation.prompt_sets", {"mine": "a.txt"})
    change(config, "iterations", 0)
    check_config(config)  # a plain Diffusion-DPO training needs no pool


def test_a_pool_is_wanted_where_prompts_are_taken_from_it(config: Config) -> None:
    del config["shapes"]
    change(config, "preferences.files", ["a.parquet"])
    change(config, "evaluation.prompt_sets", {"mine": "a.txt"})
    change(config, "iterations", 0)
    config["online"] = {"method": "spo", "num_prompts": 8}
    assert "key 'prompts.pool' is missing" in complaint(config)
    change(config, "select_pairs.strategy", "spin")
    check_config(config)  # of the human pairs' captions
    config["online"]["num_prompts"] = config["preferences"]["num_pairs"] + 1
    assert "prompts are the captions of the human pairs" in complaint(config)


def test_null_removes_a_prompt_set_with_its_layout(config: Config) -> None:
    below = yaml.safe_load((ROOT / "config" / "sd15.yaml").read_text())
    sets = {"ours": "a.txt", "hpsv2": None, "pickapic": None}
    evaluation = check_config(merged(below, {"evaluation": {"prompt_sets": sets}}))["evaluation"]
    assert set(evaluation["prompt_sets"]) == {"ours", "partiprompts"}
    assert evaluation["prompt_layouts"] == {"partiprompts": "partiprompts"}
    change(config, "evaluation.prompt_sets", {"ours": None})
    assert "'evaluation.prompt_sets' is {}: it should be non-empty" in complaint(config)
    change(config, "evaluation.prompt_sets", None)
    assert "'evaluation.prompt_sets' is None (nothing); expected object" in complaint(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"held_out_curve": {"num_pairs": 0}}, "'held_out_curve.num_pairs' is 0: nothing would be"),
        (
            {"held_out_curve": {"num_pairs": 200}},
            "'held_out_curve.num_pairs' is 200 and 'preferences.num_holdout' is 200",
        ),
        ({"train_seed.ema_decay": 0.9}, "'train_seed.ema_decay' an average that is not scored"),
    ],
)
def test_early_stopping_needs_scores_of_what_is_kept(
    config: Config, changes: Config, expected: str
) -> None:
    change(config, "train_seed.stop_after_no_gain", 3)
    check_config(config)
    for key, value in changes.items():
        change(config, key, value)
    assert expected in complaint(config)


def test_a_policy_from_elsewhere_has_no_training_that_heeds_decisions(config: Config) -> None:
    change(config, "train_seed.use_decisions", True)
    check_config(config)
    change(config, "train_seed.policy", "elsewhere")
    assert "no seed training heeds the decisions" in complaint(config)


def test_a_key_that_a_file_names_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("run: mine\nlora:\n  rank: 8\n  rank: 4\nseed: 1\nlora: {alpha: 4}\n")
    for read in (read_config, refuse_repeated_keys):
        with pytest.raises(ConfigError) as caught:
            read(path)
        assert f"{path}, line 4: the key 'rank' stands in line 3 already" in str(caught.value)
        assert f"{path}, line 6: the key 'lora' stands in line 2 already" in str(caught.value)
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    refuse_repeated_keys(path, tmp_path / "none.yaml")


def test_an_overlay_alone_is_taken_for_one(config: Config) -> None:
    for key in list(config):
        if key not in ("run", "model"):
            del config[key]
    text = complaint(config)
    assert "is it an overlay? Name the config that it lies on before it" in text.splitlines()[1]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sampling.guidance_interval", [0.8, 0.2], "'sampling.guidance_interval' is [0.8, 0.2]"),
        ("sampling.guidance_interval", [0.5, 0.5], "in which none of 12 steps begins"),
        ("sampling.guidance_interval", [0.01, 0.02], "nothing would be guided"),
        (
            "sample_candidates.sampling",
            {"guidance_interval": [0.3, 0.4], "num_inference_steps": 5},
            "'sample_candidates.sampling.guidance_interval' is [0.3, 0.4], in which none of 5",
        ),
        ("sampling.guidance_interval", [0.5], "'sampling.guidance_interval'"),
        ("sample_candidates.sampling", {"samplr": "dpm"}, "did you mean 'sampler'"),
    ],
)
def test_an_interval_of_guidance_without_a_step_is_refused(
    config: Config, key: str, value: object, words: str
) -> None:
    assert words in complaint(change(config, key, value))


def test_without_guidance_no_interval_is_asked_for(config: Config) -> None:
    change(config, "sampling.guidance_scale", 1.0)
    check_config(change(config, "sampling.guidance_interval", [0.5, 0.5]))
