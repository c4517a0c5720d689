"""Block-wise masks, against masks and histograms that the original generators drew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit import masking
from beit.masking import sample_mask, sample_random_mask

GOLDEN = Path(__file__).parent / "golden" / "masks.npz"
DRAWS = 20_000
SEED = 5


@dataclass(frozen=True)
class Setting:
    """What one of the original generators was asked for; `seed` is that of its run."""

    grid: tuple[int, int]
    num_masked: int
    seed: int
    min_block: int = 16
    max_block: int | None = None
    exact: bool = False

    def draw(self, rng: Any) -> np.ndarray:
        return sample_mask(
            self.grid,
            self.num_masked,
            rng,
            min_block=self.min_block,
            max_block=self.max_block,
            exact=self.exact,
        )


SETTINGS = {
    "v1_14": Setting((14, 14), 75, 11),
    "v2_14": Setting((14, 14), 75, 12, exact=True),
    "v1_24": Setting((24, 24), 230, 13),
    "v2_24": Setting((24, 24), 230, 14, exact=True),
    "v1_14x20": Setting((14, 20), 107, 15),
    "v1_14_min4_max40": Setting((14, 14), 75, 16, min_block=4, max_block=40),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


# --- The same random numbers give the same masks -------------------------------------------------


class PythonRandom:
    """The random numbers of the original generators, in their order, as `sample_mask` asks for them.

    The originals draw a place with `randint`, whose use of the stream depends on the range; so the
    last two numbers of a row are drawn when they are multiplied by the size of their range.
    """

    class Place:
        def __mul__(self, size: int) -> int:
            return random.randrange(size)

    def __init__(self, seed: int) -> None:
        random.seed(seed)
        self.legacy = np.random.RandomState(seed)  # v2 corrects the count with numpy's

    def random(self, shape: tuple[int, int]) -> PythonRandom:
        return self

    def tolist(self) -> Iterator[list[Any]]:
        while True:
            yield [random.random(), random.random(), self.Place(), self.Place()]

    def choice(self, values: np.ndarray, size: int, replace: bool) -> np.ndarray:
        return self.legacy.choice(values, size=size, replace=replace)


@every_setting
def test_masks_equal_the_original_ones_given_the_same_random_numbers(name: str) -> None:
    setting = SETTINGS[name]
    state = random.getstate()
    source = PythonRandom(setting.seed)
    ours = np.stack([setting.draw(source) for _ in range(64)])
    random.setstate(state)
    np.testing.assert_array_equal(ours, np.load(GOLDEN)[f"{name}_first_masks"].astype(bool))


# --- The same distribution from our own random numbers -------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What 20,000 masks showed; a histogram's place is its value."""

    counts: np.ndarray  # masked patches
    counts_before_fix: np.ndarray
    blocks: np.ndarray  # of a mask
    block_height: np.ndarray
    block_width: np.ndarray
    new_cells: np.ndarray  # of a block
    ended_early: int
    cell_frequency: np.ndarray  # (h, w)


class Watched(np.ndarray):
    """A mask that remembers which rectangle was last looked at."""

    looked_at: tuple[slice, slice]

    def __getitem__(self, key: Any) -> Any:
        self.looked_at = key
        return super().__getitem__(key)


@cache
def sample_of(name: str) -> Sample:
    setting = SETTINGS[name]
    h, w = setting.grid
    heights, widths = np.zeros(h + 1, int), np.zeros(w + 1, int)
    new_cells, blocks = np.zeros(h * w + 1, int), np.zeros(64, int)
    counts, before = np.zeros(h * w + 1, int), np.zeros(h * w + 1, int)
    cells = np.zeros((h, w), int)
    placed: list[int] = []
    place_block = masking._place_block

    def watch(mask: np.ndarray, *arguments: Any) -> int:
        watched = mask.view(Watched)
        new = place_block(watched, *arguments)
        if new:
            ys, xs = watched.looked_at
            heights[ys.stop - ys.start] += 1
            widths[xs.stop - xs.start] += 1
            new_cells[new] += 1
            placed.append(new)
        return new

    rng = np.random.default_rng(SEED)
    masking._place_block = watch
    try:
        for _ in range(DRAWS):
            placed.clear()
            mask = setting.draw(rng)
            counts[mask.sum()] += 1
            before[sum(placed)] += 1
            blocks[len(placed)] += 1
            cells += mask
    finally:
        masking._place_block = place_block
    early = int(before[: setting.num_masked].sum())
    return Sample(counts, before, blocks, heights, widths, new_cells, early, cells / DRAWS)


