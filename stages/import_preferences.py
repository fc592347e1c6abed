r"""Human labels in any known layout in; seed pairs and held-out pairs out. See docs/own-labels.md.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from stages.core.artifacts.files import write_json
from stages.core.artifacts.images import ImageError
from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import writing_table
from stages.core.data.image_spool import ImageSpool, Place
from stages.core.data.import_report import describe_captions, describe_pairs, places
from stages.core.data.layouts.columns import UNNAMED, Columns
from stages.core.data.layouts.labels import Cell, Label, Layout, Ledger
from stages.core.data.layouts.recognition import LayoutName, find_layout
from stages.core.data.prompts import prompt_id, read_prompts
from stages.core.errors import UserError
from stages.core.execution.runtime import log, progress, run_stage, stage
from stages.core.method.seeding import seed_of

ROWS_AT_ONCE = 32

ByPrompt = dict[str, list[Label]]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Human labels in, checked seed pairs and held-out pairs out."""

    files: tuple[Path, ...]
    """Files of labels, folders of them or of images, or patterns."""
    num_pairs: int | None
    """Seed pairs to keep; None keeps all that are not held out."""
    num_holdout: int
    """Pairs to hold out for measuring the reward's accuracy; their prompts are not trained on."""
    seed: int
    """Decides which prompts are held out and which pairs are kept."""
    max_pairs_per_prompt: int | None = 10
    """Pairs of one prompt to keep at most, drawn by the seed; None keeps all. A ranking of nine images
    has 36 pairs, which say less than 36 pairs of as many prompts."""
    preferences: Path
    """Where the seed pairs go (schema preferences)."""
    holdout: Path
    """Where the held-out pairs go (schema preferences)."""
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
    """Read labels, choose by prompt, read the chosen pairs' images, write."""
    with stage("import_preferences") as run, ImageSpool(args.preferences.parent) as spool:
        layout, ledger = find_layout(
            args.files, args.layout, args.columns, args.root), Ledger(args.skip_bad)  # fmt: skip
        labels = read_labels(layout, ledger, args)
        chosen, holdout = choose(labels, layout, ledger, spool, args)
        write(chosen, holdout, spool, layout, args)
        report = summarise(labels, chosen, holdout, layout, ledger, args)
        report |= describe_pairs(chosen, holdout, spool)
        prompts = [label.prompt for label in (*chosen, *holdout)]
        report["long_captions"] = describe_captions(prompts, args.tokenizer)
        for key, value in report.items():
            if value and not isinstance(value, list):
                log.info("import_preferences: %s: %s", key.replace("_", " "), value)
        write_json(args.summary, report)
        run.rows_in, run.rows_out = ledger.counts["rows_read"], len(chosen) + len(holdout)


def read_labels(layout: Layout, ledger: Ledger, args: Args) -> ByPrompt:
    """The usable labels by prompt, each prompt's in an order that does not depend on the files."""
    excluded = {prompt_id(prompt) for prompt in read_prompts(*args.exclude)}
    names: dict[str, str] = {}
    by_prompt: ByPrompt = defaultdict(list)
    for label in layout.labels(ledger):
        name = names.setdefault(label.prompt, prompt_id(label.prompt))
        if name in excluded:
            ledger.counts["pairs_in_other_sets_dropped"] += 1
        else:
            by_prompt[name].append(label)
    for name, labels in by_prompt.items():
        labels.sort(key=lambda label: (label.key, *((str(at), cell) for at, cell in places(label))))
        by_prompt[name] = count_votes(labels, ledger)
    return by_prompt


def count_votes(labels: Sequence[Label], ledger: Ledger) -> list[Label]:
    """One label for each pair of images of a prompt, in the same order: what most of its votes say.

    A pair with as many votes for the one as for the other is dropped, as a tie, and so is an image
    beside itself.
    """
    votes: dict[frozenset[int], list[Label]] = defaultdict(list)
    for label in labels:
        votes[frozenset(label.images)].append(label)
    kept = []
    for images, of_pair in votes.items():
        if len(images) == 1:
            ledger.counts["same_image_dropped"] += len(of_pair)
            continue
        wins = Counter(label.images[0] for label in of_pair)
        ledger.counts["repeated_pairs"] += len(of_pair) - 1
        ledger.counts["contradictory_pairs"] += len(wins) > 1
        (winner, most), *others = wins.most_common()
        if others and others[0][1] == most:
            ledger.counts["votes_tied_dropped"] += 1
            continue
        ledger.votes[f"{most} to {others[0][1] if others else 0}"] += 1
        kept.append(next(label for label in of_pair if label.images[0] == winner))
    return kept


def choose(
    labels: ByPrompt, layout: Layout, ledger: Ledger, spool: ImageSpool, args: Args
) -> tuple[list[Label], list[Label]]:
    """(seed pairs, held-out pairs) with images in the spool; others replace those with bad images."""
    while True:
        chosen, holdout = split(labels, ledger, args)
        missing = missing_images((*chosen, *holdout), spool)
        if not missing:
            return chosen, holdout
        bad = set(fetch(missing, layout, ledger, spool))
        for name, of_prompt in labels.items():
            usable = [label for label in of_prompt if not bad & set(places(label))]
            labels[name] = [label for label in usable if not is_one_image(label, spool)]
            ledger.counts["same_image_dropped"] += len(usable) - len(labels[name])


def is_one_image(label: Label, spool: ImageSpool) -> bool:
    """Whether a label's two images, once both are read, turn out to be one."""
    winner, loser = places(label)
    return winner in spool and loser in spool and spool.digest(winner) == spool.digest(loser)


