# Shared by all rules; the checked config, the plan of the run, and how a stage is called.
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.enums import Quietness

from stages.core.plan.configuration import (
    ConfigError,
    check_config,
    refuse_repeated_keys,
    without_defaults,
)
from stages.core.execution.disk import DiskError, refuse_full, refuse_unwritable
from stages.core.errors import UserError
from stages.core.artifacts.kept_versions import kept_version
from stages.core.plan.flags import flags
from stages.core.plan.run import RunPlan, files_of
from stages.core.evaluation.gates import left_out, stopped_after
from stages.core.execution.calm_stop import be_calm
from stages.core.execution.run_record import other_data, record_of, record_run
from stages.core.execution.snakemake_lock import free_stale_lock, hold_run
from stages.core.execution.warm_start import has_card, offer_warm_start
from stages.metrics import (
    NETWORKS,
    PERCEPTUAL,
    choose_features,
    metric_names,
    needs_gpu,
)
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
ADOPTED_POLICY = config["train_seed"].get("policy")
SHARDS = list(range(config["sample_candidates"]["shards"]))
EVALUATION_SHARDS = list(range(config["evaluation"]["shards"]))
EXCLUDED_SETS = PLAN.excluded_sets
METRICS, PROMPT_SETS = config["evaluation"]["metrics"], PLAN.prompt_sets
FEATURES = choose_features(
    config["evaluation"]["diversity_features"], PLAN.metrics_in_use
)
RANKER = config["select_pairs"]["ranker"]


def problems():
    """What is wrong with the run and can be known before its first job."""
    found = [
        *PLAN.file_problems(),
        *PLAN.family_problems(),
        *PLAN.metric_problems(metric_names(), NETWORKS, FEATURES),
    ]
    if found:
        return found
    if PLAN.is_world:
        num_captions = num_pool_captions(config["shapes"]["num_seed_captions"])
        return list(PLAN.pool_problems(num_captions))
    # Only here, for it imports pyarrow, which other jobs need not wait for.
    from stages.core.plan.pool import small_pool_problems

    return list(small_pool_problems(PLAN))


if workflow.is_main_process:
    if lines := [str(problem) for problem in problems()]:
        raise WorkflowError(
            f"the run cannot begin (paths begin in {Path.cwd()}):\n  - "
            + "\n  - ".join(lines)
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


def stage(name):
    """Params for the rule of a stage; the command, as anyone can paste it, and its code's digest."""
    return {
        "command": f"python -m stages.{name}",
        "code": kept_version(f"stages.{name}"),
    }


def settings(block, prefix="settings", without=()):
    """A block as flags, save what is left at its defaults: a new optional key reruns nothing.

    What a training starts from and compares with are files, which the rules name themselves.
    """
    kept = without_defaults(config[block], block)
    others = ("reference", "policy", *without)
    return flags({k: v for k, v in kept.items() if k not in others}, prefix)


MODEL = settings("model", "model")
# The same model in the precision that judges.
JUDGING = {**config["model"], "dtype": config["score_candidates"]["dtype"]}
JUDGE = flags(without_defaults(JUDGING, "model"), "model")
# How much each timestep counts in a reward, and where a policy's weights and its held-out pairs lie.
DRAWS_BY_JUDGE = (
    config["score_candidates"]["allocation"] == "importance"
    or config["score_candidates"]["adaptive_confidence"] > 0
)
WEIGHTING = {key: config["score_candidates"][key] for key in ("weights", "snr_power")}
HAS_JUDGE = WEIGHTING["weights"] not in ("uniform", "velocity")
# How timesteps are drawn and what a distilled model is told where it judges; nothing at the defaults.
DRAWING = {
    key: config["score_candidates"][key] for key in ("draw_law", "embedded_guidance")
}
DRAWING = without_defaults(DRAWING, "score_candidates")
JUDGES = f"{RUN}/evaluation/judges/{{policy}}.json"
JUDGED_HOLDOUT = (
    f"{RUN}/evaluation/{'judged' if HAS_JUDGE else 'holdout'}/{{policy}}.parquet"
)
REWARDS_BY = flags({"rewards_by": config["score_candidates"]["rewards_by"], **DRAWING})
LORA = settings("lora", "lora") if config["lora"]["rank"] else ""
SAMPLING = settings("sampling")
CANDIDATE_FILES = flags(
    without_defaults(
        config["sample_candidates"]["files"], "sample_candidates", "files"
    ),
    "files",
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
STEP_JUDGE_HELD_OUT = flags(
    {**HELD_OUT_CURVE, "every_steps": config["step_judge"]["every_steps"]}, "held_out"
)


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


def numbered(flag, rows):
    """A repeated flag whose values are words and files; there also where it has none."""
    return flags({flag: [word for row in rows for word in row]})


def tables(**rows):
    """Such flags in one; one that has no values is left out."""
    return " ".join(numbered(flag, rows[flag]) for flag in sorted(rows) if rows[flag])
