# Human pairs (or single likes) -> seed pairs and held-out pairs -> latents -> policy 0.
ADOPTED_POLICY = config["train_seed"].get("policy")
PREFERENCES = without_defaults(config["preferences"], "preferences")
PREFERENCE_FILES = (
    [f"{RUN}/world/preferences.parquet"]
    if "shapes" in config
    else matching(config["preferences"]["files"])
)
# The stage finds the files again, by the patterns of the config.
ASKED_FILES = flags({"files": PREFERENCES.pop("files", PREFERENCE_FILES)})
COLUMNS = PREFERENCES.pop("columns", {})
# Jobs that encode the human pairs side by side.
ENCODING_SHARDS = range(PREFERENCES.pop("shards", 1))
UNPAIRED = " --unpaired" if PREFERENCES.pop("unpaired", False) else ""
EXCLUDED_FILES = [file for name in EXCLUDED_SETS for file in prompt_set_files(name)]
IMPORT = {
    **PREFERENCES,
    **{f"columns.{role}": name for role, name in COLUMNS.items()},
    "seed": config["seed"],
    # Only a tokenizer that lies here already: the import fetches nothing.
    "tokenizer": PLAN.tokenizer,
}

SEED = [
    f"{RUN}/seed/preferences_latents.parquet",
    f"{RUN}/seed/holdout_latents.parquet",
    f"{RUN}/seed/preferences.parquet",
    f"{RUN}/seed/holdout.parquet",
    f"{RUN}/seed/import.json",
    *WORLD,
    f"{RUN}/iter00/policy/manifest.json",
    *expand(
        f"{RUN}/iter00/{{table}}.parquet",
        table=[] if ADOPTED_POLICY else ["training", "held_out_curve"],
    ),
]


rule import_preferences:
    input:
        files=PREFERENCE_FILES,
        exclude=EXCLUDED_FILES,
    output:
        preferences=f"{RUN}/seed/preferences.parquet",
        holdout=f"{RUN}/seed/holdout.parquet",
        summary=shown(f"{RUN}/seed/import.json", "Human pairs"),
    log:
        f"{LOGS}/seed/import_preferences.log",
    priority: 10
    params:
        **stage("import_preferences", files=ASKED_FILES, flags=flags(IMPORT) + UNPAIRED),
    shell:
        "{params.command} {params.files} --exclude {input.exclude:q} {params.flags}"
        " --preferences {output.preferences:q} --holdout {output.holdout:q}"
        " --summary {output.summary:q} 2>&1 | record {log:q}"


rule encode_preferences:
    input:
        f"{RUN}/seed/{{part}}.parquet",
    output:
        f"{RUN}/seed/{{part}}_latents.parquet",
    log:
        f"{LOGS}/seed/encode_{{part}}.log",
    wildcard_constraints:
        part="holdout" if len(ENCODING_SHARDS) > 1 else "holdout|preferences",
    priority: 10
    resources:
        **small_gpu(),
    params:
        **stage("encode_preferences", model=MODEL, share=""),
    shell:
        "{params.command} --preferences {input:q}{params.share} {params.model} {resources.execution}"
        " --output {output:q} --threads {threads} 2>&1 | record {log:q}"


if len(ENCODING_SHARDS) > 1:

    use rule encode_preferences as encode_shard with:
        input:
            f"{RUN}/seed/preferences.parquet",
        output:
            temp(f"{RUN}/seed/preferences_latents/shard-{{shard}}.parquet"),
        log:
            f"{LOGS}/seed/encode_preferences-{{shard}}.log",
        params:
            **stage("encode_preferences", model=MODEL),
            share=f" --shard {{shard}} --num-shards {len(ENCODING_SHARDS)}",

    rule join_latents:
        input:
            preferences=f"{RUN}/seed/preferences.parquet",
            shards=expand(rules.encode_shard.output, shard=ENCODING_SHARDS),
        output:
            f"{RUN}/seed/preferences_latents.parquet",
        log:
            f"{LOGS}/seed/join_latents.log",
        priority: 10
        params:
            **stage("join_latents"),
        shell:
            "{params.command} --preferences {input.preferences:q} --shards {input.shards:q}"
            " --output {output:q} 2>&1 | record {log:q}"


if ADOPTED_POLICY:

    rule adopt_policy:
        output:
            policy=f"{RUN}/iter00/policy/manifest.json",
            weights=stored_weights("iter00", directory),
        log:
            f"{LOGS}/iter00/adopt_policy.log",
        priority: 10
        params:
            **stage(
                "adopt_policy",
                folder=output_folder,
                model=MODEL,
                policy=ADOPTED_POLICY,
            ),
        shell:
            "{params.command} --policy {params.policy:q} {params.model}"
            " --output {params.folder:q} 2>&1 | record {log:q}"

else:

    rule train_seed:
        input:
            preferences=f"{RUN}/seed/preferences.parquet",
            latents=f"{RUN}/seed/preferences_latents.parquet",
            decisions=decisions_about_seed,
            held_out=HELD_OUT_FILES,
        output:
            policy=f"{RUN}/iter00/policy/manifest.json",
            weights=stored_weights("iter00", directory),
            training=f"{RUN}/iter00/training.parquet",
            held_out_curve=f"{RUN}/iter00/held_out_curve.parquet",
        log:
            f"{LOGS}/iter00/train_seed.log",
        benchmark:
            f"{LOGS}/iter00/train_seed.tsv"
        priority: 10
        threads: 2
        resources:
            **TRAINING_GPUS,
        params:
            **training("train_seed"),
            decisions=where_given("decisions"),
            folder=output_folder,
            work=f"{WORK}/iter00",
        shell:
            "launch {resources.gpu} stages.train_seed"
            " --preferences {input.preferences:q} --latents {input.latents:q}"
            " {params.decisions} {params.model} {params.lora} --seed {params.seed} {params.settings}"
            " {params.held_out} --output {params.folder:q} --training {output.training:q}"
            " --held-out-curve {output.held_out_curve:q} --work {params.work:q}"
            " {resources.execution} --threads {threads} 2>&1 | record {log:q}"
