"""What is asked about next, where a judge chooses: by hand, at the desk, and through the import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from stages import label
from stages.core.artifacts.images import decode_image, to_model_input
from stages.core.artifacts.judges import JudgeRecord, facts_of
from stages.core.artifacts.provenance import policy_digest
from stages.core.artifacts.schemas import JUDGED_IMAGES
from stages.core.artifacts.tables import read_metadata, read_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.labelling.choosing import Chooser, Judged, distances, far_view
from stages.core.labelling.export import write_labels
from stages.core.labelling.pairs import Pair
from stages.core.method.noising import reward_draws
from stages.core.method.scoring import draw_errors
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.policy import Policy
from stages.core.pages.journal import read_journal
from stages.core.policies.loading import load_judge
from tests.builders import CAPTIONS, encoded, picture, read_rows, settings, write_rows
from tests.labelling.builders import answer_all, open_desk, write_images
from tests.labelling.test_export import imported
from tests.labelling.test_pairs import pairs, prompts


def view(grey: float) -> Any:
    return np.tile([grey, 0.0, 0.0], 64)


def pairs_of(*images: tuple[str, float, float]) -> tuple[list[Pair], Chooser]:
    """A pair of each two of some (name, reward, grey), and what is known of them."""
    judged = {name: Judged(reward, view(grey)) for name, reward, grey in images}
    made = []
    for number, prompt in enumerate(prompts(len(images) // 2, 2)):
        names = [images[2 * number][0], images[2 * number + 1][0]]
        places = tuple(type(place)(name, place.file) for name, place in zip(names, prompt.places, strict=True))  # fmt: skip
        made.append(Pair(str(number), prompt.prompt, places, 0, False))
    return made, Chooser(judged)


def test_the_view_from_afar_is_in_lab_and_its_distance_in_colour_differences() -> None:
    black, white = (Image.new("RGB", (90, 40), shade) for shade in ("black", "white"))
    views = np.stack([far_view(black), far_view(white)])
    assert views.shape == (2, 192)
    # CIELAB's lightness is 0 and 100, without colour.
    assert views[0] == pytest.approx(np.zeros(192), abs=1e-6)
    assert views[1].reshape(64, 3)[:, 0] == pytest.approx(100.0, abs=1e-3)
    assert distances(views, views) == pytest.approx(np.array([[0, 100], [100, 0]]), abs=0.01)
    half = np.where(np.arange(192) < 96, views[0], views[1])  # root of half of 100 squared
    assert distances(half[None], views[:1])[0, 0] == pytest.approx(np.sqrt(0.5) * 100, abs=0.01)


def test_of_the_least_sure_pairs_the_one_least_like_what_was_seen_is_next() -> None:
    # Margins 1, 2, 3, 8, 9, 10, 11, 12: a quarter of eight are the first two.
    images = [
        ("a", 0.0, 10), ("b", 1.0, 10), ("c", 0.0, 90), ("d", 2.0, 50), ("e", 5.0, 99), ("f", 8.0, 99),
        *((f"{n}{side}", side * (8.0 + n), 0) for n in range(5) for side in (0, 1)),
    ]  # fmt: skip
    made, chooser = pairs_of(*images)
    assert [chooser.margin(pair) for pair in made] == [1, 2, 3, 8, 9, 10, 11, 12]
    assert chooser.choose(made, []).key == "0"  # nothing was seen: the least sure
    assert chooser.choose(made, ["a"]).key == "1"  # 80 and 40 from 10, not 0 and 0
    assert chooser.choose(made, ["c", "d"]).key == "0"  # 40 and 40 from 50, not 0 and 0
    assert chooser.choose(made, ["nobody"]).key == "0"


def test_a_pair_that_the_judge_has_not_seen_is_never_the_least_sure() -> None:
    made, chooser = pairs_of(("a", 0.0, 0), ("b", 5.0, 0))
    other, _ = pairs_of(("x", 0.0, 0), ("y", 0.0, 0))
    unknown = Pair("unknown", "p", other[0].places, 0, False)
    assert chooser.margin(unknown) == float("inf")
    assert chooser.choose([unknown, *made], ["a"]) == made[0]
    assert chooser.choose([unknown], ["a"]) == unknown


def test_a_set_is_as_unsure_as_its_images_are_near_each_other() -> None:
    made, chooser = pairs_of(("a", 0.0, 0), ("b", 1.0, 0), ("c", 3.0, 0), ("d", 0.0, 0))
    both = Pair("set", "p", (*made[0].places, made[1].places[0]), 0, False, is_ranked=True)
    assert chooser.margin(both) == pytest.approx((1 + 3 + 2) / 3)


def test_a_third_of_the_prompts_is_kept_for_chance_by_no_seed_or_image() -> None:
    drawn = pairs(3000, 4, pairs_per_prompt=2, are_chosen=True)
    kept = {pair.prompt for pair in drawn if pair.may_be_held_out}
    assert not kept & {pair.prompt for pair in drawn if not pair.may_be_held_out}
    assert binomtest(len(kept), 3000, 1 / 3).pvalue > 0.001
    again = pairs(3000, 3, seed=5, are_chosen=True)
    assert {pair.prompt for pair in again if pair.may_be_held_out} == kept
    assert all(pair.may_be_held_out for pair in pairs(100))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", len(CAPTIONS))


def known(images: Path) -> Chooser:
    """Of every image: a reward that grows with the number of its prompt, and its real view."""
    judged = {}
    for number, folder in enumerate(sorted(images.iterdir())):
        for file in folder.glob("*.png"):
            reward = float(number * int(file.stem))  # so the margin is the number
            judged[f"{folder.name}/{file.name}"] = Judged(reward, far_view(Image.open(file)))
    return Chooser(judged)


def test_every_third_pair_is_at_random_and_only_those_may_be_held_out(
    images: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "answers.jsonl"
    with open_desk([images], journal, share=0.0, chooser=known(images)) as desk:
        kept = {pair.key for pair in desk.pairs if pair.may_be_held_out}
        number = min(len(kept), (len(desk.pairs) - len(kept)) // 2)
        keys = answer_all(desk, "ann", at_most=3 * number)
        assert [key in kept for key in keys] == [True, False, False] * number
        assert len(keys) > 20
        rest = answer_all(desk, "ann")
        assert sorted(keys + rest) == sorted(pair.key for pair in desk.pairs)  # all, in the end
    marks = {entry["pair"]: entry.get("may_be_held_out", True) for entry in read_journal(journal)}
    assert {key for key, mark in marks.items() if mark} == kept


def test_the_order_of_the_kept_pairs_does_not_depend_on_the_judge(
    images: Path, tmp_path: Path
) -> None:
    orders = []
    for name, chooser in (("a", known(images)), ("b", Chooser({}))):
        with open_desk([images], tmp_path / name, share=0.2, chooser=chooser) as desk:
            kept = {pair.key for pair in desk.pairs if pair.may_be_held_out and not pair.is_common}
            orders.append([key for key in answer_all(desk, "ann") if key in kept])
    assert orders[0] == orders[1]


def test_the_unsure_come_first_a_new_start_goes_on_and_the_next_is_known(
    images: Path, tmp_path: Path
) -> None:
    journal, chooser = tmp_path / "answers.jsonl", known(images)
    with open_desk([images], journal, share=0.1, chooser=chooser) as desk:
        margins = {pair.key: chooser.margin(pair) for pair in desk.pairs if not pair.may_be_held_out
                   and not pair.is_common}  # fmt: skip
        keys, expected = [], None
        while (shown := desk.current("ann")) is not None:
            assert expected in (None, shown.pair.key)
            upcoming = desk.upcoming("ann")
            expected = upcoming and upcoming.pair.key
            keys.append(shown.pair.key)
            desk.answer("ann", shown.pair.key, "left")
    found = [margins[key] for key in keys if key in margins]
    assert np.mean(found[: len(found) // 3]) < 0.6 * np.mean(found)
    journal.unlink()
    again: list[str] = []
    while len(again) < len(keys):
        with open_desk([images], journal, share=0.1, chooser=chooser) as desk:
            again += answer_all(desk, "ann", at_most=7)
    assert again == keys


def test_the_import_holds_out_pairs_of_chance_alone(images: Path, tmp_path: Path) -> None:
    journal, path = tmp_path / "answers.jsonl", tmp_path / "labels.parquet"
    with open_desk([images], journal, chooser=known(images)) as desk:
        kept = {prompt_id(pair.prompt) for pair in desk.pairs if pair.may_be_held_out}
        answer_all(desk, "ann", at_most=24)
        write_labels(path, desk.gallery, desk.answers(), arguments={}, journal=journal)
    table = read_rows(path)
    assert {row["prompt_id"] for row in table if row["may_be_held_out"]} <= kept
    num_kept = sum(row["may_be_held_out"] for row in table)
    assert 0 < num_kept < 24
    imported(tmp_path, path, num_holdout=num_kept)
    holdout = read_rows(tmp_path / "holdout.parquet")
    assert len(holdout) == num_kept
    assert {row["prompt_id"] for row in holdout} <= kept
    seed = read_rows(tmp_path / "preferences.parquet")
    assert len(seed) == 24 - num_kept
    with pytest.raises(UserError, match=rf"{num_kept} of 24 usable pairs may be held out .* is 20"):
        imported(tmp_path, path, num_holdout=20)


@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), ("true", "False")])
def test_a_column_of_any_table_says_what_may_be_held_out(
    tmp_path: Path, yes: object, no: object
) -> None:
    def row(number: int) -> dict[str, Any]:
        images = [encoded(picture(CAPTIONS[number], strength=s), "PNG") for s in (1.0, 0.5, 0.2)]
        return {"prompt": CAPTIONS[number], "images": [{"bytes": i, "path": None} for i in images],
                "ranks": [1, 2, 3], "may_be_held_out": yes if number % 3 == 0 else no}  # fmt: skip

    path = write_rows(tmp_path / "rankings.parquet", [row(number) for number in range(9)])
    imported(tmp_path, path, num_holdout=7)
    found = {row["prompt"] for row in read_rows(tmp_path / "holdout.parquet")}
    assert found == {CAPTIONS[number] for number in (0, 3, 6)}


# The stage, with a model.


def args(tmp_path: Path, model: str, policy: Path, **more: Any) -> label.Args:
    given: dict[str, Any] = {
        "images": (tmp_path / "images",), "labels": tmp_path / "labels", "base": model,
        "judge": str(policy), "choose": "uncertain_and_different", "num_draws": 3, "port": 0,
        "open_browser": False,
    }  # fmt: skip
    return label.Args(**{**given, **more})


def rewards_by_hand(
    model: DiffusionModel, policy: Path, prompt: str, image: bytes, weights: list[float]
) -> float:
    """Weighted mean over draws of the base's error less the policy's, one draw at a time."""
    draws = reward_draws(
        seed_of(0, "label", prompt_id(prompt)), num_draws=3, num_timesteps=model.num_timesteps,
        latents_shape=model.latents_shape,
    )  # fmt: skip
    latents = model.encode_images(torch.from_numpy(to_model_input([decode_image(image)], 64)))
    text = model.encode_text([prompt])
    gains, counts = [], []
    for number in range(3):
        timestep, noise = draws.timesteps[number : number + 1], draws.noise[number : number + 1]
        noised = model.add_noise(latents, noise, timestep)
        with torch.no_grad():
            errors = [
                (model.predict(denoiser, noised, timestep, text) - model.target(latents, noise, timestep))
                .double().square().mean().item()
                for denoiser in (model.load_denoiser(), model.load_denoiser(Policy(policy)))
            ]  # fmt: skip
        gains.append(errors[0] - errors[1])
        counts.append(weights[int(timestep) * len(weights) // model.num_timesteps])
    assert isinstance(model.load_denoiser(), Denoiser)
    return float(np.dot(gains, counts) / sum(counts))


def record_of(policy: Path, model: DiffusionModel, weights: list[float], path: Path) -> Path:
    record = JudgeRecord(
        policy=policy_digest(policy), kind="calibrated", weights=tuple(weights), log_odds=1.0,
        num_timesteps=model.num_timesteps, num_pairs=9, accuracy=0.7, accuracy_low=0.6, accuracy_high=0.8,
    )  # fmt: skip
    path.write_text(json.dumps(facts_of(record)))
    return path


def test_a_policy_judges_the_images_once_and_by_its_record(
    tmp_path: Path, tiny_base: str, other_policy: Path, model: DiffusionModel,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(label, "serve", lambda app, **_: None)
    images = write_images(tmp_path / "images", 3)
    table = tmp_path / "labels" / label.JUDGED
    weights = [2.0, 0.5, 0.5]
    record = record_of(other_policy, model, weights, tmp_path / "iter00.json")
    for more, counts in (({}, [1.0]), ({"judge_record": record}, weights)):
        label.main(args(tmp_path, tiny_base, other_policy, **more))
        rows = read_table(table, JUDGED_IMAGES).to_pylist()
        assert len(rows) == 6
        for row in rows:
            image = (images / row["image_name"]).read_bytes()
            expected = rewards_by_hand(model, other_policy, row["prompt"], image, counts)
            assert row["reward"] == pytest.approx(expected, rel=1e-3)
        made = table.stat().st_mtime_ns
        label.main(args(tmp_path, tiny_base, other_policy, **more))
        assert table.stat().st_mtime_ns == made
    assert "has what the judge says of 6 images" in caplog.text or caplog.text == ""
    (images / "prompt-000" / "0.png").write_bytes(encoded(picture(CAPTIONS[7]), "PNG"))
    label.main(args(tmp_path, tiny_base, other_policy, judge_record=record))
    assert table.stat().st_mtime_ns != made


@pytest.mark.slow
def test_the_judge_has_its_own_precision_and_rewards_as_the_run_had_them(
    tmp_path: Path, tiny_base: str, other_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label, "serve", lambda app, **_: None)
    images = write_images(tmp_path / "images", 3)
    table = tmp_path / "labels" / label.JUDGED
    label.main(args(tmp_path, tiny_base, other_policy, dtype="float16"))
    arguments = read_metadata(table)["arguments"]
    assert arguments["model"]["dtype"] == "float32"  # --dtype is of images that are made
    assert not {"rewards_by", "draw_law", "embedded_guidance"} & set(arguments)
    label.main(
        args(tmp_path, tiny_base, other_policy, judge_dtype="float16", rewards_by="secant", draw_law="logit_normal")
    )  # fmt: skip
    half = load_model(settings(tiny_base, "float16"), device=torch.device("cpu"))
    judge = load_judge(half, str(other_policy), "base", "secant")
    for row in read_table(table, JUDGED_IMAGES).to_pylist():
        draws = reward_draws(
            seed_of(0, "label", prompt_id(row["prompt"])), num_draws=3, num_timesteps=half.num_timesteps,
            latents_shape=half.latents_shape, law="logit_normal",
        )  # fmt: skip
        image = decode_image((images / row["image_name"]).read_bytes())
        latents = half.encode_images(torch.from_numpy(to_model_input([image], half.image_size)))
        errors = draw_errors(half, judge, latents, half.encode_text([row["prompt"]]), draws)
        gain = (errors.reference - errors.policy).double().mean()
        # Three images judged together are rounded otherwise than one.
        assert row["reward"] == pytest.approx(float(gain), rel=0.05)


def test_a_judge_is_told_the_guidance_that_is_asked_for(
    tmp_path: Path, tiny_base: str, other_policy: Path
) -> None:
    write_images(tmp_path / "images", 3)
    with pytest.raises(UserError, match="embedded_guidance is 3.5, but models of"):
        label.main(args(tmp_path, tiny_base, other_policy, embedded_guidance=3.5))


def test_the_record_of_another_policy_and_flags_that_miss_something_are_refused(
    tmp_path: Path, tiny_base: str, other_policy: Path, model: DiffusionModel
) -> None:
    write_images(tmp_path / "images", 3)
    record = record_of(other_policy, model, [1.0], tmp_path / "iter00.json")
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"policy": "0" * 64}))
    with pytest.raises(UserError, match="none is of the policy that judges"):
        label.main(args(tmp_path, tiny_base, other_policy, judge_record=record))
    record.write_text(json.dumps(facts | {"num_timesteps": 7}))
    with pytest.raises(UserError, match="has 7 timesteps"):
        label.main(args(tmp_path, tiny_base, other_policy, judge_record=record))
    for more, said in (
        ({"base": None}, "needs --judge with a policy folder, and --base"),
        ({"judge": None}, "needs --judge with a policy folder, and --base"),
        ({"choose": "random"}, "go with --choose uncertain_and_different"),
        ({"num_draws": 0}, "--num-draws must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            label.main(args(tmp_path, tiny_base, other_policy, **more))
