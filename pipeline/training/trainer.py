"""What trains a stage on one rank: the model in its engine, the step, and the guard that watches the graph."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.guards import GraphGuard
from pipeline.training.image_tokenizer import load_image_tokenizer
from pipeline.training.memory import is_out_of_memory, out_of_memory
from pipeline.training.stages import build_stage_model
from pipeline.training.steps import TrainingStep


@dataclass(frozen=True)
class Trainer:
    """Close the engine when done."""

    engine: DeepSpeedEngine
    step: TrainingStep
    guard: GraphGuard
    shapes: dict[str, list[int]]  # of the parameters by name, before ZeRO cuts them up


def build_trainer(
    config: RunConfig, index: int, storage: Storage, vocabulary: int, collectives: Collectives
) -> Trainer:
    """Stage `index` of a config that is for this stage, with its starting weights. All ranks call it together.

    Raises RunFailed, with the memory plan, where it does not fit.
    """
    stage = config.stages[index]
    try:
        image_tokenizer = load_image_tokenizer(stage, storage, collectives.device)
        model = build_stage_model(config, index, storage, vocabulary)
        guard = GraphGuard(model, collectives, config.engine.check_graph_every)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        engine = DeepSpeedEngine(model, config, stage, collectives)
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, config, stage, collectives, None) from error
        raise
    return Trainer(engine, TrainingStep(engine, config, stage, collectives, image_tokenizer), guard, shapes)
