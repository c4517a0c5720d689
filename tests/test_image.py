"""Pictures: every mode against Pillow, evaluation geometry against timm and transformers, broken files."""

from __future__ import annotations

import io
import math
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import beit.image
from beit.image import (
    FILTERS,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    BadImage,
    ImageSpec,
    preprocess,
    read_image,
    resize_and_crop,
    unilm_spec,
)

GOLDEN = Path(__file__).parent / "golden"
PICTURES = sorted((GOLDEN / "images").iterdir())


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- Modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [p for p in PICTURES if "i16" not in p.name], ids=lambda p: p.name)
def test_every_mode_becomes_what_pillow_makes_of_it(file: Path) -> None:
    with Image.open(file) as image:
        theirs = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    ours = read_image(file)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, theirs)


def test_camera_orientation_is_applied() -> None:
    file = GOLDEN / "images" / "rgb_exif6_240x160.jpg"
    with Image.open(file) as image:
        assert image.size == (240, 160)
        turned = np.asarray(image.rotate(-90, expand=True))  # 6 asks for a quarter turn clockwise
    assert read_image(file).shape == (240, 160, 3)
    np.testing.assert_array_equal(read_image(file), turned)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    file = GOLDEN / "images" / "i16_170x120.png"
    with Image.open(file) as image:
        values = np.asarray(image).astype(np.float64)
    assert values.max() > 255
    expected = np.round(values * 255 / 65535)
    np.testing.assert_array_equal(read_image(file), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_the_ends_of_sixteen_bits_are_black_and_white(kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(values), kind)
    np.testing.assert_array_equal(read_image(content)[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("value", [0, 1])
def test_a_black_picture_of_sixteen_bits_is_black(value: int) -> None:
    dark = Image.fromarray(np.full((3, 4), value, dtype=np.uint16))
    assert not read_image(encoded(dark, "PNG")).any()


def test_floats_are_read_from_zero_to_one_or_from_their_own_range() -> None:
    unit = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    free = np.array([[-3.0, 0.0, 3.0]], dtype=np.float32)
    for values in (unit, free):
        content = encoded(Image.fromarray(values), "TIFF")
        np.testing.assert_array_equal(read_image(content)[0, :, 1], [0, 128, 255])


def test_path_text_bytes_and_pillow_image_give_the_same_array() -> None:
    for file in PICTURES:
        array = read_image(file)
        np.testing.assert_array_equal(read_image(str(file)), array)
        np.testing.assert_array_equal(read_image(file.read_bytes()), array)
        with Image.open(file) as image:
            np.testing.assert_array_equal(read_image(image), array)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "AVIF", "GIF", "JPEG"])
def test_every_format_reads_what_was_written(kind: str) -> None:
    """Exactly where the format loses nothing, nearly where it does."""
    smooth = np.zeros((24, 31, 3), dtype=np.uint8)
    smooth[..., 0] = np.linspace(30, 220, 31)
    smooth[..., 1] = np.linspace(200, 60, 24)[:, None]
    options = {"lossless": True} if kind == "WEBP" else {}
    ours = read_image(encoded(Image.fromarray(smooth), kind, **options)).astype(int)
    if kind in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        np.testing.assert_array_equal(ours, smooth)
    else:
        assert np.abs(ours - smooth).mean() < 6
        assert ours.shape == smooth.shape


def test_the_array_is_the_readers_own() -> None:
    array = read_image(Image.fromarray(noise(4, 5)))
    array[:] = 0  # raises where it is a view of Pillow's memory


# --- Limits and broken files ---------------------------------------------------------------------


def refusal(source: str | bytes | Path | Image.Image) -> BadImage:
    with pytest.raises(BadImage) as caught:
        read_image(source)
    return caught.value


def test_missing_file_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path / "cat.jpg")
    assert (error.code, error.path) == ("missing", str(tmp_path / "cat.jpg"))
    assert "cat.jpg" in str(error)
    assert "no such file" in str(error)


