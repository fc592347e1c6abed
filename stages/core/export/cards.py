"""README.md of what leaves the project: dataset cards and model cards in the hub's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.export.markdown import MARK, Code, front_matter, plain, table
from stages.core.export.preferences import Counts, Format

DATA_FILES: dict[Format, str] = {
    "pickapic": "data/train-*.parquet",
    "preference": "data/train-*.parquet",
    "imagefolder": "data/**",
    "webdataset": "data/train-*.tar",
}
"""Which files of an export `datasets` reads."""

_DATASET_CONTENTS: dict[Format, str] = {
    "pickapic": (
        "The 19 columns of Pick-a-Pic v2. `jpg_0` and `jpg_1` are the bytes of image files (PNG or "
        "JPEG); `label_0` is 1 where image 0 is preferred, else 0. `created_at` and the URLs are "
        "null, `user_id` is 0, image uids are digests of the bytes. There are no ties."
    ),
    "preference": (
        "`prompt`, `chosen` and `rejected` (images), then scores, seeds and lineage of each pair."
    ),
    "imagefolder": (
        "Image files and `metadata.jsonl`; `datasets` gives `chosen` and `rejected` as images."
    ),
    "webdataset": (
        "Tar shards with `000000.chosen.png`, `000000.rejected.png` and `000000.json` of each pair."
    ),
}


def dataset_card(
    kind: Format, counts: Counts, made: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> str:
    """The card of exported pairs; `made` lists (table, stage, settings) of where they come from."""
    sizes = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M")]
    size = next((name for limit, name in sizes if counts.num_pairs < limit), "n>1M")
    head = front_matter(
        {
            "license": "other",
            "task_categories": ["text-to-image"],
            "tags": ["preference", "dpo", "sail"],
            "size_categories": [size],
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": "train", "path": DATA_FILES[kind]}],
                }
            ],
        }
    )
    origins = [
        (source, iteration, count, counts.policies.get(iteration, "-"))
        for (source, iteration), count in sorted(counts.by_origin.items())
    ]
    lineage = "\n".join(
        f"{plain(Code(name))}, by {plain(Code(stage))}:\n\n{_settings(settings)}"
        for name, stage, settings in made
    )
    return (
        f"{head}{MARK}\n\n# Preference pairs\n\n"
        f"{counts.num_pairs:,} pairs of images of {len(counts.by_prompt):,} prompts. "
        f"{_DATASET_CONTENTS[kind]}\n\n"
        "## Where the pairs come from\n\n"
        "A human pair was labelled by a person. A generated pair was sampled and judged by the "
        "policy named, with no reward model (SAIL).\n\n"
        + table(["source", "iteration", "pairs", "policy"], origins)
        + f"\n## Made from\n\n{lineage}\n"
        "## Licence\n\nHuman pairs keep the licence of their source, generated images that of the "
        "model that made them; state both before publishing.\n"
    )


def model_card(facts: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The card of an exported policy.

    `facts` are those its manifest lists; `metrics` are rows of an evaluation_summary.
    """
    base = plain(facts["base_model"])
    comfyui = _COMFYUI if facts["family"] in _READ_BY_COMFYUI else ""
    use = _USE[facts["format"]].format(
        **facts, base=json.dumps(facts["base_model"]), comfyui=comfyui
    )
    findings = " ".join(facts.get("set_aside", ()))
    warned = f"**Set aside by the guards of its run.** {findings}\n\n" if findings else ""
    if warnings := " ".join(facts.get("warnings", ())):
        warned += f"**The guards of its run warn.** {warnings}\n\n"
    unknown = "unknown: the base states none; look it up before use. "
    licence = facts["license"]
    return (
        f"{_model_head(facts)}{MARK}\n\n# {plain(facts['title'])}\n\n"
        f"This is {base}, {_how(facts.get('online'))}\n\n"
        f"{warned}"
        f"## Use\n\n{use}\n"
        f"## Lineage and data\n\n{_trainings(facts['lineage'])}\n"
        f"The last row is this model. Base: {plain(Code(facts['base_model']))}.\n\n"
        f"## Evaluation\n\n{_scores(metrics)}\n"
        f"## Settings of the last training\n\n{_settings(facts['settings'])}\n"
        f"## Licence\n\n{'' if licence else unknown}A fine-tune keeps the licence of its base"
        f"{': ' + plain(licence['license']) if licence else ''}.\n"
    )


