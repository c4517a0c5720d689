"""A validation split for pictures that come without one: seeded, by class, duplicates on one side.

A picture and its copy on both sides would make every number too good, so the split is of groups of
duplicates. Each class gives the same share; one with a single group gives none, as it must be learned.

Shapes: n pictures; labels int64 (n,), groups int64 (n,).
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beit.atomic import write_atomically
from beit.data import Bad, ImageSource
from beit.duplicates import SIDE, duplicates, joined, near_pairs, pixel_hash, thumbnail
from beit.image import BadImage
from beit.listing import is_address
from beit.workers import load_in_processes, now_doing

MOST_LOOKED_AT = 20_000  # pictures; to compare more with each other takes minutes
SEPARATOR = ";"  # of the labels of a picture that has several
CHUNK = 32  # pictures that a worker looks at at a time


@dataclass(frozen=True)
class Looked:
    """What looking at every picture of a source has shown."""

    hashes: list[bytes]  # of pixels; of what cannot be read the name's
    thumbnails: np.ndarray  # uint8 (n, 16, 16, 3)
    sizes: np.ndarray  # int64 (n, 2) width and height; 0 where bad
    bad: list[Bad]

    def exact(self) -> list[list[int]]:
        """Groups of pictures with the same pixels."""
        return duplicates(self.hashes)

    def near(self) -> list[list[int]]:
        """Pairs of pictures with nearly the same pixels, those with the same included."""
        good = np.flatnonzero(self.sizes[:, 0])
        return good[near_pairs(self.thumbnails[good])].tolist()


def look(source: ImageSource, workers: int) -> Looked:
    """Decode every picture once; large JPEGs at a fraction of their size, which is enough to compare."""
    chunks = range(-(-len(source) // CHUNK))

    def some(chunk: int) -> list[tuple[bytes, np.ndarray, tuple[int, int], Bad | None]]:
        return [look_at(source, i) for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(source)))]

    # A worker's array holds its shared memory, and a file descriptor: thumbnails are copied out of it.
    seen = [
        (digest, small.copy(), size, wrong)
        for part in load_in_processes(some, chunks, workers)
        for digest, small, size, wrong in part
    ]
    hashes, thumbnails, sizes, bad = zip(*seen, strict=True)
    return Looked(list(hashes), np.stack(thumbnails), np.array(sizes), [b for b in bad if b])


def look_at(source: ImageSource, index: int) -> tuple[bytes, np.ndarray, tuple[int, int], Bad | None]:
    """(hash, thumbnail, width and height, what is wrong) of a picture."""
    name = source.name(index)
    now_doing(name)
    try:
        opened = source.open(index)
        short = min(opened.size)
        pixels = opened.read(next((s for s in (8, 4, 2) if short // s >= 8 * SIDE), 1))
        return pixel_hash(pixels), thumbnail(pixels), opened.size, None
    except BadImage as error:
        blank = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        return name.encode(errors="replace"), blank, (0, 0), Bad(index, name, error.code, error.reason)


def file_hashes(sources: Sequence[ImageSource], workers: int) -> list[bytes]:
    """What each file is known by, the same for equal ones; the name of one that cannot be read.

    Nothing is decoded, and only files that are alike at a glimpse are read whole.
    """
    ends = np.cumsum([len(source) for source in sources])

    def hash_of(number: int, whole: bool) -> bytes:
        side = int(np.searchsorted(ends, number, side="right"))
        source, index = sources[side], number - int(ends[side - 1] if side else 0)
        now_doing(source.name(index))
        try:
            content = source.paths.content(index) if whole else source.paths.glimpse(index)
        except BadImage:
            return source.name(index).encode(errors="replace")
        return hashlib.blake2b(content, digest_size=16).digest()

    def hashes(numbers: Sequence[int], whole: bool) -> list[bytes]:
        def some(chunk: int) -> list[bytes]:
            return [hash_of(number, whole) for number in numbers[chunk * CHUNK : (chunk + 1) * CHUNK]]

        chunks = range(-(-len(numbers) // CHUNK))
        return [one for part in load_in_processes(some, chunks, workers) for one in part]

    found = hashes(range(int(ends[-1])), whole=False)
    alike = [number for group in duplicates(found) for number in group]
    for number, digest in zip(alike, hashes(alike, whole=True), strict=True):
        found[number] = digest
    return found


def unreadable_of(source: ImageSource, workers: int) -> list[Bad]:
    """The pictures of a source that cannot be read."""
    return look(source, workers).bad if len(source) else []


def both(one: Looked, other: Looked) -> Looked:
    """Two sources as if they were one, the first one's pictures before the other's."""
    moved = [bad._replace(sample=bad.sample + len(one.hashes)) for bad in other.bad]
    return Looked(
        one.hashes + other.hashes,
        np.concatenate([one.thumbnails, other.thumbnails]),
        np.concatenate([one.sizes, other.sizes]),
        one.bad + moved,
    )


class Divided(NamedTuple):
    """Pictures to train and to validate on, by number, and what was found on the way.

    Numbers count through the first source and then the second, where there is one.
    """

    train: np.ndarray  # int64
    val: np.ndarray  # int64; without those that cannot be read
    exact: list[list[int]]  # groups with the same pixels
    near: list[list[int]]  # groups with nearly the same, which hold the exact ones too
    bad: list[Bad]
    looked: Looked | None  # None where there are too many to look at

    def across(self, groups: list[list[int]]) -> list[list[int]]:
        """The groups that have pictures on both sides."""
        train, val = set(self.train.tolist()), set(self.val.tolist())
        return [g for g in groups if not train.isdisjoint(g) and not val.isdisjoint(g)]


def check_one_label(source: ImageSource, place: Path) -> None:
    """Refuse a list whose pictures have several labels, where one is needed."""
    several = [name for name in source.classes if SEPARATOR in name] if place.suffix == ".csv" else []
    if several:
        raise ValueError(
            f"{place} has pictures of several labels, such as {several[0]!r}, and a probe tells one class "
            f"from the others; give each picture one, or fine-tune on them: beit finetune {place} -m MODEL"
        )


def divide(
    source: ImageSource, val: ImageSource | None, share: float, seed: int, workers: int
) -> Divided:
    """Pictures to train on, and to validate on: those of `val`, else a share of each class.

    Among up to 20,000 pictures each is decoded, and copies are found by pixels and thumbnails. Among more
    files with equal bytes are copies, and only what is to validate on is decoded.
    """
    count, more = len(source), 0 if val is None else len(val)
    everything = np.arange(count + more)
    looked = None
    if count + more <= MOST_LOOKED_AT:
        looked = look(source, workers)
        looked = looked if val is None else both(looked, look(val, workers))
        exact = looked.exact()
        groups = joined(len(everything), [*exact, *looked.near()])
    else:
        exact = duplicates(file_hashes([source] if val is None else [source, val], workers))
        groups = joined(len(everything), exact)
    _, number, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(number, kind="stable")
    members = np.split(order, np.cumsum(counts)[:-1])
    near = [group.tolist() for group in members if len(group) > 1]
    held_out = np.zeros(count + more, dtype=bool)
    held_out[count:] = True
    if val is None and share:
        held_out = hold_out(source.labels, groups, share, seed)
    if looked is not None:
        bad = looked.bad
    else:
        places = np.flatnonzero(held_out)
        judged = val if val is not None else take(source, places)
        bad = [b._replace(sample=int(places[b.sample])) for b in unreadable_of(judged, workers)]
    unreadable = np.isin(everything, [b.sample for b in bad])
    to_train = everything[~held_out | (unreadable & (everything < count))]
    return Divided(to_train, everything[held_out & ~unreadable], exact, near, bad, looked)


def hold_out(labels: np.ndarray, groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool: the pictures to validate on, about `share` of each class, never a part of a group.

    A group counts as the class of its first picture. A class of two groups or more gives one at least,
    and keeps one at least.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    order = np.argsort(groups, kind="stable")
    _, begins = np.unique(groups[order], return_index=True)
    members = np.split(order, begins[1:])
    label_of = np.array([labels[group[0]] for group in members])
    _, held = np.unique(np.stack([groups, labels]), axis=1)
    left = np.bincount(held)  # groups that have the label, of those not chosen
    for label in np.unique(label_of):
        own = np.flatnonzero(label_of == label)
        wanted = share * sum(len(members[number]) for number in own)
        taken = 0
        for number in np.random.default_rng([seed, int(label), 3]).permutation(own)[:-1]:
            if taken and taken + len(members[number]) / 2 > wanted:
                break
            shown = np.unique(labels[members[number]])
            if (left[shown] == 1).any():  # of a group with several labels
                continue
            left[shown] -= 1
            chosen[members[number]] = True
            taken += len(members[number])
    return chosen


def take(source: ImageSource, chosen: np.ndarray | Sequence[int]) -> ImageSource:
    """Some pictures of a source, by their numbers (m,), in that order."""
    chosen = np.asarray(chosen, dtype=np.int64)
    places = source.paths
    begins = np.concatenate([[0], places.ends[:-1]])
    names = [places.text[begins[i] : places.ends[i]] for i in chosen]
    columns = {name: getattr(places, name) for name in ("root", "start", "size")}
    paths = replace(
        places,
        text=np.concatenate(names) if names else places.text[:0],
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        **{name: column[chosen] if len(column) else column for name, column in columns.items()},
    )
    labels = source.labels[chosen] if len(source.labels) else source.labels
    return replace(source, paths=paths, labels=labels)


def data_hash(sources: Sequence[ImageSource], looked: Looked | None) -> str:
    """What sets of pictures are known by: of their names and labels, and of the pixels where looked at."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sources:
        digest.update("\n".join(source.classes).encode(errors="replace"))
        digest.update(source.paths.text.tobytes() + np.ascontiguousarray(source.labels).tobytes())
    digest.update(b"".join(looked.hashes) if looked else b"")
    return digest.hexdigest()


def write_split(file: Path, parts: Mapping[str, tuple[ImageSource, np.ndarray]]) -> None:
    """A .csv of path, label and part, so that others can score on the same pictures.

    Paths are relative to it, so that it can be given as pictures. parts: each with the truth, int64
    (n,), or bool (n, C) where pictures have several labels.
    """
    folder = os.path.realpath(file.parent)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "label", "part"])
    for part, (source, truth) in parts.items():
        for i, true in enumerate(truth):
            name, numbers = source.name(i), np.flatnonzero(true) if truth.ndim == 2 else [true]
            place = name if is_address(name) else os.path.relpath(real_place(name), folder)
            labels = SEPARATOR.join(source.classes[number] for number in numbers)
            writer.writerow([place, labels, part])
    write_atomically(file, text.getvalue().encode(errors="surrogateescape"))


def real_place(name: str) -> str:
    """One path of a picture, whichever way leads there."""
    folder, own = os.path.split(name)
    return name if is_address(name) else os.path.join(_real_folder(folder), own)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
