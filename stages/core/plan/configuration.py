"""The config, checked against its schema, with messages that name the key and the nearest right one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from stages.core.errors import UserError
from stages.core.plan.consistency import mistakes_together, nearest
from stages.core.plan.families import SCHEMA
from stages.core.plan.flags import word_problem

MAX_DEPTH = 20
MAX_ENTRIES = 100_000
"""Of keys, values and list items; what has more is a mistake, or a bomb of YAML aliases."""

ONLY_FORGOTTEN = 5
"""Keys that somebody may have forgotten; with more missing, the file was never a whole config."""

Config = dict[str, Any]


class ConfigError(UserError):
    """A config that cannot be run; the message lists every mistake with its key."""


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = yaml.safe_load(SCHEMA.read_text())
    return schema


def check_config(config: Config) -> Config:
    """The config with defaults filled in. ConfigError lists everything that is wrong."""
    _refuse(list(_check_plain(config)))
    schema = _schema()
    config = copy.deepcopy(config)
    _drop_prompt_sets(config)
    _fill_defaults(config, schema)
    errors = sorted(
        _Validator(schema).iter_errors(config), key=lambda error: list(map(str, error.path))
    )
    mistakes = [line for error in errors for line in _explain(error, schema)]
    if sum(line.endswith(" is missing") for line in mistakes) > ONLY_FORGOTTEN:
        mistakes = [
            "most keys are missing: is it an overlay? Name the config that it lies on before it, as "
            "--configfile config/sd15.yaml mine.yaml",
            *mistakes,
        ]
    _refuse(mistakes)
    _refuse(list(mistakes_together(config)))
    return config


def read_config(*paths: Path) -> Config:
    """The config in a file with those of others laid over it, checked.

    ConfigError if one cannot be read, or for what `check_config` finds.
    """
    config: Config = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            loaded, repeated = yaml.safe_load(text), repeated_keys(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        loaded = {} if loaded is None else loaded
        _refuse([f"{path}, {where}" for where in repeated])
        _refuse(list(_check_plain(loaded)))
        config = merged(config, loaded)
    return check_config(config)


def repeated_keys(text: str) -> list[str]:
    """Where a block of YAML names a key twice: all but the last would be forgotten without a word."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting, found = [root], []
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or len(seen) > MAX_ENTRIES:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            names: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                name = str(key.value)[:200]
                if name in names and name != "<<":
                    found.append(
                        f"line {line}: the key {name!r} stands in line {names[name]} already; make one block "
                        "of the two"
                    )
                names[name] = line
                waiting.append(value)
    return found


