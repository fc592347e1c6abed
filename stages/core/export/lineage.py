"""Where an exported policy comes from: its base, its trainings, their data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from stages.core.artifacts.provenance import BASE, digest, policy_digest, read_manifest
from stages.core.export.markdown import plain_settings, read_front_matter
from stages.core.export.policies import ExportedPolicy, Format, lora_file
from stages.core.models.loading import Source

ONLINE = "train_online"
"""The stage whose policies learn from what they sample meanwhile."""


def card_facts(policy: ExportedPolicy, kind: Format) -> dict[str, Any]:
    """What the model card says besides metrics."""
    source = policy.model.source
    return {
        "title": policy.name,
        "file": lora_file(policy),
        "format": kind,
        "policy": policy_digest(policy.folder),
        "pipeline": source.pipeline_class(),
        "family": policy.model.family,
        "base_model": source.base if not source.is_local else Path(source.base).name,
        "license": base_license(source),
        "lineage": lineage(policy.folder),
        "settings": plain_settings(policy.manifest.get("sail_arguments", {})),
        "online": trained_online(policy.manifest),
    }


def trained_online(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """How an online training made a policy: method, judge, rounds; None for a policy that had another training."""
    if manifest.get("sail_stage") != ONLINE:
        return None
    arguments = manifest.get("sail_arguments", {})
    judge = arguments.get("judge", {})
    return {
        "method": manifest.get("method", "unknown"),
        "rounds": manifest.get("num_rounds", "-"),
        "judge": judge.get("name", "unknown"),
        "judge_policy": _run_name(str(judge.get("policy", BASE))),
        "initial": _run_name(str(arguments.get("policy", BASE))),
    }


def _run_name(policy: str) -> str:
    """What a run calls a policy: 'base', 'iter00'; of its folder no more than that."""
    return policy if policy == BASE else Path(policy).parent.name


def base_license(source: Source) -> dict[str, str]:
    """The licence keys of the base's own card; empty where it states none."""
    card = Path(source.rest) / "README.md"
    if not Path(source.rest).exists():
        try:
            card = Path(hf_hub_download(source.rest, "README.md"))
        except (OSError, ValueError):  # no network, or no card
            return {}
    head = read_front_matter(card)
    names = ("license", "license_name", "license_link")
    return {name: str(head[name]) for name in names if name in head} if "license" in head else {}


def lineage(folder: Path) -> list[dict[str, Any]]:
    """The trainings that led to a policy, first to last, with what each was trained on.

    It ends early, and says so, where an earlier policy is gone or is no longer what was used.
    """
    manifest = read_manifest(folder)
    arguments = manifest.get("sail_arguments", {})
    inputs: dict[str, str] = manifest.get("sail_inputs") or {}
    if manifest.get("handed_on"):  # the same policy in another folder, made from its manifest
        [(before, known)] = inputs.items()
        if Path(before).is_file() and digest(Path(before)) == known:
            return lineage(Path(before).parent)
    link = {
        "name": "online" if manifest.get("sail_stage") == ONLINE else arguments.get("iteration", 0),
        "stage": manifest.get("sail_stage", "unknown"),
        "policy": hashlib.sha256(
            json.dumps(manifest["files"], sort_keys=True).encode()
        ).hexdigest()[:16],
        "steps": manifest.get("num_steps", "-"),
        **_trained_on(arguments.get("preferences"), manifest.get("num_pairs")),
    }
    if link["stage"] == ONLINE:
        link["prompts"] = _num_prompts(arguments.get("prompts"), inputs)
    before = str(arguments.get("policy", BASE))
    if link["stage"] not in ("update_policy", ONLINE) or before == BASE:
        return [link]
    earlier = Path(before)
    made = earlier / "manifest.json"
    if made.is_file() and digest(made) == inputs.get(str(made)):
        return [*lineage(earlier), link]
    gone = dict.fromkeys(("stage", "policy", "human", "generated", "prompts", "steps"), "not found")
    return [{"name": "earlier", **gone}, link]


def _num_prompts(prompts: str | None, inputs: Mapping[str, str]) -> int | str:
    """Prompts of an online training; '-' where the table is gone or another one now."""
    if (
        prompts is None
        or not Path(prompts).is_file()
        or digest(Path(prompts)) != inputs.get(prompts)
    ):
        return "-"
    return int(pq.read_metadata(prompts).num_rows)


def _trained_on(preferences: str | None, num_pairs: int | None) -> dict[str, Any]:
    """Counts of a training's pairs; '-' where the table is gone or another one now."""
    unknown = {"human": "-", "generated": "-", "prompts": "-"}
    if preferences is None or not Path(preferences).is_file():
        return unknown
    table = pq.read_table(
        preferences, columns=["source", "prompt_id"], page_checksum_verification=True
    )
    if len(table) != num_pairs:
        return unknown
    sources = table.column("source").to_pylist()
    return {
        "human": sources.count("human"),
        "generated": sources.count("generated"),
        "prompts": len(table.column("prompt_id").unique()),
    }
