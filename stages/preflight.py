r"""A config in; out: do the invariants hold on this machine, does the run fit, what will it cost.

Loads the model, checks the mathematics on it, times one step of each stage, and says how many device
hours and how much disk the whole run takes, before they are spent. Ends with exit code 1 if something
would go wrong. Example:
    python -m stages.preflight --config config/sd15.yaml
    python -m stages.preflight --config config/sd15.yaml config/overlays/lora.yaml --devices 8
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from stages.core.errors import UserError
from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.core.models.families import load_model
from stages.core.plan.configuration import read_config
from stages.core.plan.costs import count
from stages.core.plan.run import RunPlan
from stages.core.plan.shards import shards_of
from stages.core.preflight.data import check_evaluation, check_prompts, labelled_pairs
from stages.core.preflight.findings import Findings
from stages.core.preflight.host import check_host_memory
from stages.core.preflight.invariants import check_invariants
from stages.core.preflight.judge import check_judge
from stages.core.preflight.samples import encode_samples, model_settings
from stages.core.preflight.table import show
from stages.core.preflight.timing import measure
from stages.core.training.step_judge.settings import TrainableJudge
from stages.metrics import metric_names
from stages.metrics.check import check_weights
from stages.metrics.step_judge import load_judge
from stages.shapes.folds import num_pool_captions


@dataclass(frozen=True, kw_only=True)
class Args:
    """A config in; checks, hours, memory and disk of its run out."""

    config: tuple[Path, ...]
    """The config, and overlays on it."""
    devices: int = 1
    """Devices the run will have; for the hours on the clock."""
    results: Path = Path("results")
    """Where results will go; for the free disk."""
    threads: int = 2
    """CPU threads."""


def main(args: Args) -> None:
    """Check, time, count, and print."""
    with stage("preflight") as run:
        imported = time.time() - psutil.Process().create_time()
        config = read_config(*args.config)
        findings = Findings()
        plan = RunPlan(config=config)
        findings.add_all(plan.file_problems())
        findings.add_all(plan.family_problems())
        prompts, labelled = num_prompts(plan, findings), labelled_pairs(config, findings)
        check_metrics(plan, findings)
        check_evaluation(plan, findings)
        counts = count(config, prompts, labelled)
        device = choose_device(args.threads)
        begun = time.perf_counter()
        model = load_model(model_settings(config), device=device)
        try:
            encode_samples(model)
            start = imported + time.perf_counter() - begun
            check_invariants(model, config, findings)
            check_judge(model, config, findings)
            rates = measure(model, partial(begin_judge, config, device), config, findings)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"preflight: the GPU's memory does not suffice ({error}). Lower "
                "execution.micro_batch_pairs, score_rows_per_batch or candidate_prompts_per_batch, set "
                "execution.gradient_checkpointing, or use config/overlays/lora.yaml."
            ) from error
        check_host_memory(counts, rates, config, findings, devices=args.devices)
        show(
            counts,
            rates,
            findings,
            devices=args.devices,
            training_gpus=config["execution"]["training_gpus"],
            shards=shards_of(config, counts, rates),
            start=start,
            shard_minutes=float(config["execution"]["shard_minutes"]),
            results=args.results,
        )
        run.rows_in, run.rows_out = len(args.config), len(findings.checks)
        if findings.failed:
            raise UserError(f"preflight: {'; '.join(findings.failed)}")


def begin_judge(config: Mapping[str, Any], device: torch.device) -> TrainableJudge:
    """The step-aware preference model that the run trains, before its training."""
    block = config["step_judge"]
    return load_judge(block["clip"], block["tokenizer"], seed=0, device=device)


def num_prompts(plan: RunPlan, findings: Findings) -> int:
    """Prompts of all evaluation sets; notes what is wrong with them and with the pool."""
    if not plan.is_world:
        return check_prompts(plan, findings)
    num_captions = num_pool_captions(plan.config["shapes"]["num_seed_captions"])
    findings.add_all(plan.pool_problems(num_captions))
    count: int = plan.config["shapes"]["num_evaluation_captions"]
    return count


def check_metrics(plan: RunPlan, findings: Findings) -> None:
    """Whether the weights of every metric in use are there and fit, by their headers."""
    for name in plan.metrics_in_use:
        try:
            if name not in metric_names():
                raise UserError(f"there is none; expected one of {', '.join(metric_names())}")
            found = check_weights(name, plan.config["metrics"].get(name, {}))
        except UserError as error:
            findings.add(f"metric {name}", str(error), holds=False)
        else:
            findings.add(f"metric {name}", found, holds=True)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
