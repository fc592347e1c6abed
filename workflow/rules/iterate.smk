# One round of self-improvement: policy i-1 samples, judges, and is trained into policy i.
RANKER = config["select_pairs"]["ranker"]
CANDIDATES = f"{RUN}/iter{{iter}}/candidates/shard-{{shard}}.parquet"
SCORES = f"{RUN}/iter{{iter}}/scores/shard-{{shard}}.parquet"
PROMPT_POOL = [f"{RUN}/world/pool.txt"] if "shapes" in config else matching(PLAN.pool)
RANKING = (
    [] if RANKER == "self" else f"{RUN}/iter{{iter}}/candidate_scores/{RANKER}.parquet"
)
SIZES = config["prompts"]["per_iteration"]
STRATEGY = config["select_pairs"]["strategy"]
HUMAN = []
if (
    STRATEGY == "spin"
):  # its prompts are the captions of the human pairs, the same each time
    HUMAN = [
        f"{RUN}/seed/preferences.parquet",
        f"{RUN}/seed/preferences_latents.parquet",
    ]
    PROMPT_POOL = HUMAN[:1]
HUMAN_FLAGS = flags({"human": HUMAN[0], "human_latents": HUMAN[1]}) if HUMAN else ""
CANDIDATES_PER_PROMPT = config["sample_candidates"]["candidates_per_prompt"]
CANDIDATE_FILES = flags(
    without_defaults(
        config["sample_candidates"]["files"], "sample_candidates", "files"
    ),
    "files",
)
IS_IMPORTANCE = SCORING["allocation"] == "importance"
ALLOCATION = "--allocation importance" if IS_IMPORTANCE else ""
MIN_PROBABILITY = settings(
    "select_pairs", "", without=["strategy", "ranker", "min_margin_in_standard_errors"]
)

# Shards are targets too: Snakemake would not miss a deleted file that only finished jobs have read.
DATASETS = [
    *expand(f"{RUN}/prompts/iter{{i:02d}}.parquet", i=ITERATIONS),
    *expand(
        f"{RUN}/iter{{i:02d}}/{{table}}.parquet",
        i=ITERATIONS,
        table=["judged", "pairs", "preferences"],
    ),
    *expand(
        f"{RUN}/iter{{i:02d}}/{{table}}/shard-{{shard}}.parquet",
        i=ITERATIONS,
        table=["candidates", "scores"],
        shard=SHARDS,
    ),
    *expand(
        f"{RUN}/iter{{i:02d}}/candidate_scores/{RANKER}.parquet",
        i=[] if RANKER == "self" else ITERATIONS,
    ),
]
POLICIES = expand(
    f"{RUN}/iter{{i:02d}}/{{artifact}}",
    i=ITERATIONS,
    artifact=["policy/manifest.json", "training.parquet", "held_out_curve.parquet"],
)


GATES = []
if ON_COLLAPSE != "warn":
    GATES = expand(f"{RUN}/iter{{i:02d}}/gate.json", i=[0, *ITERATIONS])

    rule check_collapse:
        input:
            unpack(gate_inputs),
        output:
            f"{RUN}/iter{{number}}/gate.json",
        log:
            f"{LOGS}/iter{{number}}/check_collapse.log",
        wildcard_constraints:
            number=r"\d\d",
        priority: 10
        params:
            **stage("check_collapse", tables=gate_flags, limits=LIMITS),
            on_collapse=ON_COLLAPSE,
        shell:
            "{params.command} {params.tables} {params.limits}"
            " --on-collapse {params.on_collapse} --output {output:q} 2>&1 | record {log:q}"

    rule start_iteration:
        input:
            gate=gate_before,
            policies=lambda wildcards: expand(
                f"{RUN}/iter{{i:02d}}/policy/manifest.json",
                i=range(iteration(wildcards)),
            ),
        output:
            f"{RUN}/iter{{iter}}/start/manifest.json",
        log:
            f"{LOGS}/iter{{iter}}/start_iteration.log",
        priority: 10
        params:
            **stage("start_iteration", folder=output_folder),
            policies=lambda wildcards, input: [folder(path) for path in input.policies],
        shell:
            "{params.command} --gate {input.gate:q} --policies {params.policies:q}"
            " --output {params.folder:q} 2>&1 | record {log:q}"


