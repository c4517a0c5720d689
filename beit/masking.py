"""Block-wise masking of a patch grid (BEiT, Algorithm 1, as the published code has it).

Rectangles are hidden until enough patches are covered, so a patch cannot be guessed by copying its
neighbour. NumPy only; randomness comes in as a generator.

Shapes: h, w = patch grid. A mask is bool (h, w), True = masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

ATTEMPTS = 10  # places tried for one block before the mask is left as it is


def sample_mask(
    grid: tuple[int, int],
    num_masked: int,
    rng: np.random.Generator,
    min_block: int = 16,
    aspect: float = 0.3,
    exact: bool = False,
    max_block: int | None = None,
) -> np.ndarray:
    """Draw one mask.

    grid: (h, w) patches. num_masked: patches to hide; 75 of 14 x 14 in the paper.
    min_block, max_block: area of a block in patches; at most `num_masked` if `max_block` is None.
    aspect: blocks are between `aspect` and 1/`aspect` times as high as wide, log-uniformly.
    exact: False (BEiT) hides at most `num_masked`, a little fewer where the last block finds no
        place; True (BEiT v2) then adds or takes single patches until the number is met.
    Returns bool (h, w). Raises ValueError where no such mask exists.
    """
    _check(grid, num_masked, min_block, max_block, aspect, exact)
    mask = np.zeros(grid, dtype=bool)
    count = 0
    draws = _uniforms(rng)
    while count < num_masked:
        most = min(num_masked - count, max_block or num_masked)
        new = _place_block(mask, most, min_block, aspect, draws)
        if new == 0:
            break
        count += new
    if exact and count != num_masked:
        wrong = np.flatnonzero(mask.ravel() == (count > num_masked))
        mask.ravel()[rng.choice(wrong, size=abs(num_masked - count), replace=False)] ^= True
    return mask


def sample_random_mask(grid: tuple[int, int], num_masked: int, rng: np.random.Generator) -> np.ndarray:
    """Single patches anywhere, exactly `num_masked` of them: the paper's ablation of blocks."""
    height, width = grid
    if not 0 < num_masked < height * width:
        raise ValueError(
            f"cannot mask {num_masked} of the {height * width} patches of a {height} x {width} grid"
        )
    mask = np.zeros(grid, dtype=bool)
    mask.ravel()[rng.permutation(mask.size)[:num_masked]] = True
    return mask


def _place_block(
    mask: np.ndarray, most: int, min_block: int, aspect: float, draws: Iterator[list[float]]
) -> int:
    """Hide one rectangle that covers 1 to `most` new patches; returns how many, 0 if none was found."""
    height, width = mask.shape
    log_aspect = math.log(aspect)
    for _ in range(ATTEMPTS):
        area_draw, aspect_draw, top_draw, left_draw = next(draws)
        area = min_block + (most - min_block) * area_draw  # also between the two when most is smaller
        ratio = math.exp(log_aspect * (1 - 2 * aspect_draw))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (h < height and w < width):  # a block never spans the grid
            continue
        top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - int(np.count_nonzero(block))
        if 0 < new <= most:
            block[:] = True
            return new
    return 0


def _uniforms(rng: np.random.Generator) -> Iterator[list[float]]:
    """Rows of four uniforms, drawn many at a time: a scalar draw costs more than the rest of a try."""
    while True:
        yield from rng.random((32, 4)).tolist()


def _check(
    grid: tuple[int, int],
    num_masked: int,
    min_block: int,
    max_block: int | None,
    aspect: float,
    exact: bool,
) -> None:
    height, width = grid
    patches, largest = height * width, (height - 1) * (width - 1)
    if patches < 2:
        raise ValueError("a picture of one patch leaves nothing to guess it from; use larger pictures")
    if not 0 < num_masked < patches:
        raise ValueError(
            f"cannot mask {num_masked} of the {patches} patches of a {height} x {width} grid; "
            f"use 1 to {patches - 1}"
        )
    if not 0 < aspect <= 1:
        raise ValueError(f"aspect {aspect} is not in (0, 1]; the paper uses 0.3")
    if not 0 < min_block <= largest:
        raise ValueError(
            f"no block of {min_block} patches fits a {height} x {width} grid, since a block never "
            f"spans it; use min_block 1 to {largest}"
        )
    narrowest = round(math.sqrt(min_block * aspect))  # the short side of the longest block
    if narrowest >= min(height, width):
        raise ValueError(
            f"a block of {min_block} patches, even {1 / aspect:.3g} times as long as wide, is {narrowest} "
            f"or more across and never fits a {height} x {width} grid; use a smaller min_block"
        )
    if max_block is not None and max_block < min_block:
        raise ValueError(f"max_block {max_block} is smaller than min_block {min_block}")
    if not exact and num_masked < min_block:
        raise ValueError(
            f"num_masked {num_masked} is less than min_block {min_block}, so most masks would be "
            f"empty; use min_block {num_masked} or less, or exact=True"
        )
