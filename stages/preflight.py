r"""A config in; out: do the invariants hold on this machine, does the run fit, what will it cost.

Loads the model, checks the mathematics on it, times one step of each stage, and says how many device
hours and how much disk the whole run takes, before they are spent. Ends with exit code 1 if something
would go wrong. Example:
    python -m stages.preflight --config config/sd15.yaml
    python -m stages.preflight --config config/sd15.yaml config/overlays/lora.yaml --devices 8
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
import tyro
from rich.console import Console
from rich.table import Table

from stages.core.artifacts.images import encode_png, to_pixels
from stages.core.data.evaluation_prompts import PromptLayout, read_evaluation_prompts
from stages.core.data.layouts.labels import Layout, Ledger
from stages.core.data.layouts.recognition import find_layout
from stages.core.data.prompts import read_pool
from stages.core.errors import UserError
from stages.core.evaluation.paper import read_paper_tables
from stages.core.execution.runtime import choose_device, log, run_stage, stage
from stages.core.method.noising import generator, reward_draws, training_draws
from stages.core.method.objective import preference_logit
from stages.core.method.rewards import implicit_reward
from stages.core.method.sampling import sample_latents
from stages.core.method.scoring import draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser, LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.plan.configuration import read_config
from stages.core.plan.costs import Counts, Rates, clock_hours, count, disk_bytes, hours
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.optimizers import make_optimizer
from stages.core.training.pair_losses import batch_loss, pair_errors
from stages.core.training.settings import TrainingSettings, needs_reference
from stages.metrics import PERCEPTUAL, metric_names
from stages.metrics.check import check_weights

PROMPTS = ("a photo of a cat", "an oil painting of a ship in a storm")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""How far an image's error may move with its batch, relatively: rounding of each precision."""
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Args:
    """A config in; checks, hours, memory and disk of its run out."""

    config: tuple[Path, ...]
    """The config, and overlays on it."""
    devices: int = 1
    """Devices the run will have; for the hours on the clock."""
    results: Path = Path("results")
    """Where results will go; for the free disk."""
    threads: int = 2
    """CPU threads."""


@dataclass
class Findings:
    """What was checked, and what would go wrong."""

    checks: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, what: str, found: str, *, holds: bool) -> None:
        """Note a check and log it at once."""
        self.checks.append((what, found, holds))
        log.info("%s  %s: %s", "ok  " if holds else "FAIL", what, found)

    @property
    def failed(self) -> list[str]:
        """Names of what does not hold."""
        return [what for what, _, holds in self.checks if not holds]


def main(args: Args) -> None:
    """Check, time, count, and print."""
    with stage("preflight") as run:
        config = read_config(*args.config)
        findings = Findings()
        prompts, labelled = evaluation_prompts(config, findings), labelled_pairs(config, findings)
        check_metrics(config, findings)
        check_evaluation(config, findings)
        counts = count(config, prompts, labelled)
        device = choose_device(args.threads)
        model = load_model(ModelSettings(**config["model"]), device=device)
        try:
            check_invariants(model, config, findings)
            rates = measure(model, config, findings)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"preflight: the GPU's memory does not suffice ({error}). Lower "
                "execution.micro_batch_pairs, score_rows_per_batch or candidate_prompts_per_batch, set "
                "execution.gradient_checkpointing, or use config/overlays/lora.yaml."
            ) from error
        show(counts, rates, args, findings, config["execution"]["training_gpus"])
        run.rows_in, run.rows_out = len(args.config), len(findings.checks)
        if findings.failed:
            raise UserError(f"preflight: {'; '.join(findings.failed)}")


