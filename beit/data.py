"""Pictures of a run: opening a source, the order in which a run sees it, and batches made ahead.

The order is a pure function of (seed, epoch), and the randomness of a sample one of
(seed, epoch, index): a run that stops anywhere goes on as if it had not, with any number of workers or
GPUs, and nothing about readers is ever saved. Classes are matched by name, never by position.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import re
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from beit.atomic import not_there
from beit.image import IMAGE_EXTENSIONS, BadImage, OpenImage, has_no_answer, open_image
from beit.listing import (
    Listing,
    Places,
    exists,
    expand,
    is_address,
    is_folder,
    is_parquet,
    list_csv,
    list_folder,
    list_parquet,
    list_tars,
    list_text,
    parts_of_csv,
)
from beit.names import is_utf8, printable
from beit.plural import counted
from beit.workers import load_in_processes, now_doing

T = TypeVar("T")

SPLIT_NAMES = {"val": ("val", "validation", "valid")}  # what folders and shards of a split are called
MANIFEST = "shards.json"  # how many shards of a split `beit shard` makes
MOST_IN_A_ROW = 100  # unreadable pictures, then it is the disk
SMALL = 64  # pixels a side: such a picture is decoded once and kept, up to
KEPT_BYTES = 64 << 20  # of them in each process


# --- Sources -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Pictures, with labels where the source has them."""

    paths: Places
    labels: np.ndarray  # (n,) int64 indices of `classes`, or empty
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path or address of a picture; for one in a shard, the shard's, a slash, and its name."""
        return self.paths.name(index)

    def open(self, index: int) -> OpenImage:
        """Picture `index` with its header read, to be decoded later. Raises BadImage."""
        name = self.name(index)
        now_doing(name)
        return open_image(self.paths.file(index) or self.paths.content(index), name)

    def read(self, index: int) -> np.ndarray:
        """Picture `index` as uint8 (H, W, 3) RGB. Raises BadImage."""
        return self.open(index).read()

    def with_classes(
        self, classes: Sequence[str], owner: str = "the model", present: np.ndarray | None = None
    ) -> ImageSource:
        """The same pictures, their labels renumbered to the classes of a model, or another owner, by name.

        Classes without a picture here are named on stderr; ones the owner does not know are an error.
        present: numbers of those that pictures have, where one may have several.
        """
        renumber = places_among(classes, self.classes)
        present = np.unique(self.labels) if present is None else present
        unknown = sorted(self.classes[number] for number in present if renumber[number] < 0)
        if unknown:
            raise ValueError(
                f"the data has classes {owner} does not know: {_some(unknown)}; "
                f"{owner}'s are {_some(list(classes))}; rename those, or take them out"
            )
        absent = [classes[number] for number in np.setdiff1d(range(len(classes)), renumber[present])]
        if absent:
            print(
                f"no picture of {len(absent)} of {len(classes)} classes: {_some(absent)}",
                file=sys.stderr,
            )
        return replace(self, labels=renumber[self.labels], classes=tuple(classes))


