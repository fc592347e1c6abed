# Shared by all rules; the checked config, where things lie, and how a stage is called.
import shlex
import sys
from glob import glob
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from stages.core.plan.configuration import ConfigError, check_config, without_defaults
from stages.core.execution.disk import DiskError, refuse_full, refuse_unwritable
from stages.core.errors import UserError
from stages.core.artifacts.fingerprint import code_version
from stages.core.plan.flags import flags, word_problem
from stages.core.evaluation.gates import left_out, stopped_after
from stages.core.execution.snakemake_lock import free_stale_lock
from stages.metrics import (
    NETWORKS,
    PERCEPTUAL,
    choose_features,
    metric_names,
    needs_gpu,
)

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
FEATURES = choose_features(config["evaluation"]["diversity_features"], asked)
for name in sorted({*asked, FEATURES} & set(NETWORKS)):
    if "weights" not in config["metrics"].get(name, {}):
        raise WorkflowError(
            f"metric {name!r} needs its weights: set metrics.{name}.weights to a path or a hub id"
            " (docs/metrics.md says where they are published), or leave the metric out"
        )

RUN = f"results/{config['run']}"
LOGS = f"logs/{config['run']}"
WORK = f"work/{config['run']}"

ON_COLLAPSE = config["guards"]["on_collapse"]
THRESHOLDS = {k: v for k, v in config["guards"].items() if k != "on_collapse"}
LIMITS = flags(without_defaults(THRESHOLDS, "guards"), "limits")
IS_BLIND = ON_COLLAPSE != "warn" and config["evaluation"]["images_per_prompt"] < 2
if IS_BLIND and workflow.is_main_process:
    logger.warning(
        f"guards.on_collapse is {ON_COLLAPSE}, but evaluation.images_per_prompt is 1: diversity "
        "needs two images a prompt, and its loss will go unseen; set it to 2 or more"
    )


def stop_of_run():
    """The gate that ended this run, by its record of an earlier call and today's thresholds."""
    try:
        return stopped_after(Path(RUN), config["iterations"], ON_COLLAPSE, THRESHOLDS)
    except UserError as error:
        raise WorkflowError(str(error))


def last_iteration(stop):
    return stop.iteration if stop else config["iterations"]


STOP = stop_of_run()
if STOP and workflow.is_main_process:
    logger.warning(left_out(STOP, config["iterations"]))
LAST = last_iteration(STOP)
ITERATIONS = list(range(1, LAST + 1))
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
EXECUTION = config["execution"]
# Where files go through a bucket, as on Kubernetes: the provider's name. Nothing on a shared disk.
STORAGE = workflow.storage_settings.default_storage_provider
if STORAGE and ON_COLLAPSE != "warn":
    raise WorkflowError(
        f"guards.on_collapse is {ON_COLLAPSE}, which looks for results on a disk, but this run "
        f"keeps them in {STORAGE} storage: set it to warn, or run on a shared disk"
    )

# A small stage takes a GPU, or a slot of one where they are shared; a training takes whole ones.
JOBS_PER_GPU = EXECUTION["jobs_per_gpu"]
IS_SHARED = JOBS_PER_GPU > 1
SHARING = {"jobs_per_gpu": JOBS_PER_GPU} if IS_SHARED else {}
SMALL_GPU = {"gpu": int(not IS_SHARED), "gpu_slot": int(IS_SHARED)}


onstart:
    if IS_SHARED and workflow.non_local_exec:
        raise WorkflowError(
            f"execution.jobs_per_gpu is {JOBS_PER_GPU}, which shares the GPUs of this machine, but "
            "the jobs of this call go to a scheduler, which would be asked for no GPU: set it to 1, "
            "and let the scheduler share cards in its own way"
        )
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


def stored_results():
    """A command that shows the copies of stored files where they lie on a shared disk."""
    if not STORAGE:
        return ""
    if Path("results").is_dir() and not Path("results").is_symlink():
        raise WorkflowError(
            f"results/ is a folder here, but this run keeps its results in {STORAGE} storage, "
            "and makes results/ a link to its copies: move the folder away, or use another "
            "--directory"
        )
    prefix = workflow.storage_settings.default_storage_prefix.rstrip("/")
    provider = workflow.storage_registry.default_storage_provider
    copies = shlex.quote(str(provider.object(f"{prefix}/results").local_path()))
    return f"ln -sfn {copies} results; ".replace("{", "{{").replace("}", "}}")


# Snakemake formats the prefix: hence the doubled braces.
HOME = shlex.quote(str(workflow.basedir)).replace("{", "{{").replace("}", "}}")
shell.prefix(
    f'export PYTHONPATH={HOME}; . "$PYTHONPATH/workflow/prelude.sh" || exit 1; '
    + stored_results()
)


