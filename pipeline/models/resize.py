"""Resize positions that were learned at another image size or text length, by each published model's own rule.

Shapes: B images, K patches, g old grid side, h x w new grid, D width, C columns (one per layer and head),
T longest text.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.interpolate import make_interp_spline
from torch import Tensor

from pipeline.config.errors import ConfigError

# bicubic: VLMo's and ALBEF's. bilinear: ViLT's, with aligned corners, which equals ViT's `scipy.ndimage.zoom`.
GridRule = Literal["bicubic", "bilinear"]

CLS_ROWS = 3  # the last rows of a table: patch (or word) from [CLS], [CLS] from it, [CLS] from itself


def resize_grid(positions: Tensor, grid: int | tuple[int, int], rule: GridRule) -> Tensor:
    """Resize absolute positions of [CLS] and a square grid (1 + g², D) to another grid: (1 + h w, D); [CLS] stays."""
    height, width = (grid, grid) if isinstance(grid, int) else grid
    side = round((len(positions) - 1) ** 0.5)
    if (side, side) == (height, width):
        return positions
    square = rearrange(positions[1:], "(h w) d -> 1 d h w", h=side)
    resized = F.interpolate(square, (height, width), mode=rule, align_corners=rule == "bilinear")
    return torch.cat([positions[:1], rearrange(resized, "1 d h w -> (h w) d")])


def resized_positions(positions: Tensor, patches: Tensor, grid: Tensor) -> Tensor:
    """Interpolate positions (g², D) bilinearly at `patches` (B, K) of images with `grid` (B, 2): (B, K, D)."""
    side, columns = round(len(positions) ** 0.5), grid[:, 1:]
    points = torch.arange(side, device=positions.device)
    hats = []  # (B, K, g): weights of the rows and of the columns of points
    rows = torch.div(patches, columns, rounding_mode="floor")
    for index, count in ((rows, grid[:, :1]), (patches % columns, columns)):
        position = index * ((side - 1) / (count - 1).clamp(min=1))
        hats.append((1 - (position.unsqueeze(-1) - points).abs()).clamp(min=0))
    weights = (hats[0].unsqueeze(-1) * hats[1].unsqueeze(-2)).flatten(2)  # (B, K, g²)
    return weights.to(positions.dtype) @ positions


def resize_relative_grid(table: Tensor, grid: int) -> Tensor:
    """Resize a relative table of a square grid ((2g - 1)² + 3, C) to ((2 grid - 1)² + 3, C), as BEiT and VLMo do.

    Old distances are laid out in geometric progression, so that the farthest old one falls on the farthest new one. A
    cubic spline interpolates between them, and its edge value extrapolates. Toward a smaller grid the ratio ends at its
    lower bound: distances keep their meaning, and far ones are dropped.
    """
    old, new = round((len(table) - CLS_ROWS) ** 0.5), 2 * grid - 1
    if old == new:
        return table
    low, high = 1.01, 1.5  # between which BEiT searches its geometric ratio
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    away = np.cumsum(ratio ** np.arange(old // 2))
    knots = np.concatenate([-away[::-1], [0.0], away])
    # FITPACK's spline, as in SciPy's former `interp2d`: not-a-knot, constant outside the knots, linear in the values at
    # the knots, the same down and across. Fewer than four knots give the highest degree they allow.
    spline = make_interp_spline(knots, np.eye(old), k=min(3, old - 1))
    weights = torch.from_numpy(spline(np.clip(np.arange(new) - new // 2, knots[0], knots[-1])))  # (new, old)
    square = rearrange(table[:-CLS_ROWS].double(), "(y x) c -> y x c", y=old)
    resized = torch.einsum("ay, bx, yxc -> abc", weights, weights, square)
    return torch.cat([resized.flatten(0, 1).to(table.dtype), table[-CLS_ROWS:]])


def resize_text_distances(table: Tensor, max_text_length: int) -> Tensor:
    """Resize a relative table of texts (2T, C) to (2 max_text_length, C); distances beyond it take its farthest row."""
    distances, cls = table[:-CLS_ROWS], table[-CLS_ROWS:]
    centre = len(distances) // 2
    rows = torch.arange(2 * max_text_length - CLS_ROWS, device=table.device) - (max_text_length - 2) + centre
    return torch.cat([distances[rows.clamp(0, len(distances) - 1)], cls])


def cut_text_positions(positions: Tensor, max_text_length: int) -> Tensor:
    """Cut absolute text positions (T, D) to (max_text_length, D). Raises ConfigError where the weights have fewer."""
    if max_text_length > len(positions):
        raise ConfigError(
            f"model.max_text_length: {max_text_length}, but the weights have absolute positions of {len(positions)} "
            "tokens; lower it to that"
        )
    return positions[:max_text_length]
