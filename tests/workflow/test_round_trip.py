"""From the first label to a corrected policy: label, import, train, audit, train what depends on it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages import label
from stages.core.artifacts.tables import read_metadata
from tests.audit.test_server import serving as auditing
from tests.browsers import NEEDS_BROWSER, SECONDS, browser
from tests.builders import CAPTIONS, read_rows
from tests.labelling.builders import write_images
from tests.labelling.servers import serving as labelling
from tests.labelling.windows import Window
from tests.workflow.projects import Project

NUM_LABELS = 20
VETOES, FLIPS = 3, 2

pytestmark = [
    pytest.mark.slow,
    NEEDS_BROWSER,
]


def label_pairs(images: Path, labels: Path) -> None:
    """Somebody prefers the sharper image of each pair, by keyboard."""
    with labelling("--images", str(images), "--labels", str(labels)) as (process, address):
        with browser() as driver:
            window = Window(driver, address, "ann")
            for _ in range(NUM_LABELS):
                window.press(window.sharper())
        process.terminate()
        process.communicate(timeout=SECONDS)


def audit_pairs(results: Path, keys: str) -> None:
    """Somebody presses a key on each of the first pairs that the audit shows."""
    with auditing(results) as (_, address), browser() as driver:
        driver.get(address)
        for place, key in enumerate(keys, start=1):
            wait(driver, lambda d, place=place: shown(d) == str(place))
            driver.switch_to.active_element.send_keys(key)
        wait(driver, lambda d: shown(d) == str(len(keys) + 1))


def shown(driver: Any) -> str:
    """Which pair is shown, by its place; nothing before its pictures are."""
    are_there = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
    if not driver.execute_script(are_there):
        return ""
    return str(driver.find_element("css selector", ".where strong").text)


def wait(driver: Any, condition: Any) -> None:
    """Until it is so."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(
        driver, SECONDS, ignored_exceptions=[StaleElementReferenceException]
    ).until(condition)  # fmt: skip


def test_labels_train_a_policy_and_an_audit_remakes_what_depends_on_it(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    label_pairs(write_images(tmp_path / "images", NUM_LABELS + 1), labels)
    assert len(read_rows(labels / label.LABELS)) == NUM_LABELS
    (tmp_path / "pool.txt").write_text("\n".join(CAPTIONS[NUM_LABELS + 1 : NUM_LABELS + 11]))
    (tmp_path / "evaluation.txt").write_text("\n".join(CAPTIONS[NUM_LABELS + 11 :]))
    config = {
        "shapes": None,
        "iterations": 1,
        "preferences": {"files": [f"labels/{label.LABELS}"], "num_pairs": 14, "num_holdout": 6},
        "prompts": {"pool": "pool.txt", "per_iteration": [8]},
        "evaluation": {"prompt_sets": {"mine": "evaluation.txt"}, "metrics": ["sharpness"],
                       "primary_metric": "sharpness", "candidate_metric": None},
    }  # fmt: skip
    project = Project(tmp_path)
    project.make("--quiet", "all", config=config)
    human = {row["pair_id"] for row in read_rows(project.results / "seed/preferences.parquet")}
    assert len(human) == 14
    pairs = project.results / "iter01/pairs.parquet"
    mix = project.results / "iter01/preferences.parquet"
    chosen = {row["pair_id"]: row for row in read_rows(pairs)}
    assert len(chosen) == 8
    policy = (project.results / "iter01/policy/manifest.json").read_bytes()

    audit_pairs(project.results, "v" * VETOES + "f" * FLIPS)

    planned = project.planned(config=config)
    assert planned["mix_preferences"] == planned["update_policy"] == 1
    assert planned["generate_evaluation"] == 1  # of iteration 1 alone
    untouched = {"import_preferences", "train_seed", "sample_candidates", "score_candidates",
                 "select_pairs"}  # fmt: skip
    assert not untouched & set(planned)
    project.make("--quiet", "all", config=config)
    assert project.planned(config=config) == {}
    made = {row["pair_id"]: row for row in read_rows(mix) if row["source"] == "generated"}
    assert len(made) == len(chosen) - VETOES
    flipped = [name for name, row in made.items() if row["winner"] == chosen[name]["loser"]]
    assert len(flipped) == FLIPS
    assert all(made[name]["loser"] == chosen[name]["winner"] for name in flipped)
    assert all(row == chosen[name] for name, row in made.items() if name not in flipped)
    assert {row["pair_id"]: row for row in read_rows(pairs)} == chosen
    named = [path for path in read_metadata(mix)["inputs"] if "/decisions/" in path]
    assert named == ["results/test/decisions/iter01.parquet"]
    assert (project.results / "iter01/policy/manifest.json").read_bytes() != policy
