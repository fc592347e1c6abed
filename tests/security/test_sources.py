"""What the sources never do: unpickle, evaluate text, call a shell, write markup that is not escaped."""

from __future__ import annotations

import ast
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.core.errors import UserError
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from stages.metrics import load_scorer
from stages.metrics.weights import read_tensors
from tests.builders import settings

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("stages", "config", "benchmarks", "tests", "workflow", "profiles")
    for path in (ROOT / folder).rglob("*.py")
)
OURS = [path for path in SOURCES if path.is_relative_to(ROOT / "stages")]
TEMPLATES = sorted((ROOT / "stages").rglob("*.jinja*"))

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "pandas.read_pickle",
    "pd.read_pickle",
    "torch.hub.load",
    "pickle.load",
    "pickle.loads",
    "builtins.eval",
    "builtins.exec",
}
MAY_IMPORT_PICKLE = {
    "stages/metrics/weights.py": "names the error that torch's safe reader raises",
    "tests/security/test_sources.py": "writes the malicious files that are refused",
}
MAY_WRITE_MARKUP = {
    "stages/core/report/figures.py": "matplotlib's SVG, which escapes its texts",
    "stages/core/audit/draws.py": "SVG of constants, into which markupsafe's format escapes what it puts",
}
MAY_CALL_A_SHELL = {
    "stages/core/progress/notices.py": "the command that the config's key `notify` says in full",
}
MAY_IMPORT_NETWORK = {
    "stages/core/pages/server.py": "socket: it listens on the loopback address, and fetches nothing",
    "stages/core/execution/warm_client.py": "socket: of the file system",
    "stages/core/execution/warm_server.py": "socket: of the file system",
    "stages/core/execution/warm_start.py": "socket: of the file system",
}


def dotted(node: ast.AST) -> str:
    """The name that is called, as 'torch.load'; '' if it is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(source: str) -> Iterator[tuple[str, dict[str, object], int]]:
    """(name, keywords that are constants, line) of every call in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            constants = {
                word.arg: word.value.value
                for word in node.keywords
                if word.arg is not None and isinstance(word.value, ast.Constant)
            }
            yield dotted(node.func), constants, node.lineno


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_sources_to_look_at() -> None:
    assert len(OURS) > 80
    assert len(SOURCES) > len(OURS) + 40
    assert TEMPLATES


def problems(source: str, file: str) -> Iterator[str]:
    """What a file does that none should."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        for name in names:
            if name.split(".")[0] in MODULES and file not in MAY_IMPORT_PICKLE:
                yield f"imports {name}"
    for name, words, line in calls(source):
        if name in CALLS and not file.startswith("tests/"):  # which run the docs' examples
            yield f"line {line}: calls {name}"
        if name == "torch.load" and words.get("weights_only") is not True:
            yield f"line {line}: torch.load without weights_only=True"
        if words.get("allow_pickle") or words.get("trust_remote_code"):
            yield f"line {line}: {name} with allow_pickle or trust_remote_code"
        if words.get("shell") and file not in MAY_CALL_A_SHELL:
            yield f"line {line}: {name} with a shell"
        if name in ("np.load", "numpy.load") and words.get("allow_pickle", False) is not False:
            yield f"line {line}: np.load of pickles"
        if name.endswith("Environment") and words.get("autoescape") is not True:
            yield f"line {line}: templates that do not escape"


def test_no_source_unpickles_evaluates_or_calls_a_shell() -> None:
    found = [
        f"{name_of(path)}: {problem}"
        for path in SOURCES
        for problem in problems(path.read_text(encoding="utf-8"), name_of(path))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t)",
        "eval(t)",
        "subprocess.run(t, shell=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "os.system(t)",
        "Environment()",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(problems(source, "stages/bad.py"))


def test_no_template_and_no_page_marks_a_text_as_safe() -> None:
    for path in TEMPLATES:
        text = path.read_text(encoding="utf-8")
        assert "safe" not in text.replace("Safe", "").split("|"), path
        assert "| safe" not in text
        assert "|safe" not in text
        assert "autoescape" not in text
    for path in OURS:
        if name_of(path) not in MAY_WRITE_MARKUP:
            assert not [name for name, *_ in calls(path.read_text()) if name.endswith("Markup")], (
                path
            )


def test_no_source_fetches_from_an_address() -> None:
    """Only weights of a hub id, by the hub's own library."""
    for path in OURS:
        if name_of(path) in MAY_IMPORT_NETWORK:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names if name != "urllib.parse"}  # only reads
            assert not roots & {
                "requests",
                "httpx",
                "urllib",
                "urllib3",
                "socket",
                "aiohttp",
                "http",
            }, path


class Attack:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["torch", "pickle", "legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_malicious_pickle_of_a_metric_is_refused_by_name(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "pwned"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Attack(trace)}, protocol=2))
    else:
        is_zip = kind == "torch"
        torch.save({"a": Attack(trace)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=f"weights{suffix} is no file of plain tensors"):
        read_tensors(path)
    assert not trace.exists()


def test_a_malicious_pickle_named_in_the_config_is_refused_by_its_metric(tmp_path: Path) -> None:
    path = tmp_path / "ImageReward.pt"
    torch.save({"a": Attack(tmp_path / "pwned")}, path)
    with pytest.raises(UserError, match="ImageReward.pt"):
        load_scorer("imagereward", {"weights": str(path), "tokenizer": str(tmp_path)})
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl"])
def test_a_pickle_is_no_base_model(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "pwned")))
    with pytest.raises(ModelError, match="is a pickle, which can run code"):
        load_model(settings(path), device=torch.device("cpu"))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_in_a_models_folder_is_refused_by_name(
    part: str, tmp_path: Path, tiny_base: str
) -> None:
    base = tmp_path / "base"
    for file in Path(tiny_base).rglob("*"):
        if file.is_file() and not (file.parent.name == part and file.suffix == ".safetensors"):
            target = base / file.relative_to(tiny_base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    buffer = io.BytesIO()
    torch.save({"a": Attack(tmp_path / "pwned")}, buffer)
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (base / part / name).write_bytes(buffer.getvalue())
    model = load_model(replace(settings(base)), device=torch.device("cpu"))
    with pytest.raises(ModelError, match="a pickle, which is refused"):
        {
            "unet": model.load_denoiser,
            "vae": lambda: model.decode_latents(torch.zeros(1, *model.latents_shape)),
            "text_encoder": lambda: model.encode_text(["a cat"]),
        }[part]()
    assert not (tmp_path / "pwned").exists()
