"""A Kubernetes API of one machine, as far as Snakemake's plugin talks to it: jobs become processes.

What the plugin asks for is recorded. Each job's command is run as it is in a fresh folder, as it would be
in a pod's empty working directory; there are no containers, and resources are only written down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]


class PretendKubernetes(ThreadingHTTPServer):
    """Keeps every job that was created, and its process."""

    daemon_threads = True

    def __init__(self, folder: Path, kill_first: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.kill_first = folder, kill_first
        self.jobs: list[Json] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def create_job(self, job: Json) -> None:
        """Record a job and start its container's command; the first of one rule is killed at once."""
        name = job["metadata"]["name"]
        self.jobs.append(job)
        [container] = job["spec"]["template"]["spec"]["containers"]
        workdir = self.folder / name
        workdir.mkdir()
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*container["command"], *container["args"]], cwd=workdir, stdout=log, stderr=log,
                env={**os.environ, "KUBERNETES_SERVICE_HOST": "127.0.0.1", "PIP_NO_DEPS": "1"},
                start_new_session=True,
            )  # fmt: skip
        if self.kill_first and self.kill_first in container["args"][-1]:
            self.kill_first = ""
            self.kill(self.processes[name])

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """End all that a pod has started."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def status(self, name: str) -> Json:
        """How a job is doing, in Kubernetes' words."""
        code = self.processes[name].poll()
        key = {None: "active", 0: "succeeded"}.get(code, "failed")
        [job] = [job for job in self.jobs if job["metadata"]["name"] == name]
        return {**job, "status": {key: 1}}


class Handler(BaseHTTPRequestHandler):
    """Answers the plugin's requests."""

    server: PretendKubernetes

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/jobs"):
            self.server.create_job(body)
        self.answer(body, 201)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/status"):
            self.answer(self.server.status(path.split("/")[-2]))
        else:
            self.answer({"kind": "PodList", "apiVersion": "v1", "items": []})

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def answer(self, body: Json, code: int = 200) -> None:
        whole = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def pretend_kubernetes(
    folder: Path, *, kill_first: str = ""
) -> Iterator[tuple[PretendKubernetes, Path]]:
    """The service and a kubeconfig that points at it."""
    folder.mkdir()
    server = PretendKubernetes(folder, kill_first)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = folder / "kubeconfig"
    url = f"http://127.0.0.1:{server.server_address[1]}"
    config.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "pretend", "cluster": {"server": url}}],
                "users": [{"name": "nobody", "user": {}}],
                "contexts": [{"name": "it", "context": {"cluster": "pretend", "user": "nobody"}}],
                "current-context": "it",
            }
        )
    )
    try:
        yield server, config
    finally:
        for process in server.processes.values():
            server.kill(process)
        server.shutdown()
        server.server_close()
