"""Every configuration key with its type, bounds, default and meaning. One YAML file configures one run.

Sections are strict and frozen, and refuse unknown keys. Only `changeable` keys may differ when a run is resumed; any
other change is refused by name (contract C4). Checks that need the objectives' own declarations are in
`pipeline.objectives.check_objectives`: this module must not import torch.
"""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.errors import ConfigError
from pipeline.config.redaction import redact
from pipeline.config.urls import file_name_of, is_local, parse

# pairs: an image and its captions. images: images alone. text: texts alone. labelled: an image and its class.
# regions: captions and an object detector's regions. questions: questions about an image with their answers (VQA).
# statements: true or false statements about two images (NLVR2).
SourceType = Literal["pairs", "images", "text", "labelled", "regions", "questions", "statements"]
ImageTarget = Literal["mean_colour", "pixels", "visual_tokens"]
Interpolation = Literal["bicubic", "bilinear"]
ImageFit = Literal["stretch", "centre_crop"]
Activation = Literal["gelu", "quick_gelu"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue of CLIP's training images, as published
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 1e9  # seconds (about 30 years): an effectively infinite timeout that threads can still wait for
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0, le=2**53)]  # larger integers are not exact in floats and tensors
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# Red, green, blue. Not strict, because `ModelConfig` inspects the section and so turns arrays of YAML into lists.
Channels = Annotated[tuple[float, float, float], Field(strict=False)]
ChannelScales = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)]
Seconds = Annotated[float, Field(gt=0, le=LONGEST)]
Rules = dict[str, Callable[[Any], object]]


class Section(BaseModel):
    """Base of all sections. `RULES` relate the keys of a section: what a violation raises, and a condition."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
        # What editors show: keys as they are written, and sections without "Config".
        field_title_generator=lambda name, field: name,
        model_title_generator=lambda section: section.__name__.removesuffix("Config"),
    )  # fmt: skip
    RULES: ClassVar[Rules] = {}

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        """Raise ValueError with all violated rules of the section and its bases; {key} is the key's value."""
        rules = [rule for base in reversed(type(self).__mro__) for rule in vars(base).get("RULES", {}).items()]
        if faults := [message.format(**dict(self)) for message, holds in rules if not holds(self)]:
            raise ValueError("; ".join(faults))
        return self


def fixed(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a key that must not change when a run is resumed."""
    return Field(default, description=description, **bounds)


# Declare a key that may change when a run is resumed; the change is recorded.
changeable = partial(fixed, json_schema_extra={"changeable": True})


# The objectives' names in alphabetical order: one module of `pipeline/objectives` each, which is not imported here.
OBJECTIVES = tuple(
    sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).resolve().parents[1] / "objectives")]))
)
REFERENCE = re.compile(r"env:|file:(?!//)")  # of 'env:NAME' and 'file:PATH', which name a secret; 'file://…' is a URL


def parse_steps(value: str) -> tuple[int, int]:
    """Return the first and last step of 'A:B', with A below B. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", value)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError("expected A:B with A below B, numbers of steps, such as 100:105")
    return int(match[1]), int(match[2])


def _require(accepts: Callable[[str], object], message: str, value: str) -> str:
    """Return `value`, or raise ValueError(message) unless `accepts`, which may raise its own, returns true."""
    if not accepts(value):
        raise ValueError(message)
    return value


@cache
def prompt_ensembles() -> dict[str, list[str]]:
    """Return the prompts that CLIP's authors used for each data set, by the names that `evaluation.prompts` accepts."""
    ensembles: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text("utf-8"))
    return ensembles


_RUN_NAME = "Name of the run and of its folder: letters, digits, '_', '.' and '-', first a letter or digit"
_STAGE_NAME = "Name of the stage: small letters, digits and underscores, first a letter"
_NOT_LOCAL = "must be a folder on each node's own disk, not a URL of an object store"
_NOT_SECRET = "is a secret and must be a reference: 'env:NAME' or 'file:PATH', never the value itself"
_HOLDS_SECRET = "holds a user, password or token, which would be recorded; give "
_ENDPOINT = "the URL without them, and storage.key and storage.secret as 'env:NAME' or 'file:PATH'"
_URI = (
    "'env:NAME' or 'file:PATH' of the whole URI, or a URI without them and MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, or _TOKEN"
)
_PROMPT = (
    "must contain {} exactly once, where the class name goes, such as 'a photo of a {}.', or be the name of an "
    "ensemble in pipeline/config/prompts.yaml, such as openai_imagenet"
)
Url = Annotated[str, AfterValidator(partial(_require, parse, ""))]
LocalFolder = Annotated[str, AfterValidator(partial(_require, is_local, _NOT_LOCAL))]
SecretReference = Annotated[str, AfterValidator(partial(_require, re.compile(r"(env|file):.+").match, _NOT_SECRET))]
Endpoint = Annotated[str, AfterValidator(partial(_require, lambda url: redact(url) == url, _HOLDS_SECRET + _ENDPOINT))]
TrackingUri = Annotated[
    str,
    AfterValidator(partial(_require, lambda uri: REFERENCE.match(uri) or redact(uri) == uri, _HOLDS_SECRET + _URI)),
]
Steps = Annotated[str, AfterValidator(partial(_require, parse_steps, ""))]
Prompt = Annotated[
    str, AfterValidator(partial(_require, lambda value: value.count("{}") == 1 or value in prompt_ensembles(), _PROMPT))
]
ObjectiveName: TypeAlias = Literal[OBJECTIVES]  # type: ignore[valid-type]


