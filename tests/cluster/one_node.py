"""A real Slurm on this one machine, with pretend GPUs: as root, without systemd, up in a second.

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python -m tests.cluster.one_node 4 snakemake --profile profiles/slurm      # or any other command

Memory, cores and GPUs are pretended, so that a laptop passes for a large node: Slurm counts them, hands
them out and sets CUDA_VISIBLE_DEVICES, and confines nothing. The prolog and the epilog of each job write
down which GPUs Slurm gave it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages.core.execution.locks import held

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
CONFIG = Path("/etc/slurm")
"""The only place where a job step finds the configuration: Snakemake's plugin drops SLURM_CONF."""

MARK = "# written by tests/cluster/one_node.py, which removes it again\n"

SLURM_CONF = """\
ClusterName=pretend
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
Prolog={folder}/prolog
Epilog={folder}/epilog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
AccountingStorageType=accounting_storage/none
MinJobAge=3600
KillWait=5
DefMemPerCPU=100
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

NOTE = """\
#!/bin/sh
echo "{event} $(date +%s.%N) $SLURM_JOB_ID $SLURM_JOB_GPUS" >> {folder}/jobs
"""


@dataclass(frozen=True)
class Stay:
    """The time that one job held its GPUs."""

    job: int
    gpus: frozenset[int]
    begin: float
    end: float

    def overlaps(self, other: Stay) -> bool:
        """Whether the two held a GPU at the same time."""
        is_together = self.begin < other.end and other.begin < self.end
        return is_together and bool(self.gpus & other.gpus)


@dataclass(frozen=True)
class Cluster:
    """A running one-node cluster; everything of it lies in one folder."""

    folder: Path

    def stays(self) -> list[Stay]:
        """What the prologs and epilogs wrote of the jobs that are over, in the order of their ends."""
        begun: dict[int, tuple[float, frozenset[int]]] = {}
        over = []
        path = self.folder / "jobs"
        for line in path.read_text().splitlines() if path.is_file() else []:
            event, when, job, *gpus = line.split()
            if event == "begin":
                numbers = frozenset(int(n) for n in gpus[0].split(",")) if gpus else frozenset()
                begun[int(job)] = (float(when), numbers)
            else:
                begin, numbers = begun.pop(int(job))
                over.append(Stay(int(job), numbers, begin, float(when)))
        return over

    def queue(self) -> list[tuple[str, str, str]]:
        """(id, state, comment) of all jobs that Slurm remembers."""
        lines = output("squeue", "--noheader", "--states=all", "--format=%i|%T|%k").splitlines()
        return [tuple(line.split("|")) for line in lines]  # type: ignore[misc]


def why_not() -> str | None:
    """The reason for which no cluster can be started here; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)})"
    if os.geteuid() != 0:
        return "a Slurm of one's own takes root"
    conf = CONFIG / "slurm.conf"
    if conf.is_file() and MARK not in conf.read_text():
        return f"this machine belongs to a cluster already ({conf})"
    return None


@contextmanager
def one_node(gpus: int) -> Iterator[Cluster]:
    """A cluster of this machine with pretend GPUs, until the end of the block. One at a time."""
    with held(Path(tempfile.gettempdir()) / "sail-one-node-slurm.lock", "the one-node Slurm"):
        folder = Path(tempfile.mkdtemp(prefix="sail-slurm-"))
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, folder)
            write_configuration(folder, gpus)
            for name in ("slurm.conf", "gres.conf"):
                undo.callback((CONFIG / name).unlink)
            start_munge(folder, undo)
            start_daemon(folder, "slurmctld", "-i", undo=undo)
            wait_until(lambda: "UP" in output("scontrol", "ping"), folder)
            start_daemon(folder, "slurmd", "-N", host_name(), undo=undo)
            wait_until(lambda: output("sinfo", "-h", "-o", "%T").strip() == "idle", folder)
            yield Cluster(folder)
            subprocess.run(["scancel", "--user=root"], check=False)


def write_configuration(folder: Path, gpus: int) -> None:
    """The files of slurmctld and slurmd. Slurm sets CUDA_VISIBLE_DEVICES for character devices only."""
    for name in ("state", "spool", "devices"):
        (folder / name).mkdir()
    for index in range(gpus):
        path = folder / "devices" / f"nvidia{index}"
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))  # another /dev/null
    for event, name in (("begin", "prolog"), ("end", "epilog")):
        (folder / name).write_text(NOTE.format(event=event, folder=folder))
        (folder / name).chmod(0o755)
    controller_port, node_port = free_ports(2)
    CONFIG.mkdir(exist_ok=True)
    (CONFIG / "slurm.conf").write_text(
        MARK + SLURM_CONF.format(
            host=host_name(), folder=folder, gpus=gpus,
            controller_port=controller_port, node_port=node_port,
        )
    )  # fmt: skip
    (CONFIG / "gres.conf").write_text(
        f"{MARK}AutoDetect=off\n"
        f"NodeName={host_name()} Name=gpu File={folder}/devices/nvidia[0-{gpus - 1}]\n"
    )


def start_munge(folder: Path, undo: ExitStack) -> None:
    """The service by which Slurm's parts know each other, with a key of its own."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    folder.chmod(0o711)  # munged refuses a socket that others cannot reach
    start_daemon(
        folder, "munged", f"--key-file={key}", f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munge.seed", undo=undo,
    )  # fmt: skip


def start_daemon(folder: Path, name: str, *flags: str, undo: ExitStack) -> None:
    """Start it, and have it ended when the cluster ends."""
    undo.callback(stop, folder / f"{name}.pid")
    done = subprocess.run([name, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} did not start: {done.stderr}")


def stop(pid_file: Path) -> None:
    """End a daemon and wait for it."""
    if not pid_file.is_file() or not pid_file.read_text().strip():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def wait_until(is_done: Callable[[], bool], folder: Path) -> None:
    """Poll; RuntimeError with the daemons' last lines after half a minute."""
    deadline = time.monotonic() + 30
    while not is_done():
        if time.monotonic() > deadline:
            logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
            raise RuntimeError(f"Slurm does not come up: {logs}")
        time.sleep(0.05)


def output(*command: str) -> str:
    """What a command prints; empty where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def host_name() -> str:
    """This node's name, without its domain."""
    return socket.gethostname().partition(".")[0]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        sys.exit(__doc__)
    reason = why_not()
    if reason:
        sys.exit(f"error: {reason}")
    with one_node(int(sys.argv[1])) as cluster:
        done = subprocess.run(sys.argv[2:], check=False)
        for stay in cluster.stays():
            print(f"job {stay.job}: GPUs {sorted(stay.gpus)}, {stay.end - stay.begin:.1f} s")
    sys.exit(done.returncode)
