"""What a page shows of pictures: some prompts, the largest changes, some pairs, of sizes that fit into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.core.artifacts.provenance import BASE
from stages.core.artifacts.schemas import HOLDOUT_REWARDS, LIKED_PAIRS, LIKES, PREFERENCES, Schema
from stages.core.artifacts.tables import holds, read_metadata, read_table
from stages.core.errors import UserError
from stages.core.evaluation.wording import number
from stages.core.report.changes import Change, most_changed
from stages.core.report.looks import Look, Shown, policies_look
from stages.core.report.pairs import (
    Pictures,
    choose_shown,
    human_look,
    like_look,
    most_wrong,
    pairs_view,
    wrong_notes,
)
from stages.core.report.picture_tables import (
    EvaluationPictures,
    Wanted,
    evenly_spaced,
    read_images,
    read_scores,
)
from stages.core.report.thumbnails import bytes_each

Row = dict[str, Any]

PAIR_COLUMNS = (
    "pair_id", "prompt", "source", "iteration", "winner_score", "loser_score", "margin",
    "margin_standard_error", "probability",
)  # fmt: skip
HUMAN_COLUMNS = ("pair_id", "prompt", "source_file", "source_row")
LOSER_COLUMNS = ("loser_prompt", "loser_source_file", "loser_source_row")
LIKE_COLUMNS = ("image_id", "prompt", "is_liked", "source_file", "source_row")
JUDGED_COLUMNS = ("pair_id", "winner_reward", "loser_reward", "probability")
NUM_AT_HEAD = 4
"""Prompts whose pictures stand at the head of the page."""
NUM_CHANGED = 4
"""Prompts shown that gained most, and as many that lost most."""
NUM_HUMAN = 3
"""Human pairs shown, and as many held-out ones that the judge gets wrong."""
NUM_PAIRS = 6
"""Pairs shown of each iteration."""


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """The tables that the pictures and their scores lie in."""

    images: Sequence[tuple[str, Path]]
    """Policy and evaluation images (schema images)."""
    scores: Sequence[tuple[str, Path]]
    """Policy and scores of these images (schema metric_scores)."""
    pairs: Sequence[Path]
    """Pairs of iterations 1, 2 ... (schema training_pairs or preferences)."""
    preferences: Path
    """Human pairs that were trained on (schema preferences), or single likes (schema likes)."""
    holdout: Path
    """Human pairs that were held out (schema preferences), or likes side by side (schema liked_pairs)."""
    judged: Sequence[tuple[str, Path]]
    """Policy and what it makes of the held-out pairs (schema holdout_rewards)."""


class ShownPictures:
    """The pictures of one page: base beside the policy that the page is of."""

    def __init__(
        self,
        *,
        files: PictureFiles,
        policies: Sequence[str],
        policy: str,
        num_prompts: int,
        decimals: int,
    ) -> None:
        self._files, self._policies, self._policy = files, policies, policy
        self._num_prompts, self._decimals = NUM_AT_HEAD + num_prompts, decimals
        images: dict[str, list[Path]] = {name: [] for name in policies}
        for name, path in files.images:
            images[name].append(path)
        self._pictures = EvaluationPictures(images)
        self._scores = {name: read_scores(path) for name, path in files.scores}
        self.num_rows = self._pictures.num_rows
        """Rows that were read so far."""
        num_pairs = NUM_PAIRS * len(files.pairs) + 2 * NUM_HUMAN + 2 * NUM_CHANGED
        self._max_bytes = bytes_each(self._num_prompts * len(policies) + 2 * num_pairs)

    def evaluated(self, prompt_set: str) -> str:
        """'200 prompts of shapes, 2 images each'."""
        num = len(self._pictures.prompts)
        each, rest = divmod(self._pictures.num_rows, max(1, num * len(self._policies)))
        images = f", {each} image{'' if each == 1 else 's'} each" if each and not rest else ""
        return f"{num:,} prompts of {prompt_set}{images}"

    def prompts(self) -> Row:
        """Prompts spread evenly over the set, with the first image of each policy."""
        names = evenly_spaced(list(self._pictures.prompts), self._num_prompts)
        policies = self._policies
        images = self._pictures.read(policies, [(name, 0) for name in names], self._max_bytes)
        at_head = evenly_spaced(names, NUM_AT_HEAD)
        pair = (BASE, self._policy)
        looks = {
            name: policies_look(
                self._pictures.prompts[name],
                policies,
                [images[policy, (name, 0)] for policy in policies],
                pair if name in at_head else policies,
                [self._score(policy, (name, 0)) for policy in policies],
            )
            for name in names
        }
        return {
            "strip": [looks[name] for name in at_head],
            "more_prompts": [looks[name] for name in names if name not in at_head],
            "shown_policy": self._policy,
        }

    def changes(self) -> Row:
        """What gained and what lost most between base and the policy that the page is of."""
        pair = (BASE, self._policy)
        gained, lost = most_changed(self._scores[BASE], self._scores[self._policy], NUM_CHANGED)
        wanted = [(change.prompt_id, change.candidate) for change in (*gained, *lost)]
        images = self._pictures.read(pair, wanted, self._max_bytes)

        def look(change: Change) -> Look:
            one = (change.prompt_id, change.candidate)
            return Look(
                prompt=self._pictures.prompts[change.prompt_id],
                pictures=[
                    Shown(label=name, image=images[name, one], note=self._score(name, one))
                    for name in pair
                ],
                notes=change.in_words(self._decimals),
            )

        return {"gained": [look(change) for change in gained], "lost": [look(c) for c in lost]}

    def iteration_pairs(self) -> list[Row]:
        """Each iteration's generated pairs, with the images of those that are shown."""
        return [self._iteration_pairs(path) for path in self._files.pairs]

    def human(self) -> list[Look]:
        """Some of the human pairs, or single likes, that were trained on, spread evenly over them."""
        path = self._files.preferences
        if holds(path, LIKES):
            return self._likes(path)
        rows = self._read(path, PREFERENCES, HUMAN_COLUMNS).to_pylist()
        places = [round(i) for i in np.linspace(0, len(rows) - 1, min(NUM_HUMAN, len(rows)))]
        images = self._pair_images(path, places)
        return [human_look(rows[place], pair) for place, pair in zip(places, images, strict=True)]

    def _likes(self, path: Path) -> list[Look]:
        rows = self._read(path, LIKES, LIKE_COLUMNS).to_pylist()
        num = min(2 * NUM_HUMAN, len(rows))
        places = [round(i) for i in np.linspace(0, len(rows) - 1, num)]
        images = read_images(path, LIKES, ("image",), places, self._max_bytes)
        return [
            like_look(rows[place], image) for place, (image,) in zip(places, images, strict=True)
        ]

    def wrong(self) -> Row | None:
        """The held-out pairs that the policy gets wrong and is surest of; None if it judged none."""
        judges = {
            name: self._read(path, HOLDOUT_REWARDS, JUDGED_COLUMNS).to_pylist()
            for name, path in self._files.judged
        }
        if self._policy not in judges:
            return None
        are_likes = holds(self._files.holdout, LIKED_PAIRS)
        schema, more = (LIKED_PAIRS, LOSER_COLUMNS) if are_likes else (PREFERENCES, ())
        rows = self._read(self._files.holdout, schema, (*HUMAN_COLUMNS, *more)).to_pylist()
        places = {row["pair_id"]: place for place, row in enumerate(rows)}
        first = next(iter(judges))
        before = {row["pair_id"]: row for row in judges[first]}
        wrong = most_wrong(judges[self._policy])
        shown = wrong[:NUM_HUMAN]
        for row in shown:
            if row["pair_id"] not in places:
                raise UserError(
                    f"{self._files.holdout} has no pair {row['pair_id']!r}, which {self._policy} "
                    "judged: other pairs are held out than were judged. Delete the table and call "
                    "snakemake again, which makes both anew."
                )
        images = self._pair_images(self._files.holdout, [places[row["pair_id"]] for row in shown])
        return {
            "policy": self._policy,
            "num_wrong": len(wrong),
            "num_pairs": len(judges[self._policy]),
            "looks": [
                human_look(
                    rows[places[row["pair_id"]]],
                    pair,
                    wrong_notes(row, self._policy, before, first),
                )
                for row, pair in zip(shown, images, strict=True)
            ],
        }

    def _iteration_pairs(self, path: Path) -> Row:
        rows = self._read(path, PREFERENCES, PAIR_COLUMNS).to_pylist()
        generated = [place for place, row in enumerate(rows) if row["source"] == "generated"]
        if not generated:
            raise UserError(
                f"{path} holds no generated pair (column 'source' is never 'generated'); --pairs "
                "takes the pairs that iterations 1, 2 ... made"
            )
        pairs = [rows[place] for place in generated]
        shown = choose_shown(pairs, NUM_PAIRS)
        images = self._pair_images(path, [generated[i] for i in shown])
        made = read_metadata(path).get("arguments")
        candidates = made.get("candidates_per_prompt") if isinstance(made, Mapping) else None
        return {**pairs_view(pairs, shown, images), "num_candidates": candidates}

    def _score(self, policy: str, one: Wanted) -> str:
        """The score of a policy's image; empty where it has none."""
        score = self._scores[policy].get(one[0], {}).get(one[1])
        return "" if score is None else number(score, self._decimals)

    def _pair_images(self, path: Path, places: Sequence[int]) -> list[Pictures]:
        images = read_images(path, PREFERENCES, ("winner", "loser"), places, self._max_bytes)
        return [(winner, loser) for winner, loser in images]

    def _read(self, path: Path, schema: Schema, columns: Sequence[str]) -> pa.Table:
        table = read_table(path, schema, columns)
        self.num_rows += len(table)
        return table