def _how(online: Mapping[str, Any] | None) -> str:
    """How the base was changed: by SAIL, or by the online method beside it."""
    if online is None:
        return (
            "aligned with human preference pairs by SAIL: the model samples images, judges them itself and learns "
            "from them by Diffusion-DPO, with no reward model."
        )
    method = {"spo": "SPO", "ddpo": "DDPO", "d3po": "D3PO"}.get(online["method"], online["method"])
    judge = {
        "self": f"the implicit reward of {plain(Code(online['judge_policy']))}, a policy that learnt from human pairs",
        "spm": "a step-aware preference model",
    }.get(online["judge"], f"the metric {plain(Code(online['judge']))}")
    start = online["initial"]
    begun = "" if start == "base" else f" It began as the policy {plain(Code(start))}."
    return (
        f"trained online by {plain(method)}, a baseline beside SAIL: in {plain(online['rounds'])} rounds the policy "
        f"sampled images of prompts, {judge} judged them, and it learnt from them at once.{begun}"
    )


def _model_head(facts: Mapping[str, Any]) -> str:
    is_lora = facts["format"].startswith("lora-")
    online = facts.get("online")
    methods = ["sail", "dpo"] if online is None else [online["method"]]
    tags = ["text-to-image", facts["family"], *methods, *(["lora"] if is_lora else [])]
    return front_matter(
        {
            "base_model": facts["base_model"],
            "base_model_relation": "adapter" if is_lora else "finetune",
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            **(facts["license"] or {"license": "other"}),
            "tags": tags,
        }
    )


def _trainings(lineage: Sequence[Mapping[str, Any]]) -> str:
    """A row for each training that led to the policy."""
    columns = {
        "iteration": "name",
        "stage": "stage",
        "policy": "policy",
        "human pairs": "human",
        "generated pairs": "generated",
        "prompts": "prompts",
        "steps": "steps",
    }
    return table(list(columns), [[link[key] for key in columns.values()] for link in lineage])


def _scores(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A row for each comparison."""
    if not metrics:
        return "Not evaluated when this card was written.\n"
    rows = [
        (
            row["prompt_set"],
            row["metric"],
            f"{row['mean']:.4g}",
            row["baseline"],
            f"{row['difference']:+.4g} [{row['ci_low']:+.4g}, {row['ci_high']:+.4g}]",
            f"{row['difference'] / size:.0%}" if (size := row.get("better_of_two")) else "-",
            f"{row['win_rate']:.0%}",
        )
        for row in metrics
    ]
    columns = ["set", "metric", "mean", "against", "difference [95 % interval]", "size", "won"]
    return table(columns, rows) + (
        "\nSize is the difference, of what keeping the better of two images gives over one.\n"
    )


_READ_BY_COMFYUI = ("stable-diffusion-3", "flux")
_COMFYUI = """
ComfyUI knows the keys of this layout for models of this family: put the file into `models/loras`, node *Load LoRA*,
strength 1. That was not tried.
"""
_USE = {
    "diffusers": """    from diffusers import {pipeline}
    pipe = {pipeline}.from_pretrained("THIS_FOLDER").to("cuda")
    pipe("a cat").images[0]
""",
    "lora-diffusers": """    from diffusers import {pipeline}
    pipe = {pipeline}.from_pretrained({base}).to("cuda")
    pipe.load_lora_weights("THIS_FOLDER")
    pipe("a cat").images[0]
{comfyui}""",
    "lora-kohya": """ComfyUI: put `{file}` into `models/loras`, node *Load LoRA*, strength 1, after the base
model. A1111 and Forge: into `models/Lora`, write `<lora:NAME:1>` into the prompt. diffusers:

    from diffusers import {pipeline}
    pipe = {pipeline}.from_pretrained({base}).to("cuda")
    pipe.load_lora_weights("THIS_FOLDER", weight_name="{file}")
""",
    "single-file": """ComfyUI: put `{file}` into `models/checkpoints`, node *Load Checkpoint*. A1111 and Forge:
into `models/Stable-diffusion`. diffusers:

    from diffusers import {pipeline}
    pipe = {pipeline}.from_single_file("THIS_FOLDER/{file}").to("cuda")

Without network, add `config="FOLDER"`, a folder of the base in diffusers layout.
""",
}


def _settings(values: Mapping[str, Any]) -> str:
    lines = [(Code(name), Code(value)) for name, value in values.items()]
    return table(["setting", "value"], lines) if lines else "Not recorded.\n"