rule select_prompts:
    input:
        pool=PROMPT_POOL,
        exclude=[
            *([] if HUMAN else [f"{RUN}/seed/preferences.parquet"]),
            f"{RUN}/seed/holdout.parquet",
            *expand(f"{RUN}/evaluation/{{set}}/prompts.parquet", set=EXCLUDED_SETS),
        ],
    output:
        f"{RUN}/prompts/iter{{iter}}.parquet",
    log:
        f"{LOGS}/iter{{iter}}/select_prompts.log",
    priority: 10
    localrule: True
    params:
        **stage("select_prompts", seed=config["seed"]),
        skip=lambda wildcards: (0 if HUMAN else sum(SIZES[: iteration(wildcards) - 1])),
        take=lambda wildcards: SIZES[iteration(wildcards) - 1],
    shell:
        "{params.command} --pool {input.pool:q} --exclude {input.exclude:q}"
        " --shuffle-seed {params.seed} --skip {params.skip} --take {params.take}"
        " --output {output:q} 2>&1 | record {log:q}"


rule sample_candidates:
    input:
        prompts=rules.select_prompts.output,
        policy=previous_policy,
    output:
        CANDIDATES,
    log:
        f"{LOGS}/iter{{iter}}/sample_candidates-{{shard}}.log",
    benchmark:
        f"{LOGS}/iter{{iter}}/sample_candidates-{{shard}}.tsv"
    priority: 10
    resources:
        **small_gpu("candidate_prompts_per_batch"),
    params:
        **stage("sample_candidates", policy=policy_folder, iteration=iteration),
        num_shards=len(SHARDS),
        model=MODEL,
        candidates_per_prompt=CANDIDATES_PER_PROMPT,
        seed=config["seed"],
        sampling=CANDIDATE_SAMPLING,
        files=CANDIDATE_FILES,
    shell:
        "{params.command} --prompts {input.prompts:q} --policy {params.policy:q}"
        " --iteration {params.iteration} --num-shards {params.num_shards}"
        " --shard {wildcards.shard} {params.model}"
        " --candidates-per-prompt {params.candidates_per_prompt} --seed {params.seed}"
        " {params.sampling} {params.files} {resources.execution}"
        " --output {output:q} --threads {threads} 2>&1 | record {log:q}"


# A group of jobs, as the cluster profiles make, merges resources of one name: hence no `execution`.
rule score_candidates:
    input:
        candidates=rules.sample_candidates.output,
        policy=previous_policy,
        reference=named_policy(SCORING["reference"]),
        judges=judges_of_draws,
    output:
        SCORES,
    log:
        f"{LOGS}/iter{{iter}}/score_candidates-{{shard}}.log",
    benchmark:
        f"{LOGS}/iter{{iter}}/score_candidates-{{shard}}.tsv"
    priority: 10
    resources:
        **small_gpu("score_rows_per_batch", name="scoring"),
    params:
        **stage("score_candidates", policy=policy_folder, reference=reference_folder),
        iteration=iteration,
        model=JUDGE,
        settings=settings("score_candidates", "", without=["dtype", *WEIGHTING]),
        judges=where_given("judges"),
        seed=config["seed"],
    shell:
        "{params.command} --candidates {input.candidates:q} --policy {params.policy:q}"
        " --reference {params.reference:q} --iteration {params.iteration}"
        " {params.model} {params.settings} {params.judges} --seed {params.seed} {resources.scoring}"
        " --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule select_pairs:
    input:
        candidates=expand(CANDIDATES, shard=SHARDS, allow_missing=True),
        rewards=expand(SCORES, shard=SHARDS, allow_missing=True),
        ranking=RANKING,
        judges=judges_before,
        human=HUMAN,
        policy=previous_policy,
    output:
        pairs=f"{RUN}/iter{{iter}}/pairs.parquet",
        judged=f"{RUN}/iter{{iter}}/judged.parquet",
    log:
        f"{LOGS}/iter{{iter}}/select_pairs.log",
    priority: 10
    params:
        **stage("select_pairs", policy=policy_folder, iteration=iteration),
        ranking=where_given("ranking"),
        judges=where_given("judges"),
        human=HUMAN_FLAGS,
        candidates_per_prompt=CANDIDATES_PER_PROMPT,
        dpo_beta=config["update_policy"]["dpo_beta"],
        min_margin=config["select_pairs"]["min_margin_in_standard_errors"],
        min_probability=MIN_PROBABILITY,
        seed=config["seed"],
        allocation=ALLOCATION,
        strategy=STRATEGY,
    shell:
        "{params.command} --candidates {input.candidates:q} --rewards {input.rewards:q}"
        " --policy {params.policy:q} {params.ranking} {params.judges} {params.human} --iteration {params.iteration}"
        " --candidates-per-prompt {params.candidates_per_prompt} --dpo-beta {params.dpo_beta}"
        " --min-margin-in-standard-errors {params.min_margin} {params.min_probability} --seed {params.seed}"
        " --strategy {params.strategy} {params.allocation} --judged {output.judged:q} --output {output.pairs:q} 2>&1 | record {log:q}"


