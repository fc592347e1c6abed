"""Experiments in files: arms, each the usual config with a little laid over it, and claims about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from stages.core.errors import UserError
from stages.core.plan.configuration import ConfigError, check_config, merged

MIN_SEEDS = 5
"""Of a claim: with fewer runs an interval over seeds means little."""
LAST = "last"
"""Stands for a run's last policy."""
OF_SEED_POLICY = (
    "seed", "model", "shapes", "preferences", "train_seed", "lora", "held_out_curve", "evaluation",
)  # fmt: skip
"""Blocks of a config that policy 0 comes from; the evaluation's prompts are kept out of its training."""
OF_NO_RESULT = ("run", "execution", "export", "notify")
"""Blocks by which two runs may differ and have the same policies; the guards may end a run or go back."""

Config = dict[str, Any]
Axis = Literal["policy", "denoiser_calls"]


@dataclass(frozen=True)
class Side:
    """What one side of a comparison is: a policy of an arm."""

    arm: str
    policy: str
    """'base', 'iter00' ... or 'last'."""

    @classmethod
    def read(cls, text: str, where: str) -> Side:
        """From 'arm/policy'. UserError for anything else."""
        arm, slash, policy = text.partition("/")
        if not (arm and slash and policy):
            raise UserError(
                f"{where}: {text!r} is no side; write arm/policy, as calibrated/last or paper/iter00"
            )
        return cls(arm, policy)

    def __str__(self) -> str:
        return f"{self.arm}/{self.policy}"


@dataclass(frozen=True)
class Claim:
    """What is said to be so: in each comparison the left side is above the right one."""

    says: str
    comparisons: tuple[tuple[str, Side, Side], ...]
    """(measure, left, right)."""
    advice: str
    """What a user should set if it holds."""


@dataclass(frozen=True)
class Experiment:
    """A file of config/lab/."""

    name: str
    title: str
    source: str
    """Where the paper says it, or why it is asked."""
    seeds: tuple[int, ...]
    arms: Mapping[str, Config]
    """What each lays over the common config, by name."""
    claims: tuple[Claim, ...]
    by: Axis = "policy"
    """What its figure goes by."""


@dataclass(frozen=True)
class Run:
    """One run of the usual pipeline, which several experiments may look at."""

    name: str
    seed: int
    overlay: Config
    """Laid over the base config."""
    owner: str
    """The run whose policy 0 it starts from; itself if it trains its own."""
    used_by: tuple[tuple[str, str], ...]
    """(experiment, arm)."""
    config: Config
    """The whole config, but for its run's name and where its policy 0 is."""


def read_experiment(path: Path) -> Experiment:
    """UserError names what is missing or wrong."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        common = found.get("common", {})
        arms = {str(name): merged(common, over or {}) for name, over in found["arms"].items()}
        claims = tuple(_claim(claim, path, arms) for claim in found["claims"])
        seeds = tuple(int(seed) for seed in found["seeds"])
        by = found.get("by", "policy")
        if by not in get_args(Axis):
            raise UserError(f"{path}: by is {by!r}; expected one of {', '.join(get_args(Axis))}")
        return Experiment(path.stem, found["title"], found["source"], seeds, arms, claims, by)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no experiment ({error!r}); expected title, source, seeds, arms and claims, as in "
            "config/lab/table6.yaml"
        ) from error


def _claim(found: Mapping[str, Any], path: Path, arms: Mapping[str, Config]) -> Claim:
    comparisons = []
    for each in found["compare"]:
        sides = [Side.read(each[side], str(path)) for side in ("left", "right")]
        for side in sides:
            if side.arm not in arms:
                raise UserError(
                    f"{path}: a claim names the arm {side.arm!r}; the arms are {', '.join(arms)}"
                )
        comparisons.append((str(each["measure"]), sides[0], sides[1]))
    return Claim(str(found["says"]), tuple(comparisons), str(found.get("advice", "")))


def plan_runs(experiments: Sequence[Experiment], base: Config) -> list[Run]:
    """The runs that some experiments take, each once, those that train a policy 0 before those that adopt it.

    Runs with equal settings are one; runs with iterations whose policy 0 would be equal share it: the first one trains
    it, the others adopt it. A run whose seed training follows decisions of its audit trains its own, since decisions
    are a run's. UserError names an arm whose config is wrong.
    """
    found: dict[str, tuple[str, int, Config, list[tuple[str, str]]]] = {}
    for experiment, arm, seed in _wanted(experiments):
        overlay = merged(experiment.arms[arm], {"seed": seed})
        try:
            config = check_config(merged(base, overlay))
        except ConfigError as error:
            raise UserError(f"experiment {experiment.name}, arm {arm}: {error}") from error
        key = _text({k: v for k, v in config.items() if k not in OF_NO_RESULT})
        name = f"lab-{experiment.name}-{arm}-{seed}"
        found.setdefault(key, (name, seed, overlay, []))[3].append((experiment.name, arm))
    owners: dict[str, str] = {}
    runs = []
    for name, seed, overlay, used_by in found.values():
        config = check_config(merged(base, overlay))
        same = _text({block: config[block] for block in OF_SEED_POLICY if block in config})
        is_own = not config["iterations"] or config["train_seed"]["use_decisions"]
        owner = name if is_own else owners.setdefault(same, name)
        own: Config = {"run": name}
        if owner != name:
            own["train_seed"] = {"policy": f"results/{owner}/iter00/policy"}
        runs.append(Run(name, seed, merged(overlay, own), owner, tuple(used_by), config))
    return runs


def _wanted(experiments: Sequence[Experiment]) -> Iterator[tuple[Experiment, str, int]]:
    """Seed by seed, so that a lab that is stopped early has whole seeds."""
    seeds = list(dict.fromkeys(seed for each in experiments for seed in each.seeds))
    for seed in seeds:
        for experiment in experiments:
            if seed in experiment.seeds:
                for arm in experiment.arms:
                    yield experiment, arm, seed


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def as_yaml(overlay: Config) -> str:
    """An overlay in one line of YAML, in which numbers stay numbers."""
    return yaml.safe_dump(overlay, default_flow_style=True, width=10**9, sort_keys=True).strip()


def read_base(paths: Sequence[Path]) -> Config:
    """The config that arms lie over, as Snakemake lays files over each other."""
    base: Config = {}
    for path in paths:
        try:
            base = merged(base, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read as a config: {error}") from error
    return base


def chosen(experiments: Sequence[Experiment], seeds: Sequence[int]) -> list[Experiment]:
    """The experiments with these seeds instead of their own, if any are given."""
    return [replace(each, seeds=tuple(seeds) or each.seeds) for each in experiments]
