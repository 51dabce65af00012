"""`mome config new`: a commented config that trains as it is, sized for the data and the number of GPUs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from jobs.config_tools import section_lines
from jobs.describe_run import ANSWER_SECONDS
from pipeline.config.errors import ConfigError, DataError, StorageError
from pipeline.config.load import parse_yaml, validate
from pipeline.config.schema import RunConfig, SourceType, TransformerConfig
from pipeline.config.urls import is_local
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.regions import regions_of
from pipeline.data.shards.check import sample_defect
from pipeline.data.shards.manifest import load_manifest, parse_pattern, shard_names
from pipeline.data.shards.tar import TarSample, open_tar
from pipeline.data.storage import Storage, join
from pipeline.objectives import evaluation_tasks
from pipeline.training.checkpoint.weights import VOCABULARY, weights_info
from pipeline.training.stages import check_stages

MAX_PIXELS = 10**9  # of the sample that decides the type; training has its own limit
DEFAULT_STEPS = 10_000  # without a known number of samples
FEW_SAMPLES = 2000  # below this, the data are divided into fewer streams
PRETRAINING = "{itc: {}, itm: {}, mlm: {}}"
OBJECTIVES: dict[str, dict[SourceType, str]] = {  # of a kind of model, by what its data are, most likely first
    "vlmo": {"pairs": PRETRAINING, "questions": "{vqa: {}}", "statements": "{nlvr2: {}}"},
    "vilt": {"pairs": "{itm: {}, mlm: {}}", "questions": "{vqa: {}}", "statements": "{nlvr2: {}}"},
    "vit": {"labelled": "{classification: {}}", "images": "{mim: {}}"},
    "imagebert": {"regions": "{itm: {}, mlm: {}, moc: {}, mrfr: {}}"},
    "dual_encoder": {"pairs": "{itc: {}}"},
}


class Size(NamedTuple):
    """A model's size, and a peak learning rate that suits it at `batch`; that of another batch scales with the root."""

    width: int
    layers: int
    heads: int
    rows_per_gpu: int
    lr: float
    batch: int


SIZES = {
    "tiny": Size(192, 6, 3, 256, 1e-3, 64),
    "small": Size(384, 12, 6, 256, 5e-4, 256),
    "base": Size(768, 12, 12, 128, 2e-4, 1024),
    "large": Size(1024, 24, 16, 64, 5e-5, 1024),
}
CPU_BATCH = 32
FINE_TUNING = 0.2  # of the learning rate from random weights
FROZEN = "freeze: [attention, vision_expert]  # as published: texts train their own expert on the images' attention"


@dataclass(frozen=True)
class Choice:
    """Options of `mome config new`."""

    data: str
    kind: str = "vlmo"
    gpus: int = 0
    name: str | None = None
    output: str = "runs"
    image_data: str | None = None
    text_data: str | None = None
    test_data: str | None = None
    vocabulary: str | None = None
    start_from: str | None = None
    size: str | None = None
    epochs: float = 10.0


@dataclass
class SourceFacts:
    """Contents of a folder of shards; None where they could not be read."""

    samples: int | None = None
    sample: TarSample | None = None
    note: str = ""
    num_outputs: dict[str, int] = field(default_factory=dict)  # lengths of its lists of answers and classes


def new_config(choice: Choice) -> tuple[str, RunConfig, list[str]]:
    """Return the YAML of a new config, the config that it loads as, and notes on what is assumed.

    With weights to start from, the model and the vocabulary are theirs. Raises ConfigError for an unknown kind or size
    and for data that the kind does not train on, DataError for a local folder without shards, CheckpointError for one
    without weights.
    """
    for option, value, known in (("--kind", choice.kind, OBJECTIVES), ("--size", choice.size, SIZES)):
        if value is not None and value not in known:
            raise ConfigError(f"{option} {value}: expected one of {', '.join(known)}")
    if choice.kind != "vlmo" and (choice.image_data or choice.text_data):
        raise ConfigError(f"--image-data, --text-data: a {choice.kind} has no stages of them; they are for --kind vlmo")
    storage, notes = Storage().within(ANSWER_SECONDS), list[str]()
    urls = {"train": choice.data, "images": choice.image_data, "texts": choice.text_data, "test": choice.test_data}
    facts = {name: _inspect(storage, url) for name, url in urls.items() if url is not None}
    notes += [f"{urls[name]}: {own.note}" for name, own in facts.items() if own.note]
    source_type, start = _type_of(facts["train"], choice), None
    if choice.start_from is not None:
        try:
            start = weights_info(storage, choice.start_from)
        except StorageError as error:
            notes.append(f"--start-from {choice.start_from}: not read, so that the model must be set by hand ({error})")
        if start is not None and (kind := start.config.model.kind) != choice.kind:
            raise ConfigError(f"--start-from {choice.start_from}: its weights are of kind {kind}; give --kind {kind}")
        if start is not None and choice.vocabulary is None and storage.exists(join(start.url, VOCABULARY)):
            choice = replace(choice, vocabulary=join(start.url, VOCABULARY))
    if choice.test_data is not None and not evaluation_tasks(None, source_type):
        raise ConfigError(f"--test-data: nothing is evaluated on data of type {source_type}; leave the option out")
    text = "\n".join([*_lines(choice, urls, facts, source_type, start.config.model if start else None), ""])
    config = validate(parse_yaml(text, "new config"), "new config")
    check_stages(config)
    return text, config, notes


