"""preflight: its checks can fail, it counts the run, and it names what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stages import preflight
from stages.core.errors import UserError
from stages.core.method.scoring import Errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.plan.configuration import check_config
from stages.core.plan.run import RunPlan
from stages.core.preflight import data, invariants, timing
from stages.core.preflight.findings import Findings
from stages.core.preflight.judge import check_judge
from stages.metrics import NETWORKS
from tests import tiny_models
from tests.builders import settings
from tests.label_files import WRITERS, some_pairs
from tests.metrics.conftest import Published, publish

ROOT = Path(__file__).resolve().parents[2]


def write_config(path: Path, base: str | Path, **changes: Any) -> Path:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["model"]["base"] = str(base)
    path.write_text(yaml.safe_dump({**config, **changes}))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Small weights of every metric."""
    return publish(tmp_path_factory.mktemp("published"))


@pytest.mark.quick("shapes")
@pytest.mark.parametrize("family", ["shapes", "sdxl"])
def test_preflight_of_a_sound_model_says_what_the_run_takes(
    tiny_base: str, tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base if family == "shapes" else tiny_models.sdxl(tmp_path / "base")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("execution: {micro_batch_pairs: 4}\n")
    config = write_config(tmp_path / "config.yaml", base)
    preflight.main(preflight.Args(config=(config, overlay), results=tmp_path, threads=1))
    printed = capsys.readouterr().out
    assert "device hours" in printed
    assert "5,040 images" in printed  # 3 x 140 prompts, 12 candidates each
    assert "policies" in printed


@pytest.mark.quick("online2-amounts2")
@pytest.mark.parametrize(
    ("online", "amounts"),
    [
        # 8 prompts: 2 steps alone, then 1 of 4 candidates; compared after steps 1 and 2, twice 2 steps a pair
        ({"method": "spo", "divert_step": 1, "judge": "total"}, ("96", "128 images", "64")),
        ({"method": "spo", "divert_step": 1}, ("96", "128 images x 4 draws", "64")),
        ({"method": "ddpo", "judge": "total", "batch_transitions": 6}, ("192", "64 images", "192")),
    ],
)
def test_preflight_says_what_an_online_training_takes(
    tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    online: dict[str, Any], amounts: tuple[str, str, str],
) -> None:  # fmt: skip
    block = {"rounds": 2, "prompts_per_update": 8, "num_prompts": 16, "num_inference_steps": 3}
    config = write_config(
        tmp_path / "config.yaml", tiny_base, iterations=0, online={**block, **online}
    )
    preflight.main(preflight.Args(config=(config,), results=tmp_path, threads=1))
    printed = capsys.readouterr().out
    rows = [[part.strip() for part in line.split("│")[1:3]] for line in printed.splitlines()]
    sampled, judged, trained = amounts
    assert ["online: sample", f"{sampled} steps"] in rows
    assert ["online: judge", judged] in rows
    assert ["online: train", f"{trained} steps"] in rows
    assert "The online training calls the denoiser" in printed


@pytest.mark.slow
def test_missing_data_files_are_named_and_fail(tiny_base: str, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "config/sd15.yaml").read_text())
    config["model"] = {"base": tiny_base, "dtype": "float32"}
    config["sampling"]["num_inference_steps"] = 2
    config["sample_candidates"]["candidates_per_prompt"] = 2
    config["score_candidates"]["num_draws"] = 2
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(
        UserError, match="preflight: preferences.files; prompts.pool; evaluation.prompt_sets"
    ):
        preflight.main(preflight.Args(config=(path,), results=tmp_path, threads=1))


