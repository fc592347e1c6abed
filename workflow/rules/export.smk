# What leaves the run for other tools: each iteration's policy and pairs in their layouts, with cards.
IS_LORA = config["lora"]["rank"] > 0
# Folders of many files are no objects of a bucket: they are exported from a copy on a disk.
POLICY_FORMATS = [
    kind
    for kind in config["export"]["policies"]
    if (IS_LORA or not kind.startswith("lora-")) and not STORAGE
]
PREFERENCE_FORMATS = [] if STORAGE else config["export"]["preferences"]
EXPORTED_POLICIES = [
    f"{RUN}/export/{name}/{kind}"
    for name in POLICY_NAMES[1:]
    for kind in POLICY_FORMATS
]
EXPORT = [
    *[f"{path}/manifest.json" for path in EXPORTED_POLICIES],
    *[f"{path}/README.md" for path in EXPORTED_POLICIES],
    *expand(
        f"{RUN}/export/iter{{i:02d}}/preferences-{{kind}}/manifest.json",
        i=ITERATIONS,
        kind=PREFERENCE_FORMATS,
    ),
]


# The evaluation is no input: a policy can be used as soon as it is trained. Its card comes last.
rule export_policy:
    input:
        lambda wildcards: policy(wildcards.policy),
    output:
        f"{RUN}/export/{{policy}}/{{kind}}/manifest.json",
    log:
        f"{LOGS}/export/export_policy-{{policy}}-{{kind}}.log",
    wildcard_constraints:
        kind="diffusers|lora-diffusers|lora-kohya|single-file",
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.export_policy"),
        command=stage("export_policy"),
        policy=lambda wildcards, input: folder(input[0]),
        output=lambda wildcards, output: folder(output[0]),
        model=MODEL,
        kind=lambda wildcards: flags(
            {"format": wildcards.kind, "name": f"{config['run']}-{wildcards.policy}"}
        ),
        flags=flags({"dtype": config["export"]["dtype"]}),
    shell:
        "{params.command} --policy {params.policy:q} {params.model} {params.kind}"
        " {params.flags} --is-ours --output {params.output:q} 2>&1 | record {log:q}"


if EXPORTED_POLICIES:

    rule write_model_cards:
        input:
            exports=[f"{path}/manifest.json" for path in EXPORTED_POLICIES],
            summary=f"{RUN}/evaluation/summary.parquet",
            gates=GATES,
        output:
            [f"{path}/README.md" for path in EXPORTED_POLICIES],
        log:
            f"{LOGS}/export/write_model_cards.log",
        localrule: True
        conda:
            "../../envs/sail.yaml"
        threads: 1
        resources:
            gpu=0,
        params:
            code=code_version("stages.write_model_cards"),
            command=stage("write_model_cards"),
            exports=flags(
                {
                    "exports": [
                        word
                        for path in EXPORTED_POLICIES
                        for word in (path, path.split("/")[-2])
                    ]
                }
            ),
            gates=flags({"gates": GATES}) if GATES else "",
        shell:
            "{params.command} {params.exports} {params.gates} --summary {input.summary:q}"
            " 2>&1 | record {log:q}"


rule export_preferences:
    input:
        f"{RUN}/iter{{iter}}/preferences.parquet",
    output:
        f"{RUN}/export/iter{{iter}}/preferences-{{kind}}/manifest.json",
    log:
        f"{LOGS}/export/export_preferences-{{iter}}-{{kind}}.log",
    wildcard_constraints:
        kind="pickapic|preference|imagefolder|webdataset",
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.export_preferences"),
        command=stage("export_preferences"),
        output=lambda wildcards, output: folder(output[0]),
        kind=lambda wildcards: flags({"format": wildcards.kind}),
    shell:
        "{params.command} --preferences {input:q} {params.kind}"
        " --output {params.output:q} 2>&1 | record {log:q}"
