"""Hugging Face models with random weights, and the tensors of the files that they save."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Draw all parameters at random, biases and norms too, so that each one affects the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Save the model and return the tensors of its file under their published names."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
