# Every policy and the base on the same prompts and the same noise; and the guards of the loop.
CANDIDATE_METRIC = config["evaluation"]["candidate_metric"]
CANDIDATE_SCORES = expand(
    f"{RUN}/iter{{i:02d}}/candidate_scores/{CANDIDATE_METRIC}.parquet",
    i=ITERATIONS if CANDIDATE_METRIC else [],
)
PRIMARY_SET = PROMPT_SETS[0]
EVALUATION = [
    f"{RUN}/evaluation/summary.parquet",
    f"{RUN}/evaluation/breakdown.parquet",
    f"{RUN}/evaluation/guards.parquet",
    f"{RUN}/evaluation/reliability.parquet",
    f"{RUN}/evaluation/leakage.parquet",
    *expand(f"{RUN}/evaluation/{{set}}/prompts.parquet", set=PROMPT_SETS),
    *expand(f"{RUN}/evaluation/holdout/{{policy}}.parquet", policy=POLICY_NAMES[1:]),
    *CANDIDATE_SCORES,
    *expand(
        f"{RUN}/evaluation/{{set}}/{{policy}}/scores/{{metric}}.parquet",
        set=PROMPT_SETS,
        policy=POLICY_NAMES,
        metric=METRICS,
    ),
    *expand(
        f"{RUN}/evaluation/{PRIMARY_SET}/{{policy}}/diversity.parquet",
        policy=POLICY_NAMES,
    ),
    *[
        path
        for prompt_set in PROMPT_SETS
        for name in POLICY_NAMES
        for path in evaluation_images(prompt_set, name)
    ],
]
OTHER_SCORES = [
    (
        prompt_set,
        f"{Path(other).parent.name}/{Path(other).name}",
        f"{Path(other).parent}/evaluation/{prompt_set}/{Path(other).name}/scores/{metric}.parquet",
    )
    for other in config["evaluation"]["compare_with"]
    for prompt_set in PROMPT_SETS
    for metric in METRICS
]
TRAINING_PROMPTS = [
    ("seed", f"{RUN}/seed/preferences.parquet"),
    *[(f"iter{i:02d}", f"{RUN}/prompts/iter{i:02d}.parquet") for i in ITERATIONS],
]


rule select_evaluation_prompts:
    input:
        lambda wildcards: prompt_set_files(wildcards.set),
    output:
        f"{RUN}/evaluation/{{set}}/prompts.parquet",
    log:
        f"{LOGS}/evaluation/{{set}}/select_prompts.log",
    localrule: True
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.select_evaluation_prompts"),
        command=stage("select_evaluation_prompts"),
        layout=lambda wildcards: config["evaluation"]["prompt_layouts"].get(
            wildcards.set, "plain"
        ),
    shell:
        "{params.command} --files {input:q} --layout {params.layout}"
        " --output {output:q} 2>&1 | record {log:q}"


rule check_leakage:
    input:
        evaluation=expand(f"{RUN}/evaluation/{{set}}/prompts.parquet", set=PROMPT_SETS),
        training=[path for _, path in TRAINING_PROMPTS],
    output:
        f"{RUN}/evaluation/leakage.parquet",
    log:
        f"{LOGS}/evaluation/check_leakage.log",
    priority: 20
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.check_leakage"),
        command=stage("check_leakage"),
        flags=flags(
            {
                "evaluation": [
                    word
                    for name in PROMPT_SETS
                    for word in (name, f"{RUN}/evaluation/{name}/prompts.parquet")
                ],
                "training": [word for pair in TRAINING_PROMPTS for word in pair],
                "allow": config["evaluation"]["allow_leakage"],
            }
        ),
    shell:
        "{params.command} {params.flags} --output {output:q} 2>&1 | record {log:q}"


rule generate_evaluation:
    input:
        prompts=rules.select_evaluation_prompts.output,
        policy=lambda wildcards: policy(wildcards.policy),
    output:
        f"{RUN}/evaluation/{{set}}/{{policy}}/images/shard-{{shard}}.parquet",
    log:
        f"{LOGS}/evaluation/{{set}}/{{policy}}/generate_evaluation-{{shard}}.log",
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=SMALL_GPU,
        gpu_slot=SMALL_SLOT,
        execution=flags(
            {
                "prompts_per_batch": EXECUTION["evaluation_prompts_per_batch"],
                **SHARING,
            }
        ),
    params:
        code=code_version("stages.generate_evaluation"),
        command=stage("generate_evaluation"),
        model=MODEL,
        policy=lambda wildcards, input: folder(input.get("policy", "")),
        shard=lambda wildcards: int(wildcards.shard),
        flags=flags(
            {
                "seed": config["evaluation"]["seed"],
                "images_per_prompt": config["evaluation"]["images_per_prompt"],
                "num_shards": len(EVALUATION_SHARDS),
            }
        ),
        settings=SAMPLING,
    shell:
        "{params.command} --prompts {input.prompts:q} --policy {params.policy:q}"
        " --shard {params.shard} {params.model} {params.flags} {params.settings}"
        " {resources.execution}"
        " --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule score_metric:
    input:
        lambda wildcards: evaluation_images(wildcards.set, wildcards.policy),
    output:
        f"{RUN}/evaluation/{{set}}/{{policy}}/scores/{{metric}}.parquet",
    log:
        f"{LOGS}/evaluation/{{set}}/{{policy}}/score_metric-{{metric}}.log",
    conda:
        metric_environment
    threads: 1
    resources:
        gpu=metric_gpus,
        gpu_slot=metric_slots,
        execution=METRIC_EXECUTION,
    params:
        code=code_version("stages.score_metric"),
        command=stage("score_metric"),
        options=metric_options,
    shell:
        "{params.command} --images {input:q} --metric {wildcards.metric:q}"
        " {params.options} {resources.execution} --threads {threads}"
        " --output {output:q} 2>&1 | record {log:q}"


