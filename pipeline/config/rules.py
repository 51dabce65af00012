"""Rules between a run's keys, which no single key's type can say. Each fault is one line that begins with its path."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.schema import EVALUATED, USES_OF, RunConfig, SourceType, StageConfig


def faults_of(config: RunConfig) -> Iterator[str]:
    """Yield the faults of objectives."""
    for stage in config.stages:
        yield from _objective_faults(config, f"stages.{stage.name}", stage)
        yield from _source_type_faults(config, f"stages.{stage.name}", stage)
    source = config.evaluation.source
    if source in config.sources and config.sources[source].type not in EVALUATED:
        yield f"evaluation.source: '{source}' is of type {config.sources[source].type}; expected {', '.join(EVALUATED)}"


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
    source_types = {config.sources[name].type for name in stage.sources if name in config.sources}
    yield from _region_faults(config, where, stage, source_types)
    for objective in stage.objectives:
        if not unknown and not source_types <= USES_OF[objective]:
            yield (f"{where}.objectives: {objective} needs sources read as {' or '.join(sorted(USES_OF[objective]))}")


def _region_faults(config: RunConfig, where: str, stage: StageConfig, source_types: set[SourceType]) -> Iterator[str]:
    hidden = [o for o in ("mlm", "moc", "mrfr") if o in stage.objectives]
    if "regions" in source_types and len({stage.objectives[objective].every for objective in hidden}) > 1:
        yield f"{where}.objectives: {', '.join(hidden)} share one pass over the masked rows; give them one `every`"