# ---- models: the defaults are the papers' base sizes; what a head predicts is a property of the stage


class TransformerConfig(Section):
    """Sizes common to all models: the transformer, and the images and texts it reads."""

    READS_TEXT: ClassVar[bool] = True
    TRAINING_ONLY: ClassVar[frozenset[str]] = frozenset({  # keys of any kind that do not change which weights fit
        "init_std", "drop_path", "interpolation", "image_fit", "norm_eps", "text_norm_eps", "dropout", "contrasts",
        "longest_side", "max_visible_patches", "max_regions",
    })  # fmt: skip
    RULES: ClassVar[Rules] = {
        "width {width} must be a multiple of heads {heads}": lambda model: model.width % model.heads == 0,
        "image_size {image_size} must be a multiple of patch_size {patch_size}": (
            lambda model: model.image_size % model.patch_size == 0
        ),
    }

    kind: str = Field(description="Model architecture")
    width: Positive = fixed(768, "Hidden size of the transformer")
    layers: Positive = fixed(12, "Number of transformer layers")
    heads: Positive = fixed(12, "Number of attention heads; must divide `width`")
    mlp_ratio: Positive = fixed(4, "Hidden size of the feed-forward layers, as a multiple of `width`")
    image_size: Positive = fixed(224, "Side of the square input images in pixels; a multiple of `patch_size`")
    patch_size: Positive = fixed(16, "Side of an image patch in pixels")
    max_text_length: Positive = fixed(40, "Number of text positions, including [CLS] and [SEP]")
    init_std: PositiveFloat | Literal["auto"] = fixed(
        "auto", "Standard deviation of initial weights; auto: 0.02, and 0.02 sqrt(768 / width) for smaller widths"
    )
    drop_path: Fraction = fixed(0.0, "Drop-path rate of the last layer, rising linearly from 0 in the first")
    interpolation: Interpolation = fixed("bicubic", "Kernel for resizing images (Hugging Face's ViT: bilinear)")
    image_fit: ImageFit = fixed("stretch", "How a whole image becomes a square: stretched, or its centre (CLIP)")
    image_mean: Channels = fixed((0.5, 0.5, 0.5), "Mean of each channel, subtracted from pixels between 0 and 1")
    image_std: ChannelScales = fixed((0.5, 0.5, 0.5), "Standard deviation of each channel, by which pixels are divided")

    @property
    def weight_std(self) -> float:
        """Standard deviation of initial weights. Activations keep their size at small widths, where 0.02 would make
        all outputs nearly equal; published models with at least 768 features use 0.02.
        """
        return 0.02 * math.sqrt(max(1.0, 768 / self.width)) if self.init_std == "auto" else self.init_std

    def architecture(self) -> dict[str, Any]:
        """Return the keys that determine which weights fit: sections that agree in these can share weights."""
        values = {name: value for name, value in self.model_dump().items() if name not in self.TRAINING_ONLY}
        if "layer_scale" in values:  # the gammas' initial value does not matter for loading; their presence does
            values["layer_scale"] = values["layer_scale"] is not None
        return values

    @property
    def grid(self) -> int:
        """Number of patches along one side of a square image, which has `grid**2`."""
        return self.image_size // self.patch_size

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Drop-path rate of each layer, of the deeper of two towers; the other tower uses the last of them."""
        layers = max(self.layers, getattr(self, "text_layers", 0))
        return tuple(self.drop_path * layer / max(layers - 1, 1) for layer in range(layers))


class VLMoConfig(TransformerConfig):
    """VLMo (arXiv 2111.02358); the defaults are VLMo-base at 224 px.

    BEiT-3 (arXiv 2208.10442) is the same with `attention: routed`, `sub_norm: true`, `embeddings: plain`, `positions:
    absolute`, `vision_language_layers: 0`, `contrasts: 1`, `layer_scale: null` and `norm_eps: 1e-5`.
    """

    RULES: ClassVar[Rules] = {
        "vision_language_layers must be below layers {layers}": lambda m: m.vision_language_layers < m.layers,
        "attention: routed has no vision-language expert; set vision_language_layers: 0": (
            lambda m: m.attention == "shared" or not m.vision_language_layers
        ),
        "contrasts: 2 needs the vision-language expert; set contrasts: 1, or vision_language_layers above 0": (
            lambda m: m.contrasts == 1 or m.vision_language_layers > 0
        ),
        "embeddings: plain has no relative positions; set positions: absolute": (
            lambda m: m.embeddings == "bert" or m.positions == "absolute"
        ),
    }

    kind: Literal["vlmo"] = fixed("vlmo", "Model architecture")
    vision_language_layers: NonNegative = fixed(
        2, "Number of top layers with the vision-language expert for fused input; 0: tokens keep their modality's"
    )
    attention: Literal["shared", "routed"] = fixed(
        "shared", "Attention projections and norms: shared by the modalities, or routed to one set each (BEiT-3)"
    )
    sub_norm: bool = fixed(False, "Layer norms in front of the output projections of attention and MLPs (BEiT-3)")
    embeddings: Literal["bert", "plain"] = fixed(
        "bert", "bert: token types, a norm of words, modality vectors; plain: words or patches, and positions (BEiT-3)"
    )
    positions: Literal["relative", "absolute"] = fixed("relative", "Kind of position embeddings")
    max_text_length: Positive = fixed(196, "Number of text positions, including [CLS] and [SEP]")
    layer_scale: float | None = fixed(0.1, "Initial value of LayerScale; null disables LayerScale")
    drop_path: Fraction = fixed(0.1, "Drop-path rate of the last layer, rising linearly from 0 in the first")
    norm_eps: PositiveFloat = fixed(1e-6, "Epsilon of the encoder's layer norms; Hugging Face's BEiT: 1e-12")
    contrasts: Literal[1, 2] = fixed(2, "Number of contrastive projections; the release fine-tunes retrieval with 1")


class ViLTConfig(TransformerConfig):
    """ViLT (arXiv 2102.03334); the defaults are ViLT-B/32. Images keep their aspect ratio.

    Each side is cut to a multiple of the patch, and the positions of a square image are resized to each image's grid.
    The paper's longest side is 640 px (at most 12 x 20 = 240 patches); the release computes 639, which gives 608 and at
    most 228 patches. Published models also apply dropout 0.1 to hidden vectors; this one does not, because it would
    make results depend on generator state.
    """

    RULES: ClassVar[Rules] = {
        "longest_side {longest_side} is below image_size {image_size}, the shorter side": (
            lambda model: model.longest_side >= model.image_size
        )
    }

    kind: Literal["vilt"] = fixed("vilt", "Model architecture")
    image_size: Positive = fixed(384, "Shorter side of the input images in pixels; a multiple of `patch_size`")
    patch_size: Positive = fixed(32, "Side of an image patch in pixels")
    longest_side: Positive = fixed(640, "Longest allowed side of the input images in pixels")
    norm_eps: PositiveFloat = fixed(1e-6, "Epsilon of the encoder's layer norms; Hugging Face's configs state 1e-12")
    text_norm_eps: PositiveFloat = fixed(1e-12, "Epsilon of the layer norms of the text embedding and of the MLM head")
    max_visible_patches: Positive | None = fixed(200, "Most image patches that training reads, at random; null: all")


class ViTConfig(TransformerConfig):
    """ViT (arXiv 2010.11929); the defaults are ViT-B/16. It reads no text."""

    READS_TEXT: ClassVar = False
    TRAINING_ONLY: ClassVar = TransformerConfig.TRAINING_ONLY | {"max_text_length"}

    kind: Literal["vit"] = fixed("vit", "Model architecture")
    norm_eps: PositiveFloat = fixed(1e-6, "Epsilon of the layer norms; Hugging Face's configs state 1e-12")


class ImageBERTConfig(TransformerConfig):
    """ImageBERT (arXiv 2001.07966): BERT-base over words and an object detector's regions. It reads no pixels."""

    TRAINING_ONLY: ClassVar = TransformerConfig.TRAINING_ONLY | {"image_size", "patch_size"}
    RULES: ClassVar[Rules] = {
        "drop_path does not exist in BERT; leave it 0 and set dropout": lambda model: not model.drop_path
    }

    kind: Literal["imagebert"] = fixed("imagebert", "Model architecture")
    max_text_length: Positive = fixed(44, "Number of text positions, including [CLS] and [SEP]")
    max_regions: Positive = fixed(100, "Maximum number of regions per image")
    region_features: Positive = fixed(2048, "Dimension of a region's feature vector")
    region_classes: Positive = fixed(1600, "Number of classes of the object detector")
    norm_eps: PositiveFloat = fixed(1e-12, "Epsilon of the layer norms")
    # The masks are seeded by step and rank: a resumed run draws the same ones, another world size draws others. No
    # step forwards an example twice (this model has no ITC), so masks need not be replayed.
    dropout: Fraction = fixed(0.1, "Dropout of BERT's embeddings, attention and hidden vectors")


