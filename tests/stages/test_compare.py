"""`python -m stages.compare`: what two runs share, scores paired by prompt and noise, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages import compare, inspect
from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import (
    EVALUATION_PROMPTS,
    HOLDOUT_REWARDS,
    IMAGES,
    METRIC_SCORES,
    PREFERENCES,
)
from stages.core.artifacts.tables import read_metadata, read_table, write_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.inspection.run_table import RUN_COMPARISON
from tests.builders import CAPTIONS, encoded, image_value, picture, prompt_row

PICTURES = [image_value(encoded(picture(c))) for c in CAPTIONS[:4]]
SAMPLER = {"sampler": "ddim", "num_inference_steps": 2}


def make_run(
    folder: Path,
    scores: Mapping[str, Sequence[float]],
    *,
    captions: Sequence[str] = CAPTIONS[:4],
    seed: int = 1,
    sampler: Mapping[str, Any] = SAMPLER,
    options: Mapping[str, Any] | None = None,
    right: Sequence[float] = (0.9, 0.9, 0.1),
    pictures: Sequence[Any] = PICTURES,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A run of tables alone: two images a prompt, a score of each policy's prompts, three held-out pairs."""
    prompts = [
        prompt_row(caption) | {"category": None, "challenge": None, "item": None}
        for caption in captions
    ]
    evaluation = folder / "evaluation"
    write_table(evaluation / "ours/prompts.parquet", prompts, EVALUATION_PROMPTS,
                stage="select_evaluation_prompts", arguments={})  # fmt: skip
    for policy, values in scores.items():
        images, found = [], []
        for row, value in zip(prompts, values, strict=True):
            for candidate in range(2):
                key = {"prompt_id": row["prompt_id"], "candidate": candidate}
                images.append(
                    {**key, "prompt": row["prompt"], "seed": seed + candidate, "image": PICTURES[0]}
                )
                found.append({**key, "metric": "total", "score": value + candidate - 0.5})
        write_table(evaluation / f"ours/{policy}/images/shard-0.parquet", images, IMAGES,
                    stage="generate_evaluation", arguments={"settings": sampler})  # fmt: skip
        write_table(evaluation / f"ours/{policy}/scores/total.parquet", found, METRIC_SCORES,
                    stage="score_metric", arguments={"options": options or {}, "spec": {}})  # fmt: skip
    pairs = [
        {"pair_id": f"pair-{n}", **prompt_row(CAPTIONS[n]), "winner": pictures[n], "loser": PICTURES[3],
         "source": "human", "iteration": 0}
        for n in range(3)
    ]  # fmt: skip
    write_table(
        folder / "seed/holdout.parquet",
        pairs,
        PREFERENCES,
        stage="import_preferences",
        arguments={},
    )
    judged = [
        {"pair_id": f"pair-{n}", "prompt_id": prompt_id(CAPTIONS[n]), "winner_reward": 0.0,
         "loser_reward": 0.0, "probability": probability, "drift": 0.0, "timesteps": [1],
         "num_timesteps": 1000, **{f"{s}_{w}_errors": [0.0] for s in ("winner", "loser") for w in ("policy", "reference")}}
        for n, probability in enumerate(right)
    ]  # fmt: skip
    write_table(evaluation / "holdout/iter00.parquet", judged, HOLDOUT_REWARDS,
                stage="score_holdout", arguments={})  # fmt: skip
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def first(tmp_path: Path) -> Path:
    scores = {"base": [1.0, 2.0, 3.0, 4.0], "iter00": [1.0, 2.0, 3.0, 4.0]}
    return make_run(tmp_path / "one", scores, config={"run": "one", "seed": 0, "lora": {"rank": 4}})


def told(
    one: Path, two: Path, capsys: pytest.CaptureFixture[str], output: Path | None = None
) -> str:
    capsys.readouterr()
    compare.main(compare.Args(first=one, second=two, output=output))
    return capsys.readouterr().out


