"""Detectors of Hugging Face's `AutoModelForObjectDetection` (DETR and its relatives, YOLOS, RT-DETR).

Unlike Faster R-CNN, these have no pooled region feature. The feature of a region is the last hidden vector of its query
(of the decoder, or of YOLOS's detection tokens), from which its class and box are predicted. Its class is the query's
most likely one, and its confidence that class's probability.

Shapes: Q queries of the detector, D its width, C its classes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from pipeline.config.errors import ConfigError
from pipeline.data.contents.regions import RegionRecord
from pipeline.data.quarantine import BadSample


class Detector:
    """Detector of a local folder. Raises ConfigError if the folder has none that can be used."""

    def __init__(self, folder: Path, device: torch.device):
        check_folder(folder)
        try:
            # Pillow, whatever else is installed, because torchvision's resizing gives other pixels.
            self._prepare = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
            model = AutoModelForObjectDetection.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:  # damaged files cause every kind of error in transformers and safetensors
            raise ConfigError(
                f"--detector {folder}: no detector that transformers can load ({error}). Expected the files that "
                "save_pretrained writes for an object-detection model and its image processor"
            ) from error
        self._model, self._device = model.eval().to(device), device

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, max_regions: int) -> RegionRecord:
        """Return the regions of highest confidence of an image (H, W, 3) uint8, in its own pixels.

        Images are processed one by one, because some detectors attend to the padding of a batch. Raises BadSample for
        an image that the detector refuses.
        """
        try:
            inputs = self._prepare(images=image, return_tensors="pt").to(self._device)
            output = self._model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            raise BadSample("detect", f"the detector refuses an image of {image.shape[:2]}: {error}") from error
        if getattr(output, "last_hidden_state", None) is None:
            raise ConfigError(f"{type(self._model).__name__} returns no hidden vectors of its queries; use another")
        logits, boxes = output.logits[0].float(), output.pred_boxes[0].float()
        hidden = output.last_hidden_state[0, -len(logits) :].float()  # YOLOS's sequence begins with its patches
        # (Q, C): a softmax with a last class for "nothing" (DETR, YOLOS), or sigmoids (RT-DETR and others).
        has_nothing = logits.shape[1] == self._model.config.num_labels + 1
        probabilities = logits.softmax(dim=1)[:, :-1] if has_nothing else logits.sigmoid()
        confidences, classes = probabilities.max(dim=1)
        best = torch.argsort(confidences, descending=True, stable=True)[:max_regions]
        height, width = image.shape[:2]
        # Centres and sizes relative to the image -> x1, y1, x2, y2 in its pixels, clipped to it.
        centre, half = boxes[best, :2], boxes[best, 2:] / 2
        corners = torch.cat([centre - half, centre + half], dim=1).clamp(0, 1)
        return RegionRecord(
            features=hidden[best].cpu().numpy(),
            boxes=(corners * corners.new_tensor([width, height, width, height])).cpu().numpy(),
            image_size=(height, width),
            classes=classes[best].cpu().numpy(),
            confidences=confidences[best].cpu().numpy(),
        )


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless the folder exists; nothing is ever downloaded."""
    if not folder.is_dir():
        raise ConfigError(
            f"--detector {folder}: no such folder. Expected a detector on this machine, such as the folder that "
            "`hf download facebook/detr-resnet-50 --local-dir detr` writes; nothing is downloaded here"
        )


def detector_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of the folder's files. Raise ConfigError unless the folder exists."""
    check_folder(folder)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
