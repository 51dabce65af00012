"""Drop path by counter: which branches a row keeps is a hash of what the row is, never generator state (C2).

Any second forward of a row, on any rank and in any micro-batch, drops the same branches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.data.randomness import hash64, uniform_array


def drop_path_mask(seed: int, step: int, place: Tensor, name: str, rates: tuple[float, ...]) -> Tensor | None:
    """(B, N, 2) bool: row by row, layer by layer, whether (attention, feed-forward) are kept in pass `name`.

    `place` (B,) are the rows' positions in the global batch, `rates` the N layers' drop rates.
    """
    if not any(rates):
        return None
    layers = len(rates)
    branch = np.arange(2 * layers, dtype=np.uint64)
    counters = place.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(2 * layers) + branch
    uniform = uniform_array(hash64(seed, step, name, "drop path"), counters).reshape(-1, layers, 2)
    return torch.from_numpy(uniform >= np.asarray(rates)[:, None])
