"""Mixup of generated and human pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from stages import encode_preferences, import_preferences, mix_preferences, select_pairs
from stages.core.errors import UserError
from tests.builders import read_rows


def sources(path: Path) -> Counter[str]:
    return Counter(row["source"] for row in read_rows(path))


@pytest.mark.parametrize(("seed_fraction", "num_human"), [(0.0, 0), (0.25, 1), (0.5, 4), (0.9, 4)])
def test_all_generated_pairs_are_kept_and_the_share_of_human_ones_is_asked_for(
    mixed: mix_preferences.Args, tmp_path: Path, seed_fraction: float, num_human: int
) -> None:
    args = replace(mixed, seed_fraction=seed_fraction, output=tmp_path / "mix.parquet")
    mix_preferences.main(args)
    found = sources(args.output)
    assert found["generated"] == 4
    assert found["human"] == num_human  # 0.9 would be 36: all four are used


def test_every_row_comes_with_its_own_images_and_latents(
    mixed: mix_preferences.Args,
    selected: select_pairs.Args,
    imported: import_preferences.Args,
    encoded: encode_preferences.Args,
    tmp_path: Path,
) -> None:
    args = replace(mixed, seed_fraction=0.5, output=tmp_path / "mix.parquet")
    mix_preferences.main(args)
    rows = {row["pair_id"]: row for row in read_rows(args.output)}
    assert len(rows) == 8
    for row in read_rows(selected.output):
        assert rows[row["pair_id"]] == row
    latents = {row["pair_id"]: row for row in read_rows(encoded.output)}
    for row in read_rows(imported.preferences):
        assert rows[row["pair_id"]] == {**row, **latents[row["pair_id"]]}


def test_seed_and_iteration_decide_which_human_pairs_join(
    mixed: mix_preferences.Args, tmp_path: Path
) -> None:
    found = []
    for iteration in (1, 1, 2, 3, 4, 5):
        args = replace(mixed, iteration=iteration, output=tmp_path / "mix.parquet")
        mix_preferences.main(args)
        found.append([r["pair_id"] for r in read_rows(args.output) if r["source"] == "human"])
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_latents_of_other_pairs_are_refused(
    mixed: mix_preferences.Args, imported: import_preferences.Args, tmp_path: Path
) -> None:
    args = replace(
        mixed, preferences=imported.holdout, seed_fraction=0.5, output=tmp_path / "mix.parquet"
    )
    with pytest.raises(UserError, match="does not list the same pairs"):
        mix_preferences.main(args)
    assert not args.output.exists()