def test_a_model_whose_errors_depend_on_the_batch_fails(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = invariants.draw_errors

    def leaking(*args: Any) -> Errors:
        found = real(*args)
        return Errors(found.policy * len(found.policy), found.reference, found.drift)

    monkeypatch.setattr(invariants, "draw_errors", leaking)
    findings = Findings()
    config = check_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    invariants.check_invariants(model, config, findings)
    assert findings.failed == [
        "reward of a policy that is its own reference",
        "an image's error alone and in a batch",
    ]


def test_a_config_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: [")
    with pytest.raises(UserError, match="config.yaml cannot be read as YAML"):
        preflight.main(preflight.Args(config=(path,)))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("pickapic", "1 files, layout pickapic, 6 usable rows"),
        ("likes-csv", "1 files, layout likes, 6 usable rows"),
        ("folders", "1 files, layout folders, 6 usable rows"),
    ],
)
def test_labels_in_any_layout_and_prompts_of_any_kind_are_counted(
    tmp_path: Path, kind: str, found: str
) -> None:
    WRITERS[kind][1](tmp_path / "data", some_pairs())
    (tmp_path / "pool.json").write_text('["a cat", "a dog"]')
    (tmp_path / "labels.csv").write_text("prompt,label\na cat,1\n,0\n")
    (tmp_path / "dogs.txt").write_text("A dog\ntwo dogs\n")
    config = {
        "preferences": {"files": [str(tmp_path / "data")], "layout": "auto"},
        "prompts": {
            "pool": [str(tmp_path / "*.json"), str(tmp_path / "none"), str(tmp_path / "*.csv")],
            "per_iteration": [1],
        },
        "evaluation": {
            "prompt_sets": {"one": str(tmp_path / "dogs.txt")},
            "prompt_layouts": {},
            "exclude_from_training": None,
        },
        "iterations": 1,
        "select_pairs": {"strategy": "best_worst"},
    }
    findings = Findings()
    assert data.labelled_pairs(config, findings) == 6
    assert data.check_prompts(RunPlan(config=config), findings) == 2
    assert findings.checks[0][1:] == (found, True)
    assert [check[1:] for check in findings.checks[1:]] == [
        ("those of 6 labels can be read", True), ("2 prompts", True), ("1 prompts, 1 empty or too long are left out", True),
        ("2 prompts", True),
    ]  # fmt: skip
    config["prompts"]["per_iteration"] = [2]  # of a cat and a dog, which the evaluation keeps
    data.check_prompts(RunPlan(config=config), findings)
    assert findings.failed == ["prompts.per_iteration"]
    assert (
        "2 = 2 different prompts are wanted, but prompts.pool has only 1" in findings.checks[-1][1]
    )
    config["preferences"]["files"] = [str(tmp_path / "nothing-*")]
    assert data.labelled_pairs(config, findings) == 0


def test_too_few_labels_bad_rows_and_missing_images_are_found(tmp_path: Path) -> None:
    WRITERS["folders"][1](tmp_path / "data", some_pairs())
    block = {"files": [str(tmp_path / "data")], "layout": "auto", "num_pairs": 5, "num_holdout": 2}
    findings = Findings()
    assert data.labelled_pairs({"preferences": block}, findings) == 6
    assert findings.failed == ["preferences.num_pairs"]
    assert "7 are wanted with preferences.num_holdout, at most 6" in findings.checks[1][1]
    table = tmp_path / "labels.csv"
    lines = ["a cat,data/win/0.jpg,data/lose/0.jpg", "a dog,data/win/1.jpg,gone.png"]
    table.write_text("\n".join(["prompt,chosen,rejected", *lines]) + "\n")
    block |= {"files": [str(table)], "num_pairs": 2, "num_holdout": 0, "root": str(tmp_path)}
    findings = Findings()
    data.labelled_pairs({"preferences": block}, findings)
    assert findings.failed == ["images of preferences.files"], findings.checks
    assert "gone.png" in findings.checks[-1][1]


@pytest.mark.quick("difference-bfloat16-False")
@pytest.mark.parametrize(
    ("rewards_by", "dtype", "is_right"),
    [
        ("difference", "bfloat16", False),
        ("derivative", "float16", True),
        ("secant", "float16", True),
        ("difference", "float32", None),
    ],
)
def test_the_judges_precision_is_measured_on_the_users_own_model(
    model: DiffusionModel, rewards_by: str, dtype: str, is_right: bool | None
) -> None:
    config = check_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    config["score_candidates"] |= {"rewards_by": rewards_by, "dtype": dtype}
    findings = Findings()
    check_judge(model, config, findings)
    assert [holds for *_, holds in findings.checks] == ([] if is_right is None else [is_right])
    assert (is_right is False) == ("set score_candidates.rewards_by" in str(findings.checks))


