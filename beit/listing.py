"""Which pictures a place holds, where each one lies, and its label: folders, lists, tar, Parquet.

A listing is tables of numbers and bytes, never a list of Python objects: 14 million entries take about
half a gigabyte, mapped from an index that is kept in the user's cache folder as long as the sizes and
times of what was listed stay as they were.

Layouts: one folder a class or none; .txt of paths; .csv of path,label; tar shards as WebDataset writes
them (KEY.jpg beside KEY.cls, .json or .txt); Parquet as Hugging Face's datasets write it. Places may be
fsspec addresses (s3://, hf:// ...). n = pictures.
"""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from beit.cache import UNSETTLED_S, cache_folder
from beit.image import (
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    BadImage,
    check_file_size,
    open_file,
    patiently,
)
from beit.names import is_utf8, printable
from beit.plural import counted
from beit.workers import load_in_processes

WORTH_KEEPING_S = 0.5  # an index that took longer to make is kept
MAX_CLASSES = 100_000  # more different labels are captions
RUN_FILE = "run.toml"  # every folder of a run has one
CLASS_FILES = ("classes.txt", "classnames.txt")  # beside shards: the name of class 0, 1, ...

_NO_NUMBERS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Places(Sequence[Path]):
    """Where n pictures lie: files below a root, or pieces of tar and Parquet files, which are the roots.

    Item i is a path for people; `name` is the same as text, and exact for addresses.
    """

    roots: tuple[str, ...]
    text: np.ndarray  # uint8; the names below their roots, one after the other
    ends: np.ndarray  # (n,) int64; where each name ends
    # Each (n,), or empty. The index of the root, else all have the first; in a tar the first byte, in
    # Parquet the row group; in a tar the bytes, in Parquet the row in its group.
    root: np.ndarray = field(default_factory=lambda: _NO_NUMBERS)
    start: np.ndarray = field(default_factory=lambda: _NO_NUMBERS)
    size: np.ndarray = field(default_factory=lambda: _NO_NUMBERS)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Path(self.name(range(len(self))[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and all(
            np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    def name(self, index: int) -> str:
        """The address of a picture: its path, or that of its shard, a slash and its name in there."""
        begin = self.ends[index - 1] if index else 0
        return _join(self._root(index), os.fsdecode(self.text[begin : self.ends[index]].tobytes()))

    def _root(self, index: int) -> str:
        return self.roots[self.root[index]] if len(self.root) else self.roots[0]

    def _is_piece(self, index: int) -> bool:
        return len(self.start) > 0 and self._root(index).endswith((".tar", ".parquet"))

    def file(self, index: int) -> str | None:
        """The path of a picture that is a file of its own on this machine."""
        name = self.name(index)
        return None if self._is_piece(index) or is_address(name) else name

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file. Raises BadImage."""
        name, root = self.name(index), self._root(index)
        if not self._is_piece(index):
            return _bytes(name, name)
        start, size = int(self.start[index]), int(self.size[index])
        if is_parquet(root):
            return _parquet_image(root, start, size, name)
        return _bytes(root, name, start, size)

    def glimpse(self, index: int) -> bytes:
        """What tells a picture's file from most others: its size, and 4 KiB from its middle on.

        Of Parquet and of addresses, which have no quick way to the middle, all is read. Raises BadImage.
        """
        name, root, file = self.name(index), self._root(index), self.file(index)
        if self._is_piece(index) and not is_parquet(root):
            place, start, size = root, int(self.start[index]), int(self.size[index])
        elif file is not None and os.path.isfile(file):
            place, start, size = file, 0, os.path.getsize(file)
        else:
            content = self.content(index)
            return b"%d " % len(content) + content[len(content) // 2 :][:4096]
        middle = size // 2
        return b"%d " % size + _bytes(place, name, start + middle, min(4096, size - middle))


@dataclass(frozen=True, eq=False)
class Listing:
    """Pictures, and their labels where all have one."""

    places: Places
    labels: np.ndarray  # (n,) int64, or empty
    classes: tuple[str, ...]
    without: str = ""  # the first picture that has no label where others have one


class _Rows:
    """A listing in the making: compact, and quick to append to."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.ends, self.root, self.start, self.size, self.label = (array("q") for _ in range(5))
        self.classes: dict[str, int] = {}
        self.names: Sequence[str] | None = None  # of the classes that the labels number

    def add(
        self,
        name: str | bytes,
        label: str | None,
        piece: tuple[int, int, int] | None = None,
        sure: bool = False,
    ) -> None:
        """sure: the label is one, and no caption, however many there are."""
        self.text += name if isinstance(name, bytes) else os.fsencode(name)
        self.ends.append(len(self.text))
        if label is None or (
            label not in self.classes and len(self.classes) >= MAX_CLASSES and not sure
        ):
            self.label.append(-1)
        else:
            self.label.append(self.classes.setdefault(label, len(self.classes)))
        if piece is not None:
            for column, value in zip((self.root, self.start, self.size), piece, strict=True):
                column.append(value)

    def named(self, names: Sequence[Sequence[str] | None]) -> _Rows:
        """Itself, knowing the names of each root's classes, where its labels number them: in their order
        where all roots have the same, else each row by its own."""
        if all(other == names[0] for other in names):
            self.names = names[0]
            return self
        texts, self.classes = list(self.classes), {}
        for row, (root, label) in enumerate(zip(self.root, self.label, strict=True)):
            if label >= 0:
                text = _named(texts[label], names[root])
                self.label[row] = self.classes.setdefault(text, len(self.classes))
        return self

    def listing(self, roots: Sequence[str]) -> Listing:
        """What was added. Classes are in the order of their names, where they have some, else sorted,
        numbers by value."""
        names = self.names
        columns = (np.frombuffer(c, np.int64) for c in (self.ends, self.root, self.start, self.size))
        ends, root, start, size = (column if len(column) else _NO_NUMBERS for column in columns)
        text = np.frombuffer(self.text, np.uint8)
        size = np.minimum(size, 2**32 - 1).astype(np.uint32)  # far above what is ever read
        places = Places(tuple(roots), text, ends, root.astype(np.uint32), start, size)
        labels = np.frombuffer(self.label, np.int64) if self.label else _NO_NUMBERS
        if not len(labels) or labels.min() < 0:
            some = len(labels) and labels.max() >= 0
            return Listing(places, _NO_NUMBERS, (), places.name(int(labels.argmin())) if some else "")
        found = list(self.classes)
        if all(name.isdecimal() for name in found):
            classes = sorted(found, key=lambda name: (int(name), name))
            if names is not None:
                _named(classes[-1], names)  # raises what is to be raised
                shared = Counter(names)  # such as ImageNet's two cranes
                classes = [n if shared[n] == 1 else f"{n} ({i})" for i, n in enumerate(names)]
                found = [classes[int(name)] for name in found]
        else:
            classes = sorted(found)
        place = {name: number for number, name in enumerate(classes)}
        renumber = np.array([place[name] for name in found])
        return Listing(places, renumber[labels], tuple(classes))


# --- Addresses -----------------------------------------------------------------------------------


def is_address(place: str) -> bool:
    """Whether a place is one for fsspec, such as s3://bucket/folder."""
    return "://" in place


def is_parquet(place: str) -> bool:
    """Whether a place is named as Parquet."""
    return place.endswith(".parquet")


def _join(root: str, name: str) -> str:
    if not root or is_address(name):
        return name
    return f"{root.rstrip('/')}/{name}" if is_address(root) else os.path.join(root, name)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f'{address} needs fsspec: pip install "beit[remote]"') from None
    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:  # such as s3fs, which s3:// needs
        raise ValueError(f"{address} cannot be opened: {error}") from error


@patiently
def _bytes(file: str, name: str, start: int = 0, size: int | None = None) -> bytes:
    """A file, or `size` bytes of it; errors call it `name`."""
    try:
        if is_address(file):
            return _remote_bytes(file, name, start, size)
        if size is not None:
            check_file_size(size, name)
            with open(file, "rb") as shard:
                shard.seek(start)
                return shard.read(size)
        with open_file(file, name) as stream:
            return stream.read()
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage("missing", name, "no such file") from None
    except OSError as error:
        raise BadImage("unreadable", name, f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # an address that nothing here speaks
        raise BadImage("unreadable", name, f"cannot be read ({error})") from error


def _remote_bytes(address: str, name: str, start: int, size: int | None) -> bytes:
    system, path = file_system(address)
    try:
        size = system.size(path) if size is None else size
        if size is None:  # it comes in pieces, and nobody says how many
            with system.open(path, "rb") as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
            check_file_size(len(content), name)
            return bytes(content)
        check_file_size(size, name)
        return bytes(system.cat_file(path, start=start, end=start + size))
    except (OSError, BadImage):
        raise
    except (
        Exception
    ) as error:  # of the library that speaks to the place, such as aiohttp's when it hangs up
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _open(place: str) -> IO[bytes]:
    if is_address(place):
        system, path = file_system(place)
        return system.open(path, "rb")
    return open(place, "rb")


def exists(place: str) -> bool:
    """Whether there is a file or a folder."""
    return bool(file_system(place)[0].exists(place)) if is_address(place) else os.path.exists(place)


def is_folder(place: str) -> bool:
    """Whether there is a folder."""
    return bool(file_system(place)[0].isdir(place)) if is_address(place) else os.path.isdir(place)


def expand(pattern: str) -> list[str]:
    """The files that a pattern names, sorted: {00..12} and {a,b} are spelled out, *, ? and [] matched."""
    found: list[str] = []
    for name in _spell_out(pattern):
        if is_address(name):
            system, path = file_system(name)
            found += [str(system.unstrip_protocol(p)) for p in system.glob(path)]
        else:
            found += glob.glob(name, recursive=True) if re.search(r"[*?[]", name) else [name]
    missing = [name for name in found if not exists(name)]
    if missing:
        raise ValueError(
            f"{missing[0]} does not exist; missing of {pattern}: {counted(len(missing), 'file')}"
        )
    return sorted(found)


def _spell_out(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1])
        middles = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        middles = match[1].split(",")
    for middle in middles:
        yield from _spell_out(pattern[: match.start()] + middle + pattern[match.end() :])


# --- The index that is kept ----------------------------------------------------------------------


def _kept(what: str, make: Callable[[], tuple[Listing, list[str]]]) -> Listing:
    """make()'s listing, or the one kept under this name while what it watched has not changed.

    make returns the listing and the files and folders that it was made from.
    """
    key = hashlib.sha256(os.fsencode(f"{what}\n{os.getcwd()}"))  # paths are kept as they were given
    folder = cache_folder("index") / key.hexdigest()[:32]
    with suppress(OSError, ValueError, KeyError, EOFError):  # none there, or not whole: make it
        about = json.loads((folder / "about.json").read_text())
        if all(_stamp(place) == stamp for place, stamp in about["watched"]):
            return _load(folder, about)
    started, begun = time.monotonic(), time.time()
    listing, watched = make()
    if time.monotonic() - started > WORTH_KEEPING_S:
        stamps = [(place, _stamp(place)) for place in watched]
        settled = all(stamp[1] < (begun - UNSETTLED_S) * 1e9 for _, stamp in stamps if len(stamp) == 2)
        if settled:
            with suppress(OSError):  # a full or forbidden cache folder only costs time
                _keep(folder, listing, stamps)
    return listing


def _stamp(place: str) -> list[Any]:
    """[size, time in ns] of a file or folder; what fsspec knows it by; [] where there is none."""
    try:
        if is_address(place):
            system, path = file_system(place)
            return [system.ukey(path)]
        status = os.stat(place)
        return [status.st_size, status.st_mtime_ns]
    except FileNotFoundError:
        return []


def _keep(folder: Path, listing: Listing, stamps: list[tuple[str, list[Any]]]) -> None:
    """Write an index beside its place and rename it, so that there is never half of one."""
    beside, old = (folder.with_name(f".{folder.name}.{os.getpid()}{end}") for end in ("", ".old"))
    beside.mkdir(parents=True)
    try:
        columns = {name: column for name, column in _columns(listing).items() if len(column)}
        for name, column in columns.items():
            np.save(beside / f"{name}.npy", column)
        about = {
            "roots": listing.places.roots, "classes": listing.classes, "without": listing.without,
            "watched": stamps, "columns": list(columns),
        }  # fmt: skip
        (beside / "about.json").write_text(json.dumps(about))
        if folder.exists():  # who has mapped it keeps it
            os.replace(folder, old)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _columns(listing: Listing) -> dict[str, np.ndarray]:
    columns = {f.name: getattr(listing.places, f.name) for f in fields(Places) if f.name != "roots"}
    return columns | {"labels": listing.labels}


def _load(folder: Path, about: dict[str, Any]) -> Listing:
    def column(name: str) -> np.ndarray:
        kept = name in about["columns"]
        return np.load(folder / f"{name}.npy", mmap_mode="r") if kept else _NO_NUMBERS

    columns = {f.name: column(f.name) for f in fields(Places) if f.name != "roots"}
    places = Places(tuple(about["roots"]), **columns)
    return Listing(places, column("labels"), tuple(about["classes"]), about["without"])


# --- Folders -------------------------------------------------------------------------------------


def list_folder(root: str) -> Listing:
    """The pictures in a folder and below it; the shards that lie there are its roots from the second on.

    Pictures have the folder in the root as their class, unless some lie in the root itself. Hidden
    files and folders are left out, and folders of runs, whose pictures show what a run has done.
    """

    def make() -> tuple[Listing, list[str]]:
        rows, roots = _Rows(), [root]
        watched: list[str] = []
        for name in (
            _remote_files(root) if is_address(root) else _local_files(root, "", frozenset(), watched)
        ):
            if name.lower().endswith(IMAGE_EXTENSIONS):
                first, slash, _ = name.partition("/")
                rows.add(name, first if slash else None)
            elif name.endswith((".tar", ".parquet")):
                roots.append(_join(root, name))
        return rows.listing(roots), watched

    # fsspec does not know when a folder changed.
    return make()[0] if is_address(root) else _kept(f"folder {root}", make)


def _local_files(
    root: str, inside: str, above: frozenset[tuple[int, int]], watched: list[str]
) -> Iterator[str]:
    """Names of all files below a folder, in the order of their parts; links are followed, loops not."""
    here = os.path.join(root, inside)
    status = os.stat(here)
    if (status.st_dev, status.st_ino) in above:
        return
    watched.append(here)
    folders: set[str] = set()
    names: list[str] = []
    with os.scandir(here) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                names.append(entry.name)
                with suppress(OSError):  # a link that leads to itself
                    if entry.is_dir():
                        folders.add(entry.name)
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        watched.append(entry.path)  # it may lead somewhere one day
    if inside and RUN_FILE in names:
        return
    names.sort()
    for name in names:
        if name in folders:
            deeper = above | {(status.st_dev, status.st_ino)}
            yield from _local_files(root, f"{inside}{name}/", deeper, watched)
        else:
            yield inside + name


def _remote_files(root: str) -> Iterator[str]:
    """The same, in the same order, of a folder behind an address."""
    system, path = file_system(root)
    files = [name.removeprefix(path.rstrip("/") + "/").split("/") for name in system.find(path)]
    runs = {tuple(parts[:-1]) for parts in files if parts[-1] == RUN_FILE and len(parts) > 1}
    for parts in sorted(files):
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and not any(tuple(parts[:depth]) in runs for depth in range(1, len(parts))):
            yield "/".join(parts)


# --- Lists ---------------------------------------------------------------------------------------


def list_names(names: Iterable[str]) -> Listing:
    """Pictures named one by one; whether one is there shows when it is read."""
    rows = _Rows()
    for name in names:
        rows.add(name, None)
    return rows.listing([""])


def list_text(file: str) -> Listing:
    """A .txt of paths, one a line, beside which the paths begin."""

    def make() -> tuple[Listing, list[str]]:
        rows = _Rows()
        with _open(file) as stream:
            for number, line in enumerate(stream):
                name = line.strip() if number else line.removeprefix(b"\xef\xbb\xbf").strip()
                if b"\0" in name:
                    raise ValueError(f"{file} is no list of paths in UTF-8, one a line; save it as such")
                if name:
                    rows.add(name, None)
        return _with_members(rows.listing([os.path.dirname(file)]), file)

    return _kept(f"text {file}", make)


def _with_members(listing: Listing, file: str) -> tuple[Listing, list[str]]:
    """A list, whose pictures may lie in shards, as s/0.tar/dogs/1.jpg; and the files it was made from."""
    places = listing.places
    text = places.text.tobytes()
    if b".tar/" not in text and b".parquet/" not in text:
        return listing, [file]
    rows, roots, held = _Rows(), [places.roots[0]], {}
    begin = 0
    for end in places.ends.tolist():
        name, begin = os.fsdecode(text[begin:end]), end
        match = re.match(r"(.*?\.(?:tar|parquet))/(.+)", name)
        shard = _join(roots[0], match[1]) if match else ""
        if match and shard not in held:
            held[shard] = _pieces(shard, len(roots))
            roots += [shard] if held[shard] else []
        piece = held[shard].get(match[2]) if match else None
        rows.add(match[2] if match and piece else name, None, piece or (0, 0, 0))
    return replace(listing, places=rows.listing(roots).places), [file, *held]


def _pieces(shard: str, root: int) -> dict[str, tuple[int, int, int]]:
    """(root, start, size) of the pictures in a shard, by their names there; none where it is no file."""
    if not exists(shard) or is_folder(shard):
        return {}
    places = (list_parquet if is_parquet(shard) else list_tars)([shard]).places
    pieces = zip(places.start.tolist(), places.size.tolist(), strict=True)
    return {places.name(i)[len(shard) + 1 :]: (root, *piece) for i, piece in enumerate(pieces)}


def list_csv(file: str, labelled: bool, split: str = "") -> Listing:
    """A .csv with the columns path and, perhaps, label and part; paths begin beside it.

    labelled: refuse rows without a label. split: the rows to take where the column part tells train from
        others, as finetune's split.csv has it; all where empty.
    """
    parts = parts_of_csv(file) if split else frozenset()
    if parts and split not in parts:
        raise ValueError(
            f"{file} has no row of the part {split!r}; its parts are {', '.join(sorted(parts))}"
        )

    def make() -> tuple[Listing, list[str]]:
        rows, lines = _Rows(), _csv_rows(file)
        _, columns = next(lines, (0, []))
        if "path" not in columns:
            raise ValueError(f"{file} needs a first line that names its columns: path,label")
        path = columns.index("path")
        label = columns.index("label") if "label" in columns else None
        part = columns.index("part") if parts else None
        for number, row in lines:
            if not row or (part is not None and row[part : part + 1] != [split]):
                continue
            for name, column in (("path", path), ("label", label if labelled else None)):
                if column is not None and not "".join(row[column : column + 1]):
                    raise ValueError(f"line {number} of {file} has no {name}")
            text = "".join(row[label : label + 1]) if label is not None else ""
            rows.add(row[path], text or None, sure=labelled)
        return _with_members(rows.listing([os.path.dirname(file)]), file)

    return _kept(f"csv {labelled} {split if parts else ''} {file}", make)


def parts_of_csv(file: str) -> frozenset[str]:
    """What the column part of a .csv says, where it tells train from others; else nothing."""
    lines = _csv_rows(file)
    _, columns = next(lines, (0, []))
    if "part" not in columns:
        return frozenset()
    place = columns.index("part")
    parts = frozenset(row[place] for _, row in lines if len(row) > place and row[place])
    return parts if "train" in parts else frozenset()  # a part may be a wheel


def _csv_rows(file: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, row) of each row of a .csv. Raises ValueError for what is none."""
    # Spreadsheets begin theirs with a byte order mark.
    with io.TextIOWrapper(
        _open(file), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as stream:
        reader = csv.reader(stream)
        try:
            for row in reader:
                odd = next((text for text in row if not (text.isascii() or is_utf8(text))), None)
                if odd is not None and not os.path.exists(_join(os.path.dirname(file), odd)):
                    raise ValueError(
                        f"line {reader.line_num} of {file} is not UTF-8 ({printable(odd)}), nor is that "
                        "the name of a file; save it as UTF-8"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(
                f"line {reader.line_num} of {file} is no row of a .csv ({error}); "
                "is a quotation mark before it left open?"
            ) from error


# --- Tar shards ----------------------------------------------------------------------------------


def list_tars(files: Sequence[str], workers: int = 0) -> Listing:
    """Tar shards as WebDataset writes them; a plain tar of class folders also has their labels.

    Labels are those of .cls, else the label in .json, else a .txt of one short line. Numbers are named
    by the lines of a classes.txt beside the shards.
    """

    def make() -> tuple[Listing, list[str]]:
        folders = [_beside(file, "") for file in files]
        names = {folder: _class_names(folder) for folder in folders}
        rows = _Rows()
        shards = load_in_processes(lambda i: _tar_members(files[i]), range(len(files)), workers)
        for number, members in enumerate(shards):
            for name, label, start, size in members:
                rows.add(name, label, (number, start, size))
        beside = [folder + name for folder in names for name in CLASS_FILES]
        return rows.named([names[folder] for folder in folders]).listing(files), [*files, *beside]

    return _kept("tars " + "\n".join(files), make)


def _named(label: str, names: Sequence[str] | None) -> str:
    """A label; the class's name of one that is a number, where names are known."""
    if names is None or not label.isdecimal():
        return label
    if int(label) >= len(names):
        raise ValueError(f"a label is {label}, beyond the last of {counted(len(names), 'named class')}")
    return names[int(label)]


def _class_names(folder: str) -> list[str] | None:
    """The lines of the classes.txt in a folder, if it has one."""
    named = next((folder + name for name in CLASS_FILES if exists(folder + name)), None)
    if named is None:
        return None
    with _open(named) as stream:
        lines = stream.read().decode("utf-8-sig", "surrogateescape").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _beside(file: str, name: str) -> str:
    return _join(file.rpartition("/")[0], name) if "/" in file else name


def _tar_members(file: str) -> list[tuple[str, str | None, int, int]]:
    """(name, label, first byte, bytes) of each picture of a tar."""
    pictures: list[tuple[str, str, int, int]] = []  # key, name, first byte, bytes
    labels: dict[str, str] = {}
    ranks = {"cls": 0, "json": 1, "txt": 2}
    taken: dict[str, int] = {}  # the rank of the member that gave a key its label
    links = 0
    try:
        with _open(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                name = member.name.removeprefix("./")
                folder, slash, base = name.rpartition("/")
                links += member.islnk() or member.issym()
                if not member.isreg() or base.startswith("."):
                    continue
                stem, _, extension = base.partition(".")
                key = folder + slash + stem
                extension = extension.lower()
                if name.lower().endswith(IMAGE_EXTENSIONS):
                    pictures.append((key, name, member.offset_data, member.size))
                elif extension in ranks and ranks[extension] < taken.get(key, 3):
                    content = tar.extractfile(member)
                    assert content is not None, "it is a regular file"
                    label = _label(extension, content.read())
                    if label is not None:
                        labels[key], taken[key] = label, ranks[extension]
            # Where a header is damaged or cut tarfile ends as if all were there. Some writers leave out the
            # zeros at the end, as GNU's tar accepts.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) not in (b"", bytes(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"it is damaged or cut at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} is not a whole, uncompressed tar ({error}); `beit shard` makes such"
        ) from error
    if links:
        print(
            f"{file}: left out {counted(links, 'link')}; `tar --dereference --hard-dereference` packs what "
            "they lead to",
            file=sys.stderr,
        )
    if not labels and all("/" in name for _, name, _, _ in pictures):
        return [(name, name.partition("/")[0], start, size) for _, name, start, size in pictures]
    plain = {key for key, name, _, _ in pictures if "." not in name[len(key) + 1 :]}
    # KEY.jpg hides KEY.mask.png, which belongs to it; IMG.2020.jpg alone is a picture.
    return [
        (name, labels.get(key), start, size)
        for key, name, start, size in pictures
        if key not in plain or "." not in name[len(key) + 1 :]
    ]


def _label(extension: str, content: bytes) -> str | None:
    text = content.decode(errors="replace").strip()
    if extension == "json":
        with suppress(json.JSONDecodeError):
            about = json.loads(text)
            keys = ("class_name", "label", "class", "cls") if isinstance(about, dict) else ()
            return next((str(about[k]) for k in keys if isinstance(about.get(k), (str, int))), None)
        return None
    if extension == "txt" and (len(text) > 100 or "\n" in text):
        return None  # a caption
    return text or None


# --- Parquet -------------------------------------------------------------------------------------


def list_parquet(files: Sequence[str]) -> Listing:
    """Parquet files with the bytes of pictures in a column, as Hugging Face's datasets write them."""

    def make() -> tuple[Listing, list[str]]:
        rows, largest = _Rows(), 0
        named: list[list[str] | None] = []
        for number, file in enumerate(files):
            parquet, _, label, names = _open_parquet(file)
            named.append(names)
            labels = parquet.read(columns=[label]).column(0).to_pylist() if label else None
            row = 0
            for group in range(parquet.num_row_groups):
                about = parquet.metadata.row_group(group)
                largest = max(largest, about.total_byte_size)
                for place in range(about.num_rows):
                    value = labels[row] if labels else None
                    unknown = value is None or value == -1  # a test set's
                    rows.add(f"row {row}", None if unknown else str(value), (number, group, place))
                    row += 1
        if largest > 64_000_000:
            print(
                f"{files[0]}: a picture is read with its row group, here of up to {largest / 1e6:.0f} MB; "
                "`beit shard` makes shards of it that read faster",
                file=sys.stderr,
            )
        return rows.named(named).listing(files), list(files)

    return _kept("parquet " + "\n".join(files), make)


def _open_parquet(file: str) -> tuple[Any, str, str | None, list[str] | None]:
    """The open file, its columns of bytes and of labels, and the names of the classes if it has them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{file} needs pyarrow: pip install "beit[parquet]"') from None
    try:
        parquet = pyarrow.parquet.ParquetFile(_open(file) if is_address(file) else file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file ({error})") from error
    schema = parquet.schema_arrow
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    told = (about.get("info") or {}).get("features") or {}
    features = {name: kind for name, kind in told.items() if isinstance(kind, dict)}  # no lists

    def bytes_of(name: str) -> str | None:
        kind = schema.field(name).type
        if pyarrow.types.is_struct(kind):
            return f"{name}.bytes" if kind.get_field_index("bytes") >= 0 else None
        return name if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) else None

    image = next((found for name in schema.names if (found := bytes_of(name))), None)
    if image is None:
        raise ValueError(f"{file} has no column of bytes; its columns are {', '.join(schema.names)}")
    label = next((n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"), None)
    names = features[label].get("names") if label else None
    label = label or next((n for n in ("label", "labels", "class", "cls") if n in schema.names), None)
    return parquet, image, label, names


_reading = threading.Lock()


def _row_group(file: str, group: int) -> Any:
    with _reading:  # or each thread that comes to a new one would read it
        return _read_row_group(file, group)


@functools.lru_cache(maxsize=2)  # who reads in order reads each row group once
def _read_row_group(file: str, group: int) -> Any:
    parquet, image, _, _ = _open_parquet(file)
    column = parquet.read_row_group(group, columns=[image], use_threads=False).column(0).combine_chunks()
    return column.field("bytes") if column.type.num_fields else column


@patiently
def _parquet_image(file: str, group: int, row: int, name: str) -> bytes:
    try:
        content = _row_group(file, group)[row].as_py()
    except (OSError, ValueError) as error:  # ArrowInvalid is one
        raise BadImage("unreadable", name, f"cannot be read ({error})") from error
    if content is None:
        raise BadImage("missing", name, "a row without bytes")
    check_file_size(len(content), name)
    return bytes(content)
