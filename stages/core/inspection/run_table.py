"""The table of how two runs compare, prompt by prompt."""

from __future__ import annotations

import pyarrow as pa

from stages.core.artifacts.schemas import SUMMARY, Schema, column

_OWN = {
    "prompt_set": "evaluation prompts; 'held-out pairs' for the judge's accuracy on them",
    "metric": "name of the metric; 'reward_accuracy' is 1 for a pair ranked as people do, 0.5 for a tie",
    "policy": "'<run>/<policy>' of the second run",
    "baseline": "'<run>/<policy>' of the first run",
    "num_prompts": "prompts (or held-out pairs) that both have, from the same noise",
}

RUN_COMPARISON = Schema(
    "run_comparison",
    1,
    pa.schema(
        [
            column(field.name, field.type, _OWN.get(field.name, field.metadata[b"description"].decode()))
            for field in SUMMARY.arrow
            if field.name != "better_of_two"
        ]
    ),
)  # fmt: skip
"""One row a policy and metric."""
