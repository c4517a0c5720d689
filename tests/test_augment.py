"""Training transforms: crops and colours against Pillow and closed forms; RandAugment, erasing and mixing
against what timm answered."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import beit.augment
from beit.augment import (
    OPERATIONS,
    V2_VIEWS,
    CropAndFlip,
    EraseAndMix,
    Mix,
    TwoViews,
    apply_jitter,
    crop_and_flip,
    erase,
    mix_images,
    mix_targets,
    normalise,
    rand_augment,
    resize,
    sample_crop_box,
    sample_cutmix,
    sample_erase_box,
    sample_jitter,
    sample_mix,
    to_unit,
)
from beit.image import FILTERS, IMAGENET_MEAN, IMAGENET_STD, ImageSpec, OpenImage, open_image

GOLDEN = Path(__file__).parent / "golden"

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


def by_pillow(image: np.ndarray, size: int, filter_name: str) -> np.ndarray:
    """Resized by Pillow, rows before columns, as the Pillow of the published runs did it."""
    rows = Image.fromarray(image).resize((size, image.shape[0]), FILTERS[filter_name])
    return np.asarray(rows.resize((size, size), FILTERS[filter_name])).astype(int)


def jpeg(image: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=92, **options)
    return stream.getvalue()


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
    for view, size, name, other in (
        (patches, 32, "bicubic", "bilinear"),
        (tokens, 16, "lanczos", "bicubic"),
    ):
        assert np.abs(by_pillow(image, size, name) - view).max() <= 2
        assert np.abs(by_pillow(image, size, other) - view).max() > 2


def test_published_views_are_224_and_112_pixels() -> None:
    patches, tokens = TwoViews()(smooth(300, 260), rng())
    assert patches.shape == (224, 224, 3)
    assert tokens.shape == (112, 112, 3)


def test_views_of_v2_are_224_pixels_bicubic_of_crops_from_a_fifth() -> None:
    published = TwoViews(224, 224, (0.2, 1.0), (3 / 4, 4 / 3), 0.5, 0.4, "bicubic", "bicubic")
    assert published == V2_VIEWS
    patches, tokens = V2_VIEWS(smooth(300, 260), rng())
    np.testing.assert_array_equal(patches, tokens)


@pytest.mark.parametrize("filter_name", FILTERS)
def test_a_resized_picture_is_pillows_to_two_levels(filter_name: Any) -> None:
    """On noise, the hardest picture there is: two levels at most, none in 97 of 100 values."""
    generator = rng(1)
    for number in range(60):
        height, width = generator.integers(1 if number < 10 else 20, 260, 2)
        size = int(generator.integers(8, 160))
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = resize(image, size, filter_name)
        assert ours.dtype == np.uint8
        assert ours.shape == (size, size, 3)
        difference = np.abs(ours - by_pillow(image, size, filter_name))
        assert difference.max() <= 2, (height, width, size)
        assert (difference > 0).mean() < 0.03, (height, width, size)


def test_where_torch_has_no_lanczos_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise ValueError("Anti-alias option is restricted to bilinear and bicubic modes")

    monkeypatch.setattr(beit.augment.F, "interpolate", refuse)
    image = smooth(50, 40).copy()
    expected = Image.fromarray(image).resize((16, 24), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(resize(image, (24, 16), "lanczos"), expected)


# --- Large JPEGs ---------------------------------------------------------------------------------


class Watched(OpenImage):
    """An opened picture that says at which scale it was decoded."""

    scale = 0

    def picture(self, scale: int = 1) -> Image.Image:
        self.scale = scale
        return super().picture(scale)


@pytest.mark.parametrize(
    ("side", "wanted", "scale"),
    [(63, 32, 1), (64, 32, 2), (127, 32, 2), (128, 32, 4), (256, 32, 8), (600, 32, 8), (600, 400, 1)],
)
def test_a_jpeg_is_decoded_smaller_only_where_the_crop_keeps_the_wanted_pixels(
    side: int, wanted: int, scale: int
) -> None:
    content = jpeg(smooth(600, 620))
    for box in ((1, 0, 1 + side, 600), (3, 0, 603, side)):
        image = Watched(content)
        crop = crop_and_flip(image, box, wanted, flip=False)
        assert image.scale == scale
        assert min(crop.shape[:2]) >= min(wanted, side)


@pytest.mark.parametrize(
    "view",
    [
        TwoViews(64, 256, WHOLE, WHOLE),
        TwoViews(256, 64, WHOLE, WHOLE),
        CropAndFlip((64, 256), WHOLE, (1 / 4, 1 / 4)),
        CropAndFlip((256, 64), WHOLE, (4, 4)),
    ],
)
def test_a_jpeg_is_decoded_large_enough_for_the_largest_side_of_any_view(view: Any) -> None:
    image = Watched(jpeg(smooth(600, 600)))
    view(image, rng())
    assert image.scale == 2


@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_crop_decoded_smaller_shows_the_same_piece(orientation: int, flip: bool, scale: int) -> None:
    """Against the full decode, averaged: 3 levels apart at the median, and shifted far more."""
    exif = Image.Exif()
    exif[274] = orientation
    small = rng(orientation).integers(30, 220, (480 // scale // 6, 640 // scale // 6, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC))
    content = jpeg(image, exif=exif)
    side = 30 * scale + 3
    left, top, right, bottom = box = (101, 55, 101 + side + 9, 55 + side)
    ours = crop_and_flip(Watched(content), box, 30, flip)

    full = open_image(content).picture()
    if flip:
        full = full.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    wide = (left // scale, top // scale, -(-right // scale), -(-bottom // scale))
    crop = full.crop(tuple(scale * v for v in wide))  # type: ignore[arg-type]
    theirs = np.asarray(crop.resize(ours.shape[1::-1], Image.Resampling.BOX))
    assert gap(ours, theirs) < 3
    for one, other in ((ours[:, 1:], theirs[:, :-1]), (ours[:, :-1], theirs[:, 1:])):
        assert gap(one, other) > 2.5 * gap(ours, theirs)
    for one, other in ((ours[1:], theirs[:-1]), (ours[:-1], theirs[1:])):
        assert gap(one, other) > 2.5 * gap(ours, theirs)


def test_only_jpegs_are_decoded_smaller() -> None:
    stream = io.BytesIO()
    Image.fromarray(smooth(300, 300)).save(stream, "PNG")
    view = CropAndFlip(img_size=16)
    for seed in range(5):
        ours = view(open_image(stream.getvalue()), rng(seed))
        np.testing.assert_array_equal(ours, view(smooth(300, 300), rng(seed)))


def test_an_opened_picture_and_its_array_give_the_same_views() -> None:
    content = jpeg(smooth(50, 60))
    for transform in (PLAIN, replace(PLAIN, color_jitter=0.4, hflip=1.0)):
        for seed in range(10):
            opened = transform(open_image(content), rng(seed))
            array = transform(open_image(content).read(), rng(seed))
            for one, other in zip(opened, array, strict=True):
                np.testing.assert_array_equal(one, other)


# --- Flip ----------------------------------------------------------------------------------------


def test_both_views_are_mirrored_where_the_picture_is() -> None:
    views = replace(PLAIN, crop_scale=WHOLE, crop_ratio=WHOLE)
    plain = views(smooth(40, 40), rng())
    mirrored = replace(views, hflip=1.0)(smooth(40, 40), rng())
    for one, other in zip(plain, mirrored, strict=True):
        assert gap(one[:, ::-1], other) < 0.5  # filters round at the edges
        assert gap(one, other) > 5


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 9)])
def test_a_picture_of_a_pixel_or_two_has_a_crop_of_any_shape(size: tuple[int, int]) -> None:
    for view in (CropAndFlip(img_size=(16, 128)), CropAndFlip(img_size=(128, 16))):
        pixels = np.full((*size, 3), 7, dtype=np.uint8)
        assert (view(open_image(pixels), rng()) == 7).all()


WHOLE_CROP = CropAndFlip(img_size=24, crop_scale=WHOLE, crop_ratio=WHOLE)


def test_a_fine_tuning_view_is_drawn_as_published() -> None:
    published = CropAndFlip(224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.0, (128, 128, 128))
    assert CropAndFlip() == published
    image = rng().integers(0, 256, (50, 50, 3), dtype=np.uint8)
    view = replace(WHOLE_CROP, hflip=0.0)(image, rng())
    assert np.abs(by_pillow(image, 24, "bicubic") - view).max() <= 2
    assert np.abs(by_pillow(image, 24, "bilinear") - view).max() > 2


@pytest.mark.parametrize("size", [(20, 40), (40, 20)])
def test_a_rectangular_view_is_not_distorted(size: tuple[int, int]) -> None:
    """Red says how far across a pixel lies, green how far down: both grow alike from pixel to pixel."""
    y, x = np.mgrid[:240, :240].astype(np.uint8)
    image = np.stack([x, y, x], axis=2)
    view = CropAndFlip(size, (0.2, 0.3), WHOLE, hflip=0.0)
    for seed in range(5):
        red, green, _ = np.moveaxis(view(image, rng(seed)).astype(float), 2, 0)
        across = np.diff(red, axis=1)[2:-2, 2:-2].mean()
        assert np.diff(green, axis=0)[2:-2, 2:-2].mean() == pytest.approx(across, rel=0.06)


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


def whole(picture: Image.Image) -> tuple[int, int, int, int]:
    return 0, 0, picture.width, picture.height


def test_no_jitter_is_no_change_and_takes_no_draw() -> None:
    image, generator = smooth(), rng(3)
    picture = Image.fromarray(image)
    unchanged = apply_jitter(picture, sample_jitter(0.0, generator), whole(picture))
    np.testing.assert_array_equal(unchanged, image)
    assert generator.random() == rng(3).random()


ENHANCERS: dict[str, Any] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def by_enhancers(picture: Image.Image, jitter: list[tuple[str, float]]) -> Image.Image:
    for what, factor in jitter:
        picture = ENHANCERS[what](picture).enhance(factor)
    return picture


@pytest.mark.parametrize("amount", [0.4, 1.5])
def test_jitter_of_a_crop_is_pillows_jitter_of_the_whole_picture_cropped(amount: float) -> None:
    """Byte for byte, whatever the order; the crop is darker than the rest, so its own grey would show."""
    for seed in range(40):
        image = smooth(120, 150, seed).copy()
        image[:60] //= 3
        picture, jitter = Image.fromarray(image), sample_jitter(amount, rng(seed))
        ours = apply_jitter(picture, jitter, (10, 5, 90, 60))
        theirs = by_enhancers(picture, jitter).crop((10, 5, 90, 60))
        np.testing.assert_array_equal(ours, theirs)


def test_jitter_of_a_large_picture_is_pillows_to_a_level_or_two() -> None:
    """The grey that contrast refers to is that of a sample."""
    grain = rng(8).integers(-20, 20, (420, 560, 3))
    for seed in range(12):
        image = np.clip(smooth(420, 560, seed) + grain, 0, 255).astype(np.uint8)
        picture, jitter = Image.fromarray(image), sample_jitter(0.4, rng(seed))
        box = (100, 50, 300, 290)
        ours = np.asarray(apply_jitter(picture, jitter, box)).astype(int)
        assert np.abs(ours - by_enhancers(picture, jitter).crop(box)).max() <= 2


def test_the_grey_of_a_long_picture_is_sampled_no_coarser_than_its_short_side_allows() -> None:
    """Of 40 rows none is left out: byte for byte Pillow's."""
    image = np.repeat(rng().integers(0, 256, (40, 1, 3), dtype=np.uint8), 1300, axis=1)
    picture = Image.fromarray(image)
    ours = apply_jitter(picture, [("contrast", 0.6)], whole(picture))
    np.testing.assert_array_equal(ours, by_enhancers(picture, [("contrast", 0.6)]))


