"""Every configuration key, with its type, its bound and its default. One YAML file is one run.

Classes are strict and frozen, and refuse unknown keys. A field declared with `changeable()` may differ when
a run is resumed; any other change is refused by name (contract C4).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.errors import ConfigError
from pipeline.config.model import ModelConfig, VLMoConfig
from pipeline.config.redaction import holds_secret
from pipeline.config.section import LONGEST, Fraction, Positive, Section, changeable
from pipeline.config.urls import is_local, parse

# What a source's samples are read as: pairs of a picture and captions; pictures alone; texts alone; pictures with a
# class; captions with a detector's regions; questions about a picture with answers (VQA); statements about two
# pictures that are true or false (NLVR2).
SourceType = Literal["pairs", "images", "text", "labelled", "regions", "questions", "statements"]
Objective = Literal[
    "itc",
    "itm",
    "mlm",
    "mim",
    "wpa",
    "moc",
    "mrfr",
    "classification",
    "vqa",
    "nlvr2",
    "ranking",
]
ImageTarget = Literal["mean_colour", "pixels", "visual_tokens"]
USES_OF: dict[Objective, frozenset[SourceType]] = {
    "itc": frozenset({"pairs"}),
    "itm": frozenset({"pairs", "regions"}),
    "mlm": frozenset({"pairs", "text", "regions"}),
    "mim": frozenset({"pairs", "images"}),
    "wpa": frozenset({"pairs"}),
    "moc": frozenset({"regions"}),
    "mrfr": frozenset({"regions"}),
    "classification": frozenset({"labelled"}),
    "vqa": frozenset({"questions"}),
    "nlvr2": frozenset({"statements"}),
    "ranking": frozenset({"pairs"}),
}

EVALUATED: tuple[SourceType, ...] = (
    "pairs",
    "labelled",
    "questions",
    "statements",
)  # uses that results are measured on


def _secret_reference(value: str) -> str:
    if not re.match(r"^(env|file):.+", value):
        raise ValueError("is a secret and must be a reference: 'env:NAME' or 'file:PATH', never the value itself")
    return value


def is_reference(value: str) -> bool:
    """Return True for 'env:NAME' and 'file:PATH', which name a secret; 'file://…' is a URL."""
    return value.startswith(("env:", "file:")) and not value.startswith("file://")


def _endpoint(value: str) -> str:
    if holds_secret(value):
        raise ValueError(
            "holds a user, password or token, which would be recorded; give the URL without them, and storage.key and "
            "storage.secret as 'env:NAME' or 'file:PATH'"
        )
    return value


def _server(value: str) -> str:
    if not is_reference(value) and holds_secret(value):
        raise ValueError(
            "holds a user, password or token, which would be recorded; give 'env:NAME' or 'file:PATH' of the whole "
            "URI, or a URI without them and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
        )
    return value


def parse_steps(told: str) -> tuple[int, int]:
    """Return the first and last step of 'A:B', with A below B. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,15}:[0-9]{1,15}", told) or (steps := [*map(int, told.split(":"))])[0] >= steps[1]:
        raise ValueError("expected A:B with A below B, numbers of steps, such as 100:105")
    return steps[0], steps[1]


def _steps(value: str) -> str:
    parse_steps(value)
    return value


def _prompt(value: str) -> str:
    if value.count("{}") != 1:
        raise ValueError("must hold {} once, in the place of a class's name, such as 'a photo of a {}.'")
    return value


def _url(value: str) -> str:
    parse(value)
    return value


def _local_folder(value: str) -> str:
    if not is_local(value):
        raise ValueError("must be a folder of each node's own, not one of a store")
    return value


Url = Annotated[str, AfterValidator(_url)]
Prompt = Annotated[str, AfterValidator(_prompt)]
SecretReference = Annotated[str, AfterValidator(_secret_reference)]


class StorageConfig(Section):
    """How object stores are reached. What is not given comes from the store's usual environment variables."""

    endpoint_url: Annotated[str, AfterValidator(_endpoint)] | None = changeable(None)
    key: SecretReference | None = changeable(None)
    secret: SecretReference | None = changeable(None)
    anonymous: bool = changeable(False)  # send unsigned requests, which public buckets answer
    retry_timeout_seconds: float = changeable(
        300.0, gt=0, le=LONGEST
    )  # how long a store may be away, or slow, before a run fails

    @model_validator(mode="after")
    def _signs_or_not(self) -> StorageConfig:
        if self.anonymous and (self.key or self.secret):
            raise ValueError("anonymous: true sends no key; remove storage.key and storage.secret, or set it to false")
        return self