rule measure_diversity:
    input:
        lambda wildcards: evaluation_images(wildcards.set, wildcards.policy),
    output:
        f"{RUN}/evaluation/{{set}}/{{policy}}/diversity.parquet",
    log:
        f"{LOGS}/evaluation/{{set}}/{{policy}}/measure_diversity.log",
    conda:
        metric_environment
    threads: 1
    resources:
        gpu=SMALL_GPU * (FEATURES != PERCEPTUAL),
        gpu_slot=SMALL_SLOT * (FEATURES != PERCEPTUAL),
        execution=flags(SHARING),
    params:
        code=code_version("stages.measure_diversity"),
        command=stage("measure_diversity"),
        features=flags({"features": FEATURES}),
        options=options_of(FEATURES),
    shell:
        "{params.command} --images {input:q} {params.features} {params.options}"
        " {resources.execution} --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule score_holdout:
    input:
        preferences=f"{RUN}/seed/holdout.parquet",
        latents=f"{RUN}/seed/holdout_latents.parquet",
        policy=lambda wildcards: policy(wildcards.policy),
    output:
        f"{RUN}/evaluation/holdout/{{policy}}.parquet",
    log:
        f"{LOGS}/evaluation/score_holdout-{{policy}}.log",
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=SMALL_GPU,
        gpu_slot=SMALL_SLOT,
        execution=scoring_execution(),
    params:
        code=code_version("stages.score_holdout"),
        command=stage("score_holdout"),
        model=MODEL,
        policy=lambda wildcards, input: folder(input.get("policy", "")),
        flags=flags(
            {
                "seed": config["evaluation"]["seed"],
                "num_draws": config["evaluation"]["holdout_draws"],
                "reference": "base",
                "dpo_beta": config["update_policy"]["dpo_beta"],
            }
        ),
    shell:
        "{params.command} --preferences {input.preferences:q} --latents {input.latents:q}"
        " --policy {params.policy:q} {params.model} {params.flags}"
        " {resources.execution} --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule summarise_evaluation:
    input:
        scores=expand(
            f"{RUN}/evaluation/{{set}}/{{policy}}/scores/{{metric}}.parquet",
            set=PROMPT_SETS,
            policy=POLICY_NAMES,
            metric=METRICS,
        ),
        prompts=expand(f"{RUN}/evaluation/{{set}}/prompts.parquet", set=PROMPT_SETS),
        others=[path for *_, path in OTHER_SCORES],
    output:
        summary=f"{RUN}/evaluation/summary.parquet",
        breakdown=f"{RUN}/evaluation/breakdown.parquet",
    log:
        f"{LOGS}/evaluation/summarise_evaluation.log",
    localrule: True
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.summarise_evaluation"),
        command=stage("summarise_evaluation"),
        flags=flags(
            {
                "scores": [
                    word
                    for prompt_set in PROMPT_SETS
                    for name in POLICY_NAMES
                    for metric in METRICS
                    for word in (
                        prompt_set,
                        name,
                        f"{RUN}/evaluation/{prompt_set}/{name}/scores/{metric}.parquet",
                    )
                ],
                "prompts": [
                    word
                    for name in PROMPT_SETS
                    for word in (name, f"{RUN}/evaluation/{name}/prompts.parquet")
                ],
                **(
                    {"others": [word for other in OTHER_SCORES for word in other]}
                    if OTHER_SCORES
                    else {}
                ),
            }
        ),
    shell:
        "{params.command} {params.flags} --output {output.summary:q}"
        " --breakdown {output.breakdown:q} 2>&1 | record {log:q}"


rule summarise_guards:
    input:
        holdout=expand(
            f"{RUN}/evaluation/holdout/{{policy}}.parquet", policy=POLICY_NAMES[1:]
        ),
        diversity=expand(
            f"{RUN}/evaluation/{PRIMARY_SET}/{{policy}}/diversity.parquet",
            policy=POLICY_NAMES[1:],
        ),
        pairs=expand(f"{RUN}/iter{{i:02d}}/pairs.parquet", i=ITERATIONS),
        rewards=expand(
            f"{RUN}/iter{{i:02d}}/scores/shard-{{shard}}.parquet",
            i=ITERATIONS,
            shard=SHARDS,
        ),
        candidate_scores=CANDIDATE_SCORES,
        prompts=expand(f"{RUN}/evaluation/{{set}}/prompts.parquet", set=PROMPT_SETS),
    output:
        guards=f"{RUN}/evaluation/guards.parquet",
        reliability=f"{RUN}/evaluation/reliability.parquet",
    log:
        f"{LOGS}/evaluation/summarise_guards.log",
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.summarise_guards"),
        command=stage("summarise_guards"),
        model=MODEL,
        limits=LIMITS,
        rewards=of_iterations(
            f"{RUN}/iter{{i:02d}}/scores/shard-{{shard}}.parquet",
            ITERATIONS,
            "rewards",
        ),
        candidate_scores=of_iterations(
            f"{RUN}/iter{{i:02d}}/candidate_scores/{CANDIDATE_METRIC}.parquet",
            ITERATIONS if CANDIDATE_METRIC else [],
            "candidate_scores",
        ),
    shell:
        "{params.command} --holdout {input.holdout:q} --pairs {input.pairs:q}"
        " --diversity {input.diversity:q}"
        " --prompts {input.prompts:q} {params.model} {params.limits}"
        " {params.rewards} {params.candidate_scores}"
        " --output {output.guards:q} --reliability {output.reliability:q}"
        " --threads {threads} 2>&1 | record {log:q}"
