# Shared by all rules; the checked config, the plan of the run, and how a stage is called.
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from stages.core.plan.configuration import (
    ConfigError,
    check_config,
    refuse_repeated_keys,
    without_defaults,
)
from stages.core.execution.disk import DiskError, refuse_full
from stages.core.errors import UserError
from stages.core.artifacts.kept_versions import kept_version
from stages.core.plan.flags import flags, numbered, tables
from stages.core.plan.problems import problems_of
from stages.core.plan.run import RunPlan, files_of
from stages.core.evaluation.gates import left_out, stopped_after
from stages.core.execution.run_record import other_data, record_of
from stages.core.execution.snakemake_lock import free_stale_lock
from stages.metrics import NETWORKS, choose_features, metric_names
from stages.shapes.folds import num_pool_captions

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
    refuse_repeated_keys(*map(Path, workflow.overwrite_configfiles or []))
    config = check_config(config)
except ConfigError as error:
    raise WorkflowError(str(error))

RUN = f"results/{config['run']}"
LOGS = f"logs/{config['run']}"
WORK = f"work/{config['run']}"
EXECUTION = config["execution"]
ON_COLLAPSE = config["guards"]["on_collapse"]
THRESHOLDS = {k: v for k, v in config["guards"].items() if k != "on_collapse"}
LIMITS = flags(without_defaults(THRESHOLDS, "guards"), "limits")


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
PLAN = RunPlan(config=config, last=LAST)
ITERATIONS, TRAINED, POLICY_NAMES = PLAN.iterations, PLAN.trained, PLAN.policies
SHARDS = list(range(config["sample_candidates"]["shards"]))
EVALUATION_SHARDS = list(range(config["evaluation"]["shards"]))
EXCLUDED_SETS = PLAN.excluded_sets
PROMPT_SETS = PLAN.prompt_sets
FEATURES = choose_features(
    config["evaluation"]["diversity_features"], PLAN.metrics_in_use
)

if workflow.is_main_process:
    problems = problems_of(
        PLAN, metric_names(), NETWORKS, FEATURES, world_pool=num_pool_captions
    )
    if problems:
        raise WorkflowError(
            f"the run cannot begin (paths begin in {Path.cwd()}):\n  - "
            + "\n  - ".join(map(str, problems))
        )
    if Path(RUN).is_dir() and (changes := other_data(Path(), config)):
        logger.warning(
            f"The run {config['run']!r} has been made from other data: {'; '.join(changes)}. What "
            "depends on it is made anew, over what is in results/. To keep both, give this one a name "
            "of its own: --config run=another"
        )
    if PLAN.is_blind:
        logger.warning(
            f"guards.on_collapse is {ON_COLLAPSE}, but evaluation.images_per_prompt is 1: diversity "
            "needs two images a prompt, and its loss will go unseen; set it to 2 or more"
        )


wildcard_constraints:
    iter=r"(?!00)\d\d",
    policy=r"base|online|iter\d\d",
    set=r"[A-Za-z0-9_-]+",
    shard=r"\d+",
    metric=r"[A-Za-z0-9_.-]+",
    part="preferences|holdout",


def stage(name, **params):
    """A stage's params: the command, as anyone can paste it, its code's digest, and its own."""
    code = kept_version(f"stages.{name}")
    return {"command": f"python -m stages.{name}", "code": code, **params}


def settings(block, prefix="settings", without=()):
    """A block as flags, save what is left at its defaults: a new optional key reruns nothing.

    What a training starts from and compares with are files, which the rules name themselves.
    """
    kept = without_defaults(config[block], block)
    others = ("reference", "policy", *without)
    return flags({k: v for k, v in kept.items() if k not in others}, prefix)


MODEL = settings("model", "model")
# The same model in the precision that judges.
SCORING = config["score_candidates"]
JUDGING = {**config["model"], "dtype": SCORING["dtype"]}
JUDGE = flags(without_defaults(JUDGING, "model"), "model")
# How much each timestep counts in a reward, and where a policy's weights and its held-out pairs lie.
WEIGHTING = {key: SCORING[key] for key in ("weights", "snr_power")}
HAS_JUDGE = WEIGHTING["weights"] not in ("uniform", "velocity")
# How timesteps are drawn and what a distilled model is told where it judges; nothing at the defaults.
DRAWING = {key: SCORING[key] for key in ("draw_law", "embedded_guidance")}
DRAWING = without_defaults(DRAWING, "score_candidates")
JUDGES = f"{RUN}/evaluation/judges/{{policy}}.json"
JUDGED_HOLDOUT = (
    f"{RUN}/evaluation/{'judged' if HAS_JUDGE else 'holdout'}/{{policy}}.parquet"
)
LORA = settings("lora", "lora") if config["lora"]["rank"] else ""
SAMPLING = settings("sampling")
CANDIDATE_SAMPLING = flags(
    without_defaults(PLAN.candidate_sampling, "sampling"), "settings"
)
HELD_OUT_FILES = [
    f"{RUN}/seed/holdout.parquet",
    f"{RUN}/seed/holdout_latents.parquet",
]
HELD_OUT_CURVE = {
    "preferences": HELD_OUT_FILES[0],
    "latents": HELD_OUT_FILES[1],
    **without_defaults(config["held_out_curve"], "held_out_curve"),
}
HELD_OUT = flags(HELD_OUT_CURVE, "held_out")


def training(name):
    """What both trainings have among their params."""
    return {
        "code": kept_version(f"stages.{name}"),
        "model": MODEL,
        "lora": LORA,
        "seed": config["seed"],
        "settings": settings(name, without=["soft_labels", "use_decisions"]),
        "held_out": HELD_OUT,
    }


def matching(patterns):
    """The files that match patterns of the config, and those in folders that do, in order."""
    files = files_of(patterns)
    return [local(file) for file in files] if STORAGE else files


def prompt_set_files(name):
    """The files of an evaluation set's prompts."""
    if "shapes" in config:
        return [f"{RUN}/world/evaluation.txt"]
    return matching([config["evaluation"]["prompt_sets"][name]])


def shown(path, category):
    """An output that `snakemake --report` shows, with the caption of that name."""
    return report(path, category=category, caption=f"../report/{Path(path).stem}.rst")


def where_given(name):
    """Param: the files of an input as a flag of its name; nothing where there are none."""
    return lambda wildcards, input: flags({name: input[name]} if input[name] else {})
