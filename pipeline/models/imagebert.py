"""ImageBERT (arXiv 2001.07966): BERT over a caption's words, followed by a detector's regions of the image.

The encoder is Hugging Face's BERT, so that BERT's own weights can start it. Regions have no order and share a position.

Shapes: B examples, L tokens, R regions, F features of a region, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder, BertLayer

from pipeline.config.schema import ImageBERTConfig
from pipeline.models.forward import PackedInputs, Regions
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import gather, key_padding, named_layers

# The text embedding has the table of segments, whose second row the regions read.
_FUSED = frozenset({"text_embedding", "encoder", "region_embedding"})


class RegionEmbedding(nn.Module):
    def __init__(self, features: int, width: int, dropout: float, epsilon: float) -> None:
        super().__init__()
        self.feature = nn.Linear(features, width)
        self.location = nn.Linear(5, width)
        self.position = nn.Parameter(torch.empty(width))
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, regions: Regions, segment: Tensor) -> Tensor:
        """Features (B, R, F), locations (B, R, 5) and the segment (D,) -> (B, R, D)."""
        dtype = self.position.dtype
        x = self.feature(regions.features.to(dtype)) + self.location(regions.location.to(dtype))
        return self.dropout(self.norm(x + segment + self.position))


class ImageBERT(Model):
    # BERT's checkpoints have only the masked-language head of these; a stage that starts from BERT draws the others.
    HEAD_PARTS: ClassVar = ("region_embedding", "itm_head", "mlm_head", "moc_head", "mrfr_head")
    PARTS: ClassVar = ("text_embedding", "encoder", *HEAD_PARTS)
    ENCODER_PARTS: ClassVar = {
        frozenset({"regions", "text"}): _FUSED,
        frozenset({"text"}): _FUSED - {"region_embedding"},
    }
    HEADS: ClassVar = ("itm", "mlm", "moc", "mrfr")
    BLOCK: ClassVar = BertLayer

    config: ImageBERTConfig
    text_embedding: BertEmbeddings

    def __init__(self, config: ImageBERTConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, epsilon = config.width, config.norm_eps
        bert = BertConfig(  # type: ignore[call-arg]  # `attn_implementation` belongs to every config and to no signature
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_ratio * width,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=config.max_text_length,
            layer_norm_eps=epsilon,
            pad_token_id=None,  # the attention mask excludes padding; a fixed id would freeze that row of the table
            attn_implementation="sdpa",
        )
        self.text_embedding = BertEmbeddings(bert)
        self.region_embedding = RegionEmbedding(config.region_features, width, config.dropout, epsilon)
        self.encoder = BertEncoder(bert)
        self.build_heads(
            vocabulary,
            epsilon,
            region_embedding=self.region_embedding,
            # Logits (0, z) of (not matched, matched): their cross-entropy is the binary one of z, the paper's loss.
            itm_head=named_layers(classify=nn.Linear(width, 1), pad=nn.ConstantPad1d((1, 0), 0.0)),
            moc_head=nn.Linear(width, config.region_classes),
            mrfr_head=nn.Linear(width, config.region_features),
        )

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        if packed.image is not None or packed.text is None or packed.text_keep is None:
            raise ValueError(
                "ImageBERT reads texts and a detector's regions, no pixels; add regions with `mome shards regions`"
            )
        x, keep = self.text_embedding(packed.text), packed.text_keep
        if packed.regions is not None:
            # Words are of segment 0.
            segment = self.text_embedding.token_type_embeddings(torch.tensor(1, device=x.device))
            x = torch.cat([x, self.region_embedding(packed.regions, segment)], dim=1)
            keep = torch.cat([keep, packed.regions.keep], dim=1)
        padding, count = key_padding(keep, x.dtype), len(x)
        if not count:  # BERT cannot view an empty batch, and every rank must run the same graph (contract C3)
            x, padding = F.pad(x, (0, 0, 0, 0, 0, 1)), F.pad(padding, (0, 0, 0, 1))
        x = self.encoder(x, attention_mask=padding[:, None, None, :]).last_hidden_state[:count]
        return (x if packed.output_positions is None else gather(x, packed.output_positions)), None
