"""Labels of the embedded world: who wins, ties, errors; and captions that no two sets share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages import import_preferences
from stages.core.errors import UserError
from stages.core.policies.generation import SamplingSettings
from stages.shapes import make_preferences, split_captions
from stages.shapes.captions import open_captions
from stages.shapes.oracle import total
from tests.builders import CAPTIONS, pixels_of, settings


@pytest.fixture
def args(tiny_base: str, tmp_path: Path) -> make_preferences.Args:
    """Two captions, two pairs each, labelled without an error."""
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS[:3]) + "\n")
    return make_preferences.Args(
        captions=captions,
        model=settings(tiny_base),
        settings=SamplingSettings(sampler="ddim", num_inference_steps=2, guidance_scale=3.0),
        pairs_per_caption=2,
        label_temperature=0.0,
        tie_below=0.0,
        seed=0,
        output=tmp_path / "human.parquet",
    )


def test_labels_without_temperature_are_those_of_the_taste(args: make_preferences.Args) -> None:
    make_preferences.main(args)
    rows = pq.read_table(args.output).to_pylist()
    assert [row["caption"] for row in rows] == [c for c in CAPTIONS[:3] for _ in range(2)]
    for row in rows:
        images = [pixels_of({"bytes": row[f"jpg_{side}"]}) for side in (0, 1)]
        taste = total(np.stack(images).astype(np.float32) / 255, [row["caption"]] * 2)
        if abs(taste[0] - taste[1]) > 0.05:  # JPEG blurs what was labelled
            assert row["label_0"] == float(taste[0] > taste[1])
        assert row["label_0"] + row["label_1"] == 1


def test_what_it_writes_can_be_imported(args: make_preferences.Args, tmp_path: Path) -> None:
    make_preferences.main(args)
    import_preferences.main(
        import_preferences.Args(
            files=(args.output,),
            num_pairs=None,
            num_holdout=1,
            seed=0,
            preferences=tmp_path / "p.parquet",
            holdout=tmp_path / "h.parquet",
            summary=tmp_path / "s.json",
        )
    )
    assert pq.read_metadata(tmp_path / "p.parquet").num_rows == 4


def test_the_coin_errs_as_bradley_and_terry_say(args: make_preferences.Args) -> None:
    warm = replace(args, label_temperature=0.5)
    first, second = np.full(20_000, 0.5), np.zeros(20_000)
    labels, is_wrong = make_preferences.label(first, second, warm)
    expected = 1 / (1 + np.exp(-0.5 / 0.5))
    assert labels.mean() == pytest.approx(expected, abs=0.015)
    assert is_wrong.mean() == pytest.approx(1 - expected, abs=0.015)


def test_near_equal_pictures_are_ties(args: make_preferences.Args) -> None:
    taste = np.array([1.0, 1.04, 1.2])
    labels, _ = make_preferences.label(taste, np.ones(3), replace(args, tie_below=0.05))
    assert labels.tolist() == [0.5, 0.5, 1.0]


def split(folder: Path, **changes: object) -> list[list[str]]:
    values: dict[str, object] = {"seed": 0, "num_seed_captions": 100, "evaluation_fold": "report"}
    names = ("seed_captions", "pool", "evaluation")
    paths = {name: folder / f"{name}.txt" for name in names}
    split_captions.main(split_captions.Args(**{**values, **changes}, **paths))  # type: ignore[arg-type]
    return [paths[name].read_text().splitlines() for name in names]


def test_seed_captions_pool_and_both_folds_share_nothing_and_miss_nothing(tmp_path: Path) -> None:
    seed, pool, report = split(tmp_path)
    _, _, tuning = split(tmp_path, evaluation_fold="tuning")
    assert [len(part) for part in (seed, pool, report, tuning)] == [100, 580, 200, 200]
    assert sorted(seed + pool + report + tuning) == sorted(
        str(caption) for caption in open_captions()
    )


def test_the_run_seed_moves_the_seed_captions_and_not_the_evaluation(tmp_path: Path) -> None:
    seed, _, report = split(tmp_path)
    other_seed, _, other_report = split(tmp_path, seed=1)
    assert seed != other_seed
    assert report == other_report


def test_fewer_evaluation_captions_are_the_folds_first_and_change_nothing_else(
    tmp_path: Path,
) -> None:
    seed, pool, report = split(tmp_path)
    assert split(tmp_path, num_evaluation_captions=7) == [seed, pool, report[:7]]


@pytest.mark.parametrize("number", [0, 201])
def test_evaluation_captions_that_a_fold_does_not_have_are_refused(
    tmp_path: Path, number: int
) -> None:
    with pytest.raises(UserError, match=f"between 1 and 200, found {number}"):
        split(tmp_path, num_evaluation_captions=number)


@pytest.mark.parametrize("number", [0, 680])
def test_captions_for_everyone_or_no_one_are_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"between 1 and 679, found {number}"):
        split(tmp_path, num_seed_captions=number)