def same_distribution(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value of the two-sample chi-squared test of two histograms; rare values go together."""
    a, b = a.astype(float), b.astype(float)
    rare = a + b < 20
    if rare.any():
        a, b = (np.append(x[~rare], x[rare].sum()) for x in (a, b))
    a, b = a[a + b > 0], b[a + b > 0]
    to_a, to_b = np.sqrt(b.sum() / a.sum()), np.sqrt(a.sum() / b.sum())
    statistic = ((to_a * a - to_b * b) ** 2 / (a + b)).sum()
    half_freedom = torch.tensor((len(a) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2)))


@every_setting
@pytest.mark.parametrize(
    ("histogram", "golden"),
    [
        ("counts_before_fix", "count_hist_before_fix"),
        ("blocks", "num_blocks_hist"),
        ("block_height", "block_height_hist"),
        ("block_width", "block_width_hist"),
        ("new_cells", "new_cells_per_block_hist"),
    ],
)
def test_histograms_are_those_of_the_original(name: str, histogram: str, golden: str) -> None:
    theirs = np.load(GOLDEN)[f"{name}_{golden}"]
    assert same_distribution(getattr(sample_of(name), histogram), theirs) > 1e-3


@every_setting
def test_masked_counts_are_those_of_the_original(name: str) -> None:
    ours, theirs = sample_of(name).counts, np.load(GOLDEN)[f"{name}_count_hist"]
    if SETTINGS[name].exact:
        np.testing.assert_array_equal(ours, theirs)  # all 20,000 in one place
    else:
        assert same_distribution(ours, theirs) > 1e-3


@every_setting
def test_masks_end_early_as_often_as_the_original_ones(name: str) -> None:
    theirs = int(np.load(GOLDEN)[f"{name}_ended_early"])
    share = (sample_of(name).ended_early + theirs) / (2 * DRAWS)
    spread = np.sqrt(2 * DRAWS * share * (1 - share))
    assert abs(sample_of(name).ended_early - theirs) < 4 * spread


@every_setting
def test_every_patch_is_masked_as_often_as_by_the_original(name: str) -> None:
    ours, theirs = sample_of(name).cell_frequency, np.load(GOLDEN)[f"{name}_cell_frequency"]
    share = (ours + theirs) / 2
    spread = np.sqrt(2 * share * (1 - share) / DRAWS)
    assert np.abs((ours - theirs) / spread).max() < 5  # of up to 576 patches


def test_75_of_196_come_out_as_published() -> None:
    counts = sample_of("v1_14").counts
    values = np.arange(len(counts))
    mean = (counts * values).sum() / DRAWS
    deviation = np.sqrt((counts * (values - mean) ** 2).sum() / DRAWS)
    assert mean == pytest.approx(74.47, abs=0.05)
    assert deviation == pytest.approx(0.98, abs=0.05)
    assert counts[75] / DRAWS == pytest.approx(0.663, abs=0.015)
    assert counts[70:].sum() / DRAWS > 0.995
    assert counts[76:].sum() == 0


# --- What holds for every mask --------------------------------------------------------------------


def test_a_mask_is_a_bool_array_of_the_grid() -> None:
    mask = sample_mask((14, 20), 100, np.random.default_rng(0))
    assert mask.dtype == np.bool_
    assert mask.shape == (14, 20)


@every_setting
def test_a_block_is_smaller_than_the_grid_each_way(name: str) -> None:
    sample = sample_of(name)
    assert sample.block_height[0] == sample.block_height[-1] == 0
    assert sample.block_width[0] == sample.block_width[-1] == 0


def test_no_block_hides_more_new_patches_than_max_block() -> None:
    assert sample_of("v1_14_min4_max40").new_cells[41:].sum() == 0


@pytest.mark.parametrize("exact", [False, True])
def test_same_seed_gives_same_mask(exact: bool) -> None:
    def masks(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.stack([sample_mask((14, 14), 75, rng, exact=exact) for _ in range(8)])

    np.testing.assert_array_equal(masks(3), masks(3))
    assert not np.array_equal(masks(3), masks(4))
    assert len({mask.tobytes() for mask in masks(3)}) == 8


@pytest.mark.parametrize("num_masked", [1, 15, 40, 195])
def test_exact_masks_hide_exactly_that_many(num_masked: int) -> None:
    rng = np.random.default_rng(0)
    assert {int(sample_mask((14, 14), num_masked, rng, exact=True).sum()) for _ in range(50)} == {
        num_masked
    }


@pytest.mark.parametrize("aspect", [0.3, 1.0])
def test_the_first_block_keeps_the_aspect_and_the_area(
    aspect: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    place_block = masking._place_block

    def first_only(mask: np.ndarray, *arguments: Any) -> int:
        if mask.any():
            return 0
        watched = mask.view(Watched)
        new = place_block(watched, *arguments)
        ys, xs = watched.looked_at
        shapes.append((ys.stop - ys.start, xs.stop - xs.start))
        return new

    monkeypatch.setattr(masking, "_place_block", first_only)
    rng = np.random.default_rng(0)
    for _ in range(300):
        sample_mask((40, 40), 400, rng, min_block=100, aspect=aspect)
    h, w = np.array(shapes).T
    # A side is rounded by at most a half, and the smallest side here is sqrt(100 * 0.3) > 5.
    assert ((h - 0.5) / (w + 0.5)).max() <= 1 / aspect
    assert ((h + 0.5) / (w - 0.5)).min() >= aspect
    assert ((h + 0.5) * (w + 0.5)).min() >= 100
    assert ((h - 0.5) * (w - 0.5)).max() <= 400
    assert len(set(shapes)) > 10


# --- What cannot be drawn --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_masked": 0}, "cannot mask 0 of the 196 patches of a 14 x 14 grid; use 1 to 195"),
        ({"num_masked": 196}, "cannot mask 196 of the 196 patches"),
        ({"num_masked": -3}, "cannot mask -3 of the 196 patches"),
        ({"aspect": 0.0}, r"aspect 0.0 is not in \(0, 1\]; the paper uses 0.3"),
        ({"aspect": 1.1}, r"aspect 1.1 is not in \(0, 1\]"),
        ({"min_block": 0}, "no block of 0 patches fits a 14 x 14 grid.* use min_block 1 to 169"),
        ({"min_block": 170}, "no block of 170 patches fits a 14 x 14 grid.* use min_block 1 to 169"),
        ({"max_block": 15}, "max_block 15 is smaller than min_block 16"),
        ({"num_masked": 1}, "num_masked 1 is less than min_block 16.*min_block 1 or less, or exact"),
        ({"grid": (1, 9), "num_masked": 3, "min_block": 1}, "no block of 1 patches fits a 1 x 9"),
    ],
)
def test_an_impossible_mask_is_refused_with_what_is_allowed(
    arguments: dict[str, Any], words: str
) -> None:
    arguments = {"grid": (14, 14), "num_masked": 75, **arguments}
    with pytest.raises(ValueError, match=words):
        sample_mask(rng=np.random.default_rng(0), **arguments)


def test_a_grid_of_one_patch_is_refused_without_a_range_that_is_empty() -> None:
    with pytest.raises(ValueError, match="one patch leaves nothing to guess it from"):
        sample_mask((1, 1), 1, np.random.default_rng(0), min_block=1)


def test_random_masks_hide_each_patch_alike_and_exactly_so_many() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([sample_random_mask((5, 7), 12, rng) for _ in range(4000)])
    assert (drawn.sum(axis=(1, 2)) == 12).all()
    assert np.abs(drawn.mean(axis=0) - 12 / 35).max() < 0.04
    beside = (drawn[:, :, 1:] & drawn[:, :, :-1]).mean()  # blocks would hide neighbours together
    assert beside == pytest.approx(12 / 35 * 11 / 34, abs=0.01)
    with pytest.raises(ValueError, match="cannot mask 35 of the 35"):
        sample_random_mask((5, 7), 35, rng)