@pytest.mark.parametrize("content", [b"", b"a cat", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00" * 5])
def test_what_is_no_picture_is_unreadable(content: bytes) -> None:
    assert refusal(content).code == "unreadable"


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    assert refusal(tmp_path).code == "unreadable"


def test_unlisted_formats_are_not_tried() -> None:
    icon = encoded(Image.fromarray(noise(16, 16)), "ICO")
    with Image.open(io.BytesIO(icon)) as image:
        assert image.format == "ICO"  # Pillow would
    assert refusal(icon).code == "unreadable"


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beit.image, "MAX_PIXELS", 30 * 40)
    assert read_image(encoded(Image.fromarray(noise(30, 40)), "PNG")).shape == (30, 40, 3)
    content = encoded(Image.fromarray(noise(30, 41)), "PNG")
    monkeypatch.setattr(Image.Image, "convert", None)  # what decodes
    error = refusal(content)
    assert error.code == "too_large"
    assert "41 x 30" in error.reason


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
def test_a_small_file_that_claims_many_pixels_is_too_large(side: int) -> None:
    content = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    content[18:26] = np.array([side, side], dtype="<i4").tobytes()
    error = refusal(bytes(content))
    assert error.code == "too_large", error


def test_too_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(encoded(Image.fromarray(noise(8, 8)), "PNG"))
    monkeypatch.setattr(beit.image, "MAX_FILE_BYTES", file.stat().st_size)
    assert read_image(file).shape == (8, 8, 3)
    monkeypatch.setattr(beit.image, "MAX_FILE_BYTES", file.stat().st_size - 1)
    monkeypatch.setattr(Path, "read_bytes", None)
    error = refusal(file)
    assert (error.code, error.path) == ("too_large", str(file))


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, overwritten in places, or with a stretch doubled."""
    data = bytearray(content)
    kind = rng.integers(3)
    if kind == 0:
        return bytes(data[: rng.integers(1, len(data))])
    if kind == 1:
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.integers(256)
        return bytes(data)
    start = int(rng.integers(len(data)))
    return bytes(data[:start] + data[max(0, start - 40) :])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_a_damaged_file_is_an_image_or_a_bad_image_and_never_a_warning(kind: str) -> None:
    rng = np.random.default_rng(list(kind.encode()))
    smooth = Image.fromarray(noise(20, 24)).resize((48, 40))
    smooth.getexif()[274] = 6
    content = encoded(smooth, kind, **({"exif": smooth.getexif()} if kind != "BMP" else {}))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            try:
                image = read_image(damaged(content, rng))
            except BadImage:
                refused += 1
                continue
            assert image.dtype == np.uint8
            assert image.ndim == 3
    assert refused > 5  # so damage is damage


def test_reading_in_threads_leaves_the_warning_filters_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First in, first out: what the first thread puts back must not outlive the second."""
    inside = {name: threading.Event() for name in "ab"}
    leave = {name: threading.Event() for name in "ab"}

    def wait(_image: Image.Image, _name: str) -> np.ndarray:
        name = threading.current_thread().name
        inside[name].set()
        assert leave[name].wait(10)
        return noise(1, 1)

    monkeypatch.setattr(beit.image, "_to_rgb", wait)
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=read_image, args=(Image.fromarray(noise(2, 2)),), name=name)
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
        assert inside[thread.name].wait(10)
    for thread in threads:
        leave[thread.name].set()
        thread.join(10)
    assert list(warnings.filters) == before


# --- Evaluation geometry -------------------------------------------------------------------------


