# What every rule shares: the checked config, where things lie, and how a stage is called.
import sys

sys.path.insert(0, workflow.basedir)

from snakemake.exceptions import WorkflowError

from stages.core.configuration import ConfigError, check_config
from stages.core.fingerprint import code_version
from stages.core.flags import flags

try:
    config = check_config(config)
except ConfigError as error:
    raise WorkflowError(str(error))

RUN = f"results/{config['run']}"
LOGS = f"logs/{config['run']}"
WORK = f"work/{config['run']}"

ITERATIONS = list(range(1, config["iterations"] + 1))
POLICY_NAMES = ["base"] + [f"iter{i:02d}" for i in [0, *ITERATIONS]]
SHARDS = list(range(config["sample_candidates"]["shards"]))
EVALUATION_SHARDS = list(range(config["evaluation"]["shards"]))
METRICS = config["evaluation"]["metrics"]
PROMPT_SETS = (
    ["shapes"] if "shapes" in config else sorted(config["evaluation"]["prompt_sets"])
)
MODEL = {"base": config["model"]["base"], "dtype": config["model"]["dtype"]}

wildcard_constraints:
    iter=r"(?!00)\d\d",
    policy=r"base|iter\d\d",
    set=r"[A-Za-z0-9_-]+",
    shard=r"\d+",
    metric=r"[A-Za-z0-9_.-]+",
    part="preferences|holdout",


shell.prefix(f"set -euo pipefail; export PYTHONPATH='{workflow.basedir}'; ")


def stage(name):
    """A stage's command, as anyone can paste it from a log."""
    return f"python -m stages.{name}"


def policy(name):
    """The manifest that completes a policy's folder; nothing for the base model."""
    return [] if name == "base" else f"{RUN}/{name}/policy/manifest.json"


def previous(wildcards):
    """Name of the policy that an iteration starts from; iteration 0 is the seed training."""
    return f"iter{int(wildcards.iter) - 1:02d}"


def previous_policy(wildcards):
    return policy(previous(wildcards))


def named_policy(kind):
    """The input function of a policy that the config calls base, seed or current."""

    def path(wildcards):
        if kind == "current":
            return previous_policy(wildcards)
        return policy({"base": "base", "seed": "iter00"}[kind])

    return path


def folder(manifest):
    """How a stage is told of a policy: its folder, or 'base'."""
    return str(manifest).removesuffix("/manifest.json") if manifest else "base"
