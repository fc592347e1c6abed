"""Exports of a policy open in plain diffusers and give the policy's own images."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from stages import export_policy, write_model_cards
from stages.core.artifacts.provenance import ArtifactError, write_manifest, write_record
from stages.core.artifacts.schemas import SUMMARY
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from stages.core.evaluation.gates import Gate, facts_of
from stages.core.evaluation.guards import GUARDS_TABLE, Limits
from stages.core.export.markdown import read_front_matter
from stages.core.method.noising import generator
from stages.core.models.denoiser import LORA_FILE, LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from stages.core.models.policy import Policy
from stages.core.policies.saving import save_policy
from tests import single_file, tiny_models
from tests.builders import FULL, Row, settings, write_rows

CPU = torch.device("cpu")
WIDE_LORA = LoraSettings(
    rank=4,
    alpha=8.0,
    target_modules=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2"),
)
SUMMARY_ROW = {
    "prompt_set": "parti",
    "metric": "total",
    "policy": "iter01",
    "baseline": "base",
    "num_prompts": 8,
    "mean": 0.625,
    "baseline_mean": 0.5,
    "difference": 0.125,
    "ci_low": 0.0625,
    "ci_high": 0.25,
    "win_rate": 0.75,
    "win_low": 0.5,
    "win_high": 0.875,
    "num_wins": 6,
    "num_ties": 0,
    "num_losses": 2,
    "sign_p": 0.25,
    "wilcoxon_p": 0.25,
    "effect_size": 0.5,
    "sign_p_holm": 0.25,
    "wilcoxon_p_holm": 0.25,
    "better_of_two": 0.5,
}


def guards_row(iteration: int, moved: float) -> Row:
    """A row of the guards table whose images lie so far from the base's."""
    row = dict.fromkeys(GUARDS_TABLE.arrow.names, 0.5) | {"num_holdout_pairs": 20}
    row |= {"iteration": iteration, "policy": f"iter{iteration:02d}", "features": "perceptual"}
    row |= {"reward_accuracy_low": 0.6, "blank_share": 0.0, "truncated_share": 0.0}
    return row | {"moved_pixels": moved, "moved_features": moved}


def pipeline_class(base: Path) -> Any:
    return StableDiffusionXLPipeline if "sdxl" in str(base) else StableDiffusionPipeline


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each family."""
    build = {"sd15": tiny_models.sd15, "sdxl": tiny_models.sdxl}[request.param]
    return build(tmp_path_factory.mktemp(request.param))


def make_policy(base: Path, folder: Path, lora: LoraSettings) -> Path:
    """A finished policy that differs visibly from its base."""
    model, rng = load_model(settings(base), device=CPU), generator(5)
    policy, _ = model.load_for_training(None, None, lora, seed=3)
    with torch.no_grad():
        for name, weight in policy.named_weights():
            if lora.rank == 0 or "lora_B" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=rng))
    folder.mkdir(parents=True)
    save_policy(policy, folder, "unet")
    facts = {"base": str(base), "kind": "lora" if lora.rank else "full", "num_steps": 7}
    write_manifest(folder, stage="train_seed", arguments={"seed": 0}, inputs=[], facts=facts)
    return folder


@pytest.fixture(scope="module")
def policies(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA and a full fine-tune of the base."""
    folder = tmp_path_factory.mktemp("policies")
    return {
        "lora": make_policy(base, folder / "lora", WIDE_LORA),
        "full": make_policy(base, folder / "full", FULL),
    }


def arguments(base: Path, policy: Path, kind: str, output: Path) -> export_policy.Args:
    return export_policy.Args(
        policy=policy,
        model=settings(base),
        format=kind,  # type: ignore[arg-type]
        dtype="float32",
        name="test-iter00",
        output=output,
    )


