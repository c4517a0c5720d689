"""Relative position bias, against the published check values, the original code, scipy and closed
forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from beit.relative_position import (
    Grid,
    aligned,
    gather_bias,
    geometric_coordinates,
    geometric_ratio,
    num_relative_distance,
    relative_position_index,
    resize_bias_table,
)

GOLDEN = Path(__file__).parent / "golden"


def random_table(grid: Grid, heads: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_relative_distance(grid), heads, generator=generator, dtype=dtype)


def side(grid_side: int) -> int:
    """Offsets along a grid side of this many patches."""
    return 2 * grid_side - 1


# --- Index and table -----------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "rows"), [(14, 732), (24, 2212), (32, 3972), (40, 6244)])
def test_number_of_table_rows_is_the_published_one(grid: int, rows: int) -> None:
    assert num_relative_distance((grid, grid)) == rows


def test_index_of_14_by_14_has_the_published_entries_and_checksum() -> None:
    index = relative_position_index((14, 14))
    entries = {
        (0, 0): 731, (0, 1): 729, (1, 0): 730, (1, 1): 364, (1, 2): 363, (2, 1): 365,
        (1, 15): 337, (15, 1): 391, (1, 196): 0, (196, 1): 728,
    }  # fmt: skip
    assert {pair: int(index[pair]) for pair in entries} == entries
    assert index.dtype == torch.int64
    assert index.shape == (197, 197)
    assert int(index.sum()) == 14_270_119


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 2), (4, 4), (5, 7)])
def test_index_follows_its_definition_on_rectangles_too(grid: Grid) -> None:
    h, w = grid
    rows = (2 * h - 1) * (2 * w - 1) + 3
    expected = np.zeros((1 + h * w, 1 + h * w), dtype=np.int64)
    for query in range(1 + h * w):
        for key in range(1 + h * w):
            if query == 0 and key == 0:
                expected[query, key] = rows - 1
            elif query == 0:
                expected[query, key] = rows - 3
            elif key == 0:
                expected[query, key] = rows - 2
            else:
                (yi, xi), (yj, xj) = divmod(query - 1, w), divmod(key - 1, w)
                expected[query, key] = (yi - yj + h - 1) * (2 * w - 1) + (xi - xj + w - 1)
    np.testing.assert_array_equal(relative_position_index(grid).numpy(), expected)


def test_index_equals_the_one_the_original_code_stored() -> None:
    stored = np.load(GOLDEN / "unilm-relative-position-index-4x4.npz")["index"]
    np.testing.assert_array_equal(relative_position_index((4, 4)).numpy(), stored)


def test_gathered_bias_is_the_table_read_at_the_index() -> None:
    table, index = random_table((2, 3), heads=3), relative_position_index((2, 3))
    bias = gather_bias(table, index)
    assert bias.shape == (3, 7, 7)
    for head in range(3):
        for query in range(7):
            for key in range(7):
                assert bias[head, query, key] == table[index[query, key], head]


# --- The geometric sequence ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "ratio", "outermost"),
    [
        (160, 1.010000935, 13.809406),  # below 224 the lower limit: no shrinking
        (224, 1.010000935, 13.809406),
        (256, 1.023492832, 14.999963),
        (288, 1.043519459, 17.000015),
        (320, 1.060968456, 19.000006),
        (384, 1.090307446, 22.999934),
        (448, 1.114427624, 26.999935),
        (480, 1.125055904, 28.999949),
        (512, 1.134917812, 31.000182),
        (640, 1.168503628, 39.000083),
        (768, 1.195487423, 47.000012),
        (1024, 1.237505207, 63.000251),
    ],
)
def test_ratio_and_outermost_coordinate_are_the_published_ones(
    pixels: int, ratio: float, outermost: float
) -> None:
    target = side(pixels // 16)
    assert geometric_ratio(27, target) == pytest.approx(ratio, abs=6e-10)
    assert geometric_coordinates(27, target)[-1] == pytest.approx(outermost, abs=6e-7)


def test_on_small_grids_the_ratio_stops_at_its_upper_limit() -> None:
    assert geometric_ratio(7, 15) == pytest.approx(1.5, abs=1e-6)
    np.testing.assert_allclose(geometric_coordinates(7, 15)[4:], [1.0, 2.5, 4.75], atol=1e-5)


# --- The resize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [15, 19, 27, 31, 47, 63, 79, 95])
def test_square_resize_equals_the_original_code(target: int) -> None:
    golden = np.load(GOLDEN / "interp-27-heads12.npz")
    new = (target + 1) // 2
    table = torch.from_numpy(golden["s27h12_source"])
    ours = resize_bias_table(table, (14, 14), (new, new))
    expected = torch.from_numpy(golden[f"s27h12_to_{target}"])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert torch.equal(ours[-3:], table[-3:])
    if target != 27:
        assert geometric_ratio(27, target) == pytest.approx(
            float(golden[f"s27h12_to_{target}_q"]), abs=1e-12
        )
        np.testing.assert_allclose(
            geometric_coordinates(27, target), golden[f"s27h12_to_{target}_coords"], atol=1e-11
        )


def test_resize_beyond_the_reach_of_the_sequence_equals_the_original_loader() -> None:
    golden = np.load(GOLDEN / "unilm-v1-load-pt-to-ft-64.npz")
    shared = load_file(GOLDEN / "unilm-v1-pretrain-shared.safetensors")
    table = torch.from_numpy(shared["rel_pos_bias.relative_position_bias_table"])
    ours = resize_bias_table(table, (4, 4), (8, 8))
    for block in range(3):  # the loader gives every block a copy
        expected = golden[f"result.blocks.{block}.attn.relative_position_bias_table"]
        torch.testing.assert_close(ours, torch.from_numpy(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((14, 14), (24, 24)),
        ((14, 14), (9, 31)),
        ((4, 7), (10, 5)),
        ((4, 4), (8, 8)),  # the ratio at its limit: the edge is repeated
        ((2, 2), (5, 6)),
        ((3, 3), (2, 7)),
        ((2, 6), (6, 2)),
        ((3, 3), (1, 4)),
    ],
)
def test_resize_equals_the_spline_of_scipy(source: Grid, target: Grid) -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    table = random_table(source)
    ours = resize_bias_table(table, source, target)
    rows, columns = side(source[0]), side(source[1])
    new_rows, new_columns = side(target[0]), side(target[1])
    # A side that keeps its length keeps its places; none of the cases above has one.
    y, x = geometric_coordinates(rows, new_rows), geometric_coordinates(columns, new_columns)
    for head in range(table.shape[1]):
        spline = interpolate.RectBivariateSpline(
            y,
            x,
            table[:-3, head].reshape(rows, columns).numpy(),
            kx=min(3, rows - 1),
            ky=min(3, columns - 1),
            s=0,
        )
        expected = spline(np.arange(new_rows) - new_rows // 2, np.arange(new_columns) - new_columns // 2)
        np.testing.assert_allclose(
            ours[:-3, head].reshape(new_rows, new_columns), expected, rtol=1e-9, atol=1e-9
        )
    assert torch.equal(ours[-3:], table[-3:])


def test_a_one_patch_side_has_one_offset_that_is_repeated() -> None:
    table = random_table((1, 1))
    resized = resize_bias_table(table, (1, 1), (3, 4))
    assert resized.shape == (5 * 7 + 3, 2)
    torch.testing.assert_close(resized[:-3], table[:1].expand(35, 2), rtol=0, atol=1e-15)
    assert torch.equal(resized[-3:], table[-3:])


def test_a_side_that_keeps_its_length_is_not_touched() -> None:
    table = random_table((5, 4))
    resized = resize_bias_table(table, (5, 4), (5, 9))[:-3].view(9, 17, 2)
    alone = resize_bias_table(table, (5, 4), (5, 4))
    assert alone is table
    for row in range(9):  # each row is a 1 x 4 table of its own
        line = torch.cat([table[:-3].view(9, 7, 2)[row], table[-3:]])
        expected = resize_bias_table(line, (1, 4), (1, 9))[:-3]
        torch.testing.assert_close(resized[row], expected, rtol=0, atol=1e-13)


def test_a_cubic_polynomial_is_resized_without_error_inside_the_sequence() -> None:
    y, x = geometric_coordinates(27, 47), geometric_coordinates(27, 31)

    def polynomial(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        y, x = y[:, None] / 20, x[None, :] / 20
        return 1 + y - 2 * x**2 + 3 * y**3 * x + y**2 * x**3

    table = torch.zeros(732, 1, dtype=torch.float64)
    table[:-3, 0] = torch.from_numpy(polynomial(y, x).ravel())
    resized = resize_bias_table(table, (14, 14), (24, 16))[:-3].view(47, 31)
    inside = slice(1, -1)  # the outermost places miss the edge by less than 1e-4
    expected = polynomial(np.arange(-23, 24), np.arange(-15, 16))
    np.testing.assert_allclose(resized[inside, inside], expected[inside, inside], atol=1e-10, rtol=0)


def test_resize_is_differentiable_in_float64() -> None:
    table = random_table((2, 3), heads=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: resize_bias_table(t, (2, 3), (4, 2)), (table,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resize_keeps_the_dtype_and_computes_in_float64(dtype: torch.dtype) -> None:
    table = random_table((4, 4), dtype=dtype)
    resized = resize_bias_table(table, (4, 4), (6, 5))
    assert resized.dtype == dtype
    assert torch.equal(resized, resize_bias_table(table.double(), (4, 4), (6, 5)).to(dtype))


def test_a_table_of_the_wrong_length_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"4 x 4 grid has 52 rows; this one has 38"):
        resize_bias_table(random_table((3, 4)), (4, 4), (6, 6))


@pytest.mark.parametrize("keys", [5, 8, 17, 577])
def test_an_aligned_bias_has_the_same_numbers_in_rows_of_multiples_of_8(keys: int) -> None:
    bias = torch.randn(2, keys, keys)
    ours = aligned(bias)
    assert torch.equal(ours, bias)
    assert ours.stride()[-1] == 1
    assert [step % 8 for step in ours.stride()[:-1]] == [0, 0]
    q = torch.randn(2, keys, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(q, q, q, attn_mask=ours), attend(q, q, q, attn_mask=bias))
