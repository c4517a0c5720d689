"""An index for searching millions of vectors without looking at all of them, by faiss.

Vectors are sorted into lists around centres, kept in a byte a number; a query looks into the lists whose
centres are nearest. How many it must look into is measured when the index is made. What is found is
compared anew with the vectors themselves, so cosines are those of an exact search; only a neighbour may be
missing. An index is kept in the user's cache folder by what the folder of embeddings holds: it is never
out of date, needs no right to write there, and faiss, which trusts its files, reads none but our own.

Shapes: n vectors, D width, Q queries.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np

from beit.atomic import replacing
from beit.cache import cache_folder, forget_old
from beit.embeddings import QUERIES, Embeddings, unit

TEN = 10  # neighbours that an index is tried with
RECALL = 0.99  # of the ten nearest of some of its own pictures
TRIED_ON = 200  # pictures
SEEDS_PER_LIST = 64  # vectors that a centre is found with
MORE = 4  # times as many candidates as neighbours, of which the true cosines choose
KEPT_BYTES = 16 << 30  # of indices; the longest unused go first


def nearest(folder: Embeddings, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """As `Embeddings.nearest`, but for rows that the index did not find.

    The first search of a folder makes its index, which is said on stderr. Raises ValueError where faiss is
    missing, EmbeddingsError as there.
    """
    require()
    folder.check_queries(queries)
    index = opened(folder)
    # As many lists were enough for ten.
    index.nprobe = min(index.nlist, -(-index.nprobe * max(top, TEN) // TEN))
    found = [
        found_by(index, folder, queries[begin : begin + QUERIES], top)
        for begin in range(0, len(queries), QUERIES)
    ]
    values, rows = zip(*found, strict=True)
    return np.concatenate(values), np.concatenate(rows)


def require() -> None:
    """Raise a ValueError with the install line where faiss is missing."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise ValueError('--approximate needs faiss: pip install "beit[faiss]"') from None


def found_by(
    index: Any, folder: Embeddings, queries: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best of what an index finds, by their true cosines: as `Embeddings.nearest`."""
    exact = unit(queries.astype(np.float64))
    count = min(top, len(folder))
    rows = index.search(exact.astype(np.float32), min(MORE * top, len(folder)))[1]
    wanted = np.unique(rows[rows >= 0])  # -1 where the lists held fewer
    vectors = unit(folder.rows(wanted).astype(np.float64))
    best = []
    for number, row in enumerate(rows):
        found = row[row >= 0]
        values = (vectors[np.searchsorted(wanted, found)] * exact[number]).sum(axis=1)
        order = np.lexsort((found, -values))[:top]
        if len(order) < count:
            (values,), (found,) = folder.nearest(queries[number : number + 1], top)
            order = np.arange(count)
        best.append((values[order], found[order]))
    return np.stack([values for values, _ in best]), np.stack([rows for _, rows in best])


# --- The index -----------------------------------------------------------------------------------


def opened(folder: Embeddings) -> Any:
    """The index of a folder: kept from before, or made now."""
    import faiss

    file = cache_folder("faiss") / f"{key_of(folder)}.faiss"
    with suppress(RuntimeError, OSError):  # none there, or damaged: make it
        if file.is_file():
            os.utime(file)
            return faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    index = made(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as beside:
            faiss.write_index(index, str(beside))
        forget_old([(index,) for index in file.parent.glob("*.faiss")], KEPT_BYTES, file)
        say(f"kept in {file}, {file.stat().st_size / 1e6:,.0f} MB")
    except (OSError, ValueError, RuntimeError) as error:  # faiss says RuntimeError for a full disk
        say(f"not kept: {error}")
    return index


def key_of(folder: Embeddings) -> str:
    """A name for what a folder holds: the seals of all shards, which have the sums of their files."""
    import faiss

    digest = hashlib.sha256(f"{faiss.__version__} {RECALL} {SEEDS_PER_LIST}".encode())
    for shard in range(len(folder.ends)):
        digest.update((folder.folder / f"{shard:05d}.json").read_bytes())
    return digest.hexdigest()[:32]


def made(folder: Embeddings) -> Any:
    """An index of all vectors, which looks into as many lists as RECALL asks for."""
    import faiss

    began = time.perf_counter()
    count, width = len(folder), folder.manifest.shape[0]
    # faiss's own rule for a million; below, as many as centres can be found for.
    lists = max(1, min(int(4 * count**0.5), count // 39))
    say(f"making an index of {count:,} vectors, once: {lists:,} lists")
    index: Any = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.min_points_per_centroid = 10, 1
    index.train(unit(sample(folder, lists * SEEDS_PER_LIST)))
    shown = time.perf_counter()
    for _, block in folder.blocks():
        index.add(unit(block))
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            say(f"{index.ntotal / count:.0%} of the vectors are in it, {shown - began:.0f} s")
    queries = sample(folder, TRIED_ON)
    true = folder.nearest(queries, 1 + TEN)[1][:, 1:]  # the nearest is the picture itself
    index.nprobe = 1
    while (share := recall(found_by(index, folder, queries, 1 + TEN)[1], true)) < RECALL:
        if index.nprobe == lists:
            break
        index.nprobe = min(2 * index.nprobe, lists)
    say(
        f"done in {time.perf_counter() - began:.0f} s: a search looks into {index.nprobe:,} of {lists:,} "
        f"lists and found {share:.1%} of the ten nearest of {len(queries)} of its own pictures"
    )
    return index


def recall(found: np.ndarray, true: np.ndarray) -> float:
    """The share of the true rows (Q, k) that are among the found ones (Q, any); 1 where k is 0."""
    alike = [np.isin(*pair) for pair in zip(true, found, strict=True)]
    return float(np.mean(alike)) if true.size else 1.0


def sample(folder: Embeddings, count: int) -> np.ndarray:
    """(min(count, n), D) float32 vectors, evenly over all."""
    chosen = np.unique(np.linspace(0, len(folder) - 1, min(count, len(folder))).round().astype(np.int64))
    return folder.rows(chosen).astype(np.float32)


def say(words: str) -> None:
    """To stderr: stdout is for results."""
    print(f"faiss: {words}", file=sys.stderr, flush=True)
