"""The `mome` command line. Exit status: 0 done, 1 failed, 2 wrong usage or config."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from jobs.arguments import local_file
from jobs.bench import app as bench_app
from jobs.caller import Caller
from jobs.console import ProgressDisplay, console, echo, notify, print_result, status
from jobs.jobs_command import Address, Token
from jobs.jobs_command import app as jobs_app
from jobs.shards import app as shards_app
from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.load import load_config
from pipeline.config.redaction import configure_logging, printable, show_exception
from pipeline.config.schema import EVALUATED, SourceType

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Staged vision-language pretraining on a Ray cluster, from image-text tars in object storage.",
)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")
app.add_typer(jobs_app, name="jobs")

Config = Annotated[Path, typer.Argument(parser=local_file, help="A YAML config, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides: stages.vision.steps=100 cluster.workers=4", metavar="KEY=VALUE"),
]
FORMAT_HELP = "Whose names the tensors have: vlmo, vilt, vilt-hf, vit, beit, bert, or safetensors (our own)."
Workers = Annotated[
    int | None, typer.Option(min=1, help="Ranks on the run's Ray cluster that share the work; else this process.")
]
CallersConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        parser=local_file,
        help="A config of your own whose storage, MLflow and Ray addresses are used; those in the run's folder never "
        "are. Default: the environment (AWS_*, MLFLOW_TRACKING_URI, RAY_ADDRESS).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


@app.command()
def demo(
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier demo run and train again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw scenes with captions, train three stages on two workers, evaluate on unseen scenes, write a report."""
    from jobs.demo import demo as run_demo

    print_result(run_demo(overrides or [], fresh), as_json)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="One full step of each stage on every rank, storage, MLflow; no run.")
    ] = False,
    profile: Annotated[str | None, typer.Option(help="Steps A:B, over all stages, to record a trace of.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the stages of CONFIG, or go on where the run stopped. A local Ray is started if no address is given."""
    from jobs.evaluate import evaluate_run
    from jobs.interrupts import Interrupts
    from jobs.preflight import preflight_on_ray
    from jobs.pretrain import pretrain
    from jobs.report import reported
    from pipeline.training.profile import ProfileWindow

    more = [] if profile is None else [ProfileWindow.parse(profile).override]
    settings = load_config(config, [*(overrides or []), *more])
    if preflight:
        with status("checking on every rank"):
            checked = preflight_on_ray(settings)
        print_result(checked, as_json)
        return
    with reported(settings), Interrupts(settings) as interrupts:
        with ProgressDisplay() as show:
            trained = pretrain(settings, show, interrupts)
        if not trained:
            notify(f"{settings.folder}: every stage is finished already; change `name` to begin another run")
        result = evaluate_run(settings) if settings.evaluation.source else {"checkpoint": settings.folder}
    print_result(result, as_json)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    accelerator: Annotated[str, typer.Option(help="h100, h200, a100-80, a100-40, l40s, b200, …")] = "h100",
    network: Annotated[
        str, typer.Option(help="Between nodes: nvlink, ib-400, ib-200, efa-400, ethernet-100, ethernet-25.")
    ] = "ib-400",
    gpus: Annotated[int | None, typer.Option(min=1, help="How many; else cluster.workers.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU for an hour; else cluster.price.")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that arithmetic reaches.")] = 0.35,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Share of a step that hides communication.")] = 0.0,
    goodput: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the hours that is training.")] = 0.97,
    cpu_milliseconds: Annotated[float, typer.Option(min=0, help="Of a core for a photo: `mome bench loader`.")] = 2.7,
    sample_bytes: Annotated[float, typer.Option(min=0, help="Of a sample in storage, where no manifest says.")] = 1.1e5,
    store_bandwidth: Annotated[float, typer.Option(min=1, help="Bytes/s that checkpoints are written at.")] = 1e9,
    text_tokens: Annotated[int | None, typer.Option(min=4, help="Tokens of each text; else the most.")] = None,
    scaling: Annotated[
        Path | None, typer.Option(parser=local_file, help="Also 1 to 1,024 GPUs: a table, and this SVG.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What CONFIG needs: memory by ZeRO stage, time, communication, storage, cost. No cluster and no data are read."""
    from jobs.output import check_output, write_output
    from jobs.plan import Target, as_json_object, plan_run, with_workers
    from jobs.plan_chart import scaling_svg
    from jobs.plan_text import as_text
    from pipeline.data.storage import Storage
    from pipeline.planning.estimate import Assumptions
    from pipeline.planning.hardware import accelerator_named, network_named

    settings = load_config(config, overrides or [])
    if scaling is not None:
        check_output(Storage(), str(scaling), "--scaling")
    assumptions = Assumptions(
        mfu=mfu,
        overlap=overlap,
        cpu_milliseconds=cpu_milliseconds,
        sample_bytes=sample_bytes,
        checkpoint_bandwidth=store_bandwidth,
        price=settings.cluster.price if price is None else price,
        goodput=goodput,
    )
    settings = with_workers(settings, gpus or settings.cluster.workers)
    machines, joined = accelerator_named(accelerator), network_named(network)
    target = Target(machines, joined, settings.cluster.workers, assumptions, text_tokens)
    with status("planning") as update:
        plans = plan_run(settings, target, scaling is not None, update)
    if scaling is not None:
        title = f"{settings.name} on {machines.name}, {joined.name}"
        write_output(Storage(), str(scaling), scaling_svg(plans, target, title).encode(), "--scaling")
    if as_json:
        print_result(as_json_object(plans, target), as_json)
    else:
        echo(as_text(plans, target))


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a run, or of one of its stages (path or URL).")],
    source: Annotated[str | None, typer.Option(help="A source of the run's config, or the URL of shards.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most images to read: a look beside the full evaluation.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(parser=local_file, help="Where the HTML report goes; else report-NAME.html beside the weights."),
    ] = None,
    track: Annotated[
        bool | None,
        typer.Option(
            "--track/--no-track",
            help="Record the result in MLflow. Default: if the folder is no copy, and its run was tracked there.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Name of the evaluation (default: the source's).")
    ] = None,
    workers: Workers = None,
    rerank: Annotated[
        int | None, typer.Option(min=0, help="Best candidates of each query that the fusion encoder reads again.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another evaluated run, whose figures stand beside.")] = None,
    source_type: Annotated[
        str | None, typer.Option(help="What a URL of shards is read as: pairs, labelled, questions or statements.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="Labelled pictures to train a linear classifier on; --source measures it.")
    ] = None,
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """What the checkpoint's stage trained, on held-out data, with a report.

    Pairs: retrieval, re-ranking, matching, masked words. Labelled pictures: classes told by their names, by a head
    that was trained for them, by a linear probe. Questions and statements: accuracy.
    """
    from jobs.evaluate import evaluate_checkpoint

    read_as: SourceType | None = None
    if source_type is not None:
        if source_type not in EVALUATED:
            raise ConfigError(f"--use {source_type}: expected one of {', '.join(EVALUATED)}")
        read_as = source_type  # type: ignore[assignment]
    result = evaluate_checkpoint(
        checkpoint,
        source=source,
        limit=limit,
        report=report,
        track=track,
        against=against,
        workers=workers,
        rerank_best=rerank,
        source_type=read_as,
        probe=probe,
        name=name,
        caller=Caller.named(config),
    )
    if result is not None:  # under torchrun the first rank tells
        print_result(result, as_json)


@app.command()
def embed(
    shards: Annotated[str, typer.Argument(help="A folder of indexed shards (path or URL).")],
    checkpoint: Annotated[str, typer.Option(help="The folder of a run, of a stage or of a checkpoint (path or URL).")],
    out: Annotated[str, typer.Option(help="Where a Parquet file for each shard goes (path or URL).")],
    workers: Workers = None,
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """Write the vectors of every picture and caption of SHARDS. The same command again goes on where it stopped."""
    from jobs.embed import embed as run_embed

    result = run_embed(shards, checkpoint, out, workers, Caller.named(config))
    if result is not None:  # under torchrun the first rank tells
        print_result(result, as_json)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The folder of a run (path or URL).")],
    out: Annotated[
        Path | None, typer.Option(parser=local_file, help="Where the page goes, if not into the run's folder.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a rank for an hour; else cluster.price.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Another run, to stand beside. May be given again.")] = None,
    track: Annotated[
        bool | None,
        typer.Option(
            "--track/--no-track",
            help="Log the page in MLflow. Default: if the folder is no copy, and its run was tracked there.",
        ),
    ] = None,
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """One page for a whole run: its curves, restarts, alerts, data, quarantine, time, cost and last evaluation."""
    from jobs.report import report as write_report

    print_result(write_report(run, out, price, against, track, Caller.named(config)), as_json)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="The folders of two runs or more (paths or URLs).")],
    html: Annotated[Path | None, typer.Option(parser=local_file, help="Also a page, here.")] = None,
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """Runs beside one another: the keys in which their configs differ, and what came out of each."""
    from jobs.compare import as_table, compare_runs

    found = compare_runs(runs, html, Caller.named(config))
    if as_json:
        print_result(found.as_json(), as_json)
    else:
        echo(as_table(found))


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a run, or of one of its stages (path or URL).")],
    image: Annotated[str | None, typer.Option(help="A picture (path or URL).")] = None,
    second_image: Annotated[str | None, typer.Option(help="The second picture of a statement about two.")] = None,
    text: Annotated[str | None, typer.Option(help="A question, a statement, a caption, or a text with [MASK].")] = None,
    top: Annotated[int, typer.Option(help="Most answers, classes or words that are told.", min=1)] = 5,
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint says of pictures and a text: answers, truth, classes, a match, a similarity, masked words."""
    from jobs.predict import predict as run_predict

    print_result(run_predict(checkpoint, image, second_image, text, top, Caller.named(config)), as_json)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = "",
    token: Token = None,
    follow: Annotated[bool, typer.Option(help="Stream the job's output until it ends.")] = True,
    submission_id: Annotated[
        str | None, typer.Option(help="Submitting the same id twice is one job. If not given: the same run is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run CONFIG as a Ray job: `mome train` on the cluster's head, with this checkout's code."""
    from jobs.submit import submit as submit_job

    print_result(submit_job(load_config(config, overrides or []), address, follow, submission_id, token), as_json)


@app.command()
def sync(
    run: Annotated[str, typer.Argument(help="The folder of a run (path or URL).")],
    uri: Annotated[
        str | None, typer.Option(help="The MLflow server (default: MLFLOW_TRACKING_URI, or SQLite beside the run).")
    ] = None,
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """Ship to MLflow what an unreachable server missed. Shipping twice changes nothing."""
    from jobs.sync import sync as ship

    print_result(asdict(ship(run, uri, Caller.named(config))), as_json)


@app.command()
def fingerprint(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="The stage whose data are meant; the last, if not given.")] = None,
    steps: Annotated[str, typer.Option(help="Steps A:B of the stage.")] = "0:10",
    world_size: Annotated[int, typer.Option(help="Ranks that read the batches.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Loader processes of each rank; 0: threads alone.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Loader threads of each process.", min=1)] = 2,
    as_json: AsJson = False,
) -> None:
    """The hash of the data of steps A to B: equal for every world size, number of workers and threads (contract C1)."""
    from jobs.audit import fingerprint_of

    settings = load_config(config, overrides or [])
    print_result(fingerprint_of(settings, stage, steps, world_size, workers, threads), as_json)


@app.command()
def explain(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a run, or of one of its stages (path or URL).")],
    image: Annotated[str, typer.Option(help="A picture (path or URL).")],
    text: Annotated[str, typer.Option(help="What is said about it.")],
    out: Annotated[str, typer.Option(help="Where it is drawn: a name ending in .html or .png.")] = "explain.html",
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """Draw which patches each word aligns to, and what the model guesses for each word with and without the picture."""
    from jobs.explain import explain_checkpoint

    result = explain_checkpoint(checkpoint, image, text, out, Caller.named(config))
    print_result(result if as_json else {key: result[key] for key in ("out", "distance", "notes")}, as_json)


@app.command()
def objectives(as_json: AsJson = False) -> None:
    """List the objectives that each kind of model learns, and the source types it learns them from."""
    from jobs.objectives import as_text
    from jobs.objectives import objectives as find

    table = find()
    if as_json:
        print_result(table, as_json)
    else:
        echo(as_text(table))


@app.command()
def doctor(
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(parser=local_file, help="The run that is meant: its store, sources, servers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What works on this machine, what does not, and how to mend it. Exit status 1 if something needed does not."""
    from jobs import doctor as checks

    if overrides and config is None:
        raise ConfigError("KEY=VALUE changes a config; give one with --config")
    settings = load_config(config, overrides or []) if config else None
    with status("looking") as update:
        findings = checks.examine(settings, lambda name: update(f"looked at: {name}"))
    if as_json:
        print_result(checks.as_json(findings), as_json)
    else:
        echo(checks.as_text(findings))
    if not checks.healthy(findings):
        raise typer.Exit(1)


@app.command("import")
def import_(
    path: Annotated[str, typer.Argument(help="A published checkpoint: a file, or a Hugging Face folder (path or URL)")],
    format: Annotated[str, typer.Option(help=FORMAT_HELP)],
    out: Annotated[str, typer.Option(help="The new folder (path or URL), for `start_from` and `mome evaluate`.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Sizes that the tensors do not tell: heads=16 image_size=384", metavar="KEY=VALUE"),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(parser=local_file, help="A config whose model section the weights are of.")
    ] = None,
    vocabulary: Annotated[str | None, typer.Option(help="The vocabulary of the weights, a token a line.")] = None,
    may_differ: Annotated[
        list[str] | None,
        typer.Option(help="A tensor, or a pattern of names, that may be missing, unexpected or of another shape."),
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="The answers that a VQA head chooses among: a JSON list, or one a line.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn published weights into ones that a stage can start from. Nothing but tensors is loaded."""
    from jobs.convert import import_weights

    allowed = tuple(may_differ or ())
    print_result(import_weights(path, format, out, overrides or [], model, vocabulary, allowed, answers), as_json)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a run, or of one of its stages (path or URL).")],
    format: Annotated[str, typer.Option(help=FORMAT_HELP)],
    out: Annotated[str, typer.Option(help="The file: safetensors if it ends so, else as torch saves.")],
    as_json: AsJson = False,
) -> None:
    """Write a stage's weights under a published format's names, and check that they read back bit for bit."""
    from jobs.convert import export_weights

    print_result(export_weights(checkpoint, format, out), as_json)


@app.command()
def register(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a run, a stage or a checkpoint (path or URL).")],
    name: Annotated[str, typer.Option(help="The registered model, of which this becomes the next version.")],
    alias: Annotated[str | None, typer.Option(help="Points at this version from now on: candidate, champion.")] = None,
    uri: Annotated[
        str | None, typer.Option(help="The MLflow server (default: MLFLOW_TRACKING_URI, or SQLite beside the run).")
    ] = None,
    config: CallersConfig = None,
    as_json: AsJson = False,
) -> None:
    """Put a checkpoint into MLflow's registry: `mlflow.pyfunc.load_model` then gives embeddings and matching scores."""
    from jobs.register import register_checkpoint

    print_result(register_checkpoint(checkpoint, name, alias, uri, Caller.named(config)), as_json)


def main() -> None:
    """The console script: errors a user can cause end in one message, never in a traceback.

    Ctrl-C ends a command with status 130. A run's driver saves first, and after SIGTERM ends with 75 (`interrupts`).
    """
    configure_logging()
    try:
        app()
    except MomeError as error:
        console.print(Text.assemble(("error: ", "red"), printable(str(error))))
        sys.exit(error.exit_status)
    except BaseException as error:
        if (status := _status_of_stopped(error)) is None:
            sys.excepthook = show_exception  # typer has put its own there
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without waiting for what still talks to a store or a cluster


def _status_of_stopped(error: BaseException) -> int | None:
    """The exit status of a run that was told to end; None for any other error. Imports nothing that was not."""
    interrupts = sys.modules.get("jobs.interrupts")
    return error.exit_status if interrupts and isinstance(error, interrupts.Stopped) else None


if __name__ == "__main__":
    main()