@pytest.mark.quick("float16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_raises_no_false_alarm_in_the_invariants(tmp_path: Path, dtype: str) -> None:
    model = load_model(settings(tiny_models.sd15(tmp_path), dtype), device=torch.device("cpu"))
    config = check_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    config["model"]["dtype"] = dtype
    findings = Findings()
    invariants.check_invariants(model, config, findings)
    assert findings.failed == []
    assert [what for what, *_ in findings.checks][:2] == ["device", "a picture through the VAE"]


def test_a_loss_that_knows_no_winner_fails(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = invariants.preference_logit
    monkeypatch.setattr(invariants, "preference_logit", lambda *args: real(*args).abs())
    findings = Findings()
    config = check_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    invariants.check_invariants(model, config, findings)
    assert findings.failed == ["logit of the exchanged pair"]


def test_missing_and_damaged_weights_are_found_before_anything_is_spent(
    published: Published, tmp_path: Path
) -> None:
    evaluation = {"metrics": [*NETWORKS, "total"], "candidate_metric": "beauty",
                  "diversity_features": "auto"}  # fmt: skip
    options = {name: published.options(name) for name in NETWORKS}
    stored = torch.load(published.weights_file("hpsv2"), weights_only=True)
    gone = "visual.transformer.resblocks.1.ln_1.bias"
    del stored["state_dict"][gone]
    torch.save(stored, tmp_path / "HPS_v2_compressed.pt")
    options["hpsv2"] |= {"weights": str(tmp_path)}
    options["clipscore"] = {"weights": "openai/clip-vit-large-patch14"}
    options["imagereward"] |= {"tokenizer": str(tmp_path)}
    config = {"evaluation": evaluation, "select_pairs": {"ranker": "self"}, "metrics": options}
    findings = Findings()
    preflight.check_metrics(RunPlan(config=config), findings)
    found = {what.removeprefix("metric "): (text, holds) for what, text, holds in findings.checks}
    assert [name for name, (_, holds) in found.items() if not holds] == [
        "hpsv2", "imagereward", "beauty"
    ]  # fmt: skip
    assert f"missing '{gone}'" in found["hpsv2"][0]
    assert "has no vocab.txt" in found["imagereward"][0]
    assert "hub id, fetched when it is first needed" in found["clipscore"][0]
    assert found["total"][0] == "needs no weights"
    assert "pytorch_model.bin fits" in found["pickscore"][0]


def test_settings_that_an_evaluation_would_stumble_over_at_its_end_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = check_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    findings = Findings()
    data.check_evaluation(RunPlan(config=config), findings)
    assert findings.checks == []
    config["guards"]["on_collapse"] = "stop"
    config["evaluation"] |= {
        "images_per_prompt": 1, "metrics": ["total"], "compare_with": ["results/other/iter03"],
        "paper_model": "sd15", "allow_leakage": True,
    }  # fmt: skip
    data.check_evaluation(RunPlan(config=config), findings)
    assert findings.failed == [
        "diversity of images", "evaluation.compare_with other/iter03",
        "evaluation.paper_model sd15",
    ]  # fmt: skip
    scores = Path("results/other/evaluation/shapes/iter03/scores/total.parquet")
    assert str(scores) in findings.checks[2][1]
    scores.parent.mkdir(parents=True)
    scores.write_text("")
    findings = Findings()
    data.check_evaluation(RunPlan(config=config), findings)
    assert "evaluation.compare_with other/iter03" not in findings.failed


@pytest.mark.parametrize(("loss", "passes"), [("sigmoid", 1), ("kto", 2)])
def test_a_timed_training_makes_every_pass_that_the_loss_takes(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch, loss: str, passes: int
) -> None:
    config = check_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    config["update_policy"] |= {"loss": loss, "batch_pairs": 2}
    model = load_model(settings(tiny_base), device=torch.device("cpu"))
    calls: list[int] = []
    add_noise = model.add_noise

    def counted(latents: Any, noise: Any, timesteps: Any) -> Any:
        calls.append(len(latents))
        return add_noise(latents, noise, timesteps)

    monkeypatch.setattr(model, "add_noise", counted)
    seconds = timing.time_training(model, config, Findings())[0]
    assert seconds > 0
    assert len(calls) == 2 * passes  # once to warm up, once by the clock