def places_among(classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """int64 (n,) place of each name among classes, -1 where it is none. An accent that is a letter of its
    own, as a Mac writes names, is no other name."""
    number = {unicodedata.normalize("NFC", name): i for i, name in enumerate(classes)}
    number |= {name: i for i, name in enumerate(classes)}
    places = (number.get(name, number.get(unicodedata.normalize("NFC", name), -1)) for name in names)
    return np.fromiter(places, dtype=np.int64, count=len(names))


def open_source(location: str | Path, split: str = "train", labelled: bool = False) -> ImageSource:
    """Look at a place and list its pictures.

    location: a folder of pictures, with or without a folder for each class; one with `train` and `val`
        in it; a .txt of paths or a .csv of path,label; tar shards in WebDataset's layout or Parquet in
        Hugging Face's: one file, a folder, or a pattern such as shards-{000..099}.tar or s/*.tar. Or the
        same as an fsspec address, s3://...
    split: which sub-folder, which shards by the beginning of their names, or which rows by the column
        part, to take where there are several; all of them where empty.
    labelled: refuse a source without labels.
    """
    place = _address(location)
    if _is_pattern(place):
        listing = _list_shards(expand(place), place)
    elif not exists(place):
        raise ValueError(not_there(place))
    elif is_folder(place):
        listing = _list_folder(place, split)
    elif place.endswith((".tar", ".parquet")):
        listing = _list_shards([place], place)
    elif place.endswith(".txt"):
        listing = list_text(place)
    elif place.endswith(".csv"):
        listing = list_csv(place, labelled, split)
    else:
        raise ValueError(
            f"{place} is not a folder, a .tar, a .parquet, a .csv or a .txt; unpack what is compressed"
        )
    if not len(listing.places):
        raise ValueError(
            f"{place} holds no pictures; looked in it and below for {', '.join(IMAGE_EXTENSIONS)}"
        )
    if labelled and listing.without:
        raise ValueError(
            f"{place} has no classes: {listing.without} has none, though others have; give it one, or take "
            "it out"
        )
    if labelled and not len(listing.labels):
        raise ValueError(
            f"{place} has no classes; put each class's pictures in a folder of its name, "
            "give a .csv with the columns path,label, or shards with a KEY.cls beside each KEY.jpg"
        )
    odd = [name for name in listing.classes if not is_utf8(name)]
    if labelled and odd:
        raise ValueError(
            f"{place} has the class {printable(odd[0])}, whose name is not UTF-8; rename it"
        )
    return ImageSource(listing.places, listing.labels, listing.classes)


def find_pictures(places: list[str], command: str) -> list[ImageSource | str]:
    """What the places name, in order: sources, whose pictures are listed now, paths, and - for stdin.

    A missing file is an answer with an error later, unless nothing that was named exists. command: whose
    settings the places stood among.
    """
    found: list[ImageSource | str] = []
    for place in places:
        if place == "-":
            found.append(place)
        elif place.startswith("-") and not exists(place):  # what cyclopts lets pass for the sake of -
            raise ValueError(f"{place} is no setting of {command}; `beit {command} --help` tells them")
        elif _is_pattern(place):
            matched = expand(place)
            if not matched:
                raise ValueError(f"{place} matches no file")
            # What ** matched below a folder that it matched too is in that one's list.
            folders = tuple(f"{name}/" for name in matched if is_folder(name)) if "**" in place else ()
            found += find_pictures([name for name in matched if not name.startswith(folders)], command)
        elif place.endswith((".txt", ".csv", ".tar", ".parquet")) or (
            exists(place) and is_folder(place)
        ):
            found.append(open_source(place, ""))
        else:
            found.append(place)
    files = [place for place in found if isinstance(place, str)]
    if files and len(files) == len(found) and not any(p == "-" or exists(p) for p in files):
        more = f" Missing too: {counted(len(files) - 1, 'other')}." if len(files) > 1 else ""
        raise ValueError(f"{not_there(files[0])}{more}")
    return found


def names_on_stdin() -> Iterator[str]:
    """The lines of stdin, the path of a picture each, as they come."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    return filter(None, (line.rstrip("\r\n") for line in sys.stdin))


def _is_pattern(place: str) -> bool:
    return re.search(r"[*?{[]", place) is not None and not exists(place)


def has_split(location: str | Path, split: str) -> bool:
    """Whether a place has pictures of a split apart from those of others."""
    place = _address(location)
    if place.endswith(".csv") and exists(place) and not is_folder(place):
        return split in parts_of_csv(place)
    if not (exists(place) and is_folder(place)):
        return False
    if _is_divided(place, split):
        return _split_folder(place, split) is not None
    return bool(_shards_of(list_folder(place).places.roots[1:], split))


def _address(location: str | Path) -> str:
    return re.sub(r"^(\w\w+):/(?!/)", r"\1://", str(location))  # Path squeezes s3:// to s3:/


def _split_folder(place: str, split: str) -> str | None:
    folders = (f"{place.rstrip('/')}/{name}" for name in SPLIT_NAMES.get(split, (split,)))
    return next(filter(is_folder, folders), None)


def _is_divided(place: str, split: str) -> bool:
    """Whether the sub-folders of a folder are splits: train is there, or the one asked for is alone."""
    if _split_folder(place, "train"):
        return True
    folder = None if split == "train" else _split_folder(place, split)
    if folder is None or is_address(place):
        return False
    beside = [e.name for e in os.scandir(place) if e.is_dir() and not e.name.startswith(".")]
    return beside == [os.path.basename(folder)]


def _list_folder(place: str, split: str) -> Listing:
    if split and _is_divided(place, split):
        inside = _split_folder(place, split)
        if inside is None:
            raise ValueError(f"{place} has a train folder but no {split} folder")
        listing = _list_folder(inside, split)
        if not len(listing.places):
            raise ValueError(f"{inside} holds no pictures; put some there, or remove it")
        return listing
    listing = list_folder(place)
    shards = listing.places.roots[1:]
    if len(listing.places):
        if shards:
            left = counted(len(shards), "shard")
            print(f"{place}: left out {left} beside the pictures", file=sys.stderr)
        return listing
    if not shards:
        return listing
    _refuse_unfinished(place, shards)
    chosen = _shards_of(shards, split) if split else list(shards)
    if not chosen and _shards_of(shards, "train"):
        raise ValueError(f"{place} has shards named train but none named {split}")
    return _list_shards(chosen or list(shards), place)


def _shards_of(shards: Sequence[str], split: str) -> list[str]:
    """Those whose name, such as train-00000.tar or data/validation-00000-of-00002.parquet, says so."""
    names = "|".join(SPLIT_NAMES.get(split, (split,)))
    return [shard for shard in shards if re.search(rf"(^|[/_-])({names})[_.-][^/]*$", shard)]


def _list_shards(files: list[str], place: str) -> Listing:
    if files and all(map(is_parquet, files)):
        return list_parquet(files)
    if files and all(file.endswith(".tar") for file in files):
        return list_tars(files, workers=min(len(files) - 1, os.cpu_count() or 1))
    raise ValueError(
        f"{place} names {_some(files)}; give .tar or .parquet files, and only one kind of them"
    )


def _refuse_unfinished(place: str, shards: Sequence[str]) -> None:
    manifest = f"{place.rstrip('/')}/{MANIFEST}"
    if not is_address(place) and exists(manifest):
        number = sum(json.loads(Path(manifest).read_text()).get("shards", {}).values())
        if len(shards) < number:
            raise ValueError(
                f"{place} has {len(shards)} of {counted(number, 'shard')}; run `beit shard` again to end it"
            )


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- Order ---------------------------------------------------------------------------------------

_ordering = threading.Lock()


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a read-only permutation of 0 to num_samples - 1."""
    with _ordering:  # or each thread that comes to a new epoch would make it
        return _epoch_order(num_samples, seed, epoch)


@functools.lru_cache(maxsize=2)  # an epoch, and the next, that is begun before the last batch is used
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    order.flags.writeable = False
    return order


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The randomness of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, index, 1])


