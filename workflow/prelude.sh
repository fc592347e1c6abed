# Every rule's shell command begins with this file; common.smk says so.
# On SIGTERM the shell and the log wait for the stage, which ends when its Snakemake does: the shell's
# parent, by SAIL_SNAKEMAKE.
set -euo pipefail
trap : TERM
export SAIL_SNAKEMAKE=$PPID

# Without an activated environment: the Python that runs Snakemake.
command -v python >/dev/null || PATH="$PATH:$SAIL_PYTHON"

# Where this shell's Snakemake offers it, a stage starts in a fork of a warm Python (core/execution/warm_start.py).
if [ "${SAIL_WARM_HEAD:-}" = "$PPID" ] && hash python && [ "${BASH_CMDS[python]}" = "$SAIL_WARM_PYTHON" ] &&
    [ -x "$PYTHONPATH/workflow/warm_python" ]; then
    hash -p "$PYTHONPATH/workflow/warm_python" python
fi

# `launch 4 stages.train_seed ...` starts four processes, each with a GPU of its own.
launch() {
    if [ "$1" -gt 1 ]; then
        python -m stages.launch "$@"
    else
        python -m "${@:2}"
    fi
}

# A stage's output goes to its log whole, and to the terminal without the command line at its head.
record() {
    trap '' TERM INT
    tee "$1" | { grep --line-buffered -v " python -m stages[.]" || true; }
}