def test_factors_are_uniform_around_one_and_every_order_is_as_likely() -> None:
    drawn = [sample_jitter(0.4, rng(seed)) for seed in range(3000)]
    for what in ENHANCERS:
        factors = np.array([dict(jitter)[what] for jitter in drawn])
        assert factors.min() >= 0.6
        assert factors.max() <= 1.4
        assert factors.mean() == pytest.approx(1.0, abs=4 * 0.8 / math.sqrt(12 * 3000))
        assert factors.std() == pytest.approx(0.8 / math.sqrt(12), rel=0.04)
    names = [[what for what, _ in jitter] for jitter in drawn]
    orders, counts = np.unique(names, axis=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-squared, 5 degrees: 0.999


def test_too_large_an_amount_never_turns_light_and_dark_around() -> None:
    assert min(factor for seed in range(200) for _, factor in sample_jitter(3.0, rng(seed))) >= 0


# --- RandAugment ---------------------------------------------------------------------------------

FILL = (128, 128, 128)
OURS = {
    "PosterizeIncreasing": "Posterize",
    "SolarizeIncreasing": "Solarize",
    "ColorIncreasing": "Color",
    "ContrastIncreasing": "Contrast",
    "BrightnessIncreasing": "Brightness",
    "SharpnessIncreasing": "Sharpness",
    "TranslateXRel": "TranslateX",
    "TranslateYRel": "TranslateY",
}


def signed(name: str) -> tuple[str, int]:
    """ "Rotate-" -> ours, and its direction."""
    return OURS.get(name[:-1], name[:-1]), 1 if name[-1] == "+" else -1


def test_every_operation_at_magnitude_nine_is_timms_byte_for_byte() -> None:
    with np.load(GOLDEN / "randaugment-ops.npz") as file:
        golden = {name: file[name] for name in file.files if name[-1] in "+-"}
        picture = Image.fromarray(file["source"])
    assert {signed(name)[0] for name in golden} == set(OPERATIONS)
    for name, theirs in golden.items():
        ours, sign = signed(name)
        out = OPERATIONS[ours](picture, sign * 0.9, FILL)
        np.testing.assert_array_equal(np.asarray(out), theirs, err_msg=name)


def test_rotated_corners_take_the_fill() -> None:
    with np.load(GOLDEN / "randaugment-ops.npz") as file:
        theirs = file["Rotate+_imagenetfill"]
        picture = Image.fromarray(file["source"])
    fill: Any = tuple(round(255 * value) for value in IMAGENET_MEAN)
    np.testing.assert_array_equal(OPERATIONS["Rotate"](picture, 0.9, fill), theirs)


def by_argument(picture: Image.Image, name: str, argument: list[float]) -> Image.Image:
    """What Pillow makes of an operation's argument, as timm's table of levels gives it."""
    value: Any = argument[0] if argument else None
    bicubic = Image.Resampling.BICUBIC

    def moved(*affine: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, affine, bicubic, fillcolor=FILL)

    calls: dict[str, Callable[[], Image.Image]] = {
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "Invert": lambda: ImageOps.invert(picture),
        "Rotate": lambda: picture.rotate(value, bicubic, fillcolor=FILL),
        "Posterize": lambda: (
            ImageOps.posterize(picture, value) if value else Image.new("RGB", picture.size)
        ),
        "Solarize": lambda: ImageOps.solarize(picture, value),
        "SolarizeAdd": lambda: picture.point(
            [min(255, i + value) if i < 128 else i for i in range(256)] * 3
        ),
        "Color": lambda: ImageEnhance.Color(picture).enhance(value),
        "Contrast": lambda: ImageEnhance.Contrast(picture).enhance(value),
        "Brightness": lambda: ImageEnhance.Brightness(picture).enhance(value),
        "Sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(value),
        "ShearX": lambda: moved(1, value, 0, 0, 1, 0),
        "ShearY": lambda: moved(1, 0, 0, value, 1, 0),
        "TranslateX": lambda: moved(1, 0, value * picture.width, 0, 1, 0),
        "TranslateY": lambda: moved(1, 0, 0, 0, 1, value * picture.height),
    }
    return calls[name]()


def test_every_magnitude_gives_timms_argument() -> None:
    table = json.loads((GOLDEN / "randaugment-args.json").read_text())["level_to_arg"]
    picture = Image.fromarray(smooth(40, 50))
    seen = set()
    for name, levels in table.items():
        ours, sign = signed(name)
        seen.add(ours)
        for level, argument in levels.items():
            theirs = np.asarray(by_argument(picture, ours, argument)).astype(int)
            out = np.asarray(OPERATIONS[ours](picture, sign * (float(level) / 10), FILL)).astype(int)
            assert np.abs(out - theirs).max() <= 1, (name, level)  # 1 + v * 0.9 ends in other bits
            assert (out != theirs).mean() < 0.001, (name, level)
    assert seen == set(OPERATIONS)


def test_two_operations_are_drawn_each_done_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 6000 pictures: which, how often, how strong and in which direction, against closed forms."""
    done: list[tuple[str, float]] = []

    def noted(name: str) -> Callable[..., Image.Image]:
        def operation(picture: Image.Image, strength: float, fill: object) -> Image.Image:
            assert fill == FILL
            done.append((name, strength))
            return picture

        return operation

    monkeypatch.setattr(beit.augment, "OPERATIONS", {name: noted(name) for name in OPERATIONS})
    count = 6000
    per_picture = []
    generator = rng(4)
    for _ in range(count):
        before = len(done)
        rand_augment(Image.new("RGB", (2, 2)), 9, FILL, generator)
        per_picture.append(len(done) - before)
    share = np.bincount(per_picture) / count
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=4 * 0.5 / math.sqrt(count))
    names, counts = np.unique([name for name, _ in done], return_counts=True)
    assert set(names) == set(OPERATIONS)
    expected = len(done) / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # chi-squared, 14 degrees: 0.999
    strengths = np.array([strength for _, strength in done])
    assert (strengths > 0).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(done)))
    magnitudes = np.abs(strengths) * 10
    assert magnitudes.max() == 10  # N(9, 0.5) is cut off there, two deviations above
    assert (magnitudes == 10).mean() == pytest.approx(0.0228, abs=0.008)
    assert np.median(magnitudes) == pytest.approx(9, abs=0.05)
    assert np.quantile(magnitudes, 0.1587) == pytest.approx(8.5, abs=0.06)


def test_a_fine_tuning_view_is_its_plain_crop_augmented() -> None:
    plain, augmented = CropAndFlip(img_size=24), CropAndFlip(img_size=24, rand_augment=9.0)
    same = 0
    for seed in range(60):
        one, other = plain(smooth(), rng(seed)), augmented(smooth(), rng(seed))
        assert other.shape == one.shape
        assert other.dtype == np.uint8
        same += np.array_equal(one, other)
    assert (
        5 < same < 30
    )  # 15 in which neither operation is done, and a few whose operation changes nothing


def test_a_fine_tuning_view_moves_in_its_own_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    fills = []

    def noted(picture: Image.Image, strength: float, fill: tuple[int, int, int]) -> Image.Image:
        fills.append(fill)
        return picture

    monkeypatch.setattr(beit.augment, "OPERATIONS", {"noted": noted})
    view = CropAndFlip(img_size=8, rand_augment=9.0, fill=(1, 2, 3))
    for seed in range(10):
        view(smooth(), rng(seed))
    assert set(fills) == {(1, 2, 3)}


# --- Both ----------------------------------------------------------------------------------------

TRANSFORMS: list[Callable[..., object]] = [
    TwoViews(img_size=16, token_size=8),
    CropAndFlip(img_size=16),
    CropAndFlip(img_size=16, rand_augment=9.0),
]


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


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 7), (2, 8, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_batch_is_normalised_however_it_lies(shape: tuple[int, int, int], order: Any) -> None:
    count, height, width = shape
    images = [
        np.asarray(rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8), order=order)
        for seed in range(count)
    ]
    batch = to_unit(images, torch.device("cpu"))
    spec = ImageSpec(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (batch.clone() - mean) / std
    assert torch.equal(normalise(batch.contiguous(), spec), expected)
    assert torch.equal(normalise(batch, spec), expected)


# --- Erasing -------------------------------------------------------------------------------------


class Replay:
    """A generator that gives recorded numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)

    def uniform(self, low: float, high: float) -> float:
        value = self.numbers.pop(0)
        assert low <= value <= high
        return value

    def integers(self, high: int) -> int:
        value = int(self.numbers.pop(0))
        assert 0 <= value < high
        return value


