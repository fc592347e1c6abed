"""What two runs have in common, and how their scores compare where prompts and noise are the same."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import (
    EVALUATION_PROMPTS,
    HOLDOUT_REWARDS,
    IMAGES,
    LIKES,
    METRIC_SCORES,
    PREFERENCES,
    PROMPTS,
    Schema,
)
from stages.core.artifacts.tables import holds, read_batches, read_metadata, read_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.evaluation.statistics import compare, holm
from stages.core.inspection.lineage import flat

HELD_OUT = "held-out pairs"
ACCURACY = "reward_accuracy"
PER_RUN = {"run", "notify"}
"""Config keys that say nothing of what was computed."""
IMAGES_AT_ONCE = 64
Row = dict[str, Any]
Key = tuple[str, int]
"""prompt_id and number of an image."""


@dataclass(frozen=True)
class Run:
    """The results of a run, read where they are asked for."""

    folder: Path
    name: str
    """As the config calls it, or its folder where both are called alike."""

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """What the report shows of its config, nested names joined by dots; None before there is a report."""
        path = self.folder / "config.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {key: value for key, value in flat(found).items() if key not in PER_RUN}
        except (OSError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is no readable config ({error}); delete it and call snakemake again"
            ) from error

    @cached_property
    def policies(self) -> dict[str, dict[str, str]]:
        """The files of each finished policy with their digests, by the policy's name."""
        found: dict[str, dict[str, str]] = {}
        for path in sorted(self.folder.glob("iter*/policy/manifest.json")):
            try:
                files = json.loads(path.read_text(encoding="utf-8"))["files"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{path} is no readable manifest ({error!r}). Delete it and run snakemake again."
                ) from error
            found[path.parent.parent.name] = files
        return found

    @cached_property
    def prompt_sets(self) -> list[str]:
        """Names of its evaluation's prompt sets."""
        paths = sorted(self.folder.glob("evaluation/*/prompts.parquet"))
        return [path.parent.name for path in paths]

    @cached_property
    def codes(self) -> dict[str, set[str]]:
        """Digests of the code of each stage that has made one of its tables."""
        found: dict[str, set[str]] = defaultdict(set)
        for path in self.folder.rglob("*.parquet"):
            if not path.name.startswith("."):
                made = read_metadata(path)
                if isinstance(made.get("stage"), str):
                    found[made["stage"]].add(str(made.get("code")))
        return found

    def scored(self, prompt_set: str) -> dict[tuple[str, str], Path]:
        """Its tables of scores on a prompt set, by policy and metric."""
        paths = sorted(self.folder.glob(f"evaluation/{prompt_set}/*/scores/*.parquet"))
        return {(path.parent.parent.name, path.stem): path for path in paths}

    def noise(self, prompt_set: str, policy: str) -> tuple[dict[Key, int], Any]:
        """The seed of each evaluation image of a policy, and the sampler's settings."""
        seeds: dict[Key, int] = {}
        settings: Any = None
        for path in sorted(self.folder.glob(f"evaluation/{prompt_set}/{policy}/images/*.parquet")):
            rows = read_table(path, IMAGES, ["prompt_id", "candidate", "seed"]).to_pylist()
            seeds |= {(row["prompt_id"], row["candidate"]): row["seed"] for row in rows}
            settings = read_metadata(path).get("arguments", {}).get("settings")
        return seeds, settings

    @cached_property
    def held_out(self) -> dict[str, str]:
        """What each held-out pair is: a digest of its prompt and both images, by its pair_id."""
        path = self.folder / "seed" / "holdout.parquet"
        found: dict[str, str] = {}
        if path.is_file():
            columns = ["pair_id", "prompt_id", "winner", "loser"]
            for batch in read_batches(path, PREFERENCES, columns, size=IMAGES_AT_ONCE):
                found |= {row["pair_id"]: identity(row) for row in batch.to_pylist()}
        return found


