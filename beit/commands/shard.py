"""`beit shard`: copy a dataset into tar shards of smaller JPEGs, which a run reads several times faster.

    OUT/train-00000.tar ...   KEY.jpg, and KEY.cls with the number of its class, in the source's order
    OUT/classes.txt           the name of class 0, 1, ...
    OUT/shards.json           what the shards were made from, and how many there are
    OUT/bad_images.csv        pictures that could not be read and are left out

A shard is written beside its place and renamed when the disk holds it. The same command again makes
only those that are missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
from contextlib import closing, suppress
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from cyclopts.validators import Number
from PIL import Image

from beit.atomic import CURE, CannotWrite, flush, naming, write_atomically
from beit.data import MANIFEST, Bad, BadImages, ImageSource, SomeSkipped, has_split, open_source
from beit.folder_lock import FolderLock, hold
from beit.image import BadImage, is_upright_rgb_jpeg, open_image
from beit.plural import counted
from beit.progress import Progress
from beit.ranges import Share
from beit.workers import load_in_processes, now_doing

SPLITS = ("train", "val", "test")
GLIMPSES = 16  # pictures of each split that are looked into, to know the same ones again


@Parameter(name="*")
@dataclass(frozen=True)
class Shard:
    data: Path
    """What a run would be given: a folder, a list, shards or Parquet; of train/ and val/ both."""
    out: Annotated[Path, Parameter(alias="-o")]
    """Folder for the shards; a run takes it as its data."""
    _: KW_ONLY
    short_side: PositiveInt = 256
    """Pixels; smaller pictures stay as they are."""
    quality: Annotated[int, Parameter(validator=Number(gte=1, lte=95))] = 90
    """Of the JPEGs, 1 to 95."""
    shard_size: PositiveInt = 5000
    """Pictures a shard."""
    max_bad_images: Share = 0.01
    """Share of the pictures that may be unreadable; more stops it with exit code 4."""
    workers: NonNegativeInt = os.cpu_count() or 1
    """Processes that write, each a shard at a time."""


def shard(settings: Shard) -> dict[str, int]:
    """Write the shards that are missing; returns how many there are of each split."""
    splits = [split for split in SPLITS if has_split(settings.data, split)]
    sources = {split: open_source(settings.data, split) for split in splits}
    sources = sources or {"shard": open_source(settings.data)}
    first, classes = next((split, source.classes) for split, source in sources.items())
    sources = {
        split: source.with_classes(classes, f"its {first} part") if source.classes else source
        for split, source in sources.items()
    }
    odd = [name for name in classes if name != name.strip() or "\n" in name]
    if odd:
        raise ValueError(
            f"{settings.data} has the class {odd[0]!r}, and classes.txt has one a line, without blanks "
            "around it; rename it"
        )
    number = {split: -(-len(source) // settings.shard_size) for split, source in sources.items()}
    lock = begin(settings, sources, number, classes)

    total = sum(map(len, sources.values()))
    bad_images = BadImages(settings.out / "bad_images.csv", total, settings.max_bad_images)
    jobs = [
        (split, part, file)
        for split in sources
        for part in range(number[split])
        if not (file := settings.out / f"{split}-{part:05d}.tar").exists()
    ]
    firsts = dict(zip(sources, accumulate(map(len, sources.values()), initial=0), strict=False))

    def write(job: int) -> list[Bad]:
        split, part, file = jobs[job]
        return write_shard(sources[split], part, firsts[split], file, settings)

    written = load_in_processes(write, range(len(jobs)), settings.workers)
    try:
        # Closed first: then nobody writes any more what is removed.
        workers = closing(written)  # type: ignore[type-var]  # a generator
        with Progress("shards", len(jobs)) as progress, workers, naming(settings.out):
            for done, bad in enumerate(written, 1):
                bad_images.add(bad)  # on the list before the shard is there: a killed run forgets none
                _, _, file = jobs[done - 1]
                os.replace(beside(file), file)
                progress.update(done, f"{len(bad_images)} bad")
    finally:
        for _, _, file in jobs:
            beside(file).unlink(missing_ok=True)
    flush(settings.out)
    del lock
    print(
        f"{settings.out}: {counted(total - len(bad_images), 'picture')} in "
        f"{counted(sum(number.values()), 'shard')}",
        file=sys.stderr,
    )
    if bad_images.found:
        raise SomeSkipped(
            f"{len(bad_images):,} of {counted(total, 'picture')} left out; see {bad_images.file}"
        )
    return number


def begin(
    settings: Shard, sources: dict[str, ImageSource], number: dict[str, int], classes: tuple[str, ...]
) -> FolderLock | None:
    """Make the folder, or see that what it holds is a part of the same; held while the lock lives."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources.values():
        for column in (source.paths.text, source.paths.ends, source.labels):
            digest.update(np.ascontiguousarray(column).data)
        digest.update("\n".join(source.classes).encode(errors="surrogateescape"))
        some = np.linspace(0, len(source) - 1, GLIMPSES).astype(int)  # names may be 1.jpg, 2.jpg ...
        for index in some.tolist():
            with suppress(BadImage):
                digest.update(source.paths.glimpse(index))
    about = {
        "short_side": settings.short_side,
        "quality": settings.quality,
        "shard_size": settings.shard_size,
        "pictures": digest.hexdigest(),
        "shards": number,
    }
    manifest = settings.out / MANIFEST
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        lock = hold(settings.out)
        if not manifest.exists() and any(settings.out.iterdir()):
            raise ValueError(f"{settings.out} is not empty and holds no shards; choose another folder")
        if not manifest.exists():
            if classes:
                lines = "".join(f"{c}\n" for c in classes).encode(errors="surrogateescape")
                write_atomically(settings.out / "classes.txt", lines)
            write_atomically(manifest, json.dumps(about, indent=1).encode())
    except OSError as error:
        raise CannotWrite(f"cannot write {settings.out}: {error.strerror or error}; {CURE}") from error
    before = json.loads(manifest.read_text())
    changed = [f"{key} was {before.get(key)}, now {value}" for key, value in about.items()
               if before.get(key) != value]  # fmt: skip
    if changed:
        raise ValueError(
            f"{settings.out} holds shards made otherwise ({'; '.join(changed)}); use the same data and "
            "settings to go on, or another folder"
        )
    return lock