def evaluation_prompts(config: Mapping[str, Any], findings: Findings) -> int:
    """Prompts of all evaluation sets; notes data files that are not there."""
    if "shapes" in config:
        return 200
    pool = config["prompts"].get("pool", [])
    for name in [pool] if isinstance(pool, str) else pool:
        note_prompts(f"prompts.pool {name}", name, "pool", findings)
    layouts = config["evaluation"]["prompt_layouts"]
    total = 0
    for key, name in config["evaluation"]["prompt_sets"].items():
        what = f"evaluation.prompt_sets.{key} {name}"
        total += note_prompts(what, name, layouts.get(key, "plain"), findings)
    return total


def note_prompts(
    what: str, name: str, layout: PromptLayout | Literal["pool"], findings: Findings
) -> int:
    """Count the prompts of a file, a pattern or a folder; notes it where there is none."""
    is_there = Path(name).exists()
    matches = [Path(match) for match in ([name] if is_there else sorted(glob(name)))]
    files = [file for match in matches
             for file in (sorted(match.rglob("*")) if match.is_dir() else [match])]  # fmt: skip
    if not files:
        findings.add(what, "does not exist", holds=False)
        return 0
    if layout == "pool":
        pool = read_pool(*files)
        count, left_out = len(pool.prompts), pool.num_left_out
    else:
        count, left_out = len(read_evaluation_prompts(files, layout)), 0
    rest = f", {left_out:,} empty or too long are left out" if left_out else ""
    findings.add(what, f"{count:,} prompts{rest}", holds=True)
    return count


def labelled_pairs(config: Mapping[str, Any], findings: Findings) -> int:
    """Rows of all files of human labels; notes what cannot be found or recognised."""
    names = config["preferences"].get("files", [])
    if not names:
        return 0
    shown = f"preferences.files {', '.join(names)}"
    try:
        layout = find_layout([Path(name) for name in names], config["preferences"]["layout"])
        rows = num_labels(layout)
    except UserError as error:
        findings.add(shown, str(error), holds=False)
        return 0
    found = f"{len(layout.files)} files, layout {layout.name}, {rows:,} rows"
    findings.add(shown, found, holds=True)
    return rows


def num_labels(layout: Layout) -> int:
    """Rows of Parquet files by their metadata; of other files by reading them."""
    if all(file.suffix == ".parquet" for file in layout.files):
        return sum(pq.read_metadata(file).num_rows for file in layout.files)
    return sum(1 for _label in layout.labels(Ledger(allowed_bad=sys.maxsize)))


def check_metrics(config: Mapping[str, Any], findings: Findings) -> None:
    """Whether the weights of every metric in use are there and fit, by their headers."""
    evaluation = config["evaluation"]
    names = [*evaluation["metrics"], evaluation["candidate_metric"]]
    names += [config["select_pairs"]["ranker"], evaluation["diversity_features"]]
    for name in dict.fromkeys(names):
        if name in (None, "self", "auto", PERCEPTUAL):
            continue
        try:
            if name not in metric_names():
                raise UserError(f"there is none; expected one of {', '.join(metric_names())}")
            found = check_weights(name, config["metrics"].get(name, {}))
        except UserError as error:
            findings.add(f"metric {name}", str(error), holds=False)
        else:
            findings.add(f"metric {name}", found, holds=True)