class DualEncoderConfig(TransformerConfig):
    """CLIP (arXiv 2103.00020): two towers trained with ITC; the defaults are ViT-B/32's.

    `width`, `layers` and `heads` are the image tower's. Both towers have the same MLP ratio, activation and drop path.
    """

    RULES: ClassVar[Rules] = {
        "text_width {text_width} must be a multiple of text_heads {text_heads}": (
            lambda model: model.text_width % model.text_heads == 0
        )
    }

    kind: Literal["dual_encoder"] = fixed("dual_encoder", "Model architecture")
    patch_size: Positive = fixed(32, "Side of an image patch in pixels")
    max_text_length: Positive = fixed(77, "Number of text positions, including the start and the end token")
    text_width: Positive = fixed(512, "Hidden size of the text tower")
    text_layers: Positive = fixed(12, "Number of layers of the text tower")
    text_heads: Positive = fixed(8, "Number of attention heads of the text tower; must divide `text_width`")
    embedding: Positive = fixed(512, "Dimension of the shared embedding space")
    activation: Activation = fixed("gelu", "Activation of the MLPs; OpenAI's weights need quick_gelu")
    norm_eps: PositiveFloat = fixed(1e-5, "Epsilon of the layer norms")
    image_fit: ImageFit = fixed("centre_crop", "How a whole image becomes a square: stretched, or its centre (CLIP)")
    image_mean: Channels = fixed(CLIP_MEAN, "Mean of each channel, subtracted from pixels between 0 and 1")
    image_std: ChannelScales = fixed(CLIP_STD, "Standard deviation of each channel, by which pixels are divided")


MODEL_SECTIONS: dict[str, type[TransformerConfig]] = {
    section.model_fields["kind"].default: section
    for section in (VLMoConfig, ViLTConfig, ViTConfig, ImageBERTConfig, DualEncoderConfig)
}
ModelConfig = Annotated[
    VLMoConfig | ViLTConfig | ViTConfig | ImageBERTConfig | DualEncoderConfig,
    Field(discriminator="kind"),
    BeforeValidator(lambda value: {"kind": "vlmo", **value} if isinstance(value, dict) else value),
]


