"""Duplicates are found by pixels, near ones by thumbnails, and others are not taken for them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import draw_shape
from PIL import Image, ImageEnhance

from beit.duplicates import duplicates, joined, near_pairs, pixel_hash, thumbnail


def test_equal_pixels_have_equal_hashes_and_another_shape_has_not() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    other = image.copy()
    other[0, 0, 0] += 1
    assert pixel_hash(image) == pixel_hash(np.asfortranarray(image))
    assert len({pixel_hash(image), pixel_hash(other), pixel_hash(image.reshape(4, 2, 3))}) == 3


def test_duplicates_are_grouped_in_order() -> None:
    hashes = [b"a", b"b", b"c", b"b", b"a", b"b"]
    assert duplicates(hashes) == [[0, 4], [1, 3, 5]]
    assert duplicates([b"a", b"b"]) == []


def photo(seed: int, size: int = 160) -> Image.Image:
    """Smooth noise: as uneven as a photograph, and of no object."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def saved_again(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=60)
    return Image.open(stream).convert("RGB")


COPIES = {
    "saved as JPEG": saved_again,
    "half as large": lambda p: p.resize((80, 80), Image.Resampling.LANCZOS),
    "a little brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.01),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_a_picture_are_near_and_other_pictures_are_not(name: str) -> None:
    pictures = [photo(seed) for seed in range(30)]
    pictures += [COPIES[name](picture) for picture in pictures]
    thumbnails = np.stack([thumbnail(np.asarray(picture)) for picture in pictures])
    assert near_pairs(thumbnails).tolist() == [[i, i + 30] for i in range(30)]


def test_pictures_alike_but_not_copies_are_not_near() -> None:
    """Flat colours one can tell apart, and simple shapes in other places."""
    flat = [np.full((40, 40, 3), level, dtype=np.uint8) for level in range(100, 130)]
    assert len(near_pairs(np.stack([thumbnail(image) for image in flat]))) == 0
    rng = np.random.default_rng(0)
    shapes = [draw_shape(shape, 36, rng) for shape in ("disc", "square", "triangle") for _ in range(40)]
    assert len(near_pairs(np.stack([thumbnail(np.asarray(shape)) for shape in shapes]))) == 0


def test_pairs_are_found_beyond_a_block() -> None:
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (2500, 16, 16, 3), dtype=np.uint8)
    thumbnails[2400], thumbnails[1500] = thumbnails[10], thumbnails[1100]
    assert near_pairs(thumbnails).tolist() == [[10, 2400], [1100, 1500]]


def test_a_thousand_blank_pages_make_few_pairs_and_one_group() -> None:
    rng = np.random.default_rng(0)
    noisy = (250 - (rng.random((3000, 16, 16, 3)) < 0.01)).astype(np.uint8)
    noisy[7], noisy[2999] = thumbnail(np.asarray(photo(1))), thumbnail(np.asarray(photo(1)))
    pairs = near_pairs(noisy)
    assert len(pairs) == 2998  # each page but one, and the photograph's copy
    groups = joined(3000, pairs)
    assert set(groups.tolist()) == {0, 7}
    assert groups[2999] == 7


def test_chains_are_joined_to_one_group_with_the_number_of_its_first() -> None:
    assert joined(7, [[5, 3], [3, 1], [6, 2]]).tolist() == [0, 1, 2, 1, 4, 1, 2]
    assert joined(3, []).tolist() == [0, 1, 2]
