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

    rule split_captions:
        output:
            seed_captions=WORLD[0],
            pool=WORLD[1],
            evaluation=WORLD[2],
        log:
            f"{LOGS}/world/split_captions.log",
        localrule: True
        conda:
            "../../envs/sail.yaml"
        threads: 1
        resources:
            gpu=0,
        params:
            code=code_version("stages.shapes.split_captions"),
            command=stage("shapes.split_captions"),
            flags=flags(
                {
                    "seed": config["seed"],
                    "num_seed_captions": config["shapes"]["num_seed_captions"],
                    "evaluation_fold": config["shapes"]["evaluation_fold"],
                }
            ),
        shell:
            "{params.command} {params.flags} --seed-captions {output.seed_captions:q}"
            " --pool {output.pool:q} --evaluation {output.evaluation:q} 2>&1 | record {log:q}"

    rule make_preferences:
        input:
            rules.split_captions.output.seed_captions,
        output:
            WORLD[3],
        log:
            f"{LOGS}/world/make_preferences.log",
        priority: 10
        conda:
            "../../envs/sail.yaml"
        threads: 2
        resources:
            gpu=1,
        params:
            code=code_version("stages.shapes.make_preferences"),
            command=stage("shapes.make_preferences"),
            model=MODEL,
            flags=flags(
                {
                    "seed": config["seed"],
                    **{
                        key: config["shapes"][key]
                        for key in (
                            "pairs_per_caption",
                            "label_temperature",
                            "tie_below",
                        )
                    },
                }
            ),
            settings=SAMPLING,
        shell:
            "{params.command} --captions {input:q}"
            " {params.model} {params.flags} {params.settings}"
            " --output {output:q} --threads {threads} 2>&1 | record {log:q}"