def test_boxes_are_erased_as_timm_erased_them() -> None:
    with np.load(GOLDEN / "random-erasing.npz") as file:
        cases = file["cases"]
    erased = kept = 0
    for height, width, probability, gate, attempts, area, shape, top, left, *box in cases:
        generator: Any = Replay(gate, area, math.log(shape), top, left) if attempts else Replay(gate)
        if attempts and top < 0:  # ten boxes, none of which fitted
            generator = Replay(gate, *[area, math.log(shape)] * 10)
        ours = sample_erase_box(int(height), int(width), probability, generator)
        assert not generator.numbers
        if box[0] < 0:
            assert ours is None
            kept += 1
        else:
            assert ours == (box[2], box[0], box[3], box[1])
            erased += 1
    assert erased > 200
    assert kept > 60


def test_a_box_as_high_or_as_wide_as_the_picture_is_drawn_again() -> None:
    for height, width in ((10, 40), (40, 10)):
        generator: Any = Replay(0.0, *[0.25, 0.0] * 10)  # 10 x 10 pixels
        assert sample_erase_box(height, width, 1.0, generator) is None


def test_erased_area_is_distributed_as_timms() -> None:
    """Kolmogorov and Smirnov's two-sample test on 20,000 boxes of theirs, at 0.999."""
    with np.load(GOLDEN / "random-erasing.npz") as file:
        theirs, edges = file["erased_fraction_hist"], file["erased_fraction_edges"]
        heights = file["height_hist"]
    generator, count = rng(2), 4000
    boxes = [sample_erase_box(224, 224, 1.0, generator) for _ in range(count)]
    sides = np.array([(b[3] - b[1], b[2] - b[0]) for b in boxes if b is not None])
    assert len(sides) == count
    ours = np.histogram(sides.prod(axis=1) / 224**2, edges)[0]
    for one, other in ((ours, theirs), (np.bincount(sides[:, 0], minlength=225), heights)):
        distance = np.abs(one.cumsum() / one.sum() - other.cumsum() / other.sum()).max()
        assert distance < 1.95 * math.sqrt(1 / count + 1 / other.sum())


