"""The `mome` command line. Exit status: 0 done, 1 failed, 2 wrong usage or config.

Commands import what they need when they run: `mome --help` loads neither torch, Ray nor MLflow.
"""

import json
import os
import shlex
import shutil
import sys
import time
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from jobs import bench, config_commands, results, shards
from jobs.console import (
    Config,
    FileOption,
    JsonOption,
    Overrides,
    RunDisplay,
    Stopped,
    aligned,
    announce_loading,
    echo,
    line_width,
    notify,
    print_result,
    status,
)
from pipeline.config.errors import ConfigError, MomeError, RunFailed
from pipeline.config.redaction import configure_logging, show_exception

TRAIN, EVALUATE, DATA = "Train", "Evaluate and use a model", "Data"
RESULTS, CONFIGS, CLUSTER = "Results", "Configs and planning", "Machine and cluster"
FORMAT_HELP = (
    "Tensors' names: vlmo, vilt, vilt-hf, vit, beit, beit3, bert, hf-clip, open-clip, or safetensors (mome's own)."
)
OWN_CONFIG_HELP = (
    "Your own config, whose storage, MLflow and Ray addresses are used; those in the run's folder never are (default: "
    "the environment, AWS_*, MLFLOW_TRACKING_URI and RAY_ADDRESS)."
)
TRACK_HELP = "Record the result in MLflow (default: only if the folder is not a copy and its run was tracked there)."
SUBMISSION_ID_HELP = "Id of the job; a known id is not submitted again (default: derived from the config)."
PROMPTS_HELP = "Zero-shot prompt with {} for the class, or an ensemble such as openai_imagenet; may be repeated."
SOURCE_TYPE_HELP = "Type of a URL: pairs, labelled, questions, statements (default: the stage's)."
SIZES_HELP = "Sizes that the tensors do not show: heads=16 image_size=384"
MAY_DIFFER_HELP = "Pattern of tensors that may be missing or differ; repeatable."
NETWORK_HELP = "Network of the nodes: nvlink, ib-400, ib-200, efa-400, ethernet-100, -25."
TENSORBOARD_HELP = "Write TensorBoard's event files of the run to this folder, instead of an upload."
STOP_SECONDS = 60.0  # for a job to stop
LOADING = "loading PyTorch, Ray and MLflow"

Checkpoint = Annotated[str, Argument(help="Folder of a run, of a stage or of a checkpoint (path or URL).")]
Run = Annotated[str, Argument(help="Folder of a run (path or URL).")]
Workers = Annotated[int | None, Option(min=1, help="Number of ranks on the run's Ray cluster (default: this process).")]
OwnConfig = Annotated[Path | None, FileOption("--config", help=OWN_CONFIG_HELP)]
TrackingUri = Annotated[str | None, Option("--uri", help="MLflow server (default: MLFLOW_TRACKING_URI, or SQLite).")]
Track = Annotated[bool | None, Option("--track/--no-track", help=TRACK_HELP)]
Format = Annotated[str, Option(help=FORMAT_HELP)]
StageName = Annotated[str | None, Option("--stage", help="Name of the stage (default: the last one).")]
Address = Annotated[str, Option(help="Cluster's dashboard: http://head:8265.", envvar="RAY_API_SERVER_ADDRESS")]
Token = Annotated[str | None, Option(help="Reference to the cluster's token: env:NAME or file:PATH (default: Ray's).")]
Job = Annotated[str, Argument(help="Id of the job, as printed by `mome submit` and `mome jobs list`.")]

HELP = "Staged vision-language pretraining on a Ray cluster, from image-text tars in object storage."