def split(by_prompt: ByPrompt, ledger: Ledger, args: Args) -> tuple[list[Label], list[Label]]:
    """(seed pairs, held-out pairs), whole prompts at a time, in an order the seed decides.

    Prompts that somebody chose to ask about are not held out. UserError if there are fewer than two usable
    pairs, or fewer than asked for.
    """
    order = sorted(by_prompt, key=lambda name: (seed_of(args.seed, "import", name), name))
    by_prompt = {name: within_cap(by_prompt[name], args) for name in order}
    labels = [label for name in order for label in by_prompt[name]]
    held_out: set[str] = set()  # all of the last prompt's pairs too, which nobody trains on
    holdout: list[Label] = []
    for name in order:
        if len(holdout) >= args.num_holdout:
            break
        if all(label.may_be_held_out for label in by_prompt[name]):
            held_out.add(name)
            holdout += by_prompt[name]
    del holdout[args.num_holdout :]
    chosen = [label for name in order if name not in held_out for label in by_prompt[name]]
    if len(holdout) < args.num_holdout and not all(label.may_be_held_out for label in labels):
        raise UserError(
            f"{', '.join(map(str, args.files))}: {len(holdout)} of {len(labels)} usable pairs may be held "
            f"out (column may_be_held_out), preferences.num_holdout is {args.num_holdout}. Lower it, or "
            f"label more pairs that are drawn at random.{dropped(ledger)}"
        )
    wanted = len(chosen) if args.num_pairs is None else args.num_pairs
    if len(chosen) < max(2, wanted):
        raise UserError(
            f"{', '.join(map(str, args.files))}: {len(labels)} usable pairs, of which "
            f"{len(holdout)} are held out and {len(chosen)} are left; {max(2, wanted)} seed pairs "
            "are needed. Give more labels, or lower preferences.num_pairs or num_holdout."
            f"{dropped(ledger)}"
        )
    return chosen[:wanted], holdout


def within_cap(labels: list[Label], args: Args) -> list[Label]:
    """A prompt's pairs, or as many as may be kept, in the same order."""
    if args.max_pairs_per_prompt is None or len(labels) <= args.max_pairs_per_prompt:
        return labels
    numbers = sorted(
        range(len(labels)), key=lambda number: seed_of(args.seed, "cap", labels[number].name)
    )
    return [labels[number] for number in sorted(numbers[: args.max_pairs_per_prompt])]


def dropped(ledger: Ledger) -> str:
    """What was read and is not used, and why, for a message; nothing where all is used."""
    counts = {
        name: number for name, number in ledger.counts.items() if number and name != "rows_read"
    }
    counts |= {"files_not_read": len(ledger.not_read)} if ledger.not_read else {}
    said = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
    text = f" Of {ledger.counts['rows_read']} rows: {said}." if said else ""
    return text + (
        f" {len(ledger.bad)} rows cannot be used:{ledger.reasons()}" if ledger.bad else ""
    )


def missing_images(labels: Iterable[Label], spool: ImageSpool) -> dict[Path, set[Cell]]:
    """Images of the labels that are not in the spool yet, by file."""
    missing: dict[Path, set[Cell]] = defaultdict(set)
    for label in labels:
        for file, cell in places(label):
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
    chosen: Sequence[Label], holdout: Sequence[Label], spool: ImageSpool, layout: Layout, args: Args
) -> None:
    """Write both tables."""
    inputs = [*(file for file in layout.files if file.is_file()), *args.exclude]
    taken: Counter[str] = Counter()
    for path, labels in ((args.preferences, chosen), (args.holdout, holdout)):
        with writing_table(
            path, PREFERENCES, stage="import_preferences", arguments=args, inputs=inputs
        ) as writer:
            rest = iter(labels)
            while some := list(islice(rest, ROWS_AT_ONCE)):
                writer.write([to_row(label, spool, taken) for label in some])


def to_row(label: Label, spool: ImageSpool, taken: Counter[str]) -> dict[str, object]:
    """The pair as a row of a preferences table; a repeated label gets a number after its name."""
    taken[label.name] += 1
    repeat = f"-{taken[label.name]}" if taken[label.name] > 1 else ""
    winner, loser = ({"bytes": spool.read(place), "path": None} for place in places(label))
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


def summarise(
    labels: ByPrompt,
    chosen: Sequence[Label],
    holdout: Sequence[Label],
    layout: Layout,
    ledger: Ledger,
    args: Args,
) -> dict[str, object]:
    """The counts of what was read, dropped and kept, and the bad rows."""
    usable = sum(map(len, labels.values()))
    return {
        "layout": layout.name,
        "num_files": len(layout.files),
        "unlabelled_dropped": 0,
        "ties_dropped": 0,
        "votes_tied_dropped": 0,
        "same_image_dropped": 0,
        "repeated_pairs": 0,
        "contradictory_pairs": 0,
        "pairs_in_other_sets_dropped": 0,
        **ledger.counts,
        "votes": dict(ledger.votes) if set(ledger.votes) - {"1 to 0"} else {},
        "files_not_read": ledger.not_read,
        "bad_rows_dropped": len(ledger.bad),
        "bad_rows": ledger.bad,
        "pairs_kept": len(chosen),
        "pairs_held_out": len(holdout),
        "pairs_left_over": usable - len(chosen) - len(holdout),
        "pairs_beyond_cap": usable - sum(len(within_cap(own, args)) for own in labels.values()),
        "most_pairs_of_a_prompt": max(map(len, labels.values()), default=0),
        "prompts_kept": len({prompt_id(label.prompt) for label in chosen}),
        "prompts_held_out": len({prompt_id(label.prompt) for label in holdout}),
    }


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