class StorageConfig(Section):
    """Access to object stores. Keys that are not set come from the store's usual environment variables."""

    RULES: ClassVar[Rules] = {
        "anonymous: true sends no key; remove storage.key and storage.secret, or set it to false": (
            lambda storage: not (storage.anonymous and (storage.key or storage.secret))
        )
    }

    endpoint_url: Endpoint | None = changeable(None, "URL of the S3 endpoint (default: AWS_ENDPOINT_URL, else AWS)")
    key: SecretReference | None = changeable(None, "Access key, as 'env:NAME' or 'file:PATH'")
    secret: SecretReference | None = changeable(None, "Secret key, as 'env:NAME' or 'file:PATH'")
    anonymous: bool = changeable(False, "Send unsigned requests, as public buckets accept them")
    retry_timeout_seconds: Seconds = changeable(300.0, "Seconds until a run fails when the store does not respond")


class TokenizerConfig(Section):
    """Vocabulary. Without a file, a WordPiece vocabulary is trained from the captions."""

    vocabulary: Url | None = fixed(
        None, "URL of a vocab.txt (a token a line), CLIP's merges, or a SentencePiece Unigram model"
    )
    size: Positive = fixed(30522, "Maximum number of tokens of a trained vocabulary")
    lowercase: bool | None = fixed(None, "Lower-case, strip accents (default: true unless the vocabulary has capitals)")


class SyntheticConfig(Section):
    """Scenes of coloured shapes with captions from a small grammar, generated on first use."""

    scenes: Positive = fixed(2000, "Number of scenes")
    seed: int = fixed(0, "Seed of the generator")
    image_size: Positive = fixed(64, "Side of the images in pixels")
    captions: Positive = fixed(3, "Number of captions per scene")
    distinct: bool = fixed(False, "Require that no two scenes share a caption")
    exclude: str | None = fixed(None, "Name of another synthetic source whose scenes must not be generated again")


class FilterConfig(Section):
    """Conditions on one indexed property; a sample is read if all conditions hold."""

    RULES: ClassVar[Rules] = {
        "needs a condition: min, max, any_of or none_of": lambda f: {f.min, f.max, f.any_of, f.none_of} != {None}
    }

    min: float | None = fixed(None, "Smallest allowed value")
    max: float | None = fixed(None, "Largest allowed value")
    any_of: tuple[str, ...] | None = fixed(None, "Allowed values")
    none_of: tuple[str, ...] | None = fixed(None, "Excluded values")
    keep_missing: bool = fixed(False, "Read samples that do not have the property")


class SourceConfig(Section):
    """A folder of shards with its manifest, and what training reads of each sample."""

    # The location may change on resume because the data's content is part of the data digest.
    shards: Url = changeable(..., "URL of the folder of shards")
    type: SourceType = fixed("pairs", "Content of a sample; decides which objectives can read the source")
    synthetic: SyntheticConfig | None = fixed(None, "Generate the shards on first use")
    filters: dict[str, FilterConfig] = fixed({}, "Conditions by width, height, caption_length, or a field of the JSON")
    opt_out: Url | None = fixed(None, "URL of a text file: sample keys, image ids or URLs that are never read, by line")
    opt_out_must_match: bool = changeable(False, "Fail if an entry of the opt-out list matches no sample of the shards")


class AugmentConfig(Section):
    """Random resized crop, flip and RandAugment; the defaults are VLMo's (RandAugment(2, 7) without inversion)."""

    crop_scale: tuple[float, float] = fixed((0.5, 1.0), "Smallest and largest cropped fraction of the image area")
    flip: bool = fixed(True, "Flip half of the images horizontally")
    skip_flip_for_left_right: bool = fixed(True, "Do not flip an image whose caption contains 'left' or 'right'")
    num_ops: NonNegative = fixed(2, "Number of RandAugment operations per image")
    magnitude: Annotated[int, Field(ge=0, le=10)] = fixed(7, "RandAugment's magnitude of 10 (ViLT's 9 of 30 is 3)")


class CacheConfig(Section):
    """Node-local disk cache of remote shards, shared by all processes of a user."""

    folder: LocalFolder | None = changeable(None, "Local folder of the cache; unset disables the cache")
    max_bytes: Positive = changeable(200 * 2**30, "Maximum size of the cache in bytes")


class LoaderConfig(Section):
    """Resources with which a rank prepares batches; they do not influence the content of the batches."""

    num_workers: NonNegative = changeable(0, "Number of loader processes per rank; 0 uses threads of the trainer")
    threads_per_worker: Positive = changeable(2, "Number of threads per loader process")
    prefetch_batches: Positive = changeable(2, "Number of batches prepared in advance")
    max_concurrent_requests: Positive = changeable(8, "Concurrent ranged reads per process")
    read_ahead_bytes: Positive = changeable(2**28, "Remote bytes prefetched per process")
    memory_bytes: Positive = changeable(2**30, "Remote bytes kept in memory per process")