def _inspect(storage: Storage, url: str) -> SourceFacts:
    """Return the facts of a folder of shards; of a remote one that cannot be read, the reason as note."""
    facts, folder = SourceFacts(), parse_pattern(url).folder
    try:
        try:
            manifest = load_manifest(storage, url)
            facts.samples, names = manifest.num_samples, [shard.name for shard in manifest.shards if shard.samples]
        except DataError:
            names = shard_names(url, storage.list_info(folder)) if storage.exists(folder) else []
            if not names:
                raise
            facts.note = f"{len(names)} tars, not indexed yet, so that steps are not computed; mome shards index {url}"
        location = join(folder, names[0])
        with open_tar(storage, location, storage.info(location)) as tar:
            facts.sample = next(tar.samples(), None)
        for name in (ANSWERS, CLASSES):
            if storage.exists(location := join(folder, name)):
                facts.num_outputs[name] = len(Choices.from_bytes(storage.read(location), location))
    except StorageError as error:
        if is_local(url):
            raise
        facts.note = f"not read, so that its type and size are assumed ({error})"
    return facts


def _type_of(facts: SourceFacts, choice: Choice) -> SourceType:
    """Return the first source type that the kind of model trains on and that the data's first sample has."""
    types = OBJECTIVES[choice.kind]
    if facts.sample is None:
        return next(iter(types))
    for source_type in types:
        if sample_defect(source_type, MAX_PIXELS, None, facts.sample) is None:
            return source_type
    has, others = (
        ", ".join(sorted(facts.sample.contents)),
        ", ".join(kind for kind in OBJECTIVES if kind != choice.kind),
    )
    raise ConfigError(
        f"--data {choice.data}: a model of kind {choice.kind} trains on {' or '.join(types)}, and the first sample, "
        f"{facts.sample.key!r}, has {has}. Give other data, or another --kind: {others}"
    )


