"""Pictures: every mode against Pillow, evaluation geometry against timm and transformers, broken files."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT
from fuzz_images import encoded, mutated, seeds
from PIL import Image, ImageOps

import beit.image
from beit.image import (
    FILTERS,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    BadImage,
    ImageSpec,
    open_image,
    preprocess,
    read_image,
    resize_and_crop,
    resized_spec,
    timm_spec,
    transformers_spec,
    unilm_spec,
)
from beit.stop import Stopped

GOLDEN = Path(__file__).parent / "golden"
PICTURES = sorted((GOLDEN / "images").iterdir())


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


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


def test_floats_that_are_no_numbers_are_black_and_the_infinite_are_the_ends() -> None:
    values = np.array([[np.nan, -np.inf, np.inf, 10.0, 20.0]], dtype=np.float32)
    content = encoded(Image.fromarray(values), "TIFF")
    np.testing.assert_array_equal(read_image(content)[0, :, 2], [0, 0, 255, 0, 255])
    nothing = Image.fromarray(np.full((2, 3), np.nan, dtype=np.float32))
    assert not read_image(encoded(nothing, "TIFF")).any()


def test_wide_integers_are_read_as_sixteen_bits_or_from_their_own_range() -> None:
    for values, levels in (([0, 257, 65535], [0, 1, 255]), ([-1000, 0, 1000], [0, 128, 255])):
        content = encoded(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF")
        np.testing.assert_array_equal(read_image(content)[0, :, 0], levels)


def test_inverted_jpegs_of_four_colours_are_read_as_pillow_reads_them() -> None:
    content = encoded(Image.fromarray(noise(16, 16)).resize((40, 30)).convert("CMYK"), "JPEG")
    assert b"Adobe" in content
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "CMYK"
        np.testing.assert_array_equal(read_image(content), image.convert("RGB"))


def test_premultiplied_colours_are_divided_by_their_transparency() -> None:
    half = Image.new("RGBA", (3, 2), (200, 100, 40, 128))
    np.testing.assert_allclose(read_image(half.convert("RGBa")).astype(int), read_image(half), atol=2)
    grey = Image.new("LA", (3, 2), (180, 128))
    np.testing.assert_allclose(read_image(grey.convert("La")).astype(int), read_image(grey), atol=2)


def test_colours_of_a_lab_file_are_those_it_was_made_from() -> None:
    cms = pytest.importorskip("PIL.ImageCms")
    colours = Image.fromarray(
        np.array([[[200, 60, 50], [40, 90, 200], [128, 128, 128]]], dtype=np.uint8)
    )
    profiles = cms.createProfile("sRGB"), cms.createProfile("LAB")
    content = encoded(cms.profileToProfile(colours, *profiles, outputMode="LAB"), "TIFF")
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "LAB"
    np.testing.assert_allclose(read_image(content).astype(int), np.asarray(colours), atol=3)


def test_first_frame_of_several_is_read() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_image(content), np.asarray(frames[0]), err_msg=kind)


def late_exif(content: bytes) -> bytes:
    """The same PNG with its EXIF after the pixels, which is allowed."""
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = len(content) - 12  # IEND
    return content[:start] + content[end:last] + content[start:end] + content[last:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_is_applied_and_known_from_the_header(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(noise(9, 14)), kind.removeprefix("late "), exif=exif)
    content = late_exif(content) if kind == "late PNG" else content
    with Image.open(io.BytesIO(content)) as image:
        theirs = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    opened = open_image(content)
    assert opened.size == ((14, 9) if orientation < 5 else (9, 14))
    np.testing.assert_array_equal(opened.read(), theirs)


def test_a_picture_whose_exif_is_broken_is_still_a_picture() -> None:
    image = Image.fromarray(noise(9, 14))
    content = encoded(image, "PNG", exif=b"Exif\x00\x00no such thing")
    np.testing.assert_array_equal(read_image(content), image)


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


def test_an_array_is_only_looked_at() -> None:
    array = noise(4, 5)
    assert read_image(array) is array
    assert open_image(array).size == (5, 4)


# --- Opened pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "AVIF", "GIF", "JPEG"])
def test_opening_decodes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.fromarray(noise(30, 40)), kind)

    def refuse(_: object) -> None:
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        with Image.open(io.BytesIO(content)) as image:
            patch.setattr(type(image), "load", refuse)
        opened = open_image(content)
        assert opened.size == (40, 30)
        with pytest.raises(BadImage, match="decoded"):
            opened.read()
    assert opened.read().shape == (30, 40, 3)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_decoded_at_a_part_of_its_size(mode: str, scale: int) -> None:
    """As Pillow's draft does it; sides are rounded up."""
    content = encoded(Image.fromarray(noise(9, 7)).resize((83, 45)).convert(mode), "JPEG")
    opened = open_image(content)
    small = opened.read(scale)
    assert small.shape == (-(-45 // scale), -(-83 // scale), 3)
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (83 // scale, 45 // scale))
        np.testing.assert_array_equal(small, image.convert("RGB"))
    np.testing.assert_array_equal(opened.read(), read_image(content))  # again, and at full size


def test_formats_without_smaller_decoding_ignore_the_scale() -> None:
    image = Image.fromarray(noise(40, 60))
    for source in (encoded(image, "PNG"), image, np.asarray(image)):
        np.testing.assert_array_equal(open_image(source).read(8), image)


def test_other_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="scale 3 is not one of 1, 2, 4, 8"):
        open_image(noise(8, 8)).picture(3)


def test_what_was_opened_has_a_name_for_its_errors(tmp_path: Path) -> None:
    for name, path in ((None, "picture"), ("cats.tar/7.jpg", "cats.tar/7.jpg")):
        with pytest.raises(BadImage) as caught:
            open_image(b"no picture", name=name)
        assert caught.value.path == path
    half = encoded(Image.fromarray(noise(40, 40)), "PNG")[:2000]
    opened = open_image(half, name="half.png")
    with pytest.raises(BadImage, match=re.escape("half.png: not a readable picture")):
        opened.read()


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert refusal(tmp_path / "pipe.jpg").reason == "not a file"


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


def test_pixel_limit_is_set_by_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.fromarray(noise(30, 40)), "PNG")
    with pytest.raises(BadImage, match=re.escape("40 x 30 pixels; the limit is 1,199")):
        open_image(content, max_pixels=1199)
    monkeypatch.setenv("BEIT_MAX_PIXELS", "1199")
    assert refusal(content).code == "too_large"
    assert open_image(content, max_pixels=1200).size == (40, 30)
    monkeypatch.setenv("BEIT_MAX_PIXELS", "1200")
    assert read_image(content).shape == (30, 40, 3)


@pytest.mark.parametrize("text", ["0", "", "-1", "many", "1e8"])
def test_pixel_limit_is_never_off(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEIT_MAX_PIXELS", text)
    with pytest.raises(
        ValueError, match=f"BEIT_MAX_PIXELS {text!r} is not a number of pixels"
    ) as caught:
        read_image(encoded(Image.fromarray(noise(3, 4)), "PNG"))
    assert not isinstance(caught.value, BadImage)  # or a loader would count every picture as bad


def test_lack_of_memory_is_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(beit.image, "_to_rgb", fail)
    assert refusal(encoded(Image.fromarray(noise(3, 4)), "PNG")).code == "memory"


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


def test_a_damaged_file_is_an_image_or_a_bad_image_and_nothing_on_the_terminal(tmp_path: Path) -> None:
    """In a process of its own: 4000 files here, as many as BEIT_FUZZ says elsewhere."""
    count = int(os.environ.get("BEIT_FUZZ", "4000"))
    script = Path(__file__).with_name("fuzz_images.py")
    command = [sys.executable, "-W", "error", str(script), str(count), "0"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    print(result)
    codes = result["codes"]
    assert sum(codes.values()) == count
    assert set(codes) <= {"read", "unreadable", "too_large", "empty", "memory"}
    assert min(codes["read"], codes["unreadable"]) > count / 5  # so damage is damage, and not all of it
    assert result["peak_mib"] < 400


def test_damaged_files_differ_from_what_they_were() -> None:
    rng = np.random.default_rng(0)
    originals = seeds()
    assert len({content[:4] for content in originals}) >= 6
    changed = [mutated(content, rng) != content for content in originals * 20]
    assert np.mean(changed) > 0.9


def test_reading_in_threads_leaves_the_warning_filters_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First in, first out: what the first thread puts back must not outlive the second."""
    inside = {name: threading.Event() for name in "ab"}
    leave = {name: threading.Event() for name in "ab"}

    def wait(image: Image.Image) -> Image.Image:
        name = threading.current_thread().name
        inside[name].set()
        assert leave[name].wait(10)
        return image

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


def chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of one grey byte a pixel, of which there are too few."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    chunks = [chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(bytes(99)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def tiff(width: int, height: int, *more: bytes, size: int = 0) -> bytes:
    """A TIFF with the given sides, further directory entries, and padded to a size."""
    tags = {256: width, 257: height, 258: 8, 262: 1, 273: 8, 277: 1, 278: height}
    entries = [
        tag.to_bytes(2, "little") + b"\x04\x00\x01\x00\x00\x00" + value.to_bytes(4, "little")
        for tag, value in tags.items()
    ]
    entries += more
    directory = len(entries).to_bytes(2, "little") + b"".join(entries) + bytes(4)
    return (b"II*\x00\x08\x00\x00\x00" + directory).ljust(size, b"\x00")


def patched(content: bytes, place: int, *values: int, width: int = 2, order: Any = "little") -> bytes:
    """With numbers written over a place."""
    written = b"".join(value.to_bytes(width, order) for value in values)
    return content[:place] + written + content[place + len(written) :]


TINY = Image.fromarray(noise(8, 8))
JPEG, GIF, BMP, AVIF = (encoded(TINY, kind) for kind in ("JPEG", "GIF", "BMP", "AVIF"))
WEBP, LOSSLESS = encoded(TINY, "WEBP"), encoded(TINY, "WEBP", lossless=True)
EXTENDED = encoded(TINY, "WEBP", exif=b"Exif\x00\x00" + bytes(20))
LARGE = 97_000_000  # bytes, just within the limit of a file


def claims() -> Iterator[tuple[str, bytes]]:
    """Small files that claim many pixels."""
    for side in (8_000, 13_300, 14_000, 65_535, 2**31 - 1):
        yield f"png {side}", png(side, side)
        yield f"tiff {side}", tiff(side, side)
        yield f"bmp {side}", patched(BMP, 18, side, side, width=4)
        yield f"ppm {side}", f"P6 {side} {side} 255\n".encode() + bytes(99)
    for side in (8_000, 14_000, 65_535):
        yield f"jpeg {side}", patched(JPEG, JPEG.index(b"\xff\xc0") + 5, side, side, order="big")
        yield f"gif {side}", patched(GIF, 6, side, side)
        yield f"avif {side}", patched(AVIF, AVIF.index(b"ispe") + 8, side, side, width=4, order="big")
    for side in (8_000, 16_383):
        yield f"webp {side}", patched(WEBP, WEBP.index(b"VP8 ") + 14, side, side)
        bits = (side - 1) | (side - 1) << 14
        yield f"lossless webp {side}", patched(LOSSLESS, LOSSLESS.index(b"VP8L") + 9, bits, width=4)
    yield "extended webp", patched(EXTENDED, 24, 0xFFFFFF, 0xFFFFFF, width=3)
    yield "wide png", png(50_000_001, 1)
    yield "high pbm", b"P4 1 99999999\n"


def compressed_text() -> bytes:
    return png(8, 8, chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(100_000_000), 1)))


def compressed_profile() -> bytes:
    return png(8, 8, chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(100_000_000), 1)))


def plain_text() -> bytes:
    return png(8, 8, chunk(b"tEXt", b"Comment\x00" + b" " * LARGE))


def many_texts() -> bytes:
    return png(8, 8, *[chunk(b"tEXt", b"a\x00" + b" " * 900)] * 60_000)


def text_over_the_limit_of_a_file() -> bytes:
    return png(8, 8, chunk(b"tEXt", b"Comment\x00" + b" " * 100_000_000))


def many_segments() -> bytes:
    segment = b"\xff\xe1\xff\xff" + bytes(65533)
    return JPEG[:2] + segment * (LARGE // len(segment)) + JPEG[2:]


def padding() -> bytes:
    return JPEG[:2] + b"\xff" * LARGE + JPEG[2:]


def junk() -> bytes:
    return JPEG[:2] + b"\xff\xe0\x00\x02" + b"a" * LARGE


def overlapping_tags() -> bytes:
    """Nine thousand entries, each of which is nearly the whole file."""
    entry = b"\x07\x00" + (900_000).to_bytes(4, "little") + bytes(4)
    entries = [(2000 + i).to_bytes(2, "little") + entry for i in range(9_000)]
    return tiff(8, 8, *entries, size=1_000_000)


def long_comment() -> bytes:
    return GIF[:13] + b"\x21\xfe" + (b"\xff" + b" " * 255) * 370_000 + b"\x00" + GIF[13:]


def endless_ppm() -> bytes:
    return b"P3 # " + b"a" * LARGE


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + len(part).to_bytes(4, "little") + part for name, part in chunks)
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


def webp_words() -> bytes:
    canvas = b"\x04\x00\x00\x00" + (7).to_bytes(3, "little") * 2
    return riff((b"VP8X", canvas), (WEBP[12:16], WEBP[20:]), (b"XMP ", b" " * LARGE))


def many_webp_chunks() -> bytes:
    return riff((WEBP[12:16], WEBP[20:]), *[(b"ODD ", b"")] * 9_000_000)


def avif_words() -> bytes:
    return AVIF + (LARGE + 8).to_bytes(4, "big") + b"free" + bytes(LARGE)


BOMBS: dict[str, Callable[[], bytes]] = {name: partial(bytes, content) for name, content in claims()}
BOMBS |= {
    make.__name__.replace("_", " "): make
    for make in (
        compressed_text, compressed_profile, plain_text, many_texts, text_over_the_limit_of_a_file,
        many_segments, padding, junk, overlapping_tags, long_comment, endless_ppm, webp_words,
        many_webp_chunks, avif_words,
    )
}  # fmt: skip

BOMB = """
import sys, time
from pathlib import Path
from PIL import Image
from beit.image import BadImage, read_image
from fuzz_images import peak_mib
Image.init()
for warm in sys.argv[2:]:
    read_image(warm)  # what Pillow loads for itself, once
if Path("/proc/self/clear_refs").exists():
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak_mib()
started = time.perf_counter()
codes = ["read", "read"]
try:
    read_image(sys.argv[1])
except BadImage as error:
    codes[0] = error.code
milliseconds = round((time.perf_counter() - started) * 1000, 1)
grown = round(peak_mib() - before)
content = Path(sys.argv[1]).read_bytes()
try:
    read_image(content)
except BadImage as error:
    codes[1] = error.code
print(*codes, milliseconds, grown)
"""


def test_there_are_forty_bombs() -> None:
    assert len(BOMBS) >= 40


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    """In a process of its own, under 50 MB for a file that is larger too; its bytes are refused alike."""
    bomb = tmp_path / "bomb"
    bomb.write_bytes(BOMBS[name]())
    warm = [str(PICTURES[0].parent / file) for file in ("rgb_tiny_9x13.png", "rgb_exif6_240x160.jpg")]
    command = [sys.executable, "-W", "error", "-c", BOMB, str(bomb), *warm]
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(Path(__file__).parent)])
    environment = ENVIRONMENT | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    bomb.unlink()
    assert (done.returncode, done.stderr) == (0, "")
    code, of_bytes, milliseconds, grown = done.stdout.split()
    print(f"{name}: {code} in {milliseconds} ms, {grown} MiB")
    assert code == of_bytes != "read"
    assert int(grown) < 50


def test_ten_thousand_frames_are_one_picture() -> None:
    """Only the first is read; the others are not even counted."""
    frame = Image.fromarray(noise(8, 8)).quantize(4)
    gif = encoded(frame, "GIF")
    start = gif.index(b"\x2c")
    many = gif[:-1] + gif[start:-1] * 9_999 + b"\x3b"
    with Image.open(io.BytesIO(many)) as image:
        assert image.n_frames == 10_000
    np.testing.assert_array_equal(read_image(many), frame.convert("RGB"))


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


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 2000), (2000, 4), (3001, 7)])
@pytest.mark.parametrize("filter_name", ["bicubic", "lanczos"])
def test_the_middle_of_a_thin_picture_is_that_of_all_of_it(
    size: tuple[int, int], filter_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    spec = ImageSpec(size=(16, 20), crop_ratio=0.875, filter=filter_name)
    middle = resize_and_crop(picture, spec)
    monkeypatch.setattr(beit.image, "THIN", math.inf)
    assert np.abs(middle.astype(int) - resize_and_crop(picture, spec)).max() <= 1


def test_a_line_of_forty_million_pixels_is_prepared_in_little_memory() -> None:
    line = np.zeros((40_000_000, 1, 3), dtype=np.uint8)
    line[::2] = 255
    spec = ImageSpec(size=(224, 224), crop_ratio=0.875)  # 256 x 10,240,000,000 if it were resized whole
    assert np.array_equal(resize_and_crop(line, spec).mean(axis=(0, 1)).round(), [128, 128, 128])


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


def test_evaluation_is_that_of_timm_byte_for_byte() -> None:
    with np.load(GOLDEN / "processor-timm.npz") as file:
        expected = {name: file[name] for name in file.files}
    table = expected.pop("lut")  # pixel_values[c] = table[c][bytes[c]]
    assert len(expected) > 20
    for name, theirs in expected.items():
        kind, picture, size, crop_ratio = name.split("|")
        every = 3 if kind == "u8_every3" else 1
        spec = ImageSpec(size=(int(size), int(size)), crop_ratio=float(crop_ratio))
        with Image.open(GOLDEN / "images" / picture) as image:
            array = np.asarray(image.convert("RGB"))  # timm leaves pictures as their camera lay
        ours = resize_and_crop(array, spec).transpose(2, 0, 1)[:, ::every, ::every]
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        values = np.stack([table[c][theirs[c]] for c in range(3)])
        prepared = preprocess(array, spec)[:, ::every, ::every]
        np.testing.assert_allclose(prepared, values, atol=2e-6, err_msg=name)


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


def test_another_size_follows_the_usual_rules_and_keeps_what_somebody_chose() -> None:
    for usual in (unilm_spec(224), timm_spec(224), timm_spec(224, large_v2=True)):
        assert resized_spec(usual, (384, 384)).crop_ratio == 1.0
        assert resized_spec(usual, (256, 256)).crop_ratio == usual.crop_ratio
    assert resized_spec(timm_spec(512), (224, 224)).crop_ratio == 0.875
    assert resized_spec(ImageSpec((224, 224), crop_ratio=0.8), (384, 384)).crop_ratio == 0.8
    assert resized_spec(ImageSpec((224, 224), crop_ratio=1.0), (384, 384)).crop_ratio == 1.0
    squashed = replace(ImageSpec((224, 224)), resize="squash")
    assert resized_spec(squashed, (384, 256)) == replace(squashed, size=(384, 256))


def test_timms_rule_crops_less() -> None:
    assert [timm_spec(size).crop_ratio for size in (224, 383, 384, 512)] == [0.9, 0.9, 1.0, 1.0]
    assert [timm_spec(size, large_v2=True).crop_ratio for size in (224, 384)] == [0.95, 1.0]
    assert timm_spec(224) == ImageSpec((224, 224), "short_side", "bicubic", 0.9, HALF, HALF)


@pytest.mark.parametrize("preset", [unilm_spec, timm_spec, transformers_spec])
def test_every_preset_takes_the_statistics_of_the_weights(preset: Callable[..., ImageSpec]) -> None:
    assert (preset(224).mean, preset(224).std) == (HALF, HALF)
    spec = preset(224, IMAGENET_MEAN, IMAGENET_STD)
    assert (spec.mean, spec.std) == (IMAGENET_MEAN, IMAGENET_STD)


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


@pytest.mark.parametrize("size", [32, 224])
def test_transformers_preset_is_the_processor_of_the_published_folders(size: int) -> None:
    """Their preprocessor_config.json says: size, no centre crop, resample 2, statistics 0.5."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    processor = transformers.BeitImageProcessorPil(
        size={"height": size, "width": size},
        resample=2,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    for number, (height, width) in enumerate(sizes(8)):
        image = noise(height, width, number)
        theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(preprocess(image, transformers_spec(size)), theirs)


# --- Every door ----------------------------------------------------------------------------------


def odd_pictures() -> dict[str, bytes]:
    """Some two hundred files: every mode and format in odd sizes, every orientation, several frames."""
    found: dict[str, bytes] = {}
    for number, (height, width) in enumerate([(1, 1), (1, 5000), (5000, 1), (3, 7), (31, 17), (64, 64)]):
        rgb = Image.fromarray(noise(height, width, number))
        palette, clear = rgb.quantize(16), rgb.convert("RGBA")
        clear.putalpha(Image.fromarray(noise(height, width, 99)[..., 0]))
        deep = np.random.default_rng(number).integers(0, 65536, (height, width), dtype=np.uint16)
        sixteen = Image.fromarray(deep)
        wide, real = (Image.fromarray(deep.astype(kind)) for kind in (np.int32, np.float32))
        modes = {mode: rgb.convert(mode) for mode in ("1", "L", "CMYK", "RGB", "YCbCr")}
        modes |= {
            "P": palette,
            "RGBA": clear,
            "LA": clear.convert("LA"),
            "I;16": sixteen,
            "I": wide,
            "F": real,
        }
        kinds = {
            "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
            "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"),
            "jpeg": ("L", "RGB", "CMYK", "YCbCr"),
            "bmp": ("1", "L", "P", "RGB", "RGBA"),
            "ppm": ("1", "L", "RGB", "I"),
            "webp": ("RGB", "RGBA"),
            "avif": ("RGB", "RGBA"),
            "gif": ("L", "P"),
        }
        for kind, names in kinds.items():
            for mode in names:
                name = f"{height}x{width}-{mode.replace(';', '')}.{kind}"
                found[name] = encoded(modes[mode], kind)
        levels = bytes(range(0, 256, 16))
        found[f"{height}x{width}-clear.png"] = encoded(palette, "PNG", transparency=levels)
        for kind in ("gif", "png", "webp", "tiff"):
            content = encoded(rgb, kind, save_all=True, append_images=[rgb.rotate(180)])
            found[f"{height}x{width}-frames.{kind}"] = content
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        for kind in ("jpeg", "png", "webp", "tiff"):
            content = encoded(Image.fromarray(noise(21, 34)), kind, exif=exif)
            found[f"exif{orientation}.{kind}"] = content
    return found


def test_every_door_shows_a_network_the_same_pixels(tmp_path: Path) -> None:
    """Path, bytes, opened, Pillow, loader, classify, and the exported preprocessing: bit for bit."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    import torch

    from beit.configs import describe_processor
    from beit.data import BadImages, Loader, open_source
    from beit.engine import Engine
    from beit.model import BeitConfig, BeitForImageClassification

    pictures = odd_pictures()
    assert len(pictures) >= 200
    for name, content in pictures.items():
        (tmp_path / name).write_bytes(content)
    paths = sorted(tmp_path.iterdir())

    spec = transformers_spec(16, IMAGENET_MEAN, IMAGENET_STD)
    shape: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    model = BeitForImageClassification(BeitConfig(**shape, num_classes=2))
    model.image_spec = spec
    described = describe_processor(spec)
    described.pop("image_processor_type")
    processor = transformers.BeitImageProcessorPil(**described)

    source = open_source(tmp_path)
    assert len(source) == len(paths)
    shown: list[torch.Tensor] = []
    model.patch_embed.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    engine = Engine(model, device="cpu", runtime="torch", precision="fp32")
    answers = list(engine.classify([str(path) for path in paths]))
    assert [answer.error for answer in answers] == [None] * len(paths)
    seen = torch.cat(shown).numpy()
    shown.clear()
    assert [answer.error for answer in engine.embed(source)] == [None] * len(paths)
    np.testing.assert_array_equal(torch.cat(shown).numpy(), seen)

    bad_images = BadImages(tmp_path / "bad.csv", len(source), 0.0)
    loader = Loader(source, len(source), seed=0, workers=0, bad_images=bad_images)
    (trained_on,) = loader.batches(range(1), lambda picture, rng: picture.read())
    for number, pixels in trained_on:
        np.testing.assert_array_equal(pixels, read_image(paths[number]), err_msg=paths[number].name)

    for number, path in enumerate(paths):
        image = read_image(path)
        for other in (
            read_image(pictures[path.name]),
            open_image(path).read(),
            source.read(number),
            read_image(Image.open(io.BytesIO(pictures[path.name]))),
        ):
            np.testing.assert_array_equal(other, image, err_msg=path.name)
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")
            if opened.mode[0] not in "IF":
                theirs = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
                np.testing.assert_array_equal(image, theirs, err_msg=path.name)
        exported = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(seen[number], exported, err_msg=path.name)


def test_an_error_travels_between_processes_as_it_is() -> None:
    for error in (BadImage("torn", "p.jpg", "is half a file"), Stopped(143, "saved at step 3")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), vars(again)) == (str(error), vars(error))
    assert str(BadImage("torn", "p.jpg", "is half a file")) == "p.jpg: is half a file"
