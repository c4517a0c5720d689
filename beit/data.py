"""Pictures on disk: which there are, in what order a run sees them, and loading ahead of it.

Sources: a flat or nested folder of pictures, one folder a class, `train/` and `val/` roots, a `.csv`
of paths and labels, a `.txt` of paths. Classes are matched by name, never by position.

The order is a pure function of (seed, epoch), and the randomness of a sample one of
(seed, epoch, index): a run that stops anywhere goes on as if it had not.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from beit.image import IMAGE_EXTENSIONS, read_image

T = TypeVar("T")


@dataclass(frozen=True)
class ImageSource:
    """A list of pictures, with labels where the source has them."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]  # empty where the source has none
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """Picture `index` as uint8 (H, W, 3) RGB."""
        return read_image(self.paths[index])

    def with_classes(self, classes: Sequence[str]) -> ImageSource:
        """The same pictures, their labels renumbered to a model's classes, by name."""
        unknown = sorted({self.classes[label] for label in self.labels} - set(classes))
        if unknown:
            raise ValueError(
                f"the data has classes the model does not know: {_some(unknown)}; "
                f"the model's are {_some(list(classes))}"
            )
        number = {name: i for i, name in enumerate(classes)}
        labels = tuple(number[self.classes[label]] for label in self.labels)
        return ImageSource(self.paths, labels, tuple(classes))


def open_source(location: str | Path, split: str = "train", labelled: bool = False) -> ImageSource:
    """Look at a folder, a `.csv` or a `.txt`, and list its pictures.

    split: which sub-folder to take where the folder has `train` and `val` (or `test`).
    labelled: refuse a source without labels.
    """
    root = Path(location)
    if not root.exists():
        raise ValueError(f"{root} does not exist")
    if root.is_file():
        source = _read_list(root, labelled)
    else:
        if (root / "train").is_dir():
            root = root / split
            if not root.is_dir():
                raise ValueError(f"{root.parent} has a train folder but no {split} folder")
        source = _read_folder(root)
    if not source.paths:
        raise ValueError(
            f"{root} holds no pictures; looked in it and below for {', '.join(IMAGE_EXTENSIONS)}"
        )
    if labelled and not source.labels:
        raise ValueError(
            f"{root} has no classes; put each class's pictures in a folder of its name, "
            "or give a .csv with the columns path,label"
        )
    return source


def list_pictures(root: Path) -> list[Path]:
    """All pictures in a folder and below it, in the order of their names."""
    return [p for p in sorted(root.rglob("*")) if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file()]


def _read_folder(root: Path) -> ImageSource:
    files = list_pictures(root)
    inside = [p.relative_to(root).parts for p in files]
    classes = sorted({parts[0] for parts in inside if len(parts) > 1})
    if not classes or any(len(parts) == 1 for parts in inside):
        return ImageSource(tuple(files), (), ())  # some lie in the root itself: no class folders
    number = {name: i for i, name in enumerate(classes)}
    return ImageSource(tuple(files), tuple(number[parts[0]] for parts in inside), tuple(classes))


def _read_list(file: Path, labelled: bool) -> ImageSource:
    text = "utf-8-sig"  # spreadsheets begin theirs with a byte order mark
    if file.suffix == ".txt":
        lines = [line.strip() for line in file.read_text(encoding=text).splitlines()]
        return ImageSource(tuple(file.parent / line for line in lines if line), (), ())
    if file.suffix != ".csv":
        raise ValueError(f"{file} is not a folder, a .csv or a .txt")
    try:
        with file.open(newline="", encoding=text) as stream:
            reader = csv.DictReader(stream)
            numbered = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); save it as such") from None
    if not numbered or "path" not in numbered[0][1]:
        raise ValueError(f"{file} needs a first line that names its columns: path,label")
    rows = [row for _, row in numbered]
    wanted = ("path", "label") if labelled and "label" in rows[0] else ("path",)
    for line, row in numbered:
        for column in wanted:
            if not row[column]:
                raise ValueError(f"line {line} of {file} has no {column}")
    paths = tuple(file.parent / row["path"] for row in rows)
    if not all(row.get("label") for row in rows):
        return ImageSource(paths, (), ())
    classes = sorted({row["label"] for row in rows})
    number = {name: i for i, name in enumerate(classes)}
    return ImageSource(paths, tuple(number[row["label"]] for row in rows), tuple(classes))


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of 0 to num_samples - 1."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The randomness of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, index, 1])


def batch_at(step: int, num_samples: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """The (epoch, index) pairs of a training step; the last, short batch of an epoch is left out.

    A set smaller than a batch is one batch an epoch.
    """
    steps_per_epoch = max(num_samples // batch_size, 1)
    epoch, place = divmod(step, steps_per_epoch)
    order = epoch_order(num_samples, seed, epoch)[place * batch_size : (place + 1) * batch_size]
    return [(epoch, int(index)) for index in order]


def load_ahead(make: Callable[[int], T], steps: range, workers: int) -> Iterator[T]:
    """make(step) for each step, in order, prepared by threads while the caller works.

    Decoding and resizing release Python's lock, so threads do; an error in one is raised here, at
    its step. workers 0 works in the caller.
    """
    if workers == 0:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(make, step))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
