r"""Human labels in any known layout in; seed pairs and held-out pairs out. See docs/own-labels.md.

With `--unpaired` likes and dislikes stay single images, and no pairs are made of them to train on.

Text and labels are read first; then only the chosen pairs' images, a few at a time, so that memory
does not grow with the shards. Ties and unlabelled rows are dropped and counted. Seed pairs, held-out
pairs and the sets of `--exclude` share no prompt. Which pairs are chosen depends on what they are, not
on the number or order of files.

Example:
    python -m stages.import_preferences --files 'data/train-*.parquet' --num-pairs 512 \\
        --num-holdout 200 --seed 0 --preferences preferences.parquet --holdout holdout.parquet \\
        --summary import.json
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import tyro

from stages.core.artifacts.files import write_json
from stages.core.artifacts.images import ImageError
from stages.core.artifacts.schemas import LIKED_PAIRS, LIKES, PREFERENCES, Schema
from stages.core.artifacts.tables import writing_table
from stages.core.data.image_spool import ImageSpool
from stages.core.data.import_report import Chosen, describe_captions, describe_labels
from stages.core.data.layouts.columns import UNNAMED, Columns
from stages.core.data.layouts.labels import AnyLabel, Cell, Label, Layout, Ledger, Like, Place
from stages.core.data.layouts.recognition import LayoutName, find_layout
from stages.core.data.likes import (
    LikedPair,
    layout_of_likes,
    like_row,
    liked_pair_row,
    split_likes,
)
from stages.core.data.prompts import prompt_id, read_prompts
from stages.core.errors import UserError
from stages.core.execution.runtime import log, progress, run_stage, stage
from stages.core.method.seeding import seed_of

ROWS_AT_ONCE = 32

AnyHeldOut = TypeVar("AnyHeldOut", bound=Chosen)
AnyChosen = TypeVar("AnyChosen", Label, Like, LikedPair)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Human labels in, checked seed pairs and held-out pairs out."""

    files: tuple[Path, ...]
    """Files of labels, folders of them or of images, or patterns."""
    num_pairs: int | None
    """Seed pairs (unpaired: images) to keep; None keeps all that are not held out."""
    num_holdout: int
    """Pairs to hold out for measuring the reward's accuracy; their prompts are not trained on. Unpaired:
    pairs of one liked and one disliked image, of whatever prompts."""
    seed: int
    """Decides which prompts are held out and which pairs are kept."""
    max_pairs_per_prompt: int | None = 10
    """Pairs of one prompt to keep at most, drawn by the seed; None keeps all. A ranking of nine images
    has 36 pairs, which say less than 36 pairs of as many prompts."""
    unpaired: bool = False
    """Keep likes and dislikes as single images to train on, instead of making pairs of those of one prompt."""
    preferences: Path
    """Where the seed pairs go (schema preferences; unpaired: likes)."""
    holdout: Path
    """Where the held-out pairs go (schema preferences; unpaired: liked_pairs)."""
    summary: Path
    """Where the report goes: what was read, dropped and kept, and why (JSON)."""
    exclude: tuple[Path, ...] = ()
    """Files of prompts that no pair may have: the evaluation sets."""
    layout: LayoutName = "auto"
    """How the labels are laid out; 'auto' recognises it."""
    columns: Columns = UNNAMED
    """Which columns say what, where their names are not known ones."""
    root: Path | None = None
    """Folder below which the images lie that labels name by paths; links in it are followed."""
    skip_bad: int = 0
    """Rows that may be unusable; they are listed in the report. One more stops the import."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer, to count the captions that are too long for it."""


def main(args: Args) -> None:
    """Read labels, choose by prompt, read the chosen labels' images, write."""
    with stage("import_preferences") as run, ImageSpool(args.preferences.parent) as spool:
        layout, ledger = find_layout(
            args.files, args.layout, args.columns, args.root), Ledger(args.skip_bad)  # fmt: skip
        work = import_likes if args.unpaired else import_pairs
        report = work(layout, ledger, spool, args)
        for key, value in report.items():
            if value and not isinstance(value, list):
                log.info("import_preferences: %s: %s", key.replace("_", " "), value)
        write_json(args.summary, report)
        held_out = report["pairs_held_out"] * (2 if args.unpaired else 1)
        run.rows_in = ledger.counts["rows_read"]
        run.rows_out = report["images_kept" if args.unpaired else "pairs_kept"] + held_out


