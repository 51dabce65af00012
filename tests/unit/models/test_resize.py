"""Each rule for resizing positions equals an independent computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline
from scipy.ndimage import zoom
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.models.embeddings import RelativePositions
from pipeline.models.resize import (
    cut_text_positions,
    resize_grid,
    resize_relative_grid,
    resize_text_distances,
)

GRIDS = [(14, 24), (14, 30), (24, 14), (7, 12), (3, 4)]


def positions(grid: int, width: int = 3) -> Tensor:
    return torch.randn(1 + grid**2, width, generator=torch.Generator().manual_seed(grid))


def table(grid: int, columns: int = 4) -> Tensor:
    return torch.randn((2 * grid - 1) ** 2 + 3, columns, generator=torch.Generator().manual_seed(grid))


def square(rows: Tensor) -> np.ndarray:
    side = math.isqrt(len(rows))
    return rows.reshape(side, side, -1).double().numpy()


def close(actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.numpy(), expected.reshape(actual.shape), rtol=1e-5, atol=1e-5)


# ---- absolute grids


def cubic_kernel(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Return Keys's convolution kernel with the constant of torch and OpenCV."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def bicubic(image: np.ndarray, new: int) -> np.ndarray:
    """Interpolate between pixel centres with repeated borders, one tap at a time."""
    old = len(image)
    places = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for row, place in enumerate(places):
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[row, min(max(tap, 0), old - 1)] += cubic_kernel(np.array(place - tap))
    return np.einsum("ay,bx,yxd->abd", weights, weights, image)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_bicubic_grid_equals_keys_kernel_tap_by_tap(old: int, new: int) -> None:
    before = positions(old)
    after = resize_grid(before, new, "bicubic")
    close(after[1:], bicubic(square(before[1:]), new))
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_bilinear_grid_equals_ndimage_zoom_of_order_1(old: int, new: int) -> None:
    before = positions(old)
    close(resize_grid(before, new, "bilinear")[1:], zoom(square(before[1:]), (new / old, new / old, 1), order=1))


def test_a_grid_need_not_stay_square() -> None:
    before = positions(4)
    close(resize_grid(before, (3, 6), "bilinear")[1:], zoom(square(before[1:]), (3 / 4, 6 / 4, 1), order=1))


# ---- relative tables


def geometric_by_roots(old: int, new: int) -> np.ndarray:
    """Return BEiT's progression, with its ratio from a polynomial's root instead of bisection.

    The root is rounded to the middle of the cell that bisection reaches in its 19th step.
    """
    steps, reach = old // 2, new // 2
    roots = np.roots([*np.ones(steps - 1), 1 - reach])
    root = next(root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 0)
    cell = (1.5 - 1.01) / 2**18
    ratio = 1.01 + (min(max(math.floor((root - 1.01) / cell), 0), 2**18 - 1) + 0.5) * cell
    away = [sum(ratio**power for power in range(n + 1)) for n in range(steps)]
    return np.array([-each for each in reversed(away)] + [0.0] + away)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_relative_table_equals_fitpacks_bivariate_spline(old: int, new: int) -> None:
    """`interp2d(kind='cubic')` on a grid called the FITPACK routine that RectBivariateSpline calls (regrid_smth)."""
    before = table(old)
    after = resize_relative_grid(before, new)
    assert after.shape == ((2 * new - 1) ** 2 + 3, before.shape[1])
    places = geometric_by_roots(2 * old - 1, 2 * new - 1)
    asked = np.arange(-(new - 1), new - 1 + 0.1, 1.0)
    for column in range(before.shape[1]):
        spline = RectBivariateSpline(places, places, square(before[:-3])[..., column], kx=3, ky=3, s=0)
        np.testing.assert_allclose(after[:-3, column].numpy(), spline(asked, asked).ravel(), rtol=1e-5, atol=1e-5)
    assert torch.equal(after[-3:], before[-3:])


def test_smooth_function_of_distance_is_preserved() -> None:
    """A bias that is a function of distance is the same function on the new grid."""
    old, new = 14, 24
    places = geometric_by_roots(2 * old - 1, 2 * new - 1)
    falling = np.exp(-np.abs(places) / 5)
    rows = torch.from_numpy(np.outer(falling, falling).ravel()).unsqueeze(1)
    after = resize_relative_grid(torch.cat([rows, torch.zeros(3, 1)]), new)
    index = RelativePositions(1, 1, new, 2).image_index[1:, 1:]
    apart = torch.arange(new**2)
    row_distance = (apart[:, None] // new - apart[None] // new).abs()
    column_distance = (apart[:, None] % new - apart[None] % new).abs()
    expected = torch.exp(-(row_distance + column_distance) / 5)
    assert (after[index].squeeze(-1) - expected).abs().max() < 0.06  # a cubic cannot represent the kink at 0


@pytest.mark.parametrize(("old", "new"), [(2, 3), (1, 4), (2, 1)])
def test_tables_too_small_for_a_cubic_are_resized(old: int, new: int) -> None:
    after = resize_relative_grid(table(old), new)
    assert len(after) == (2 * new - 1) ** 2 + 3
    assert after.isfinite().all()


@pytest.mark.parametrize("old", [1, 2, 5])
def test_equal_size_changes_nothing(old: int) -> None:
    assert torch.equal(resize_relative_grid(table(old), old), table(old))
    assert torch.equal(resize_grid(positions(old), old, "bicubic"), positions(old))
    assert torch.equal(
        resize_text_distances(torch.arange(2.0 * old + 4)[:, None], old + 2), torch.arange(2.0 * old + 4)[:, None]
    )


# ---- texts


@pytest.mark.parametrize(("old", "new"), [(12, 7), (7, 12)])
def test_words_keep_the_bias_of_their_distance(old: int, new: int) -> None:
    before = torch.randn(2 * old, 4)
    after = resize_text_distances(before, new)
    shared = min(old, new)
    read_before, read_after = (
        before[RelativePositions(1, 1, 1, old).text_index],
        after[RelativePositions(1, 1, 1, new).text_index],
    )
    assert torch.equal(read_before[:shared, :shared], read_after[:shared, :shared])


def test_unknown_distances_have_the_bias_of_the_largest_known() -> None:
    before = torch.randn(2 * 5, 4)
    after = resize_text_distances(before, 9)[RelativePositions(1, 1, 1, 9).text_index]
    known = before[RelativePositions(1, 1, 1, 5).text_index]
    assert torch.equal(after[1, 8], known[1, 4])
    assert torch.equal(after[8, 1], known[4, 1])


def test_absolute_text_positions_are_cut_but_not_extended() -> None:
    before = positions(3)
    assert torch.equal(cut_text_positions(before, 4), before[:4])
    with pytest.raises(
        ConfigError, match=r"model.max_text_length: 11, but the weights have absolute positions of 10 tokens"
    ):
        cut_text_positions(before, 11)
