# Every policy and the base on the same prompts and the same noise; and the guards of the loop.
METRICS = config["evaluation"]["metrics"]
CANDIDATE_METRIC = config["evaluation"]["candidate_metric"]
CANDIDATE_SCORES = expand(
    f"{RUN}/iter{{i:02d}}/candidate_scores/{CANDIDATE_METRIC}.parquet",
    i=ITERATIONS if CANDIDATE_METRIC else [],
)
PRIMARY_SET = PROMPT_SETS[0]
PROMPTS = f"{RUN}/evaluation/{{set}}/prompts.parquet"
IMAGES = f"{RUN}/evaluation/{{set}}/{{policy}}/images/shard-{{shard}}.parquet"
METRIC_SCORES = f"{RUN}/evaluation/{{set}}/{{policy}}/scores/{{metric}}.parquet"
HOLDOUT = f"{RUN}/evaluation/holdout/{{policy}}.parquet"
DIVERSITY = f"{RUN}/evaluation/{{set}}/{{policy}}/diversity.parquet"
# An online policy is measured as the others are, and stands among what they are compared with.
BESIDE = ["online"] if PLAN.is_online else []
EVALUATION = [
    f"{RUN}/evaluation/summary.parquet",
    f"{RUN}/evaluation/breakdown.parquet",
    f"{RUN}/evaluation/guards.parquet",
    f"{RUN}/evaluation/reliability.parquet",
    f"{RUN}/evaluation/leakage.parquet",
    *expand(PROMPTS, set=PROMPT_SETS),
    *expand(HOLDOUT, policy=POLICY_NAMES[1:]),
    *(expand([JUDGES, JUDGED_HOLDOUT], policy=POLICY_NAMES[1:]) if HAS_JUDGE else []),
    *CANDIDATE_SCORES,
    *expand(
        METRIC_SCORES,
        set=PROMPT_SETS,
        policy=[*POLICY_NAMES, *BESIDE],
        metric=METRICS,
    ),
    *expand(DIVERSITY, set=PRIMARY_SET, policy=[*POLICY_NAMES, *BESIDE]),
    *expand(
        IMAGES,
        set=PROMPT_SETS,
        policy=[*POLICY_NAMES, *BESIDE],
        shard=EVALUATION_SHARDS,
    ),
]
LAYOUTS = config["evaluation"]["prompt_layouts"]
# What a stage is told of tables: the words that name each, and its path.
SET_PROMPTS = [(name, *expand(PROMPTS, set=name)) for name in PROMPT_SETS]
TRAINING_PROMPTS = [
    ("seed", f"{RUN}/seed/preferences.parquet"),
    *[(f"iter{i:02d}", f"{RUN}/prompts/iter{i:02d}.parquet") for i in ITERATIONS],
    *[(name, ONLINE_PROMPTS) for name in BESIDE],
]
REWARDS = [(i, f"{RUN}/iter{i:02d}/judged.parquet") for i in ITERATIONS]
OWN_SCORES = [
    (
        prompt_set,
        name,
        *expand(METRIC_SCORES, set=prompt_set, policy=name, metric=metric),
    )
    for prompt_set in PROMPT_SETS
    for name in POLICY_NAMES
    for metric in METRICS
]
OTHER_SCORES = [
    *PLAN.scores_of_others,
    *[
        (
            prompt_set,
            f"{config['run']}/{name}",
            *expand(METRIC_SCORES, set=prompt_set, policy=name, metric=metric),
        )
        for prompt_set in PROMPT_SETS
        for name in BESIDE
        for metric in METRICS
    ],
]


rule select_evaluation_prompts:
    input:
        lambda wildcards: prompt_set_files(wildcards.set),
    output:
        PROMPTS,
    log:
        f"{LOGS}/evaluation/{{set}}/select_prompts.log",
    localrule: True
    params:
        **stage("select_evaluation_prompts"),
        layout=lambda wildcards: LAYOUTS.get(wildcards.set, "plain"),
    shell:
        "{params.command} --files {input:q} --layout {params.layout}"
        " --output {output:q} 2>&1 | record {log:q}"


