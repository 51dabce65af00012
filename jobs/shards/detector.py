"""Any detector of Hugging Face's `AutoModelForObjectDetection` (DETR and its kin, YOLOS, RT-DETR): picture to regions.

These have no pooled feature as Faster R-CNN has. A region's feature is the last hidden vector of the query that found
it, the one that its class and its box are read from: of the decoder, or of YOLOS's detection tokens. Its class is the
query's most likely one, and its confidence that class's probability.

Shapes: Q queries of the detector, D its width, C its classes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from pipeline.config.errors import ConfigError
from pipeline.data.contents.regions import RegionRecord
from pipeline.data.quarantine import BadSample


class Detector:
    """The detector in a local folder. Raises ConfigError where there is none that can be used."""

    def __init__(self, folder: Path, device: torch.device):
        check_folder(folder)
        try:
            # By Pillow, whatever else is installed: torchvision's resizing gives other pixels.
            self._prepare = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
            model = AutoModelForObjectDetection.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:  # damaged files reach transformers' and safetensors' parsers in every shape
            raise ConfigError(
                f"--detector {folder}: no detector that transformers can load ({error}). Expected what save_pretrained "
                "writes of an object-detection model and its image processor"
            ) from error
        self._model, self._device = model.eval().to(device), device

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray, most: int) -> RegionRecord:
        """The `most` regions of highest confidence of a picture (H, W, 3) uint8, in its own pixels.

        One picture at a time, because some detectors see the padding of a batch. Raises BadSample for a picture that
        the detector refuses.
        """
        try:
            inputs = self._prepare(images=picture, return_tensors="pt").to(self._device)
            output = self._model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            raise BadSample("detect", f"the detector refuses a picture of {picture.shape[:2]}: {error}") from error
        if getattr(output, "last_hidden_state", None) is None:
            raise ConfigError(f"a {type(self._model).__name__} gives no hidden vectors of its queries; use another")
        logits, boxes = output.logits[0].float(), output.pred_boxes[0].float()
        hidden = output.last_hidden_state[0, -len(logits) :].float()  # YOLOS's sequence begins with its patches
        confidences, classes = _probabilities(logits, self._model.config.num_labels).max(dim=1)
        best = torch.argsort(confidences, descending=True, stable=True)[:most]
        height, width = picture.shape[:2]
        return RegionRecord(
            features=hidden[best].cpu().numpy(),
            boxes=_corners(boxes[best], height, width).cpu().numpy(),
            image_size=(height, width),
            classes=classes[best].cpu().numpy(),
            confidences=confidences[best].cpu().numpy(),
        )


def check_folder(folder: Path) -> None:
    """Raises ConfigError when there is no such folder: nothing is ever downloaded."""
    if not folder.is_dir():
        raise ConfigError(
            f"--detector {folder}: no such folder. Expected a detector on this machine, such as "
            "`hf download facebook/detr-resnet-50 --local-dir detr` leaves; nothing is downloaded here"
        )


def detector_digest(folder: Path) -> str:
    """SHA-256 (hex) of the folder's files: what made the regions. Raises ConfigError when there is no such folder."""
    check_folder(folder)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _probabilities(logits: Tensor, classes: int) -> Tensor:
    """Of each class, (Q, C): a softmax with a last class for "nothing" (DETR, YOLOS), or a sigmoid each (its kin)."""
    return logits.softmax(dim=1)[:, :-1] if logits.shape[1] == classes + 1 else logits.sigmoid()


def _corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """Centres and sizes as shares of the picture -> x1, y1, x2, y2 in its pixels, within it: (Q, 4)."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat([centre - half, centre + half], dim=1).clamp(0, 1)
    return corners * corners.new_tensor([width, height, width, height])
