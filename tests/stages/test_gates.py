"""measure_diversity, check_collapse and start_iteration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import (
    check_collapse,
    generate_evaluation,
    measure_diversity,
    score_holdout,
    select_pairs,
    start_iteration,
)
from stages.core.artifacts.provenance import policy_digest
from stages.core.artifacts.schemas import IMAGES
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from stages.core.evaluation.gates import read_gate
from stages.core.evaluation.guards import Limits
from stages.core.evaluation.perception import lab_levels, perceptual_distance
from stages.core.export.lineage import lineage
from tests.builders import (
    CAPTIONS,
    encoded,
    image_value,
    picture,
    pixels_of,
    prompt_row,
    read_rows,
)

LIMITS = Limits(
    min_reward_accuracy=0.0,
    max_confident_share=1.0,
    min_diversity_share=0.0,
    max_blank_share=1.0,
    max_truncated_share=0.0,
    max_drift=None,
    min_moved_share=0.0,
)


def test_diversity_of_each_prompt_is_that_of_its_pictures_by_brute_force(
    evaluated: dict[str, generate_evaluation.Args], tmp_path: Path
) -> None:
    images = evaluated["iter01"].output
    args = measure_diversity.Args(
        images=(images,), features="perceptual", output=tmp_path / "d.parquet"
    )
    measure_diversity.main(args)
    groups: dict[str, list[np.ndarray]] = {}
    for row in read_rows(images):
        groups.setdefault(row["prompt_id"], []).append(pixels_of(row["image"]))
    rows = read_rows(args.output)
    assert [row["prompt_id"] for row in rows] == sorted(groups)
    for row in rows:
        one, other = groups[row["prompt_id"]]
        root = np.sqrt(np.square(one / 255.0 - other / 255.0).mean())
        assert row["pixel_distance"] == pytest.approx(root)
        seen = perceptual_distance(lab_levels(one), lab_levels(other))
        assert row["feature_distance"] == pytest.approx(seen)
        assert (row["num_images"], row["features"]) == (2, "perceptual")


def test_blank_pictures_are_counted_and_a_single_one_has_no_distance(tmp_path: Path) -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    noisy = np.clip(black + np.random.default_rng(0).normal(4, 1, black.shape), 0, 9)
    pictures = [
        (CAPTIONS[0], black),
        (CAPTIONS[0], noisy.astype(np.uint8)),
        (CAPTIONS[0], picture(CAPTIONS[0])),
        (CAPTIONS[1], picture(CAPTIONS[1])),
    ]
    rows = [
        {
            **prompt_row(caption),
            "candidate": number,
            "seed": 0,
            "image": image_value(encoded(pixels, "PNG")),
        }
        for number, (caption, pixels) in enumerate(pictures)
    ]
    path = tmp_path / "images.parquet"
    write_table(path, rows, IMAGES, stage="generate_evaluation", arguments={})
    args = measure_diversity.Args(
        images=(path,), features="perceptual", output=tmp_path / "d.parquet"
    )
    measure_diversity.main(args)
    found = {row["prompt_id"]: row for row in read_rows(args.output)}
    first, second = (found[prompt_row(caption)["prompt_id"]] for caption in CAPTIONS[:2])
    assert (first["num_images"], first["num_blank"]) == (3, 2)
    assert first["feature_distance"] > 0
    assert (second["num_images"], second["num_blank"]) == (1, 0)
    assert (second["pixel_distance"], second["feature_distance"]) == (None, None)


def test_how_far_a_policy_moved_is_that_of_images_from_the_same_noise(
    evaluated: dict[str, generate_evaluation.Args], tmp_path: Path
) -> None:
    images, base = evaluated["iter01"].output, evaluated["base"].output
    args = measure_diversity.Args(
        images=(images,), base=(base,), features="perceptual", output=tmp_path / "d.parquet"
    )
    measure_diversity.main(args)
    theirs = {(row["prompt_id"], row["seed"]): pixels_of(row["image"]) for row in read_rows(base)}
    moved: dict[str, list[float]] = {}
    for row in read_rows(images):
        gap = pixels_of(row["image"]) / 255 - theirs[row["prompt_id"], row["seed"]] / 255
        moved.setdefault(row["prompt_id"], []).append(float(np.sqrt((gap**2).mean())))
    for row in read_rows(args.output):
        assert row["moved_pixels"] == pytest.approx(np.mean(moved[row["prompt_id"]]))
        assert row["moved_pixels"] > 0
        assert row["moved_features"] > 0

    measure_diversity.main(replace(args, images=(base,)))
    for row in read_rows(args.output):
        assert (row["moved_pixels"], row["moved_features"]) == (0, 0)

    measure_diversity.main(replace(args, base=()))
    for row in read_rows(args.output):
        assert (row["moved_pixels"], row["moved_features"]) == (None, None)


def test_images_from_other_noise_than_the_bases_are_refused(
    evaluated: dict[str, generate_evaluation.Args], tmp_path: Path
) -> None:
    images = evaluated["iter01"].output
    rows = [row | {"seed": row["seed"] + 1} for row in read_rows(images)]
    other = tmp_path / "other.parquet"
    write_table(other, rows, IMAGES, stage="generate_evaluation", arguments={})
    args = measure_diversity.Args(
        images=(images,), base=(other,), features="perceptual", output=tmp_path / "d.parquet"
    )
    with pytest.raises(UserError, match="holds no image of prompt .* from seed .* sample"):
        measure_diversity.main(args)


@pytest.fixture
def gates(
    judged: list[score_holdout.Args],
    diversity: list[measure_diversity.Args],
    selected: select_pairs.Args,
    tmp_path: Path,
) -> tuple[check_collapse.Args, check_collapse.Args]:
    """How iterations 0 and 1 are judged."""
    holdout = [(number, args.output) for number, args in enumerate(judged)]
    seen = [(number, args.output) for number, args in enumerate(diversity)]
    first = check_collapse.Args(
        iteration=0,
        on_collapse="stop",
        limits=LIMITS,
        holdout=(holdout[0],),
        diversity=(seen[0],),
        output=tmp_path / "iter00" / "gate.json",
    )
    second = replace(
        first,
        iteration=1,
        holdout=tuple(holdout),
        diversity=tuple(seen),
        pairs=((1, selected.output),),
        previous=first.output,
        output=tmp_path / "iter01" / "gate.json",
    )
    return first, second


def drift(path: Path) -> float:
    return float(np.mean([row["drift"] for row in read_rows(path)]))


def test_the_gate_closes_where_a_measure_is_beyond_its_limit(
    gates: tuple[check_collapse.Args, check_collapse.Args],
) -> None:
    first, second = gates
    found = [drift(path) for _, path in second.holdout]
    assert found[1] > found[0]  # it was trained on
    between = replace(LIMITS, min_reward_accuracy=-1.0, max_drift=sum(found) / 2)
    check_collapse.main(replace(first, limits=between))
    assert read_gate(first.output).go_on_from == "iter00"
    for on_collapse, go_on_from in (("stop", ""), ("rollback", "iter00")):
        args: Any = replace(second, limits=between, on_collapse=on_collapse)
        check_collapse.main(args)
        gate = read_gate(args.output)
        assert gate.findings == (
            f"iter01 has drifted {found[1]:.3g} from base (limit {between.max_drift:.3g}). "
            "Look at its images before you use it.",
        )
        assert (gate.go_on_from, gate.last_good) == (go_on_from, "iter00")
    record = json.loads(second.output.read_text())
    assert record["sail_stage"] == "check_collapse"
    assert str(second.previous) in record["sail_inputs"]
    assert record["limits"]["max_drift"] == between.max_drift


def test_a_gate_without_diversity_says_that_its_loss_goes_unseen(
    gates: tuple[check_collapse.Args, check_collapse.Args],
    evaluated: dict[str, generate_evaluation.Args],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = replace(gates[0], limits=replace(LIMITS, min_reward_accuracy=-1.0))
    check_collapse.main(first)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    rows = [row for row in read_rows(evaluated["iter00"].output) if row["candidate"] == 0]
    images = tmp_path / "one.parquet"
    write_table(images, rows, IMAGES, stage="generate_evaluation", arguments={})
    single = measure_diversity.Args(
        images=(images,), features="perceptual", output=tmp_path / "d.parquet"
    )
    measure_diversity.main(single)
    check_collapse.main(replace(first, diversity=((0, single.output),)))
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("The diversity of iter00 is not known, so lost diversity goes unseen")
    assert "Set evaluation.images_per_prompt to 2 or more" in said
    assert read_gate(first.output).go_on_from == "iter00"


def start(gate: Path, policies: dict[str, Path], folder: Path) -> start_iteration.Args:
    """Arguments whose policies lie in folders named after them, as a run has them."""
    folders = []
    for name, source in policies.items():
        path = folder / name / "policy"
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(source)
        folders.append(path)
    return start_iteration.Args(gate=gate, policies=tuple(folders), output=folder / "iter02/start")


def test_an_iteration_starts_from_the_policy_that_the_gate_names(
    gates: tuple[check_collapse.Args, check_collapse.Args],
    judged: list[score_holdout.Args],
    tmp_path: Path,
) -> None:
    first, second = gates
    lenient = replace(LIMITS, min_reward_accuracy=-1.0)
    check_collapse.main(replace(first, limits=lenient))
    beyond = replace(lenient, max_drift=drift(second.holdout[1][1]) / 1.0001)
    check_collapse.main(replace(second, limits=beyond, on_collapse="rollback"))
    policies = {f"iter{i:02d}": Path(args.policy) for i, args in enumerate(judged)}
    args = start(second.output, policies, tmp_path)
    start_iteration.main(args)
    assert policy_digest(args.output) == policy_digest(policies["iter00"])
    manifest = json.loads((args.output / "manifest.json").read_text())
    assert (manifest["handed_on"], manifest["kind"]) == ("iter00", "full")
    name = next(iter(manifest["files"]))
    assert (args.output / name).samefile(policies["iter00"] / name)  # no second copy on disk
    assert lineage(args.output) == lineage(policies["iter00"])
    assert lineage(args.output)[-1]["stage"] == "train_seed"
    only = replace(args, policies=args.policies[1:])
    with pytest.raises(UserError, match="goes on from 'iter00'; --policies names iter01"):
        start_iteration.main(only)
    check_collapse.main(replace(second, limits=beyond, on_collapse="stop"))
    with pytest.raises(UserError, match="the run ends after iteration 1.*\n  - iter01 has drifted"):
        start_iteration.main(args)
