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
SMALL_GPU, SMALL_SLOT = int(not IS_SHARED), int(IS_SHARED)
TRAINING_SLOTS = EXECUTION["training_gpus"] * JOBS_PER_GPU if IS_SHARED else 0


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


# `launch 4 stages.train_seed ...` starts four processes, each with a GPU of its own.
# A stage's output goes to its log and to the terminal, which is spared the command line. On SIGTERM
# the shell and the log wait for the stage, which ends when its Snakemake (the shell's parent) does.
# Braces of the prefix are formatted once more by Snakemake, hence two.
shell.prefix(
    "set -euo pipefail; trap : TERM; export SAIL_SNAKEMAKE=$PPID PYTHONPATH="
    + shlex.quote(str(workflow.basedir)).replace("{", "{{").replace("}", "}}")
    + "; "
    'launch() {{ if [ "$1" -gt 1 ]; then python -m stages.launch "$@";'
    ' else python -m "${{@:2}}"; fi; }}; '
    "record() {{ trap '' TERM; "
    'tee "$1" | {{ grep --line-buffered -v " python -m stages[.]" || true; }}; }}; '
    + stored_results()
)


def options_of(metric):
    """A metric's own block of the config, as one flag."""
    options = config["metrics"].get(metric, {})
    words = [word for name in sorted(options) for word in (name, options[name])]
    return flags({"options": words}) if words else ""


def metric_options(wildcards):
    return options_of(wildcards.metric)


def metric_gpus(wildcards):
    """A GPU for metrics that are networks, if GPUs are not shared."""
    return SMALL_GPU * needs_gpu(wildcards.metric)


def metric_environment(wildcards):
    """The environment file of a metric that has pins of its own, else that of all metrics."""
    own = EXECUTION["metric_environments"].get(wildcards.get("metric", FEATURES))
    return str(Path(own).resolve()) if own else f"{workflow.basedir}/envs/metrics.yaml"


def metric_slots(wildcards):
    """A slot of a GPU for metrics that are networks, if GPUs are shared."""
    return SMALL_SLOT * needs_gpu(wildcards.metric)


METRIC_EXECUTION = flags(
    {"images_per_batch": EXECUTION["metric_images_per_batch"], **SHARING}
)


def stage(name):
    """A stage's command, as anyone can paste it from a log."""
    return f"python -m stages.{name}"


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


def scoring_execution():
    """How rewards are computed, as a resource too; no batch where all of a prompt goes at once."""
    rows = EXECUTION["score_rows_per_batch"]
    return flags({**({"rows_per_batch": rows} if rows else {}), **SHARING})


def policy(name):
    """The manifest that completes a policy's folder; nothing for the base model.

    Where files go through a bucket, which would not fetch the rest of the folder, with its weights.
    """
    if name == "base":
        return []
    manifest = f"{RUN}/{name}/policy/manifest.json"
    return [manifest, stored_weights(name)] if STORAGE else manifest


def stored_weights(name, flag=lambda path: path):
    """A policy's weights where files go through a bucket: a LoRA's file, or a network's folder."""
    if not STORAGE:
        return []
    if config["lora"]["rank"] > 0:
        return f"{RUN}/{name}/policy/pytorch_lora_weights.safetensors"
    return flag(f"{RUN}/{name}/policy/unet")


def previous(wildcards):
    """Name of the policy that an iteration starts from; iteration 0 is the seed training."""
    return f"iter{int(wildcards.iter) - 1:02d}"


def previous_policy(wildcards):
    """What an iteration starts from; with a gate what it hands on."""
    if ON_COLLAPSE != "warn":
        return f"{RUN}/iter{wildcards.iter}/start/manifest.json"
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
    if manifest and not isinstance(manifest, str):
        manifest = manifest[0]
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


EXCLUDED_SETS = config["evaluation"]["exclude_from_training"]
if EXCLUDED_SETS is None:
    EXCLUDED_SETS = PROMPT_SETS
EXCLUDED_FILES = [file for name in EXCLUDED_SETS for file in prompt_set_files(name)]


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


def gate_inputs(wildcards):
    """What the gate of an iteration looks at: its own tables, and iteration 0's to compare."""
    number = int(wildcards.number)
    own, names = f"{RUN}/iter{number:02d}", ["iter00", f"iter{number:02d}"]
    found = {
        "holdout": expand(f"{RUN}/evaluation/holdout/{{name}}.parquet", name=names),
        "diversity": expand(
            f"{RUN}/evaluation/{PROMPT_SETS[0]}/{{name}}/diversity.parquet",
            name=names,
        ),
    }
    if number:
        found["pairs"] = f"{own}/pairs.parquet"
        found["previous"] = f"{RUN}/iter{number - 1:02d}/gate.json"
    return found


def gate_flags(wildcards, input):
    """The same, as flags."""
    number = int(wildcards.number)
    values = {
        "iteration": number,
        "holdout": [0, input.holdout[0], number, input.holdout[1]],
        "diversity": [0, input.diversity[0], number, input.diversity[1]],
    }
    if number:
        values |= {"pairs": [number, input.pairs], "previous": input.previous}
    return flags(values)


def gate_before(wildcards):
    """The decision on the iteration before; under stop, judging anew unmakes nothing made since."""
    path = f"{RUN}/{previous(wildcards)}/gate.json"
    return ancient(path) if ON_COLLAPSE == "stop" else path