def test_erased_pixels_are_noise_and_the_others_stay() -> None:
    images = torch.full((64, 3, 40, 30), 7.0)
    assert erase(images, 0.25, rng(5)) is images
    changed = (images != 7).any(dim=1)  # (B, H, W)
    erased = changed.flatten(1).any(dim=1)
    assert erased.float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 64))
    for mask in changed[erased]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert mask.sum() == rows.sum() * columns.sum()  # a full rectangle
    noise = images[images != 7]
    assert noise.mean().item() == pytest.approx(0, abs=4 / math.sqrt(len(noise)))
    assert noise.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * len(noise)))


def test_same_step_generator_erases_the_same() -> None:
    def run(seed: int) -> torch.Tensor:
        return erase(torch.zeros(8, 3, 20, 20), 0.8, rng(seed))

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_probability_zero_erases_nothing() -> None:
    assert not erase(torch.zeros(64, 3, 9, 9), 0.0, rng()).any()


# --- Mixing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixing() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "mixup-cutmix-timm0.3.2.npz") as file:
        return {name: file[name] for name in file.files}


def test_cutmix_boxes_and_shares_are_timms(mixing: dict[str, np.ndarray]) -> None:
    assert len(mixing["cutmix_cases"]) > 200
    for height, width, share, y, x, top, bottom, left, right, corrected in mixing["cutmix_cases"]:
        generator: Any = Replay(y, x)
        mix = sample_cutmix(int(height), int(width), share, generator)
        assert mix.box == (left, top, right, bottom)
        assert mix.share == pytest.approx(corrected, abs=1e-12)


