"""Config blocks as command-line flags, quoted for the shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def flags(values: Mapping[str, Any], prefix: str = "") -> str:
    """The values as flags, in rising order of their names: {'num_draws': 10} is '--num-draws 10'.

    With a prefix the flags are nested as tyro has them: '--settings.dpo-beta 5000.0'.
    """
    words: list[str] = []
    for name in sorted(values):
        flag = ".".join(filter(None, [prefix, name])).replace("_", "-")
        value = values[name]
        if isinstance(value, list | tuple):
            words += [f"--{flag}", *(shlex.quote(str(item)) for item in value)]
        else:
            words += [f"--{flag}", shlex.quote(str(value))]
    return " ".join(words)