rule check_leakage:
    input:
        evaluation=[path for _, path in SET_PROMPTS],
        training=[path for _, path in TRAINING_PROMPTS],
    output:
        shown(f"{RUN}/evaluation/leakage.parquet", "Evaluation"),
    log:
        f"{LOGS}/evaluation/check_leakage.log",
    priority: 20
    params:
        **stage("check_leakage", allow=config["evaluation"]["allow_leakage"]),
        tables=tables(evaluation=SET_PROMPTS, training=TRAINING_PROMPTS),
    shell:
        "{params.command} --allow {params.allow} {params.tables}"
        " --output {output:q} 2>&1 | record {log:q}"


rule generate_evaluation:
    input:
        prompts=rules.select_evaluation_prompts.output,
        policy=wanted_policy,
    output:
        IMAGES,
    log:
        f"{LOGS}/evaluation/{{set}}/{{policy}}/generate_evaluation-{{shard}}.log",
    resources:
        **small_gpu("evaluation_prompts_per_batch"),
    params:
        **stage("generate_evaluation", policy=policy_folder, model=MODEL),
        images_per_prompt=config["evaluation"]["images_per_prompt"],
        num_shards=len(EVALUATION_SHARDS),
        seed=config["evaluation"]["seed"],
        sampling=SAMPLING,
    shell:
        "{params.command} --prompts {input.prompts:q} --policy {params.policy:q}"
        " --shard {wildcards.shard} {params.model}"
        " --images-per-prompt {params.images_per_prompt} --num-shards {params.num_shards}"
        " --seed {params.seed} {params.sampling} {resources.execution}"
        " --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule score_metric:
    input:
        expand(IMAGES, shard=EVALUATION_SHARDS, allow_missing=True),
    output:
        METRIC_SCORES,
    log:
        f"{LOGS}/evaluation/{{set}}/{{policy}}/score_metric-{{metric}}.log",
    conda:
        metric_environment
    resources:
        **METRIC_GPU,
    params:
        **stage("score_metric"),
        options=lambda wildcards: options_of(wildcards.metric),
    shell:
        "{params.command} --images {input:q} --metric {wildcards.metric:q}"
        " {params.options} {resources.execution} --threads {threads}"
        " --output {output:q} 2>&1 | record {log:q}"


use rule score_metric as score_candidates_by_metric with:
    input:
        expand(CANDIDATES, shard=SHARDS, allow_missing=True),
    output:
        f"{RUN}/iter{{iter}}/candidate_scores/{{metric}}.parquet",
    log:
        f"{LOGS}/iter{{iter}}/score_metric-{{metric}}.log",


rule measure_diversity:
    input:
        images=expand(IMAGES, shard=EVALUATION_SHARDS, allow_missing=True),
        base=base_images,
    output:
        DIVERSITY,
    log:
        f"{LOGS}/evaluation/{{set}}/{{policy}}/measure_diversity.log",
    conda:
        metric_environment
    resources:
        **FEATURES_GPU,
    params:
        **stage("measure_diversity", features=FEATURES, options=options_of(FEATURES)),
    shell:
        "{params.command} --images {input.images:q} --base {input.base:q}"
        " --features {params.features:q} {params.options}"
        " {resources.execution} --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule score_holdout:
    input:
        preferences=HELD_OUT_FILES[0],
        latents=HELD_OUT_FILES[1],
        policy=wanted_policy,
    output:
        HOLDOUT,
    log:
        f"{LOGS}/evaluation/score_holdout-{{policy}}.log",
    resources:
        **small_gpu("score_rows_per_batch"),
    params:
        **stage("score_holdout", policy=policy_folder, model=JUDGE),
        rewards_by=flags({"rewards_by": SCORING["rewards_by"], **DRAWING}),
        dpo_beta=config["update_policy"]["dpo_beta"],
        num_draws=config["evaluation"]["holdout_draws"],
        skip_pairs=PLAN.pairs_that_stop,
        seed=config["evaluation"]["seed"],
    shell:
        "{params.command} --preferences {input.preferences:q} --latents {input.latents:q}"
        " --skip-pairs {params.skip_pairs} --policy {params.policy:q} {params.model} {params.rewards_by}"
        " --dpo-beta {params.dpo_beta}"
        " --num-draws {params.num_draws} --reference base --seed {params.seed}"
        " {resources.execution} --output {output:q} --threads {threads} 2>&1 | record {log:q}"