def refuse_repeated_keys(*paths: Path) -> None:
    """ConfigError for a key that a file names twice. What cannot be read is left to others."""
    for path in paths:
        try:
            repeated = repeated_keys(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue
        _refuse([f"{path}, {where}" for where in repeated])


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The lower mapping with the upper one's keys laid over it, block by block, as Snakemake does."""
    result = dict(below)
    for key, value in above.items():
        is_block = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if is_block else value
    return result


def without_defaults(block: Config, *path: str) -> Config:
    """What differs from the schema's defaults in the block at a path of keys, or in the whole config.

    What is passed on to a stage without them stays the same when a new optional key appears.
    """
    known = known_keys(_schema(), list(path))
    kept: Config = {}
    for key, value in block.items():
        is_block = isinstance(value, dict) and bool(known_keys(_schema(), [*path, key]))
        inner = without_defaults(value, *path, key) if is_block else value
        has_default = "default" in known.get(key, {})
        if not (has_default and inner == known[key]["default"]):
            kept[key] = inner
    return kept


def known_keys(schema: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The properties that the schema knows at a path of keys."""
    node = schema
    for key in path:
        node = _properties(node, schema).get(key, {})
    return _properties(node, schema)


def _refuse(messages: list[str]) -> None:
    if messages:
        lines = "\n  - ".join(dict.fromkeys(messages))
        raise ConfigError(f"the config has mistakes:\n  - {lines}")


def _check_plain(config: object) -> Iterator[str]:
    """What no key may hold, whatever it means: it would reach a command line, or never be read."""
    if not isinstance(config, dict):
        yield f"it is {_shown(config)}; expected keys with values"
        return
    waiting: list[tuple[tuple[str, ...], object]] = [((), config)]
    count = 0
    while waiting:
        path, value = waiting.pop()
        count += 1
        where = ".".join(path)
        if len(path) > MAX_DEPTH or count > MAX_ENTRIES:
            yield (
                f"{where[:200]!r} lies too deep or is one entry too many; at most {MAX_DEPTH} "
                f"levels and {MAX_ENTRIES:,} entries are read"
            )
            return
        if isinstance(value, dict):
            for key in value:
                problem = word_problem(key) if isinstance(key, str) else "keys are texts"
                if problem:
                    yield f"the key {_shown(key)} in {where or 'the config'!r}: {problem}"
            waiting += [((*path, str(key)[:200]), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [((*path, str(place)), inner) for place, inner in enumerate(value)]
        elif isinstance(value, str) and (problem := word_problem(value)):
            yield f"{where!r} is {_shown(value)}: {problem}"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{where!r} is a number of {value.bit_length()} bits; at most 63 are taken"


def _is_integer(_checker: object, value: object) -> bool:
    """Unlike JSON's: 3.0 is none, for a stage's flag would refuse it."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(_checker: object, value: object) -> bool:
    """Unlike Python's: nan and inf are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


_Validator: Any = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer).redefine(
        "number", _is_number
    ),
)


def _shown(value: object) -> str:
    """The value as Python writes it, the middle of a long one left out."""
    short = Repr()
    short.maxstring = short.maxother = 120
    return short.repr(value)


def _properties(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    properties = dict(node.get("properties", {}))
    for part in node.get("allOf", []):
        properties = {**schema["$defs"][part["$ref"].rsplit("/", 1)[1]]["properties"], **properties}
    return properties


def _drop_prompt_sets(config: Config) -> None:
    """Forget the prompt sets that are null, and their layouts: what an overlay cannot leave out."""
    evaluation = config.get("evaluation")
    sets = evaluation.get("prompt_sets") if isinstance(evaluation, dict) else None
    if not isinstance(evaluation, dict) or not isinstance(sets, dict):
        return  # the schema will say so
    dropped = [name for name, path in sets.items() if path is None]
    layouts = evaluation.get("prompt_layouts")
    for block in (sets, layouts):
        if isinstance(block, dict):
            for name in dropped:
                block.pop(name, None)


def _fill_defaults(node: Config, schema: dict[str, Any]) -> None:
    for key, sub in schema.get("properties", {}).items():
        if "default" in sub and key not in node:
            node[key] = copy.deepcopy(sub["default"])
        if isinstance(node.get(key), dict):
            _fill_defaults(node[key], sub)


def _explain(error: ValidationError, schema: dict[str, Any]) -> Iterator[str]:
    path = [str(part) for part in error.path]
    where = ".".join(path)
    if error.validator in ("additionalProperties", "unevaluatedProperties"):
        known = known_keys(schema, path)
        for key in error.instance:
            if key not in known:
                yield f"unknown key {'.'.join([*path, str(key)])!r}{nearest(str(key), known)}"
    elif error.validator == "required":
        for key in error.validator_value:
            if key not in error.instance:
                yield f"key {'.'.join([*path, key])!r} is missing"
    elif error.validator == "type":
        yield _explain_type(where, error)
    elif error.validator == "enum":
        wanted = ", ".join(map(str, error.validator_value))
        yield f"{where!r} is {_shown(error.instance)}; expected one of {wanted}"
    else:
        reason = error.message.removeprefix(repr(error.instance)).strip()
        yield f"{where!r} is {_shown(error.instance)}: it {reason}"


def _explain_type(where: str, error: ValidationError) -> str:
    wanted = error.validator_value
    wanted = " or ".join(wanted) if isinstance(wanted, list) else wanted
    kind = {"str": "text", "bool": "true/false", "NoneType": "nothing", "dict": "a block",
            "list": "a list"}.get(type(error.instance).__name__, type(error.instance).__name__)  # fmt: skip
    message = f"{where!r} is {_shown(error.instance)} ({kind}); expected {wanted}"
    if isinstance(error.instance, str):
        try:
            number = float(error.instance)
        except ValueError:
            return message
        message += f". YAML reads it as text: write a dot and a sign, as in {number:.1e}"
    return message
