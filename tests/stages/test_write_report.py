"""The report of made-up tables: what it says, what it refuses, and how large it grows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.core.artifacts.schemas import IMAGES
from stages.core.errors import UserError
from stages.write_report import Args, main
from tests.builders import encoded
from tests.report_inputs import colour, evaluation_images, put, report_inputs
from tests.security.test_pages import Page

MOST_BYTES = 30_000_000


def page_of(args: Args) -> str:
    main(args)
    return args.output.read_text(encoding="utf-8")


def looks(page: str) -> list[str]:
    """The figures that compare pictures, as text."""
    return re.findall(r'<figure class="card look.*?</figure>', page, re.DOTALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Args:
    return report_inputs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(made: Args) -> str:
    return page_of(made)


def test_the_head_names_the_policy_to_use_and_what_was_run(page: str) -> None:
    Page(page).check()
    head = page[: page.index('<section id="images">')]
    assert "<h2>Use iter02</h2>" in head
    assert "It is the last policy, it is clearly higher than base on pickscore" in head
    for text in (
        "my/model", "12 trained on, 8 held out", "2 of 12 pairs, of 8 candidates a prompt",
        "20 prompts of mine, 2 images each", "No clear change of the judge",
        "exact paired test p = 0.400",
    ):  # fmt: skip
        assert text in head, text
    strip = looks(head)
    assert len(strip) == 4
    for look in strip:
        assert look.count("<img") == 4
        assert look.count('extra"><img') == 2  # base and iter02 are side by side


def test_gains_and_losses_show_the_scores_of_every_image(page: str) -> None:
    part = page[page.index('<section id="changes">') : page.index('<section id="pairs">')]
    gained, lost = part.split("Lost most")
    assert [re.search(r"prompt (\d+)", look)[1] for look in looks(gained)] == [  # type: ignore[index]
        "19", "18", "17", "16",
    ]  # fmt: skip
    assert [re.search(r"prompt (\d+)", look)[1] for look in looks(lost)] == [  # type: ignore[index]
        "0", "1",
    ]  # fmt: skip
    assert "image 0: 20.00 to 22.55" in looks(gained)[0]
    assert "+2.55 on average of 2 images" in looks(gained)[0]


def test_pairs_for_audit_are_marked_and_held_out_ones_that_are_wrong_are_shown(page: str) -> None:
    part = page[page.index("<h3>Best and worst") : page.index('<section id="guards">')]
    audit = [look for look in looks(part) if "⚑" in look]
    assert len(audit) == 2 * 3
    assert "own prompt 3 of iteration 1" in audit[2]
    assert "0.0 standard errors" in audit[2]
    wrong = page[page.index("Held-out pairs that") : page.index("<h3>Human pairs")]
    assert "iter02 gets 8 of 12 held-out pairs wrong" in wrong
    assert [re.search(r"human prompt (\d+)", look)[1] for look in looks(wrong)] == [  # type: ignore[index]
        "11", "10", "9",
    ]  # fmt: skip


def test_without_logs_and_record_no_time_is_told_and_with_them_it_is(
    made: Args, tmp_path: Path
) -> None:
    output = tmp_path / "report.html"
    plain = page_of(replace(made, output=output))
    assert "class=clock" not in plain
    (tmp_path / "update_policy.tsv").write_text("s\th:m:s\n7200\t2:00:00\n")
    (tmp_path / "record.json").write_text(json.dumps({"made_with": {"commit": "0123456789ab"}}))
    timed = page_of(
        replace(
            made, output=output, logs=tmp_path, record=tmp_path / "record.json", training_gpus=3
        )
    )
    assert "6.0 h in 1 timed jobs: update_policy 6.0 h" in timed
    assert "commit 0123456789ab" in timed
    assert re.sub(r"<(dt|dd) class=clock>.*?</\1>\n?", "", timed) == plain


def test_images_and_scores_are_those_of_the_policies(made: Args) -> None:
    with pytest.raises(UserError, match="--images names files of base, iter00, iter01, and --poli"):
        main(replace(made, images=made.images[:-1]))
    with pytest.raises(UserError, match="--scores names files of iter02"):
        main(replace(made, scores=made.scores[-1:]))


def test_images_of_other_noise_are_refused(made: Args, tmp_path: Path) -> None:
    table = evaluation_images(20, [colour(1)])
    seeds = table.column("seed").to_numpy() + 1
    other = table.set_column(table.column_names.index("seed"), "seed", [seeds])
    path = put(tmp_path / "other.parquet", other, IMAGES)
    with pytest.raises(
        UserError, match="has seed 1 in the evaluation images of iter02, and seed 0"
    ):
        main(replace(made, images=(*made.images[:-1], ("iter02", path))))
    fewer = put(tmp_path / "fewer.parquet", table.slice(0, 2), IMAGES)
    with pytest.raises(UserError, match="has no such image in the evaluation images of iter02"):
        main(replace(made, images=(*made.images[:-1], ("iter02", fewer))))


def test_held_out_pairs_that_are_not_there_are_named(made: Args) -> None:
    with pytest.raises(UserError, match="has no pair 'human-0-11', which iter02 judged"):
        main(replace(made, holdout=made.pairs[0]))


@pytest.mark.slow
def test_a_page_of_large_pictures_and_many_iterations_stays_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    images = [encoded(noise.integers(0, 255, (640, 640, 3), np.uint8), "JPEG") for _ in range(3)]
    few = report_inputs(tmp_path, num_prompts=16, num_iterations=8, num_pairs=8, images=images)
    assert len(page_of(few).encode()) < MOST_BYTES


@pytest.mark.slow
def test_the_page_does_not_grow_with_the_prompts(tmp_path: Path) -> None:
    sizes = []
    for number in (100, 20_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        args = report_inputs(folder, num_prompts=number, num_iterations=1, num_pairs=number)
        sizes.append(len(page_of(args).encode()))
    assert sizes[1] < MOST_BYTES
    assert abs(sizes[1] - sizes[0]) < 20_000