def import_pairs(layout: Layout, ledger: Ledger, spool: ImageSpool, args: Args) -> dict[str, Any]:
    """Write pairs of images that people compared; the report."""
    labels = read_labels(layout.labels(ledger), ledger, args, "pairs")
    chosen, holdout = choose(labels, layout, ledger, spool, lambda: split(labels, ledger, args))
    taken: Counter[str] = Counter()
    write(
        args.preferences, PREFERENCES, chosen, lambda one: to_row(one, spool, taken), layout, args
    )
    write(args.holdout, PREFERENCES, holdout, lambda one: to_row(one, spool, taken), layout, args)
    usable = sum(map(len, labels.values()))
    report = summarise(layout, ledger, "pairs") | {
        "pairs_kept": len(chosen),
        "pairs_held_out": len(holdout),
        "pairs_left_over": usable - len(chosen) - len(holdout),
        **beyond_cap(labels, args, "pairs"),
        **prompts_of([one.prompt for one in chosen], [one.prompt for one in holdout]),
    }
    prompts = [label.prompt for label in (*chosen, *holdout)]
    report |= describe_labels(chosen, holdout, spool)
    return report | {"long_captions": describe_captions(prompts, args.tokenizer)}


def import_likes(layout: Layout, ledger: Ledger, spool: ImageSpool, args: Args) -> dict[str, Any]:
    """Write single images to train on, and held-out ones two by two; the report."""
    found = layout_of_likes(layout).likes(ledger)
    labels = read_labels(found, ledger, args, "images")
    chosen, holdout = choose(labels, layout, ledger, spool, lambda: likes_of(labels, ledger, args))
    taken: Counter[str] = Counter()
    write(args.preferences, LIKES, chosen, lambda one: like_row(one, spool, taken), layout, args)
    write(
        args.holdout,
        LIKED_PAIRS,
        holdout,
        lambda one: liked_pair_row(one, spool, taken),
        layout,
        args,
    )
    usable = sum(map(len, labels.values()))
    held_out = [like.prompt for pair in holdout for like in (pair.liked, pair.disliked)]
    report = summarise(layout, ledger, "images") | {
        "images_kept": len(chosen),
        "liked_kept": sum(like.is_liked for like in chosen),
        "disliked_kept": sum(not like.is_liked for like in chosen),
        "pairs_held_out": len(holdout),
        "images_left_over": usable - len(chosen) - 2 * len(holdout),
        **beyond_cap(labels, args, "images"),
        **prompts_of([like.prompt for like in chosen], held_out),
    }
    prompts = [*(like.prompt for like in chosen), *held_out]
    report |= describe_labels(chosen, holdout, spool)
    return report | {"long_captions": describe_captions(prompts, args.tokenizer)}


def read_labels(
    found: Iterable[AnyLabel], ledger: Ledger, args: Args, what: str
) -> dict[str, list[AnyLabel]]:
    """The usable labels by prompt, each prompt's in an order that does not depend on the files."""
    excluded = {prompt_id(prompt) for prompt in read_prompts(*args.exclude)}
    names: dict[str, str] = {}
    by_prompt: dict[str, list[AnyLabel]] = defaultdict(list)
    for label in found:
        name = names.setdefault(label.prompt, prompt_id(label.prompt))
        if name in excluded:
            ledger.counts[f"{what}_in_other_sets_dropped"] += 1
        else:
            by_prompt[name].append(label)
    for name, labels in by_prompt.items():
        labels.sort(key=lambda label: (label.key, *((str(at), cell) for at, cell in label.places)))
        by_prompt[name] = count_votes(labels, ledger)
    return by_prompt


def count_votes(labels: Sequence[AnyLabel], ledger: Ledger) -> list[AnyLabel]:
    """One label for each pair of images (or image) of a prompt, in the same order: what most of its votes say.

    What has as many votes for the one verdict as for the other is dropped, as a tie, and so is an image
    beside itself.
    """
    votes: dict[Hashable, list[AnyLabel]] = defaultdict(list)
    for label in labels:
        votes[label.subject].append(label)
    kept = []
    for of_one in votes.values():
        if isinstance(of_one[0], Label) and of_one[0].images[0] == of_one[0].images[1]:
            ledger.counts["same_image_dropped"] += len(of_one)
            continue
        verdicts = Counter(label.verdict for label in of_one)
        what = "pairs" if isinstance(of_one[0], Label) else "labels"
        ledger.counts[f"repeated_{what}"] += len(of_one) - 1
        ledger.counts[f"contradictory_{what}"] += len(verdicts) > 1
        (verdict, most), *others = verdicts.most_common()
        if others and others[0][1] == most:
            ledger.counts["votes_tied_dropped"] += 1
            continue
        ledger.votes[f"{most} to {others[0][1] if others else 0}"] += 1
        kept.append(next(label for label in of_one if label.verdict == verdict))
    return kept