@pytest.mark.parametrize("name", ["mix", "mix_lam1", "cut_center", "cut_corner", "cut_lam0"])
def test_mixed_batches_and_targets_are_timms(mixing: dict[str, np.ndarray], name: str) -> None:
    images = torch.from_numpy(mixing["batch_input"])
    share, is_cut, y, x = mixing[f"batch_{name}_params"]
    replay: Any = Replay(y, x)
    mix = sample_cutmix(17, 24, share, replay) if is_cut else Mix(share)
    assert mix.share == pytest.approx(mixing[f"batch_{name}_lam_used"].item(), abs=1e-12)
    kept = images.clone()
    mixed = mix_images(images, mix)
    assert torch.equal(images, kept)
    np.testing.assert_allclose(mixed.numpy(), mixing[f"batch_{name}"], atol=1e-6)
    smoothed = mix_targets(torch.from_numpy(mixing["targets"]), 7, mix) * 0.9 + 0.1 / 7
    np.testing.assert_allclose(smoothed.numpy(), mixing[f"batch_{name}_targets"], atol=1e-6)


def test_mixed_targets_are_timms(mixing: dict[str, np.ndarray]) -> None:
    labels = torch.from_numpy(mixing["targets"])
    for share, theirs in zip(mixing["lam_grid"], mixing["mixup_targets_smoothing0"], strict=True):
        ours = mix_targets(labels, 7, Mix(float(share)))
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)