class Commands(TyperGroup):
    """All commands. An unknown option of one that takes a config is answered with the key of that name."""

    def invoke(self, ctx: Any) -> Any:
        arguments = [*ctx._protected_args, *ctx.args, "", ""]
        try:
            return super().invoke(ctx)
        except Exception as error:
            option, own = getattr(error, "option_name", None), getattr(error, "ctx", None)
            # typer does not export the class of this error
            if type(error).__name__ != "NoSuchOption" or own is None or option is None:
                raise
            from pipeline.config.keys import find_keys

            takes_keys = any(parameter.name == "overrides" for parameter in own.command.params)
            argument = next((text for text in arguments if text.partition("=")[0] == option), "")
            following = arguments[arguments.index(argument) + 1]
            value = argument.partition("=")[2] or ("" if following.startswith("-") else following) or "VALUE"
            keys = [f"{key}={value}" for key in find_keys(option)] if takes_keys else []
            if not keys:
                raise
            raise ConfigError(f"no option {option}; keys of the config have no dashes: {' or '.join(keys)}") from None


NAMES = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, help=HELP, context_settings=NAMES)
runs_app = typer.Typer(no_args_is_help=True, help="List the runs in a folder.")
jobs_app = typer.Typer(no_args_is_help=True, help="List jobs submitted to a cluster, show status and logs, stop them.")


@app.callback(invoke_without_command=True)
def _options(show_version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False) -> None:
    if show_version:
        try:
            echo(f"mome {version('mome')}")
        except PackageNotFoundError:
            echo("mome (from source, not installed)")
        raise typer.Exit


def named_caller(config: Path | None, uri: str | None = None) -> Any:
    """Return the `jobs.configs.Caller` who gave `--config` and `--uri`. Raises ConfigError as `load_config`."""
    from jobs.configs import Caller
    from pipeline.config.load import load_config

    if config is None:
        return Caller(tracking_uri=uri)
    own = load_config(config)
    return Caller(storage=own.storage, tracking_uri=uri or own.tracking.uri, cluster=own.cluster)