def test_scores_are_paired_and_the_table_says_the_same(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = make_run(
        tmp_path / "two",
        {
            "base": [1.0, 2.0, 3.0, 4.0],
            "iter00": [1.5, 2.5, 4.5, 3.5],
            "iter01": [2.0, 3.0, 4.0, 5.0],
        },
        right=(0.9, 0.4, 0.2),
        config={"run": "two", "seed": 1, "notify": "mail"},
    )
    text = told(first, second, capsys, tmp_path / "out.parquet")
    assert "  seed: 0 and 1\n" in text
    assert "  lora.rank: 4 and -\n" in text
    assert "notify" not in text
    assert "evaluation/ours: prompts: 4, 4; 4 in both" in text
    assert "seed/holdout: human labels: 3, 3; 3 in both" in text
    rows = {(r["metric"], r["policy"], r["baseline"]): r
            for r in read_table(tmp_path / "out.parquet", RUN_COMPARISON).to_pylist()}  # fmt: skip
    assert set(rows) == {
        ("total", "two/base", "one/base"), ("total", "two/iter00", "one/iter00"),
        ("total", "two/iter01", "one/iter00"),  # the last of each
        ("reward_accuracy", "two/iter00", "one/iter00"),
    }  # fmt: skip
    row = rows["total", "two/iter00", "one/iter00"]
    # by hand: +0.5, +0.5, +1.5, -0.5
    assert (row["num_prompts"], row["mean"], row["baseline_mean"]) == (4, 3.0, 2.5)
    assert row["difference"] == pytest.approx(0.5)
    assert row["ci_low"] < 0.5 < row["ci_high"]
    assert (row["num_wins"], row["num_losses"], row["win_rate"]) == (3, 1, 0.75)
    assert row["sign_p"] == pytest.approx(0.625)  # two-sided, 3 of 4
    assert row["sign_p_holm"] == pytest.approx(0.625)
    last = rows["total", "two/iter01", "one/iter00"]
    assert (last["difference"], last["ci_low"], last["ci_high"]) == (1.0, 1.0, 1.0)
    assert last["sign_p"] == pytest.approx(0.125)
    assert last["sign_p_holm"] == pytest.approx(0.25)  # two tests; the base's is none
    judged = rows["reward_accuracy", "two/iter00", "one/iter00"]
    assert judged["difference"] == pytest.approx(-1 / 3)
    assert judged["baseline_mean"] == pytest.approx(2 / 3)
    assert "two/iter00 3.0000, one/iter00 2.5000: +0.5000" in text
    made = read_metadata(tmp_path / "out.parquet")
    assert made["stage"] == "compare"
    assert str(second / "evaluation/ours/iter01/scores/total.parquet") in made["inputs"]
    assert len(made["inputs"]) == 7  # five tables of scores, two of held-out pairs
    about = "\n".join(inspect.lines_of(inspect.Args(path=tmp_path / "out.parquet")))
    assert "'<run>/<policy>' of the first run" in about
    told(first, second, capsys, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as file:
        [found] = [
            r
            for r in csv.DictReader(file)
            if r["policy"] == "two/iter00" and r["metric"] == "total"
        ]
    assert float(found["difference"]) == pytest.approx(0.5)


def test_only_prompts_of_the_same_noise_are_paired(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = [*CAPTIONS[2:4], *CAPTIONS[10:12]]
    second = make_run(tmp_path / "two", {"iter00": [4.0, 5.0, 90.0, 90.0]}, captions=captions)
    text = told(first, second, capsys)
    assert "evaluation/ours: prompts: 4, 4; 2 in both" in text
    assert (
        "two/iter00 4.5000, one/iter00 3.5000: +1.0000 [+1.0000, +1.0000], wins 100 % of 2" in text
    )
    assert "two has no config.json" in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seed": 2}, "share fewer than two prompts with the same noise"),
        ({"captions": CAPTIONS[20:24]}, "share fewer than two prompts with the same noise"),
        ({"sampler": {"sampler": "ddpm"}}, "were sampled otherwise"),
        ({"options": {"weights": "elsewhere"}}, "total has other options or weights"),
    ],
)
def test_runs_that_share_nothing_are_told_so_and_why(
    changes: dict[str, Any],
    why: str,
    first: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = make_run(
        tmp_path / "two", {"iter00": [1.0, 2.0, 3.0, 4.0]}, pictures=PICTURES[1:], **changes
    )
    text = told(first, second, capsys, tmp_path / "out.parquet")
    assert "Nothing can be paired: one and two share no evaluation prompt" in text
    assert why in text
    assert "held-out pairs: one and two share 0 of them" in text
    assert len(read_table(tmp_path / "out.parquet", RUN_COMPARISON)) == 0


def test_runs_of_one_name_are_told_apart_by_their_folders(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = make_run(tmp_path / "elsewhere" / "one", {"iter00": [2.0, 3.0, 4.0, 5.0]})
    text = told(first, second, capsys)
    assert f"{second}/iter00 3.5000, {first}/iter00 2.5000: +1.0000" in text


def test_what_is_no_pair_of_runs_is_refused(first: Path, tmp_path: Path) -> None:
    for one, two, message in (
        (first, tmp_path / "none", "none holds no run"),
        (tmp_path, first, "holds no run: expected a folder such as results/shapes"),
        (first, first, "are one run"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main(compare.Args(first=one, second=two))
    second = make_run(tmp_path / "two", {"iter00": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(UserError, match="expected a name that ends in .parquet or .csv"):
        compare.main(compare.Args(first=first, second=second, output=tmp_path / "out.xlsx"))
    (second / "config.json").write_text("[")
    with pytest.raises(ArtifactError, match="config.json is no readable config"):
        compare.main(compare.Args(first=first, second=second))
    scores = second / "evaluation/ours/iter00/scores/total.parquet"
    scores.write_bytes(scores.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="total.parquet is no readable"):
        compare.main(compare.Args(first=first, second=second))