def test_losses_of_mixed_and_of_plain_labels_are_timms(mixing: dict[str, np.ndarray]) -> None:
    """As the fine-tuning loop takes them: smoothing is the loss's work, for both."""
    logits, labels = (torch.from_numpy(mixing[name]) for name in ("loss_logits", "targets"))
    plain = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert plain.item() == pytest.approx(mixing["loss_label_smoothing"].item(), abs=1e-5)
    losses = [
        F.cross_entropy(logits, mix_targets(labels, 7, Mix(share)), label_smoothing=0.1).item()
        for share in mixing["lam_grid"]
    ]
    smoothed = torch.from_numpy(mixing["mixup_targets_smoothing0.1"])
    expected = [-(t * logits.log_softmax(1)).sum(1).mean().item() for t in smoothed]
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert min(abs(loss - mixing["loss_soft_target"].item()) for loss in losses) < 1e-4


def test_shares_are_drawn_as_timm_drew_them(mixing: dict[str, np.ndarray]) -> None:
    generator, count = rng(6), 8000
    cut = np.array([sample_mix(32, 32, 0.8, 1.0, generator).box is not None for _ in range(count)])
    theirs = mixing["params_cutmix_share"].item()
    assert cut.mean() == pytest.approx(theirs, abs=4 * 0.5 * math.sqrt(1 / count + 1 / 20000))
    mixup = [sample_mix(32, 32, 0.8, 0.0, generator).share for _ in range(count)]
    ours = np.histogram(mixup, 20, (0, 1))[0].cumsum() / count
    golden = mixing["params_lam_hist_mixup"]
    distance = np.abs(ours - golden.cumsum() / golden.sum()).max()
    assert distance < 1.95 * math.sqrt(1 / count + 1 / golden.sum())
    # of cutmix the share is known after the box is cut off at the edges: 1 - the box's area
    for _ in range(50):
        mix = sample_mix(32, 48, 0.0, 1.0, generator)
        assert mix.box is not None
        left, top, right, bottom = mix.box
        assert mix.share == pytest.approx(1 - (right - left) * (bottom - top) / (32 * 48))