rule mix_preferences:
    input:
        pairs=rules.select_pairs.output.pairs,
        preferences=f"{RUN}/seed/preferences.parquet",
        latents=f"{RUN}/seed/preferences_latents.parquet",
        decisions=decisions_about,
    output:
        f"{RUN}/iter{{iter}}/preferences.parquet",
    log:
        f"{LOGS}/iter{{iter}}/mix_preferences.log",
    priority: 10
    params:
        **stage("mix_preferences", iteration=iteration, seed=config["seed"]),
        decisions=where_given("decisions"),
        settings=settings("mix_preferences", ""),
    shell:
        "{params.command} --pairs {input.pairs:q} --preferences {input.preferences:q}"
        " --latents {input.latents:q} {params.decisions} --iteration {params.iteration}"
        " --seed {params.seed} {params.settings} --output {output:q} 2>&1 | record {log:q}"


rule update_policy:
    input:
        preferences=rules.mix_preferences.output,
        policy=previous_policy,
        reference=named_policy(config["update_policy"]["reference"]),
        held_out=HELD_OUT_FILES,
    output:
        policy=f"{RUN}/iter{{iter}}/policy/manifest.json",
        weights=stored_weights("iter{iter}", directory),
        training=f"{RUN}/iter{{iter}}/training.parquet",
        held_out_curve=f"{RUN}/iter{{iter}}/held_out_curve.parquet",
    log:
        f"{LOGS}/iter{{iter}}/update_policy.log",
    benchmark:
        f"{LOGS}/iter{{iter}}/update_policy.tsv"
    priority: 10
    threads: 2
    resources:
        **TRAINING_GPUS,
    params:
        **training("update_policy"),
        policy=policy_folder,
        reference=reference_folder,
        iteration=iteration,
        folder=output_folder,
        work=lambda wildcards: f"{WORK}/iter{wildcards.iter}",
        soft_labels="--soft-labels" if config["update_policy"]["soft_labels"] else "",
        listwise="--listwise" if STRATEGY == "listwise" else "",
    shell:
        "launch {resources.gpu} stages.update_policy"
        " --preferences {input.preferences:q} --policy {params.policy:q}"
        " --reference {params.reference:q} --iteration {params.iteration}"
        " {params.model} {params.lora} --seed {params.seed} {params.settings}"
        " {params.held_out} --output {params.folder:q} --training {output.training:q}"
        " --held-out-curve {output.held_out_curve:q} --work {params.work:q} {params.soft_labels} {params.listwise}"
        " {resources.execution} --threads {threads} 2>&1 | record {log:q}"