def check_evaluation(config: Mapping[str, Any], findings: Findings) -> None:
    """Settings of the evaluation that would be found wrong, or missed, only at its end."""
    evaluation = config["evaluation"]
    if evaluation["images_per_prompt"] < 2:
        is_gate = config["guards"]["on_collapse"] != "warn"
        found = "is not measured with evaluation.images_per_prompt: 1; set it to 2 or more"
        findings.add("diversity of images", found, holds=not is_gate)
    if evaluation["allow_leakage"]:
        what = "evaluation.allow_leakage"
        findings.add(what, "is on: shared prompts are reported, not refused", holds=True)
    sets = ["shapes"] if "shapes" in config else sorted(evaluation["prompt_sets"])
    wanted = [
        (other, Path(other).parent / "evaluation" / name / Path(other).name / "scores" / metric)
        for other in evaluation["compare_with"] for name in sets for metric in evaluation["metrics"]
    ]  # fmt: skip
    for other, path in wanted:
        scores = path.with_name(f"{path.name}.parquet")
        if not scores.is_file():
            found = (
                f"has no {scores}: that run must have scored the same prompts by the same metric"
            )
            findings.add(f"evaluation.compare_with {other}", found, holds=False)
    if evaluation["paper_model"]:
        rows = [row for row in read_paper_tables() if row.model == evaluation["paper_model"]]
        known = {(column.prompt_set, column.metric) for row in rows for column in row.values}
        shown = [pair for pair in known if pair[0] in sets and pair[1] in evaluation["metrics"]]
        findings.add(
            f"evaluation.paper_model {evaluation['paper_model']}",
            f"has {len(shown)} columns of this run's prompt sets and metrics", holds=bool(shown),
        )  # fmt: skip


def check_invariants(model: DiffusionModel, config: Mapping[str, Any], findings: Findings) -> None:
    """Policy equal to reference: reward 0, loss ln 2. Swapped: sign flipped. Batches: no matter."""
    denoiser = model.load_denoiser()
    shape = model.latents_shape
    latents = torch.randn((2, *shape), generator=generator(0))
    draws = reward_draws(1, num_draws=2, num_timesteps=model.num_timesteps, latents_shape=shape)
    text = model.encode_text(PROMPTS[:1])
    errors = draw_errors(model, denoiser, denoiser, latents, text, draws)
    reward = implicit_reward(
        policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
    ).reward
    findings.add(
        "reward of a policy that is its own reference", f"{reward.tolist()}", holds=not reward.any()
    )
    alone = draw_errors(model, denoiser, denoiser, latents[:1], text, draws).policy
    change = float(((alone - errors.policy[:1]) / errors.policy[:1]).abs().max())
    findings.add(
        "an image's error alone and in a batch",
        f"differ by {change:.1e} of it", holds=change <= TOLERANCE[config["model"]["dtype"]],
    )  # fmt: skip
    check_training(model, lora_settings(config), findings)