def beside(file: Path) -> Path:
    """Where a shard is written before it has its name; hidden, so that nobody lists it."""
    return file.with_name(f".{file.name}")


def write_shard(source: ImageSource, part: int, first: int, file: Path, settings: Shard) -> list[Bad]:
    """Write the pictures of one shard beside its place; returns the bad ones, numbered from `first`."""
    bad = []
    with tarfile.open(beside(file), "w", format=tarfile.GNU_FORMAT) as tar:
        start = part * settings.shard_size
        for index in range(start, min(start + settings.shard_size, len(source))):
            name = source.name(index)
            now_doing(name)
            try:
                content = jpeg(source.paths.content(index), name, settings)
            except BadImage as error:
                bad.append(Bad(first + index, name, error.code, error.reason))
                continue
            key = f"{index:08d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(name).stem)[:60]}"
            _add(tar, f"{key}.jpg", content)
            if len(source.labels):
                _add(tar, f"{key}.cls", str(source.labels[index]).encode())
    flush(beside(file))
    return bad


def jpeg(content: bytes, name: str, settings: Shard) -> bytes:
    """A picture as an upright RGB JPEG; one that is that already, and small enough, byte for byte."""
    opened = open_image(content, name)
    picture = opened.picture()  # also what is copied must be whole
    width, height = picture.size
    if min(width, height) <= settings.short_side:
        if is_upright_rgb_jpeg(content):
            return content
    else:
        scale = settings.short_side / min(width, height)
        size = (
            max(settings.short_side, round(width * scale)),
            max(settings.short_side, round(height * scale)),
        )
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if max(picture.size) > 65_500:
        raise BadImage("too_large", name, f"{width} x {height} pixels; a JPEG has 65,500 a side")
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=settings.quality)
    return stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
