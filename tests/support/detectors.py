"""A tiny random detector."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

FEATURES = 16  # width of its region features


def save_yolos(folder: Path) -> Path:
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=FEATURES, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=12, num_labels=5,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder)
    return folder
