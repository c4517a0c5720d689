"""Relative position bias: the index, the table, the geometric resize to another grid (BEiT+).

One learned number a head for every offset (dy, dx) between two patches, with three extra rows for the
class token: class -> patch, patch -> class, class -> class, in this order at the end of the table.

Shapes: (h, w) patch grid, N = 1 + h*w tokens, R = (2h-1)(2w-1) + 3 table rows, H heads.
A table is (R, H); an index is (N, N) int64; a gathered bias is (H, N, N).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

Grid = tuple[int, int]

# The three rows after the (2h-1)(2w-1) offsets, counted from the end of the table.
CLASS_ROWS = 3


def num_relative_distance(grid: Grid) -> int:
    """Rows of the bias table of a patch grid: (2h-1)(2w-1) + 3."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + CLASS_ROWS


def relative_position_index(grid: Grid) -> Tensor:
    """The table row each pair of tokens reads: (N, N) int64, [query, key]; token 0 is the class token."""
    h, w = grid
    rows = num_relative_distance(grid)
    y, x = torch.arange(h), torch.arange(w)
    dy = y[:, None] - y + h - 1  # (h, h), [query, key]
    dx = x[:, None] - x + w - 1
    patches = (dy[:, None, :, None] * (2 * w - 1) + dx[:, None, :]).reshape(h * w, h * w)
    from_class = torch.full((1, h * w), rows - 3)
    to_class = torch.full((h * w, 1), rows - 2)
    corner = torch.full((1, 1), rows - 1)
    return torch.cat([torch.cat([corner, from_class], 1), torch.cat([to_class, patches], 1)])


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Read the (R, H) table at an (N, N) index: the (H, N, N) bias that is added to attention logits."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()


def aligned(bias: Tensor, to: int = 8) -> Tensor:
    """The same (..., N, N) bias, with rows that begin at multiples of `to` numbers.

    CUDA's fused attention takes such a bias as it is; any other it copies into one, at each call.
    """
    keys = bias.shape[-1]
    return nn.functional.pad(bias, (0, -keys % to))[..., :keys]


class RelativePositionBias(nn.Module):
    """The one table that all blocks share during pre-training."""

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(num_relative_distance(grid), num_heads)
        )


# --- Geometric resize (what lets a 224-pixel table serve at 384) ---------------------------------
#
# Neighbouring offsets matter most, so they keep their place; far ones are spread by a geometric
# sequence until the outermost reaches the new edge. A cubic spline through the table at those places
# is then read at every whole offset of the new grid. The spline is linear in the table, so a resize
# is one small matrix a side.


def resize_bias_table(table: Tensor, source: Grid, target: Grid) -> Tensor:
    """Resize an (R, H) bias table from one patch grid to another, rectangles too.

    The class rows are kept as they are. Computed in float64, returned in the table's dtype, and
    differentiable. Square grids give what the original code gives; for a rectangle each side follows
    the same rule (the original refuses).
    """
    if source == target:
        return table
    rows = len(table)
    if rows != num_relative_distance(source):
        raise ValueError(
            f"a bias table for a {source[0]} x {source[1]} grid has {num_relative_distance(source)} "
            f"rows; this one has {rows}"
        )
    to_y = _spline_matrix(2 * source[0] - 1, 2 * target[0] - 1).to(table.device)
    to_x = _spline_matrix(2 * source[1] - 1, 2 * target[1] - 1).to(table.device)
    return resize_bias_by(table, to_y, to_x)


def resize_bias_by(table: Tensor, to_y: Tensor, to_x: Tensor) -> Tensor:
    """As above, by spline matrices (target, source) of the offsets of each side, in their dtype."""
    offsets = table[:-CLASS_ROWS].to(to_y.dtype).unflatten(0, (to_y.shape[1], to_x.shape[1]))
    resized = torch.einsum("ay,yxh,bx->abh", to_y, offsets, to_x).flatten(0, 1)
    return torch.cat([resized.to(table.dtype), table[-CLASS_ROWS:]])


def geometric_ratio(source_side: int, target_side: int) -> float:
    """The ratio q whose sum 1 + q + q^2 + ... over half the source side reaches half the target side.

    Found by bisection on [1.01, 1.5] to 1e-6; the last midpoint is the answer, also at the limits.
    """
    num_source, num_target = source_side // 2, target_side // 2
    low, high = 1.01, 1.5
    q = low
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**num_source) / (1 - q) > num_target:
            high = q
        else:
            low = q
    return q


def geometric_coordinates(source_side: int, target_side: int) -> np.ndarray:
    """Where the source offsets lie on the target's axis: 0, ±1, ±(1+q), ±(1+q+q²), ... (float64)."""
    q = geometric_ratio(source_side, target_side)
    positive = np.cumsum([q**i for i in range(source_side // 2)])
    return np.concatenate([-positive[::-1], [0.0], positive])


def _spline_matrix(source_side: int, target_side: int) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(_spline_rows(source_side, target_side), dtype=torch.float64)
    return torch.from_numpy(spline_matrix(source_side, target_side))


def _spline_rows(source_side: int, target_side: int) -> list[list[float]]:
    # Lists, since torch 2.13 refuses a second constant tensor of the same function in one graph.
    rows: list[list[float]] = spline_matrix(source_side, target_side).tolist()
    return rows


# Numbers of the sizes alone: a compiler need not look inside. What torch.compiler.assume_constant_result
# sets, which to call would load the compiler, one to two seconds, with every `import beit`.
_spline_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def spline_matrix(source_side: int, target_side: int) -> np.ndarray:
    """(target, source) float64 matrix: values at the source offsets -> spline read at whole offsets."""
    if source_side == target_side:
        return np.eye(source_side)
    places = geometric_coordinates(source_side, target_side)
    half = target_side // 2
    # Outside the outermost source offset the edge value is repeated, as FITPACK does.
    wanted = np.clip(np.arange(-half, half + 1), places[0], places[-1])
    degree = min(3, source_side - 1)
    at_places = _b_spline_basis(places, places, degree)
    return np.linalg.solve(at_places.T, _b_spline_basis(places, wanted, degree).T).T.copy()


def _b_spline_basis(places: np.ndarray, x: np.ndarray, degree: int) -> np.ndarray:
    """B-spline basis (len(x), len(places)) of the interpolating spline through `places`.

    Knots are the places without the second and the second last ("not a knot" for cubics), which is
    the spline FITPACK fits at smoothing 0. Cox-de Boor recursion.
    """
    if degree == 0:
        return np.ones((len(x), 1))
    ends = [places[0]] * (degree + 1), [places[-1]] * (degree + 1)
    knots = np.concatenate([ends[0], places[2:-2], ends[1]])  # below degree 3 no inner place is left
    last = len(knots) - degree - 2  # the last non-empty interval holds its right end too
    cell = np.clip(np.searchsorted(knots, x, side="right") - 1, degree, last)
    basis = np.zeros((len(x), len(knots) - 1))
    basis[np.arange(len(x)), cell] = 1.0
    for k in range(1, degree + 1):
        width_left = knots[k:-1] - knots[: -k - 1]
        width_right = knots[k + 1 :] - knots[1:-k]
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(width_left > 0, (x[:, None] - knots[: -k - 1]) / width_left, 0.0)
            right = np.where(width_right > 0, (knots[k + 1 :] - x[:, None]) / width_right, 0.0)
        basis = left * basis[:, :-1] + right * basis[:, 1:]
    return basis
