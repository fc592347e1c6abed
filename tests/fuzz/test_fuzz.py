"""A few cases of each target; `python -m tests.fuzz` runs thousands, of which results.md tells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from stages.core.data.layouts import rows
from stages.core.data.layouts.verdicts import names_of
from stages.core.errors import UserError
from stages.core.models.stable_diffusion import SAMPLERS
from tests.fuzz.runner import Ending, fuzz, run
from tests.fuzz.targets import TARGETS, Target

RESULTS = Path(__file__).with_name("results.md")
CASES = 10


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_random_input_ends_in_a_result_or_a_clear_error(target: Target) -> None:
    ending = fuzz(target, CASES, random_seed=1)
    assert not ending.tracebacks, ending.tracebacks[0]
    assert ending.results + ending.errors == CASES


def test_a_bug_and_a_message_that_says_nothing_are_seen() -> None:
    def read(case: int, _folder: Path) -> float:
        if case == 1:
            raise UserError(" ")
        return 1 / case

    ending = Ending()
    for case in (0, 1, 2):
        run(Target("a test", TARGETS[0].cases, read), case, ending)
    assert (ending.results, ending.errors, len(ending.tracebacks)) == (1, 0, 2)
    assert "ZeroDivisionError" in ending.tracebacks[0]
    assert "no clear message" in ending.tracebacks[1]


def test_the_committed_run_threw_10000_cases_at_every_target_and_found_no_traceback() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", text, re.M)
    counts = {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in rows}
    assert set(counts) == {*(target.name for target in TARGETS), "all"}
    cases, results, errors, tracebacks = counts["all"]
    assert cases >= 10_000
    assert (results + errors, tracebacks) == (cases, 0)
    for name, (_, results, errors, _) in counts.items():
        assert results > 0, name
        assert errors > 0, name


def test_a_label_that_is_guessed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    [target] = [target for target in TARGETS if target.name == "labels: verdicts of known winners"]
    monkeypatch.setattr(rows, "names_of", lambda one, other: names_of(other, one))
    ending = fuzz(target, 40, random_seed=1)
    assert any("AssertionError" in text and "people said" in text for text in ending.tracebacks)


def test_a_schedule_other_than_the_models_own_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    [target] = [target for target in TARGETS if target.name == "models: configs"]
    monkeypatch.setitem(SAMPLERS, "ddim", Linear)
    ending = fuzz(target, 10, random_seed=1)
    assert any("Tensor-likes are not close" in text for text in ending.tracebacks)


class Linear(DDIMScheduler):
    """A sampler that takes no notice of the model's betas."""

    @classmethod
    def from_config(cls, *_args: object, **_others: object) -> DDIMScheduler:
        return DDIMScheduler(
            beta_start=0.1, beta_end=0.2, beta_schedule="linear", clip_sample=False
        )