def check_training(model: DiffusionModel, lora: LoraSettings, findings: Findings) -> None:
    """As a training begins: loss ln 2, and the exchanged pair has the opposite logit."""
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    pairs, rows = random_pairs(model, 2), torch.arange(2)
    draws = training_draws(
        2, num_pairs=2, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    kept = torch.zeros(2, dtype=torch.bool)

    def logit(of: EncodedPairs) -> torch.Tensor:
        with torch.no_grad(), model.autocast():
            return preference_logit(
                pair_errors(model, policy, reference, of, rows, draws, kept), 5000.0
            )

    loss = float(torch.nn.functional.softplus(-logit(pairs)).mean())
    findings.add(
        "DPO loss as training begins",
        f"{loss:.6f} (ln 2 is {math.log(2):.6f})", holds=abs(loss - math.log(2)) < 1e-6,
    )  # fmt: skip
    with torch.no_grad():  # a policy that differs from its reference
        for weight in policy.parameters():
            weight.add_(0.01 * weight.abs().mean() + 1e-4)
    exchanged = replace(pairs, winner=pairs.loser, loser=pairs.winner)
    once, turned = logit(pairs), logit(exchanged)
    change = float(((once + turned) / once).abs().max())
    findings.add(
        "logit of the exchanged pair",
        f"{turned.tolist()} for {once.tolist()}", holds=change <= TOLERANCE[str(model.dtype)[6:]],
    )  # fmt: skip


def lora_settings(config: Mapping[str, Any]) -> LoraSettings:
    """The config's block lora."""
    block = config["lora"]
    return LoraSettings(
        rank=block["rank"],
        alpha=float(block["alpha"]),
        target_modules=tuple(block["target_modules"]),
    )


def random_pairs(model: DiffusionModel, number: int) -> EncodedPairs:
    """Pairs of noise, as large as real ones."""
    latents = torch.randn((2, number, *model.latents_shape), generator=generator(3))
    return EncodedPairs(
        winner=latents[0],
        loser=latents[1],
        caption=torch.zeros(number, dtype=torch.int64),
        text=model.encode_text([PROMPTS[0], ""]),
        winner_geometry=model.native_geometry(number),
        loser_geometry=model.native_geometry(number),
    )


def measure(model: DiffusionModel, config: Mapping[str, Any], findings: Findings) -> Rates:
    """One step of each kind of work, timed at the config's batch sizes."""
    sampled, scored, encoded, image = time_inference(model, config, findings)
    precision = torch.finfo(getattr(torch, config["export"]["dtype"])).bits // 8
    others = precision * model.num_parameters()
    denoiser = precision * sum(weight.numel() for weight in model.load_denoiser().parameters())
    model.release("vae")
    training, weights, state = time_training(model, config, findings)
    return Rates(
        sample_image=sampled,
        score_draw=scored,
        train_pair=training,
        encode_image=encoded,
        image_bytes=image,
        latents_bytes=4 * math.prod(model.latents_shape),
        policy_bytes=weights,
        trained_bytes=state,
        denoiser_bytes=denoiser,
        others_bytes=others,
    )


def time_inference(
    model: DiffusionModel, config: Mapping[str, Any], findings: Findings
) -> tuple[float, float, float, int]:
    """Seconds to sample an image, to score one of its draws, to encode one; bytes of its file."""
    denoiser = model.load_denoiser()
    sampling, execution = config["sampling"], config["execution"]
    batch = config["sample_candidates"]["candidates_per_prompt"]
    batch *= execution["candidate_prompts_per_batch"]
    text, steps = model.encode_text(PROMPTS[:1]).repeat(batch), 2

    def sample() -> torch.Tensor:
        return sample_latents(
            model, denoiser, text=text, unconditional=model.unconditional(),
            seeds=list(range(batch)), sampler=sampling["sampler"],
            num_inference_steps=steps, guidance_scale=sampling["guidance_scale"],
        )  # fmt: skip

    latents = sample()
    sampled = seconds(model, sample) / steps * sampling["num_inference_steps"] / batch
    decoded = model.decode_latents(latents[:1])
    decoding = seconds(model, lambda: model.decode_latents(latents[:1]))
    memory(model, "sampling and decoding", findings)
    draws = reward_draws(
        1, num_draws=config["score_candidates"]["num_draws"],
        num_timesteps=model.num_timesteps, latents_shape=model.latents_shape,
    )  # fmt: skip
    one = latents[: config["sample_candidates"]["candidates_per_prompt"]].float().cpu()
    prompt = model.encode_text(PROMPTS[:1])
    rows = execution["score_rows_per_batch"]
    scoring = seconds(model, lambda: draw_errors(
        model, denoiser, denoiser, one, prompt, draws, rows_per_batch=rows))  # fmt: skip
    memory(model, "scoring", findings)
    images = torch.zeros((1, 3, model.image_size, model.image_size))
    encoding = seconds(model, lambda: model.encode_images(images))
    return (
        sampled + decoding,
        scoring / (len(one) * len(draws.timesteps)),
        encoding,
        len(encode_png(to_pixels(decoded.numpy())[0])),
    )


def time_training(
    model: DiffusionModel, config: Mapping[str, Any], findings: Findings
) -> tuple[float, int, int]:
    """(seconds a pair, bytes of a policy, bytes of a training state), from one optimizer step."""
    block = {k: v for k, v in config["update_policy"].items() if k != "reference"}
    settings = TrainingSettings(**block)
    lora = lora_settings(config)
    execution = config["execution"]
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    batch = settings.batch_pairs
    number = min(batch, execution["micro_batch_pairs"] or batch)
    pairs = random_pairs(model, number)
    model.release(*model.encoder_parts)
    parameters = policy.trainable()
    if execution["gradient_checkpointing"]:
        policy.network.enable_gradient_checkpointing()
    optimizer = make_optimizer(
        settings.optimizer, parameters, learning_rate=1e-9, weight_decay=settings.weight_decay
    )
    draws = training_draws(
        2, num_pairs=number, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    kept, rows = torch.zeros(number, dtype=torch.bool), torch.arange(number)
    compared: Denoiser | None = reference if needs_reference(settings) else None

    def micro_batch() -> None:
        with model.autocast():
            measures = batch_loss(model, policy, compared, pairs, rows, draws, settings, kept)
        measures["loss"].backward()  # type: ignore[no-untyped-call]

    micro_batch()
    optimizer.step()
    pair = seconds(model, micro_batch) / number + seconds(model, optimizer.step) / batch
    optimizer.zero_grad(set_to_none=True)
    memory(model, f"training, {number} pairs at once", findings)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values() for value in state.values()
        if isinstance(value, torch.Tensor)
    )  # fmt: skip
    return pair, weights, weights + moments


def seconds(model: DiffusionModel, work: Callable[[], object]) -> float:
    """Seconds on the clock of one call, with the device's queue emptied before and after."""
    synchronise(model)
    started = time.monotonic()
    work()
    synchronise(model)
    return time.monotonic() - started


def synchronise(model: DiffusionModel) -> None:
    """Wait for the device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def memory(model: DiffusionModel, what: str, findings: Findings) -> None:
    """Note the peak of GPU memory since the last note; nothing on a CPU."""
    if model.device.type != "cuda":
        return
    peak = torch.cuda.max_memory_allocated(model.device)
    total = torch.cuda.get_device_properties(model.device).total_memory
    findings.add(
        f"GPU memory, {what}", f"{peak / GB:.1f} of {total / GB:.1f} GB", holds=peak < 0.95 * total
    )
    torch.cuda.reset_peak_memory_stats(model.device)


def show(counts: Counts, rates: Rates, args: Args, findings: Findings, training_gpus: int) -> None:
    """Tables of hours and disk on the terminal; notes whether the disk is large enough."""
    console = Console()
    table = Table(title="What the run will take", title_justify="left")
    for column in ("work", "how much", "device hours"):
        table.add_column(column, justify="left" if column == "work" else "right")
    amounts = {
        "encode human pairs": f"{counts.human_pairs:,} pairs",
        "sample candidates": f"{counts.candidates:,} images",
        "score candidates": f"{counts.candidates:,} x {counts.reward_draws} draws",
        "train": f"{counts.training_pairs:,} pairs",
        "sample evaluation images": f"{counts.evaluation_images:,} images",
    }
    taken = hours(counts, rates)
    for name, value in taken.items():
        table.add_row(name, amounts[name], f"{value:.2f}")
    table.add_row("all", "", f"{sum(taken.values()):.2f}", style="bold")
    console.print(table)
    if args.devices > 1:
        clock = clock_hours(taken, devices=args.devices, training_gpus=training_gpus)
        console.print(
            f"About {clock:.2f} h on {args.devices} devices, of which a training takes "
            f"{min(args.devices, training_gpus)} (execution.training_gpus)"
        )
    disk = Table(title="What it will write", title_justify="left")
    disk.add_column("files")
    disk.add_column("GB", justify="right")
    sizes = disk_bytes(counts, rates)
    for name, size in sizes.items():
        disk.add_row(name, f"{size / GB:.2f}")
    disk.add_row("all", f"{sum(sizes.values()) / GB:.2f}", style="bold")
    console.print(disk)
    place = args.results if args.results.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    findings.add(
        f"free disk at {place}", f"{free / GB:.1f} GB for {sum(sizes.values()) / GB:.1f} GB",
        holds=free > 1.1 * sum(sizes.values()),
    )  # fmt: skip


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
