"""A model whose graph takes pictures of any size: bias tables and positions are resized inside it.

A resize is one small matrix a side that depends on the two sizes alone. The graph holds one for each side
a grid may have, 2 to 4 MB for up to 64 patches, and picks by the picture's. It gathers the bias anew for
every batch, so for one size a graph of that size alone is faster.

Shapes: h, w a picture's patch grid, s a side of the model's; N = 1 + h w, H heads, D width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.model import Beit
from beit.relative_position import (
    Grid,
    gather_bias,
    relative_position_index,
    resize_bias_by,
    spline_matrix,
)


def any_size(model: Beit, most: int) -> Beit:
    """A copy of a model whose sizes may stay symbols while it is traced. For evaluation.

    most: patches of the longest side.
    """
    resizing = copy.deepcopy(model)
    for name, side in zip("yx", model.config.grid, strict=True):
        resizing.register_buffer(f"tables_{name}", _table_matrices(side, most), persistent=False)
        resizing.register_buffer(f"positions_{name}", _position_matrices(side, most), persistent=False)
    resizing.__class__ = type("AnySize", (_AnySize, type(model)), {})
    return resizing


def _table_matrices(source: int, most: int) -> Tensor:
    """(most + 1, 2 most - 1, 2 s - 1): number t begins with 2 t - 1 rows, to t patches."""
    matrices = torch.zeros(most + 1, 2 * most - 1, 2 * source - 1)
    for target in range(1, most + 1):
        splines = spline_matrix(2 * source - 1, 2 * target - 1)
        matrices[target, : 2 * target - 1] = torch.from_numpy(splines)
    return matrices


def _position_matrices(source: int, most: int) -> Tensor:
    """(most + 1, most, s): number t begins with t rows, to t patches."""
    matrices = torch.zeros(most + 1, most, source)
    units = torch.eye(source)[None, :, :, None]  # each place alone, down one axis
    for target in range(1, most + 1):
        resized = F.interpolate(units, size=(target, 1), mode="bicubic", align_corners=False)
        matrices[target, :target] = resized[0, :, :, 0].mT
    return matrices


class _AnySize(Beit if TYPE_CHECKING else object):  # type: ignore[misc]  # a part of two classes
    """What of `Beit` depends on the size."""

    tables_y: Tensor
    tables_x: Tensor
    positions_y: Tensor
    positions_x: Tensor

    def grid_of(self, images: Tensor) -> Grid:
        size = self.config.patch_size
        return images.shape[2] // size, images.shape[3] // size

    def relative_position_biases(self, grid: Grid) -> list[Tensor]:
        tables = self._bias_tables()
        if not tables:
            return []
        h, w = grid
        to_y, to_x = self.tables_y[h, : 2 * h - 1], self.tables_x[w, : 2 * w - 1]
        index = relative_position_index(grid)
        biases = [gather_bias(resize_bias_by(table, to_y, to_x), index).unsqueeze(0) for table in tables]
        return biases * self.config.depth if self.rel_pos_bias is not None else biases

    def positions(self, grid: Grid) -> Tensor:
        h, w = grid
        assert self.pos_embed is not None
        patches = self.pos_embed[0, 1:].unflatten(0, self.config.grid)  # (s, s, D)
        to_y, to_x = self.positions_y[h, :h], self.positions_x[w, :w]
        resized = torch.einsum("ay,yxd,bx->abd", to_y, patches, to_x).flatten(0, 1)
        return torch.cat([self.pos_embed[:, :1], resized[None]], dim=1)