def open_runs(first: Path, second: Path) -> tuple[Run, Run]:
    """The runs in two folders. UserError unless both hold results, and are two."""
    for path in (first, second):
        if not path.is_dir() or not any(path.glob("*/*.parquet")):
            raise UserError(
                f"{path} holds no run: expected a folder such as results/shapes, with the tables that snakemake "
                "makes in it. Name the run's folder under results/"
            )
    if first.resolve() == second.resolve():
        raise UserError(f"{first} and {second} are one run; name two")
    if first.resolve().name == second.resolve().name:
        return Run(first, str(first)), Run(second, str(second))
    return Run(first, first.resolve().name), Run(second, second.resolve().name)


def identity(pair: Row) -> str:
    """A digest of a pair's prompt, winner and loser."""
    digest = hashlib.sha256(pair["prompt_id"].encode())
    for side in ("winner", "loser"):
        digest.update(hashlib.sha256(pair[side]["bytes"] or b"").digest())
    return digest.hexdigest()


def like_identity(like: Row) -> str:
    """A digest of a single like's prompt, image and label."""
    digest = hashlib.sha256(like["prompt_id"].encode())
    digest.update(hashlib.sha256(like["image"]["bytes"] or b"").digest())
    digest.update(b"liked" if like["is_liked"] else b"disliked")
    return digest.hexdigest()


