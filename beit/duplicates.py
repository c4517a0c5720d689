"""Duplicates: pictures with the same pixels, or with nearly the same.

Equal pixels have equal hashes. Nearly equal ones have equal thumbnails of 16 x 16 pixels: a copy that was
saved again, resized or slightly brightened differs there by a level or two, another picture by tens. How
much may differ grows with the picture's own contrast, so that two blank walls are not one.

Shapes: n pictures; thumbnails uint8 (n, 16, 16, 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

SIDE = 16  # pixels of a thumbnail
MOST_DIFFERENT = 3.0  # levels, root mean square
SHARE_OF_CONTRAST = 0.1
ROUNDING = 0.5  # levels that flat pictures may differ by

_BLOCK = 1024  # pictures compared with all others at a time


def pixel_hash(image: np.ndarray) -> bytes:
    """What a decoded picture, uint8 (H, W, 3), is known by: the same for equal pixels in any file."""
    return hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()


def duplicates(hashes: Iterable[bytes]) -> list[list[int]]:
    """Groups of places with equal hashes, in order; those that occur once are left out."""
    groups: dict[bytes, list[int]] = {}
    for place, value in enumerate(hashes):
        groups.setdefault(value, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """A picture, uint8 (H, W, 3), as uint8 (16, 16, 3): the mean of what each pixel covers."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))


def near_pairs(thumbnails: np.ndarray) -> np.ndarray:
    """(m, 2) pairs i < j of pictures whose thumbnails (n, 16, 16, 3) are nearly the same.

    As many as join all of them to groups, fewer than n: of a thousand blank pages not each with each.
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32) - 128
    lengths = np.einsum("ij,ij->i", flat, flat)
    contrast = flat.std(axis=1)
    group = np.arange(len(flat))
    pairs: list[tuple[int, int]] = []
    for begin in range(0, len(flat), _BLOCK):
        some = slice(begin, begin + _BLOCK)
        squares = lengths[some, None] + lengths - 2 * flat[some] @ flat.T
        different = np.sqrt(np.maximum(squares, 0) / flat.shape[1])
        less = np.minimum(contrast[some, None], contrast)
        near = different <= np.minimum(MOST_DIFFERENT, SHARE_OF_CONTRAST * less + ROUNDING)
        for i, row in enumerate(near, begin):
            others = i + 1 + np.flatnonzero(row[i + 1 :])
            others = others[group[others] != group[i]]
            _, firsts = np.unique(group[others], return_index=True)
            others = np.sort(others[firsts])
            pairs += [(i, int(j)) for j in others]
            if len(others):
                group[np.isin(group, group[others])] = group[i]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def joined(count: int, same: Iterable[Sequence[int]]) -> np.ndarray:
    """(n,) the number of each picture's group: those that are the same, however far apart in a chain.

    same: groups or pairs of pictures. A group has the number of its first picture.
    """
    parent = np.arange(count)

    def first(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for group in same:
        roots = sorted({first(int(i)) for i in group})
        parent[roots] = roots[0]
    return np.array([first(i) for i in range(count)], dtype=np.int64)
