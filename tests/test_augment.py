"""Training transforms: two views of one crop, boxes against closed forms, colours, normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit.augment import (
    CropAndFlip,
    TwoViews,
    jitter_color,
    normalise,
    sample_crop_box,
    to_unit,
)
from beit.image import IMAGENET_MEAN, IMAGENET_STD, ImageSpec

WHOLE = (1.0, 1.0)
PLAIN = TwoViews(img_size=32, token_size=16, hflip=0.0, color_jitter=0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """A picture without sharp edges: filters of different width agree on it."""
    small = rng(seed).integers(30, 220, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def gap(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def halved(image: np.ndarray) -> np.ndarray:
    """A picture at half its size: the mean of every 2 x 2 pixels."""
    h, w, _ = image.shape
    return image.reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3))


# --- Two views -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hflip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
def test_both_views_show_the_same_crop_flip_and_colours(hflip: float, color_jitter: float) -> None:
    views = replace(PLAIN, hflip=hflip, color_jitter=color_jitter, crop_scale=(0.08, 1.0))
    others = []
    for seed in range(30):
        patches, tokens = views(smooth(seed=seed), rng(seed))
        assert patches.shape == (32, 32, 3)
        assert tokens.shape == (16, 16, 3)
        assert patches.dtype == tokens.dtype == np.uint8
        assert gap(halved(patches), tokens) < 3
        others.append(gap(halved(patches)[:, ::-1], tokens))
    assert np.median(others) > 10  # so a view mirrored alone would be seen


def test_different_draws_show_different_crops() -> None:
    crops = [PLAIN(smooth(), rng(seed))[0] for seed in range(5)]
    assert min(gap(a, b) for i, a in enumerate(crops) for b in crops[:i]) > 2


def test_filters_are_bicubic_for_patches_and_lanczos_for_tokens() -> None:
    image = rng().integers(0, 256, (50, 50, 3), dtype=np.uint8)
    views = replace(PLAIN, crop_scale=WHOLE, crop_ratio=WHOLE)
    patches, tokens = views(image, rng())
    whole = Image.fromarray(image)
    np.testing.assert_array_equal(patches, whole.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(tokens, whole.resize((16, 16), Image.Resampling.LANCZOS))


def test_published_views_are_224_and_112_pixels() -> None:
    patches, tokens = TwoViews()(smooth(300, 260), rng())
    assert patches.shape == (224, 224, 3)
    assert tokens.shape == (112, 112, 3)


# --- Flip ----------------------------------------------------------------------------------------


def test_both_views_are_mirrored_where_the_picture_is() -> None:
    views = replace(PLAIN, crop_scale=WHOLE, crop_ratio=WHOLE)
    plain = views(smooth(40, 40), rng())
    mirrored = replace(views, hflip=1.0)(smooth(40, 40), rng())
    for one, other in zip(plain, mirrored, strict=True):
        assert gap(one[:, ::-1], other) < 0.5  # filters round at the edges
        assert gap(one, other) > 5


WHOLE_CROP = CropAndFlip(img_size=24, crop_scale=WHOLE, crop_ratio=WHOLE)


def test_mirrored_always_and_never() -> None:
    image = smooth(24, 24)
    np.testing.assert_array_equal(replace(WHOLE_CROP, hflip=0.0)(image, rng()), image)
    np.testing.assert_array_equal(replace(WHOLE_CROP, hflip=1.0)(image, rng()), image[:, ::-1])


def test_share_of_mirrored_pictures_is_the_probability() -> None:
    image = smooth(24, 24)
    count = 800
    flip = replace(WHOLE_CROP, hflip=0.25)
    mirrored = sum(not np.array_equal(flip(image, rng(seed)), image) for seed in range(count))
    assert mirrored / count == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / count))


# --- Crop boxes ----------------------------------------------------------------------------------

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], n: int
) -> np.ndarray:
    """(n, 4) left, top, right, bottom."""
    generator = rng()
    return np.array([sample_crop_box(size, scale, ratio, generator) for _ in range(n)])


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (8, 8), (640, 48), (1, 1), (3, 200)])
def test_a_box_lies_within_the_picture(size: tuple[int, int]) -> None:
    left, top, right, bottom = boxes(size, SCALE, RATIO, 500).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= size[0]).all()
    assert (bottom <= size[1]).all()
    assert (right > left).all()
    assert (bottom > top).all()


def test_area_is_uniform_and_shape_log_uniform_where_every_box_fits() -> None:
    """Against the closed forms: moments of U(0.05, 0.4) and of U(ln 3/4, ln 4/3), four errors wide."""
    width, height, count = 1000, 800, 8000
    left, top, right, bottom = boxes((width, height), (0.05, 0.4), RATIO, count).T
    area = (right - left) * (bottom - top) / (width * height)
    shape = np.log((right - left) / (bottom - top))
    for values, low, high in ((area, 0.05, 0.4), (shape, math.log(3 / 4), math.log(4 / 3))):
        spread = high - low
        error = spread / math.sqrt(12 * count)
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * error)
        assert values.std() == pytest.approx(spread / math.sqrt(12), rel=0.03)
        assert values.min() >= low - 0.003  # whole pixels round
        assert values.max() <= high + 0.003
        deciles = np.quantile(values, np.linspace(0.1, 0.9, 9))
        np.testing.assert_allclose(deciles, low + spread * np.linspace(0.1, 0.9, 9), atol=0.04 * spread)
    assert abs(np.corrcoef(area, shape)[0, 1]) < 4 / math.sqrt(count)


def test_a_box_is_anywhere_it_fits_with_equal_chance() -> None:
    """Of a box of 5 x 5 in 8 x 6 pixels: four places across, two down."""
    share = 25 / 48
    left, top, right, bottom = boxes((8, 6), (share, share), WHOLE, 4000).T
    assert set(right - left) == {5}
    assert set(bottom - top) == {5}
    places = np.zeros((2, 4))
    np.add.at(places, (top, left), 1)
    expected = 4000 / 8
    assert ((places - expected) ** 2 / expected).sum() < 24.3  # chi-squared, 7 degrees: 0.999


def test_ten_boxes_are_tried_before_the_centre_is_taken() -> None:
    """Where most boxes do not fit: the areas are those of the published rule, written out here."""
    size, count = (200, 20), 4000
    left, top, right, bottom = boxes(size, SCALE, RATIO, count).T
    generator = rng(99)
    areas = []
    for _ in range(count):
        for _ in range(10):
            area = generator.uniform(*SCALE) * 200 * 20
            shape = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
            if w <= 200 and h <= 20:
                areas.append(w * h)
                break
        else:
            areas.append(round(20 * 4 / 3) * 20)
    ours = np.sort((right - left) * (bottom - top))
    theirs = np.sort(areas)
    grid = np.unique(np.concatenate([ours, theirs]))
    distance = np.abs(
        np.searchsorted(ours, grid, "right") / count - np.searchsorted(theirs, grid, "right") / count
    ).max()
    assert distance < 1.95 * math.sqrt(2 / count)  # Kolmogorov and Smirnov, 0.999


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 10), (43, 0, 56, 10)),  # too wide: 13 = round(10 * 4 / 3) across
        ((10, 100), (0, 43, 10, 56)),
        ((100, 90), (0, 0, 100, 90)),  # an allowed shape: all of it
    ],
)
def test_where_no_box_fits_the_centre_is_taken(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    too_large = (4.0, 4.0)  # four times the picture never fits
    assert sample_crop_box(size, too_large, RATIO, rng()) == box


# --- Colours -------------------------------------------------------------------------------------


def test_no_jitter_is_no_change_and_takes_no_draw() -> None:
    image, generator = smooth(), rng(3)
    unchanged = jitter_color(Image.fromarray(image), 0.0, generator)
    np.testing.assert_array_equal(unchanged, image)
    assert generator.random() == rng(3).random()


def test_brightness_of_a_grey_picture_is_scaled_within_the_amount() -> None:
    """Contrast and saturation change no even grey: its own mean, and no colour. One draw is left."""
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    values = np.array([np.asarray(jitter_color(grey, 0.4, rng(seed)))[0, 0] for seed in range(1000)])
    assert (values == values[:, :1]).all()
    factors = values[:, 0] / 100
    assert factors.min() >= 0.59
    assert factors.max() <= 1.41
    assert factors.mean() == pytest.approx(1.0, abs=4 * 0.8 / math.sqrt(12 * 1000) + 0.005)
    assert factors.std() == pytest.approx(0.8 / math.sqrt(12), rel=0.06)


def test_contrast_and_saturation_are_changed_too() -> None:
    split = np.zeros((8, 8, 3), dtype=np.uint8)
    split[:, :4], split[:, 4:] = (150, 100, 100), (60, 60, 60)
    contrasts, colours = set(), set()
    for seed in range(20):
        out = np.asarray(jitter_color(Image.fromarray(split), 0.4, rng(seed))).astype(float)
        contrasts.add(round(out[0, 0].sum() / out[0, 7].sum(), 2))
        colours.add(round(out[0, 0, 0] / out[0, 0, 1], 2))
    assert len(contrasts) > 10
    assert len(colours) > 10


def test_too_large_an_amount_never_turns_light_and_dark_around() -> None:
    split = np.full((8, 8, 3), 60, dtype=np.uint8)
    split[:, :4] = 150
    for seed in range(40):
        out = np.asarray(jitter_color(Image.fromarray(split), 3.0, rng(seed))).astype(int)
        assert (out[:, :4] >= out[:, 4:]).all()


# --- Both ----------------------------------------------------------------------------------------

TRANSFORMS: list[Callable[..., object]] = [TwoViews(img_size=16, token_size=8), CropAndFlip(img_size=16)]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_same_generator_gives_the_same_views(transform: Callable[..., object]) -> None:
    def run(seed: int) -> np.ndarray:
        out = transform(smooth(), rng(seed))
        return np.concatenate([view.ravel() for view in (out if isinstance(out, tuple) else (out,))])

    np.testing.assert_array_equal(run(5), run(5))
    assert not np.array_equal(run(5), run(6))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_randomness_comes_from_the_generator_alone(transform: Callable[..., object]) -> None:
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    image = smooth()
    kept = image.copy()
    transform(image, rng())
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(image, kept)


# --- Batches -------------------------------------------------------------------------------------


def test_pictures_become_a_float_batch_in_zero_to_one() -> None:
    images = [rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8) for seed in range(3)]
    batch = to_unit(images, torch.device("cpu"))
    assert batch.shape == (3, 3, 5, 7)
    assert batch.dtype == torch.float32
    for i, image in enumerate(images):
        expected = (image.astype(np.float64) / 255).transpose(2, 0, 1)
        np.testing.assert_allclose(batch[i].numpy(), expected, atol=1e-7)


def test_batch_is_normalised_as_a_single_picture_is() -> None:
    from beit.image import preprocess

    spec = ImageSpec(size=(6, 6), crop_ratio=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = [rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8) for seed in range(2)]
    batch = normalise(to_unit(images, torch.device("cpu")), spec)
    expected = np.stack([preprocess(image, spec) for image in images])
    np.testing.assert_allclose(batch.numpy(), expected, atol=1e-6)
