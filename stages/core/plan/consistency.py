"""Mistakes of a config that only show when two keys are read together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from stages.core.method.guidance import guided_steps
from stages.core.plan.families import mistakes
from stages.core.plan.online import online_mistakes

Config = dict[str, Any]


def mistakes_together(config: Config) -> Iterator[str]:
    """All of them, in the order of the config's blocks."""
    if (family := config["model"]["family"]) is not None:
        yield from (f"{key!r}: {text}" for key, text in mistakes(config, family))
    yield from _of_prompts_and_files(config)
    yield from _of_likes(config)
    for block in ("train_seed", "update_policy"):
        yield from _of_training(config, block)
    yield from _of_guidance(config)
    yield from _of_judging(config)
    yield from _of_given_policy(config)
    yield from _of_pair_makers(config)
    yield from _of_draws(config)
    yield from online_mistakes(config)
    yield from _of_evaluation(config)


def needs_pool(config: Config) -> bool:
    """Whether iterations or the online method take prompts, and not people's own captions, as with 'spin'."""
    is_own = config["select_pairs"]["strategy"] == "spin"
    return not is_own and bool(config["iterations"] or config["online"]["method"] != "none")


def nearest(key: str, known: Mapping[str, Any]) -> str:
    """The end of a message about a key that nobody knows: the known one that is most like it, or all."""
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known keys here are {', '.join(sorted(known)) or 'none'}"


def _of_guidance(config: Config) -> Iterator[str]:
    """Intervals of guidance in which no step begins."""
    own = config["sample_candidates"]["sampling"]
    for block, sampling in (
        ("sampling", config["sampling"]),
        ("sample_candidates.sampling", {**config["sampling"], **own}),
    ):
        (first, last), steps = sampling["guidance_interval"], sampling["num_inference_steps"]
        if sampling["guidance_scale"] != 1 and not guided_steps(steps, (first, last)):
            yield (
                f"'{block}.guidance_interval' is [{first:g}, {last:g}], in which none of {steps} steps begins, so "
                "that nothing would be guided; give the first share below the second, and further apart, or set "
                f"'{block}.guidance_scale' to 1"
            )
            return


def _of_prompts_and_files(config: Config) -> Iterator[str]:
    sizes, iterations = config["prompts"]["per_iteration"], config["iterations"]
    if len(sizes) < iterations:
        yield (
            f"'prompts.per_iteration' lists {len(sizes)} sizes, but 'iterations' is {iterations}; "
            "list one size for each iteration"
        )
    owned = {
        "preferences.files": "files" in config["preferences"],
        "prompts.pool": "pool" in config["prompts"],
        "evaluation.prompt_sets": "prompt_sets" in config["evaluation"],
    }
    for key, is_given in owned.items():
        if "shapes" in config and is_given:
            yield f"{key!r} is given beside the block 'shapes', which makes its own; remove one"
        is_wanted = key != "prompts.pool" or needs_pool(config)
        if "shapes" not in config and not is_given and is_wanted:
            yield f"key {key!r} is missing (only the block 'shapes' makes its own)"


