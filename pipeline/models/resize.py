"""Positions learnt at one picture size or text length, made to serve another. Each published model has its own rule.

Shapes: g old grid side, h x w new grid, D width, C columns (a head of a layer each), T longest text.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.interpolate import make_interp_spline
from torch import Tensor

from pipeline.config.errors import ConfigError

# bicubic: VLMo's and ALBEF's. bilinear: ViLT's, whose corners are aligned; `scipy.ndimage.zoom` of order 1, by which
# ViT's JAX release resizes, computes the same.
GridRule = Literal["bicubic", "bilinear"]

CLS_ROWS = 3  # after a table's distances: patch (or word) from [CLS], [CLS] from it, [CLS] from itself
CUBIC = 3
RATIO_BOUNDS = (1.01, 1.5)  # that BEiT looks for its geometric ratio in
RATIO_PRECISION = 1e-6


def resize_grid(positions: Tensor, grid: int | tuple[int, int], rule: GridRule) -> Tensor:
    """Absolute positions of [CLS] and a square grid (1 + g², D), for another grid: (1 + h w, D). [CLS] stays."""
    height, width = (grid, grid) if isinstance(grid, int) else grid
    side = round((len(positions) - 1) ** 0.5)
    if (side, side) == (height, width):
        return positions
    square = rearrange(positions[1:], "(h w) d -> 1 d h w", h=side)
    resized = F.interpolate(square, (height, width), mode=rule, align_corners=rule == "bilinear")
    return torch.cat([positions[:1], rearrange(resized, "1 d h w -> (h w) d")])


def resize_relative_grid(table: Tensor, grid: int) -> Tensor:
    """A relative table of a square grid ((2g - 1)² + 3, C), for another grid: ((2 grid - 1)² + 3, C). BEiT and VLMo.

    The old distances are laid out at growing steps, in geometric progression, so that the farthest old one falls on
    the farthest new one and near distances keep their meaning; between them a cubic spline is read, and beyond them
    its edge. Toward a smaller grid the ratio ends at its lower bound: distances keep their meaning, far ones are cut.
    """
    old, new = round((len(table) - CLS_ROWS) ** 0.5), 2 * grid - 1
    if old == new:
        return table
    spread = spline_weights(geometric_distances(old, new), np.arange(new) - new // 2)
    weights = torch.from_numpy(spread)  # (new, old), the same down and across
    square = rearrange(table[:-CLS_ROWS].double(), "(y x) c -> y x c", y=old)
    resized = torch.einsum("ay, bx, yxc -> abc", weights, weights, square)
    return torch.cat([resized.flatten(0, 1).to(table.dtype), table[-CLS_ROWS:]])


def geometric_distances(old: int, new: int) -> np.ndarray:
    """Where BEiT puts the `old` distances -n … n of a table that is to have `new`: (old,) float64."""
    low, high = RATIO_BOUNDS
    while high - low > RATIO_PRECISION:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    away = np.cumsum(ratio ** np.arange(old // 2))
    return np.concatenate([-away[::-1], [0.0], away])


def spline_weights(places: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The linear map from values at `places` (n,) to their interpolating cubic spline at `asked` (m,): (m, n).

    The spline is FITPACK's, which SciPy's former `interp2d` and `RectBivariateSpline` use: not-a-knot, and outside
    the places it keeps its value at the edge. Fewer than four places give the highest degree that they allow.
    """
    spline = make_interp_spline(places, np.eye(len(places)), k=min(CUBIC, len(places) - 1))
    return spline(np.clip(asked, places[0], places[-1]))


def resize_text_distances(table: Tensor, max_text_length: int) -> Tensor:
    """A relative table of texts (2T, C), for another longest text: (2 max_text_length, C).

    Distances keep their rows; ones farther than the table knew are as the farthest it did.
    """
    distances, cls = table[:-CLS_ROWS], table[-CLS_ROWS:]
    centre = len(distances) // 2
    asked = torch.arange(2 * max_text_length - CLS_ROWS, device=table.device) - (max_text_length - 2) + centre
    return torch.cat([distances[asked.clamp(0, len(distances) - 1)], cls])


def cut_text_positions(positions: Tensor, max_text_length: int) -> Tensor:
    """Absolute positions of texts (T, D), for shorter ones: (max_text_length, D).

    Raises ConfigError for longer ones, whose positions nobody learnt.
    """
    if max_text_length > len(positions):
        raise ConfigError(
            f"model.max_text_length: {max_text_length}, but the weights have {len(positions)} absolute positions; "
            "lower it to that"
        )
    return positions[:max_text_length]
