"""What a folder of many embeddings costs: a finished `beit embed` given again, and one search.

    python benchmarks/embeddings.py --rows 1000000 --like FEATURES

The vectors are mixtures of pairs of features, in a space of 768 numbers, under names of pictures that are
not there: no measurement reads a picture. The model is a new base-224, whose weights are hashed to know
it. faiss's exact index of the same vectors and `--approximate` stand beside, where faiss-cpu is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from beit.checkpoints import save
from beit.commands.embed import Embed, facts_of, join, open_engine, wanted_of
from beit.data import find_pictures
from beit.embeddings import Embeddings, Manifest, begin, unit
from beit.faiss_index import nearest, recall
from beit.model import VARIANTS, BeitForImageClassification


def make(folder: Path, rows: int, features: np.ndarray) -> list[str]:
    """A finished folder; the words of the command that would have made it."""
    torch.manual_seed(0)
    save(BeitForImageClassification(VARIANTS["beit_base_patch16_224"]), folder / "base")
    names = (f"photos/{i // 1000:04d}/{i:07d}.jpg\n" for i in range(rows))
    (folder / "list.txt").write_text("".join(names))
    settings = Embed([str(folder / "list.txt")], model=str(folder / "base"), out=folder / "vectors",
                     runtime="torch")  # fmt: skip
    sources = join(find_pictures(settings.images, "embed"))
    facts = wanted_of(settings, sources) | facts_of(open_engine(settings, None), settings)
    made = begin(settings.out, Manifest(**facts))
    rng = np.random.default_rng(0)
    for shard in range(made.manifest.shards):
        numbers = made.manifest.pictures_of(shard)
        vectors = mixtures(features, rng, len(numbers)).astype(np.float16)
        made.write(shard, [(i, sources[0].name(i)) for i in numbers], vectors, [])
    made.close()
    return [
        "embed",
        settings.images[0],
        "-m",
        settings.model,
        "-o",
        str(settings.out),
        "--runtime",
        "torch",
    ]


def mixtures(features: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 768) float32: pairs of features (n, up to 768), mixed and turned, so no two are alike."""
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((768, features.shape[1])))[0].T
    first, second = rng.integers(len(features), size=(2, count))
    share = rng.uniform(0, 0.5, (count, 1))
    mixed = (1 - share) * features[first] + share * features[second]
    return (mixed @ turn).astype(np.float32)


def timed(work: Callable[[], Any], turns: int) -> str:
    """Median (least to most) seconds."""
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def with_faiss(made: Embeddings, queries: np.ndarray, turns: int) -> list[str]:
    """Rows of the table: exact search by faiss, which has first to hold all vectors in float32."""
    import faiss

    index = faiss.IndexFlatIP(768)

    def fill() -> None:
        index.reset()
        for shard in range(made.manifest.shards):
            index.add(unit(np.asarray(made.vectors(shard), np.float32)))

    found = [f"| faiss {faiss.__version__}, vectors into its index | {timed(fill, 1)} |"]
    for count in (1, 64):
        seconds = timed(lambda count=count: index.search(unit(queries[:count]), 10), turns)  # type: ignore[misc]
        found.append(f"| faiss, {count} queries, index in memory | {seconds} |")
    true = made.nearest(queries, 10)[1]
    same = (index.search(unit(queries), 10)[1] == true).mean()
    index.reset()
    os.environ["XDG_CACHE_HOME"] = str(made.folder.parent / "cache")
    first = timed(lambda: nearest(made, queries[:1], 10), 1)
    found.append(f"| `--approximate`, one query, the first time: the index is made and kept | {first} |")
    for count in (1, 64):
        seconds = timed(lambda count=count: nearest(made, queries[:count], 10), turns)  # type: ignore[misc]
        found.append(f"| `--approximate`, {count} queries, the index opened anew | {seconds} |")
    share = recall(nearest(made, queries, 10)[1], true)
    return [
        *found,
        f"\nRows that faiss's exact index names alike: {same:.1%}; found with `--approximate`: {share:.1%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--like", type=Path, help="what `beit embed` wrote; random numbers if not given")
    arguments = parser.parse_args()
    features = np.random.default_rng(3).standard_normal((10_000, 32))
    if arguments.like:
        real = Embeddings(arguments.like)
        features = real.rows(np.arange(len(real))).astype(np.float64)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; "
          f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; "
          f"{date.today()}\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        words = make(Path(place), arguments.rows, features)
        made = Embeddings(Path(place) / "vectors")
        queries = mixtures(features, np.random.default_rng(1), 64)

        def again() -> None:
            done = subprocess.run([sys.executable, "-m", "beit", *words], stderr=subprocess.DEVNULL)
            assert done.returncode == 0

        print(
            f"| {arguments.rows:,} vectors of 768, fp16 | seconds, median (least to most) |\n|---|---|"
        )
        print(f"| finished `beit embed` again, the first time: weights are hashed | {timed(again, 1)} |")
        print(f"| again, later: the hash is kept | {timed(again, arguments.repeats)} |")
        for count in (1, 64):
            seconds = timed(lambda count=count: made.nearest(queries[:count], 10), arguments.repeats)  # type: ignore[misc]
            print(f"| the 10 nearest of {count} queries, from the files | {seconds} |")
        if find_spec("faiss"):
            print("\n".join(with_faiss(made, queries, arguments.repeats)))
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
