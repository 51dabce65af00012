"""The training loop: every stage of a run in turn, on one rank. The same under Ray Train and under `torchrun`."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from pipeline.config.background import in_background
from pipeline.config.errors import CheckpointError, Preempted, RunFailed, Superseded
from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import Choices, choices_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory
from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage, join
from pipeline.objectives import batch_groups
from pipeline.objectives.mim import load_image_tokenizer
from pipeline.tracking.journal import Status
from pipeline.tracking.tracker import SavedWeights, Tracker
from pipeline.training import health as guards
from pipeline.training.callbacks import Callback, Callbacks, Progress, Report, StageResult, StepEvent
from pipeline.training.checkpoint.committed import is_committed, read_manifest
from pipeline.training.checkpoint.store import Checkpointer, CheckpointStore, checkpoint_metadata
from pipeline.training.checkpoint.weights import VOCABULARY, save_weights, stage_url
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.engine import learning_rate
from pipeline.training.metrics import Alerts, EvaluationCallback, MetricsCollector
from pipeline.training.ownership import Ownership
from pipeline.training.prepare import load_coverage, prepare
from pipeline.training.profile import Profiler
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep
from pipeline.training.supervisor import RankSupervisor
from pipeline.training.workload import with_micro_batch

log = logging.getLogger(__name__)

CLOSE_SECONDS = 45.0  # with the other waits at the end, less than Kubernetes' grace period of 120 s


@dataclass(frozen=True)
class RunContext:
    """Objects that all stages of a run share on one rank."""

    config: RunConfig
    storage: Storage
    tokenizer: Tokenizer
    collectives: Collectives
    tracker: Tracker
    report: Report
    loader_backend: BackendFactory | None
    supervisor: RankSupervisor
    ownership: Ownership
    coverage: dict[str, float] | None = None  # of the vocabulary: fraction of [UNK] by folder of shards; on rank 0

    def report_phase(self, phase: str) -> None:
        """Report what rank 0 does while it trains no steps."""
        if self.collectives.rank == 0:
            self.report(Progress(phase=phase))


@dataclass
class StageState:
    """A stage's state on one rank, and the position it resumed from."""

    stage: Stage
    context: RunContext
    engine: DeepSpeedEngine
    step: TrainingStep
    loader: Loader
    checkpoints: CheckpointStore
    spikes: guards.SpikeGuard
    callbacks: Callbacks
    shapes: dict[str, list[int]]  # of the parameters by name, before ZeRO partitions them
    choices: Mapping[str, Choices]  # label lists of the heads, by file name
    resumed_from: str = ""  # URL of the checkpoint
    rollback: tuple[str, str] | None = None  # tag and description of the rollback that led here
    metrics: dict[str, float] = field(default_factory=dict)  # latest, for `checkpoint.keep_best`
    measured_from: tuple[float, int, float] = (0.0, 0, 0.0)  # time, steps, data wait at the last metrics or evaluation
    data_counts: dict[str, float] = field(default_factory=dict)  # of the checkpoint the stage resumed from


