"""Sets of images that people rank: which are drawn, what a key and a journal line say, what becomes of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from stages.core.artifacts.schemas import HUMAN_RANKINGS
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.core.labelling.answers import Answer, Side, check_ranks, read_answers
from stages.core.labelling.export import Exported, write_labels
from stages.core.labelling.measures import agreement, first_share
from stages.core.pages.journal import read_journal
from tests.builders import CAPTIONS, encoded, picture
from tests.labelling.builders import START, open_desk, write_images
from tests.labelling.test_export import imported
from tests.labelling.test_page import check, client_of, pair_on, post
from tests.labelling.test_pairs import pairs, prompts


def ranking(pair: str, labeller: str, *ranks: int, turn: int = 0, choice: str = "ranked") -> Answer:
    """An answer that ranks the images a, b, c ...; `turn` of them stand at the end and not first."""
    sides = [
        Side(f"{pair}-{letter}", letter * 32) for letter, _ in zip("abcd", ranks, strict=False)
    ]
    order = [*range(turn, len(ranks)), *range(turn)]
    return Answer(
        labeller, pair, "a kite", tuple(sides[at] for at in order), choice, START, True,
        is_ranking=True, ranks=tuple(ranks[at] for at in order) if choice == "ranked" else (),
    )  # fmt: skip


def ordinal_alpha(units: list[list[float]]) -> float:
    """Krippendorff (2011), C: alpha = 1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck, ordinal d."""
    units = [values for values in units if len(values) > 1]
    categories = sorted({value for values in units for value in values})
    at = {value: place for place, value in enumerate(categories)}
    coincidences = np.zeros((len(at), len(at)))
    for values in units:
        for one, first in enumerate(values):
            for other, second in enumerate(values):
                if one != other:
                    coincidences[at[first], at[second]] += 1 / (len(values) - 1)
    counts = coincidences.sum(axis=1)
    apart = np.zeros_like(coincidences)
    for low, high in combinations(range(len(at)), 2):
        between = counts[low : high + 1].sum() - (counts[low] + counts[high]) / 2
        apart[low, high] = apart[high, low] = between**2
    expected = (np.outer(counts, counts) * apart).sum()
    return float(1 - (counts.sum() - 1) * (coincidences * apart).sum() / expected)


def test_a_prompts_sets_share_no_image_and_the_last_may_be_smaller() -> None:
    drawn = pairs(30, 7, images_shown=4, pairs_per_prompt=9)
    assert len({pair.key for pair in drawn}) == len(drawn) == 60
    assert all(pair.is_ranked for pair in drawn)
    by_prompt: dict[str, list[str]] = {}
    for pair in drawn:
        by_prompt.setdefault(pair.prompt, []).extend(place.name for place in pair.places)
    for names in by_prompt.values():
        assert len(set(names)) == len(names) == 7
    assert Counter(len(pair.places) for pair in drawn) == {4: 30, 3: 30}
    assert {len(pair.places) for pair in pairs(5, 5, images_shown=4, pairs_per_prompt=9)} == {4}
    assert {len(pair.places) for pair in pairs(5, 2, images_shown=4)} == {2}
    assert drawn == pairs(30, 7, images_shown=4, pairs_per_prompt=9)


@pytest.mark.slow
def test_which_images_a_set_has_and_where_each_stands_is_chance() -> None:
    drawn = pairs(3000, 8, images_shown=4)
    chosen = Counter(place.name[-5] for pair in drawn for place in pair.places)
    assert all(binomtest(count, 3000, 0.5).pvalue > 0.001 for count in chosen.values())
    whole = list(pairs(3000, 4, images_shown=4))
    for labeller in ("ann", "bob"):
        sides = [pair.sides(labeller) for pair in whole]
        for place in range(4):
            stands = Counter(images[place].name[-5] for images in sides)
            assert all(binomtest(stands[image], 3000, 0.25).pvalue > 0.001 for image in "0123")
    assert whole[0].sides("ann") == whole[0].sides("ann")
    assert {place.name for place in whole[0].sides("ann")} == {
        place.name for place in prompts(3000, 4)[int(whole[0].prompt.split()[1])].places
    }


def test_alpha_of_ranks_worked_by_hand() -> None:
    # Values by image: (1, 1), (2, 3), (3, 2); each rank stands twice. o23 = o32 = 2, d12 = d23 = 4,
    # d13 = 16: alpha = 1 - 5 * 16 / 192. Two of three pairs of images are judged alike.
    found = agreement([ranking("one", "ann", 1, 2, 3), ranking("one", "bob", 1, 3, 2, turn=1)])
    assert (found.num_pairs, found.num_labellers, found.is_ordinal) == (1, 2, True)
    assert found.alpha == pytest.approx(1 - 5 * 16 / 192)
    assert found.raw == pytest.approx(2 / 3)


def test_alpha_of_ranks_with_ties_three_labellers_and_sets_that_one_skipped() -> None:
    given = [
        ranking("one", "ann", 1, 2, 2, 3), ranking("one", "bob", 2, 1, 3, 4, turn=2),
        ranking("one", "eve", 1, 1, 1, 2),
        ranking("two", "ann", 1, 2, 3, 4, choice="all_bad"), ranking("two", "eve", 4, 3, 2, 1),
        ranking("three", "bob", 1, 2, 3, 4), ranking("three", "ann", 1, 2, choice="skip"),
    ]  # fmt: skip
    found = agreement(given)
    means = [[1, 2, 2], [2.5, 1, 2], [2.5, 3, 2], [4, 4, 4]]
    means += [[2.5, mean] for mean in (4, 3, 2, 1)]
    assert found.alpha == pytest.approx(ordinal_alpha(means))
    assert (found.num_pairs, found.num_labellers) == (2, 3)
    # By pairs of images ab ac ad bc bd cd: ann 1 1 1 = 1 1, bob 2 1 1 1 1 1, eve = = 1 = 1 1; of set
    # two ann says =, eve 2, of all six.
    assert found.raw == pytest.approx((4 + 4 + 3 + 0) / 24)


def test_a_favourite_place_is_one_that_is_called_the_best_more_often_than_by_chance() -> None:
    firsts = [ranking(f"set{n}", "ann", 1, 2, 3, 4) for n in range(6)]
    others = [ranking(f"more{n}", "ann", 1, 2, 3, 4, turn=1) for n in range(4)]
    ties = [ranking("tie", "ann", 1, 1, 2), ranking("bad", "ann", 1, 2, choice="all_bad")]
    found = first_share([*firsts, *others, *ties])
    assert found is not None
    assert (found.num_choices, found.share, found.expected) == (10, 0.6, 0.25)
    assert found.is_biased
    fair = first_share([*firsts[:1], *others])
    assert fair is not None
    assert not fair.is_biased


@pytest.mark.parametrize(
    ("ranks", "is_right"),
    [([1, 2, 3, 4], True), ([1, 1, 1, 1], True), ([2, 1, 2, 3], True), ([1, 2, 3], False),
     ([1, 2, 4, 4], False), ([0, 1, 2, 3], False), ([1, 2, 3, 4.0], False), ([True, 2, 3, 4], False),
     ("1234", False), (None, False), ([1, 2, [3], 4], False)],
)  # fmt: skip
def test_what_ranks_are(ranks: object, is_right: bool) -> None:
    assert (check_ranks(ranks, 4) is not None) == is_right


def test_a_ranking_comes_back_from_its_entry_and_a_wrong_one_is_refused() -> None:
    given = ranking("one", "ann", 2, 1, 2, turn=2)
    skipped = ranking("two", "ann", 1, 2, choice="skip")
    entries = [given.to_entry(), skipped.to_entry()]
    assert read_answers(Path("answers.jsonl"), entries) == {0: given, 1: skipped}
    for change in ({"ranks": [1, 3, 4]}, {"answer": "left"}, {"images": []}):
        with pytest.raises(UserError, match=r"answers.jsonl, line 1 is no answer"):
            read_answers(Path("answers.jsonl"), [{**given.to_entry(), **change}])


def by_truth(names: list[str]) -> list[int]:
    """Ranks by the number in each file's name: 0 is the sharpest."""
    order = sorted(names)
    return [order.index(name) + 1 for name in names]


