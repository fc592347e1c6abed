"""The pipeline at its smallest, made once for all stage tests: each fixture is one stage's Args."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stages import (
    encode_preferences,
    generate_evaluation,
    import_preferences,
    measure_diversity,
    mix_preferences,
    sample_candidates,
    score_candidates,
    score_holdout,
    score_metric,
    select_pairs,
    select_prompts,
    train_seed,
    update_policy,
)
from stages.core.policies.generation import SamplingSettings
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.settings import TrainingSettings
from tests.builders import CAPTIONS, FULL, human_row, prompt_row, settings, write_rows

SAMPLING = SamplingSettings(sampler="ddim", num_inference_steps=2, guidance_scale=3.0)
TRAINING = TrainingSettings(
    dpo_beta=500.0,
    learning_rate=1e-4,
    batch_pairs=2,
    passes=1.0,
    warmup_share=0.0,
    gradient_clip=1.0,
    weight_decay=0.01,
    caption_dropout=0.0,
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the fixtures make."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def imported(made: Path) -> import_preferences.Args:
    """Eight labelled captions, of which four pairs are kept and two held out; a tie, an unlabelled."""
    rows = [human_row(caption, number % 2) for number, caption in enumerate(CAPTIONS[:8])]
    rows += [human_row(CAPTIONS[0], 0.5), human_row(CAPTIONS[1], None, has_label=False)]
    args = import_preferences.Args(
        files=(write_rows(made / "human.parquet", rows),),
        num_pairs=4,
        num_holdout=2,
        seed=0,
        preferences=made / "preferences.parquet",
        holdout=made / "holdout.parquet",
        summary=made / "import.json",
    )
    import_preferences.main(args)
    return args


@pytest.fixture(scope="session")
def encoded(
    imported: import_preferences.Args, tiny_base: str, made: Path
) -> encode_preferences.Args:
    """Latents of the seed pairs."""
    args = encode_preferences.Args(
        preferences=imported.preferences,
        model=settings(tiny_base),
        output=made / "latents.parquet",
        batch=3,
    )
    encode_preferences.main(args)
    return args


@pytest.fixture(scope="session")
def held_out(
    imported: import_preferences.Args, encoded: encode_preferences.Args, made: Path
) -> HeldOutFiles:
    """The held-out pairs, scored after every second step."""
    latents = made / "holdout_latents.parquet"
    encode_preferences.main(replace(encoded, preferences=imported.holdout, output=latents))
    return HeldOutFiles(
        preferences=imported.holdout, latents=latents, num_pairs=2, num_draws=2, every_steps=2
    )


@pytest.fixture(scope="session")
def seed_trained(
    imported: import_preferences.Args,
    encoded: encode_preferences.Args,
    held_out: HeldOutFiles,
    tiny_base: str,
    made: Path,
) -> train_seed.Args:
    """Two steps of seed training."""
    args = train_seed.Args(
        preferences=imported.preferences,
        latents=encoded.output,
        model=settings(tiny_base),
        lora=FULL,
        settings=TRAINING,
        held_out=held_out,
        seed=0,
        output=made / "iter00" / "policy",
        training=made / "iter00" / "training.parquet",
        held_out_curve=made / "iter00" / "held_out_curve.parquet",
        work=made / "iter00" / "work",
        threads=1,
    )
    train_seed.main(args)
    return args


@pytest.fixture(scope="session")
def prompts(imported: import_preferences.Args, made: Path) -> select_prompts.Args:
    """Four prompts that no human pair has."""
    pool = made / "pool.txt"
    pool.write_text("\n".join(CAPTIONS) + "\n")
    used = write_rows(made / "used.parquet", [prompt_row(caption) for caption in CAPTIONS[:8]])
    args = select_prompts.Args(
        pool=(pool,),
        exclude=(used,),
        shuffle_seed=0,
        skip=0,
        take=4,
        output=made / "iter01" / "prompts.parquet",
    )
    select_prompts.main(args)
    return args


@pytest.fixture(scope="session")
def sampled(
    prompts: select_prompts.Args, seed_trained: train_seed.Args, tiny_base: str, made: Path
) -> list[sample_candidates.Args]:
    """Two shards with three candidates of each prompt."""
    shards = [
        sample_candidates.Args(
            prompts=prompts.output,
            model=settings(tiny_base),
            policy=str(seed_trained.output),
            settings=SAMPLING,
            candidates_per_prompt=3,
            seed=0,
            iteration=1,
            shard=shard,
            num_shards=2,
            output=made / "iter01" / f"candidates-{shard}.parquet",
        )
        for shard in range(2)
    ]
    for args in shards:
        sample_candidates.main(args)
    return shards


@pytest.fixture(scope="session")
def scored(
    sampled: list[sample_candidates.Args], seed_trained: train_seed.Args, tiny_base: str, made: Path
) -> list[score_candidates.Args]:
    """Rewards of both shards."""
    shards = [
        score_candidates.Args(
            candidates=shard.output,
            model=settings(tiny_base),
            policy=str(seed_trained.output),
            reference="base",
            num_draws=4,
            reencode=False,
            seed=0,
            iteration=1,
            output=made / "iter01" / f"rewards-{number}.parquet",
        )
        for number, shard in enumerate(sampled)
    ]
    for args in shards:
        score_candidates.main(args)
    return shards


@pytest.fixture(scope="session")
def candidate_scores(sampled: list[sample_candidates.Args], made: Path) -> score_metric.Args:
    """The taste's scores of all candidates."""
    args = score_metric.Args(
        images=tuple(shard.output for shard in sampled),
        metric="total",
        output=made / "iter01" / "candidate_scores.parquet",
    )
    score_metric.main(args)
    return args


