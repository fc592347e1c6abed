# SAIL: human preference pairs in, an aligned diffusion model and a report out.
#
#   snakemake --cores all                        the embedded world, on any machine
#   snakemake --cores all --resources gpu=8      on eight GPUs
#   snakemake --cores all seed|datasets|evaluate|report|export     only so far
#   snakemake --cores all lab                    the laboratory: many runs, over seeds (docs/laboratory.md)
from snakemake.utils import min_version

min_version("9.20")


report: "workflow/report/workflow.rst"


# A config named on the command line stands alone: keys of the embedded world must not seep into it.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/execution.smk"
include: "workflow/rules/policies.smk"
include: "workflow/rules/shapes.smk"
include: "workflow/rules/seed.smk"
include: "workflow/rules/iterate.smk"
include: "workflow/rules/online.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/export.smk"


# A workflow of its own, which calls this one for every run.
rule lab:
    log:
        "logs/lab/lab.log",
    localrule: True
    threads: workflow.cores or 1
    params:
        python=sys.executable,
        snakefile=f"{workflow.basedir}/workflow/lab/Snakefile",
    shell:
        "{params.python} -m snakemake --snakefile {params.snakefile:q} --cores {threads}"
        " --rerun-incomplete --keep-going --rerun-triggers mtime params input"
        " 2>&1 | tee {log:q}"


# What has no environment of its own has the stages'.
for work in workflow.rules:
    if work.shellcmd and not work.conda_env:
        work.conda_env = f"{workflow.basedir}/envs/sail.yaml"


onsuccess:
    if last_iteration(stop_of_run()) != LAST:
        logger.info(
            "The guards decided anew: call snakemake again to make what is left of the run."
        )
    tell_end("finished")


onerror:
    tell_end("failed")


rule all:
    default_target: True
    input:
        SEED,
        DATASETS,
        POLICIES,
        GATES,
        ONLINE,
        STEP_JUDGE,
        EVALUATION,
        REPORT,
        EXPORT,


rule seed:
    input:
        SEED,


rule datasets:
    input:
        DATASETS,


rule evaluate:
    input:
        EVALUATION,


rule report:
    input:
        REPORT,


rule export:
    input:
        EXPORT,
