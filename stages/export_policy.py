r"""A finished policy in; what diffusers, ComfyUI or A1111 open out, with a model card.

Example:
    python -m stages.export_policy --policy results/shapes/iter03/policy \\
        --model.base stages/shapes/pipeline --model.dtype float32 \\
        --format single-file --dtype float16 --name shapes-iter03 --output exports/shapes-iter03
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from stages.core.artifacts.schemas import SUMMARY
from stages.core.artifacts.tables import read_table
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.export.cards import model_card
from stages.core.export.folders import check_replaceable, export_folder, finish_export
from stages.core.export.lineage import card_facts
from stages.core.export.policies import Dtype, ExportedPolicy, Format, check_policy, write_policy
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Args:
    """A finished policy in; what diffusers, ComfyUI or A1111 open out, with a model card."""

    policy: Path
    """Policy folder (full, or a LoRA)."""
    model: ModelSettings
    """The pretrained model it was trained from."""
    format: Format
    """diffusers: a whole pipeline folder; single-file: one fused checkpoint; or the LoRA alone."""
    dtype: Dtype
    """Precision of fused weights; files that are taken over as they are keep theirs."""
    name: str
    """What the file and the card's title are called, as shapes-iter03."""
    output: Path
    """Folder to write; an earlier export there is replaced."""
    summary: Path | None = None
    """Evaluation whose rows of the policy --evaluated-as go into the card."""
    evaluated_as: str = ""
    """How the summary names the policy, as iter03."""
    is_same_base: bool = False
    """--model.base is the policy's base in another place than where it was trained."""
    is_ours: bool = False
    """Replace what is at --output even without the card that marks an export: Snakemake removes the
    card before it is written again, and may be killed then."""


def main(args: Args) -> None:
    """Check that policy, base and format fit; write beside; rename."""
    with stage("export_policy") as run:
        if not args.is_ours:
            check_replaceable(args.output)
        model = load_model(args.model, device=torch.device("cpu"))
        policy = ExportedPolicy(folder=args.policy, model=model, name=args.name)
        check_policy(policy, args.format, is_same_base=args.is_same_base)
        facts = card_facts(policy, args.format)
        rows = [] if args.summary is None else read_table(args.summary, SUMMARY).to_pylist()
        metrics = [row for row in rows if row["policy"] == args.evaluated_as]
        with export_folder(args.output, is_ours=args.is_ours) as new:
            write_policy(policy, args.format, args.dtype, new)
            finish_export(
                new, model_card(facts, metrics), stage="export_policy", arguments=args,
                inputs=[args.policy / "manifest.json"], facts=facts,
            )  # fmt: skip
            run.rows_in, run.rows_out = 1, len(list(new.rglob("*")))
        log.info("export_policy: %s (%s) is ready", args.output, args.format)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
