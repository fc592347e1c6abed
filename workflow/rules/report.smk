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
PRIMARY_METRIC = config["evaluation"]["primary_metric"]
PAPER_MODEL = config["evaluation"]["paper_model"]
NAMES = {
    "run": config["run"],
    "policies": POLICY_NAMES,
    "primary_metric": PRIMARY_METRIC,
    "primary_set": PRIMARY_SET,
    **({"paper_model": PAPER_MODEL} if PAPER_MODEL else {}),
}
CALL = {
    "logs": LOGS,
    "record": record_of(Path(), config["run"]),
    "training_gpus": EXECUTION["training_gpus"],
}
TRAININGS = [(i, f"{RUN}/iter{i:02d}/training.parquet") for i in TRAINED]
SHOWN_IMAGES = [
    (name, path)
    for name in POLICY_NAMES
    for path in expand(IMAGES, set=PRIMARY_SET, policy=name, shard=EVALUATION_SHARDS)
]
PRIMARY_SCORES = [
    (name, *expand(METRIC_SCORES, set=PRIMARY_SET, policy=name, metric=PRIMARY_METRIC))
    for name in POLICY_NAMES
]
JUDGEMENTS = [(name, *expand(JUDGED_HOLDOUT, policy=name)) for name in POLICY_NAMES[1:]]
HELD_OUT_CURVES = [(i, f"{RUN}/iter{i:02d}/held_out_curve.parquet") for i in TRAINED]


rule write_report:
    input:
        summary=f"{RUN}/evaluation/summary.parquet",
        breakdown=f"{RUN}/evaluation/breakdown.parquet",
        guards=f"{RUN}/evaluation/guards.parquet",
        reliability=f"{RUN}/evaluation/reliability.parquet",
        leakage=f"{RUN}/evaluation/leakage.parquet",
        images=[path for _, path in SHOWN_IMAGES],
        scores=[path for _, path in PRIMARY_SCORES],
        preferences=f"{RUN}/seed/preferences.parquet",
        holdout=HELD_OUT_FILES[0],
        judged=[path for _, path in JUDGEMENTS],
        pairs=expand(f"{RUN}/iter{{i:02d}}/pairs.parquet", i=ITERATIONS),
        training=[path for _, path in TRAININGS],
        held_out_curve=[path for _, path in HELD_OUT_CURVES],
        import_summary=f"{RUN}/seed/import.json",
        gates=GATES,
        judges=expand(JUDGES, policy=POLICY_NAMES[1:]) if HAS_JUDGE else [],
    output:
        report=shown(REPORT[0], "Report"),
        config=shown(REPORT[1], "Report"),
    log:
        f"{LOGS}/report.log",
    localrule: True
    resources:
        # no input and no param: Snakemake reruns nothing when they change
        execution=flags(CALL),
    params:
        **stage("write_report", limits=LIMITS),
        tables=tables(images=SHOWN_IMAGES, scores=PRIMARY_SCORES, judged=JUDGEMENTS),
        training=numbered("training", TRAININGS),
        held_out_curve=numbered("held_out_curve", HELD_OUT_CURVES),
        gates=flags({"gates": GATES} if GATES else {}),
        judges=where_given("judges"),
        config=json.dumps(SHOWN_CONFIG, sort_keys=True, indent=2),
        flags=flags(NAMES),
    shell:
        "printf '%s\\n' {params.config:q} > {output.config:q};"
        " {params.command} --config {output.config:q} --summary {input.summary:q}"
        " --breakdown {input.breakdown:q} --reliability {input.reliability:q}"
        " --leakage {input.leakage:q} --guards {input.guards:q}"
        " {params.tables} --pairs {input.pairs:q}"
        " --preferences {input.preferences:q} --holdout {input.holdout:q}"
        " {params.training} {params.held_out_curve} {params.gates} {params.judges}"
        " --import-summary {input.import_summary:q}"
        " {params.flags} {params.limits} {resources.execution} --output {output.report:q} 2>&1 | record {log:q}"
