"""What each labeller sees next, whatever the others do, and what an answer and an undo change."""

from __future__ import annotations

import random
from pathlib import Path
from threading import Thread

import pytest

from stages.core.labelling import desk as module
from stages.core.pages.journal import read_journal
from tests.builders import encoded, picture
from tests.labelling.builders import answer_all, open_desk, write_images


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_images(tmp_path / "images", 20)]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_one_labeller_is_asked_about_every_pair_once(images: list[Path], journal: Path) -> None:
    with open_desk(images, journal) as desk:
        keys = answer_all(desk, "ann")
        assert sorted(keys) == sorted(pair.key for pair in desk.pairs)
        assert desk.current("ann") is None
        progress = desk.progress("ann")
        assert (progress.num_mine, progress.num_left, progress.num_labelled) == (20, 0, 20)
        assert not desk.answer("ann", keys[0], "left")
    assert len(read_journal(journal)) == 20


def test_several_labellers_share_the_pairs_and_all_judge_the_common_ones(
    images: list[Path], journal: Path
) -> None:
    rng = random.Random(0)
    with open_desk(images, journal, share=0.2) as desk:
        common = {pair.key for pair in desk.pairs if pair.is_common}
        assert len(common) == 4
        seen: dict[str, list[str]] = {"ann": [], "bob": [], "eve": []}
        waiting = list(seen)
        while waiting:
            labeller = rng.choice(waiting)
            keys = answer_all(desk, labeller, at_most=1)
            seen[labeller] += keys
            if not keys:
                waiting.remove(labeller)
        for keys in seen.values():
            assert len(set(keys)) == len(keys)
            assert common <= set(keys)
        others = [key for keys in seen.values() for key in keys if key not in common]
        assert sorted(others) == sorted(pair.key for pair in desk.pairs if not pair.is_common)


def test_common_pairs_come_evenly_and_in_one_order_so_that_agreement_shows_early(
    images: list[Path], journal: Path
) -> None:
    with open_desk(images, journal, share=0.2) as desk:
        common = [pair.key for pair in desk.pairs if pair.is_common]
        for labeller in ("ann", "bob"):
            keys = answer_all(desk, labeller, at_most=10)
            assert [keys.index(key) for key in common[:2]] == [4, 9]


