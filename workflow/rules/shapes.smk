# The embedded world plays people and prompt collections: only with the config block 'shapes'.
WORLD = []
if "shapes" in config:
    WORLD = [
        f"{RUN}/world/{name}"
        for name in (
            "seed_captions.txt",
            "pool.txt",
            "evaluation.txt",
            "preferences.parquet",
        )
    ]
    SPLIT = {
        key: config["shapes"][key]
        for key in ("evaluation_fold", "num_evaluation_captions", "num_seed_captions")
    }
    LABELS = {
        key: config["shapes"][key]
        for key in ("label_temperature", "pairs_per_caption", "tie_below")
    }

    rule split_captions:
        output:
            seed_captions=WORLD[0],
            pool=WORLD[1],
            evaluation=WORLD[2],
        log:
            f"{LOGS}/world/split_captions.log",
        localrule: True
        params:
            **stage("shapes.split_captions", seed=config["seed"], **SPLIT),
        shell:
            "{params.command} --evaluation-fold {params.evaluation_fold}"
            " --num-evaluation-captions {params.num_evaluation_captions}"
            " --num-seed-captions {params.num_seed_captions} --seed {params.seed}"
            " --seed-captions {output.seed_captions:q} --pool {output.pool:q}"
            " --evaluation {output.evaluation:q} 2>&1 | record {log:q}"

    rule make_preferences:
        input:
            rules.split_captions.output.seed_captions,
        output:
            WORLD[3],
        log:
            f"{LOGS}/world/make_preferences.log",
        priority: 10
        threads: 2
        resources:
            **small_gpu(),
        params:
            **stage("shapes.make_preferences", seed=config["seed"], **LABELS),
            model=MODEL,
            sampling=SAMPLING,
        shell:
            "{params.command} --captions {input:q} {params.model}"
            " --label-temperature {params.label_temperature}"
            " --pairs-per-caption {params.pairs_per_caption}"
            " --seed {params.seed} --tie-below {params.tie_below}"
            " {params.sampling} {resources.execution}"
            " --output {output:q} --threads {threads} 2>&1 | record {log:q}"