def test_what_people_ranked_is_what_the_import_reads(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 5, 4), tmp_path / "answers.jsonl"
    with open_desk([images], journal, show=4, share=0.0) as desk:
        for number in range(5):
            shown = desk.current("ann")
            assert shown is not None
            ranks = by_truth([place.name for place in shown.pair.sides("ann")])
            ties = [min(rank, 3) for rank in ranks]
            choice, given = [("ranked", ranks), ("ranked", ties), ("all_bad", []), ("skip", []),
                             ("ranked", ranks)][number]  # fmt: skip
            assert desk.answer("ann", shown.pair.key, choice, tuple(given))
        assert desk.current("ann") is None
        path = tmp_path / "labels.parquet"
        done = write_labels(path, desk.gallery, desk.answers(), arguments={}, journal=journal)
    assert done == Exported(rankings=3, both_bad=1, skipped=1)
    assert "3 rankings; left out are 1 sets of which all are bad and 1 that were skipped" in str(
        done
    )
    assert len(read_table(path, HUMAN_RANKINGS)) == 3
    rows, report = imported(tmp_path, path, num_holdout=6)
    assert (report["layout"], report["ties_dropped"], len(rows)) == ("rankings", 1, 6 + 5 + 6)
    folders = {(folder / "prompt.txt").read_text().strip(): folder for folder in images.iterdir()}
    for row in rows:
        numbers = {
            file.read_bytes(): int(file.stem) for file in folders[row["prompt"]].glob("*.png")
        }
        assert numbers[row["winner"]["bytes"]] < numbers[row["loser"]["bytes"]]


