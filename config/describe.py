"""Write config/README.md from the schema and the default config, so that they cannot disagree.

Example:
    python config/describe.py            # write
    python config/describe.py --check    # exit 1 if the file is out of step
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SCHEMA = HERE.parent / "workflow" / "schemas" / "config.schema.yaml"

HEAD = """# Configuration

    snakemake --cores all                                             # config/config.yaml
    snakemake --cores all --config run=mine seed=7 iterations=2       # top-level keys
    snakemake --cores all --configfile config/config.yaml my.yaml     # nested keys: an overlay

An overlay names only what it changes, nested as in `config.yaml`. Give it a run name of its own
(`run: mine`); otherwise its results replace those of the run below it. `--config` changes top-level keys
only. YAML reads `1e-5` as text: write `1.0e-5`. An unknown key, a missing key or a value of another type is
refused before anything runs.

Everything here changes what is computed, except the blocks `execution` and `export`. How Snakemake runs
(cores, GPUs, retries) is in `profiles/`. A value in brackets is a default that `config.yaml` leaves out.

`python config/describe.py` writes this page from the schema and `config.yaml`.
"""


def describe() -> str:
    """The whole page."""
    schema = yaml.safe_load(SCHEMA.read_text())
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    blocks = {"": {"properties": {}}}
    for key, node in schema["properties"].items():
        if properties(node, schema):
            blocks[key] = node
        else:
            blocks[""]["properties"][key] = node
    return HEAD + "".join(
        table(name, node, config if not name else config.get(name, {}), schema)
        for name, node in blocks.items()
    )


def properties(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The keys of a block, those of a shared definition first."""
    shared = [schema["$defs"][part["$ref"].rsplit("/", 1)[1]] for part in node.get("allOf", [])]
    return {
        key: value for part in [*shared, node] for key, value in part.get("properties", {}).items()
    }


def table(name: str, node: dict[str, Any], values: dict[str, Any], schema: dict[str, Any]) -> str:
    """One block's heading, sentence and table."""
    text = f"\n## {f'`{name}`' if name else 'Top level'}\n\n"
    if node.get("description"):
        text += node["description"] + "\n\n"
    text += "| key | in config.yaml | allowed | meaning |\n|---|---|---|---|\n"
    for key, item in properties(node, schema).items():
        default = item.get("default")
        value = json.dumps(values[key]) if key in values else (
            "-" if "default" not in item else f"({json.dumps(default)})")  # fmt: skip
        text += f"| `{key}` | `{value}` | {allowed(item)} | {item.get('description', '')} |\n"
        for inner, part in item.get("properties", {}).items():
            text += f"| `{key}.{inner}` | `-` | {allowed(part)} | {part['description']} |\n"
    return text


def allowed(item: dict[str, Any]) -> str:
    """Type and range in words."""
    if "enum" in item:
        return ", ".join(f"`{value}`" for value in item["enum"])
    kind = item["type"]
    text = " or ".join(kind) if isinstance(kind, list) else kind
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
              "exclusiveMaximum": "below"}  # fmt: skip
    words = [f"{limits[limit]} {item[limit]}" for limit in limits if limit in item]
    return ", ".join([text, *words])


if __name__ == "__main__":
    page = HERE / "README.md"
    if "--check" in sys.argv:
        sys.exit(0 if page.is_file() and page.read_text() == describe() else 1)
    page.write_text(describe())
