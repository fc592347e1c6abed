"""What an import tells of the human pairs, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

DROPPED = {
    "ties_dropped": "ties",
    "votes_tied_dropped": "pairs with as many votes for the one image as for the other",
    "unlabelled_dropped": "rows without a label",
    "same_image_dropped": "pairs of an image with itself",
    "images_in_other_sets_dropped": "images whose prompt is one of the evaluation's",
    "pairs_in_other_sets_dropped": "pairs whose prompt is one of the evaluation's",
    "bad_rows_dropped": "rows that could not be used",
}
NOTED = {
    "images_left_over": "usable images more than were asked for",
    "images_beyond_cap": "images beyond the most that one prompt may have",
    "repeated_labels": "labels of an image that had one already",
    "contradictory_labels": "images that were both liked and disliked",
    "pairs_left_over": "usable pairs more than were asked for",
    "pairs_beyond_cap": "pairs beyond the most that one prompt may have",
    "repeated_pairs": "labels of a pair that had one already",
    "contradictory_pairs": "pairs that were labelled both ways",
    "repeated_images": "images that stand in more than one pair",
    "images_in_both_sets": "images both trained on and held out",
    "near_duplicate_pairs": "pairs of two images that look almost the same",
    "near_duplicate_images": "images that look almost like another one",
    "held_out_images_like_a_seed_image": "held-out images that look almost like one trained on",
}
NUM_SIZES = 3
NUM_EXAMPLES = 3


def data_sentences(found: Row) -> list[str]:
    """What was read, kept, left out and noticed; what was not counted, or counted 0, is not said."""
    files = _count(found.get("num_files"), "file")
    read = _count(found.get("rows_read"), "labelled row")
    sentences = [
        f"{read} of {files} were read"
        + (f" (layout {found['layout']})." if found.get("layout") else ".")
        if read and files
        else "",
        _kept(found),
        _listed("Left out: ", found, DROPPED, " Nothing was left out."),
        _listed("Noticed: ", found, NOTED, ""),
        _sizes(found.get("resolutions") or {}),
        _votes(found.get("votes") or {}),
        _captions(found.get("long_captions")),
        _examples("Rows that could not be used", found.get("bad_rows") or ()),
        _examples("Files that were not read", found.get("files_not_read") or ()),
    ]
    return [sentence.strip() for sentence in sentences if sentence]


def _count(value: Any, what: str) -> str:
    """'1,200 files'; empty where it was not counted."""
    if not isinstance(value, int):
        return ""
    return f"{value:,} {what}{'' if value == 1 else 's'}"


def _kept(found: Row) -> str:
    if isinstance(found.get("images_kept"), int):
        return _likes_kept(found)
    if not isinstance(found.get("pairs_kept"), int):
        return ""
    parts = []
    for name, verb in (("kept", "are trained on"), ("held_out", "are held out")):
        pairs = _count(found.get(f"pairs_{name}"), "pair")
        prompts = _count(found.get(f"prompts_{name}"), "prompt")
        if pairs:
            parts.append(f"{pairs}{f' of {prompts}' if prompts else ''} {verb}")
    return f"{', '.join(parts)}."


def _likes_kept(found: Row) -> str:
    liked, disliked, held_out = (
        f"{found.get(key, 0):,}" for key in ("liked_kept", "disliked_kept", "pairs_held_out")
    )
    return (
        f"{liked} liked and {disliked} disliked images of {_count(found.get('prompts_kept'), 'prompt')} are trained "
        f"on, {held_out} of each of {_count(found.get('prompts_held_out'), 'prompt')} are held out."
    )


def _listed(head: str, found: Row, words: Mapping[str, str], otherwise: str) -> str:
    counts = {words[key]: found.get(key) for key in words}
    parts = [f"{value:,} {what}" for what, value in counts.items() if value]
    return f"{head}{', '.join(parts)}." if parts else otherwise


def _sizes(sizes: Mapping[str, int]) -> str:
    if not sizes:
        return ""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    parts = [f"{count:,} of {size.replace('x', ' x ')}" for size, count in ordered[:NUM_SIZES]]
    rest = sum(count for _, count in ordered[NUM_SIZES:])
    parts += [f"{rest:,} of other sizes"] if rest else []
    return f"Images by pixels: {', '.join(parts)}."


def _votes(votes: Mapping[str, int]) -> str:
    parts = [f"{count:,} by {how}" for how, count in sorted(votes.items())]
    return f"Votes: pairs decided {', '.join(parts)}." if parts else ""


def _captions(captions: Any) -> str:
    if not isinstance(captions, Mapping) or "captions_cut" not in captions:
        return ""
    limit, cut = captions.get("tokens_read"), captions["captions_cut"]
    if not cut:
        return f"No caption is longer than the {limit} tokens that the text encoder reads."
    first = next(iter(captions.get("examples") or ()), None)
    return (
        f"{_count(cut, 'caption')} {'is' if cut == 1 else 'are'} longer than the {limit} tokens that "
        "the text encoder reads" + (f", for example “{first}”." if first else ".")
    )


def _examples(what: str, rows: Sequence[Any]) -> str:
    if not rows:
        return ""
    shown = [
        ", ".join(f"{key} {value}" for key, value in row.items())
        if isinstance(row, Mapping)
        else str(row)
        for row in rows[:NUM_EXAMPLES]
    ]
    more = f", and {len(rows) - NUM_EXAMPLES:,} more" if len(rows) > NUM_EXAMPLES else ""
    return f"{what}: {'; '.join(shown)}{more}."