def options_of(metric):
    """A metric's own block of the config, as one flag."""
    options = config["metrics"].get(metric, {})
    words = [word for name in sorted(options) for word in (name, options[name])]
    return flags({"options": words}) if words else ""


def metric_environment(wildcards):
    """The environment file of a metric that has pins of its own, else that of all metrics."""
    own = EXECUTION["metric_environments"].get(wildcards.get("metric", FEATURES))
    return str(Path(own).resolve()) if own else f"{workflow.basedir}/envs/metrics.yaml"


# Of a metric that is a network.
METRIC_GPU = {
    "gpu": lambda wildcards: SMALL_GPU["gpu"] * needs_gpu(wildcards.metric),
    "gpu_slot": lambda wildcards: SMALL_GPU["gpu_slot"] * needs_gpu(wildcards.metric),
}


def batches(key):
    """How many items go at once, as a resource: Snakemake reruns nothing when it changes.

    No flag where the key is null: then all of a prompt go at once.
    """
    flag, size = key.split("_", 1)[1], EXECUTION[key]
    return flags({**({flag: size} if size else {}), **SHARING})


def stage(name):
    """Params for the rule of a stage; the command, as anyone can paste it, and its code's digest."""
    return {
        "command": f"python -m stages.{name}",
        "code": code_version(f"stages.{name}"),
    }


def settings(block, prefix="settings"):
    """A block as flags, save what is left at its defaults: a new optional key reruns nothing.

    What a training starts from and compares with are files, which the rules name themselves.
    """
    kept = without_defaults(config[block], block)
    others = ("reference", "policy")
    return flags({k: v for k, v in kept.items() if k not in others}, prefix)


MODEL = settings("model", "model")
LORA = settings("lora", "lora") if config["lora"]["rank"] else ""
SAMPLING = settings("sampling")


def matching(patterns):
    """The files that match patterns of the config, and those in folders that do, in order."""
    matches = [match for pattern in patterns for match in matches_of(pattern)]
    files = list(dict.fromkeys(file for match in matches for file in files_in(match)))
    for file in files:
        if problem := word_problem(file):
            raise WorkflowError(f"the file {file!r} cannot be used: {problem}")
    return [local(file) for file in files] if STORAGE else files


def matches_of(pattern):
    """What a pattern matches; a file or folder of that very name goes first, [brackets] and all."""
    return [pattern] if Path(pattern).exists() else sorted(glob(pattern))


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
    for name, path in EXECUTION["metric_environments"].items():
        yield f"execution.metric_environments.{name}", path


missing = [f"{key}: {name}" for key, name in data_files() if not matches_of(name)]
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
# --resources gpu=8 goes on to mean eight GPUs; they have so many slots.
if allowed is not None and IS_SHARED and workflow.is_main_process:
    workflow.register_resource("gpu_slot", allowed * JOBS_PER_GPU)


HELD_OUT_FILES = [
    f"{RUN}/seed/holdout.parquet",
    f"{RUN}/seed/holdout_latents.parquet",
]
HELD_OUT = flags(
    {
        "preferences": HELD_OUT_FILES[0],
        "latents": HELD_OUT_FILES[1],
        **without_defaults(config["held_out_curve"], "held_out_curve"),
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


TRAINING_GPUS = {
    "gpu": EXECUTION["training_gpus"],
    "gpu_slot": EXECUTION["training_gpus"] * JOBS_PER_GPU if IS_SHARED else 0,
    "execution": training_execution(),
}


def training(name):
    """What both trainings have among their params."""
    return {
        "code": code_version(f"stages.{name}"),
        "model": MODEL,
        "lora": LORA,
        "seed": config["seed"],
        "settings": settings(name),
        "held_out": HELD_OUT,
    }


def prompt_set_files(name):
    """The files of an evaluation set's prompts."""
    if "shapes" in config:
        return [f"{RUN}/world/evaluation.txt"]
    return matching([config["evaluation"]["prompt_sets"][name]])


EXCLUDED_SETS = config["evaluation"]["exclude_from_training"]
if EXCLUDED_SETS is None:
    EXCLUDED_SETS = PROMPT_SETS
EXCLUDED_FILES = [file for name in EXCLUDED_SETS for file in prompt_set_files(name)]


def numbered(flag, rows):
    """A repeated flag whose values are words and files; there also where it has none."""
    return flags({flag: [word for row in rows for word in row]})


def tables(**rows):
    """Such flags in one; one that has no values is left out."""
    return " ".join(numbered(flag, rows[flag]) for flag in sorted(rows) if rows[flag])