def test_a_changed_image_makes_a_ranking_stale(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 2, 3), tmp_path / "answers.jsonl"
    with open_desk([images], journal, show=3) as desk:
        for _ in range(2):
            shown = desk.current("ann")
            assert shown is not None
            desk.answer("ann", shown.pair.key, "ranked", (1, 2, 3))
        answers = desk.answers()
        changed = images / answers[0].shown[2].name
        changed.write_bytes(encoded(picture(CAPTIONS[5]), "PNG"))
        path = tmp_path / "labels.parquet"
        done = write_labels(path, desk.gallery, answers, arguments={}, journal=journal)
    assert (done.rankings, done.stale) == (1, 1)
    with open_desk([images], journal, show=3) as desk:
        assert len(desk.stale) == 1
        shown = desk.current("ann")
        assert shown is not None
        assert shown.pair.key == answers[0].pair
        assert desk.undo("ann")


def test_a_set_with_one_image_twice_is_left_out(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2, 4)
    folder = images / "prompt-000"
    (folder / "3.png").write_bytes((folder / "1.png").read_bytes())
    with open_desk([images], tmp_path / "answers.jsonl", show=4) as desk:
        shown = desk.current("ann")
        assert shown is not None
        desk.answer("ann", shown.pair.key, "skip")
        assert desk.current("ann") is None
        [reason] = desk.unusable.values()
    assert "prompt-000/1.png" in reason
    assert "prompt-000/3.png are the same image" in reason


def test_the_page_shows_a_set_and_takes_its_order(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 4, 4), tmp_path / "answers.jsonl"
    with open_desk([images], journal, show=4, share=1.0) as desk, client_of(desk) as client:
        assert "Which image is best?" in client.get("/").text
        source = client.get("/", params={"labeller": "ann"}).text
        check(source)
        assert source.count("data-place=") == 4
        for wrong in ([1, 2, 3], [1, 1, 3, 3], "best", None):
            told = post(client, "/answer", labeller="ann", pair=pair_on(source), answer="ranked", ranks=wrong)  # fmt: skip
            assert "nothing was written down" in told.text
        for choice in ("left", "tie", "both_bad"):
            told = post(client, "/answer", labeller="ann", pair=pair_on(source), answer=choice)
            assert "nothing was written down" in told.text
        assert read_journal(journal) == []
        for who in ("ann", "bob"):
            source = client.get("/", params={"labeller": who}).text
            for ranks in ([2, 1, 3, 3], [1, 2, 3, 4]):
                asked: dict[str, Any] = {"answer": "ranked", "ranks": ranks}
                source = post(client, "/answer", labeller=who, pair=pair_on(source), **asked).text
        text = " ".join(source.split())
        assert (
            "verdicts on 2 sets that 2 people judged are equal; Krippendorff's alpha of the ranks"
            in text
        )
        assert re.search(r"of 2 times \(95 % interval [^)]*; by chance 25 %\)", text), text
    entries = read_journal(journal)
    assert [entry["ranks"] for entry in entries] == [[2, 1, 3, 3], [1, 2, 3, 4]] * 2
    assert all(len(entry["images"]) == 4 for entry in entries)
    assert json.dumps(entries)