def choose(
    labels: dict[str, list[AnyLabel]],
    layout: Layout,
    ledger: Ledger,
    spool: ImageSpool,
    split_them: Callable[[], tuple[list[AnyLabel], list[AnyHeldOut]]],
) -> tuple[list[AnyLabel], list[AnyHeldOut]]:
    """(to train on, held out) with images in the spool; others replace those with bad images."""
    chosen: list[AnyLabel]
    holdout: list[AnyHeldOut]
    while True:
        chosen, holdout = split_them()
        missing = missing_images([*chosen, *holdout], spool)
        if not missing:
            return chosen, holdout
        bad = set(fetch(missing, layout, ledger, spool))
        for name, of_prompt in labels.items():
            usable = [label for label in of_prompt if not bad & set(label.places)]
            labels[name] = [label for label in usable if not is_one_image(label, spool)]
            ledger.counts["same_image_dropped"] += len(usable) - len(labels[name])


def is_one_image(label: Label | Like, spool: ImageSpool) -> bool:
    """Whether a label's two images, once both are read, turn out to be one."""
    if isinstance(label, Like):
        return False
    winner, loser = label.places
    return winner in spool and loser in spool and spool.digest(winner) == spool.digest(loser)


def in_order(by_prompt: Mapping[str, list[AnyLabel]], args: Args) -> dict[str, list[AnyLabel]]:
    """The labels of each prompt, not more than may be kept, the prompts in an order the seed decides."""
    order = sorted(by_prompt, key=lambda name: (seed_of(args.seed, "import", name), name))
    return {name: within_cap(by_prompt[name], args) for name in order}


def likes_of(
    by_prompt: Mapping[str, list[Like]], ledger: Ledger, args: Args
) -> tuple[list[Like], list[LikedPair]]:
    """(images to train on, held-out pairs); see `split_likes`."""
    try:
        return split_likes(
            in_order(by_prompt, args), num_images=args.num_pairs, num_holdout=args.num_holdout
        )
    except UserError as error:
        raise UserError(f"{', '.join(map(str, args.files))}: {error}{ledger.left_out()}") from error


def split(
    by_prompt: Mapping[str, list[Label]], ledger: Ledger, args: Args
) -> tuple[list[Label], list[Label]]:
    """(seed pairs, held-out pairs), whole prompts at a time, in an order the seed decides.

    Prompts that somebody chose to ask about are not held out. UserError if there are fewer than two usable
    pairs, or fewer than asked for.
    """
    by_prompt = in_order(by_prompt, args)
    labels = [label for of_prompt in by_prompt.values() for label in of_prompt]
    held_out: set[str] = set()  # all of the last prompt's pairs too, which nobody trains on
    holdout: list[Label] = []
    for name in by_prompt:
        if len(holdout) >= args.num_holdout:
            break
        if all(label.may_be_held_out for label in by_prompt[name]):
            held_out.add(name)
            holdout += by_prompt[name]
    del holdout[args.num_holdout :]
    chosen = [label for name in by_prompt if name not in held_out for label in by_prompt[name]]
    if len(holdout) < args.num_holdout and not all(label.may_be_held_out for label in labels):
        raise UserError(
            f"{', '.join(map(str, args.files))}: {len(holdout)} of {len(labels)} usable pairs may be held "
            f"out (column may_be_held_out), preferences.num_holdout is {args.num_holdout}. Lower it, or "
            f"label more pairs that are drawn at random.{ledger.left_out()}"
        )
    wanted = len(chosen) if args.num_pairs is None else args.num_pairs
    if len(chosen) < max(2, wanted):
        raise UserError(
            f"{', '.join(map(str, args.files))}: {len(labels)} usable pairs, of which "
            f"{len(holdout)} are held out and {len(chosen)} are left; {max(2, wanted)} seed pairs "
            "are needed. Give more labels, or lower preferences.num_pairs or num_holdout."
            f"{ledger.left_out()}"
        )
    return chosen[:wanted], holdout


