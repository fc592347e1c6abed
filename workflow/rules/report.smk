# One page that shows what happened.
import json
import mimetypes

# So that a browser saves a table of `snakemake --report` instead of showing its bytes as text.
mimetypes.add_type("application/vnd.apache.parquet", ".parquet")

REPORT = [f"{RUN}/report.html", f"{RUN}/config.json"]
# What the page shows of the config: what decides results and differs from the defaults.
SHOWN_CONFIG = {
    key: value
    for key, value in without_defaults(config).items()
    if key not in ("execution", "export", "notify")
}
PAPER_MODEL = config["evaluation"]["paper_model"]
TRAININGS = [(i, f"{RUN}/iter{i:02d}/training.parquet") for i in TRAINED]
HELD_OUT_CURVES = [(i, f"{RUN}/iter{i:02d}/held_out_curve.parquet") for i in TRAINED]


rule write_report:
    input:
        summary=f"{RUN}/evaluation/summary.parquet",
        breakdown=f"{RUN}/evaluation/breakdown.parquet",
        guards=f"{RUN}/evaluation/guards.parquet",
        reliability=f"{RUN}/evaluation/reliability.parquet",
        leakage=f"{RUN}/evaluation/leakage.parquet",
        images=expand(IMAGES, set=PRIMARY_SET, policy=POLICY_NAMES, shard=0),
        pairs=expand(f"{RUN}/iter{{i:02d}}/pairs.parquet", i=ITERATIONS),
        training=[path for _, path in TRAININGS],
        held_out_curve=[path for _, path in HELD_OUT_CURVES],
        import_summary=f"{RUN}/seed/import.json",
        gates=GATES,
        judges=expand(JUDGES, policy=POLICY_NAMES[1:]) if HAS_JUDGE else [],
    output:
        report=report(REPORT[0], category="Report", caption="../report/report.rst"),
        config=report(REPORT[1], category="Report", caption="../report/config.rst"),
    log:
        f"{LOGS}/report.log",
    localrule: True
    params:
        **stage("write_report"),
        training=numbered("training", TRAININGS),
        held_out_curve=numbered("held_out_curve", HELD_OUT_CURVES),
        gates=flags({"gates": GATES} if GATES else {}),
        judges=lambda wildcards, input: flags(
            {"judges": input.judges} if HAS_JUDGE else {}
        ),
        config=json.dumps(SHOWN_CONFIG, sort_keys=True, indent=2),
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
        " --leakage {input.leakage:q} --guards {input.guards:q}"
        " --images {input.images:q} --pairs {input.pairs:q}"
        " {params.training} {params.held_out_curve} {params.gates} {params.judges}"
        " --import-summary {input.import_summary:q}"
        " {params.flags} {params.limits} --output {output.report:q} 2>&1 | record {log:q}"
