"""What each model family offers, and what of a config it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

SCHEMA = Path(__file__).resolve().parents[3] / "workflow" / "schemas" / "config.schema.yaml"

TRAININGS = ("train_seed", "update_policy")
Offer = Mapping[str, Any]


@cache
def families() -> Mapping[str, Offer]:
    """What the schema lists of each family, by its name."""
    found: dict[str, Offer] = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))["x-families"]
    return found


def family_of(config: Mapping[str, Any]) -> str | None:
    """The family that the config names, or that the model's own folder does.

    None for a hub id, a file, or a pipeline that is of none: whoever loads the model says so.
    """
    named: str | None = config["model"].get("family")
    if named is not None:
        return named
    try:
        index = json.loads((Path(config["model"]["base"]) / "model_index.json").read_bytes())
        pipeline = index.get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    return next((name for name, offer in families().items() if offer["pipeline"] == pipeline), None)


def mistakes(config: Mapping[str, Any], family: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for all that a config asks for and a family lacks."""
    offer, is_lora = families()[family], config.get("lora", {}).get("rank", 0) > 0
    for key, offered in offer.items():
        block, _, name = key.partition(".")
        if not name or offered is None:
            continue
        for place in TRAININGS if block == "training" else (block,):
            found = _value(config.get(place, {}), name)
            asked = found if isinstance(found, list) else [] if found is None else [found]
            if key == "export.policies" and not is_lora:  # without a LoRA none is written
                asked = [kind for kind in asked if not kind.startswith("lora-")]
            for value in asked:
                if value not in offered:
                    yield (
                        f"{place}.{name}",
                        f"{value!r} is not there for models of {family}, "
                        + (
                            f"which offer {', '.join(map(str, offered))}; choose one of these"
                            if offered
                            else "which have no such key; leave it out"
                        ),
                    )
    online = config.get("online", {})
    is_judged = online.get("method", "none") != "none" and online["judge"] == "spm"
    if is_judged and "step_judge.clip" in offer:
        yield (
            "online.judge",
            "'spm' is a step-aware preference model, which has learnt what DDIM sees at a timestep; models of "
            f"{family} have other timesteps. Take 'self' or a metric",
        )


def _value(block: Mapping[str, Any], keys: str) -> Any:
    """What lies in a block at a path of keys with dots between them; None where nothing does."""
    value: Any = block
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
