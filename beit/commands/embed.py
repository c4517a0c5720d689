"""`beit embed`: vectors of any number of pictures, in shards; a job that was stopped goes on.

A shard is embedded by itself, its batches begin where it begins: so its bytes are the same in one run,
after a stop, and in any split over processes, on one machine. What is done is known from the manifest and
the seals alone, before torch is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from cyclopts import Parameter
from cyclopts.types import PositiveInt

from beit.data import ImageSource, SomeSkipped, TooManyBadImages, find_pictures, names_on_stdin
from beit.embeddings import (
    BAD_IMAGES,
    DTYPES,
    BadPicture,
    Dtype,
    Embeddings,
    EmbeddingsError,
    Format,
    Manifest,
    Seal,
    begin,
    cannot_write,
    make_scratch,
    model_sha256,
    read_manifest,
    sweep,
    unit,
)
from beit.engine import Engine, Entry, Precision, Runtime
from beit.graphs import EmbedPooling
from beit.hub import resolve
from beit.listing import is_address, list_names
from beit.plural import counted
from beit.progress import Progress
from beit.ranges import Share
from beit.stop import stop_at_once

SHARD_SIZE = {"mean": 10_000, "cls": 10_000, "tokens": 256}  # 15 MB, and 77 MB, of base-224 in fp16


@Parameter(name="*")
@dataclass(frozen=True)
class Embed:
    images: Annotated[list[str], Parameter(consume_multiple=True, allow_leading_hyphen=True)]
    """Pictures, folders, patterns such as 'a/*.jpg', tar or Parquet shards, a .txt or .csv that lists
    pictures, or - for such a list on stdin."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, a name that `beit models` lists, or a file of `beit export`."""
    out: Annotated[Path, Parameter(alias="-o")]
    """Folder for the shards. The same command again goes on with what is missing or damaged."""
    pooling: EmbedPooling = "mean"
    """Mean of the patches, cls, or all tokens (197 times the room at 224 px)."""
    layer: int | None = None
    """Block to read, without a norm; the end of the model if not given. In a model that was only
    pre-trained the middle is better, 9 of 12 or 14 of 24."""
    dtype: Dtype = "fp16"
    """Of the vectors. fp16 is half the room; in searches it changes a cosine by less than 0.001."""
    normalise: bool = False
    """Scale each vector to length 1. Not needed for `beit search`, and the lengths are lost."""
    format: Format = "npy"
    """npy with a .csv of paths beside it, or parquet with both."""
    shard_size: PositiveInt | None = None
    """Pictures a shard; 10000 if not given, for tokens 256."""
    part: str | None = None
    """2/8 embeds the second of eight parts, every eighth shard; torchrun's processes take theirs
    unasked. Parts need not know of each other, and may run at any time, on any machine."""
    max_bad_images: Share = 0.01
    """Share of the pictures that may be unreadable; more stops it with exit code 4."""
    retry_bad: bool = False
    """Embed the shards with unreadable pictures anew."""
    verify: bool = False
    """Compare the checksums of the shards that are there, too, not their sizes alone."""
    img_size: PositiveInt | None = None
    """Pixels a side that the model sees, if not its own: its tables of positions are resized."""
    batch_size: PositiveInt = 16
    runtime: Runtime = "auto"
    """What computes; auto is the fastest here that agrees with torch, and stays for the whole folder."""
    precision: Precision = "auto"
    """auto is bf16 where the processor has it; int8 is for files of `beit export`."""
    threads: PositiveInt | None = None
    """Of the model; the runtime's choice if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""
    verbose: bool = False
    """Say which runtime computes, and why."""


def embed(settings: Embed) -> int:
    """Embed what is missing; returns how many vectors the folder then has."""
    part, parts = which_part(settings.part)
    check(settings)
    sources = join(find_pictures(settings.images, "embed"))
    wanted = wanted_of(settings, sources)
    used = settings.out.is_dir() and any(f.name[0] != "." for f in settings.out.iterdir())
    held = read_manifest(settings.out)
    if held is None and used:
        raise ValueError(f"{settings.out} is not empty and holds no embeddings; choose another folder")
    work = None
    if held is not None:
        refuse_others(settings.out, held, wanted)
        sweep(settings.out)
        work = missing(Embeddings(settings.out), settings, part, parts)
    if work is None or work.shards:
        with stop_at_once():
            write_missing(settings, sources, wanted, held, work)
    return finish(settings, part, parts)


# --- Before the model ----------------------------------------------------------------------------


def which_part(given: str | None) -> tuple[int, int]:
    """(i, n) of --part i/n, or of torchrun's environment; (1, 1) where there is one process."""
    if given is None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return (int(os.environ["RANK"]) + 1, world) if world > 1 else (1, 1)
    first, slash, last = given.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--part {given} must be like 2/8: the second of eight parts")
    return int(first), int(last)


