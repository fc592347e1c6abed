"""What Snakemake would run, file by file: many plans from one process that has imported it once.

Each plan is the command line in a fork of its own, into which nothing of this project has been
imported: common.smk finds the stages beside the Snakefile that it is given.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

JOB = re.compile(
    r"^(?:local)?rule (?P<rule>\w+):\n(?:    input: (?P<inputs>.*)\n)?(?:    output: (?P<outputs>.*)\n)?",
    flags=re.MULTILINE,
)


@dataclass(frozen=True)
class Job:
    """One job of a plan."""

    rule: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Planner:
    """A process that answers command lines of Snakemake with what they print."""

    process: subprocess.Popen[str]

    def plan(self, flags: Sequence[str]) -> list[Job]:
        """The jobs that a dry run of the command line prints, the targets' own rule left out."""
        return [job for job in self.jobs(flags) if job.outputs]

    def jobs(self, flags: Sequence[str]) -> list[Job]:
        """All jobs that a dry run prints; RuntimeError with its output if it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([*flags, "--dry-run"]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if answer["status"]:
            raise RuntimeError(answer["output"])
        return [
            Job(found["rule"], listed(found["inputs"]), listed(found["outputs"]))
            for found in JOB.finditer(answer["output"])
        ]


def listed(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(", ")) if text else ()


def followers(jobs: Sequence[Job], starts: Sequence[Job]) -> set[str]:
    """Outputs of the starting jobs and of all that read them, directly or not."""
    made = {path for job in starts for path in job.outputs}
    while True:
        more = {path for job in jobs if made & set(job.inputs) for path in job.outputs} - made
        if not more:
            return made
        made |= more


@contextmanager
def planner() -> Iterator[Planner]:
    """A planner that ends with the block."""
    binaries = Path(sys.executable).parent
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
    ) as process:
        yield Planner(process)
        assert process.stdin is not None
        process.stdin.close()


def serve() -> None:
    """Answer each line, a list of flags, with the exit status and the output of Snakemake."""
    import snakemake.cli

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if not child:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                sys.argv[1:] = json.loads(line)
                try:
                    snakemake.cli.main()
                except SystemExit as end:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(int(end.code or 0))
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            answer = {"status": os.waitstatus_to_exitcode(status), "output": output.read()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