def _of_likes(config: Config) -> Iterator[str]:
    """What single likes, which nobody has compared, do not go with."""
    if not config["preferences"]["unpaired"]:
        return
    said, training = "'preferences.unpaired' is true", config["train_seed"]
    if "shapes" in config:
        yield f"{said} beside the block 'shapes', whose human labels are pairs; leave unpaired out"
    if config["preferences"]["layout"] not in ("auto", "likes"):
        yield (
            f"{said} and 'preferences.layout' is {config['preferences']['layout']!r}, which compares images; only "
            "'likes' judges each by itself"
        )
    if training.get("loss") != "kto" and not training.get("policy"):
        yield (
            f"{said} and 'train_seed.loss' is {training.get('loss', 'sigmoid')!r}, which compares two images; use the loss 'kto', "
            "or leave unpaired out, which makes pairs of the likes of one prompt"
        )
    if config["iterations"] and config["mix_preferences"]["seed_fraction"]:
        yield (
            f"{said} and 'mix_preferences.seed_fraction' is {config['mix_preferences']['seed_fraction']}: single likes "
            "are no pairs that could be mixed in; set it to 0"
        )
    if config["score_candidates"]["weights"] == "calibrated":
        yield (
            f"{said} and 'score_candidates.weights' is 'calibrated': weights are fitted to images of one prompt that "
            "people have compared; use 'uniform'"
        )
    for key, is_set in (
        ("select_pairs.strategy", config["select_pairs"]["strategy"] == "spin"),
        ("step_judge.clip", config["step_judge"].get("clip") is not None),
        ("train_seed.use_decisions", bool(training["use_decisions"])),
    ):
        if is_set:
            yield f"{said} and {key!r} needs pairs that people have compared; leave it out"


def _of_training(config: Config, name: str) -> Iterator[str]:
    block, gpus = config[name], config["execution"]["training_gpus"]
    if block["batch_pairs"] % gpus:
        yield (
            f"'{name}.batch_pairs' is {block['batch_pairs']}, no multiple of "
            f"'execution.training_gpus' = {gpus}; a batch is shared equally"
        )
    yield from _of_early_stopping(config, name)
    is_sigmoid = block.get("loss") in (None, "sigmoid")
    if block.get("label_smoothing") and not is_sigmoid:
        yield (
            f"'{name}.label_smoothing' is {block['label_smoothing']}, which the loss "
            f"{block['loss']!r} does not know; leave it out, or use the loss 'sigmoid'"
        )
    if block.get("soft_labels") and not is_sigmoid:
        yield (
            f"'{name}.soft_labels' is true, which the loss {block['loss']!r} does not know; leave "
            "it out, or use the loss 'sigmoid'"
        )


def _of_early_stopping(config: Config, name: str) -> Iterator[str]:
    patience = config[name].get("stop_after_no_gain", 0)
    curve, held_out = config["held_out_curve"]["num_pairs"], config["preferences"]["num_holdout"]
    if patience and not curve:
        yield (
            f"'{name}.stop_after_no_gain' is {patience} and 'held_out_curve.num_pairs' is 0: "
            "nothing would be scored"
        )
    if patience and curve >= held_out:
        yield (
            f"'held_out_curve.num_pairs' is {curve} and 'preferences.num_holdout' is {held_out}: "
            f"'{name}.stop_after_no_gain' would choose a policy by all the pairs that the guards "
            "measure it on; lower the first to about half of the second"
        )
    if patience and config[name].get("ema_decay"):
        yield (
            f"'{name}.stop_after_no_gain' keeps scored weights and '{name}.ema_decay' an "
            "average that is not scored; set one of them to 0"
        )


def _of_judging(config: Config) -> Iterator[str]:
    scoring, pairs = config["score_candidates"], config["select_pairs"]
    if config["iterations"] and scoring["reference"] == "seed" and pairs["ranker"] == "self":
        yield (
            "'score_candidates.reference' is 'seed', but in iteration 1 the seed policy is the judge: "
            "every reward would be 0 and no pair would mean anything; use 'base'"
        )
    if pairs["min_margin_in_standard_errors"] and scoring["num_draws"] < 2:
        yield (
            "'select_pairs.min_margin_in_standard_errors' is above 0 and 'score_candidates.num_draws' is 1: "
            "one draw has no standard error; set num_draws to 2 or more"
        )


def _of_given_policy(config: Config) -> Iterator[str]:
    training = config["train_seed"]
    if training.get("policy") and training.get("use_decisions"):
        yield (
            "'train_seed.policy' is given and 'train_seed.use_decisions' is true: no seed training heeds the "
            "decisions, because the policy was trained elsewhere"
        )
    if training.get("policy") and not config["iterations"]:
        yield "'train_seed.policy' is given and 'iterations' is 0: there is nothing to train"


