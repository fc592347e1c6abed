# What leaves the run for other tools: each iteration's policy and pairs in their layouts, with cards.
IS_LORA = config["lora"]["rank"] > 0
# Folders of many files are no objects of a bucket: they are exported from a copy on a disk.
POLICY_FORMATS = [
    kind
    for kind in config["export"]["policies"]
    if (IS_LORA or not kind.startswith("lora-")) and not STORAGE
]
PREFERENCE_FORMATS = [] if STORAGE else config["export"]["preferences"]
# (folder, name of the policy)
EXPORTED_POLICIES = [
    (f"{RUN}/export/{name}/{kind}", name)
    for name in POLICY_NAMES[1:]
    for kind in POLICY_FORMATS
]
EXPORT = [
    *[f"{path}/manifest.json" for path, _ in EXPORTED_POLICIES],
    *[f"{path}/README.md" for path, _ in EXPORTED_POLICIES],
    *expand(
        f"{RUN}/export/{{name}}/{{kind}}/manifest.json",
        name=BESIDE,
        kind=POLICY_FORMATS,
    ),
    *expand(
        f"{RUN}/export/iter{{i:02d}}/preferences-{{kind}}/manifest.json",
        i=ITERATIONS,
        kind=PREFERENCE_FORMATS,
    ),
]


# The evaluation is no input: a policy can be used as soon as it is trained. Its card comes last.
rule export_policy:
    input:
        policy=wanted_policy,
    output:
        f"{RUN}/export/{{policy}}/{{kind}}/manifest.json",
    log:
        f"{LOGS}/export/export_policy-{{policy}}-{{kind}}.log",
    wildcard_constraints:
        kind="diffusers|lora-diffusers|lora-kohya|single-file",
    params:
        **stage("export_policy", policy=policy_folder, folder=output_folder),
        model=MODEL,
        name=lambda wildcards: f"{config['run']}-{wildcards.policy}",
        dtype=config["export"]["dtype"],
    shell:
        "{params.command} --policy {params.policy:q} {params.model}"
        " --format {wildcards.kind} --name {params.name:q} --dtype {params.dtype}"
        " --is-ours --output {params.folder:q} 2>&1 | record {log:q}"


if EXPORTED_POLICIES:

    rule write_model_cards:
        input:
            exports=[f"{path}/manifest.json" for path, _ in EXPORTED_POLICIES],
            summary=f"{RUN}/evaluation/summary.parquet",
            guards=f"{RUN}/evaluation/guards.parquet",
            gates=GATES,
        output:
            [f"{path}/README.md" for path, _ in EXPORTED_POLICIES],
        log:
            f"{LOGS}/export/write_model_cards.log",
        localrule: True
        params:
            **stage("write_model_cards", limits=LIMITS),
            exports=tables(exports=EXPORTED_POLICIES),
            gates=flags({"gates": GATES} if GATES else {}),
        shell:
            "{params.command} {params.exports} {params.gates} --summary {input.summary:q}"
            " --guards {input.guards:q} {params.limits} 2>&1 | record {log:q}"


rule export_preferences:
    input:
        f"{RUN}/iter{{iter}}/preferences.parquet",
    output:
        f"{RUN}/export/iter{{iter}}/preferences-{{kind}}/manifest.json",
    log:
        f"{LOGS}/export/export_preferences-{{iter}}-{{kind}}.log",
    wildcard_constraints:
        kind="pickapic|preference|imagefolder|webdataset",
    params:
        **stage("export_preferences", folder=output_folder),
    shell:
        "{params.command} --preferences {input:q} --format {wildcards.kind}"
        " --output {params.folder:q} 2>&1 | record {log:q}"
