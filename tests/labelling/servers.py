"""A labelling page that runs as a process of its own, and a person at it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar
from typing import Any


@contextmanager
def serving(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it prints; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "stages.label", "--no-open-browser", "--port", "0", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None, process.communicate()[1]
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


class Person:
    """Answers over HTTP as the page's script does."""

    def __init__(self, address: str, name: str) -> None:
        self.name, self._here = name, address.split("/?")[0]
        cookies = urllib.request.HTTPCookieProcessor(CookieJar())
        self._opener = urllib.request.build_opener(cookies)
        self._opener.open(address).read()
        self.page = self._read(f"/?labeller={name}")

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to answer."""
        return 'data-pair="' not in self.page

    @property
    def pair(self) -> str:
        """The pair before this person."""
        found = re.search(r'data-pair="([0-9a-f]{16})"', self.page)
        assert found is not None, self.page
        return found[1]

    def post(self, path: str, **asked: Any) -> None:
        """Ask for something; the page is what comes back."""
        self.page = self._read(path, json.dumps({"labeller": self.name, **asked}).encode())

    def answer(self, choice: str, *ranks: int) -> None:
        """Answer the pair, or rank the images in the order in which they stand there."""
        self.post("/answer", pair=self.pair, answer=choice, **({"ranks": ranks} if ranks else {}))

    def _read(self, path: str, data: bytes | None = None) -> str:
        request = urllib.request.Request(self._here + path, data, {"Origin": self._here})
        with self._opener.open(request, timeout=30) as answer:
            text: str = answer.read().decode()
        return text
