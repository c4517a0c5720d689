"""What a folder of many embeddings costs: a finished `beit embed` given again, and one search.

    python benchmarks/embeddings.py --rows 1000000

The vectors are random numbers under names of pictures that are not there: neither measurement reads a
picture but the query. The model is a new base-224, whose weights are hashed to know it. faiss's exact
index of the same vectors stands beside, where faiss-cpu is installed.
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
from beit.model import VARIANTS, BeitForImageClassification


def make(folder: Path, rows: int) -> list[str]:
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
        vectors = rng.standard_normal((len(numbers), 768), np.float32).astype(np.float16)
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
    import faiss  # type: ignore[import-not-found]

    index = faiss.IndexFlatIP(768)

    def fill() -> None:
        index.reset()
        for shard in range(made.manifest.shards):
            index.add(unit(np.asarray(made.vectors(shard), np.float32)))

    found = [f"| faiss {faiss.__version__}, vectors into its index | {timed(fill, 1)} |"]
    for count in (1, 64):
        seconds = timed(lambda count=count: index.search(unit(queries[:count]), 10), turns)  # type: ignore[misc]
        found.append(f"| faiss, {count} queries, index in memory | {seconds} |")
    same = (index.search(unit(queries), 10)[1] == made.nearest(queries, 10)[1]).mean()
    return [*found, f"\nRows that both name alike: {same:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; "
          f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; "
          f"{date.today()}\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        words = make(Path(place), arguments.rows)
        made = Embeddings(Path(place) / "vectors")
        queries = np.random.default_rng(1).standard_normal((64, 768), np.float32)

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