def within_cap(labels: list[AnyLabel], args: Args) -> list[AnyLabel]:
    """A prompt's labels, or as many as may be kept, in the same order."""
    if args.max_pairs_per_prompt is None or len(labels) <= args.max_pairs_per_prompt:
        return labels
    numbers = sorted(
        range(len(labels)), key=lambda number: seed_of(args.seed, "cap", labels[number].name)
    )
    return [labels[number] for number in sorted(numbers[: args.max_pairs_per_prompt])]


def missing_images(labels: Iterable[Chosen], spool: ImageSpool) -> dict[Path, set[Cell]]:
    """Images of the labels that are not in the spool yet, by file."""
    missing: dict[Path, set[Cell]] = defaultdict(set)
    for label in labels:
        for file, cell in label.places:
            if (file, cell) not in spool:
                missing[file].add(cell)
    return missing


def fetch(
    missing: Mapping[Path, set[Cell]], layout: Layout, ledger: Ledger, spool: ImageSpool
) -> Iterator[Place]:
    """Bring images into the spool; the places of those that cannot be used."""
    for file in progress(sorted(missing), "reading images", "files"):
        for found in layout.images(file, missing[file]):
            try:
                spool.store(found)
            except ImageError as error:
                reason = f"{error}. Repair or remove the row."
                ledger.note_bad(file, found.cell.row, reason, found.cell.column)
                yield file, found.cell


def write(
    path: Path,
    schema: Schema,
    labels: Sequence[AnyChosen],
    row_of: Callable[[AnyChosen], dict[str, object]],
    layout: Layout,
    args: Args,
) -> None:
    """Write a table, a few rows at a time."""
    inputs = [*(file for file in layout.files if file.is_file()), *args.exclude]
    with writing_table(
        path, schema, stage="import_preferences", arguments=args, inputs=inputs
    ) as writer:
        rest = iter(labels)
        while some := list(islice(rest, ROWS_AT_ONCE)):
            writer.write([row_of(label) for label in some])


def to_row(label: Label, spool: ImageSpool, taken: Counter[str]) -> dict[str, object]:
    """The pair as a row of a preferences table; a repeated label gets a number after its name."""
    taken[label.name] += 1
    repeat = f"-{taken[label.name]}" if taken[label.name] > 1 else ""
    winner, loser = ({"bytes": spool.read(place), "path": None} for place in label.places)
    return {
        "pair_id": f"{label.name}{repeat}",
        "prompt_id": prompt_id(label.prompt),
        "prompt": label.prompt,
        "winner": winner,
        "loser": loser,
        "source": "human",
        "iteration": 0,
        "source_file": str(label.file),
        "source_row": label.row,
    }


def summarise(layout: Layout, ledger: Ledger, what: str) -> dict[str, Any]:
    """The counts of what was read and dropped, and the bad rows."""
    return {
        "layout": layout.name,
        "num_files": len(layout.files),
        "unlabelled_dropped": 0,
        "ties_dropped": 0,
        "votes_tied_dropped": 0,
        "same_image_dropped": 0,
        f"repeated_{'pairs' if what == 'pairs' else 'labels'}": 0,
        f"contradictory_{'pairs' if what == 'pairs' else 'labels'}": 0,
        f"{what}_in_other_sets_dropped": 0,
        **ledger.counts,
        "votes": dict(ledger.votes) if set(ledger.votes) - {"1 to 0"} else {},
        "files_not_read": ledger.not_read,
        "bad_rows_dropped": len(ledger.bad),
        "bad_rows": ledger.bad,
    }


def beyond_cap(labels: Mapping[str, list[AnyLabel]], args: Args, what: str) -> dict[str, int]:
    """How many labels of a prompt there are beyond the most that are kept, and the most that one has."""
    usable = sum(map(len, labels.values()))
    return {
        f"{what}_beyond_cap": usable - sum(len(within_cap(own, args)) for own in labels.values()),
        f"most_{what}_of_a_prompt": max(map(len, labels.values()), default=0),
    }


def prompts_of(chosen: Iterable[str], held_out: Iterable[str]) -> dict[str, int]:
    """How many different prompts both sets have."""
    return {
        "prompts_kept": len({prompt_id(prompt) for prompt in chosen}),
        "prompts_held_out": len({prompt_id(prompt) for prompt in held_out}),
    }


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
