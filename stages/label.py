r"""Images of prompts in, or prompts and a model; what people prefer out, by a page in the browser.

Two images of one prompt stand side by side; one key says which is better, that they are equal, or that
both are bad. With `--show 4` there are four, to be put in an order. Every answer is on the disk before the next pair is shown. Several people may label, each
under a name. At its end, or with `--export`, the answers become `labels.parquet` in the folder of the
labels, which `import_preferences` reads. See docs/labelling.md.

Example:
    python -m stages.label --images data/studio --labels labels/studio
    python -m stages.label --prompts data/prompts.txt --base models/sd15 --labels labels/sd15
    python -m stages.label --images data/studio --labels labels/studio --export
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from stages.core.artifacts.provenance import BASE
from stages.core.errors import UserError
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.labelling.answers import Answer, read_answers
from stages.core.labelling.choosing import Chooser, judge_images
from stages.core.labelling.desk import Desk
from stages.core.labelling.export import write_labels
from stages.core.labelling.gallery import Gallery
from stages.core.labelling.measures import agreement, first_share
from stages.core.labelling.page import STATIC, LabellingPage
from stages.core.labelling.pairs import Pair, choose_pairs
from stages.core.labelling.places import find_images
from stages.core.labelling.sampling import Sampling, sample
from stages.core.models.loading import ModelSettings
from stages.core.pages.journal import Journal, read_journal
from stages.core.pages.server import bind, build_app, new_token, serve

ANSWERS = "answers.jsonl"
LABELS = "labels.parquet"
SAMPLED = "candidates.parquet"
JUDGED = "judged.parquet"
"""Names of files in the folder of the labels."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Images of prompts in, or prompts and a model; what people prefer out."""

    images: tuple[Path, ...] = ()
    """Folders of images, or tables with one image a row; docs/labelling.md shows both."""
    prompts: Path | None = None
    """Instead of images: a file of prompts, of which --base makes them."""
    base: str | None = None
    """The model for --prompts: a folder in diffusers' layout, a hub id or a .safetensors checkpoint."""
    labels: Path
    """Folder of this labelling: the journal of answers, the labels, and images that were made for it."""
    export: bool = False
    """Only write labels.parquet; also while a server runs."""
    choose: Literal["random", "uncertain_and_different"] = "random"
    """Which pairs are asked about next. 'uncertain_and_different' takes those that --judge is least sure of and
    that look least like what was labelled; a third is random all the same, and only these may be held out."""
    judge: str | None = None
    """With --choose uncertain_and_different: a policy folder that judges; --base is its model."""
    judge_reference: str = BASE
    """The policy folder that the judge is compared with, or 'base'."""
    judge_record: Path | None = None
    """The record that a run has fitted to that policy (evaluation/judges/*.json); without one all timesteps
    count alike."""
    judge_dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Precision of the networks that judge. In half precision --rewards-by difference is mostly rounding."""
    rewards_by: Literal["difference", "secant", "derivative"] = "difference"
    """How the judge's reward is had: of two errors, or 'secant' or 'derivative', for which half precision suffices."""
    draw_law: Literal["uniform", "logit_normal"] = "uniform"
    """How the judge's timesteps are drawn; as the run that fitted --judge-record draws them."""
    embedded_guidance: float = 1.0
    """The guidance that FLUX.1-dev is told where it judges."""
    num_draws: int = 10
    """Draws of timestep and noise by which an image is judged (paper: 10)."""
    show: Literal[2, 3, 4] = 2
    """Images that stand side by side: of 2 people choose the better one, 3 or 4 they rank."""
    pairs_per_prompt: int = 1
    """Pairs (or sets of --show) of each prompt's images that are asked about at most."""
    common_share: float = 0.1
    """Share of the pairs that every labeller is asked about, so that their agreement shows; 0 to 1."""
    seed: int = 0
    """Decides which pairs are drawn, and what --base makes."""
    policy: str | None = None
    """With --base: a policy folder that samples instead of the model itself."""
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """With --base: precision of the networks that make images."""
    images_per_prompt: int | None = None
    """With --base: images of each prompt; None is as many as --show."""
    image_size: tuple[int, int] | None = None
    """With --base: height and width in pixels of what it makes and judges; None is its own size."""
    sampler: Literal["ddpm", "ddim", "euler", "euler_stochastic", "dpm"] = "ddim"
    """With --base: the sampler. Models of flow matching have euler and euler_stochastic, Sana also dpm."""
    num_inference_steps: int = 30
    """With --base: sampler steps."""
    guidance_scale: float = 7.5
    """With --base: weight of classifier-free guidance; 1 is none."""
    prompts_per_batch: int = 1
    """With --base: prompts sampled at a time; changes images only by rounding."""
    threads: int = 1
    """With --base: CPU threads."""
    port: int = 8766
    """Port of the page on this machine; 0 takes a free one."""
    open_browser: bool = True
    """Open the page in a browser, where there is a screen."""


