"""Evaluation sets and all training prompts in; what they share out, refused unless allowed.

Texts are compared as select_prompts does: Unicode form, case and spacing set aside.
Example: paste the line from logs/<run>/evaluation/check_leakage.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.schemas import LEAKAGE, PROMPTS
from stages.core.artifacts.tables import read_table, write_table
from stages.core.data.evaluation_prompts import shared_prompts
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.execution.runtime import log, run_stage, stage

NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Args:
    """Evaluation sets and all training prompts in, what they share out."""

    evaluation: tuple[tuple[str, Path], ...]
    """Each evaluation set's name and its prompts (any table with a column prompt)."""
    training: tuple[tuple[str, Path], ...]
    """Each training's name and its prompts: the seed pairs, the iterations' prompts."""
    allow: bool
    """Report shared prompts instead of refusing them."""
    output: Path
    """Where the counts go (schema leakage)."""


def main(args: Args) -> None:
    """Compare every evaluation set with every training's prompts."""
    with stage("check_leakage") as run:
        evaluation = {name: read_texts(path) for name, path in args.evaluation}
        training = {name: read_texts(path) for name, path in args.training}
        rows = []
        for prompt_set, prompts in evaluation.items():
            for source, seen in training.items():
                shared = shared_prompts(prompts, seen)
                rows.append(
                    {
                        "prompt_set": prompt_set,
                        "source": source,
                        "num_prompts": len({prompt_id(prompt) for prompt in prompts}),
                        "num_shared": len(shared),
                        "examples": shared[:NUM_EXAMPLES],
                    }
                )
        found = [in_words(row) for row in rows if row["num_shared"]]
        if found and not args.allow:
            raise UserError(
                "evaluation prompts are also trained on: "
                + "; ".join(found)
                + ". Take them out of one of the two, or set evaluation.allow_leakage to true to "
                "have them reported only."
            )
        for sentence in found:
            log.warning("check_leakage: %s", sentence)
        inputs = [path for _, path in (*args.evaluation, *args.training)]
        write_table(
            args.output, rows, LEAKAGE, stage="check_leakage", arguments=args, inputs=inputs
        )
        run.rows_in, run.rows_out = sum(map(len, evaluation.values())), len(rows)


def read_texts(path: Path) -> list[str]:
    """The prompts of a table."""
    texts: list[str] = read_table(path, PROMPTS, ["prompt"]).column("prompt").to_pylist()
    return texts


def in_words(row: dict[str, object]) -> str:
    """One finding, with the first shared prompt."""
    examples = row["examples"]
    assert isinstance(examples, list)
    return (
        f"{row['num_shared']} of {row['num_prompts']} prompts of {row['prompt_set']} stand in "
        f"{row['source']} (as {examples[0]!r})"
    )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
