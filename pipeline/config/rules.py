"""Rules between a run's keys, which no single key's type can say. Each fault is one line that begins with its path."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from pipeline.config.model import ImageBERTConfig
from pipeline.config.schema import EVALUATED, USES_OF, RunConfig, SourceType, StageConfig
from pipeline.config.urls import file_name_of


def faults_of(config: RunConfig) -> Iterator[str]:
    """Everything that is wrong with a run whose keys are each right."""
    yield from _faithful_faults(config)
    yield from _engine_faults(config)
    yield from _stage_faults(config)
    yield from _source_faults(config)
    yield from _cluster_faults(config)


def _faithful_faults(config: RunConfig) -> Iterator[str]:
    if config.reproduce_vlmo_release and config.model.kind != "vlmo":
        yield f"reproduce_vlmo_release: is said of VLMo's release, and the model is of kind {config.model.kind}"


def _engine_faults(config: RunConfig) -> Iterator[str]:
    """What DeepSpeed takes in silence and does otherwise, or fails on without saying what to change."""
    engine = config.engine
    if engine.precision == "bfloat16" and engine.zero_stage == 0:
        yield (
            "engine.precision: bfloat16 at ZeRO 0 would have no float32 master weights and sums; "
            "set engine.zero_stage to 1, 2 or 3, or engine.precision to float32"
        )
    if engine.offload_optimizer and engine.zero_stage == 0:
        yield "engine.offload_optimizer: ZeRO 0 keeps all state on the device; set engine.zero_stage to 1, 2 or 3"
    if engine.offload_parameters and engine.zero_stage != 3:
        yield (
            f"engine.offload_parameters: at ZeRO {engine.zero_stage} every rank computes with whole weights on its "
            "device; set engine.zero_stage to 3, or offload the optimizer alone"
        )
    if engine.compile and engine.zero_stage == 3:
        yield (
            "engine.compile: ZeRO 3 gathers each module's weights in hooks, at which torch.compile breaks "
            "its graphs or fails; leave it false, or set engine.zero_stage to 0, 1 or 2"
        )


def _cluster_faults(config: RunConfig) -> Iterator[str]:
    fewest, most = config.cluster.min_workers, config.cluster.workers
    if fewest is not None and fewest > most:
        yield f"cluster.min_workers: {fewest} is above cluster.workers {most}"
    gpus = config.cluster.gpus_per_worker
    if gpus > 1 and gpus != int(gpus):
        yield f"cluster.gpus_per_worker: expected a whole number, or a fraction below 1 to share a GPU; got {gpus}"


def _source_faults(config: RunConfig) -> Iterator[str]:
    for name, source in config.sources.items():
        if not name or name in (".", "..") or file_name_of(name) != name or len(name) > 100:
            yield (
                f"sources: {name!r}: a source's name is a file's name too; use no slash, no control character and at "
                "most 100 characters"
            )
        excluded = source.synthetic.exclude if source.synthetic else None
        if excluded is not None and (excluded not in config.sources or config.sources[excluded].synthetic is None):
            yield f"sources.{name}.synthetic.exclude: '{excluded}' is no synthetic source of this run"
    held_out = config.evaluation.source
    if held_out is not None and held_out not in config.sources:
        yield f"evaluation.source: unknown source '{held_out}'; known: {', '.join(config.sources)}"
    elif held_out is not None and (source_type := config.sources[held_out].type) not in EVALUATED:
        yield f"evaluation.source: '{held_out}' is of type {source_type}; expected {', '.join(EVALUATED)}"
    if config.evaluation.every is not None and held_out is None:
        yield "evaluation.every: given without evaluation.source; name the held-out source that is to be read"


def _stage_faults(config: RunConfig) -> Iterator[str]:
    names = [stage.name for stage in config.stages]
    for index, stage in enumerate(config.stages):
        where = f"stages.{stage.name}"
        if names.index(stage.name) != index:
            yield f"stages.{index}.name: another stage has this name, '{stage.name}'"
        if stage.global_batch_size % config.data.streams:
            yield (
                f"{where}.global_batch_size: {stage.global_batch_size} must be a multiple of data.streams "
                f"{config.data.streams}"
            )
        if stage.max_text_length > config.model.max_text_length:
            yield (
                f"{where}.max_text_length: {stage.max_text_length} is above model.max_text_length "
                f"{config.model.max_text_length}"
            )
        if stage.image_size is not None:
            yield from _image_size_faults(config, where, stage)
        if not stage.sources or not stage.objectives:
            yield f"{where}: needs at least one source and one objective"
        every = max((objective.every for objective in stage.objectives.values()), default=1)
        if stage.global_batch_size < config.cluster.workers * every:
            yield (
                f"{where}.global_batch_size: {stage.global_batch_size} leaves a worker without a row; "
                f"at least cluster.workers x every = {config.cluster.workers * every}"
            )
        yield from _objective_faults(config, where, stage)
        yield from _source_type_faults(config, where, stage)


def _image_size_faults(config: RunConfig, where: str, stage: StageConfig) -> Iterator[str]:
    try:
        config.for_stage(stage)
    except ValidationError as error:
        for fault in error.errors():
            yield f"{where}.image_size: {fault['msg'].removeprefix('Value error, ')}"


def _objective_faults(config: RunConfig, where: str, stage: StageConfig) -> Iterator[str]:
    objectives = stage.objectives
    if "itm" in objectives and stage.negatives == "hard" and "itc" not in objectives:
        yield (
            f"{where}.objectives: matching draws hard negatives from contrastive scores; "
            "add contrastive, or set negatives: random"
        )
    if "wpa" in objectives and not ("itm" in objectives and stage.negatives == "random"):
        yield f"{where}.objectives: word_patch reads matching's random negatives; add them (negatives: random)"
    elif "wpa" in objectives and objectives["wpa"].every != objectives["itm"].every:
        yield f"{where}.objectives: word_patch reads the rows that matching reads; give both the same `every`"
    if "mim" in objectives:
        yield from _masked_image_faults(config, where, stage)
    for objective, key in (("classification", "num_classes"), ("vqa", "num_answers")):
        if objective in objectives and getattr(stage, key) is None:
            yield f"{where}.{key}: {objective} needs to know how many there are"


def _masked_image_faults(config: RunConfig, where: str, stage: StageConfig) -> Iterator[str]:
    if stage.image_target == "visual_tokens" and stage.image_tokenizer is None:
        yield f"{where}.image_tokenizer: visual_tokens needs to know where the tokenizer's weights lie"
    if config.model.kind == "vilt" and stage.image_target == "visual_tokens":
        yield f"{where}.image_target: visual_tokens name patches of square pictures, and vilt's keep their shape"
    if config.model.kind == "vilt" and stage.masking.patch_shape == "blocks":
        yield f"{where}.masking.patch_shape: blocks fall on square pictures, and vilt's keep their shape"
    if stage.image_decoder is None:
        return
    if config.model.kind not in ("vlmo", "vit"):
        yield f"{where}.image_decoder: a model of kind {config.model.kind} has none; vlmo and vit do"
    if stage.masking.mask_token_prob < 1:
        yield f"{where}.masking.mask_token_prob: image_decoder's encoder reads no masked patch, covered or not"


def _source_type_faults(config: RunConfig, where: str, stage: StageConfig) -> Iterator[str]:
    unknown = [name for name in stage.sources if name not in config.sources]
    for name in unknown:
        yield f"{where}.sources: unknown source '{name}'; known: {', '.join(config.sources)}"
    source_types = {config.sources[name].type for name in stage.sources if name in config.sources}
    yield from _region_faults(config, where, stage, source_types)
    if len(source_types) > 1:
        yield f"{where}.sources: read as {' and '.join(sorted(source_types))}; all sources of a stage must have one use"
    for objective in stage.objectives:
        if not unknown and not source_types <= USES_OF[objective]:
            yield (f"{where}.objectives: {objective} needs sources read as {' or '.join(sorted(USES_OF[objective]))}")


def _region_faults(config: RunConfig, where: str, stage: StageConfig, source_types: set[SourceType]) -> Iterator[str]:
    if "regions" in source_types and not isinstance(config.model, ImageBERTConfig):
        yield f"{where}.sources: regions are for a model of kind imagebert, and model.kind is {config.model.kind}"
    hidden = [o for o in ("mlm", "moc", "mrfr") if o in stage.objectives]
    if "regions" in source_types and len({stage.objectives[objective].every for objective in hidden}) > 1:
        yield f"{where}.objectives: {', '.join(hidden)} share one pass over the masked rows; give them one `every`"
