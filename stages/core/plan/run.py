"""The plan of a run: what its config makes of it, and what is wrong with it before the first job.

The rules and preflight both read it. What lies outside of the library, as the metrics that are
installed, is told to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from stages.core.plan.families import families, family_of, mistakes
from stages.core.plan.flags import word_problem

NO_METRICS: Mapping[str, tuple[str | None, ...]] = {
    "evaluation.metrics": (),
    "evaluation.candidate_metric": (None,),
    "select_pairs.ranker": ("self",),
    "evaluation.diversity_features": ("auto", "perceptual"),
    "online.judge": ("self", "spm"),
}
"""What stands for no metric where the config may name one, by the key."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What keeps a run from beginning."""

    key: str
    """The config's key that can mend it."""
    text: str
    """What was found, what was expected, and what to do."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a checked config makes of a run."""

    config: Mapping[str, Any]
    last: int | None = None
    """The last iteration, where the guards have ended the run early; None is the config's."""

    @property
    def iterations(self) -> list[int]:
        """1, 2 ..., without the seed's."""
        last = self.config["iterations"] if self.last is None else self.last
        return list(range(1, last + 1))

    @property
    def trained(self) -> list[int]:
        """The iterations that train a policy; the seed's is 0 and may be adopted instead."""
        is_adopted = self.config["train_seed"].get("policy")
        return self.iterations if is_adopted else [0, *self.iterations]

    @property
    def policies(self) -> list[str]:
        """Names of all that is evaluated: base iter00 iter01 ..."""
        return ["base", *(f"iter{number:02d}" for number in [0, *self.iterations])]

    @property
    def is_online(self) -> bool:
        """Whether an online method trains a policy beside the iterations'."""
        return bool(self.config.get("online", {}).get("method", "none") != "none")

    @property
    def trains_step_judge(self) -> bool:
        """Whether a step-aware preference model is trained from the seed pairs."""
        return self.config.get("step_judge", {}).get("clip") is not None

    @property
    def prompt_sets(self) -> list[str]:
        """Names of the evaluation's prompt sets; the first is the report's."""
        if self.is_world:
            return ["shapes"]
        return sorted(self.config["evaluation"]["prompt_sets"])

    @property
    def excluded_sets(self) -> list[str]:
        """Those whose prompts are kept out of all training."""
        names: list[str] | None = self.config["evaluation"]["exclude_from_training"]
        return self.prompt_sets if names is None else names

    @property
    def is_world(self) -> bool:
        """Whether the embedded world makes pairs and prompts."""
        return "shapes" in self.config

    @property
    def pairs_that_stop(self) -> int:
        """The first held-out pairs, by which trainings are stopped; the guards measure on others."""
        blocks = [self.config["train_seed"], self.config["update_policy"]]
        is_early = any(block.get("stop_after_no_gain") for block in blocks)
        return self.config["held_out_curve"]["num_pairs"] if is_early else 0

    @property
    def metric_keys(self) -> dict[str, str]:
        """Every metric that the config names, and the first key that does."""
        evaluation = self.config["evaluation"]
        named = [(name, "evaluation.metrics") for name in evaluation["metrics"]]
        named += [
            (evaluation["candidate_metric"], "evaluation.candidate_metric"),
            (self.config["select_pairs"]["ranker"], "select_pairs.ranker"),
            (evaluation["diversity_features"], "evaluation.diversity_features"),
        ]
        if self.is_online:
            named.append((self.config["online"]["judge"], "online.judge"))
        found: dict[str, str] = {}
        for name, key in named:
            if name not in NO_METRICS[key]:
                found.setdefault(name, key)
        return found

    @property
    def metrics_in_use(self) -> list[str]:
        """Their names, each once."""
        return list(self.metric_keys)

    @property
    def is_blind(self) -> bool:
        """Whether a gate must decide without the diversity of images, which takes two a prompt."""
        is_gated = self.config["guards"]["on_collapse"] != "warn"
        return is_gated and self.config["evaluation"]["images_per_prompt"] < 2

    @property
    def pairs_per_prompt(self) -> int:
        """Generated pairs of each prompt: a list's lie in half as many pairs as it has images."""
        if self.config["select_pairs"]["strategy"] != "listwise":
            return 1
        number: int = self.config["sample_candidates"]["candidates_per_prompt"]
        return number // 2

    @property
    def pool(self) -> list[str]:
        """Files, folders and patterns of the prompt pool; none where the run makes its own."""
        if self.config["select_pairs"]["strategy"] == "spin":
            return []
        names = self.config["prompts"].get("pool", [])
        return [names] if isinstance(names, str) else names

    @property
    def prompts_wanted(self) -> list[int]:
        """Prompts of each iteration."""
        return list(self.config["prompts"]["per_iteration"][: len(self.iterations)])

    @property
    def scores_of_others(self) -> list[tuple[str, str, str]]:
        """(prompt set, run/policy, table) of other runs' scores that this run compares with."""
        evaluation = self.config["evaluation"]
        return [
            (
                prompt_set,
                f"{other.parent.name}/{other.name}",
                f"{other.parent}/evaluation/{prompt_set}/{other.name}/scores/{metric}.parquet",
            )
            for other in map(Path, evaluation["compare_with"])
            for prompt_set in self.prompt_sets
            for metric in evaluation["metrics"]
        ]

    def data_files(self) -> Iterator[tuple[str, str]]:
        """(key, file, folder or pattern) of everything on this disk that the config names."""
        for name in self.config["preferences"].get("files", []):
            yield "preferences.files", name
        if self.iterations or self.is_online:
            yield from (("prompts.pool", name) for name in self.pool)
        for key, name in self.config["evaluation"].get("prompt_sets", {}).items():
            yield f"evaluation.prompt_sets.{key}", name
        for key, name in self.config["execution"]["metric_environments"].items():
            yield f"execution.metric_environments.{key}", name

    def file_problems(self) -> Iterator[Problem]:
        """What the config names and is not there, or cannot stand in a command."""
        for key, name in self.data_files():
            files = files_of([name])
            if not files:
                yield Problem(key=key, text=f"{name} does not exist")
            for file in files:
                if problem := word_problem(file):
                    yield Problem(key=key, text=f"the file {file!r} cannot be used: {problem}")

    @property
    def family(self) -> str | None:
        """The model's family, where the config or the model's folder says it."""
        return family_of(self.config)

    def mixed_pairs(self, human_pairs: int) -> list[int]:
        """Pairs that each iteration trains on: its own, and as many human ones as their share asks for."""
        share = self.config["mix_preferences"]["seed_fraction"]
        return [
            self.pairs_per_prompt * size + min(human_pairs, round(size * share / (1 - share)))
            for size in self.prompts_wanted
        ]

    @property
    def candidate_sampling(self) -> dict[str, Any]:
        """How candidates are sampled: the block `sampling`, with what the block of candidates says otherwise."""
        own = self.config["sample_candidates"].get("sampling", {})
        return {**self.config["sampling"], **own}

    @property
    def is_told_guidance(self) -> bool:
        """Whether the model is of a family whose denoiser is told the guidance, and predicts once for it."""
        offer = families()[self.family] if self.family else {}
        return offer.get("training.embedded_guidance", ()) is None

    @property
    def denoiser_part(self) -> str:
        """Folder of a full policy's weights."""
        return str(families()[self.family]["denoiser"]) if self.family else "unet"

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer by which captions are counted that are too long, where it is at hand."""
        name = families()[self.family]["tokenizer"] if self.family else "tokenizer"
        folder = Path(self.config["model"]["base"]) / name if name else None
        return folder if folder is not None and folder.is_dir() else None

    def family_problems(self) -> Iterator[Problem]:
        """What the config asks for and the model's family lacks."""
        if self.family:
            for key, text in mistakes(self.config, self.family):
                yield Problem(key=key, text=text)

    def metric_problems(
        self, known: Sequence[str], networks: Iterable[str], features: str
    ) -> Iterator[Problem]:
        """Metrics that are none of those known; networks without weights, the features' too."""
        for name in self.metrics_in_use:
            if name not in known:
                text = f"there is no metric {name!r}; expected one of {', '.join(known)}"
                yield Problem(key=self.metric_keys[name], text=text)
        is_published = self.is_online and not self.trains_step_judge
        judges = {"spm"} if is_published and self.config["online"]["judge"] == "spm" else set()
        for name in sorted(({*self.metrics_in_use, features} & {*networks}) | judges):
            if "weights" not in self.config["metrics"].get(name, {}):
                text = (
                    f"metric {name!r} needs its weights: set metrics.{name}.weights to a path or a "
                    "hub id (docs/metrics.md says where they are published), or leave the metric out"
                )
                yield Problem(key=f"metrics.{name}.weights", text=text)

    def pool_problems(self, num_free: int) -> Iterator[Problem]:
        """Whether a pool is too small that has so many prompts for the iterations and the online method."""
        wanted = self.prompts_wanted
        if (
            self.config["select_pairs"]["strategy"] == "spin"
        ):  # its prompts are the human pairs' captions
            return
        source = "the pool of the embedded world" if self.is_world else "prompts.pool"
        remedy = "lower shapes.num_seed_captions" if self.is_world else "add files to prompts.pool"
        online = self.config["online"]["num_prompts"] if self.is_online else 0
        if self.is_online and num_free < online:
            yield Problem(
                key="online.num_prompts",
                text=f"{online:,} different prompts are wanted, but {source} has only {max(num_free, 0):,} that "
                f"can be used and that no evaluation set holds: lower online.num_prompts, or {remedy}",
            )
        if num_free >= sum(wanted):
            return
        yield Problem(
            key="prompts.per_iteration",
            text=f"{' + '.join(map(str, wanted))} = {sum(wanted):,} different prompts are wanted, but "
            f"{source} has only {max(num_free, 0):,} that can be used and that no evaluation set "
            f"holds: lower prompts.per_iteration, or {remedy}",
        )


def matches_of(name: str) -> list[str]:
    """What a name of the config matches; a file or folder of that very name goes first, [brackets] and all."""
    return [name] if Path(name).exists() else sorted(glob(name, recursive=True))


def files_of(names: Iterable[str]) -> list[str]:
    """The files that names of the config match, and all in folders that do, in order, each once."""
    found: dict[str, None] = {}
    for match in (match for name in names for match in matches_of(name)):
        if Path(match).is_dir():
            inside = sorted(str(path) for path in Path(match).rglob("*") if path.is_file())
            found |= dict.fromkeys(inside)
        else:
            found[match] = None
    return list(found)