class TokenizerConfig(Section):
    """A WordPiece vocabulary file (one token a line); without one, a vocabulary is trained from the captions."""

    vocabulary: Url | None = None
    size: Positive = 30522  # at most this many tokens, when trained
    lowercase: bool | None = None  # lower-case text, strip its accents; default: unless the vocabulary has capitals


class SyntheticConfig(Section):
    """Scenes of coloured shapes with captions from a small grammar, drawn on first use."""

    scenes: Positive = 2000
    seed: int = 0
    image_size: Positive = 64
    captions: Positive = 3  # per scene
    distinct: bool = False  # no two scenes share any caption
    exclude: str | None = None  # another synthetic source none of whose scenes may be drawn again


class FilterConfig(Section):
    """Which values of one indexed property let a sample be read. Every condition given must hold."""

    min: float | None = None
    max: float | None = None
    any_of: tuple[str, ...] | None = None
    none_of: tuple[str, ...] | None = None
    keep_missing: bool = False  # read samples that lack the property

    @model_validator(mode="after")
    def _says_something(self) -> FilterConfig:
        if self.min is self.max is self.any_of is self.none_of is None:
            raise ValueError("needs a condition: min, max, any_of or none_of")
        return self


class SourceConfig(Section):
    """A folder of shards with its manifest, and what training reads of each sample."""

    shards: Url = Field(json_schema_extra={"changeable": True})  # where they lie; what they hold is the plan's digest
    type: SourceType = "pairs"
    synthetic: SyntheticConfig | None = None
    filters: dict[str, FilterConfig] = Field({})  # by property: width, height, caption_length, or a field of the json
    opt_out: Url | None = None  # a text file of ids never to be read: keys, image ids or URLs, one a line
    opt_out_must_match: bool = changeable(False)  # refuse a list with an entry that lists no sample of the shards


class AugmentConfig(Section):
    """Random-resized crop, flip and RandAugment (VLMo: 0.5-1, flip, RandAugment(2, 7) without colour inversion).

    `magnitude` is of 10, as VLMo counts; ViLT's 9 is of 30, which is 3 here. At 10, rotation is 30 degrees, shear 0.3,
    brightness and sharpness 1.9, translation 10 of 224 pixels.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    skip_flip_for_left_right: bool = True  # never flip a picture whose caption says 'left' or 'right'
    num_ops: Annotated[int, Field(ge=0)] = 2
    magnitude: Annotated[int, Field(ge=0, le=10)] = 7  # of 10


class CacheConfig(Section):
    """Remote shards kept as files of each node, shared by one user's processes. Off while `folder` is unset."""

    folder: Annotated[str, AfterValidator(_local_folder)] | None = changeable(None)
    max_bytes: Positive = changeable(200 * 2**30)


class LoaderConfig(Section):
    """How a rank prepares its batches. Nothing here changes what they hold."""

    num_workers: Annotated[int, Field(ge=0)] = changeable(0)  # processes; 0: threads of the trainer's own process
    threads_per_worker: Positive = changeable(2)  # of each process
    prefetch_batches: Positive = changeable(2)
    max_concurrent_requests: Positive = changeable(8)  # ranged reads in flight, of each process
    read_ahead_bytes: Positive = changeable(2**28)  # remote bytes fetched before they are needed, of each process
    memory_bytes: Positive = changeable(2**30)  # remote bytes kept in memory, of each process


class DataConfig(Section):
    """The order of the data and what is done to each sample (contract C1)."""

    streams: Positive = 16
    shuffle_window: Positive = 4  # shards a lane shuffles together
    max_bad_rate: Fraction = changeable(0.01)
    max_pixels: Positive = 25_000_000  # a larger picture is quarantined; decoding one takes up to 8 bytes per pixel
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = changeable(LoaderConfig())
    cache: CacheConfig = changeable(CacheConfig())


