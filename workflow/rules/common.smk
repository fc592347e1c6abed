# Shared by all rules; the checked config, where things lie, and how a stage is called.
import sys
from glob import glob
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from snakemake.exceptions import WorkflowError

from stages.core.configuration import ConfigError, check_config, without_defaults
from stages.core.disk import DiskError, refuse_full, refuse_unwritable
from stages.core.fingerprint import code_version
from stages.core.flags import flags
from stages.core.snakemake_lock import free_stale_lock
from stages.metrics import NETWORKS, metric_names, needs_gpu

if workflow.is_main_process:
    try:
        refuse_full(Path())
    except DiskError as error:
        raise WorkflowError(str(error))
    at_work, num_stale = free_stale_lock(Path())  # held as long as this process lives
    if num_stale:
        print(
            f"the last snakemake here was killed; its {num_stale} locks are removed",
            file=sys.stderr,
        )

try:
    config = check_config(config)
except ConfigError as error:
    raise WorkflowError(str(error))

asked = [*config["evaluation"]["metrics"], config["evaluation"]["candidate_metric"]]
asked += [config["select_pairs"]["ranker"]]
for name in set(asked) - {None, "self", *metric_names()}:
    raise WorkflowError(
        f"there is no metric {name!r}; expected one of {', '.join(metric_names())}"
    )
for name in sorted(set(asked) & set(NETWORKS)):
    if "weights" not in config["metrics"].get(name, {}):
        raise WorkflowError(
            f"metric {name!r} needs its weights: set metrics.{name}.weights to a path or a hub id"
            " (docs/metrics.md says where they are published), or leave the metric out"
        )

RUN = f"results/{config['run']}"
LOGS = f"logs/{config['run']}"
WORK = f"work/{config['run']}"

ITERATIONS = list(range(1, config["iterations"] + 1))
ADOPTED_POLICY = config["train_seed"].get("policy")
TRAINED = ITERATIONS if ADOPTED_POLICY else [0, *ITERATIONS]
POLICY_NAMES = ["base"] + [f"iter{i:02d}" for i in [0, *ITERATIONS]]
SHARDS = list(range(config["sample_candidates"]["shards"]))
EVALUATION_SHARDS = list(range(config["evaluation"]["shards"]))
METRICS = config["evaluation"]["metrics"]
PROMPT_SETS = (
    ["shapes"] if "shapes" in config else sorted(config["evaluation"]["prompt_sets"])
)
RANKER = config["select_pairs"]["ranker"]
MODEL = flags({k: v for k, v in config["model"].items() if v is not None}, "model")
LORA = flags(config["lora"], "lora")
EXECUTION = config["execution"]


onstart:
    try:
        refuse_unwritable([Path(RUN), Path(LOGS), Path(WORK)])
    except DiskError as error:
        raise WorkflowError(str(error))


wildcard_constraints:
    iter=r"(?!00)\d\d",
    policy=r"base|iter\d\d",
    set=r"[A-Za-z0-9_-]+",
    shard=r"\d+",
    metric=r"[A-Za-z0-9_.-]+",
    part="preferences|holdout",


# `launch 4 stages.train_seed ...` starts four processes, each with a GPU of its own.
# A stage's output goes to its log and to the terminal, which is spared the command line. On SIGTERM
# the shell and the log wait for the stage, which ends when its Snakemake (the shell's parent) does.
# Braces of the prefix are formatted once more by Snakemake, hence two.
shell.prefix(
    f"set -euo pipefail; trap : TERM; export SAIL_SNAKEMAKE=$PPID PYTHONPATH='{workflow.basedir}'; "
    'launch() {{ if [ "$1" -gt 1 ]; then python -m stages.launch "$@";'
    ' else python -m "${{@:2}}"; fi; }}; '
    "record() {{ trap '' TERM; "
    'tee "$1" | {{ grep --line-buffered -v " python -m stages[.]" || true; }}; }}; '
)


def metric_options(wildcards):
    """A metric's own block of the config, as one flag."""
    options = config["metrics"].get(wildcards.metric, {})
    words = [word for name in sorted(options) for word in (name, options[name])]
    return flags({"options": words}) if words else ""


def metric_gpus(wildcards):
    """A GPU for metrics that are networks."""
    return int(needs_gpu(wildcards.metric))


METRIC_EXECUTION = flags({"images_per_batch": EXECUTION["metric_images_per_batch"]})


def stage(name):
    """A stage's command, as anyone can paste it from a log."""
    return f"python -m stages.{name}"