def check(settings: Embed) -> None:
    """Refuse what cannot be done, before anything is looked at."""
    if settings.format == "parquet":
        from importlib.util import find_spec

        if settings.pooling == "tokens":
            raise ValueError("--pooling tokens is for --format npy; Parquet holds one vector a picture")
        if find_spec("pyarrow") is None:
            raise ValueError('--format parquet needs pyarrow: pip install "beit[parquet]"')


def join(found: list[ImageSource | str]) -> list[ImageSource]:
    """What was found as sources; single pictures that follow one another, and stdin's, as one."""
    sources: list[ImageSource] = []
    names: list[str] = []

    def end_names() -> None:
        if names:
            sources.append(ImageSource(list_names(names).places, np.empty(0, dtype=np.int64), ()))
            names.clear()

    for place in found:
        if isinstance(place, ImageSource):
            end_names()
            sources.append(place)
        elif place == "-":
            names.extend(names_on_stdin())
        else:
            names.append(place)
    end_names()
    if not sources:
        raise ValueError("the list on stdin names no pictures; give it a path a line")
    return sources


def wanted_of(settings: Embed, sources: list[ImageSource]) -> dict[str, Any]:
    """The fields of a manifest that are known without the model; runtime and precision if not auto."""
    digest = hashlib.sha256()
    for source in sources:
        places = source.paths
        roots = [root if is_address(root) else os.path.normpath(root) for root in places.roots]
        digest.update(json.dumps(roots).encode())
        for column in (places.text, places.ends, places.root, places.start, places.size):
            digest.update(f" {len(column)} ".encode())
            digest.update(np.ascontiguousarray(column).data)
    wanted: dict[str, Any] = {
        "pictures": sum(map(len, sources)),
        "pictures_sha256": digest.hexdigest(),
        "model": settings.model,
        "model_sha256": model_sha256(resolve(settings.model)),
        "img_size": settings.img_size,
        "batch_size": settings.batch_size,
        "pooling": settings.pooling,
        "layer": settings.layer,
        "dtype": settings.dtype,
        "normalise": settings.normalise,
        "format": settings.format,
        "shard_size": settings.shard_size or SHARD_SIZE[settings.pooling],
    }
    chosen = {"runtime": settings.runtime, "precision": settings.precision}
    return wanted | {key: value for key, value in chosen.items() if value != "auto"}


def refuse_others(out: Path, held: Manifest, wanted: dict[str, Any]) -> None:
    """Raise EmbeddingsError where a folder was made otherwise."""
    changed = held.differences(wanted)
    if changed:
        raise EmbeddingsError(
            f"{out} was made otherwise ({'; '.join(changed)}); use the same pictures, model and settings "
            "to go on, or another folder"
        )


class Work(NamedTuple):
    """What there is to do for one process."""

    shards: list[int]
    bad: int  # pictures in the shards that stay


def missing(folder: Embeddings, settings: Embed, part: int, parts: int) -> Work:
    """The shards of a part that are not there, or are to be made anew."""
    stay = {
        shard: seal for shard, seal in folder.seals(settings.verify).items() if stays(seal, settings)
    }
    shards = [i for i in range(part - 1, folder.manifest.shards, parts) if i not in stay]
    return Work(shards, sum(len(seal.bad) for seal in stay.values()))


def stays(seal: Seal | None, settings: Embed) -> bool:
    """Whether a shard need not be made."""
    return seal is not None and not (settings.retry_bad and seal.bad)


# --- The work ------------------------------------------------------------------------------------


def write_missing(
    settings: Embed,
    sources: list[ImageSource],
    wanted: dict[str, Any],
    held: Manifest | None,
    work: Work | None,
) -> None:
    """Load the model, begin the folder where there is none, and write the shards that are missing."""
    is_new = not settings.out.exists()
    try:
        os.rmdir(make_scratch(settings.out))  # before minutes go into a folder that takes nothing
    except OSError as error:
        raise cannot_write(settings.out, error) from error
    try:
        engine = open_engine(settings, held)
        facts = wanted | facts_of(engine, settings)
    except BaseException:
        if is_new:
            with suppress(OSError):  # other processes may be in it already
                os.rmdir(settings.out)
        raise
    if held is None:
        held = begin(settings.out, Manifest(**facts)).manifest
        if (held.runtime, held.precision) != (engine.runtime, engine.precision):
            engine = open_engine(settings, held)  # another process was first, and found another faster
            facts = wanted | facts_of(engine, settings)
    refuse_others(settings.out, held, facts)
    if settings.verbose:
        print(f"{engine.runtime} {engine.precision}: {engine.why}", file=sys.stderr)

    folder = Embeddings(settings.out)
    shards, bad = work or missing(folder, settings, *which_part(settings.part))
    allowed = math.ceil(settings.max_bad_images * held.pictures)
    began, done = time.monotonic(), 0
    try:
        with Progress("pictures", sum(len(held.pictures_of(shard)) for shard in shards)) as progress:
            for shard in shards:
                if stays(folder.seal(shard, settings.verify), settings):
                    continue  # another process was faster
                ids, vectors, wrong = embed_shard(engine, sources, held, shard, done, progress)
                bad += len(wrong)
                if wrong and bad > allowed:
                    some = ", ".join(f"{b.path} ({b.reason})" for b in wrong[:3])
                    raise TooManyBadImages(
                        f"{bad:,} of {counted(held.pictures, 'picture')} cannot be read, where "
                        f"{settings.max_bad_images:.1%} ({allowed:,}) may: {some}. Mend them, leave them "
                        "out, or raise --max-bad-images; what is sealed is kept"
                    )
                folder.write(shard, ids, vectors, wrong)
                done += len(held.pictures_of(shard))
    finally:
        folder.close()
    seconds = time.monotonic() - began
    if done:
        count = counted(done, "picture")
        print(f"{count} in {seconds:.1f} s, {done / seconds:.1f} a second", file=sys.stderr)