def test_the_shares_of_cutmix_are_drawn_by_its_own_parameter() -> None:
    """Beta(200, 200) lies near one half: no box is much larger, though Beta(0.8, 0.8) reaches the edges."""
    generator = rng(7)
    mixes = [sample_mix(100, 100, 0.8, 200.0, generator) for _ in range(400)]
    heights = [mix.box[3] - mix.box[1] for mix in mixes if mix.box is not None]
    assert 66 <= max(heights) <= 76


def test_each_part_of_what_is_done_to_a_batch_counts_alone() -> None:
    assert not EraseAndMix(0, 0, 0).does_something
    for parts in ((0.25, 0, 0), (0, 0.8, 0), (0, 0, 1.0)):
        assert EraseAndMix(*parts).does_something


def test_erasing_alone_keeps_the_labels() -> None:
    images, labels = torch.zeros(8, 3, 20, 20), torch.arange(8)
    erased, wanted = EraseAndMix(1.0, 0.0, 0.0)(images, labels, 8, rng())
    assert erased.flatten(1).any(dim=1).all()
    assert wanted is labels


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_several_labels_are_mixed_as_one_is(mixup: float, cutmix: float) -> None:
    """And the pictures as the labels say: of n numbered flat ones, on rectangles too."""
    labels = torch.tensor([2, 0, 1, 3])
    several = F.one_hot(labels, 4).bool()
    for seed in range(5):
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 32).contiguous()
        mix = EraseAndMix(0.0, mixup, cutmix)
        mixed, wanted = mix(images.clone(), labels, 4, rng(seed))
        again, shares = mix(images.clone(), several, 4, rng(seed))
        assert torch.equal(mixed, again)
        torch.testing.assert_close(shares, wanted)
        said = wanted[0, 2] * 0 + wanted[0, 3] * 3
        assert mixed[0].mean().item() == pytest.approx(said.item(), abs=1e-5)


def test_an_odd_batch_keeps_its_middle_picture() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    mixed = mix_images(images, Mix(0.25))
    np.testing.assert_allclose(mixed[:, 0, 0, 0].numpy(), [1.5, 1.0, 0.5])