def settings(block):
    """A training's settings as flags, save those left at their defaults: new ones rerun nothing."""
    kept = without_defaults(config[block], block)
    others = ("reference", "policy")
    return flags({k: v for k, v in kept.items() if k not in others}, "settings")


def matching(patterns):
    """The files that match patterns of the config, and those in folders that do, in order."""
    matches = [match for pattern in patterns for match in sorted(glob(pattern))]
    return list(dict.fromkeys(file for match in matches for file in files_in(match)))


def files_in(name):
    """The file, or all files of a folder."""
    if not Path(name).is_dir():
        return [name]
    return sorted(str(path) for path in Path(name).rglob("*") if path.is_file())


def named(value):
    """One name or a list of them, as a list."""
    return [value] if isinstance(value, str) else value


def data_files():
    """(key, file or pattern) of all data that the config names; none for the embedded world."""
    yield from (
        ("preferences.files", name) for name in config["preferences"].get("files", [])
    )
    if config["iterations"] and "pool" in config["prompts"]:
        yield from (("prompts.pool", name) for name in named(config["prompts"]["pool"]))
    for name, path in config["evaluation"].get("prompt_sets", {}).items():
        yield f"evaluation.prompt_sets.{name}", path


missing = [f"{key}: {name}" for key, name in data_files() if not glob(name)]
if missing:
    raise WorkflowError(
        "these files of the config do not exist:\n  - " + "\n  - ".join(missing)
    )


allowed = workflow.global_resources.get("gpu")
allowed = getattr(allowed, "value", allowed)
if allowed is not None and allowed < EXECUTION["training_gpus"]:
    raise WorkflowError(
        f"a training takes execution.training_gpus = {EXECUTION['training_gpus']} GPUs, but "
        f"--resources gpu={allowed} allows fewer, which Snakemake would clip in silence: "
        "allow more, or lower execution.training_gpus"
    )


HELD_OUT_FILES = [
    f"{RUN}/seed/holdout.parquet",
    f"{RUN}/seed/holdout_latents.parquet",
]
HELD_OUT = flags(
    {
        "preferences": HELD_OUT_FILES[0],
        "latents": HELD_OUT_FILES[1],
        **config["held_out_curve"],
    },
    "held_out",
)


def training_execution():
    """How a training runs, as one resource: Snakemake reruns nothing when it changes."""
    keys = ("micro_batch_pairs", "save_every")
    words = [flags({key: EXECUTION[key] for key in keys}, "execution")]
    if EXECUTION["gradient_checkpointing"]:
        words.append("--execution.gradient-checkpointing")
    if EXECUTION["trackers"]:
        words.append(flags({"trackers": EXECUTION["trackers"]}))
    return " ".join(words)


def scoring_execution():
    """How rewards are computed, as a resource too; empty where all of a prompt goes at once."""
    rows = EXECUTION["score_rows_per_batch"]
    return flags({"rows_per_batch": rows}) if rows else ""


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
    return str(Path(str(manifest)).parent) if manifest else "base"


def prompt_position(wildcards):
    """Which block of the pool's order an iteration takes: after those of earlier ones."""
    sizes, number = config["prompts"]["per_iteration"], int(wildcards.iter)
    position = {"skip": sum(sizes[: number - 1]), "take": sizes[number - 1]}
    return flags({"shuffle_seed": config["seed"], **position})


def ranking(wildcards):
    """Scores of the metric that ranks instead of the implicit reward."""
    if RANKER == "self":
        return []
    return f"{RUN}/iter{wildcards.iter}/candidate_scores/{RANKER}.parquet"


def shards(pattern, numbers):
    """Input function: all shards of an artifact."""
    return lambda wildcards: expand(pattern, shard=numbers, **dict(wildcards))


def prompt_set_files(name):
    """The files of an evaluation set's prompts."""
    if "shapes" in config:
        return [f"{RUN}/world/evaluation.txt"]
    return matching([config["evaluation"]["prompt_sets"][name]])


EVALUATION_FILES = [file for name in PROMPT_SETS for file in prompt_set_files(name)]


def evaluation_images(prompt_set, name):
    """All shards of a policy's images of a prompt set."""
    return expand(
        f"{RUN}/evaluation/{prompt_set}/{name}/images/shard-{{shard}}.parquet",
        shard=EVALUATION_SHARDS,
    )


def of_iterations(pattern, numbers, flag):
    """A repeated flag whose values are an iteration's number and a file of it."""
    words = [
        word
        for i in numbers
        for path in dict.fromkeys(expand(pattern, i=i, shard=SHARDS))
        for word in (i, path)
    ]
    return flags({flag: words}) if words else f"--{flag}".replace("_", "-")
