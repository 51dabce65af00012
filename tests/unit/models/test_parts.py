"""Parts of the models compared with independent computations: the block, relative positions, rules for resizing."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline
from scipy.ndimage import zoom
from torch import Tensor
from torch.testing import assert_close

from pipeline.config.errors import ConfigError
from pipeline.models.embeddings import RelativePositions
from pipeline.models.multiway import MultiwayBlock
from pipeline.models.resize import cut_text_positions, resize_grid, resize_relative_grid, resize_text_distances

GRID, TEXT, LAYERS, HEADS = 3, 6, 2, 2
GRIDS = [(14, 24), (14, 30), (24, 14), (7, 12), (3, 4)]


def randomised(module: torch.nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def block(layer_scale: float | None = 0.3, drop_path: float = 0.25) -> MultiwayBlock:
    module = MultiwayBlock(8, 2, 2, ("vision", "language", "vision_language"), layer_scale, drop_path)
    randomised(module, 0.5)
    return module


def test_each_span_is_read_by_its_expert_selected_positions_equal_all_and_examples_drop_branches_by_a_mask() -> None:
    module, x = block(), torch.randn(2, 6, 8)
    split = module(x, {"language": slice(0, 2), "vision": slice(2, None)})
    for expert, span in (("language", slice(0, 2)), ("vision", slice(2, None))):
        assert_close(split[:, span], module(x, {expert: slice(None)})[:, span])
    module.zero_grad()
    split.sum().backward()
    idle = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert idle == {name for name, _ in module.named_parameters() if "vision_language" in name}
    bias, read, keep = torch.randn(2, 6, 6), torch.tensor([[0, 3], [5, 1]]), torch.tensor([[True, False], [True, True]])
    whole = module(x, {"vision": slice(None)}, bias, None, keep)
    chosen = module(x, {"vision": slice(None)}, bias, None, keep, read)
    assert_close(chosen, torch.stack([whole[0, [0, 3]], whole[1, [5, 1]]]))
    x = torch.randn(4, 6, 8)
    keep = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    out = module(x, {"vision": slice(None)}, drop_path_mask=keep)
    attended = (
        x + module.attention_gamma * module.attention(module.norm(x), {"vision": slice(None)}, None, None, None) / 0.75
    )
    attended = torch.where(keep[:, :1, None], attended, x)
    fed = attended + module.expert_gamma * module.experts["vision"](attended) / 0.75
    assert_close(out, torch.where(keep[:, 1:, None], fed, attended))
    assert torch.equal(out[3], x[3])
    x, route = x[:2], {"vision": slice(None)}
    assert torch.equal(block(drop_path=0.25)(x, route), block(drop_path=0.0)(x, route)), "it needs a mask"
    assert torch.equal(block(None, 1.0)(x, route, drop_path_mask=torch.zeros(2, 2, dtype=torch.bool)), x)


def test_pairs_of_equal_offset_share_a_row_cls_has_its_own_and_each_cross_direction_one_value() -> None:
    module = RelativePositions(LAYERS, HEADS, GRID, TEXT)
    patches, words = module.image_index, module.text_index
    assert patches.shape == (10, 10)
    assert patches[1, 2] == patches[4, 5] == patches[8, 9] != patches[2, 1]
    assert patches[1, 4] == patches[6, 9]
    assert patches[1:, 1:].unique().tolist() == list(range(25))
    assert words[1, 3] == words[2, 4] == words[1, 2] + 1
    assert words[1:, 1:].unique().tolist() == list(range(9))
    for index, first in ((patches, 25), (words, 9)):
        assert (set(index[0, 1:].tolist()), set(index[1:, 0].tolist())) == ({first}, {first + 1})
        assert index[0, 0] == first + 2
    randomised(module)
    bias = module(4, True)
    kept = torch.tensor([0, 1, 2, 3, *range(6, 16)])  # a longer text keeps them
    assert torch.equal(module(6, True)[:, :, kept][:, :, :, kept], bias)
    assert torch.equal(module(6, False)[:, :, :4, :4], module(4, False))
    assert bias.shape == (LAYERS, HEADS, 14, 14)
    assert torch.equal(bias[:, :, :4, :4], module(4, False))
    assert torch.equal(bias[:, :, 4:, 4:], module(0, True))
    to_image, to_text = module.cross.view(2, LAYERS, HEADS)
    assert (bias[:, :, :4, 4:] == to_image[:, :, None, None]).all()
    assert (bias[:, :, 4:, :4] == to_text[:, :, None, None]).all()
    assert torch.equal(module(1, False)[1, :, 0, 0], module.text[-1, HEADS:]), "columns are layers, then heads"


def positions(grid: int, width: int = 3) -> Tensor:
    return torch.randn(1 + grid**2, width, generator=torch.Generator().manual_seed(grid))


def table(grid: int, columns: int = 4) -> Tensor:
    return torch.randn((2 * grid - 1) ** 2 + 3, columns, generator=torch.Generator().manual_seed(grid))


def square(rows: Tensor) -> np.ndarray:
    side = math.isqrt(len(rows))
    return rows.reshape(side, side, -1).double().numpy()


def close(actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.numpy(), expected.reshape(actual.shape), rtol=1e-5, atol=1e-5)


def bicubic(image: np.ndarray, new: int, a: float = -0.75) -> np.ndarray:
    """Interpolate between pixel centres with repeated borders, one tap of Keys's kernel (torch's `a`) at a time."""
    old = len(image)
    weights = np.zeros((new, old))
    for row, place in enumerate((np.arange(new) + 0.5) * old / new - 0.5):
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - tap)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[row, min(max(tap, 0), old - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return np.einsum("ay,bx,yxd->abd", weights, weights, image)


def geometric_by_roots(old: int, new: int) -> np.ndarray:
    """Return BEiT's progression, with its ratio from a polynomial's root instead of bisection.

    The root is rounded to the middle of the cell that bisection reaches in its 19th step.
    """
    steps = old // 2
    roots = np.roots([*np.ones(steps - 1), 1 - new // 2])
    root = next(root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 0)
    cell = (1.5 - 1.01) / 2**18
    ratio = 1.01 + (min(max(math.floor((root - 1.01) / cell), 0), 2**18 - 1) + 0.5) * cell
    away = [sum(ratio**power for power in range(n + 1)) for n in range(steps)]
    return np.array([-distance for distance in reversed(away)] + [0.0] + away)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_tables_equal_fitpacks_spline_and_grids_keys_kernel_or_ndimage_zoom(old: int, new: int) -> None:
    """`interp2d(kind='cubic')` on a grid called the FITPACK routine that RectBivariateSpline calls (regrid_smth)."""
    before, after = table(old), resize_relative_grid(table(old), new)
    assert after.shape == ((2 * new - 1) ** 2 + 3, before.shape[1])
    places, wanted = geometric_by_roots(2 * old - 1, 2 * new - 1), np.arange(-(new - 1), new - 1 + 0.1, 1.0)
    if 7 <= old < new:  # where the ratio is within its bounds
        assert places[-1] == pytest.approx(new - 1, abs=1e-3), "the largest distance stays the largest"
    for column in range(before.shape[1]):
        spline = RectBivariateSpline(places, places, square(before[:-3])[..., column], kx=3, ky=3, s=0)
        close(after[:-3, column], spline(wanted, wanted))
    assert torch.equal(after[-3:], before[-3:])
    before = positions(old)
    after = resize_grid(before, new, "bicubic")
    close(after[1:], bicubic(square(before[1:]), new))
    assert torch.equal(after[0], before[0])
    for grid in ((new, new), (new, old + 1)):  # which need not stay square
        zoomed = zoom(square(before[1:]), (grid[0] / old, grid[1] / old, 1), order=1)
        close(resize_grid(before, grid, "bilinear")[1:], zoomed)


def test_equal_sizes_change_nothing_words_keep_the_bias_of_their_distance_and_absolute_positions_are_cut() -> None:
    for small, larger in ((2, 3), (1, 4), (2, 1)):  # too small for a cubic
        after = resize_relative_grid(table(small), larger)
        assert len(after) == (2 * larger - 1) ** 2 + 3
        assert after.isfinite().all()
    for size in (1, 2, 5):
        words = torch.arange(2.0 * size + 4)[:, None]
        assert torch.equal(resize_relative_grid(table(size), size), table(size))
        assert torch.equal(resize_grid(positions(size), size, "bicubic"), positions(size))
        assert torch.equal(resize_text_distances(words, size + 2), words)
    for old, new in ((12, 7), (7, 12), (5, 9)):
        before = torch.randn(2 * old, 4)
        tables, shared = {old: before, new: resize_text_distances(before, new)}, min(old, new)
        read_before, read_after = (rows[RelativePositions(1, 1, 1, n).text_index] for n, rows in tables.items())
        assert torch.equal(read_before[:shared, :shared], read_after[:shared, :shared])
        if new > old:  # unknown distances have the bias of the largest known
            assert torch.equal(read_after[1, new - 1], read_before[1, old - 1])
            assert torch.equal(read_after[new - 1, 1], read_before[old - 1, 1])
    absolute = positions(3)
    assert torch.equal(cut_text_positions(absolute, 4), absolute[:4])
    with pytest.raises(ConfigError, match=r"max_text_length: 11, but the weights have absolute positions of 10 tokens"):
        cut_text_positions(absolute, 11)