class MaskingConfig(Section):
    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15  # of the words
    whole_word: bool = True
    region_mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15  # of a detector's regions
    image_mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4  # of the patches
    patch_shape: Literal["scattered", "blocks"] = "scattered"  # blocks: rectangles of at least 16 patches (BEiT)
    # What the encoder reads where a patch is masked: the mask embedding, another patch of the picture, or the patch
    # itself; these two shares, and what they leave (ViT: 0.8, 0.1 and 0.1).
    mask_token_prob: Fraction = 1.0
    random_patch_prob: Fraction = 0.0

    @model_validator(mode="after")
    def _shares(self) -> MaskingConfig:
        if self.mask_token_prob + self.random_patch_prob > 1 + 1e-9:
            raise ValueError(
                f"mask_token_prob {self.mask_token_prob} and random_patch_prob {self.random_patch_prob} sum to over 1"
            )
        return self


class BucketsConfig(Section):
    """Samples of like length share a batch: each lane sorts blocks of `batches` batches' worth of its samples."""

    by: Literal["caption", "image"] = "caption"  # caption: its characters; image: its aspect ratio
    batches: Annotated[int, Field(ge=2)] = 16


class ObjectiveConfig(Section):
    """An objective's weight, and the share of each global batch that it reads (1, 1/2, 1/3, …)."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    every: Positive = 1  # reads one row in `every` of each global batch, in turn


class OptimizerConfig(Section):
    """AdamW, linear warm-up, then linear or cosine decay to `min_lr` (VLMo's values as defaults)."""

    lr: float = changeable(2e-4, gt=0)
    min_lr: float = changeable(0.0, ge=0)
    warmup_steps: int = changeable(2500, ge=0)
    lr_schedule: Literal["linear", "cosine", "constant"] = changeable("linear")
    betas: tuple[float, float] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0  # 0: no clipping, as published
    head_lr_multiplier: Annotated[float, Field(gt=0)] = 1.0  # of trained heads' rate (a VQA head: VLMo 20, ViLT 10)
    # Decay of an exponential moving average of the weights, which the stage then hands over in their place. Early steps
    # count more: step t keeps min(ema_decay, (1 + t) / (10 + t)) of the average.
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None


class ImageDecoderConfig(Section):
    """Predicts masked patches that the encoder never reads (MAE, arXiv 2111.06377, section 3: the paper's sizes)."""

    width: Positive = 512
    layers: Positive = 8
    heads: Positive = 16

    @model_validator(mode="after")
    def _divisible(self) -> ImageDecoderConfig:
        # Its fixed positions are a sine and a cosine for each of two axes.
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        return self


class ImageTokenizerConfig(Section):
    """What names the visual tokens of `image_target: visual_tokens` (BEiT: DALL-E's, 8192 of them).

    A folder or URL with the `config.json` and `model.safetensors` of Hugging Face's FlavaImageCodebook, which is
    DALL-E's encoder; `pipeline.models.visual_tokens` says how to write one from DALL-E's own file.
    """

    weights: Url
    tokens: Positive = 8192


class ExpertsConfig(Section):
    """What the experts that no earlier stage trained start from."""

    language: Literal["random", "vision", "inherit"] = "inherit"
    vision_language: Literal["random", "vision", "language", "inherit"] = "inherit"


class StageConfig(Section):
    """One stage: its sources with weights, objectives, trainable parts, length, optimiser and starting weights."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    sources: dict[str, Annotated[float, Field(gt=0.0)]]
    objectives: dict[Objective, ObjectiveConfig]
    steps: Positive = Field(json_schema_extra={"changeable": True})
    global_batch_size: Positive
    max_text_length: Positive = 40
    image_size: Positive | None = None  # of this stage's pictures; None: model.image_size
    masking: MaskingConfig = MaskingConfig()
    buckets: BucketsConfig | None = None
    image_target: ImageTarget = "pixels"  # of masked_image
    image_tokenizer: ImageTokenizerConfig | None = None  # that visual_tokens needs
    image_decoder: ImageDecoderConfig | None = None  # given: the encoder reads only what masked_image leaves visible
    num_negative_texts: Positive = 15  # that ranking reads beside each picture's own
    negatives: Literal["hard", "random"] = "hard"  # of matching: by contrastive score; or any of the same source
    num_classes: Positive | None = None  # that classification tells apart
    num_answers: Positive | None = None  # that answering chooses among
    answer_list: Url | None = None  # URL of their JSON list; None: answers.json beside the first source's shards
    freeze: tuple[str, ...] = ()  # parts of the model, by name
    start_from: Url = "previous"  # 'previous', 'random', or the URL of a run, stage or checkpoint
    experts: ExpertsConfig = ExpertsConfig()
    optimizer: OptimizerConfig = changeable(OptimizerConfig())


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = changeable(1)
    offload_optimizer: bool = changeable(False)  # master weights and moments live in host memory, at ZeRO 1, 2 and 3
    offload_parameters: bool = changeable(False)  # and so do the weights that are not in use, at ZeRO 3
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    # Most samples one forward may hold; None: a rank's whole share; auto: as many as fit the smallest rank's memory.
    micro_batch_size: Positive | Literal["auto"] | None = changeable(None)
    memory_gb: float | None = changeable(None, gt=0)  # of a rank, that auto may fill; None: what its GPU has free
    # The backward computes each transformer block again instead of keeping its activations: a third more work, and
    # memory for one block's activations instead of all.
    activation_checkpointing: bool = changeable(False)
    compile: bool = changeable(False)  # the transformer blocks, by torch.compile: minutes at the start; not at ZeRO 3
    threads: Positive = 1  # CPU threads of a rank's tensor arithmetic
    check_graph_every: Positive = changeable(100)  # steps between two comparisons of the ranks' graphs


class ClusterConfig(Section):
    """Where the ranks run. With `address` unset a local Ray is started."""

    workers: Positive = changeable(1)  # ranks
    min_workers: Positive | None = changeable(None)  # fewest to go on with while nodes are missing; None: `workers`
    placement: Literal["pack", "spread"] = changeable("pack")  # of ranks: on few nodes, or on as many as there are
    gpus_per_worker: Annotated[float, Field(ge=0)] = changeable(0)
    cpus_per_worker: Annotated[float, Field(gt=0)] = changeable(1)
    address: str | None = changeable(None)
    max_failures: Annotated[int, Field(ge=0)] = changeable(3)  # restarts after errors, killed ranks and lost nodes
    max_preemptions: Annotated[int, Field(ge=0)] | None = changeable(None)  # after announced losses; None: any number
    # How long ranks may take to be placed, runtime environments included; then fewer are tried, down to min_workers.
    start_seconds: float = changeable(60.0, gt=0, le=LONGEST)
    # How long there must be room for more ranks, up to `workers`, before a smaller run saves and restarts with them.
    grow_seconds: float = changeable(60.0, gt=0, le=LONGEST)
    loader_actors: Annotated[int, Field(ge=0)] = changeable(0)  # of each rank; 0: batches are prepared beside it
    loader_cpus: Annotated[float, Field(ge=0)] = changeable(1)  # of each of these
    loader_resource: str | None = changeable(None)  # only on nodes that offer this custom resource (ray start)
    price: float = changeable(0.0, ge=0)  # of a rank for an hour, in any currency: for `mome plan` and the report


class KeepBestConfig(Section):
    """A metric that is recorded in training, such as train/loss, and which of its values is the better."""

    metric: str
    mode: Literal["min", "max"] = "min"


class SpikeConfig(Section):
    """A loss above `factor` x the median of the last `window` losses: back to the last checkpoint, past that data.

    Left out are the batches since that checkpoint up to the one that spiked, and `skip` more. The stage still makes
    all its steps.
    """

    factor: float = changeable(3.0, gt=1)
    window: Positive = changeable(100)  # losses; nothing is judged before so many were seen
    skip: int = changeable(0, ge=0)
    max_rollbacks: Positive = changeable(3)  # rollbacks of one stage; a spike after that many ends the run


class GuardsConfig(Section):
    """What a run watches itself for."""

    # Steps between two looks, before the update, at what all ranks must know together: a loss or gradient that is not
    # finite, a spike, a notice of preemption. A look reads one small sum from the device, and waits for it.
    health_check_every: Positive = changeable(1)
    hang_seconds: float = changeable(120.0, gt=0, le=LONGEST)  # of a step; then stacks are written and the ranks end
    start_seconds: float = changeable(1800.0, gt=0, le=LONGEST)  # the same until the first step of a stage is done
    save_seconds: float = changeable(1800.0, gt=0, le=LONGEST)  # the same of a checkpoint or hand-over
    evaluate_seconds: float = changeable(3600.0, gt=0, le=LONGEST)  # the same of an evaluation (`evaluation.every`)
    spike: SpikeConfig | None = changeable(None)


class CheckpointConfig(Section):
    """Saved beside training, which stops for the copy to the host's memory only: that much memory a rank is taken."""

    every: Positive = changeable(500)  # steps
    keep: Positive = changeable(2)  # the last so many
    keep_every: Positive | None = changeable(None)  # also every so many steps of the run, for ever
    keep_best: KeepBestConfig | None = changeable(None)  # also the best of each stage


class TrackingConfig(Section):
    """MLflow. With `uri` unset: SQLite in the run's folder, or in the working folder when that is remote."""

    uri: Annotated[str, AfterValidator(_server)] | None = changeable(None)  # a URI, or 'env:NAME' or 'file:PATH' of one
    experiment: str | None = None  # None: the family of the model, such as vlmo
    metrics_every: Positive = changeable(10)  # steps between two points; reading them is the only host synchronisation
    flush_seconds: float = changeable(5.0, gt=0, le=LONGEST)
    required: bool = changeable(True)  # refuse to start a run when the server does not answer
    # Steps A:B (counted over all stages) of which rank 0 records a trace, as `mome train --profile A:B` says.
    profile: Annotated[str, AfterValidator(_steps)] | None = changeable(None)


class EvaluationConfig(Section):
    """The held-out pairs that the last stage is evaluated on at its end, and every stage while it trains."""

    source: str | None = changeable(None)
    max_images: Positive | None = changeable(None)  # images
    batch_size: Positive = changeable(64)
    # Texts that zero-shot classification holds pictures against, with {} in the place of a class's name.
    prompts: tuple[Prompt, ...] = changeable(("a photo of a {}.",), min_length=1)
    every: Positive | None = changeable(None)  # steps between two evaluations of a stage; None: only at the run's end
    max_images_during_training: Positive = changeable(1000)  # images that each of those reads


class RunConfig(Section):
    """One run: everything `mome train` needs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: Url = changeable("runs")  # fsspec URL; the run lives in <output>/<name>
    seed: int = 0
    reproduce_vlmo_release: bool = False  # to VLMo's release: its quirks too, which `training/release.py` lists
    storage: StorageConfig = changeable(StorageConfig())
    model: ModelConfig = VLMoConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    sources: dict[str, SourceConfig]
    data: DataConfig = DataConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    engine: EngineConfig = changeable(EngineConfig())
    cluster: ClusterConfig = changeable(ClusterConfig())
    guards: GuardsConfig = changeable(GuardsConfig())
    checkpoint: CheckpointConfig = changeable(CheckpointConfig())
    tracking: TrackingConfig = changeable(TrackingConfig())
    evaluation: EvaluationConfig = changeable(EvaluationConfig())

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        # Here, because the rules speak of the classes of this module.
        from pipeline.config.rules import faults_of

        if faults := list(faults_of(self)):
            raise ValueError("\n".join(faults))
        return self

    def source_type_of(self, stage: StageConfig) -> SourceType:
        """What the stage reads of its samples: the same for all its sources."""
        return self.sources[next(iter(stage.sources))].type

    def stage_named(self, name: str | None) -> StageConfig:
        """The stage of that name, or the last one. Raises ConfigError naming the stages there are."""
        if name is None:
            return self.stages[-1]
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"no stage '{name}' in this run; its stages: {', '.join(s.name for s in self.stages)}")

    def for_stage(self, stage: StageConfig) -> RunConfig:
        """The run as a stage sees it: `model.image_size` is the size of the stage's own pictures.

        All that concerns one stage (its model, its loader, its weights' record) is made from this. It may be asked
        of its own result, for the same stage or another.
        """
        if stage.image_size in (None, self.model.image_size):
            return self
        model = type(self.model).model_validate(self.model.model_dump() | {"image_size": stage.image_size})
        sizes = ((each, each.image_size or self.model.image_size) for each in self.stages)
        stages = tuple(each.model_copy(update={"image_size": size}) for each, size in sizes)
        return self.model_copy(update={"model": model, "stages": stages})

    def stage_start(self, index: int) -> int:
        """The first global step of a stage: steps count over all stages."""
        return sum(stage.steps for stage in self.stages[:index])

    @property
    def total_steps(self) -> int:
        return self.stage_start(len(self.stages))

    @property
    def folder(self) -> str:
        """The URL of the run's own folder."""
        return f"{self.output.rstrip('/')}/{self.name}"
