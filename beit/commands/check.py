"""`beit check`: read every picture of a dataset once, and tell what would trouble a run."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt

from beit.atomic import check_place, replacing
from beit.data import Bad, ImageSource, SomeSkipped, TooManyBadImages, has_split, open_source
from beit.image import BadImage, open_image
from beit.names import printable
from beit.plural import counted
from beit.progress import Progress
from beit.ranges import Share
from beit.workers import load_in_processes, now_doing

SPLITS = ("train", "val", "test")
CHUNK = 64  # pictures that a worker reads at a time
SHOWN = 10


@Parameter(name="*")
@dataclass(frozen=True)
class Check:
    data: Path
    """What a run would be given: a folder, a list, shards or Parquet; of train/ and val/ both. Several
    labels of a picture, a;b, are counted as a class of that name."""
    _: KW_ONLY
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """Write what is wrong to this .csv: split, path, problem, detail."""
    max_bad_images: Share = 0.01
    """Share of the pictures that may be unreadable; beyond it the exit code is 4."""
    workers: NonNegativeInt = os.cpu_count() or 1
    """Processes that read."""
    json: bool = False
    """Print one JSON object instead of words."""


class Read(NamedTuple):
    """What reading all pictures of a source has shown."""

    sizes: np.ndarray  # (n, 2) int32 width and height; 0 where bad
    digests: np.ndarray  # (n,) uint64 of the files' contents
    bad: list[Bad]


def check(settings: Check) -> dict[str, Any]:
    """Read everything once; print classes, sizes, duplicates and bad files."""
    out = settings.out
    check_place(out, [settings.data], ".csv")
    splits = [split for split in SPLITS if has_split(settings.data, split)]
    sources = {split: open_source(settings.data, split) for split in splits}
    sources = sources or {"all": open_source(settings.data)}
    read = {split: read_all(source, split, settings.workers) for split, source in sources.items()}

    result: dict[str, Any] = {split: describe(sources[split], read[split]) for split in sources}
    problems = [
        (split, bad.path, "bad", bad.reason) for split, found in read.items() for bad in found.bad
    ]
    same = duplicates(sources, read)
    problems += [(split, path, "duplicate", of) for split, path, of, _ in same]
    result["duplicates"] = len(same)
    result["duplicates_across_splits"] = sum(across for _, _, _, across in same)
    first, *others = sources.values()
    strange = sorted({name for source in others for name in source.classes} - set(first.classes))
    lacking = sorted({name for s in others if s.classes for name in set(first.classes) - set(s.classes)})
    result["classes_only_outside_train"] = strange
    result["classes_only_in_train"] = lacking

    if settings.json:
        print(json.dumps(result))
    else:
        show(result, list(sources), problems)
    if out is not None:
        utf8: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # names need not be
        with replacing(out) as beside, beside.open("w", newline="", **utf8) as stream:
            csv.writer(stream).writerows([("split", "path", "problem", "detail"), *problems])
    number = sum(len(found.bad) for found in read.values())
    total = sum(map(len, sources.values()))
    if number:
        told = f"{number:,} of {counted(total, 'picture')} cannot be read"
        if number > math.ceil(settings.max_bad_images * total):
            raise TooManyBadImages(f"{told}; a run stops at {settings.max_bad_images:.1%}")
        raise SomeSkipped(f"{told}; a run replaces each by another")
    return result


def read_all(source: ImageSource, label: str, workers: int) -> Read:
    """Decode every picture and hash every file, in parallel."""
    parts = range(-(-len(source) // CHUNK))

    def read(part: int) -> list[tuple[int, int, int, Bad | None]]:
        return [read_one(source, i) for i in range(part * CHUNK, min((part + 1) * CHUNK, len(source)))]

    sizes = np.zeros((len(source), 2), dtype=np.int32)
    digests = np.zeros(len(source), dtype=np.uint64)
    bad: list[Bad] = []
    with Progress(f"reading {label}", len(source), quiet=len(source) < 1000) as progress:
        index = 0
        for rows in load_in_processes(read, parts, workers):
            for width, height, digest, wrong in rows:
                sizes[index], digests[index] = (width, height), digest
                bad += [wrong] if wrong else []
                index += 1
            progress.update(index, f"{len(bad)} bad")
    return Read(sizes, digests, bad)


def read_one(source: ImageSource, index: int) -> tuple[int, int, int, Bad | None]:
    """(width, height, digest of the file, what is wrong) of a picture."""
    name, digest = source.name(index), 0
    now_doing(name)
    try:
        content = source.paths.content(index)
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        height, width, _ = open_image(content, name).read().shape
        return width, height, digest, None
    except BadImage as error:
        return 0, 0, digest, Bad(index, name, error.code, error.reason)


def describe(source: ImageSource, read: Read) -> dict[str, Any]:
    """The numbers of one split."""
    good = read.sizes[read.sizes[:, 0] > 0]
    short = good.min(axis=1) if len(good) else np.zeros(1, dtype=int)
    counts = np.bincount(source.labels, minlength=len(source.classes))
    return {
        "pictures": len(source),
        "bad": len(read.bad),
        "classes": len(source.classes),
        "smallest_class": int(counts.min(initial=len(source))) if len(counts) else 0,
        "largest_class": int(counts.max(initial=0)),
        "short_side": [int(short.min()), int(np.median(short)), int(short.max())],
    }


def duplicates(
    sources: dict[str, ImageSource], read: dict[str, Read]
) -> list[tuple[str, str, str, bool]]:
    """(split, path, path of the first with the same content, whether that is in another split)."""
    splits = list(sources)
    ends = np.cumsum([len(source) for source in sources.values()])
    readable = np.concatenate([found.sizes[:, 0] for found in read.values()]) > 0
    digests = np.concatenate([found.digests for found in read.values()])
    _, first, number = np.unique(digests, return_index=True, return_inverse=True)
    twins = np.flatnonzero((first[number] != np.arange(len(digests))) & readable)

    def where(index: int) -> tuple[str, str]:
        split = int(np.searchsorted(ends, index, side="right"))
        inside = index - (int(ends[split - 1]) if split else 0)
        return splits[split], sources[splits[split]].name(inside)

    found = []
    for twin in twins.tolist():
        (split, path), (original_split, original) = where(twin), where(int(first[number[twin]]))
        found.append((split, path, original, split != original_split))
    return found


def show(result: dict[str, Any], splits: list[str], problems: list[tuple[str, str, str, str]]) -> None:
    """The result in words, and the first of each kind of problem."""
    for split in splits:
        about = result[split]
        smallest, median, largest = about["short_side"]
        classes = (
            f"{counted(about['classes'], 'class')} of {about['smallest_class']:,} to "
            f"{about['largest_class']:,}"
            if about["classes"]
            else "no labels"
        )
        print(
            f"{split}: {counted(about['pictures'], 'picture')}, {classes}, short side {smallest} to "
            f"{largest} pixels (median {median}), {about['bad']:,} bad"
        )
        if about["classes"] == 1:
            print(f"{split} has one class; to fine-tune takes two or more, each in a folder of its name")
    for key, told in (
        ("classes_only_outside_train", "classes that train lacks"),
        ("classes_only_in_train", "classes that another split lacks"),
    ):
        if result[key]:
            names = printable(", ".join(result[key][:SHOWN]))
            print(f"{told}: {names}{_more(len(result[key]))}")
    across = result["duplicates_across_splits"]
    print(
        f"{counted(result['duplicates'], 'duplicate')}, {across:,} of them of a picture in another split"
    )
    for kind in ("bad", "duplicate"):
        of_kind = [problem for problem in problems if problem[2] == kind]
        for split, path, _, detail in of_kind[:SHOWN]:
            print(printable(f"  {kind} in {split}: {path} ({detail})"))
        if len(of_kind) > SHOWN:
            print(f"  {_more(len(of_kind)).strip()}; -o FILE.csv lists all")


def _more(number: int) -> str:
    return f" and {number - SHOWN:,} more" if number > SHOWN else ""