def main(args: Args) -> None:
    """Find or make the images; then only export, or show pairs until the server is ended."""
    check(args)
    with stage("label") as run:
        journal_path = args.labels / ANSWERS
        if args.export:
            gallery = Gallery(find_images(sources(args)))
            answers = list(read_answers(journal_path, read_journal(journal_path)).values())
            run.rows_in, run.rows_out = len(answers), export(gallery, answers, args)
            return
        found = find_images(args.images) if args.images else []  # before any file is made
        with Journal(journal_path) as journal:
            if args.prompts is not None:
                make_images(args)
                found = find_images(sources(args))
            gallery = Gallery(found)
            pairs = choose_pairs(
                gallery.prompts, pairs_per_prompt=args.pairs_per_prompt,
                common_share=args.common_share, seed=args.seed, images_shown=args.show,
                are_chosen=args.choose != "random",
            )  # fmt: skip
            check_kind(args, journal)
            desk = Desk(
                gallery, pairs, journal, common_share=args.common_share,
                chooser=chooser_of(args, gallery, pairs),
            )  # fmt: skip
            log.info(
                "label: %d pairs of %d prompts, %d answers so far%s", len(pairs),
                len(gallery.prompts), len(desk.answers()), told_stale(len(desk.stale)),
            )  # fmt: skip
            token = new_token()
            page = LabellingPage(desk, args.labels.absolute().name)
            app = build_app(page.routes(), token=token, static=STATIC)
            try:
                serve(app, token=token, port=args.port, open_browser=args.open_browser)
            finally:
                answers = desk.answers()
                run.rows_in, run.rows_out = len(answers), export(gallery, answers, args)


