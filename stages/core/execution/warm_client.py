"""Have a stage run in a fork of the warm Python of this call; where that cannot be, start it cold.

    python -ISE warm_client.py SOCKET STAGE [FLAGS ...]

`workflow/warm_python` calls it in the place of `python -m STAGE [FLAGS ...]`. It imports little, because
it lives in the place of every stage: it hands the stage's words, environment and standard streams to
the server, waits for the end, and ends in the same way. `warm_start` has the whole story.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress

LOADS_A_MODEL = (
    "adopt_policy",
    "encode_preferences",
    "export_policy",
    "generate_evaluation",
    "sample_candidates",
    "score_candidates",
    "score_holdout",
    "shapes.make_preferences",
    "train_online",
    "train_seed",
    "train_step_judge",
    "update_policy",
)
"""Stages that wait until the warm Python has imported everything; others start cold until then."""
READY = "ready"
"""The file beside the socket that says so."""
TAKEN, REFUSED, END = b"t", b"r", b"e"
"""The server's answers: a stage runs; it cannot run here; its exit status follows."""
TERMINATE = b"T"
"""The client's word that it has been sent SIGTERM."""
DEATHS = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGPIPE, signal.SIGTERM)
"""Signals by which the client ends itself where its stage has; by others a shell's number tells it."""


def main(path: str, words: list[str]) -> None:
    """Never returns."""
    try:
        status = warm(path, words)
    except KeyboardInterrupt:  # as stages/__init__.py says it
        print("stopped before it began", file=sys.stderr)
        status = int(signal.SIGINT)
    if status is None:
        os.execv(sys.executable, [sys.executable, "-m", *words])
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in DEATHS:
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number if number else os.WEXITSTATUS(status))


def warm(path: str, words: list[str]) -> int | None:
    """The wait status of the stage's process; None if it did not run."""
    stage = words[0].removeprefix("stages.")
    if stage not in LOADS_A_MODEL and not os.path.exists(
        os.path.join(os.path.dirname(path), READY)
    ):
        return None
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(path)
        fields = [sys.executable, sys.version, str(os.getppid()), str(len(words)), *words]
        variables = (name + b"=" + value for name, value in os.environb.items())
        request = b"\0".join([*map(os.fsencode, fields), *variables])
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        if server.recv(1) != TAKEN:
            return None
    except (OSError, ValueError):
        return None
    # The stage is in this process group, and has the terminal's signals itself.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: pass_on(server))
    try:
        answer = b""
        while len(answer) < 5 and (more := server.recv(5 - len(answer))):
            answer += more
    except OSError:
        answer = b""
    if answer[:1] != END or len(answer) < 5:  # the server was killed, and the stage with it
        return int(signal.SIGKILL)
    return int.from_bytes(answer[1:], "big")


def pass_on(server: socket.socket) -> None:
    """Tell the server of SIGTERM, if it is still there."""
    with suppress(OSError):
        server.sendall(TERMINATE)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
