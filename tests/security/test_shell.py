"""No text of a config, and no file's name, is ever run by a shell or formatted by Snakemake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core.plan.configuration import ConfigError, check_config, merged
from stages.core.plan.flags import flags, word_problem
from tests.builders import CAPTIONS, read_rows
from tests.label_files import WRITERS, some_pairs
from tests.security.hostile import FORMATS, PROMPTS, PWNED, SHELL
from tests.workflow.projects import ROOT, Project


@pytest.mark.parametrize("texts", [SHELL, PROMPTS], ids=["names", "prompts"])
def test_a_shell_passes_every_text_on_as_it_is(texts: list[str], tmp_path: Path) -> None:
    texts = [text for text in texts if "\x00" not in text]
    command = flags({"options": texts, **{f"x{n}": text for n, text in enumerate(texts[:9])}})
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{show}" {command}'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    words = json.loads(done.stdout)
    assert words[1 : 1 + len(texts)] == texts
    assert [words[words.index(f"--x{n}") + 1] for n in range(9)] == texts[:9]
    assert not list(tmp_path.iterdir())


KEYS = [
    "model.base",
    "model.vae",
    "model.config",
    "preferences.files",
    "prompts.pool",
    "evaluation.prompt_sets.mine",
    "evaluation.compare_with",
    "train_seed.policy",
    "lora.target_modules",
    "metrics.mine.weights",
    "evaluation.metrics",
    "select_pairs.ranker",
]


def laid_over(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return merged(config, value)


def own_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    del config["shapes"]
    config["preferences"]["files"] = ["labels.parquet"]
    config["prompts"]["pool"] = "prompts.txt"
    config["evaluation"]["prompt_sets"] = {"mine": "evaluation.txt"}
    check_config(config)
    return config


LISTS = ("preferences.files", "evaluation.compare_with", "lora.target_modules")


@pytest.mark.parametrize("text", [*FORMATS, "--output", "-x", "x" * 5000])
@pytest.mark.parametrize("key", KEYS)
def test_a_text_that_no_command_line_holds_is_refused_by_its_key(key: str, text: str) -> None:
    value = [text] if key in LISTS or key == "evaluation.metrics" else text
    with pytest.raises(ConfigError) as caught:
        check_config(laid_over(own_config(), key, value))
    message = str(caught.value)
    assert key in message
    assert len(message) < 1000
    assert "it holds" in message or "it begins" in message or "letters" in message


@pytest.mark.parametrize("text", SHELL)
def test_a_text_that_a_shell_would_only_need_to_quote_is_taken(text: str) -> None:
    assert word_problem(text) is None
    assert check_config(laid_over(own_config(), "model.base", text))["model"]["base"] == text


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "/tmp/x",
        "..",
        ".",
        "",
        "a/b",
        "a b",
        "$(touch pwned)",
        "run\n",
        "run\x00",
        "{run}",
        "~",
        "-run",
        "%s",
        "\u202erun",
        "r\u200bun",
        "x" * 101,
    ],
)
def test_a_run_or_a_prompt_set_cannot_leave_its_folder_by_its_name(name: str) -> None:
    for key, value in (("run", name), ("evaluation.prompt_sets", {name: "evaluation.txt"})):
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            check_config(
                {**own_config(), key: value}
                if key == "run"
                else laid_over(own_config(), key, value)
            )


@pytest.mark.parametrize("key", ["--output", "a\nb", "{run}", 3, None, True])
def test_an_option_of_a_metric_cannot_be_another_flag(key: object) -> None:
    with pytest.raises(ConfigError, match="the key"):
        check_config(merged(own_config(), {"metrics": {"mine": {key: "/tmp/pwned"}}}))


def hostile_name(number: int) -> str:
    """A part of a path that holds one of the texts; a name cannot hold a slash."""
    return f"{SHELL[number]} {number}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project, its workflow, its model and all its data under hostile names."""
    place = tmp_path_factory.mktemp("hostile")
    folder = place / f'it\'s $(touch {PWNED}) `touch {PWNED}` 100% "x"; touch {PWNED} #'
    folder.mkdir()
    (folder / "work ~ & flow's").symlink_to(ROOT)
    (folder / "mo$del's").symlink_to(ROOT / "stages/shapes/pipeline")
    data = folder / "da ta's; $(touch pwned)"
    data.mkdir()
    for number in range(len(SHELL)):
        (data / f"{hostile_name(number)}.txt").write_text(CAPTIONS[number] + "\n")
    pairs = [
        (prompt, *images)
        for prompt, (_, *images) in zip(CAPTIONS[20:26], some_pairs(), strict=False)
    ]
    WRITERS["suffixes"][1](folder / "la`bels`'", pairs)
    (folder / "la`bels`'" / "prompts.json").unlink()
    for path in list((folder / "la`bels`'").iterdir()):
        path.rename(path.with_name(f"$(touch {PWNED}) ' {path.name}"))
    for number, (prompt, *_) in enumerate(pairs):
        (folder / "la`bels`'" / f"$(touch {PWNED}) ' {number}.txt").write_text(prompt)
    return Project(folder)


def hostile_config(project: Project) -> dict[str, Any]:
    return {
        "shapes": None,
        "model": {"base": "mo$del's"},
        "preferences": {"files": ["la`bels`'"], "num_pairs": 3, "num_holdout": 2},
        "prompts": {"pool": "da ta's; $(touch pwned)/*[02468].txt", "per_iteration": [2, 2]},
        "evaluation": {
            "prompt_sets": {"mine": "da ta's; $(touch pwned)/[[]1-9[]] 13.txt"},
            "metrics": ["sharpness"],
            "primary_metric": "sharpness",
            "candidate_metric": None,
        },
        "iterations": 1,
    }


@pytest.mark.slow
def test_files_and_folders_of_any_name_go_through_snakemake_and_its_shells(
    project: Project,
) -> None:
    targets = [
        f"results/test/{name}"
        for name in (
            "seed/import.json",
            "prompts/iter01.parquet",
            "evaluation/mine/prompts.parquet",
        )
    ]
    command = project.command("--quiet", "rules", "--", *targets, config=hostile_config(project))
    command[command.index("--snakefile") + 1] = str(project.folder / "work ~ & flow's/Snakefile")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=project.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [
        row["prompt"] for row in read_rows(project.results / "evaluation/mine/prompts.parquet")
    ] == [CAPTIONS[13]]
    assert len(read_rows(project.results / "seed/preferences.parquet")) == 3
    assert len(read_rows(project.results / "prompts/iter01.parquet")) == 2
    places = (project.folder, project.folder.parent, ROOT, Path.home())
    assert not [path for place in places for path in place.glob(PWNED + "*")]
    shutil.rmtree(project.folder / ".snakemake", ignore_errors=True)


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("{wildcards}", "<results>", "\udcff")),
    ],
)
def test_a_file_that_snakemake_cannot_name_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"{name}.txt").write_text("a cat\n")
    project = Project(tmp_path)
    config = {**hostile_config(project), "model": {}}
    config["prompts"] = {"pool": "data", "per_iteration": [1, 1]}
    config["preferences"] = {**config["preferences"], "files": ["data"]}
    config["evaluation"] = {**config["evaluation"], "prompt_sets": {"mine": "data"}}
    done = subprocess.run(
        project.command("--quiet", "rules", "--dry-run", config=config),
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
    )
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert f"the file {f'data/{name}.txt'!r} cannot be used: it holds" in text
    assert "Traceback" not in text
