# Which policy goes into a job and comes out of it, and what stands between two iterations.
def policy(name):
    """The manifest that completes a policy's folder; nothing for the base model.

    Where files go through a bucket, which would not fetch the rest of the folder, with its weights.
    """
    if name == "base":
        return []
    manifest = f"{RUN}/{name}/policy/manifest.json"
    return [manifest, stored_weights(name)] if STORAGE else manifest


def stored_weights(name, flag=lambda path: path):
    """A policy's weights where files go through a bucket: a LoRA's file, or a network's folder."""
    if not STORAGE:
        return []
    if config["lora"]["rank"] > 0:
        return f"{RUN}/{name}/policy/pytorch_lora_weights.safetensors"
    return flag(f"{RUN}/{name}/policy/{PLAN.denoiser_part}")


def folder(manifest):
    """How a stage is told of a policy: its folder, or 'base'."""
    if manifest and not isinstance(manifest, str):
        manifest = manifest[0]
    return str(Path(str(manifest)).parent) if manifest else "base"


def policy_folder(wildcards, input):
    """Param: the policy among a rule's inputs."""
    return folder(input.get("policy", ""))


def reference_folder(wildcards, input):
    """Param: the reference among a rule's inputs."""
    return folder(input.get("reference", ""))


def output_folder(wildcards, output):
    """Param: the folder that a rule's first output completes."""
    return folder(output[0])


def wanted_policy(wildcards):
    """Input: the policy of the wildcard."""
    return policy(wildcards.policy)


def base_images(wildcards):
    """Input: the base's images, from which those of a policy are told; none for the base itself."""
    if wildcards.policy == "base":
        return []
    return expand(IMAGES, set=wildcards.set, policy="base", shard=EVALUATION_SHARDS)


def iteration(wildcards):
    """Its number, as a flag takes it."""
    return int(wildcards.iter)


def previous(wildcards):
    """Name of the policy that an iteration starts from; iteration 0 is the seed training."""
    return f"iter{iteration(wildcards) - 1:02d}"


def previous_policy(wildcards):
    """What an iteration starts from; with a gate what it hands on."""
    if ON_COLLAPSE != "warn":
        return f"{RUN}/iter{wildcards.iter}/start/manifest.json"
    return policy(previous(wildcards))


def named_policy(kind):
    """The input function of a policy that the config calls base, seed or current."""

    def path(wildcards):
        if kind == "current":
            return previous_policy(wildcards)
        return policy({"base": "base", "seed": "iter00"}[kind])

    return path


def judges_before(wildcards):
    """Input: the weights of each policy that an iteration may start from; none where all count alike."""
    if not HAS_JUDGE:
        return []
    numbers = range(iteration(wildcards))
    last = numbers if ON_COLLAPSE == "rollback" else numbers[-1:]
    return expand(JUDGES, policy=[f"iter{number:02d}" for number in last])


def judges_of_draws(wildcards):
    """Input: the same where they say which draws to make."""
    by_weight = SCORING["allocation"] == "importance"
    is_told = by_weight or SCORING["adaptive_confidence"] > 0
    return judges_before(wildcards) if is_told else []


def decisions_about(wildcards):
    """Input: what a person decided in the audit about an iteration's pairs and human ones, if anything."""
    return decisions_of(0, iteration(wildcards))


def decisions_about_seed(wildcards):
    """Input: what a person decided about human pairs, if the seed training is to heed it."""
    return decisions_of(0) if config["train_seed"]["use_decisions"] else []


def decisions_of(*iterations):
    """The tables of decisions about these iterations' pairs that there are; 0 stands for human ones."""
    paths = [f"{RUN}/decisions/iter{number:02d}.parquet" for number in iterations]
    found = [path for path in paths if Path(path).is_file()]
    if found and STORAGE:
        raise WorkflowError(
            f"{found[0]} lies on this machine, and this profile keeps results in a bucket, where "
            "the jobs would not see it. Move the folder away, or run where all machines share a "
            "file system."
        )
    return found