def different_settings(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """(key, first run's value, second's) of each setting that differs; '-' where it is the default."""
    one, two = first.settings or {}, second.settings or {}
    return [
        (key, _shown(one, key), _shown(two, key))
        for key in sorted(one.keys() | two.keys())
        if one.get(key, ...) != two.get(key, ...)
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "-"


def shared_data(first: Run, second: Run) -> Iterator[tuple[str, int, int, int]]:
    """(what, how many the first run has, the second, both) of human labels, pairs or single likes, and prompts."""
    for name in ("preferences", "holdout"):
        one, two = (_pairs(run.folder / "seed" / f"{name}.parquet") for run in (first, second))
        yield f"seed/{name}: human labels", len(one), len(two), len(one & two)
    names = {p.stem for run in (first, second) for p in run.folder.glob("prompts/*.parquet")}
    for name in sorted(names):
        one, two = (
            _prompts(r.folder / "prompts" / f"{name}.parquet", PROMPTS) for r in (first, second)
        )
        yield f"prompts/{name}: prompts", len(one), len(two), len(one & two)
    for name in sorted({*first.prompt_sets, *second.prompt_sets}):
        one, two = (
            _prompts(run.folder / "evaluation" / name / "prompts.parquet", EVALUATION_PROMPTS)
            for run in (first, second)
        )
        yield f"evaluation/{name}: prompts", len(one), len(two), len(one & two)


def _pairs(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    if holds(path, LIKES):
        batches = read_batches(path, LIKES, ["prompt_id", "image", "is_liked"], size=IMAGES_AT_ONCE)
        return {like_identity(row) for batch in batches for row in batch.to_pylist()}
    columns = ["pair_id", "prompt_id", "winner", "loser"]
    batches = read_batches(path, PREFERENCES, columns, size=IMAGES_AT_ONCE)
    return {identity(row) for batch in batches for row in batch.to_pylist()}


def _prompts(path: Path, schema: Schema) -> set[str]:
    if not path.is_file():
        return set()
    return set(read_table(path, schema, ["prompt_id"]).column("prompt_id").to_pylist())


def shared_policies(first: Run, second: Run) -> Iterator[tuple[str, str]]:
    """(policy, 'the same weights', 'other weights', or whose it is alone) of every trained policy."""
    for name in sorted({*first.policies, *second.policies}):
        one, two = first.policies.get(name), second.policies.get(name)
        if one is None or two is None:
            yield name, f"only in {first.name if two is None else second.name}"
        else:
            yield name, "the same weights" if one == two else "other weights"


def different_code(first: Run, second: Run) -> list[str]:
    """Stages whose tables in the two runs were made by different code."""
    both = first.codes.keys() & second.codes.keys()
    return sorted(name for name in both if first.codes[name] != second.codes[name])


@dataclass(frozen=True)
class Paired:
    """What could be compared and what could not."""

    rows: Sequence[Row]
    """Of the schema run_comparison."""
    refused: Sequence[str]
    """A sentence for each thing that both runs have and that cannot be paired."""
    files: Sequence[Path]
    """The tables that were compared."""


def paired_scores(first: Run, second: Run) -> Paired:
    """Second run minus first, on every prompt set, metric and policy where prompts and noise are the same.

    Policies of one name are compared, and the last of both runs where their names differ.
    """
    rows: list[Row] = []
    refused: list[str] = []
    files: list[Path] = []
    for prompt_set in (name for name in first.prompt_sets if name in second.prompt_sets):
        _pair_set(first, second, prompt_set, rows, refused, files)
    _pair_judges(first, second, rows, refused, files)
    for name in {row["prompt_set"] for row in rows}:
        inside = [row for row in rows if row["prompt_set"] == name]
        tested = [row for row in inside if not row["policy"].endswith("/base")]
        for test in ("sign_p", "wilcoxon_p"):
            for row, value in zip(tested, holm([row[test] for row in tested]), strict=True):
                row[f"{test}_holm"] = value
            for row in inside:  # the base is not trained: nothing is tested of it
                row.setdefault(f"{test}_holm", 1.0)
    return Paired(rows, refused, files)


def _pair_set(
    first: Run,
    second: Run,
    prompt_set: str,
    rows: list[Row],
    refused: list[str],
    files: list[Path],
) -> None:
    """Add the comparisons of one prompt set, or why there is none."""
    one, two = first.scored(prompt_set), second.scored(prompt_set)
    texts = _texts(first, prompt_set)
    for policy, baseline in _policy_pairs({p for p, _ in one}, {p for p, _ in two}):
        where = f"{prompt_set}: {second.name}/{policy} and {first.name}/{baseline}"
        metrics = sorted({m for p, m in one if p == baseline} & {m for p, m in two if p == policy})
        if not metrics:
            refused.append(f"{where} have no metric in common")
            continue
        seeds, settings = first.noise(prompt_set, baseline)
        other_seeds, other_settings = second.noise(prompt_set, policy)
        if settings != other_settings:
            refused.append(f"{where} were sampled otherwise ({other_settings} and {settings})")
            continue
        keys = _shared_images(seeds, other_seeds)
        if len({name for name, _ in keys}) < 2:
            refused.append(f"{where} share fewer than two prompts with the same noise")
            continue
        for metric in metrics:
            paths = one[baseline, metric], two[policy, metric]
            if _scorer(paths[0]) != _scorer(paths[1]):
                refused.append(f"{where}: {metric} has other options or weights")
                continue
            names, scores, baseline_scores = _means(*paths, keys)
            files += paths
            rows.append(
                _row(
                    prompt_set, metric, f"{second.name}/{policy}", f"{first.name}/{baseline}",
                    scores, baseline_scores, clusters=[texts.get(n, (n, ""))[0] for n in names],
                    strata=[texts.get(n, (n, ""))[1] for n in names],
                )
            )  # fmt: skip


def _policy_pairs(one: set[str], two: set[str]) -> list[tuple[str, str]]:
    """(second run's policy, first's): those of one name, and both last ones if they differ."""
    pairs = [(name, name) for name in sorted(one & two)]
    trained = [sorted(names - {"base"}) for names in (two, one)]
    if all(trained) and trained[0][-1] != trained[1][-1]:
        pairs.append((trained[0][-1], trained[1][-1]))
    return pairs


def _texts(run: Run, prompt_set: str) -> dict[str, tuple[str, str]]:
    """What a prompt's repeats share, and its stratum: the style of a keyed set."""
    path = run.folder / "evaluation" / prompt_set / "prompts.parquet"
    rows = read_table(path, EVALUATION_PROMPTS).to_pylist()
    return {
        row["prompt_id"]: (prompt_id(row["prompt"]), row["category"] if row["item"] is not None else "")
        for row in rows
    }  # fmt: skip


def _shared_images(one: Mapping[Key, int], two: Mapping[Key, int]) -> set[Key]:
    """Images of the prompts all of whose images start from the same noise in both runs."""
    prompts = [defaultdict(dict), defaultdict(dict)]  # type: list[defaultdict[str, dict[int, int]]]
    for seeds, found in zip((one, two), prompts, strict=True):
        for (name, candidate), seed in seeds.items():
            found[name][candidate] = seed
    shared = {name for name in prompts[0] if prompts[0][name] == prompts[1].get(name)}
    return {key for key in one if key[0] in shared}


def _scorer(path: Path) -> tuple[str, str]:
    """What makes a metric's scores comparable: its options and its weights."""
    arguments = read_metadata(path).get("arguments", {})
    return json.dumps(arguments.get("options"), sort_keys=True), json.dumps(
        arguments.get("spec"), sort_keys=True
    )


def _means(
    baseline: Path, policy: Path, keys: set[Key]
) -> tuple[list[str], Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """The shared prompts that both score, and the mean over each one's images by policy and baseline."""
    tables = []
    for path in (policy, baseline):
        scores: dict[str, list[float]] = defaultdict(list)
        columns = ["prompt_id", "candidate", "score"]
        for row in read_table(path, METRIC_SCORES, columns).to_pylist():
            if (row["prompt_id"], row["candidate"]) in keys:
                scores[row["prompt_id"]].append(row["score"])
        tables.append({name: float(np.mean(values)) for name, values in scores.items()})
    names = sorted(tables[0].keys() & tables[1].keys())
    if len(names) < 2:
        raise UserError(
            f"{policy} and {baseline} score {len(names)} of the prompts that their images share; make the scores "
            "anew (snakemake does so if you delete them)"
        )
    first, second = (np.array([table[name] for name in names]) for table in tables)
    return names, first, second


def _pair_judges(
    first: Run, second: Run, rows: list[Row], refused: list[str], files: list[Path]
) -> None:
    """Add how often each policy ranks the held-out pairs that both runs have as people do."""
    shared = {*first.held_out.values()} & {*second.held_out.values()}
    tables = [
        {path.stem: path for path in sorted(run.folder.glob("evaluation/holdout/*.parquet"))}
        for run in (first, second)
    ]
    if all(tables) and len(shared) < 2:
        refused.append(f"{HELD_OUT}: {first.name} and {second.name} share {len(shared)} of them")
        return
    for policy, baseline in _policy_pairs({*tables[0]}, {*tables[1]}):
        found = [
            _right(run, path)
            for run, path in ((second, tables[1][policy]), (first, tables[0][baseline]))
        ]
        files += [tables[0][baseline], tables[1][policy]]
        names = sorted(found[0].keys() & found[1].keys())
        if len(names) < 2:
            refused.append(
                f"{HELD_OUT}: {policy} and {baseline} were scored on {len(names)} shared pairs"
            )
            continue
        scores, baseline_scores = (np.array([table[n][0] for n in names]) for table in found)
        clusters = [found[0][name][1] for name in names]
        rows.append(
            _row(
                HELD_OUT, ACCURACY, f"{second.name}/{policy}", f"{first.name}/{baseline}",
                scores, baseline_scores, clusters=clusters, strata=[""] * len(names),
            )
        )  # fmt: skip


def _right(run: Run, path: Path) -> dict[str, tuple[float, str]]:
    """For each held-out pair, whether it is ranked as people do (a tie is half), and its prompt."""
    table = read_table(path, HOLDOUT_REWARDS, ["pair_id", "prompt_id", "probability"])
    return {
        run.held_out[row["pair_id"]]: (
            float(row["probability"] > 0.5) + 0.5 * (row["probability"] == 0.5),
            row["prompt_id"],
        )
        for row in table.to_pylist()
        if row["pair_id"] in run.held_out
    }


def _row(
    prompt_set: str,
    metric: str,
    policy: str,
    baseline: str,
    scores: Float[np.ndarray, " prompt"],
    baseline_scores: Float[np.ndarray, " prompt"],
    *,
    clusters: Sequence[str],
    strata: Sequence[str],
) -> Row:
    result = compare(
        scores,
        baseline_scores,
        strata=np.unique(strata, return_inverse=True)[1],
        clusters=np.unique(clusters, return_inverse=True)[1],
    )
    return {
        "prompt_set": prompt_set, "metric": metric, "policy": policy, "baseline": baseline,
        **asdict(result),
    }  # fmt: skip