def _lines(
    choice: Choice,
    urls: dict[str, str | None],
    facts: dict[str, SourceFacts],
    source_type: SourceType,
    model: TransformerConfig | None,
) -> Iterator[str]:
    """Yield the lines of the YAML. `model` is that of the weights to start from."""
    size_name = choice.size or ("base" if choice.gpus >= 4 else "small" if choice.gpus else "tiny")
    size, workers, quote = SIZES[size_name], max(1, choice.gpus), json.dumps
    known = [own.samples for name, own in facts.items() if name != "test" and own.samples is not None]
    streams = 16 if min(known, default=FEW_SAMPLES) >= FEW_SAMPLES else 4
    start = ["# start_from: URL  # of a run, a stage or imported weights; without it, weights are random"]
    if choice.start_from is not None:
        start = [f"start_from: {quote(choice.start_from)}"]

    def stage(name: str, source: str, samples: int | None, keys: list[str]) -> Iterator[str]:
        """Yield the lines of a stage, with batch, steps and learning rate for its number of samples."""
        limit = math.inf if samples is None else samples / 4  # a batch of most of the data would repeat it
        rows = min(size.rows_per_gpu * choice.gpus or CPU_BATCH, limit)
        batch = max(streams, math.ceil(workers / streams) * streams, int(rows // streams) * streams)
        steps = DEFAULT_STEPS if samples is None else max(1, round(choice.epochs * samples / batch))
        lr = min(size.lr * math.sqrt(batch / size.batch), 2 * size.lr) * (FINE_TUNING if choice.start_from else 1.0)
        counted = (
            "the number of samples is not known" if samples is None else f"{choice.epochs:g} epochs of {samples:,}"
        )
        yield from (f"  - name: {name}", f"    sources: {{{source}: 1.0}}  # sampling weights; add sources to mix them")
        yield from (f"    {key}" for key in [*keys, *start])
        start.clear()  # later stages start from the one before
        yield f"    steps: {steps}  # {counted} samples: epochs x samples / global_batch_size"
        yield f"    global_batch_size: {batch}  # over all GPUs; results depend on it, not on the number of GPUs"
        yield "    optimizer:"
        yield f"      lr: {float(f'{lr:.2g}'):g}  # peak; scale it with the root of the batch; the key to tune first"
        yield f"      warmup_steps: {min(2500, max(1, steps // 10))}  # linear, a tenth of the stage; then it decays"

    yield "# Written by `mome config new`. What it does: mome train FILE --dry-run. Memory, time, cost: mome plan FILE."
    yield "# All keys with their defaults: mome config show FILE. What a key means: mome config explain KEY."
    yield f"name: {quote(choice.name or choice.kind)}  # the run's folder is output/name; the same command resumes it"
    yield f"output: {quote(choice.output)}  # a folder, or a URL such as s3://bucket/runs"
    yield from ("model:", f"  kind: {choice.kind}")
    if model is None:
        yield from _model_lines(choice.kind, size_name, facts["train"].sample)
    else:
        yield from (f"  {line}" for line in section_lines(model, only_changed=True) if not line.startswith("kind:"))
    if choice.kind != "vit":
        yield from ("tokenizer:", f"  vocabulary: {quote(choice.vocabulary)}  # null: trained from the captions")
        yield "  size: 30522  # tokens of a trained vocabulary, at most"
    yield "sources:"
    types = {"train": source_type, "images": "images", "texts": "text", "test": source_type}
    for name, own in facts.items():
        count = "" if own.samples is None else f"  # {own.samples:,} samples"
        yield f"  {name}: {{shards: {quote(urls[name])}, type: {types[name]}}}{count}"
    yield from ("data:", f"  streams: {streams}  # must divide the batch sizes")
    if choice.gpus:
        yield "  loader: {num_workers: 4}  # processes that prepare batches for each rank; more if ranks wait for data"
    yield "stages:"
    if "images" in facts:
        yield from stage("vision", "images", facts["images"].samples, ["objectives: {mim: {}}"])
    if "texts" in facts:
        frozen = [FROZEN, "experts: {language: vision}"] if "images" in facts else []
        yield from stage("language", "texts", facts["texts"].samples, ["objectives: {mlm: {}}", *frozen])
    keys = [f"objectives: {OBJECTIVES[choice.kind][source_type]}"]
    keys += ["negatives: random"] * (choice.kind in ("vilt", "imagebert") and "itm" in keys[0])
    keys += ["experts: {vision_language: vision}"] * ("images" in facts and source_type == "pairs")
    outputs = {"questions": ("num_answers", ANSWERS), "labelled": ("num_classes", CLASSES)}.get(source_type)
    if outputs is not None:
        number = facts["train"].num_outputs.get(outputs[1])
        remedy = f"set it to the number of lines of {outputs[1]}, which is not next to the shards"
        keys.append(f"{outputs[0]}: {number or 1000}" + ("" if number else f"  # {remedy}"))
    last = {"questions": "vqa", "statements": "nlvr2", "labelled": "classification", "images": "vision"}
    yield from stage(last.get(source_type, "pairs"), "train", facts["train"].samples, keys)
    yield "engine:"
    if choice.gpus:
        yield "  precision: bfloat16  # float32 for GPUs before Ampere"
        yield "  micro_batch_size: auto  # the largest that fits; it does not change the gradient"
        yield "  zero_stage: 1  # 2 or 3 save memory and communicate more: mome plan FILE compares them"
    else:
        yield "  precision: float32  # bfloat16 on GPUs"
    yield from ("cluster:", f"  workers: {workers}  # ranks, one per GPU; may change between restarts")
    yield f"  gpus_per_worker: {1 if choice.gpus else 0}"
    yield from ["  cpus_per_worker: 4"] * bool(choice.gpus)
    yield "checkpoint: {every: 500}  # steps; a killed run loses at most these"
    if "test" in facts:
        yield "evaluation: {source: test}  # at the end; `every: 2000` also evaluates during training"
    else:
        yield "# evaluation: {source: test}  # add held-out data to `sources` to evaluate at the end"


def _model_lines(kind: str, size_name: str, sample: TarSample | None) -> Iterator[str]:
    """Yield the lines of a model of random weights, without its kind."""
    size = SIZES[size_name]
    yield f"  width: {size.width}  # width, layers and heads set size and cost ({size_name})"
    yield from (f"  layers: {size.layers}", f"  heads: {size.heads}")
    if size_name == "tiny" and kind != "imagebert":
        yield from ("  image_size: 96  # pixels; cost grows with its square", "  patch_size: 16")
        yield from ["  longest_side: 160"] * (kind == "vilt")
    if kind == "vlmo":
        yield f"  vision_language_layers: {1 if size_name == 'tiny' else 3 if size_name == 'large' else 2}"
        yield from ["  max_text_length: 40"] * (size_name == "tiny")
    if kind == "dual_encoder":
        text_width = {"base": 512, "large": 768}.get(size_name, size.width)  # CLIP's, of ViT-B and ViT-L
        yield from (f"  text_width: {text_width}", f"  text_layers: {min(12, size.layers)}")
        yield from (f"  text_heads: {text_width // 64}", f"  embedding: {text_width}")
    if kind == "imagebert" and sample is not None:
        yield f"  region_features: {regions_of(sample.contents).features.shape[1]}  # of the detector"
