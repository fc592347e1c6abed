"""select_prompts keeps sets apart; encode_preferences gives each image its own latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import encode_preferences, import_preferences, join_latents, select_prompts
from stages.core.artifacts.images import decode_image, to_model_input
from stages.core.artifacts.schemas import PAIR_LATENTS
from stages.core.artifacts.tables import read_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.models.adapter import DiffusionModel
from tests.builders import CAPTIONS, read_rows, write_rows


def test_chosen_prompts_share_none_with_the_excluded_and_carry_their_ids(
    prompts: select_prompts.Args,
) -> None:
    rows = read_rows(prompts.output)
    assert len(rows) == 4
    assert all(row["prompt_id"] == prompt_id(row["prompt"]) for row in rows)
    assert not {row["prompt"] for row in rows} & set(CAPTIONS[:8])


def test_preferences_tables_can_be_excluded(
    prompts: select_prompts.Args, imported: import_preferences.Args, tmp_path: Path
) -> None:
    args = replace(
        prompts,
        exclude=(imported.preferences, imported.holdout),
        take=None,
        output=tmp_path / "prompts.parquet",
    )
    select_prompts.main(args)
    used = {row["prompt"] for path in args.exclude for row in read_rows(path)}
    assert {row["prompt"] for row in read_rows(args.output)} == set(CAPTIONS) - used


def test_iterations_take_disjoint_blocks(prompts: select_prompts.Args, tmp_path: Path) -> None:
    found = []
    for skip in (0, 4, 8):
        args = replace(prompts, skip=skip, output=tmp_path / f"{skip}.parquet")
        select_prompts.main(args)
        found += [row["prompt_id"] for row in read_rows(args.output)]
    assert len(set(found)) == len(found) == 12


def test_a_pool_that_is_used_up_is_refused(prompts: select_prompts.Args, tmp_path: Path) -> None:
    args = replace(prompts, exclude=prompts.pool, take=None, output=tmp_path / "p.parquet")
    with pytest.raises(UserError, match="the pool has only 0 that no other set uses"):
        select_prompts.main(args)
    assert not args.output.exists()


def test_unusable_prompts_of_a_pool_are_left_out_and_counted_once(
    prompts: select_prompts.Args, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [None, *CAPTIONS, " ", "x" * 10_001]
    labels = write_rows(tmp_path / "labels.parquet", [{"caption": text} for text in texts])
    args = replace(prompts, pool=(*prompts.pool, labels), output=tmp_path / "prompts.parquet")
    select_prompts.main(args)
    assert read_rows(args.output) == read_rows(prompts.output)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    count = f"3 of {2 * len(CAPTIONS) + 3}"
    assert said == [
        f"select_prompts: {count} prompts of the pool are empty or too long and left out"
    ]
    with pytest.raises(UserError, match="row 0 is empty"):
        select_prompts.main(replace(prompts, exclude=(labels,), output=args.output))


def test_latents_are_those_of_each_image_alone(
    imported: import_preferences.Args, encoded: encode_preferences.Args, model: DiffusionModel
) -> None:
    pairs, latents = read_rows(imported.preferences), read_rows(encoded.output)
    assert [row["pair_id"] for row in latents] == [row["pair_id"] for row in pairs]
    for pair, row in zip(pairs, latents, strict=True):
        for side in ("winner", "loser"):
            image = decode_image(pair[side]["bytes"])
            alone = model.encode_images(torch.from_numpy(to_model_input([image], 64)))
            found = np.array(row[f"{side}_latents"], np.float32)
            np.testing.assert_allclose(found, alone.flatten().numpy(), atol=1e-4)


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards_join_to_the_table_of_one_job(
    encoded: encode_preferences.Args, tmp_path: Path, num_shards: int
) -> None:
    """With 2 both have several batches; of 5 some have none."""
    shards = [tmp_path / f"shard-{number}.parquet" for number in range(num_shards)]
    for number, path in enumerate(shards):
        encode_preferences.main(replace(encoded, shard=number, num_shards=num_shards, output=path))
    counts = [len(read_rows(path)) for path in shards]
    assert sum(counts) == len(read_rows(encoded.output))
    assert min(counts) < max(counts)
    joined = join_latents.Args(
        preferences=encoded.preferences, shards=tuple(shards), batch=encoded.batch,
        output=tmp_path / "joined.parquet",
    )  # fmt: skip
    join_latents.main(joined)
    whole, found = (read_table(path, PAIR_LATENTS) for path in (encoded.output, joined.output))
    assert found.equals(whole)
    for wrong in (shards[1:], [*shards, shards[0]], shards[::-1]):
        with pytest.raises(UserError, match="does not list the same pairs"):
            join_latents.main(replace(joined, shards=tuple(wrong), output=tmp_path / "wrong"))
        assert not (tmp_path / "wrong").exists()


def test_a_shard_that_there_is_not_is_refused(
    encoded: encode_preferences.Args, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--shard must be between 0 and 1, found 2"):
        encode_preferences.main(
            replace(encoded, shard=2, num_shards=2, output=tmp_path / "latents.parquet")
        )