@pytest.fixture(scope="session")
def selected(
    sampled: list[sample_candidates.Args], scored: list[score_candidates.Args], made: Path
) -> select_pairs.Args:
    """The best and the worst candidate of each prompt."""
    args = select_pairs.Args(
        candidates=tuple(shard.output for shard in sampled),
        rewards=tuple(shard.output for shard in scored),
        strategy="best_worst",
        candidates_per_prompt=3,
        min_margin_in_standard_errors=0.0,
        dpo_beta=5000.0,
        policy=sampled[0].policy,
        seed=0,
        iteration=1,
        output=made / "iter01" / "pairs.parquet",
    )
    select_pairs.main(args)
    return args


@pytest.fixture(scope="session")
def mixed(
    selected: select_pairs.Args,
    imported: import_preferences.Args,
    encoded: encode_preferences.Args,
    made: Path,
) -> mix_preferences.Args:
    """Four generated pairs with one human pair."""
    args = mix_preferences.Args(
        pairs=selected.output,
        preferences=imported.preferences,
        latents=encoded.output,
        seed_fraction=0.25,
        seed=0,
        iteration=1,
        output=made / "iter01" / "mix.parquet",
    )
    mix_preferences.main(args)
    return args


@pytest.fixture(scope="session")
def updated(
    mixed: mix_preferences.Args,
    seed_trained: train_seed.Args,
    held_out: HeldOutFiles,
    tiny_base: str,
    made: Path,
) -> update_policy.Args:
    """The policy after iteration 1."""
    args = update_policy.Args(
        preferences=mixed.output,
        policy=str(seed_trained.output),
        reference=str(seed_trained.output),
        model=settings(tiny_base),
        lora=FULL,
        settings=TRAINING,
        held_out=held_out,
        seed=0,
        iteration=1,
        output=made / "iter01" / "policy",
        training=made / "iter01" / "training.parquet",
        held_out_curve=made / "iter01" / "held_out_curve.parquet",
        work=made / "iter01" / "work",
        threads=1,
    )
    update_policy.main(args)
    return args


@pytest.fixture(scope="session")
def evaluated(
    prompts: select_prompts.Args,
    seed_trained: train_seed.Args,
    updated: update_policy.Args,
    tiny_base: str,
    made: Path,
) -> dict[str, generate_evaluation.Args]:
    """Two images of each prompt by each policy."""
    policies = {
        "base": "base",
        "iter00": str(seed_trained.output),
        "iter01": str(updated.output),
    }
    runs = {
        name: generate_evaluation.Args(
            prompts=prompts.output,
            model=settings(tiny_base),
            policy=policy,
            settings=SAMPLING,
            images_per_prompt=2,
            seed=1234,
            shard=0,
            num_shards=1,
            output=made / "evaluation" / f"{name}.parquet",
        )
        for name, policy in policies.items()
    }
    for args in runs.values():
        generate_evaluation.main(args)
    return runs


@pytest.fixture(scope="session")
def judged(
    imported: import_preferences.Args,
    held_out: HeldOutFiles,
    seed_trained: train_seed.Args,
    updated: update_policy.Args,
    tiny_base: str,
    made: Path,
) -> list[score_holdout.Args]:
    """The held-out pairs as both policies judge them."""
    runs = [
        score_holdout.Args(
            preferences=imported.holdout,
            latents=held_out.latents,
            model=settings(tiny_base),
            policy=str(policy),
            reference="base",
            num_draws=3,
            dpo_beta=5000.0,
            seed=1234,
            output=made / "evaluation" / f"holdout-{number}.parquet",
        )
        for number, policy in enumerate((seed_trained.output, updated.output))
    ]
    for args in runs:
        score_holdout.main(args)
    return runs


@pytest.fixture(scope="session")
def diversity(
    evaluated: dict[str, generate_evaluation.Args], made: Path
) -> list[measure_diversity.Args]:
    """How far the images of both policies differ."""
    runs = [
        measure_diversity.Args(
            images=(evaluated[name].output,),
            base=(evaluated["base"].output,),
            features="perceptual",
            output=made / "evaluation" / f"diversity-{name}.parquet",
        )
        for name in ("iter00", "iter01")
    ]
    for args in runs:
        measure_diversity.main(args)
    return runs