def test_a_pair_that_one_labeller_sees_is_shown_to_no_other_until_it_was_left_for_long(
    images: list[Path], journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_desk(images, journal, share=0.0) as desk:
        seen = desk.current("ann")
        assert seen is not None
        assert seen.pair.key not in answer_all(desk, "bob")
        monkeypatch.setattr(module, "RESERVED_SECONDS", 0.0)
        assert answer_all(desk, "bob") == [seen.pair.key]


def test_two_windows_of_one_labeller_see_one_pair_and_only_the_first_answer_counts(
    images: list[Path], journal: Path
) -> None:
    with open_desk(images, journal) as desk:
        one, other = desk.current("ann"), desk.current("ann")
        assert one is not None
        assert other is not None
        assert one.pair.key == other.pair.key
        assert desk.answer("ann", one.pair.key, "left")
        assert not desk.answer("ann", other.pair.key, "right")
        assert [answer.choice for answer in desk.answers()] == ["left"]


def test_answers_at_the_same_time_are_written_once_each(images: list[Path], journal: Path) -> None:
    with open_desk(images, journal, share=0.0) as desk:
        done: list[list[str]] = []
        threads = [
            Thread(target=lambda who=who: done.append(answer_all(desk, who))) for who in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(key for keys in done for key in keys) == sorted(p.key for p in desk.pairs)
    assert len(read_journal(journal)) == 20


def test_undo_takes_back_as_many_as_there_are_and_shows_each_pair_again(
    images: list[Path], journal: Path
) -> None:
    with open_desk(images, journal) as desk:
        keys = answer_all(desk, "ann", at_most=3)
        answer_all(desk, "bob", at_most=1)
        for key in reversed(keys):
            assert desk.undo("ann")
            shown = desk.current("ann")
            assert shown is not None
            assert shown.pair.key == key
        assert not desk.undo("ann")
        assert [answer.labeller for answer in desk.answers()] == ["bob"]
        assert answer_all(desk, "ann", "right", at_most=3) == keys
    assert [("undoes" in entry) for entry in read_journal(journal)] == (
        [False] * 4 + [True] * 3 + [False] * 3
    )


def test_a_new_start_goes_on_where_the_last_one_ended(images: list[Path], journal: Path) -> None:
    with open_desk(images, journal) as desk:
        whole = answer_all(desk, "ann")
    journal.unlink()
    keys = []
    for _ in range(20):
        with open_desk(images, journal) as desk:
            keys += answer_all(desk, "ann", at_most=1)
            upcoming, shown = desk.upcoming("ann"), desk.current("ann")
            assert (shown and shown.pair.key) == (whole[len(keys)] if len(keys) < 20 else None)
            del upcoming
    assert keys == whole


def test_what_comes_next_is_told_beforehand(images: list[Path], journal: Path) -> None:
    with open_desk(images, journal, share=0.3) as desk:
        expected = None
        while (shown := desk.current("ann")) is not None:
            if expected is not None:
                assert shown.pair.key == expected
            upcoming = desk.upcoming("ann")
            expected = upcoming.pair.key if upcoming else None
            desk.answer("ann", shown.pair.key, "left")
        assert expected is None


def test_a_skipped_pair_is_left_for_the_others_and_counts_for_nothing(
    images: list[Path], journal: Path
) -> None:
    with open_desk(images, journal, share=0.0) as desk:
        keys = answer_all(desk, "ann", "skip")
        assert len(keys) == 20
        progress = desk.progress("ann")
        assert (progress.num_mine, progress.num_labelled, progress.num_left) == (20, 0, 0)
        assert sorted(answer_all(desk, "bob")) == sorted(keys)


def test_the_side_shown_is_the_side_written_down(images: list[Path], journal: Path) -> None:
    with open_desk(images, journal) as desk:
        answer_all(desk, "ann")
        for answer in desk.answers():
            pair = next(pair for pair in desk.pairs if pair.key == answer.pair)
            left, right = pair.sides("ann")
            assert (answer.left.name, answer.right.name) == (left.name, right.name)
            assert answer.left.digest == desk.gallery.picture(left).digest
        assert len({answer.left.name[-5] for answer in desk.answers()}) == 2


def test_an_answer_about_an_image_that_has_changed_or_gone_does_not_count_and_is_asked_again(
    images: list[Path], journal: Path
) -> None:
    with open_desk(images, journal) as desk:
        keys = answer_all(desk, "ann")
        changed, gone = (pair for pair in desk.pairs if pair.key in keys[:2])
    changed.first.file.write_bytes(encoded(picture(changed.prompt, strength=0.3), "PNG"))
    gone.second.file.unlink()
    (gone.second.file.parent / "new.png").write_bytes(
        encoded(picture(gone.prompt, strength=0.7), "PNG")
    )
    with open_desk(images, journal) as desk:
        assert len(desk.stale) == 2
        assert len(desk.answers()) == 18
        again = answer_all(desk, "ann")
        assert changed.key in again
        assert gone.key not in again
        assert len(again) == 2
        assert desk.undo("ann")


def test_pairs_that_cannot_be_shown_are_left_out_with_their_reason(
    images: list[Path], journal: Path
) -> None:
    folders = sorted(images[0].iterdir())
    whole = (folders[0] / "0.png").read_bytes()
    (folders[0] / "1.png").write_bytes(whole)
    (folders[1] / "0.png").write_bytes(whole[: len(whole) // 2])
    (folders[2] / "0.png").write_bytes(encoded(picture("an orange ring")[:8, :8], "PNG"))
    with open_desk(images, journal) as desk:
        (folders[3] / "1.png").unlink()
        assert len(answer_all(desk, "ann")) == 16
        reasons = sorted(desk.unusable.values())
        assert any("are the same image" in reason for reason in reasons)
        for folder, what in ((1, "no readable image"), (2, "8 x 8 pixels"), (3, "No such file")):
            assert any(f"prompt-{folder:03d}" in text and what in text for text in reasons), reasons
        assert desk.progress("ann").num_left == 0
