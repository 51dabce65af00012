"""What is hidden and has to be named: words, patches, and regions.

Shapes: n rows, K masked places a row, H x W pixels, P patches, p side of a patch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput, Head, drop_masked_patches
from pipeline.models.vilt import canvas_patches
from pipeline.objectives.masked_image import masked_image_loss, mean_colour_targets, pixel_targets
from pipeline.objectives.masked_language import masked_count, masked_language_loss
from pipeline.objectives.regions import masked_region_count, region_class_loss, region_features_loss
from pipeline.training.terms.term import Term, present, regions_of


class MaskedLanguage(Term):
    """Masked words, read beside their picture or regions where the source has them."""

    def count(self, rows: Batch) -> Tensor:
        return masked_count(present(rows.mask_labels))

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        fused = self.fused(rows, "masked", "mlm")
        if self.setting.source_type == "text":
            fused = replace(fused, image=None, image_size=None, visible_patches=None)
        masked = replace(
            fused,
            text=present(rows.masked_text),
            mask_positions=present(rows.mask_positions),
            regions=regions_of(rows, hidden=True),
        )
        return {"masked": masked}

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        return masked_language_loss(outputs["masked"]["mlm"], present(rows.mask_labels))


class MaskedImage(Term):
    """Masked patches of pictures: covered, or left out of the encoder where there is a decoder.

    Pictures are read by themselves; those that keep their shape (ViLT) beside their text, where the source has one.
    """

    def count(self, rows: Batch) -> Tensor | int:
        positions = present(rows.patch_positions)
        return positions.numel() if rows.image_size is None else (positions >= 0).sum()

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        one = ForwardInput(
            heads=("mim",),
            image=present(rows.image),
            image_size=rows.image_size,
            visible_patches=rows.visible_patches,
            patch_positions=present(rows.patch_positions),
            patch_replacements=rows.patch_replacements,
            drop_path_mask=self.setting.keeps(rows, "hidden"),
        )
        if rows.image_size is not None:
            one = replace(one, text=rows.text, text_keep=rows.text_keep)
        return {"hidden": one if self.stage.image_decoder is None else drop_masked_patches(one, self._grid(rows) ** 2)}

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        is_masked = None if rows.image_size is None else present(rows.patch_positions) >= 0
        return masked_image_loss(outputs["hidden"]["mim"], self._targets(rows), is_masked)

    def _targets(self, rows: Batch) -> Tensor:
        """What stands at the masked patches: (n, K) classes or tokens, or (n, K, p * p * 3) pixels."""
        image, positions = present(rows.image), present(rows.patch_positions)
        if rows.image_size is not None:
            size = self.setting.patch_size
            grid = torch.div(rows.image_size, size, rounding_mode="floor")
            positions = canvas_patches(positions.clamp(min=0), grid, image.shape[2] // size)
        if self.stage.image_target == "visual_tokens":
            tokenizer = self.setting.image_tokenizer
            assert tokenizer is not None, "the loop loads the tokenizer that the stage names"
            return tokenizer(image, self._grid(rows)).gather(1, positions)
        targets = mean_colour_targets if self.stage.image_target == "mean_colour" else pixel_targets
        return targets(image, positions, self.setting.patch_size)

    def _grid(self, rows: Batch) -> int:
        return present(rows.image).shape[1] // self.setting.patch_size


class _MaskedRegions(Term):
    """What is asked at masked regions, beside masked words where the stage learns these too: both share one pass."""

    head: ClassVar[Head]

    def count(self, rows: Batch) -> Tensor:
        return masked_region_count(present(rows.region_positions))

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        masked = replace(
            self.fused(rows, "masked", self.head),
            text=rows.text if rows.masked_text is None else rows.masked_text,
            regions=regions_of(rows, hidden=True),
            region_positions=present(rows.region_positions),
        )
        return {"masked": masked}


class RegionClass(_MaskedRegions):
    """The detector's class of masked regions (MOC)."""

    head = "moc"

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        logits = outputs["masked"][self.head]
        return region_class_loss(logits, present(rows.region_class), present(rows.region_positions))


class RegionFeatures(_MaskedRegions):
    """The feature vectors of masked regions (MRFR)."""

    head = "mrfr"

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        predicted = outputs["masked"][self.head]
        return region_features_loss(predicted, present(rows.region_features), present(rows.region_positions))