@app.command(rich_help_panel=TRAIN)
def demo(
    overrides: Overrides = None,
    fresh: Annotated[bool, Option("--fresh", help="Delete an earlier demo run and train again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate scenes with captions, train three stages on two workers, evaluate on unseen scenes, write a report."""
    from pipeline.config.load import RECIPES, load_config

    config = load_config(RECIPES / "demo.yaml", overrides or [])
    if fresh:
        shutil.rmtree(config.folder, ignore_errors=True)
    notify(f"mome demo: {len(config.stages)} stages on generated scenes, in {config.folder}", style="bold")
    with RunDisplay(config.name) as display:
        display.phase(LOADING)
        from jobs.train import run_and_evaluate
        from pipeline.config.redaction import redact
        from pipeline.tracking.locations import tracking_uri

        result = run_and_evaluate(config, display, "`mome demo --fresh` trains again")
    retrieval, mlm = result["retrieval"], result["mlm"]
    notify(
        f"\nResults on {result['pairs']} held-out scenes, by contrastive scores:\n"
        f"  image-to-text R@1 {retrieval['image_to_text']['r1']:.1%}, "
        f"text-to-image R@1 {retrieval['text_to_image']['r1']:.1%} (chance {retrieval['chance']['r1']:.1%})\n"
        f"  masked words predicted with their image {mlm['accuracy']:.1%}, "
        f"with another image {mlm['accuracy_other_image']:.1%}, from the text alone {mlm['accuracy_text_only']:.1%}\n\n"
        f"Report      {result['report']}\nCheckpoint  {result['checkpoint']}\n"
        f"MLflow      mlflow ui --backend-store-uri {shlex.quote(redact(tracking_uri(config)))}"
    )
    print_result(result, as_json, results.evaluation_text)


@app.command(rich_help_panel=TRAIN)
def train(
    config: Config,
    overrides: Overrides = None,
    preflight: Annotated[bool, Option("--preflight", help="Check a step per stage, ranks, storage, MLflow.")] = False,
    profile: Annotated[str | None, Option(help="Global steps A:B (B excluded) to record a profiler trace of.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would run, and what would stop it.")] = False,
    lr_range: Annotated[str | None, Option(help="Learning rates A:B to try in a scratch run: 1e-6:1e-1.")] = None,
    overfit: Annotated[int | None, Option(help="Train on N samples in a scratch run.", metavar="N")] = None,
    trial_steps: Annotated[int, Option(min=20, help="Number of steps of --lr-range and --overfit.")] = 100,
    stage: Annotated[str | None, Option(help="Stage of --lr-range and --overfit (default: the last one).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the stages of CONFIG, or resume the run. Without an address, a local Ray is started."""
    if dry_run:
        show_dry_run(config, overrides or [], as_json)
        return
    if lr_range is not None or overfit is not None:
        from pipeline.config.load import load_config

        settings, result = load_config(config, overrides or []), dict[str, Any]()
        with redirect_stdout(sys.stderr):  # to which DeepSpeed prints
            from jobs import scratch_runs

            if lr_range is not None:
                result, text = scratch_runs.try_learning_rates(settings, stage, lr_range, trial_steps)
            else:
                result, text = scratch_runs.overfit(settings, stage, overfit or 0, trial_steps)
        print_result(result, as_json, text)
        if not result.get("learns", True):
            raise typer.Exit(1)
        return
    notify(f"mome train {config}")
    from pipeline.config.load import load_config, profile_override

    traced = [] if profile is None else [profile_override(profile)]
    settings = load_config(config, [*(overrides or []), *traced])
    with RunDisplay(settings.name) as display:
        display.phase(LOADING)
        from jobs.distributed import check_rank, run_on_cluster
        from jobs.train import run_and_evaluate

        if preflight:
            display.phase("checking on every rank")
            result = run_on_cluster(check_rank, settings, "preflight")
        else:
            result = run_and_evaluate(settings, display)
    as_text = results.preflight_text if preflight else results.evaluation_text if "source" in result else None
    print_result(result, as_json, as_text)


def show_dry_run(config: Path, overrides: list[str], as_json: bool) -> None:
    """Print the description of a run; status 2 if something would stop it. Nothing is started or written."""
    from jobs.describe_run import as_text, check_services, describe_run
    from pipeline.config.load import load_config

    settings = load_config(config, overrides)
    description = describe_run(settings)
    check_services(description, settings)
    print_result(asdict(description), as_json, as_text(description))
    if description.problems:
        raise typer.Exit(ConfigError.exit_status)


@app.command(rich_help_panel=TRAIN)
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = "",
    token: Token = None,
    follow: Annotated[bool, Option(help="Stream the job's output until it ends.")] = True,
    submission_id: Annotated[str | None, Option(help=SUBMISSION_ID_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Run CONFIG as a Ray job: `mome train` on the cluster's head, with this checkout's code."""
    from jobs.submit import submit as submit_job
    from pipeline.config.load import load_config

    print_result(submit_job(load_config(config, overrides or []), address, follow, submission_id, token), as_json)


@app.command(rich_help_panel=EVALUATE)
def evaluate(
    checkpoint: Checkpoint,
    source: Annotated[str | None, Option(help="Source of the run, or URL (default: evaluation.source).")] = None,
    limit: Annotated[int | None, Option(min=1, help="Maximum number of images, for a partial evaluation.")] = None,
    report: Annotated[
        Path | None, FileOption(help="Report (default: evaluation-NAME.html next to the weights).")
    ] = None,
    track: Track = None,
    name: Annotated[str | None, Option("--as", metavar="NAME", help="Evaluation's name (default: its source).")] = None,
    workers: Workers = None,
    rerank: Annotated[int | None, Option(min=0, help="Candidates to re-rank (default: evaluation.rerank).")] = None,
    against: Annotated[str | None, Option(help="Folder of another evaluated run, to compare in the report.")] = None,
    source_type: Annotated[str | None, Option("--type", help=SOURCE_TYPE_HELP)] = None,
    probe: Annotated[str | None, Option(help="Labelled source to train a linear classifier on.")] = None,
    prompts: Annotated[list[str] | None, Option(help=PROMPTS_HELP)] = None,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate what the checkpoint's stage was trained for on held-out data, and write a report.

    Pairs: retrieval, re-ranking, matching, masked words. Labelled images: zero-shot classification, a trained head, a
    linear probe. Questions and statements: accuracy.
    """
    choices: dict[str, Any] = {"source": source, "source_type": source_type, "probe": probe, "limit": limit}
    choices["prompts"] = prompts
    choices |= {"rerank_best": rerank, "name": name, "report": report, "against": against, "track": track}
    with RunDisplay(checkpoint) if os.environ.get("RANK", "0") == "0" else nullcontext() as display:
        if display is not None:
            display.phase(LOADING)
            choices["progress"] = display.phase
        from jobs.evaluate import evaluate_checkpoint

        result = evaluate_checkpoint(checkpoint, **choices, workers=workers, caller=named_caller(config))
    print_result(result, as_json, results.evaluation_text)


@app.command(rich_help_panel=EVALUATE)
def predict(
    checkpoint: Checkpoint,
    image: Annotated[str | None, Option(help="Path or URL of an image.")] = None,
    second_image: Annotated[str | None, Option(help="Path or URL of the second image of a statement.")] = None,
    text: Annotated[str | None, Option(help="A question, a statement, a caption, or a text with [MASK].")] = None,
    top: Annotated[int, Option(help="Maximum number of answers, classes or words to print.", min=1)] = 5,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Predict answers, truth, classes, a match, a similarity or masked words from images and a text."""
    from jobs.predict import predict as run_predict

    result = run_predict(checkpoint, image, second_image, text, top, named_caller(config))
    print_result(result, as_json, results.prediction_text)


@app.command(rich_help_panel=EVALUATE)
def explain(
    checkpoint: Checkpoint,
    image: Annotated[str, Option(help="Path or URL of an image.")],
    text: Annotated[str, Option(help="Text about the image.")],
    out: Annotated[str, Option(help="Path or URL of the drawing, ending in .html or .png.")] = "explain.html",
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the patches each word aligns to, and the model's guesses for each word with and without the image."""
    from jobs.predict import explain_checkpoint

    print_result(
        explain_checkpoint(checkpoint, image, text, out, named_caller(config)), as_json, results.explanation_text
    )


@app.command(rich_help_panel=EVALUATE)
def embed(
    shards: Annotated[str, Argument(help="Folder of indexed shards (path or URL).")],
    checkpoint: Annotated[str, Option(help="Folder of a run, of a stage or of a checkpoint (path or URL).")],
    out: Annotated[str, Option(help="Folder for one Parquet file per shard (path or URL).")],
    workers: Workers = None,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Write the embeddings of every image and caption of SHARDS. The same command again continues where it stopped."""
    from jobs.predict import embed as run_embed

    print_result(run_embed(shards, checkpoint, out, workers, named_caller(config)), as_json, results.embedding_text)


@app.command("import", rich_help_panel=EVALUATE)
def import_(
    path: Annotated[str, Argument(help="Published checkpoint: a file, or a Hugging Face folder (path or URL).")],
    format: Format,
    out: Annotated[str, Option(help="New folder (path or URL), for `start_from` and `mome evaluate`.")],
    overrides: Annotated[list[str] | None, Argument(help=SIZES_HELP, metavar="KEY=VALUE")] = None,
    model: Annotated[Path | None, FileOption(help="Config whose model section describes the weights.")] = None,
    vocabulary: Annotated[str | None, Option(help="Vocabulary file, one token per line (path or URL).")] = None,
    may_differ: Annotated[list[str] | None, Option(help=MAY_DIFFER_HELP)] = None,
    answers: Annotated[str | None, Option(help="VQA answers: a JSON list, or one per line (path or URL).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert published weights to weights that a stage can start from. Only tensors are loaded, never code."""
    from jobs.convert import import_weights

    allowed = tuple(may_differ or ())
    result = import_weights(path, format, out, overrides or [], model, vocabulary, allowed, answers)
    print_result(result, as_json, results.import_text)


@app.command(rich_help_panel=EVALUATE)
def export(
    checkpoint: Checkpoint,
    format: Format,
    out: Annotated[str, Option(help="File (.safetensors, .pt, .bin), or a folder that transformers reads.")],
    as_json: JsonOption = False,
) -> None:
    """Write a stage's weights under a published format's names, and verify that they read back bit for bit."""
    from jobs.convert import export_weights

    print_result(export_weights(checkpoint, format, out), as_json, results.export_text)


@app.command(rich_help_panel=EVALUATE)
def register(
    checkpoint: Checkpoint,
    name: Annotated[str, Option(help="Name of the registered model; the checkpoint becomes its next version.")],
    alias: Annotated[str | None, Option(help="Alias to point at this version, such as candidate or champion.")] = None,
    uri: TrackingUri = None,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Register a checkpoint in MLflow, so that `mlflow.pyfunc.load_model` gives embeddings and matching scores."""
    from jobs.tracking import PYFUNC_EXAMPLE, register_checkpoint

    done = register_checkpoint(checkpoint, name, alias, named_caller(config, uri))
    version = f"@{alias}" if alias else f"/{done['version']}"
    example = PYFUNC_EXAMPLE.replace("URI", done["tracking_uri"]).replace("MODEL", f"models:/{name}{version}")
    text = f"Registered {done['checkpoint']} as models:/{name}/{done['version']}. To use it:\n\n{example}"
    print_result(done, as_json, text)


app.add_typer(shards.app, name="shards", rich_help_panel=DATA)


@app.command(rich_help_panel=DATA)
def fingerprint(
    config: Config,
    overrides: Overrides = None,
    stage: StageName = None,
    steps: Annotated[str, Option(help="Steps A:B of the stage (B excluded).")] = "0:10",
    world_size: Annotated[int, Option(help="Number of ranks that read the batches.", min=1)] = 1,
    workers: Annotated[int, Option(help="Loader processes per rank; 0 loads in the rank's threads.", min=0)] = 0,
    threads: Annotated[int, Option(help="Number of loader threads per process.", min=1)] = 2,
    as_json: JsonOption = False,
) -> None:
    """Hash the data of steps A to B: equal for every world size and number of workers and threads (contract C1)."""
    from jobs.configs import fingerprint_of
    from pipeline.config.load import load_config

    settings = load_config(config, overrides or [])
    print_result(fingerprint_of(settings, stage, steps, world_size, workers, threads), as_json)


@app.command(rich_help_panel=RESULTS)
def report(
    run: Run,
    out: Annotated[Path | None, FileOption(help="HTML page (default: RUN/run_report.html).")] = None,
    price: Annotated[float | None, Option(min=0, help="Price per rank-hour (default: cluster.price).")] = None,
    against: Annotated[list[str] | None, Option(help="Folder of another run to compare with; may be repeated.")] = None,
    track: Track = None,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Write a page about a whole run: curves, restarts, alerts, data, quarantine, time, cost, last evaluation."""
    from jobs.report import report as write_report

    result = write_report(run, out, price, against, track, named_caller(config))
    print_result(result, as_json, results.report_text)


@app.command(rich_help_panel=RESULTS)
def compare(
    runs: Annotated[list[str], Argument(help="Folders of two or more runs (paths or URLs).")],
    html: Annotated[Path | None, FileOption(help="Also write an HTML page to this path.")] = None,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: the keys in which their configs differ, and their results."""
    from jobs.report import compare_runs

    comparison, table = compare_runs(runs, html, named_caller(config))
    print_result(comparison, as_json, table)


app.add_typer(runs_app, name="runs", rich_help_panel=RESULTS)


@runs_app.command("list")
def runs_list(
    output: Annotated[str, Argument(help="Folder that contains runs: their `output` (path or URL).")] = "runs",
    sizes: Annotated[bool, Option("--sizes", help="Also sum the sizes of each run's files.")] = False,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """List all runs in OUTPUT with status, step and best result, the latest first."""
    from jobs.runs import list_runs, run_rows

    rows = list_runs(output, sizes, named_caller(config))
    print_result({"runs": rows}, as_json, aligned(run_rows(rows), right={3, 4, 7}))


@app.command(rich_help_panel=RESULTS)
def tail(
    run: Run,
    lines: Annotated[int, Option("--lines", "-n", min=1, help="Number of lines to begin with.")] = 10,
    follow: Annotated[bool, Option("--follow", "-f", help="Print new metrics until the run ends.")] = False,
    config: OwnConfig = None,
) -> None:
    """Print the latest metrics of a run from its journal: step, losses, learning rate, speed."""
    from jobs.runs import tail as print_tail

    print_tail(run, lines, follow, named_caller(config))


@app.command(rich_help_panel=RESULTS)
def sync(
    run: Run,
    uri: TrackingUri = None,
    tensorboard: Annotated[Path | None, FileOption(help=TENSORBOARD_HELP)] = None,
    config: OwnConfig = None,
    as_json: JsonOption = False,
) -> None:
    """Upload to MLflow what an unreachable server missed. Uploading twice changes nothing."""
    from jobs import tracking

    if tensorboard is not None:
        result = tracking.write_tensorboard(run, tensorboard, named_caller(config, uri))
        text = (
            f"Wrote {result['points']:,} points; show them with: tensorboard --logdir {shlex.quote(str(tensorboard))}"
        )
    else:
        result = tracking.sync(run, named_caller(config, uri))
        text = f"Uploaded {result['points']:,} points ({result['pending_bytes']:,} bytes) to {result['uri']}"
    print_result(result, as_json, text)


app.add_typer(config_commands.app, name="config", rich_help_panel=CONFIGS)


@app.command(rich_help_panel=CONFIGS)
def plan(
    config: Config,
    overrides: Overrides = None,
    accelerator: Annotated[str, Option(help="GPU: h100, h200, b200, a100-80, a100-40, l40s …")] = "h100",
    network: Annotated[str, Option(help=NETWORK_HELP)] = "ib-400",
    gpus: Annotated[int | None, Option(min=1, help="Number of GPUs (default: cluster.workers).")] = None,
    price: Annotated[float | None, Option(min=0, help="Price per GPU-hour (default: cluster.price).")] = None,
    mfu: Annotated[float, Option(min=0.01, max=1, help="Model FLOPs utilization, as a fraction.")] = 0.35,
    overlap: Annotated[float, Option(min=0, max=1, help="Fraction of the arithmetic that hides communication.")] = 0.0,
    goodput: Annotated[float, Option(min=0.01, max=1, help="Fraction of the wall-clock time spent training.")] = 0.97,
    cpu_milliseconds: Annotated[float, Option(min=0, help="CPU time to prepare an image, in ms of one core.")] = 2.7,
    sample_bytes: Annotated[float, Option(min=0, help="Bytes of a sample, without a local manifest.")] = 1.1e5,
    store_bandwidth: Annotated[float, Option(min=1, help="Write bandwidth of the checkpoint store, in bytes/s.")] = 1e9,
    text_tokens: Annotated[int | None, Option(min=4, help="Tokens per text (default: the stage's maximum).")] = None,
    scaling: Annotated[Path | None, FileOption(help="Also plan 1 to 1,024 GPUs, in this SVG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory by ZeRO stage, time, communication, storage and cost of CONFIG. Needs no cluster and no data."""
    from jobs.plan import plan_command
    from pipeline.config.load import load_config
    from pipeline.planning.estimate import Assumptions

    settings = load_config(config, overrides or [])
    rates = {"mfu": mfu, "overlap": overlap, "goodput": goodput, "checkpoint_bandwidth": store_bandwidth}
    costs = {"cpu_milliseconds": cpu_milliseconds, "sample_bytes": sample_bytes}
    assumptions = Assumptions(**rates, **costs, price=settings.cluster.price if price is None else price)
    result, text = plan_command(settings, accelerator, network, gpus, assumptions, text_tokens, scaling)
    print_result(result, as_json, text)


@app.command(rich_help_panel=CONFIGS)
def objectives(as_json: JsonOption = False) -> None:
    """List the objectives that each kind of model learns, and the source types it learns them from."""
    from jobs.configs import source_types
    from pipeline.config.schema import MODEL_SECTIONS, OBJECTIVES

    table, lines = {}, [["objective", *MODEL_SECTIONS]]
    for objective in OBJECTIVES:
        types = {kind: source_types(kind)[objective] for kind in MODEL_SECTIONS}
        table[objective] = {kind: names for kind, names in types.items() if names}
        lines.append([objective, *(", ".join(names) or "·" for names in types.values())])
    print_result({"objectives": table}, as_json, aligned(lines))


@app.command(rich_help_panel=CLUSTER)
def doctor(
    overrides: Overrides = None,
    config: Annotated[Path | None, FileOption(help="Config of a run to check.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine and the services a run needs, with a remedy for each failure. Exit status 1 on a failure."""
    from jobs.doctor import run_checks, summary
    from pipeline.config.load import load_config

    if overrides and config is None:
        raise ConfigError("KEY=VALUE changes a config; give one with --config")
    results = []
    with status("checking") as update:
        for result in run_checks(load_config(config, overrides or []) if config else None):
            update(f"checked: {result.name}")
            results.append(result)
    is_healthy = all(result.status != "failed" for result in results)
    checks = {"passed": is_healthy, "checks": [vars(result) for result in results]}
    print_result(checks, as_json, summary(results, line_width()))
    if not is_healthy:
        raise typer.Exit(1)


app.add_typer(bench.app, name="bench", rich_help_panel=CLUSTER)
app.add_typer(jobs_app, name="jobs", rich_help_panel=CLUSTER)


@jobs_app.command("list")
def list_jobs(address: Address = "", token: Token = None, as_json: JsonOption = False) -> None:
    """List all jobs of the cluster, newest first."""
    from jobs.submit import describe_job, open_dashboard

    jobs = sorted(open_dashboard(address, token).list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    rows = [describe_job(job) for job in jobs if job.submission_id]
    lines = [["job", "status", "started", "run"]]
    lines += [[row[key] or "-" for key in ("job", "status", "started", "run")] for row in rows]
    table = aligned(lines, width=line_width()) if rows else "no jobs were submitted to this cluster"
    print_result({"jobs": rows}, as_json, table)


@jobs_app.command("status")
def job_status(job: Job, address: Address = "", token: Token = None, as_json: JsonOption = False) -> None:
    """Show the status of a job, and the progress of its run if the run's folder is readable from here."""
    from jobs.submit import open_job

    _, info = open_job(job, address, token)
    if folder := info["checkpoint"]:
        from jobs.distributed import PROGRESS_FILE
        from pipeline.config.schema import StorageConfig
        from pipeline.data.storage import Storage, join

        storage, url = Storage(StorageConfig(retry_timeout_seconds=5.0)), join(folder, PROGRESS_FILE)
        with suppress(MomeError, ValueError):
            if storage.exists(url):
                info["progress"] = json.loads(storage.read(url))
    print_result(info, as_json, results.job_text)


@jobs_app.command()
def logs(
    job: Job,
    address: Address = "",
    token: Token = None,
    follow: Annotated[bool, Option("--follow", help="Stream the output until the job ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the output of a job."""
    from jobs.submit import open_job, stream_logs

    client, _ = open_job(job, address, token)
    if follow:
        print_result({"job": job, "status": stream_logs(client, job)}, as_json)
    elif as_json:
        print_result({"job": job, "logs": client.get_job_logs(job)}, as_json)
    else:
        echo(client.get_job_logs(job), newline=False)


@jobs_app.command()
def stop(job: Job, address: Address = "", token: Token = None, as_json: JsonOption = False) -> None:
    """Stop a job. Its run keeps its last checkpoint and resumes from it when submitted again."""
    from jobs.submit import open_job

    client, _ = open_job(job, address, token)
    client.stop_job(job)
    end = time.monotonic() + STOP_SECONDS
    while not (state := client.get_job_status(job)).is_terminal():
        if time.monotonic() > end:
            raise RunFailed(f"job {job}: still {state.value} {STOP_SECONDS:.0f} s after the request to stop")
        time.sleep(0.5)
    print_result({"job": job, "status": state.value}, as_json)


def main() -> None:
    """Run the command line; errors that a user can cause end in one message, never in a traceback.

    Ctrl-C ends a command with status 130; a run's driver saves first, and ends with status 75 after SIGTERM.
    """
    configure_logging()
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        announce_loading(sys.argv[1])
    try:
        app()
    except MomeError as error:
        notify(f"error: {error}", "red")
        sys.exit(error.exit_status)
    except Stopped as stopped:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped.args[0])  # without waiting for threads that talk to a store or a cluster
    except BaseException:
        sys.excepthook = show_exception  # typer has installed its own
        raise


if __name__ == "__main__":
    main()