def _of_pair_makers(config: Config) -> Iterator[str]:
    """What the strategy of select_pairs does not go with."""
    pairs, update = config["select_pairs"], config["update_policy"]
    strategy, number = pairs["strategy"], config["sample_candidates"]["candidates_per_prompt"]
    if strategy != "spin" and number < 2:
        yield (
            f"'sample_candidates.candidates_per_prompt' is {number}: a pair needs 2 or more; 1 is for the strategy "
            "'spin', whose winners are people's images"
        )
    if strategy == "listwise":
        if number % 2:
            yield (
                f"'sample_candidates.candidates_per_prompt' is {number}: the strategy 'listwise' puts best and worst, "
                "second and second to last together; use an even number"
            )
        for key, usual in (("loss", "sigmoid"), ("label_smoothing", 0), ("soft_labels", False)):
            if update.get(key, usual) != usual:
                yield (
                    f"'update_policy.{key}' is {update[key]!r}, which the list's own loss of the strategy 'listwise' "
                    "does not know; leave it out"
                )
    if strategy == "spin":
        if pairs["ranker"] != "self":
            yield (
                f"'select_pairs.ranker' is {pairs['ranker']!r}: with the strategy 'spin' nothing is ranked; use 'self'"
            )
        asked = [
            f"select_pairs.{key}"
            for key in ("min_margin_in_standard_errors", "min_probability")
            if pairs[key]
        ] + ["update_policy.soft_labels"] * bool(update.get("soft_labels"))
        for key in asked:
            yield (
                f"'{key}' is set, but with the strategy 'spin' nobody judges a person's image against the policy's; "
                "leave it out"
            )


def _of_draws(config: Config) -> Iterator[str]:
    """What fewer or other draws do not go with."""
    scoring, pairs = config["score_candidates"], config["select_pairs"]
    is_allocated = scoring["allocation"] == "importance"
    if is_allocated and scoring["weights"] in ("uniform", "velocity"):
        yield (
            f"'score_candidates.allocation' is 'importance', but 'score_candidates.weights' is "
            f"{scoring['weights']!r}: nothing says where the information is; use the weights 'calibrated'"
        )
    if is_allocated and scoring["draw_law"] != "uniform":
        yield (
            f"'score_candidates.allocation' is 'importance' and 'score_candidates.draw_law' is "
            f"{scoring['draw_law']!r}: both say where the draws go; set one of them to 'uniform'"
        )
    if not scoring["adaptive_confidence"]:
        return
    if scoring["first_draws"] >= scoring["num_draws"]:
        yield (
            f"'score_candidates.first_draws' is {scoring['first_draws']} and 'score_candidates.num_draws' is "
            f"{scoring['num_draws']}: no draw would be saved; lower the first"
        )
    for key, wanted in (("strategy", "best_worst"), ("ranker", "self")):
        if pairs[key] != wanted:
            yield (
                f"'score_candidates.adaptive_confidence' is set and 'select_pairs.{key}' is {pairs[key]!r}: candidates "
                f"with fewer draws are ranked for {wanted!r} alone; leave adaptive_confidence out"
            )


def _of_evaluation(config: Config) -> Iterator[str]:
    evaluation = config["evaluation"]
    own = evaluation.get("prompt_sets", {})
    sets = {"shapes": None} if "shapes" in config else own
    for key, known in (("prompt_layouts", own), ("exclude_from_training", sets)):
        for name in evaluation[key] or ():
            if name not in known:
                yield f"'evaluation.{key}' names no prompt set {name!r}{nearest(name, known)}"
    if evaluation["primary_metric"] not in evaluation["metrics"]:
        yield (
            f"'evaluation.primary_metric' is {evaluation['primary_metric']!r}, which "
            f"'evaluation.metrics' does not list ({', '.join(evaluation['metrics'])})"
        )