if HAS_JUDGE:
    DRAW_LAW = {key: law for key, law in DRAWING.items() if key == "draw_law"}

    rule calibrate_judge:
        input:
            holdout=HOLDOUT,
            policy=wanted_policy,
        output:
            judge=JUDGES,
            judged=JUDGED_HOLDOUT,
        log:
            f"{LOGS}/evaluation/calibrate_judge-{{policy}}.log",
        priority: 10
        params:
            **stage("calibrate_judge", policy=policy_folder, model=MODEL),
            weights=flags({**WEIGHTING, **DRAW_LAW}),
            seed=config["evaluation"]["seed"],
        shell:
            "{params.command} --holdout {input.holdout:q} --policy {params.policy:q} {params.model}"
            " {params.weights} --seed {params.seed} --judged {output.judged:q}"
            " --output {output.judge:q} 2>&1 | record {log:q}"


rule summarise_evaluation:
    input:
        scores=[path for *_, path in OWN_SCORES],
        prompts=[path for _, path in SET_PROMPTS],
        others=[path for *_, path in OTHER_SCORES],
    output:
        summary=shown(f"{RUN}/evaluation/summary.parquet", "Evaluation"),
        breakdown=shown(f"{RUN}/evaluation/breakdown.parquet", "Evaluation"),
    log:
        f"{LOGS}/evaluation/summarise_evaluation.log",
    localrule: True
    params:
        **stage("summarise_evaluation"),
        tables=tables(scores=OWN_SCORES, prompts=SET_PROMPTS, others=OTHER_SCORES),
    shell:
        "{params.command} {params.tables} --output {output.summary:q}"
        " --breakdown {output.breakdown:q} 2>&1 | record {log:q}"


rule summarise_guards:
    input:
        holdout=expand(JUDGED_HOLDOUT, policy=POLICY_NAMES[1:]),
        diversity=expand(DIVERSITY, set=PRIMARY_SET, policy=POLICY_NAMES[1:]),
        pairs=expand(f"{RUN}/iter{{i:02d}}/pairs.parquet", i=ITERATIONS),
        rewards=[path for _, path in REWARDS],
        candidate_scores=CANDIDATE_SCORES,
        prompts=[path for _, path in SET_PROMPTS],
    output:
        guards=shown(f"{RUN}/evaluation/guards.parquet", "Evaluation"),
        reliability=shown(f"{RUN}/evaluation/reliability.parquet", "Evaluation"),
    log:
        f"{LOGS}/evaluation/summarise_guards.log",
    params:
        **stage("summarise_guards", model=MODEL, limits=LIMITS),
        rewards=numbered("rewards", REWARDS),
        candidate_scores=numbered("candidate_scores", zip(ITERATIONS, CANDIDATE_SCORES)),
    shell:
        "{params.command} --holdout {input.holdout:q} --pairs {input.pairs:q}"
        " --diversity {input.diversity:q}"
        " --prompts {input.prompts:q} {params.model} {params.limits}"
        " {params.rewards} {params.candidate_scores}"
        " --output {output.guards:q} --reliability {output.reliability:q}"
        " --threads {threads} 2>&1 | record {log:q}"
