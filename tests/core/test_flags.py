"""Flags survive the shell: splitting them as it does gives back every value."""

from __future__ import annotations

import shlex

from stages.core.plan.flags import flags, numbered, tables

HOSTILE = ["a b", "$HOME", "`id`", "it's", '"quoted"', "; rm -rf /", "é\n*", "", "{x}", "\\"]


def test_hostile_values_come_back_from_the_shells_words() -> None:
    for value in HOSTILE:
        assert shlex.split(flags({"name": value})) == ["--name", value]


def test_a_list_is_one_flag_with_one_word_a_value() -> None:
    assert shlex.split(flags({"files": HOSTILE})) == ["--files", *HOSTILE]
    assert flags({"files": []}) == "--files"


def test_names_are_sorted_dashed_and_nested_under_the_prefix() -> None:
    values = {"num_draws": 10, "dpo_beta": 5000.0, "reencode": False, "take": None}
    assert flags(values, "my_settings") == (
        "--my-settings.dpo-beta 5000.0 --my-settings.num-draws 10 "
        "--my-settings.reencode False --my-settings.take None"
    )
    assert flags({"num_draws": 10}) == "--num-draws 10"


def test_rows_of_words_and_files_become_one_flag_row_by_row() -> None:
    assert shlex.split(numbered("candidate_scores", [(1, "a b"), (2, "c")])) == [
        "--candidate-scores", "1", "a b", "2", "c",
    ]  # fmt: skip
    assert numbered("rewards", []) == "--rewards"


def test_flags_of_tables_are_sorted_and_those_without_rows_are_left_out() -> None:
    found = tables(scores=[("set", "base", "s")], others=[], prompts=[("set", "p"), ("own", "q")])
    assert found == "--prompts set p own q --scores set base s"
    assert tables(scores=[]) == ""
