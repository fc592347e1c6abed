"""A file or folder of a run in; out: what it holds, what each column means, how it was made, what is odd.

For a table: every column with its type, unit and meaning, how many values it has, their range and quantiles;
the stage, code, arguments and input files that made it; and warnings: nulls, values that are not finite, ties,
repeats, margins within two standard errors of 0. For the folder of a policy or of an export: its manifest, and
whether its files are whole. For another folder: its tables, a line each. Changes nothing. Examples:
    python -m stages.inspect results/shapes/iter01/pairs.parquet
    python -m stages.inspect results/shapes/iter01/pairs.parquet --verify
    python -m stages.inspect results/shapes/iter01/policy
    python -m stages.inspect results/shapes/export/iter03/diffusers
    python -m stages.inspect results/shapes/evaluation
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stages.core.errors import UserError
from stages.core.execution.runtime import run_stage
from stages.core.inspection.columns import Column
from stages.core.inspection.folders import MANIFEST, Record, list_tables, read_record
from stages.core.inspection.lineage import Lineage, argument_lines, code_note, input_states
from stages.core.inspection.tables import Table, read_facts

PARQUET = b"PAR1"
SHOWN_INPUTS = 12


@dataclass(frozen=True, kw_only=True)
class Args:
    """A file or folder of a run in; what it holds out."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A Parquet table, a JSON record, or the folder of a policy, of an export or of a run."""
    verify: bool = False
    """Read the files that it was made from, and say whether they are the same."""
    folder: Path = Path()
    """Where snakemake is called: the paths of those files begin there."""


def main(args: Args) -> None:
    """Print what the path holds."""
    for line in lines_of(args):
        # Names and prompts may hold anything; a terminal shall show it and not obey it.
        print(
            "".join(
                letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
            )
        )


def lines_of(args: Args) -> Iterator[str]:
    """The lines for a path, by what it is. UserError for anything else."""
    path = args.path
    if path.is_dir() and (path / MANIFEST).is_file():
        yield from record_lines(read_record(path / MANIFEST), args)
    elif path.is_dir():
        tables = list_tables(path)
        if not tables:
            raise UserError(
                f"{path} has no {MANIFEST} and no table below it; expected the folder of a policy, of an export "
                "or of a run. A policy whose training has not ended has no manifest yet"
            )
        yield f"{path}: {len(tables)} tables"
        yield from (f"  {line}" for line in tables)
    elif not path.is_file():
        raise UserError(
            f"{path} does not exist; expected a table (.parquet), a record (.json), or the folder of a policy, "
            "of an export or of a run"
        )
    elif path.suffix == ".json":
        yield from record_lines(read_record(path), args)
    else:
        with path.open("rb") as file:
            head = file.read(len(PARQUET))
        if head != PARQUET and path.suffix != ".parquet":
            raise UserError(
                f"{path} begins with {head!r}; expected a Parquet table, which begins with {PARQUET!r}, or a "
                ".json file. Weights are inspected by their folder, where manifest.json lies"
            )
        yield from table_lines(read_facts(path), args)


def table_lines(table: Table, args: Args) -> Iterator[str]:
    """What a table holds, its lineage and its warnings."""
    yield (
        f"{table.path}: {table.schema or 'a table of other making'}, {table.num_rows} rows, "
        f"{len(table.columns)} columns, {table.num_bytes / 1e6:.2f} MB in {table.num_row_groups} row groups"
    )
    yield ""
    width = max((len(column.name) for column in table.columns), default=0)
    for column in table.columns:
        yield from column_lines(column, width)
    yield from lineage_lines(table.lineage, args)
    yield from warning_lines(list(table.warnings))


def column_lines(column: Column, width: int) -> Iterator[str]:
    """A column in two or three lines."""
    facts = [f"{column.type} [{column.unit}]" if column.unit else column.type]
    if column.num_nulls:
        facts.append(f"{column.num_nulls} of {column.num_rows} null")
    yield f"{column.name:<{width}}  {', '.join(facts)}"
    if column.meaning:
        yield f"    {column.meaning}"
    yield f"    {column.summary()}"


def record_lines(record: Record, args: Args) -> Iterator[str]:
    """What a JSON record says, with the files that it lists."""
    yield f"{record.path}"
    for name, value in record.facts.items():
        text = str(value)
        yield f"  {name} = {text if len(text) <= 200 else text[:197] + '...'}"
    if record.files:
        yield ""
        yield "Files"
        yield from (f"  {line}" for line in record.files if line)
    yield from lineage_lines(record.lineage, args)
    yield from warning_lines(list(record.warnings))


def lineage_lines(lineage: Lineage | None, args: Args) -> Iterator[str]:
    """Who made it, of what."""
    if lineage is None:
        return
    yield ""
    yield f"Made by {lineage.stage}, code {lineage.code} ({code_note(lineage)})"
    yield from (f"  {line}" for line in argument_lines(lineage))
    inputs = list(input_states(lineage, args.folder, args.verify))
    if inputs:
        yield f"From {len(inputs)} files"
        # What is not there as it was comes first.
        inputs.sort(key=lambda entry: entry[2] in ("there", "the same"))
        for name, short, state in inputs[:SHOWN_INPUTS]:
            yield f"  {name}  sha256 {short}  {state}"
        if len(inputs) > SHOWN_INPUTS:
            yield f"  and {len(inputs) - SHOWN_INPUTS} more, all {' or '.join(sorted({s for *_, s in inputs[SHOWN_INPUTS:]}))}"


def warning_lines(warnings: list[str]) -> Iterator[str]:
    """What is odd, or that nothing is."""
    yield ""
    if not warnings:
        yield "Nothing odd was found."
        return
    yield "Look at"
    yield from (f"  - {warning}" for warning in warnings)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
