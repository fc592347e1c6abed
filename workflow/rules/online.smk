# A baseline beside SAIL: a policy that is trained on what it samples meanwhile, and a judge of unfinished images.
# Both are off by default.
ONLINE_PROMPTS = f"{RUN}/prompts/online.parquet"
ONLINE = []
if PLAN.is_online:
    ONLINE = [
        ONLINE_PROMPTS,
        f"{RUN}/online/policy/manifest.json",
        *expand(
            f"{RUN}/online/{{table}}.parquet",
            table=["training", "transitions", "held_out_curve"],
        ),
    ]

    use rule select_prompts as select_online_prompts with:
        output:
            ONLINE_PROMPTS,
        log:
            f"{LOGS}/online/select_prompts.log",
        params:
            **stage("select_prompts", seed=config["seed"]),
            skip=0,  # the first that the iterations take, too
            take=config["online"]["num_prompts"],

    rule train_online:
        input:
            unpack(online_inputs),
            prompts=ONLINE_PROMPTS,
            held_out=HELD_OUT_FILES,
        output:
            policy=f"{RUN}/online/policy/manifest.json",
            weights=stored_weights("online", directory),
            training=f"{RUN}/online/training.parquet",
            transitions=f"{RUN}/online/transitions.parquet",
            held_out_curve=f"{RUN}/online/held_out_curve.parquet",
        log:
            f"{LOGS}/online/train_online.log",
        benchmark:
            f"{LOGS}/online/train_online.tsv"
        threads: 2
        resources:
            **TRAINING_GPUS,
            online=flags({"prompts_per_batch": EXECUTION["online_prompts_per_batch"]}),
        params:
            code=kept_version("stages.train_online"),
            model=MODEL,
            lora=LORA,
            seed=config["seed"],
            policy=policy_folder,
            settings=online_settings(),
            judge=online_judge,
            held_out=HELD_OUT,
            folder=output_folder,
            work=f"{WORK}/online",
        shell:
            "launch {resources.gpu} stages.train_online"
            " --prompts {input.prompts:q} --policy {params.policy:q} {params.model}"
            " {params.lora} --seed {params.seed} {params.settings} {params.judge}"
            " {params.held_out} --output {params.folder:q} --training {output.training:q}"
            " --transitions {output.transitions:q} --work {params.work:q}"
            " --held-out-curve {output.held_out_curve:q}"
            " {resources.execution} {resources.online} --threads {threads} 2>&1 | record {log:q}"


STEP_JUDGE = []
if PLAN.trains_step_judge:
    STEP_JUDGE = [
        *STEP_JUDGE_FILES,
        *expand(f"{RUN}/step_judge/{{table}}.parquet", table=["training", "curve"]),
    ]

    EVERY_STEPS = {"every_steps": config["step_judge"]["every_steps"]}

    rule train_step_judge:
        input:
            preferences=f"{RUN}/seed/preferences.parquet",
            latents=f"{RUN}/seed/preferences_latents.parquet",
            held_out=HELD_OUT_FILES,
        output:
            *STEP_JUDGE_FILES,
            training=f"{RUN}/step_judge/training.parquet",
            curve=f"{RUN}/step_judge/curve.parquet",
        log:
            f"{LOGS}/step_judge/train_step_judge.log",
        benchmark:
            f"{LOGS}/step_judge/train_step_judge.tsv"
        threads: 2
        resources:
            **TRAINING_GPUS,
        params:
            code=kept_version("stages.train_step_judge"),
            model=MODEL,
            seed=config["seed"],
            clip=config["step_judge"]["clip"],
            tokenizer=config["step_judge"]["tokenizer"],
            settings=step_judge_settings(),
            held_out=flags({**HELD_OUT_CURVE, **EVERY_STEPS}, "held_out"),
            folder=output_folder,
            work=f"{WORK}/step_judge",
        shell:
            "launch {resources.gpu} stages.train_step_judge"
            " --preferences {input.preferences:q} --latents {input.latents:q} {params.model}"
            " --clip {params.clip:q} --tokenizer {params.tokenizer:q} --seed {params.seed}"
            " {params.settings} {params.held_out} --output {params.folder:q}"
            " --training {output.training:q} --curve {output.curve:q} --work {params.work:q}"
            " {resources.execution} --threads {threads} 2>&1 | record {log:q}"
