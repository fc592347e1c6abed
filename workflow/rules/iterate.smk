# One round of self-improvement: policy i-1 samples, judges, and is trained into policy i.
# Shards are targets too: Snakemake would not miss a deleted file that only finished jobs have read.
DATASETS = [
    *expand(f"{RUN}/prompts/iter{{i:02d}}.parquet", i=ITERATIONS),
    *expand(
        f"{RUN}/iter{{i:02d}}/{{table}}.parquet",
        i=ITERATIONS,
        table=["pairs", "preferences"],
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
PROMPT_POOL = (
    [f"{RUN}/world/pool.txt"]
    if "shapes" in config
    else matching(named(config["prompts"].get("pool", [])))
)
CANDIDATES = f"{RUN}/iter{{iter}}/candidates/shard-{{shard}}.parquet"
SCORES = f"{RUN}/iter{{iter}}/scores/shard-{{shard}}.parquet"


GATES = []
if ON_COLLAPSE != "warn":
    GATES = expand(f"{RUN}/iter{{i:02d}}/gate.json", i=[0, *ITERATIONS])

    def gate_inputs(wildcards):
        """What the gate of an iteration looks at: its own tables, and iteration 0's to compare."""
        number = int(wildcards.number)
        own, names = f"{RUN}/iter{number:02d}", ["iter00", f"iter{number:02d}"]
        found = {
            "holdout": expand(f"{RUN}/evaluation/holdout/{{name}}.parquet", name=names),
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
        """The decision on the iteration before. A run that went on after it is not unmade by a new
        threshold; a rollback may be."""
        path = f"{RUN}/{previous(wildcards)}/gate.json"
        return ancient(path) if ON_COLLAPSE == "stop" else path

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
        conda:
            "../../envs/sail.yaml"
        threads: 1
        resources:
            gpu=0,
        params:
            code=code_version("stages.check_collapse"),
            command=stage("check_collapse"),
            tables=gate_flags,
            limits=LIMITS,
            flags=flags({"on_collapse": ON_COLLAPSE}),
        shell:
            "{params.command} {params.tables} {params.limits} {params.flags}"
            " --output {output:q} 2>&1 | record {log:q}"

    rule start_iteration:
        input:
            gate=gate_before,
            policies=lambda wildcards: expand(
                f"{RUN}/iter{{i:02d}}/policy/manifest.json", i=range(int(wildcards.iter))
            ),
        output:
            f"{RUN}/iter{{iter}}/start/manifest.json",
        log:
            f"{LOGS}/iter{{iter}}/start_iteration.log",
        priority: 10
        conda:
            "../../envs/sail.yaml"
        threads: 1
        resources:
            gpu=0,
        params:
            code=code_version("stages.start_iteration"),
            command=stage("start_iteration"),
            policies=lambda wildcards, input: flags(
                {"policies": [folder(path) for path in input.policies]}
            ),
            output=lambda wildcards, output: folder(output[0]),
        shell:
            "{params.command} --gate {input.gate:q} {params.policies}"
            " --output {params.output:q} 2>&1 | record {log:q}"


rule select_prompts:
    input:
        pool=PROMPT_POOL,
        exclude=[
            f"{RUN}/seed/preferences.parquet",
            f"{RUN}/seed/holdout.parquet",
            *expand(f"{RUN}/evaluation/{{set}}/prompts.parquet", set=PROMPT_SETS),
        ],
    output:
        f"{RUN}/prompts/iter{{iter}}.parquet",
    log:
        f"{LOGS}/iter{{iter}}/select_prompts.log",
    priority: 10
    localrule: True
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.select_prompts"),
        command=stage("select_prompts"),
        flags=prompt_position,
    shell:
        "{params.command} --pool {input.pool:q} --exclude {input.exclude:q}"
        " {params.flags} --output {output:q} 2>&1 | record {log:q}"


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
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=1,
        execution=flags({"prompts_per_batch": EXECUTION["candidate_prompts_per_batch"]}),
    params:
        code=code_version("stages.sample_candidates"),
        command=stage("sample_candidates"),
        model=MODEL,
        policy=lambda wildcards, input: folder(input.policy),
        position=lambda wildcards: flags(
            {
                "iteration": int(wildcards.iter),
                "shard": int(wildcards.shard),
                "num_shards": len(SHARDS),
            }
        ),
        flags=flags(
            {
                "seed": config["seed"],
                "candidates_per_prompt": config["sample_candidates"][
                    "candidates_per_prompt"
                ],
            }
        ),
        settings=SAMPLING,
    shell:
        "{params.command} --prompts {input.prompts:q} --policy {params.policy:q}"
        " {params.position} {params.model} {params.flags} {params.settings} {resources.execution}"
        " --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule score_candidates:
    input:
        candidates=rules.sample_candidates.output,
        policy=previous_policy,
        reference=named_policy(config["score_candidates"]["reference"]),
    output:
        SCORES,
    log:
        f"{LOGS}/iter{{iter}}/score_candidates-{{shard}}.log",
    benchmark:
        f"{LOGS}/iter{{iter}}/score_candidates-{{shard}}.tsv"
    priority: 10
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=1,
        scoring=scoring_execution(),
    params:
        code=code_version("stages.score_candidates"),
        command=stage("score_candidates"),
        model=MODEL,
        policy=lambda wildcards, input: folder(input.policy),
        reference=lambda wildcards, input: folder(input.get("reference", "")),
        iteration=lambda wildcards: int(wildcards.iter),
        flags=flags(
            {
                "seed": config["seed"],
                "num_draws": config["score_candidates"]["num_draws"],
                "reencode": config["score_candidates"]["reencode"],
            }
        ),
    shell:
        "{params.command} --candidates {input.candidates:q} --policy {params.policy:q}"
        " --reference {params.reference:q} --iteration {params.iteration}"
        " {params.model} {params.flags}"
        " {resources.scoring} --output {output:q} --threads {threads} 2>&1 | record {log:q}"


rule score_candidates_by_metric:
    input:
        shards(CANDIDATES, SHARDS),
    output:
        f"{RUN}/iter{{iter}}/candidate_scores/{{metric}}.parquet",
    log:
        f"{LOGS}/iter{{iter}}/score_metric-{{metric}}.log",
    conda:
        "../../envs/metrics.yaml"
    threads: 1
    resources:
        gpu=metric_gpus,
        execution=METRIC_EXECUTION,
    params:
        code=code_version("stages.score_metric"),
        command=stage("score_metric"),
        options=metric_options,
    shell:
        "{params.command} --images {input:q} --metric {wildcards.metric:q}"
        " {params.options} {resources.execution} --threads {threads}"
        " --output {output:q} 2>&1 | record {log:q}"


rule select_pairs:
    input:
        candidates=shards(CANDIDATES, SHARDS),
        rewards=shards(SCORES, SHARDS),
        ranking=ranking,
        policy=previous_policy,
    output:
        f"{RUN}/iter{{iter}}/pairs.parquet",
    log:
        f"{LOGS}/iter{{iter}}/select_pairs.log",
    priority: 10
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.select_pairs"),
        command=stage("select_pairs"),
        policy=lambda wildcards, input: folder(input.policy),
        ranking=lambda wildcards, input: (
            flags({"ranking": [input.ranking]}) if RANKER != "self" else ""
        ),
        iteration=lambda wildcards: int(wildcards.iter),
        flags=flags(
            {
                "seed": config["seed"],
                "strategy": config["select_pairs"]["strategy"],
                "min_margin_in_standard_errors": config["select_pairs"][
                    "min_margin_in_standard_errors"
                ],
                "candidates_per_prompt": config["sample_candidates"][
                    "candidates_per_prompt"
                ],
                "dpo_beta": config["update_policy"]["dpo_beta"],
            }
        ),
    shell:
        "{params.command} --candidates {input.candidates:q} --rewards {input.rewards:q}"
        " --policy {params.policy:q} {params.ranking} --iteration {params.iteration}"
        " {params.flags} --output {output:q} 2>&1 | record {log:q}"


rule mix_preferences:
    input:
        pairs=rules.select_pairs.output,
        preferences=f"{RUN}/seed/preferences.parquet",
        latents=f"{RUN}/seed/preferences_latents.parquet",
    output:
        f"{RUN}/iter{{iter}}/preferences.parquet",
    log:
        f"{LOGS}/iter{{iter}}/mix_preferences.log",
    priority: 10
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.mix_preferences"),
        command=stage("mix_preferences"),
        iteration=lambda wildcards: int(wildcards.iter),
        flags=flags(
            {
                "seed": config["seed"],
                "seed_fraction": config["mix_preferences"]["seed_fraction"],
            }
        ),
    shell:
        "{params.command} --pairs {input.pairs:q} --preferences {input.preferences:q}"
        " --latents {input.latents:q} --iteration {params.iteration} {params.flags}"
        " --output {output:q} 2>&1 | record {log:q}"


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
    conda:
        "../../envs/sail.yaml"
    threads: 2
    resources:
        gpu=EXECUTION["training_gpus"],
        execution=training_execution(),
    params:
        code=code_version("stages.update_policy"),
        policy=lambda wildcards, input: folder(input.policy),
        reference=lambda wildcards, input: folder(input.get("reference", "")),
        folder=lambda wildcards, output: folder(output.policy),
        work=lambda wildcards: f"{WORK}/iter{wildcards.iter}",
        iteration=lambda wildcards: int(wildcards.iter),
        model=MODEL,
        flags=flags({"seed": config["seed"]}),
        held_out=HELD_OUT,
        lora=LORA,
        settings=settings("update_policy"),
    shell:
        "launch {resources.gpu} stages.update_policy"
        " --preferences {input.preferences:q} --policy {params.policy:q}"
        " --reference {params.reference:q} --iteration {params.iteration}"
        " {params.model} {params.lora} {params.flags} {params.settings} {params.held_out}"
        " --output {params.folder:q} --training {output.training:q}"
        " --held-out-curve {output.held_out_curve:q} --work {params.work:q}"
        " {resources.execution} --threads {threads} 2>&1 | record {log:q}"