def open_engine(settings: Embed, held: Manifest | None) -> Engine:
    """The engine as asked for, or as a folder was begun."""
    device = settings.device
    if device in ("auto", "cuda") and "LOCAL_RANK" in os.environ:  # torchrun's: a GPU for each
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    return Engine(
        settings.model,
        held.runtime if held else settings.runtime,  # type: ignore[arg-type]
        held.precision if held else settings.precision,  # type: ignore[arg-type]
        settings.threads,
        device=device,
        batch_size=settings.batch_size,
        img_size=settings.img_size,
    )


def facts_of(engine: Engine, settings: Embed) -> dict[str, Any]:
    """The fields of a manifest that the engine knows."""
    engine.embed([], settings.pooling, settings.layer)  # says what is wrong with them
    spec = asdict(engine.image_spec)
    spec = json.loads(json.dumps(spec))  # as it will be read
    blank = np.zeros((1, 3, *engine.image_spec.size), np.float32)
    return {
        "image_spec": spec,
        "image_spec_sha256": hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest(),
        "runtime": engine.runtime,
        "precision": engine.precision,
        "shape": engine.features_array(blank, settings.pooling, settings.layer).shape[1:],
    }


def embed_shard(
    engine: Engine,
    sources: list[ImageSource],
    held: Manifest,
    shard: int,
    before: int,
    progress: Progress,
) -> tuple[list[tuple[int, str]], np.ndarray, list[BadPicture]]:
    """(index, path) of each row, the rows, and the pictures that could not be read, of one shard."""
    indices = held.pictures_of(shard)
    vectors = np.empty((len(indices), *held.shape), DTYPES[held.dtype])
    ids: list[tuple[int, str]] = []
    bad: list[BadPicture] = []
    answers = engine.embed(entries(sources, indices), held.pooling, held.layer)  # type: ignore[arg-type]
    for index, answer in zip(indices, answers, strict=True):
        if answer.vector is None:
            bad.append(BadPicture(index, answer.path, str(answer.error)))
        else:
            with np.errstate(over="ignore"):
                vectors[len(ids)] = unit(answer.vector) if held.normalise else answer.vector
            ids.append((index, answer.path))
        if (index + 1) % engine.batch_size == 0:
            progress.update(before + index + 1 - indices.start, f"{len(bad)} bad in shard {shard}")
    vectors = vectors[: len(ids)]
    finite = np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim)))
    if not finite.all():
        _, path = ids[int(np.argmin(finite))]
        raise ValueError(
            f"the vector of {path} has numbers that {held.dtype} cannot hold; use --dtype fp32 or "
            "--precision fp32, in another folder"
        )
    return ids, vectors, bad


def entries(sources: list[ImageSource], indices: range) -> Iterator[Entry]:
    """Pictures by their numbers over all sources."""
    first = 0
    for source in sources:
        last = first + len(source)
        for index in range(max(first, indices.start), min(last, indices.stop)):
            yield Entry(source, index - first)
        first = last


# --- The end -------------------------------------------------------------------------------------


def finish(settings: Embed, part: int, parts: int) -> int:
    """Say what there is, and list the bad pictures of all shards."""
    folder = Embeddings(settings.out)
    seals = folder.write_bad_images()
    rows = sum(seal.rows for seal in seals.values())
    bad = sum(len(seal.bad) for seal in seals.values())
    shards, shape = folder.manifest.shards, " x ".join(map(str, folder.manifest.shape))
    whole = len(seals) == shards
    told = f"{counted(rows, 'vector')} of {shape} in {counted(len(seals), 'shard')}"
    if not whole:
        told += f"; {counted(shards - len(seals), 'shard')} left to other parts than {part}/{parts}"
    print(f"{settings.out}: {told}", file=sys.stderr)
    # torchrun ends all processes when one ends with a code, so there only the last ones tell.
    if bad and (whole or "TORCHELASTIC_RUN_ID" not in os.environ):
        total = counted(folder.manifest.pictures, "picture")
        raise SomeSkipped(f"{bad:,} of {total} could not be read; see {settings.out / BAD_IMAGES}")
    return rows