def batch_at(
    step: int, num_samples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> list[tuple[int, int]]:
    """The (epoch, index) pairs that rank `rank` of `world` sees in a training step.

    batch_size: samples of all ranks together; a rank takes every world-th of them. The last, short
    batch of an epoch is left out; a set smaller than a batch is one batch an epoch.
    """
    steps_per_epoch = max(num_samples // batch_size, 1)
    epoch, place = divmod(step, steps_per_epoch)
    order = epoch_order(num_samples, seed, epoch)[place * batch_size : (place + 1) * batch_size]
    return [(epoch, int(index)) for index in order[rank::world]]


def check_share(num_samples: int, batch_size: int, world: int) -> None:
    """Refuse fewer pictures than several processes need for a batch. Raises ValueError."""
    if world > 1 and num_samples < batch_size:
        below = num_samples // world * world
        raise ValueError(
            f"too few for a batch of {batch_size} over {world} processes: "
            f"{counted(num_samples, 'picture')}; "
            + (f"use --batch-size {below} or less" if below else "use one process")
        )


# --- Bad pictures --------------------------------------------------------------------------------


class Bad(NamedTuple):
    """A picture that could not be used, and why."""

    sample: int  # its index in the source
    path: str
    code: str
    reason: str


class TooManyBadImages(Exception):
    """More pictures cannot be read than a run may pass over."""

    exit_code = 4


class SomeSkipped(Exception):
    """Done, but some pictures could not be read; they are named in the output."""

    exit_code = 3


class BadImages:
    """The pictures of a run that could not be read: listed in a file, and counted against a budget."""

    def __init__(self, file: Path, num_samples: int, budget: float) -> None:
        """file: a .csv, made with the first bad picture and gone on with where it exists.

        budget: share of the `num_samples` pictures that may be bad; one may always be, unless it is 0.
        The file may name others too, of higher numbers: those of a validation.
        """
        if not 0 <= budget <= 1:
            raise ValueError(f"max_bad_images {budget} is not a share from 0 to 1; 0.01 is usual")
        self.file, self.num_samples, self.budget = file, num_samples, budget
        self.found: dict[int, Bad] = {}
        if file.exists():
            with file.open(newline="", encoding="utf-8") as stream:
                rows = [row for row in csv.reader(stream) if len(row) == 4 and row[0].isdecimal()]
            self.found = {int(index): Bad(int(index), *rest) for index, *rest in rows}

    def __len__(self) -> int:
        return len(self.found)

    def add(self, bad: Sequence[Bad], in_a_row: int = 0) -> None:
        """List what is new. Raises TooManyBadImages over the budget, or after so many `in_a_row`."""
        new = {b.sample: b for b in bad if b.sample not in self.found}
        if new and not in_a_row:  # those are of a disk that is away, not of the pictures
            first = not self.file.exists()
            with self.file.open("a", newline="", encoding="utf-8", errors="replace") as stream:
                csv.writer(stream).writerows([Bad._fields, *new.values()] if first else new.values())
            self.found |= new
        if in_a_row:
            raise TooManyBadImages(
                f"{counted(in_a_row, 'picture')} in a row cannot be read: {_shown(bad)}. Is their place "
                "there? When it is, the same command goes on"
            )
        allowed = math.ceil(self.budget * self.num_samples)
        # Also those of before, where the command is given again; none where none was met.
        counting = [b for b in self.found.values() if bad and b.sample < self.num_samples]
        if len(counting) > allowed:
            raise TooManyBadImages(
                f"{len(counting):,} of {counted(self.num_samples, 'picture')} cannot be read, where "
                f"{self.budget:.1%} ({allowed:,}) may: {_shown(counting)}; all are listed in "
                f"{self.file}. Raise --max-bad-images and the same command goes on, or mend them and begin "
                "in another --out"
            )

    def __str__(self) -> str:
        count = counted(len(self), "picture")
        return f"{count} could not be read, and others were taken instead; see {self.file}"


def _shown(bad: Iterable[Bad]) -> str:
    return _some([f"{b.path} ({b.reason})" for b in bad], 3)


# --- Batches -------------------------------------------------------------------------------------


class _Made(NamedTuple, Generic[T]):
    samples: list[tuple[int, T]]
    bad: list[Bad]
    in_a_row: int  # 0, or how many were bad when it gave up


class Loader:
    """Batches of a training run, made ahead by processes; bad pictures give way to the next.

    A batch is [(index, value)]: a picture's number in the source, and what was prepared from it.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        seed: int,
        workers: int,
        bad_images: BadImages,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide among {world} processes")
        check_share(len(source), batch_size, world)
        self.source, self.batch_size, self.seed, self.workers = source, batch_size, seed, workers
        self.bad_images, self.rank, self.world = bad_images, rank, world
        self._unreadable: set[int] = set()
        self._kept: dict[int, np.ndarray] = {}  # small pictures, decoded
        self._kept_bytes = 0

    @classmethod
    def of_run(
        cls,
        source: ImageSource,
        batch_size: int,
        seed: int,
        workers: int,
        out: Path,
        budget: float,
        rank: int = 0,
        world: int = 1,
    ) -> Loader:
        """A rank's share of a run's batches. Pictures that it cannot read go to bad_images.csv in `out`,
        or bad_images-RANK.csv but in rank 0; of all pictures, as it comes to see others each epoch, not
        more than `budget` may be among them."""
        file = out / (f"bad_images-{rank}.csv" if rank else "bad_images.csv")
        bad_images = BadImages(file, len(source), budget)
        return cls(source, batch_size, seed, workers, bad_images, rank, world)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; at least one."""
        return max(len(self.source) // self.batch_size, 1)

    def batches(
        self, steps: range, prepare: Callable[[OpenImage, np.random.Generator], T]
    ) -> Iterator[list[tuple[int, T]]]:
        """The batches of some steps, in order: prepare(picture, rng) of each of their samples.

        prepare runs in worker processes; a BadImage that it raises replaces the sample. Raises
        TooManyBadImages and WorkerDied.
        """
        for made in load_in_processes(lambda step: self._make(step, prepare), steps, self.workers):
            self.bad_images.add(made.bad, made.in_a_row)
            yield made.samples

    def _make(self, step: int, prepare: Callable[[OpenImage, np.random.Generator], T]) -> _Made[T]:
        made: _Made[T] = _Made([], [], 0)
        size = len(self.source)
        for place in batch_at(step, size, self.batch_size, self.seed, self.rank, self.world):
            if not self._add(made, *place, prepare):
                return made._replace(in_a_row=min(MOST_IN_A_ROW, size))
        return made

    def _add(
        self,
        made: _Made[T],
        epoch: int,
        index: int,
        prepare: Callable[[OpenImage, np.random.Generator], T],
    ) -> bool:
        """Add a sample to a batch, or the next that can be read; whether there is one."""
        silent: list[int] = []  # no answer came: is it the disk, or the picture?

        def one_of(candidates: Iterable[int], last: bool) -> bool:
            for chosen in candidates:
                if chosen in self._unreadable:
                    continue
                try:
                    # The place keeps its draws, so that a stand-in is not the same crop twice.
                    value = prepare(self._open(chosen), sample_rng(self.seed, epoch, index))
                except BadImage as error:
                    if has_no_answer(error) and not last:
                        silent.append(chosen)
                        continue
                    made.bad.append(Bad(chosen, self.source.name(chosen), error.code, error.reason))
                    self._unreadable.add(chosen)
                else:
                    made.samples.append((chosen, value))
                    return True
            return False

        found = one_of(self._candidates(epoch, index), last=False)
        if silent and one_of(silent, last=True):  # the disk answers again
            if found:
                del made.samples[-2]
            return True
        return found

    def _open(self, index: int) -> OpenImage:
        """A picture; a small one whole, kept or not, so that its pixels are always the same."""
        if index in self._kept:
            return open_image(self._kept[index])
        picture = self.source.open(index)
        if max(picture.size) > SMALL:
            return picture
        pixels = picture.read()
        pixels.flags.writeable = False
        if self._kept_bytes + pixels.nbytes <= KEPT_BYTES:
            self._kept[index] = pixels
            self._kept_bytes += pixels.nbytes
        return open_image(pixels)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """A sample, then those at the next positions of its epoch, should it be bad."""
        yield index
        order = epoch_order(len(self.source), self.seed, epoch)
        place = int(np.flatnonzero(order == index)[0])
        for step in range(1, min(MOST_IN_A_ROW, len(order))):
            yield int(order[(place + step) % len(order)])