def gate_inputs(wildcards):
    """What the gate of an iteration looks at: its own tables, and iteration 0's to compare."""
    number = int(wildcards.number)
    own, names = f"{RUN}/iter{number:02d}", ["iter00", f"iter{number:02d}"]
    found = {
        "holdout": expand(JUDGED_HOLDOUT, policy=names),
        "diversity": expand(
            f"{RUN}/evaluation/{PROMPT_SETS[0]}/{{name}}/diversity.parquet",
            name=names,
        ),
    }
    if number:
        found["pairs"] = f"{own}/pairs.parquet"
        found["previous"] = f"{RUN}/iter{number - 1:02d}/gate.json"
    return found


def gate_flags(wildcards, input):
    """The same, as flags."""
    number = int(wildcards.number)
    values = {
        "iteration": number,
        "holdout": [0, input.holdout[0], number, input.holdout[1]],
        "diversity": [0, input.diversity[0], number, input.diversity[1]],
    }
    if number:
        values |= {"pairs": [number, input.pairs], "previous": input.previous}
    return flags(values)


def gate_before(wildcards):
    """The decision on the iteration before; under stop, judging again unmakes nothing made since."""
    path = f"{RUN}/{previous(wildcards)}/gate.json"
    return ancient(path) if ON_COLLAPSE == "stop" else path


def online_policy(kind):
    """Name of the policy that the block `online` calls base, seed or last."""
    return {"base": "base", "seed": "iter00", "last": f"iter{LAST:02d}"}[kind]


STEP_JUDGE_FILES = [
    f"{RUN}/step_judge/judge/{name}"
    for name in ("manifest.json", "model.safetensors", "config.json")
]


def online_inputs(wildcards):
    """Input: what online training starts from, and what judges: a policy with its weights of timesteps, or a CLIP."""
    online = config["online"]
    found = {"policy": policy(online_policy(online["initial"]))}
    if online["judge"] == "self":
        name = online_policy(online["judge_policy"])
        found["judge"] = policy(name)
        if HAS_JUDGE:
            found["record"] = expand(JUDGES, policy=name)
    elif online["judge"] == "spm" and PLAN.trains_step_judge:
        found["judge"] = STEP_JUDGE_FILES
    return {key: path for key, path in found.items() if path}


def online_settings():
    """The block `online` as flags of the training, save who judges and where it starts."""
    others = ("initial", "num_prompts")
    kept = {
        key: value
        for key, value in config["online"].items()
        if key not in others and not key.startswith("judge")
    }
    kept["dpo_beta"] = config["update_policy"]["dpo_beta"]
    return flags(kept, "settings")


def step_judge_settings():
    """The block `step_judge` as flags of its training, save what it begins as."""
    return settings("step_judge", without=("clip", "tokenizer", "every_steps"))


def online_judge(wildcards, input):
    """Param: who judges, as flags; an implicit reward as the candidates' is had, by which its weights were fitted."""
    online = config["online"]
    values = {"name": online["judge"]}
    if online["judge"] == "self":
        values["policy"] = folder(input.judge)
        values["num_draws"] = online["judge_draws"]
        values |= DRAWING
        if SCORING["rewards_by"] != "difference":
            values["rewards_by"] = SCORING["rewards_by"]
        if JUDGING["dtype"] != config["model"]["dtype"]:
            values["dtype"] = JUDGING["dtype"]
        if HAS_JUDGE:
            values["record"] = input.record[0]
    else:
        values["scale"] = online["judge_scale"]
    if online["judge"] == "spm" and PLAN.trains_step_judge:
        words = ["weights", folder(input.judge), "tokenizer"]
        values["options"] = [*words, config["step_judge"]["tokenizer"]]
        return flags(values, "judge")
    options = options_of(online["judge"])
    return f"{flags(values, 'judge')} {options.replace('--options', '--judge.options')}"
