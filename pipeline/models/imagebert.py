"""ImageBERT (arXiv 2001.07966): BERT reads a caption's words and, after them, a detector's regions of the picture.

The trunk is Hugging Face's BERT, built from the config, so that BERT's own weights start it. A region's embedding is
the LayerNorm of four vectors: its projected feature, its projected location, the segment that says "picture", and one
position that all regions share, for they have no order.

Shapes: B rows, L tokens, R regions, F numbers of a region, K positions a row, D width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder, BertLayer

from pipeline.config.schema import ImageBERTConfig, Objective, SourceType
from pipeline.models.attention import gather
from pipeline.models.embeddings import key_padding
from pipeline.models.forward import ForwardInput, Head, Regions
from pipeline.models.heads import MaskedLanguageHead
from pipeline.models.model import HeadConfig, Model
from pipeline.models.packing import PackedInputs

PARTS = (
    "text_embedding",  # with the table of segments, whose second row the regions read
    "encoder",
    "region_embedding",
    "itm_head",
    "mlm_head",
    "moc_head",
    "mrfr_head",
)
LOCATION = 5  # numbers of `Regions.location`
PICTURE = 1  # the segment of regions; words are of segment 0

_TEXT = {"text_embedding", "encoder"}
_FUSED = _TEXT | {"region_embedding"}


class RegionEmbedding(nn.Module):
    def __init__(self, numbers: int, width: int, dropout: float, epsilon: float) -> None:
        super().__init__()
        self.feature = nn.Linear(numbers, width)
        self.location = nn.Linear(LOCATION, width)
        self.position = nn.Parameter(torch.empty(width))
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, regions: Regions, segment: Tensor) -> Tensor:
        """Features (B, R, F), locations (B, R, 5) and the segment (D,) -> (B, R, D)."""
        kind = self.position.dtype
        x = self.feature(regions.features.to(kind)) + self.location(regions.location.to(kind))
        return self.dropout(self.norm(x + segment + self.position))


class BinaryMatchingHead(nn.Module):
    """[CLS] (B, D) -> logits (B, 2) of not matched, matched: (0, z) of one z.

    Their cross-entropy is z's binary cross-entropy, the paper's loss.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, 1)

    def forward(self, cls: Tensor) -> Tensor:
        return F.pad(self.classify(cls).float(), (1, 0))


class ImageBERT(Model):
    PARTS: ClassVar = PARTS
    # Of these, BERT has only the masked-language head: a stage that starts from BERT draws the others.
    HEAD_PARTS: ClassVar = PARTS[PARTS.index("region_embedding") :]
    BLOCK: ClassVar = BertLayer

    config: ImageBERTConfig

    def __init__(self, config: ImageBERTConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        bert = bert_config(config, vocabulary)
        self.text_embedding = BertEmbeddings(bert)
        self.region_embedding = RegionEmbedding(config.region_features, config.width, config.dropout, config.norm_eps)
        self.encoder = BertEncoder(bert)
        self.itm_head = BinaryMatchingHead(config.width)
        # Not tied to the words' embedding: each parameter has one owner, which is what ZeRO-3 gathers it for.
        self.mlm_head = MaskedLanguageHead(config.width, vocabulary, config.norm_eps)
        self.moc_head = nn.Linear(config.width, config.region_classes)
        self.mrfr_head = nn.Linear(config.width, config.region_features)

    def encode(self, rows: PackedInputs) -> tuple[Tensor, None]:
        if rows.image is not None or rows.text is None or rows.text_keep is None:
            raise ValueError(
                "ImageBERT reads texts and a detector's regions, no pixels; mome shards regions makes them"
            )
        if rows.text.shape[1] > self.config.max_text_length:
            raise ValueError(
                f"a text of {rows.text.shape[1]} tokens is longer than the model's positions reach "
                f"({self.config.max_text_length}); cut the text or raise model.max_text_length"
            )
        x, keep = self.text_embedding(rows.text), rows.text_keep
        if rows.regions is not None:
            picture = torch.tensor(PICTURE, device=x.device)
            segment = self.text_embedding.token_type_embeddings(picture)
            x = torch.cat([x, self.region_embedding(rows.regions, segment)], dim=1)
            keep = torch.cat([keep, rows.regions.keep], dim=1)
        padding = key_padding(keep, x.dtype)
        x = self.encoder(x, attention_mask=padding[:, None, None, :]).last_hidden_state
        return (x if rows.output_positions is None else gather(x, rows.output_positions)), None

    def head_outputs(self, head: Head, one: ForwardInput, features: Tensor, branch: Tensor | None) -> dict[str, Tensor]:
        if head == "itm":
            return {head: self.itm_head(features[:, 0])}
        if head == "mlm":
            return {head: self.mlm_head(features)}
        if head == "moc":
            return {head: self.moc_head(features).float()}
        if head == "mrfr":
            return {head: self.mrfr_head(features).float()}
        if head == "tokens":
            return {head: features}
        raise ValueError(f"ImageBERT has no head '{head}'; it has itm, mlm, region_class, region_features and tokens")

    def part_of(self, parameter: str) -> str:
        part = parameter.split(".")[0]
        assert part in PARTS, f"{parameter} belongs to no part"
        return part

    def modules_for(self, objective: Objective, source_type: SourceType) -> frozenset[str] | None:
        """Everything reads words and regions together; masked language also reads texts by themselves, as BERT."""
        readable: dict[tuple[Objective, SourceType], set[str]] = {
            ("itm", "regions"): _FUSED | {"itm_head"},
            ("mlm", "regions"): _FUSED | {"mlm_head"},
            ("mlm", "text"): _TEXT | {"mlm_head"},
            ("moc", "regions"): _FUSED | {"moc_head"},
            ("mrfr", "regions"): _FUSED | {"mrfr_head"},
        }
        parts = readable.get((objective, source_type))
        return None if parts is None else frozenset(parts)

    def initialize_parameter(self, name: str, parameter: Tensor, seed: int) -> None:
        if name.endswith("LayerNorm.weight"):
            nn.init.ones_(parameter)
        else:
            super().initialize_parameter(name, parameter, seed)


def bert_config(config: ImageBERTConfig, vocabulary: int) -> BertConfig:
    """The trunk's own config; its defaults are BERT-base's."""
    return BertConfig(  # type: ignore[call-arg]  # `attn_implementation` is every config's, and in no signature
        vocab_size=vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_ratio * config.width,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=config.max_text_length,
        layer_norm_eps=config.norm_eps,
        pad_token_id=None,  # padding is kept out by the attention mask; a fixed id would freeze that row of the table
        attn_implementation="sdpa",
    )