class DataConfig(Section):
    """Order of the data and per-sample processing (contract C1)."""

    streams: Positive = fixed(16, "Number of streams each source is divided into; must divide the global batch sizes")
    shuffle_window: Positive = fixed(4, "Number of shards that a stream shuffles together")
    max_bad_rate: Fraction = changeable(0.01, "Fraction of bad samples above which the run fails")
    max_pixels: Positive = fixed(25_000_000, "Pixels of the largest image (8 bytes each); larger ones are bad samples")
    augment: AugmentConfig = fixed(AugmentConfig(), "Image augmentation")
    loader: LoaderConfig = changeable(LoaderConfig(), "Loader resources")
    cache: CacheConfig = changeable(CacheConfig(), "Node-local disk cache")


class MaskingConfig(Section):
    """Selection of masked words, patches and regions, and what replaces masked patches."""

    RULES: ClassVar[Rules] = {
        "mask_token_prob {mask_token_prob} + random_patch_prob {random_patch_prob} exceeds 1": (
            lambda masking: masking.mask_token_prob + masking.random_patch_prob <= 1 + 1e-9
        )
    }

    mlm_probability: OpenFraction = fixed(0.15, "Fraction of words that are masked")
    whole_word: bool = fixed(True, "Mask all tokens of a word together")
    region_mask_ratio: OpenFraction = fixed(0.15, "Fraction of regions that are masked")
    image_mask_ratio: OpenFraction = fixed(0.4, "Fraction of image patches that are masked")
    patch_shape: Literal["scattered", "blocks"] = fixed("scattered", "Independent, or rectangles of 16 patches or more")
    mask_token_prob: Fraction = fixed(1.0, "Fraction of masked patches replaced by the mask embedding (ViT: 0.8)")
    random_patch_prob: Fraction = fixed(0.0, "Fraction of masked patches replaced by another patch (ViT: 0.1)")


class BucketsConfig(Section):
    """Length bucketing: examples of similar length share a batch."""

    by: Literal["caption", "image"] = fixed("caption", "Sort by the caption's characters, or the image's aspect ratio")
    batches: Annotated[int, Field(ge=2)] = fixed(16, "Number of batches that a stream sorts together")


class ObjectiveConfig(Section):
    """Weight of an objective and the fraction of each global batch that it reads."""

    weight: PositiveFloat = fixed(1.0, "Weight in the summed loss")
    every: Positive = fixed(1, "Read one example in `every` of each global batch, in rotation")


class OptimizerConfig(Section):
    """AdamW with linear warm-up and decay; the defaults are VLMo's."""

    RULES: ClassVar[Rules] = {
        "lr_schedule exponential needs a min_lr above 0": lambda o: o.lr_schedule != "exponential" or o.min_lr > 0
    }

    lr: float = changeable(2e-4, "Peak learning rate", gt=0)
    min_lr: float = changeable(0.0, "Learning rate at the end of the stage", ge=0)
    warmup_steps: int = changeable(2500, "Number of linear warm-up steps", ge=0)
    lr_schedule: Literal["linear", "cosine", "constant", "exponential"] = changeable(
        "linear", "Decay of the rate after warm-up; exponential: a rise from `min_lr` to `lr`, to find a rate"
    )
    betas: tuple[float, float] = fixed((0.9, 0.98), "AdamW's decay rates of the first and second moment")
    eps: PositiveFloat = fixed(1e-8, "AdamW's epsilon")
    weight_decay: NonNegativeFloat = fixed(0.01, "Decoupled weight decay, applied to matrices only")
    max_grad_norm: NonNegativeFloat = fixed(0.0, "Norm to which gradients are clipped (0: no clipping, as published)")
    head_lr_multiplier: PositiveFloat = fixed(1.0, "Multiplier of `lr` for task heads (VQA: 20 in VLMo, 10 in ViLT)")
    ema_decay: OpenFraction | None = fixed(
        None, "Decay of an average of the weights to export, at step t at most (1 + t) / (10 + t) (default: none)"
    )


class ImageDecoderConfig(Section):
    """Decoder that predicts masked patches the encoder does not read (MAE, arXiv 2111.06377, section 3)."""

    RULES: ClassVar[Rules] = {  # the fixed position embeddings have a sine and a cosine for each of two axes
        "width {width} must be a multiple of heads {heads} and of 4": (
            lambda decoder: decoder.width % decoder.heads == 0 and decoder.width % 4 == 0
        )
    }

    width: Positive = fixed(512, "Hidden size of the decoder; a multiple of `heads` and of 4")
    layers: Positive = fixed(8, "Number of layers")
    heads: Positive = fixed(16, "Number of attention heads")


class ImageTokenizerConfig(Section):
    """Tokenizer that supplies the targets of `image_target: visual_tokens` (BEiT uses DALL-E's, with 8192 tokens).

    The weights are in the format of Hugging Face's FlavaImageCodebook, which is DALL-E's encoder;
    `pipeline.models.visual_tokens` explains how to convert DALL-E's own file.
    """

    weights: Url = fixed(..., "URL of a folder with `config.json` and `model.safetensors`")
    tokens: Positive = fixed(8192, "Number of visual tokens")


class ExpertsConfig(Section):
    """Initialization of VLMo's experts that no earlier stage has trained."""

    language: Literal["random", "vision", "inherit"] = fixed(
        "inherit", "Language expert: random, a copy of the vision expert, or the starting weights"
    )
    vision_language: Literal["random", "vision", "language", "inherit"] = fixed(
        "inherit", "Vision-language expert: random, a copy of an expert, or the starting weights"
    )