def picture(pipeline: Any) -> np.ndarray:
    """One image, from the same noise whoever makes it."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator(1), output_type="np"
    )
    return np.asarray(made.images[0])


def policys_own_picture(base: Path, policy: Path) -> np.ndarray:
    pipeline = pipeline_class(base).from_pretrained(base)
    denoiser = load_model(settings(base), device=CPU).load_denoiser(Policy(policy))
    denoiser.select()
    pipeline.unet = denoiser.network
    found = picture(pipeline)
    assert np.abs(found - picture(pipeline_class(base).from_pretrained(base))).max() > 0.01
    return found


def opened(base: Path, kind: str, folder: Path) -> Any:
    """An export, in the words of its own card."""
    pipelines = pipeline_class(base)
    if kind == "diffusers":
        return pipelines.from_pretrained(folder)
    if kind == "single-file":
        return pipelines.from_single_file(
            folder / "test-iter00.safetensors", config=str(base), local_files_only=True
        )
    pipeline = pipelines.from_pretrained(base)
    name = {"lora-diffusers": LORA_FILE, "lora-kohya": "test-iter00.safetensors"}[kind]
    pipeline.load_lora_weights(folder, weight_name=name)
    return pipeline


@pytest.mark.quick("sd15-full-diffusers", "sd15-lora-single-file", "sdxl-lora-lora-kohya")
@pytest.mark.parametrize(
    ("made_as", "kind"),
    [
        ("lora", "diffusers"),
        ("lora", "lora-diffusers"),
        ("lora", "lora-kohya"),
        ("lora", "single-file"),
        ("full", "diffusers"),
        ("full", "single-file"),
    ],
)
def test_an_export_gives_the_policys_images(
    base: Path, policies: dict[str, Path], tmp_path: Path, made_as: str, kind: str
) -> None:
    export_policy.main(arguments(base, policies[made_as], kind, tmp_path / "out"))
    expected = policys_own_picture(base, policies[made_as])
    found = picture(opened(base, kind, tmp_path / "out"))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["facts"]["format"] == kind
    assert set(manifest["files"]) == {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name not in ("README.md", "manifest.json")
    }


def test_diffusers_own_loader_reads_the_kohya_file_as_the_same_weights(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    export_policy.main(arguments(base, policies["lora"], "lora-kohya", tmp_path / "out"))
    path = tmp_path / "out" / "test-iter00.safetensors"
    keys = set(safetensors.torch.load_file(path))
    assert {key.rpartition(".lora_")[2] for key in keys if ".lora_" in key} == {
        "down.weight",
        "up.weight",
    }
    first = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        if "sdxl" in str(base)
        else "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    )  # as kohya's sd-scripts write them
    assert {f"{first}.lora_down.weight", f"{first}.lora_up.weight", f"{first}.alpha"} <= keys
    pipeline = pipeline_class(base).from_pretrained(base)
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="read")
    own = load_model(settings(base), device=CPU).load_denoiser(Policy(policies["lora"]))
    found = dict(pipeline.unet.named_parameters())
    count = 0
    for name, value in own.named_weights():
        torch.testing.assert_close(found[name.replace(".policy.", ".read.")], value, atol=0, rtol=0)
        count += 1
    assert count == len([name for name in found if ".read." in name]) > 20
    layers = [
        (name, module) for name, module in own.network.named_modules() if hasattr(module, "scaling")
    ]
    read = dict(pipeline.unet.named_modules())
    for name, module in layers:
        assert read[name].scaling["read"] == module.scaling["policy"] == 2.0  # alpha 8, rank 4


@pytest.mark.slow
def test_a_single_file_base_can_be_exported_again(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    whole = single_file.write(
        pipeline_class(base).from_pretrained(base), tmp_path / "b.safetensors"
    )
    expected = policys_own_picture(base, policies["lora"])
    for kind in ("diffusers", "single-file"):
        args = arguments(base, policies["lora"], kind, tmp_path / kind)
        args = replace(args, model=settings(whole, config=str(base)), is_same_base=True)
        export_policy.main(args)
        pipeline = opened(base, kind, tmp_path / kind)
        pipeline.scheduler = pipeline_class(base).from_pretrained(base).scheduler
        np.testing.assert_allclose(picture(pipeline), expected, atol=2e-4)


@pytest.mark.slow
def test_a_half_precision_file_is_half_as_long_and_close(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    args = arguments(base, policies["full"], "single-file", tmp_path / "whole")
    export_policy.main(args)
    export_policy.main(replace(args, dtype="float16", output=tmp_path / "half"))
    whole, half = (
        safetensors.torch.load_file(tmp_path / name / "test-iter00.safetensors")
        for name in ("whole", "half")
    )
    assert {value.dtype for value in half.values()} == {torch.float16}
    for key, value in whole.items():
        torch.testing.assert_close(half[key].float(), value, atol=1e-3, rtol=1e-3)


def test_a_full_policys_folder_shares_its_large_files_with_policy_and_base(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    export_policy.main(arguments(base, policies["full"], "diffusers", tmp_path / "out"))
    weights = "diffusion_pytorch_model.safetensors"
    for part, origin in (("unet", policies["full"]), ("vae", base)):
        assert os.path.samefile(tmp_path / "out" / part / weights, origin / part / weights)
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "model_index.json").read_text())


def test_another_vae_is_part_of_the_export(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(9)
    tiny_models.vae(0.2, force_upcast=False).save_pretrained(tmp_path / "vae")
    args = arguments(base, policies["full"], "diffusers", tmp_path / "out")
    before = (base / "vae" / "config.json").read_bytes()
    export_policy.main(replace(args, model=settings(base, vae=str(tmp_path / "vae"))))
    assert pipeline_class(base).from_pretrained(tmp_path / "out").vae.config.scaling_factor == 0.2
    assert (base / "vae" / "config.json").read_bytes() == before


# Cards


def test_the_card_tells_lineage_data_settings_licence_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_models.sd15(tmp_path / "sd15")
    (base / "README.md").write_text("---\nlicense: openrail++\nlicense_link: LICENSE.md\n---\nHi\n")
    seed = make_policy(base, tmp_path / "iter00" / "policy", FULL)
    last = Path(shutil.copytree(seed, tmp_path / "iter01" / "policy"))
    mix = write_rows(
        tmp_path / "mix.parquet",
        [
            {"source": s, "prompt_id": p}
            for s, p in (("human", "a"), ("generated", "b"), ("generated", "b"))
        ],
    )
    write_manifest(
        last,
        stage="update_policy",
        inputs=[seed / "manifest.json"],
        arguments={
            "policy": str(seed),
            "preferences": str(mix),
            "iteration": 1,
            "settings": {"dpo_beta": 500.0},
        },
        facts={"base": str(base), "kind": "full", "num_pairs": 3, "num_steps": 9},
    )
    args = arguments(base, last, "diffusers", tmp_path / "out")
    export_policy.main(args)
    card = tmp_path / "out" / "README.md"
    head = read_front_matter(card)
    assert head["license"] == "openrail++"
    assert head["base_model"] == "model"
    assert (head["library_name"], head["pipeline_tag"]) == ("diffusers", "text-to-image")
    text = card.read_text()
    lineage = json.loads((tmp_path / "out/manifest.json").read_text())["facts"]["lineage"]
    assert [link["stage"] for link in lineage] == ["train_seed", "update_policy"]
    assert f"| 1 | update_policy | {lineage[1]['policy']} | 1 | 2 | 2 | 9 |" in text
    assert "| `settings.dpo_beta` | `500.0` |" in text
    assert "Not evaluated" in text
    assert str(tmp_path) not in text
    summary = tmp_path / "summary.parquet"
    rows = [SUMMARY_ROW, {**SUMMARY_ROW, "policy": "iter02", "mean": 0.9}]
    write_table(summary, rows, SUMMARY, stage="summarise_evaluation", arguments={})
    write_model_cards.main(
        write_model_cards.Args(exports=((tmp_path / "out", "iter01"),), summary=summary)
    )
    line = "| parti | total | 0.625 | base | +0.125 [+0.0625, +0.25] | 25% | 75% |"
    assert line in card.read_text()
    assert "0.9" not in card.read_text()
    assert "Set aside" not in card.read_text()
    gate = Gate(
        iteration=1,
        policy="iter01",
        on_collapse="stop",
        findings=("It drew black.",),
        last_good="iter00",
        go_on_from="",
        limits={},
    )
    write_record(
        tmp_path / "gate.json", facts_of(gate), stage="check_collapse", arguments={}, inputs=[]
    )
    write_model_cards.main(
        write_model_cards.Args(
            exports=((tmp_path / "out", "iter01"),),
            summary=summary,
            gates=(tmp_path / "gate.json",),
        )
    )
    assert "**Set aside by the guards of its run.** It drew black." in card.read_text()
    guards = tmp_path / "guards.parquet"
    write_table(
        guards, [guards_row(0, 0.1), guards_row(1, 0.0002)], GUARDS_TABLE,
        stage="summarise_guards", arguments={},
    )  # fmt: skip
    cards = write_model_cards.Args(
        exports=((tmp_path / "out", "iter01"),), summary=summary, guards=guards
    )
    write_model_cards.main(cards)
    assert "**The guards of its run warn.** iter01 hardly moved: its images differ" in (
        card.read_text()
    )
    write_model_cards.main(replace(cards, limits=Limits(min_moved_share=0.0001)))
    assert "guards" not in card.read_text()
    export_policy.main(replace(args, summary=summary, evaluated_as="iter01"))
    assert line in card.read_text()
    (seed / "manifest.json").write_text((seed / "manifest.json").read_text() + "\n")
    export_policy.main(args)
    assert "| earlier | not found |" in card.read_text()


def test_a_base_without_a_card_has_an_unknown_licence(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    export_policy.main(arguments(base, policies["lora"], "lora-diffusers", tmp_path / "out"))
    assert read_front_matter(tmp_path / "out" / "README.md")["license"] == "other"
    assert "unknown" in (tmp_path / "out" / "README.md").read_text()


# What is refused


@pytest.mark.parametrize("kind", ["lora-diffusers", "lora-kohya"])
def test_a_full_policy_is_no_lora(
    base: Path, policies: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    with pytest.raises(UserError, match=f"is a full fine-tune; {kind} can only hold a LoRA"):
        export_policy.main(arguments(base, policies["full"], kind, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_policy_is_refused(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    half = Path(shutil.copytree(policies["full"], tmp_path / "half"))
    (half / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"is no finished policy: it has no manifest\.json"):
        export_policy.main(arguments(base, half, "diffusers", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made_as", ["lora", "full"])
def test_a_policy_of_another_base_is_refused(
    base: Path, policies: dict[str, Path], tmp_path: Path, tiny_base: str, made_as: str
) -> None:
    kind = "lora-kohya" if made_as == "lora" else "diffusers"
    args = arguments(Path(tiny_base), policies[made_as], kind, tmp_path / "out")
    with pytest.raises(UserError, match=r"was trained on .*, --model\.base is"):
        export_policy.main(args)
    with pytest.raises(ModelError, match="does not fit|belongs to another base model"):
        export_policy.main(replace(args, is_same_base=True))
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_is_replaced(base: Path, policies: dict[str, Path], tmp_path: Path) -> None:
    args = arguments(base, policies["lora"], "lora-diffusers", tmp_path / "out")
    export_policy.main(args)
    (args.output / "extra.txt").write_text("gone after the next export")
    export_policy.main(args)
    assert {p.name for p in args.output.iterdir()} == {LORA_FILE, "README.md", "manifest.json"}
    (args.output / "manifest.json").unlink()  # as Snakemake does before a job
    export_policy.main(args)
    for name in ("manifest.json", "README.md"):  # as one killed while it writes the cards leaves it
        (args.output / name).unlink()
    with pytest.raises(UserError, match="exists already and is a folder that no export wrote"):
        export_policy.main(args)
    export_policy.main(replace(args, is_ours=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="exists already and is a folder that no export wrote"):
        export_policy.main(replace(args, output=tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine"}


def test_a_lora_of_another_alpha_is_right_in_loaders_that_read_no_header(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    export_policy.main(arguments(base, policies["lora"], "lora-diffusers", tmp_path / "out"))
    bare = tmp_path / "bare"
    bare.mkdir()
    weights = safetensors.torch.load_file(tmp_path / "out" / LORA_FILE)
    safetensors.torch.save_file(
        weights, bare / LORA_FILE
    )  # as a loader sees it that knows no header
    found = picture(opened(base, "lora-diffusers", bare))
    np.testing.assert_allclose(found, policys_own_picture(base, policies["lora"]), atol=2e-4)


def test_exported_files_are_readable_as_the_umask_says(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        export_policy.main(arguments(base, policies["lora"], "single-file", tmp_path / "out"))
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert modes == {"0o640"}


def test_a_part_that_is_a_pickle_alone_is_left_out_or_refused(
    base: Path, policies: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    (copy / "safety_checker" / "config.json").write_text("{}")
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index))
    args = replace(
        arguments(copy, policies["full"], "diffusers", tmp_path / "out"), is_same_base=True
    )
    export_policy.main(args)
    exported = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert exported["safety_checker"] == [None, None]
    assert not (tmp_path / "out" / "safety_checker").exists()
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "model.bin")
    with pytest.raises(ModelError, match="vae has no weights that can be exported"):
        export_policy.main(replace(args, output=tmp_path / "other"))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({}, set()),
        ({"prediction_type": "v_prediction"}, {"v_pred"}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"v_pred", "ztsnr"},
        ),
    ],
)
def test_a_single_file_says_what_no_weight_shows(
    tmp_path: Path, scheduler: dict[str, Any], expected: set[str]
) -> None:
    base = tiny_models.sdxl(tmp_path / "sdxl")
    tiny_models.with_scheduler(base, {**tiny_models.SDXL_SCHEDULER, **scheduler})
    model = load_model(settings(base), device=CPU)
    policy, _ = model.load_for_training(None, None, FULL, seed=0)
    (tmp_path / "policy").mkdir()
    save_policy(policy, tmp_path / "policy", "unet")
    write_manifest(tmp_path / "policy", stage="train_seed", arguments={}, inputs=[], facts={})
    export_policy.main(arguments(base, tmp_path / "policy", "single-file", tmp_path / "out"))
    with safetensors.safe_open(tmp_path / "out" / "test-iter00.safetensors", "pt") as file:
        assert set(file.keys()) & {"v_pred", "ztsnr"} == expected