def train(
    config: RunConfig,
    report: Report,
    loader_backend: BackendFactory | None = None,
    preempted: Callable[[], bool] | None = None,
    claim: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Run every unfinished stage from its latest complete checkpoint. Call it once on each rank.

    `preempted` is polled on every rank and says whether its machine is about to be taken away; in a process's main
    thread SIGTERM and SIGUSR1 mean the same. A launcher that has prepared the run and taken its ownership gives its
    `claim`; otherwise rank 0 does both. `callbacks` follow the standard ones. Raises Preempted once the run is saved,
    Superseded (on rank 0) if a later start owns it, and another MomeError for failures that a restart would repeat; any
    other error may be retried. A hung rank ends the process (`Watchdog`).
    """
    began = time.monotonic()
    torch.set_num_threads(config.engine.threads)
    collectives, storage, start = Collectives(), Storage(config.storage), None
    is_first = collectives.rank == 0
    supervisor = RankSupervisor(config, storage, collectives, preempted, elapsed=time.monotonic() - began)
    if is_first:
        if claim is None:
            prepare(config, storage)
        taken = Ownership.take(storage, config.folder, claim)
        claim, start = taken.claim, taken.start
    ownership = Ownership(storage, config.folder, *collectives.broadcast((claim, start)))
    tokenizer = Tokenizer.load(storage, join(config.folder, VOCABULARY), config.tokenizer.lowercase)
    tracker, coverage = Tracker(), None
    if is_first:
        report(Progress(phase="opening the MLflow run"))
        tags = {"world_size": str(collectives.world_size), "zero_stage": str(config.engine.zero_stage)}
        tracker, coverage = Tracker.open(config, storage, tags), load_coverage(storage, config.folder, tokenizer)
    context = RunContext(
        config, storage, tokenizer, collectives, tracker, report, loader_backend, supervisor, ownership, coverage
    )
    try:
        with supervisor.running():
            for index in range(len(config.stages)):
                if not is_committed(storage, stage_url(config, index)):
                    _train_with_rollbacks(context, index, callbacks)
                    collectives.barrier()
    except Superseded:
        tracker.close(timeout=None)  # the new owner decides how the run ends
        raise
    except BaseException as error:
        _close_tracker(tracker, "KILLED" if isinstance(error, Preempted) else "FAILED")
        raise
    context.report_phase("completing the MLflow run")
    _close_tracker(tracker, "FINISHED")


def train_stage(
    stage: Stage, context: RunContext, callbacks: Callbacks, rolled_back: guards.Spike | None = None
) -> StageResult:
    """Train one stage from its latest complete checkpoint, or its starting weights, until its weights are exported.

    `rolled_back`: the loss spike that ended the previous attempt, whose data is now skipped. Returns early after a
    preemption (state saved) and at a loss spike (before its update). Raises RunFailed if a restart would fail too.
    """
    collectives, supervisor = context.collectives, context.supervisor
    with build_stage_state(stage, context, callbacks) as state:
        start = resume(state, rolled_back)
        callbacks.on_stage_start(start)
        batches = state.loader.batches(state.spikes.batch_of(start))
        context.report_phase(f"reading the first batch of stage {stage.name}")
        result = StageResult(stage.steps)
        for step in range(start, stage.steps):
            supervisor.enter("data_wait", stage.first_step + step)
            callbacks.before_batch(step)
            batch = next(batches)
            supervisor.enter("training", stage.first_step + step)
            if step == start:
                context.report_phase(f"training {stage.name}")
            callbacks.before_step(step, batch)
            with_metrics = (step + 1) % stage.run.tracking.metrics_every == 0 or step + 1 in (1, stage.steps)
            with_metrics |= stage.is_checkpoint_step(step)  # always, so that no non-finite state is ever saved
            losses = state.step(batch, with_metrics=with_metrics)
            callbacks.after_backward(step)
            health = None
            if with_metrics or (step + 1) % stage.run.guards.health_check_every == 0:
                gradients = state.engine.local_gradients()
                health = guards.check_step_health(losses, gradients, supervisor.preempted(), collectives)
                if not health.is_finite:
                    repeat = partial(state.step, batch)
                    fault = guards.locate_non_finite(losses, state.engine.module, repeat, collectives)
                    callbacks.on_fault(step, "not_finite", fault)
                    raise RunFailed(
                        f"stage {stage.name}, step {stage.first_step + step}: {fault}. The weights were not updated. A "
                        "restart would repeat it: lower optimizer.lr, set optimizer.max_grad_norm, or use float32."
                    )
                callbacks.on_health(step, health)
                if spike := state.spikes.observe(step, health.losses["loss"]):
                    result = StageResult(step, spike=spike)
                    break
            lr = learning_rate(step, stage.steps, stage.config.optimizer)
            state.engine.step(lr)
            event = StepEvent(step, with_metrics, lr, health, preempted=health is not None and health.preempted)
            callbacks.after_step(event)
            if event.preempted:
                result = StageResult(step + 1, preempted=True)
                break
        callbacks.on_stage_end(result)
        if result.num_steps == stage.steps:
            export_weights(state)
    return result


def _train_with_rollbacks(context: RunContext, index: int, extra: Sequence[Callback]) -> None:
    """Run a stage through its rollbacks; Preempted if steps of the run remain, RunFailed after `max_rollbacks`."""
    collectives, supervisor, is_first = context.collectives, context.supervisor, context.collectives.rank == 0
    result = None
    while result is None or result.spike is not None:
        supervisor.begin_stage(context.config.stage_start(index), is_rollback=result is not None)
        stage = with_micro_batch(Stage(context.config, index), collectives, context.tokenizer.size)
        check = guards.ExecutionOrderCheck(collectives, stage.run.engine.check_graph_every, stage.first_step)
        # The order matters within a hook: a save includes the step's evaluation.
        callbacks: list[Callback] = [Profiler()] if is_first and stage.run.tracking.profile is not None else []
        callbacks += [check, MetricsCollector(), *[Alerts()] * is_first]
        callbacks += [EvaluationCallback(stage, context.storage), Checkpointer(), *extra]
        result = train_stage(stage, context, Callbacks(callbacks), result.spike if result else None)
    step = stage.first_step + result.num_steps
    if result.preempted and step < context.config.total_steps:
        message = f"stage {stage.name}, step {step}: preempted; checkpoint saved. Re-run the same command to resume."
        raise Preempted(message)


@contextmanager
def build_stage_state(stage: Stage, context: RunContext, callbacks: Callbacks) -> Iterator[StageState]:
    """Yield a stage's state; errors that a restart repeats, in the block too, become RunFailed. A collective call."""
    run, config, storage, collectives = stage.run, stage.config, context.storage, context.collectives
    rank, world_size, tokenizer = collectives.rank, collectives.world_size, context.tokenizer
    with ExitStack() as stack:
        stack.callback(gc.collect)
        for callback in callbacks.members:  # some outlive the stage, whose engine must be freed
            stack.callback(vars(callback).pop, "state", None)
        stack.callback(callbacks.close)
        choices = choices_of(run, run.stages[: stage.index + 1], storage)
        groups, backend = batch_groups(run, config), context.loader_backend
        loader = Loader(run, config, groups, storage, tokenizer, rank, world_size, backend)
        stack.callback(loader.close)
        with guards.permanent_failures_explained(stage, collectives):
            context.report_phase(f"building the model of stage {stage.name}")
            image_tokenizer = load_image_tokenizer(config, storage, collectives.device)
            model = build_stage_model(stage, storage, tokenizer.size)
            callbacks.on_model_built(model)
            shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
            context.report_phase(f"starting DeepSpeed for stage {stage.name}; the first start compiles its optimizer")
            engine = DeepSpeedEngine(model, stage, collectives)
        stack.callback(engine.close)
        step = TrainingStep(engine, stage, collectives, image_tokenizer)
        store = CheckpointStore(storage, run.folder, collectives, run.checkpoint, context.ownership)
        stack.callback(store.close)
        spikes = guards.SpikeGuard(run.guards.spike)
        state = StageState(stage, context, engine, step, loader, store, spikes, callbacks, shapes, choices)
        for callback in callbacks.members:
            callback.state = state
        with guards.permanent_failures_explained(stage, collectives, engine.memory):
            yield state


def resume(state: StageState, rolled_back: guards.Spike | None) -> int:
    """Restore the stage's latest complete checkpoint; return the number of steps it holds, 0 without one."""
    stage, context = state.stage, state.context
    latest, start, account = state.checkpoints.latest(), 0, dict[str, float]()
    if context.collectives.rank == 0:  # remove what earlier attempts left unfinished
        state.checkpoints.clean(latest and latest[0])
    if latest is not None and latest[0].stage == stage.name:
        checkpoint, saved = latest
        if checkpoint.plan_digest != state.loader.digest:
            raise CheckpointError(
                f"{checkpoint.url} was made from other data: its plan digest is {checkpoint.plan_digest[:12]}…, the "
                f"sources now give {state.loader.digest[:12]}…. Restore the shards and their manifests, or start a new "
                "run under another `name`."
            )
        state.engine.restore(saved)
        state.spikes = guards.SpikeGuard(stage.run.guards.spike, checkpoint.spikes)
        state.resumed_from, state.data_counts = checkpoint.url, checkpoint.data_counts
        start, account = checkpoint.stage_step, checkpoint.time_account
        log.warning("resuming stage %s at step %d from %s", stage.name, start, checkpoint.url)
    elif stage.index:
        account = read_manifest(context.storage, stage_url(stage.run, stage.index - 1)).get("time_account", {})
    if context.supervisor.resumes_account:
        context.supervisor.goodput.resume_from(account)
    if rolled_back is not None:
        first, stop = state.spikes.skip_range(rolled_back, start, stage.name)
        description = (
            f"step {stage.first_step + rolled_back.step}: loss {rolled_back.loss:.4g}, median {rolled_back.median:.4g};"
            f" back to step {stage.first_step + start} without batches {first} to {stop - 1} of the stage"
        )
        log.warning("stage %s: loss spike: %s", stage.name, description)
        state.rollback = (f"mome.spike.{rolled_back.number}", description)
    return start


def export_weights(state: StageState) -> None:
    """Hand over the trained weights, with the journal up to the stage's end. A collective call."""
    stage, context, ownership, tracker = state.stage, state.context, state.context.ownership, state.context.tracker
    context.report_phase(f"exporting the weights of stage {stage.name}")
    weights = state.engine.weights()  # on rank 0 only
    if weights is not None:
        ownership.check()
    tracker.log_weights(SavedWeights(stage.url, stage.first_step + stage.steps, stage.index))
    tracker.end_stage("FINISHED")
    tracker.commit()
    if weights is not None:
        metadata, tokens = checkpoint_metadata(state, stage.steps), list(context.tokenizer.lines)
        if not save_weights(context.storage, stage.url, weights, tokens, metadata, state.choices, ownership):
            ownership.check()
            log.warning("%s: an earlier start has already handed it over; continuing from its weights", stage.url)
    context.collectives.barrier()


def _close_tracker(tracker: Tracker, status: Status) -> None:
    """Close the tracker; unless the run has finished, wait only briefly, because the machine may be about to go."""
    tracker.finish(status)
    try:
        in_background(tracker.close, "closing tracker").result(None if status == "FINISHED" else CLOSE_SECONDS)
    except TimeoutError:
        log.warning("tracking: not closed within %.0f s; the next start continues from the journal", CLOSE_SECONDS)