class StageConfig(Section):
    """One training stage: sources, objectives, length, optimizer and starting weights."""

    name: str = fixed(..., _STAGE_NAME, pattern=r"^[a-z][a-z0-9_]*$")
    sources: dict[str, PositiveFloat] = fixed(..., "Sampling weight of each source, by its name")
    objectives: dict[ObjectiveName, ObjectiveConfig] = fixed(..., "Objectives that the stage trains, by name")
    steps: Positive = changeable(..., "Number of optimizer steps")
    global_batch_size: Positive = fixed(..., "Number of examples per optimizer step, over all ranks")
    max_text_length: Positive = fixed(40, "Maximum text length in tokens, including [CLS] and [SEP]")
    image_size: Positive | None = fixed(None, "Image size of this stage in pixels (default: model.image_size)")
    masking: MaskingConfig = fixed(MaskingConfig(), "Masking of words, patches and regions")
    buckets: BucketsConfig | None = fixed(None, "Length bucketing (default: none)")
    image_target: ImageTarget = fixed("pixels", "Target of the mim objective")
    image_tokenizer: ImageTokenizerConfig | None = fixed(None, "Required by `image_target: visual_tokens`")
    image_decoder: ImageDecoderConfig | None = fixed(None, "Decoder of mim; the encoder reads visible patches only")
    num_negative_texts: Positive = fixed(15, "Number of negative texts per image in the ranking objective")
    negatives: Literal["hard", "random"] = fixed("hard", "Negatives of itm: by itc similarity, or random of one source")
    num_classes: Positive | None = fixed(None, "Number of classes; required by the classification objective")
    num_answers: Positive | None = fixed(None, "Number of answers; required by the vqa objective")
    answer_list: Url | None = fixed(None, "URL of a JSON list of answers (default: answers.json of the first source)")
    freeze: tuple[str, ...] = fixed((), "Names of the model parts that are not trained")
    start_from: Url = fixed("previous", "Starting weights: 'previous', 'random', or URL of a run, stage or checkpoint")
    experts: ExpertsConfig = fixed(ExpertsConfig(), "Initialization of experts")
    optimizer: OptimizerConfig = changeable(OptimizerConfig(), "Optimizer and learning rate")


class EngineConfig(Section):
    """DeepSpeed engine and precision."""

    # Combinations that DeepSpeed silently ignores, or fails on without saying what to change. `RunConfig` reports them,
    # together with the violated rules between sections.
    COMBINATIONS: ClassVar[Rules] = {
        "engine.precision: bfloat16 at ZeRO 0 would have no float32 master weights and sums; set engine.zero_stage to "
        "1, 2 or 3, or engine.precision to float32": lambda engine: engine.precision != "bfloat16" or engine.zero_stage,
        "engine.offload_optimizer: ZeRO 0 keeps all state on the device; set engine.zero_stage to 1, 2 or 3": (
            lambda engine: not engine.offload_optimizer or engine.zero_stage
        ),
        "engine.offload_parameters: at ZeRO {zero_stage} every rank computes with whole weights on its device; set "
        "engine.zero_stage to 3, or offload the optimizer alone": (
            lambda engine: not engine.offload_parameters or engine.zero_stage == 3
        ),
        "engine.compile: ZeRO 3 gathers each module's weights in hooks, at which torch.compile breaks its graphs or "
        "fails; leave it false, or set engine.zero_stage to 0, 1 or 2": (
            lambda engine: not engine.compile or engine.zero_stage != 3
        ),
    }

    zero_stage: Literal[0, 1, 2, 3] = changeable(1, "DeepSpeed ZeRO stage")
    offload_optimizer: bool = changeable(False, "Keep master weights and moments in host memory (ZeRO 1 to 3)")
    offload_parameters: bool = changeable(False, "Keep unused weights in host memory (ZeRO 3)")
    precision: Literal["float32", "bfloat16"] = fixed("bfloat16", "Precision of the weights in forward and backward")
    micro_batch_size: Positive | Literal["auto"] | None = changeable(
        None, "Number of examples per forward; auto fits the memory of the smallest rank (default: no limit)"
    )
    memory_gb: PositiveFloat | None = changeable(None, "GB per rank for `micro_batch_size: auto` (default: all free)")
    activation_checkpointing: bool = changeable(False, "Recompute blocks in backward: a third more time, less memory")
    compile: bool = changeable(False, "Compile the blocks with torch.compile (minutes at startup; not at ZeRO 3)")
    threads: Positive = fixed(1, "Number of CPU threads per rank for tensor operations")
    check_graph_every: Positive = changeable(100, "Number of steps between comparisons of the ranks' execution order")


class ClusterConfig(Section):
    """Placement of the ranks on a Ray cluster. If `address` is not set, a local Ray is started."""

    workers: Positive = changeable(1, "Number of ranks")
    min_workers: Positive | None = changeable(None, "Fewest ranks to continue with if nodes are lost (default: all)")
    placement: Literal["pack", "spread"] = changeable("pack", "Pack the ranks onto few nodes, or spread them over many")
    gpus_per_worker: NonNegativeFloat = changeable(0, "Number of GPUs per rank; below 1 to share")
    cpus_per_worker: PositiveFloat = changeable(1, "Number of CPUs reserved per rank")
    address: str | None = changeable(None, "Address of the Ray cluster (default: start a local Ray)")
    max_failures: NonNegative = changeable(3, "Maximum number of restarts after errors, killed ranks and lost nodes")
    max_preemptions: NonNegative | None = changeable(None, "Number of restarts after preemptions (default: unlimited)")
    start_seconds: Seconds = changeable(60.0, "Seconds to place the ranks; then fewer are tried, down to min_workers")
    grow_seconds: Seconds = changeable(60.0, "Seconds that room for more ranks must last before a smaller run restarts")
    loader_actors: NonNegative = changeable(0, "Number of remote loader actors per rank; 0 loads on the rank's node")
    loader_cpus: NonNegativeFloat = changeable(1, "Number of CPUs per loader actor")
    loader_resource: str | None = changeable(None, "Ray resource of nodes that host loader actors (default: any)")
    price: NonNegativeFloat = changeable(0.0, "Price per rank and hour in any currency, for `mome plan` and reports")