def check(args: Args) -> None:
    """UserError for flags that do not fit each other, or a port that is in use."""
    if bool(args.images) == (args.prompts is not None):
        raise UserError(
            "expected --images with folders or tables, or --prompts with a file and --base with a model; "
            f"found {'both' if args.images else 'neither'}"
        )
    if args.prompts is not None and args.base is None:
        raise UserError("--prompts needs --base, the model that makes images of them")
    for name, value, least in (
        ("pairs-per-prompt", args.pairs_per_prompt, 1),
        ("images-per-prompt", args.images_per_prompt or args.show, args.show),
        ("num-inference-steps", args.num_inference_steps, 1),
        ("prompts-per-batch", args.prompts_per_batch, 1),
        ("num-draws", args.num_draws, 1),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, found {value}")
    is_chosen = args.choose != "random"
    if is_chosen and (args.judge is None or args.base is None):
        raise UserError(
            f"--choose {args.choose} needs --judge with a policy folder, and --base with its model"
        )
    if not is_chosen and (args.judge is not None or args.judge_record is not None):
        raise UserError("--judge and --judge-record go with --choose uncertain_and_different")
    if not 0 <= args.common_share <= 1:
        raise UserError(f"--common-share must be from 0 to 1, found {args.common_share}")
    if not args.export:
        bind(args.port).close()  # now, and not after an hour of sampling


def check_kind(args: Args, journal: Journal) -> None:
    """UserError if the folder's answers are pairs and rankings are asked for, or the other way round.

    One table of labels has one layout.
    """
    found = {answer.is_ranking for answer in read_answers(journal.path, journal.entries()).values()}
    if found - {args.show > 2}:
        kinds = {False: "pairs (--show 2)", True: "rankings (--show 3 or 4)"}
        raise UserError(
            f"{journal.path} holds answers about {kinds[args.show == 2]}, and --show is {args.show}. Name "
            "another folder with --labels; import_preferences takes labels of one layout at a time."
        )


def chooser_of(args: Args, gallery: Gallery, pairs: Sequence[Pair]) -> Chooser | None:
    """What chooses the pairs, if not chance alone; it judges their images first."""
    if args.judge is None or args.base is None:
        return None
    # This brings torch, which nobody waits for who is asked about pairs at random.
    from stages.core.policies.judging import Judging

    judging = Judging(
        model=ModelSettings(base=args.base, dtype=args.judge_dtype, image_size=args.image_size),
        policy=args.judge,
        reference=args.judge_reference, record=args.judge_record, num_draws=args.num_draws,
        seed=args.seed, rewards_by=args.rewards_by, draw_law=args.draw_law,
        embedded_guidance=args.embedded_guidance,
    )  # fmt: skip
    return judge_images(args.labels / JUDGED, gallery, pairs, judging, threads=args.threads)


def sources(args: Args) -> Sequence[Path]:
    """Where the images lie. UserError if they are still to be made."""
    if args.prompts is None:
        return args.images
    if not (args.labels / SAMPLED).is_file():
        raise UserError(
            f"{args.labels / SAMPLED} does not exist; call the command without --export, which makes it"
        )
    return [args.labels / SAMPLED]


def make_images(args: Args) -> None:
    """Make the images of --prompts, or go on with those of an earlier call."""
    assert args.prompts is not None
    assert args.base is not None
    sampling = Sampling(
        model=ModelSettings(base=args.base, dtype=args.dtype, image_size=args.image_size),
        policy=args.policy or BASE,
        images_per_prompt=args.images_per_prompt or args.show,
        sampler=args.sampler,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
    )
    sample(
        args.labels / SAMPLED, args.prompts, sampling,
        prompts_per_batch=args.prompts_per_batch, threads=args.threads,
    )  # fmt: skip


def export(gallery: Gallery, answers: Sequence[Answer], args: Args) -> int:
    """Write labels.parquet and say what is in it; its number of rows."""
    path = args.labels / LABELS
    if not answers and not path.exists():
        log.info("label: nothing was answered yet, so no labels are written")
        return 0
    done = write_labels(path, gallery, answers, arguments=args, journal=args.labels / ANSWERS)
    log.info("label: %s holds %s", path, done)
    tell_measures(answers)
    return done.num_rows


def tell_measures(answers: Sequence[Answer]) -> None:
    """How far the labellers agree, and which side each of them favours."""
    found = agreement(answers)
    if found.raw is not None:
        kind = " of their ranks" if found.is_ordinal else ""
        alpha = "" if found.alpha is None else f", Krippendorff's alpha{kind} {found.alpha:.2f}"
        log.info(
            "label: %.0f %% of the verdicts on %d %s that several of %d people judged are equal%s",
            100 * found.raw, found.num_pairs, "sets" if found.is_ordinal else "pairs",
            found.num_labellers, alpha,
        )  # fmt: skip
    for labeller in sorted({answer.labeller for answer in answers}):
        share = first_share(answer for answer in answers if answer.labeller == labeller)
        if share is not None:
            log.info(
                "label: %s chose the %s image %.0f %% of %d times (95 %% interval %.0f to %.0f %%; by chance "
                "%.0f %%)", labeller, "first" if answers[0].is_ranking else "left", 100 * share.share,
                share.num_choices, 100 * share.low, 100 * share.high, 100 * share.expected,
            )  # fmt: skip


def told_stale(num_stale: int) -> str:
    """What is said of answers that do not count any more."""
    if not num_stale:
        return ""
    return f"; {num_stale} more are about images that have changed since, or are gone: they do not count"


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