def sizes(count: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(7)
    return [(int(h), int(w)) for h, w in rng.integers(9, 300, (count, 2))]


@pytest.mark.parametrize("filter_name", FILTERS)
def test_squash_is_a_resize_and_nothing_else(filter_name: str) -> None:
    spec = ImageSpec(size=(20, 30), resize="squash", filter=filter_name, mean=IMAGENET_MEAN)  # type: ignore[arg-type]
    image = noise(41, 17)
    resized = np.asarray(Image.fromarray(image).resize((30, 20), FILTERS[filter_name]))
    np.testing.assert_array_equal(resize_and_crop(image, spec), resized)


def test_short_side_is_resized_and_the_centre_cut_by_hand() -> None:
    image = noise(60, 90)
    resized = Image.fromarray(image).resize((54, 36), Image.Resampling.BICUBIC)  # 36 = floor(32 / .875)
    expected = np.asarray(resized)[2:34, 11:43]
    np.testing.assert_array_equal(resize_and_crop(image, ImageSpec(size=(32, 32))), expected)


def test_pixels_are_scaled_and_normalised_by_hand() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 255, 51, 0
    spec = ImageSpec(size=(4, 4), crop_ratio=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    prepared = preprocess(image, spec)
    assert prepared.dtype == np.float32
    assert prepared.shape == (3, 4, 4)
    assert prepared.flags.c_contiguous
    for channel, value in enumerate((1.0, 0.2, 0.0)):
        expected = (value - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        np.testing.assert_allclose(prepared[channel], expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": (0, 32)}, "size (0, 32) is not (height, width)"),
        ({"resize": "stretch"}, "'stretch' is not one of short_side, squash"),
        ({"filter": "nearest"}, "'nearest' is not one of bilinear, bicubic, lanczos"),
        ({"crop_ratio": 0.0}, "crop_ratio 0.0 is not in (0, 1]"),
        ({"crop_ratio": 1.5}, "crop_ratio 1.5 is not in (0, 1]"),
    ],
)
def test_a_spec_that_cannot_be_followed_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ImageSpec(**wrong)


def test_evaluation_geometry_is_that_of_timm() -> None:
    with np.load(GOLDEN / "timm-evaluation.npz") as file:
        expected = {name: file[name] for name in file.files}
    table = expected.pop("lut")  # pixel_values[c] = table[c][bytes[c]]
    assert len(expected) > 10
    for name, theirs in expected.items():
        picture, size, crop_ratio = name.split("|")
        spec = ImageSpec(size=(int(size), int(size)), crop_ratio=float(crop_ratio))
        with Image.open(GOLDEN / "images" / picture) as image:
            array = np.asarray(image.convert("RGB"))
        ours = resize_and_crop(array, spec).transpose(2, 0, 1)[:, ::3, ::3]
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        values = np.stack([table[c][theirs[c]] for c in range(3)])
        np.testing.assert_allclose(preprocess(array, spec)[:, ::3, ::3], values, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("height", "width"), [*sizes(40), (1, 1), (1, 300), (300, 1), (3, 299)])
@pytest.mark.parametrize("crop_ratio", [0.875, 0.9, 1.0])
def test_every_picture_becomes_the_size_that_the_network_wants(
    height: int, width: int, crop_ratio: float
) -> None:
    image = noise(height, width)
    for size in ((24, 24), (16, 40), (40, 16)):
        assert resize_and_crop(image, ImageSpec(size=size, crop_ratio=crop_ratio)).shape == (*size, 3)


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    image = noise(32, 48)
    for resize in ("short_side", "squash"):
        spec = ImageSpec(size=(32, 48), resize=resize, crop_ratio=1.0)  # type: ignore[arg-type]
        np.testing.assert_array_equal(resize_and_crop(image, spec), image)


def test_original_rule_crops_below_384_pixels_and_not_from_there_on() -> None:
    assert [unilm_spec(size).crop_ratio for size in (32, 224, 383, 384, 512)] == [0.875] * 3 + [1.0] * 2
    assert unilm_spec(384) == ImageSpec(size=(384, 384), crop_ratio=1.0, mean=HALF, std=HALF)


# --- transformers --------------------------------------------------------------------------------


def rounds_down(margin: int) -> bool:
    """Where Python's round, and torchvision's, takes half an odd margin down as transformers does."""
    return round(margin / 2) == margin // 2


@pytest.mark.parametrize("resize", ["squash", "short_side"])
@pytest.mark.parametrize("filter_name", FILTERS)
def test_saved_processor_prepares_pictures_as_we_do(resize: str, filter_name: str) -> None:
    """Bit for bit; after an odd margin transformers' crop lies one pixel to the left or above."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from beit.checkpoints import describe_processor

    equal = shifted = 0
    for crop_ratio in (0.875, 1.0):
        spec = ImageSpec((64, 64), resize, filter_name, crop_ratio, IMAGENET_MEAN, IMAGENET_STD)  # type: ignore[arg-type]
        described = describe_processor(spec)
        assert described.pop("image_processor_type") == "BeitImageProcessor"
        processor = transformers.BeitImageProcessorPil(**described)
        for number, (height, width) in enumerate(sizes(20)):
            image = noise(height, width, number)
            theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
            target = math.floor(64 / crop_ratio)
            long = int(max(height, width) * (target / min(height, width)) + 1e-6)
            if resize == "squash" or (rounds_down(long - 64) and rounds_down(target - 64)):
                np.testing.assert_array_equal(preprocess(image, spec), theirs)
                equal += 1
                continue
            shift = [0 if rounds_down(side - 64) else 1 for side in (target, long)]
            down, right = shift if height <= width else shift[::-1]
            ours = preprocess(image, spec)
            np.testing.assert_array_equal(ours[:, : 64 - down, : 64 - right], theirs[:, down:, right:])
            shifted += 1
    assert equal > 15
    assert resize == "squash" or shifted > 0
