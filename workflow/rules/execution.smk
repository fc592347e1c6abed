# How jobs run, and never what they compute: GPUs, batches, environments, where files lie.
from snakemake.settings.enums import Quietness

from stages.core.execution.calm_stop import be_calm
from stages.core.execution.disk import refuse_unwritable
from stages.core.execution.run_record import record_run
from stages.core.execution.snakemake_lock import hold_run
from stages.core.execution.warm_start import has_card, offer_warm_start
from stages.metrics import PERCEPTUAL, needs_gpu

# Where files go through a bucket, as on Kubernetes: the provider's name. Nothing on a shared disk.
STORAGE = workflow.storage_settings.default_storage_provider
if STORAGE and ON_COLLAPSE != "warn":
    raise WorkflowError(
        f"guards.on_collapse is {ON_COLLAPSE}, which looks for results on a disk, but this run "
        f"keeps them in {STORAGE} storage: set it to warn, or run on a shared disk"
    )

NO_PROGRESS = {Quietness.PROGRESS, Quietness.ALL}

# A small stage takes a GPU, or a slot of one where they are shared; a training takes whole ones.
JOBS_PER_GPU = EXECUTION["jobs_per_gpu"]
IS_SHARED = JOBS_PER_GPU > 1
SHARING = {"jobs_per_gpu": JOBS_PER_GPU} if IS_SHARED else {}
SMALL_GPU = {"gpu": int(not IS_SHARED), "gpu_slot": int(IS_SHARED)}

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


def refuse_no_gpu(number):
    """WorkflowError where --resources promises GPUs and torch sees none."""
    import torch  # only here, for it takes seconds

    if not torch.cuda.is_available():
        raise WorkflowError(
            f"--resources gpu={number}, but torch {torch.__version__} sees no GPU here, so every "
            "stage would run on the CPU. `make doctor` looks at the installation. To run on the CPU, "
            "leave gpu out of --resources, or set execution.allow_cpu: true"
        )


def limit_of(name):
    """How much of a resource a call's jobs may take together; None is no limit."""
    limit = workflow.global_resources.get(name)
    limit = getattr(limit, "value", limit)
    return None if limit is None or limit >= sys.maxsize else limit


def starts_warm(num_jobs):
    """Whether stages run in forks of one Python that has imported their libraries.

    Unless the config says, not for one job alone, nor beside a graphics card: no card has seen it.
    """
    wanted = EXECUTION["warm_start"]
    if wanted is None:
        wanted = num_jobs > 1 and not allowed and not has_card()
    return wanted and not workflow.non_local_exec


def planned_jobs():
    """The jobs of this call, as its journal keeps them."""
    from stages.core.progress.journal import Job

    dag = workflow.dag
    todo = {job: dag.jobid(job) for job in dag.needrun_jobs()}
    for job, number in todo.items():
        gpus = job.resources.get("gpu", 0) or (
            job.resources.get("gpu_slot", 0) / JOBS_PER_GPU
        )
        facts = {
            "number": number,
            "rule": job.rule.name,
            "needs": tuple(
                sorted(todo[other] for other in dag.dependencies[job] if other in todo)
            ),
            "threads": job.threads,
            "gpus": gpus if allowed or workflow.non_local_exec else 0,
            "is_local": job.is_local,
            "log": str(job.log[0]) if job.log else "",
        }
        yield Job(**facts)


def follow_jobs():
    """The journal of this call, which hears of its jobs from now on and says now and then how long it takes yet."""
    from stages.core.progress.journal import NAME, Journal, Limits
    from stages.core.progress.terminal import Teller

    is_remote = workflow.non_local_exec
    journal = Journal(
        Path(LOGS) / NAME,
        planned_jobs(),
        Limits(
            cores=None if is_remote else limit_of("_cores"),
            gpus=allowed,
            jobs=limit_of("_nodes") if is_remote else None,
        ),
        Teller(
            journal=Path(LOGS) / NAME,
            is_quiet=bool(NO_PROGRESS & set(workflow.output_settings.quiet or ())),
        ),
    )
    workflow.scheduler.print_progress = (
        True  # --quiet keeps it from the terminal, not from us
    )
    logger.addHandler(journal)
    return journal


def tell_end(event):
    """Note that this call has ended, and have the command of the config tell whom it tells."""
    from stages.core.progress.notices import notice, notify

    if JOURNAL is None:  # --touch makes nothing
        return
    try:
        gate = stop_of_run()
    except WorkflowError:  # a damaged record of a gate: the next call says so
        gate = None
    if event == "failed" and gate and not STOP:
        event = "stopped"
    elif event == "failed" and JOURNAL.is_interrupted:
        event = "interrupted"
    JOURNAL.end(event)
    if not config["notify"]:
        return
    told = notice(
        event,
        JOURNAL.call,
        run=config["run"],
        folder=Path.cwd(),
        reason=" ".join(gate.findings) if gate else "",
    )
    if problem := notify(config["notify"], told, Path.cwd()):
        # The command itself may hold a token.
        logger.warning(f"notify: its command has told nobody, because {problem}")


onstart:
    be_calm(logger)
    global RUN_LOCK, JOURNAL  # the lock is held as long as this process lives
    if allowed and not workflow.non_local_exec and not EXECUTION["allow_cpu"]:
        refuse_no_gpu(allowed)
    try:
        RUN_LOCK = hold_run(Path(), config["run"])
    except UserError as error:
        raise WorkflowError(str(error))
    record_run(Path(), config, Path(workflow.basedir))
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
    JOURNAL = None if workflow.touch else follow_jobs()
    if JOURNAL and starts_warm(len(JOURNAL.call.jobs)):
        offer_warm_start(Path(workflow.basedir), Path(".snakemake/warm_start.log"))


def training_execution():
    """How a training runs, as one resource: Snakemake reruns nothing when it changes."""
    keys = ("micro_batch_pairs", "save_every", "save_minutes")
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


def batches(key):
    """How many items go at once, as a resource: Snakemake reruns nothing when it changes.

    No flag where the key is null: then all of a prompt go at once.
    """
    flag, size = key.split("_", 1)[1], EXECUTION[key]
    return flags({**({flag: size} if size else {}), **SHARING})


def small_gpu(key=None, name="execution"):
    """What a small stage takes: a GPU or a slot of one, and how many items go at once."""
    return {**SMALL_GPU, name: batches(key) if key else flags(SHARING)}


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
    "execution": batches("metric_images_per_batch"),
}
FEATURES_GPU = small_gpu() if FEATURES != PERCEPTUAL else {"execution": flags(SHARING)}


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
PYTHON = str(Path(sys.executable).parent).replace("{", "{{").replace("}", "}}")
shell.prefix(
    f"export PYTHONPATH={HOME} SAIL_PYTHON={shlex.quote(PYTHON)}; "
    f'. "$PYTHONPATH/workflow/prelude.sh" || exit 1; {stored_results()}'
)
