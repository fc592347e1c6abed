# One page that shows what happened.
import json

REPORT = [f"{RUN}/report.html", f"{RUN}/config.json"]
PAPER_MODEL = config["evaluation"]["paper_model"]


rule write_report:
    input:
        summary=f"{RUN}/evaluation/summary.parquet",
        breakdown=f"{RUN}/evaluation/breakdown.parquet",
        guards=f"{RUN}/evaluation/guards.parquet",
        reliability=f"{RUN}/evaluation/reliability.parquet",
        leakage=f"{RUN}/evaluation/leakage.parquet",
        images=[
            path
            for name in POLICY_NAMES
            for path in evaluation_images(PRIMARY_SET, name)[:1]
        ],
        pairs=expand(f"{RUN}/iter{{i:02d}}/pairs.parquet", i=ITERATIONS),
        training=expand(f"{RUN}/iter{{i:02d}}/training.parquet", i=TRAINED),
        held_out_curve=expand(f"{RUN}/iter{{i:02d}}/held_out_curve.parquet", i=TRAINED),
        import_summary=f"{RUN}/seed/import.json",
        gates=GATES,
    output:
        report=REPORT[0],
        config=REPORT[1],
    log:
        f"{LOGS}/report.log",
    localrule: True
    conda:
        "../../envs/sail.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_version("stages.report"),
        command=stage("report"),
        training=of_iterations(
            f"{RUN}/iter{{i:02d}}/training.parquet", TRAINED, "training"
        ),
        held_out_curve=of_iterations(
            f"{RUN}/iter{{i:02d}}/held_out_curve.parquet", TRAINED, "held_out_curve"
        ),
        gates=flags({"gates": GATES}) if GATES else "",
        config=json.dumps(
            {
                key: value
                for key, value in without_defaults(config).items()
                if key not in ("execution", "export")
            },
            sort_keys=True,
            indent=2,
        ),
        flags=flags(
            {
                "run": config["run"],
                "policies": POLICY_NAMES,
                "primary_metric": config["evaluation"]["primary_metric"],
                "primary_set": PRIMARY_SET,
                **({"paper_model": PAPER_MODEL} if PAPER_MODEL else {}),
            }
        ),
        limits=LIMITS,
    shell:
        "printf '%s\\n' {params.config:q} > {output.config:q};"
        " {params.command} --config {output.config:q} --summary {input.summary:q}"
        " --breakdown {input.breakdown:q} --reliability {input.reliability:q}"
        " --leakage {input.leakage:q} --guards {input.guards:q} --images {input.images:q} --pairs {input.pairs:q}"
        " {params.training} {params.held_out_curve} {params.gates}"
        " --import-summary {input.import_summary:q}"
        " {params.flags} {params.limits} --output {output.report:q} 2>&1 | record {log:q}"