class KeepBestConfig(Section):
    """Selection of the best checkpoint by a training metric."""

    metric: str = fixed(..., "Name of a recorded metric, such as train/loss")
    mode: Literal["min", "max"] = fixed("min", "Direction in which the metric improves")


class SpikeConfig(Section):
    """Rollback on loss spikes: a loss above `factor` times the median of the last `window` losses.

    The stage returns to its last checkpoint and skips the batches from there up to the spike, plus `skip` more; it
    still makes all its steps.
    """

    factor: float = changeable(3.0, "Ratio to the median loss above which a loss is a spike", gt=1)
    window: Positive = changeable(100, "Number of losses in the median; no detection before that many steps")
    skip: int = changeable(0, "Number of additional batches to skip after the spike", ge=0)
    max_rollbacks: Positive = changeable(3, "Maximum number of rollbacks per stage; a further spike ends the run")


class GuardsConfig(Section):
    """Run-time checks and timeouts. A step that exceeds its timeout ends the run with a stack trace of every rank."""

    health_check_every: Positive = changeable(
        1, "Number of steps between checks for non-finite values, spikes and preemption: one all-reduce each"
    )
    hang_seconds: Seconds = changeable(120.0, "Timeout of a training step in seconds")
    start_seconds: Seconds = changeable(1800.0, "Timeout of a stage's start up to its first step in seconds")
    save_seconds: Seconds = changeable(1800.0, "Timeout of a checkpoint or weight export in seconds")
    evaluate_seconds: Seconds = changeable(3600.0, "Timeout of an evaluation during training in seconds")
    spike: SpikeConfig | None = changeable(None, "Rollback on loss spikes (default: off)")


class CheckpointConfig(Section):
    """Asynchronous checkpoints: training pauses only for a copy of the rank's state to host memory."""

    every: Positive = changeable(500, "Number of steps between checkpoints")
    keep: Positive = changeable(2, "Number of most recent checkpoints to keep")
    keep_every: Positive | None = changeable(None, "Keep checkpoints at multiples of this for good (default: none)")
    keep_best: KeepBestConfig | None = changeable(None, "Keep each stage's best checkpoint by a metric (default: none)")


class TrackingConfig(Section):
    """MLflow tracking."""

    uri: TrackingUri | None = changeable(
        None, "MLflow URI, or its 'env:NAME' or 'file:PATH' (default: SQLite in `output` or, if remote, here)"
    )
    experiment: str | None = fixed(None, "MLflow experiment (default: the kind of the model, such as vlmo)")
    metrics_every: Positive = changeable(10, "Number of steps between metrics; only reading them synchronizes the host")
    flush_seconds: Seconds = changeable(5.0, "Interval of uploads in seconds")
    required: bool = changeable(True, "Refuse to start a run if the tracking server does not respond")
    tensorboard: bool = changeable(False, "Also write TensorBoard event files, to `tensorboard` in the run's folder")
    profile: Steps | None = changeable(None, "Steps A:B of the run that rank 0 profiles (default: none)")


class EvaluationConfig(Section):
    """Evaluation on a held-out source at the end of the run and, optionally, during training."""

    source: str | None = changeable(None, "Name of the held-out source (default: no evaluation)")
    max_images: Positive | None = changeable(None, "Maximum number of images (default: all)")
    batch_size: Positive = changeable(64, "Number of examples per forward")
    prompts: tuple[Prompt, ...] = changeable(
        ("a photo of a {}.",), "Zero-shot prompts, {} is the class; or names of CLIP's ensembles", min_length=1
    )
    every: Positive | None = changeable(None, "Number of steps between evaluations (default: only at the run's end)")
    max_images_during_training: Positive = changeable(1000, "Maximum number of images of an evaluation during training")


