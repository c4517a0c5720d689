"""A folder of embeddings: shards of vectors with the names of their pictures, and exact search in them.

    embeddings.json   what was embedded, by which model, with which settings
    00000.npy         vectors (n, D), one a picture that could be read, in the order of the pictures
    00000.csv         index,path of each row; or both in 00000.parquet
    00000.json        the seal, written last: rows, sizes and SHA-256 of the files, the bad pictures
    bad_images.csv    index,path,reason of all pictures that have no vector, where there are any

A shard is sealed or not there. Files are written in a folder beside, flushed, renamed; any number of
processes may write, also the same shard, as it has the same bytes whoever writes it. No torch here.

Shapes: n rows of a shard, D width, Q queries; tokens are (n, N, D).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from beit.atomic import CannotWrite, flush, is_alive, write_atomically
from beit.cache import UNSETTLED_S, cache_folder
from beit.hub import model_files, sha256_of
from beit.plural import counted

MANIFEST = "embeddings.json"
BAD_IMAGES = "bad_images.csv"
WRITING = ".writing-"  # PID-HOST-...: where a process writes before the files have their names
FORGOTTEN_S = 86_400.0  # what another host has not touched for a day is no longer being written
BLOCK_BYTES = 64 << 20  # of float32 vectors, compared at once
QUERIES = 256  # as many meet a block at once
ROUNDING = 1e-4  # a float32 product of unit vectors is nearer than this to the true one

Format = Literal["npy", "parquet"]
Dtype = Literal["fp16", "fp32"]
DTYPES: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}


class EmbeddingsError(ValueError):
    """A folder that cannot be used as asked."""


class BadPicture(NamedTuple):
    """A picture without a vector, and why."""

    number: int  # among all pictures
    path: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What decides the bytes of every shard."""

    pictures: int
    pictures_sha256: str  # of their names and places, in order
    model: str  # as it was typed
    model_sha256: str
    image_spec: dict[str, Any]
    image_spec_sha256: str
    runtime: str
    precision: str
    batch_size: int
    pooling: str
    layer: int | None
    shape: tuple[int, ...]  # of one picture's vector: (D,), or (N, D)
    dtype: Dtype
    normalise: bool
    format: Format
    shard_size: int
    img_size: int | None = None  # asked for; None is the model's own

    @property
    def shards(self) -> int:
        """How many there are when all is done."""
        return -(-self.pictures // self.shard_size)

    def pictures_of(self, shard: int) -> range:
        """The indices of a shard's pictures, bad ones too."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.pictures))

    def differences(self, wanted: dict[str, Any]) -> list[str]:
        """What is wanted otherwise, in words. `model` may change: its hash says what it is."""
        ours = asdict(self)
        words = {
            "pictures_sha256": "the pictures are others, or in other places",
            "model_sha256": f"the weights of {wanted.get('model')} are others",
        }
        return [
            words.get(key, f"{key} was {ours[key]}, now {value}")
            for key, value in wanted.items()
            if key not in ("model", "image_spec_sha256") and ours[key] != value
        ]


@dataclass(frozen=True)
class Seal:
    """What a shard's .json says."""

    rows: int
    files: dict[str, tuple[int, str]]  # name: bytes, sha256
    bad: tuple[BadPicture, ...]


class Embeddings:
    """A folder of embeddings, to write into or to read from.

    Raises EmbeddingsError where the folder holds none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found = read_manifest(self.folder)
        if found is None:
            raise EmbeddingsError(
                f"{folder} holds no embeddings; make some: beit embed IMAGES -m MODEL -o {folder}"
            )
        self.manifest = found
        self._scratch: Path | None = None

    # --- Which shards are there ---

    def seal(self, shard: int, thorough: bool = False) -> Seal | None:
        """A shard's seal; None where the shard is missing or not what was sealed.

        thorough: compare the files' SHA-256 too, not their sizes alone.
        """
        try:
            content = json.loads((self.folder / f"{shard:05d}.json").read_bytes())
            seal = Seal(
                int(content["rows"]),
                {name: (size, digest) for name, (size, digest) in content["files"].items()},
                tuple(BadPicture(*bad) for bad in content["bad"]),
            )
            for name, (size, digest) in seal.files.items():
                if (self.folder / name).stat().st_size != size:
                    return None
                if thorough and sha256_of(self.folder / name) != digest:
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        whole = seal.rows + len(seal.bad) == len(self.manifest.pictures_of(shard))
        return seal if whole and set(seal.files) == self._names(shard) else None

    def seals(self, thorough: bool = False) -> dict[int, Seal]:
        """The seals of all shards that are there."""
        found = ((shard, self.seal(shard, thorough)) for shard in range(self.manifest.shards))
        return {shard: seal for shard, seal in found if seal is not None}

    def _names(self, shard: int) -> set[str]:
        endings = ("parquet",) if self.manifest.format == "parquet" else ("npy", "csv")
        return {f"{shard:05d}.{ending}" for ending in endings}

    # --- Writing ---

    def write(
        self, shard: int, ids: Sequence[tuple[int, str]], vectors: np.ndarray, bad: Sequence[BadPicture]
    ) -> Seal:
        """Write a shard and seal it. Raises CannotWrite.

        ids: (index, path) of each row. vectors: (n, D) or (n, N, D), of the manifest's dtype.
        """
        assert len(ids) == len(vectors)
        if self.manifest.format == "parquet":
            files = {f"{shard:05d}.parquet": _parquet(ids, vectors)}
        else:
            stream = io.BytesIO()
            np.save(stream, vectors)
            files = {f"{shard:05d}.npy": stream.getvalue(), f"{shard:05d}.csv": _csv("index,path", ids)}
        sums = {n: (len(content), hashlib.sha256(content).hexdigest()) for n, content in files.items()}
        seal = Seal(len(vectors), sums, tuple(bad))
        text = json.dumps(asdict(seal)).encode()
        try:
            try:
                self._put(files, f"{shard:05d}.json", text)
            except FileNotFoundError:  # who took this process for a dead one has swept
                self._scratch = None
                self._put(files, f"{shard:05d}.json", text)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return seal

    def _put(self, files: dict[str, bytes], last: str, text: bytes) -> None:
        self._scratch = self._scratch or make_scratch(self.folder)
        try:
            for name, content in {**files, last: text}.items():
                (self._scratch / name).write_bytes(content)
                flush(self._scratch / name)
            for name in files:
                os.replace(self._scratch / name, self.folder / name)
            flush(self.folder)  # a seal never comes before what it seals
            os.replace(self._scratch / last, self.folder / last)
            flush(self.folder)
        except BaseException:
            self.close()
            raise

    def write_bad_images(self) -> dict[int, Seal]:
        """Bring bad_images.csv up to date with the seals, which it returns; a right file is left alone.

        The last process to end finds all seals, and looks again after it has written: what an earlier
        one wrote over it, with fewer, does not stay.
        """
        file = self.folder / BAD_IMAGES
        while True:
            seals = self.seals()
            bad = [bad for seal in seals.values() for bad in seal.bad]
            content = _csv("index,path,reason", bad) if bad else b""
            if (file.read_bytes() if file.exists() else b"") == content:
                return seals
            try:
                if bad:
                    scratch = make_scratch(self.folder)  # swept, should this process be killed
                    try:
                        (scratch / BAD_IMAGES).write_bytes(content)
                        flush(scratch / BAD_IMAGES)
                        os.replace(scratch / BAD_IMAGES, file)
                    finally:
                        shutil.rmtree(scratch, ignore_errors=True)
                else:
                    file.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self.folder, error) from error

    def close(self) -> None:
        """Leave nothing but whole files."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    # --- Reading ---

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """(shards,) int64: where each shard's rows end among all. Raises EmbeddingsError."""
        seals = self.seals()
        if len(seals) < self.manifest.shards:
            raise EmbeddingsError(
                f"{self.folder} has {len(seals)} of {counted(self.manifest.shards, 'shard')}; "
                "give the same `beit embed` again to end it"
            )
        return np.cumsum([seal.rows for _, seal in sorted(seals.items())], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def vectors(self, shard: int) -> np.ndarray:
        """A shard's vectors (n, D) or (n, N, D), float16 or float32; .npy mapped from the disk."""
        if self.manifest.format == "npy":
            return np.load(self.folder / f"{shard:05d}.npy", mmap_mode="r")
        column = _read_parquet(self.folder / f"{shard:05d}.parquet", "vector").combine_chunks()
        return column.flatten().to_numpy().reshape(-1, *self.manifest.shape)

    def ids(self, shard: int) -> list[tuple[int, str]]:
        """(index among all pictures, path) of each row of a shard."""
        if self.manifest.format == "npy":
            text = (self.folder / f"{shard:05d}.csv").read_bytes().decode(errors="surrogateescape")
            return [(int(index), path) for index, path in list(csv.reader(io.StringIO(text, "")))[1:]]
        file = self.folder / f"{shard:05d}.parquet"
        columns = (_read_parquet(file, name).to_pylist() for name in ("index", "path"))
        return list(zip(*columns, strict=True))

    def _places(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shards of rows that are numbered over all, and their numbers in there."""
        shards = np.searchsorted(self.ends, rows, side="right")
        return shards, rows - np.concatenate([[0], self.ends])[shards]

    def paths(self, rows: Sequence[int]) -> list[str]:
        """The pictures of rows, numbered over all shards."""
        shards, places = self._places(rows)
        ids = {shard: self.ids(shard) for shard in set(shards.tolist())}
        return [ids[shard][place][1] for shard, place in zip(shards.tolist(), places, strict=True)]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows, numbered over all shards: (len(rows), D), float16 or float32."""
        shards, places = self._places(rows)
        found = np.empty((len(rows), *self.manifest.shape), DTYPES[self.manifest.dtype])
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self.vectors(int(shard))[places[here]]
        return found

    def check_queries(self, queries: np.ndarray) -> None:
        """Raise EmbeddingsError for queries (Q, D) that have no cosine to what the folder holds."""
        if len(self.manifest.shape) != 1 or queries.shape[1:] != self.manifest.shape:
            raise EmbeddingsError(
                f"{self.folder} holds vectors of {self.manifest.shape} numbers, and queries have "
                f"{queries.shape[1:]}; only single vectors of one model can be compared"
            )

    def nearest(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows with the highest cosine to each query, over all rows; equal ones in their order.

        queries: (Q, D), any length. Returns cosines float64 and rows int64, both (Q, min(top, rows)).
        """
        self.check_queries(queries)
        exact = unit(queries.astype(np.float64))
        coarse = exact.astype(np.float32)
        best = [(np.empty(0), np.empty(0, dtype=np.int64)) for _ in queries]
        for first, block in self.blocks():
            lengths = np.linalg.norm(block, axis=1)
            for number in range(len(coarse)):
                if number % QUERIES == 0:  # many at once for speed, not all for room
                    some = coarse[number : number + QUERIES]
                    cosines = some @ block.T / np.maximum(lengths, np.float32(1e-30))  # (QUERIES, rows)
                row = cosines[number % QUERIES]
                # float32 chooses with room for its rounding; float64 decides, row by row, so that
                # equal vectors have equal cosines wherever they lie.
                count = min(top, len(row))
                least = np.partition(row, -count)[-count] - ROUNDING
                near = np.flatnonzero(row >= least)
                values = (unit(block[near].astype(np.float64)) * exact[number]).sum(axis=1)
                values = np.concatenate([best[number][0], values])
                rows = np.concatenate([best[number][1], first + near])
                order = np.lexsort((rows, -values))[:top]
                best[number] = (values[order], rows[order])
        return np.stack([values for values, _ in best]), np.stack([rows for _, rows in best])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first row, float32 (rows, D)) of some rows after the other."""
        height = max(1, BLOCK_BYTES // (4 * self.manifest.shape[0]))
        first = 0
        for shard in range(len(self.ends)):
            vectors = self.vectors(shard)
            for begin in range(0, len(vectors), height):
                block = np.asarray(vectors[begin : begin + height], dtype=np.float32)
                yield first + begin, block
            first += len(vectors)


# --- The manifest --------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest | None:
    """What a folder holds; None where it has no manifest. Raises EmbeddingsError for a damaged one."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        return Manifest(**(content | {"shape": tuple(content["shape"])}))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise EmbeddingsError(f"{file} cannot be read ({error}); use another folder") from None


def begin(folder: Path, manifest: Manifest) -> Embeddings:
    """Make a folder of embeddings; of several processes at once, the first decides what it will hold.

    Raises CannotWrite.
    """
    try:
        scratch = make_scratch(folder)
        try:
            file = scratch / MANIFEST
            file.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
            flush(file)
            try:
                os.link(file, folder / MANIFEST)  # unlike a rename, it replaces nothing
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not (folder / MANIFEST).exists():
                    os.replace(file, folder / MANIFEST)
            flush(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return Embeddings(folder)


def cannot_write(folder: Path, error: OSError) -> CannotWrite:
    """The error for a folder that cannot be written."""
    return CannotWrite(
        f"cannot write {folder}: {error.strerror or error}; make room or choose another place, then "
        "give the same command again: what is sealed is kept"
    )


def make_scratch(folder: Path) -> Path:
    """A folder of this process, to write in before files get their names. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{WRITING}{os.getpid()}-{socket.gethostname()}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=folder))


def sweep(folder: Path) -> None:
    """Remove what processes that are gone were writing."""
    ours = socket.gethostname()
    for left in folder.glob(f"{WRITING}*"):
        pid, _, rest = left.name.removeprefix(WRITING).partition("-")
        with suppress(OSError):
            forgotten = time.time() - left.stat().st_mtime > FORGOTTEN_S
            if forgotten or (rest.rpartition("-")[0] == ours and not is_alive(pid)):
                shutil.rmtree(left, ignore_errors=True)


# --- Hashes --------------------------------------------------------------------------------------


def model_sha256(path: Path) -> str:
    """A hash of all that decides what a model computes: weights and their JSON, both files of a graph.

    Of files whose names, sizes and times are as they were, it is kept in the user's cache folder.
    """
    files = [*model_files(str(path)), *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    files = [file for file in files if file.is_file()]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    known = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]
    kept = cache_folder("hashes") / known
    with suppress(OSError):
        text = kept.read_text()
        if len(text) == 64:
            return text
    digest = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
    if all(stamp[2] < (time.time() - UNSETTLED_S) * 1e9 for stamp in stamps):
        with suppress(OSError):  # a full or forbidden cache folder only costs time
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, digest.encode())
    return digest


# --- Rows ----------------------------------------------------------------------------------------


def unit(vectors: np.ndarray) -> np.ndarray:
    """(..., D) of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)


def _csv(header: str, rows: Sequence[Sequence[Any]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerows([header.split(","), *rows])
    return stream.getvalue().encode(errors="surrogateescape")  # names of files need not be UTF-8


def _parquet(ids: Sequence[tuple[int, str]], vectors: np.ndarray) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    paths = [path.encode(errors="replace").decode() for _, path in ids]
    columns = {
        "index": pa.array([index for index, _ in ids], pa.int64()),
        "path": pa.array(paths, pa.string()),
        "vector": values,
    }
    stream = io.BytesIO()
    parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


def _read_parquet(file: Path, column: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise EmbeddingsError(f'{file} needs pyarrow: pip install "beit[parquet]"') from None
    return parquet.read_table(file, columns=[column]).column(0)