class RunConfig(Section):
    """Configuration of one run of `mome train`."""

    name: str = fixed(..., _RUN_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: Url = changeable("runs", "Folder or URL that contains the run's folder `<output>/<name>`")
    seed: int = fixed(0, "Seed of the weights, the data order, masking and augmentation")
    reproduce_vlmo_release: bool = fixed(False, "Reproduce the quirks of VLMo's code (`pipeline/README.md`)")
    storage: StorageConfig = changeable(StorageConfig(), "Access to object stores")
    model: ModelConfig = fixed(VLMoConfig(), "Model architecture and sizes")
    tokenizer: TokenizerConfig = fixed(TokenizerConfig(), "Text tokenizer")
    sources: dict[str, SourceConfig] = fixed(..., "Data sources by name")
    data: DataConfig = fixed(DataConfig(), "Data order, augmentation and loading")
    stages: tuple[StageConfig, ...] = fixed(..., "Training stages in order", min_length=1)
    engine: EngineConfig = changeable(EngineConfig(), "DeepSpeed engine")
    cluster: ClusterConfig = changeable(ClusterConfig(), "Ray cluster")
    guards: GuardsConfig = changeable(GuardsConfig(), "Run-time checks and timeouts")
    checkpoint: CheckpointConfig = changeable(CheckpointConfig(), "Checkpoints")
    tracking: TrackingConfig = changeable(TrackingConfig(), "MLflow tracking")
    evaluation: EvaluationConfig = changeable(EvaluationConfig(), "Evaluation")

    @model_validator(mode="after")
    def _check_consistent(self) -> Self:
        """Report all violated rules between sections at once: each is one line that begins with the key's path."""
        model, cluster, gpus, streams = self.model, self.cluster, self.cluster.gpus_per_worker, self.data.streams
        known, held_out, engine = f"known: {', '.join(self.sources)}", self.evaluation.source, self.engine
        rules = EngineConfig.COMBINATIONS.items()
        faults = [message.format(**dict(engine)) for message, holds in rules if not holds(engine)]
        if self.reproduce_vlmo_release and model.kind != "vlmo":
            faults.append(f"reproduce_vlmo_release: applies to model.kind vlmo only, and model.kind is {model.kind}")
        if cluster.min_workers is not None and cluster.min_workers > cluster.workers:
            faults.append(f"cluster.min_workers: {cluster.min_workers} is above cluster.workers {cluster.workers}")
        if gpus > 1 and gpus != int(gpus):
            expected = "expected a whole number, or a fraction below 1 to share a GPU"
            faults.append(f"cluster.gpus_per_worker: {expected}; got {gpus}")
        for name, source in self.sources.items():
            if not name or name in (".", "..") or file_name_of(name) != name or len(name) > 100:
                expected = "use no slash, no control character and at most 100 characters"
                faults.append(f"sources: {name!r}: the name of a source is also a file name; {expected}")
            excluded = source.synthetic.exclude if source.synthetic else None
            if excluded is not None and (excluded not in self.sources or self.sources[excluded].synthetic is None):
                faults.append(f"sources.{name}.synthetic.exclude: '{excluded}' is not a synthetic source of this run")
        if held_out is not None and held_out not in self.sources:
            faults.append(f"evaluation.source: unknown source '{held_out}'; {known}")
        if self.evaluation.every is not None and held_out is None:
            faults.append("evaluation.every: set without evaluation.source; name the held-out source to evaluate on")
        for index, stage in enumerate(self.stages):
            path, batch_size, limit = f"stages.{stage.name}", stage.global_batch_size, model.max_text_length
            if stage.name in [other.name for other in self.stages[:index]]:
                faults.append(f"stages.{index}.name: another stage has the name '{stage.name}'")
            if batch_size % streams:
                faults.append(f"{path}.global_batch_size: {batch_size} must be a multiple of data.streams {streams}")
            if stage.max_text_length > limit:
                faults.append(f"{path}.max_text_length: {stage.max_text_length} is above model.max_text_length {limit}")
            if stage.image_size is not None:
                try:
                    self.for_stage(stage)
                except ValidationError as error:
                    messages = (fault["msg"].removeprefix("Value error, ") for fault in error.errors())
                    faults += [f"{path}.image_size: {message}" for message in messages]
            if not stage.sources or not stage.objectives:
                faults.append(f"{path}: needs at least one source and one objective")
            fewest = cluster.workers * max((objective.every for objective in stage.objectives.values()), default=1)
            if batch_size < fewest:
                expected = f"expected at least cluster.workers x every = {fewest}"
                faults.append(f"{path}.global_batch_size: {batch_size} leaves a rank without an example; {expected}")
            unknown = [name for name in stage.sources if name not in self.sources]
            faults += [f"{path}.sources: unknown source '{name}'; {known}" for name in unknown]
            types = {self.sources[name].type for name in stage.sources if name in self.sources}
            if "regions" in types and model.kind != "imagebert":
                expected = f"regions are for a model of kind imagebert, and model.kind is {model.kind}"
                faults.append(f"{path}.sources: {expected}")
            if len(types) > 1:
                expected = "all sources of a stage must have one type"
                faults.append(f"{path}.sources: of type {' and '.join(sorted(types))}; {expected}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def source_type_of(self, stage: StageConfig) -> SourceType:
        """Return the source type of a stage, which all its sources share."""
        return self.sources[next(iter(stage.sources))].type

    def stage_named(self, name: str | None) -> StageConfig:
        """Return the stage of that name, or the last one. Raises ConfigError listing the stages."""
        by_name = {stage.name: stage for stage in self.stages}
        if name is not None and name not in by_name:
            raise ConfigError(f"no stage '{name}' in this run; its stages: {', '.join(by_name)}")
        return self.stages[-1] if name is None else by_name[name]

    def for_stage(self, stage: StageConfig) -> RunConfig:
        """Return the config with `model.image_size` of the stage; a config made by this may be passed again."""
        if stage.image_size in (None, self.model.image_size):
            return self
        model = type(self.model).model_validate(self.model.model_dump() | {"image_size": stage.image_size})
        sizes = ((other, other.image_size or self.model.image_size) for other in self.stages)
        stages = tuple(other.model_copy(update={"image_size": size}) for other, size in sizes)
        return self.model_copy(update={"model": model, "stages": stages})

    def stage_start(self, index: int) -> int:
        """Return the first global step of a stage; steps count over all stages."""
        return sum(stage.steps for stage in self.stages[:index])

    @property
    def total_steps(self) -> int:
        return self.stage_start(len(self.stages))

    @property
    def folder(self) -> str:
        """URL of the run's own folder."""
        return f"{self.output.rstrip('/')}/{self.name}"
