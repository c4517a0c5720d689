"""Snapshots of a training: a folder that is there whole or not at all, and that proves it.

    step-00000100/   *.safetensors  state.json  SHA256SUMS   (`sha256sum -c SHA256SUMS` verifies it)

Written beside its place, flushed to the disk and renamed. Tensors go to the disk one at a time, straight
from where they are, without a second copy of the model. Nothing is pickled.

Processes that hold a part of each tensor write a file each, `model-00001-of-00002.safetensors`; read
together they are one, whose tensors are whole, so that any number of processes goes on from them.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from beit.atomic import flush

SUMS = "SHA256SUMS"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Tensors = Mapping[str, Tensor]


def write_snapshot(folder: Path, files: Mapping[str, Tensors], state: dict[str, Any]) -> None:
    """Write a snapshot, replacing one of the same name.

    files: the tensors of each safetensors file. Raises OSError with ENOSPC, before anything is
    written, where the disk has not enough room.
    """
    beside = room_beside(folder, size_of(files))
    try:
        seal(beside, folder, write_files(beside, files), state)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def size_of(files: Mapping[str, Tensors]) -> int:
    """The bytes of all tensors."""
    return sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())


def room_beside(folder: Path, needed: int) -> Path:
    """A new folder to write a snapshot's files in. Raises OSError where `needed` bytes are not free."""
    parent = folder.parent
    sweep(parent)
    free = shutil.disk_usage(parent).free
    if needed + 2**20 > free:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
    beside = parent / f".writing-{os.getpid()}"
    beside.mkdir()
    return beside


def write_files(
    beside: Path, files: Mapping[str, Tensors], part: int = 0, parts: int = 1
) -> dict[str, str]:
    """Write the files, or this one of the parts of each; returns the SHA-256 of each by its name."""
    sums = {}
    for name, tensors in files.items():
        stem, suffix = name.split(".")
        named = name if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.{suffix}"
        sums[named] = write_tensors(beside / named, tensors)
    return sums


def seal(beside: Path, folder: Path, sums: dict[str, str], state: dict[str, Any]) -> None:
    """Make what stands beside, whose files have these sums, the snapshot."""
    content = json.dumps(state).encode()
    sums = {**sums, "state.json": hashlib.sha256(content).hexdigest()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    for name, text in (("state.json", content), (SUMS, lines.encode())):
        (beside / name).write_bytes(text)
        flush(beside / name)
    flush(beside)
    drop(folder)
    os.replace(beside, folder)
    flush(folder.parent)


def verify_snapshot(folder: Path) -> None:
    """Raise OSError or ValueError where a file is missing or a byte is wrong."""
    names = []
    for line in (folder / SUMS).read_text().splitlines():
        digest, name = line.split("  ", 1)
        names.append(name)
        if _sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    if "state.json" not in names:  # the last that is summed
        raise ValueError(f"{SUMS} does not name state.json")


def load_snapshot(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The tensors of each file, by its name without a part's number, and the state."""
    together: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        together.setdefault(re.sub(r"-\d{5}-of-\d{5}", "", file.name), []).append(file)
    files: dict[str, Tensors] = {name: _Joined(parts) for name, parts in together.items()}
    return files, json.loads((folder / "state.json").read_text())


class _Joined(Mapping[str, Tensor]):
    """The tensors of one file or of its parts. Each is read, and made whole, when it is asked for."""

    def __init__(self, parts: list[Path]) -> None:
        self.parts = [safe_open(part, "pt") for part in parts]
        self.where: dict[str, list[Any]] = {}
        for part in self.parts:
            for name in part.keys():  # noqa: SIM118  a handle, not a dictionary
                self.where.setdefault(name, []).append(part)

    def __getitem__(self, name: str) -> Tensor:
        pieces = [part.get_tensor(name) for part in self.where[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def snapshots(parent: Path) -> list[Path]:
    """All snapshots in a folder, the newest last."""
    found = (f for f in parent.glob("step-*") if f.name[5:].isdecimal())  # no copies of people's
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def drop(folder: Path) -> None:
    """Remove a snapshot at one blow: it has lost its name before the first file goes."""
    if folder.exists():
        nameless = folder.with_name(f".dropped-{folder.name}")
        shutil.rmtree(nameless, ignore_errors=True)
        os.replace(folder, nameless)
        shutil.rmtree(nameless)


def sweep(parent: Path) -> None:
    """Remove what killed processes were writing or removing."""
    for left in (*parent.glob(".writing-*"), *parent.glob(".dropped-*")):
        shutil.rmtree(left, ignore_errors=True)


def write_tensors(file: Path, tensors: Tensors) -> str:
    """Write a safetensors file, flushed to the disk; returns its SHA-256.

    The library's own writer holds all tensors a second time as bytes, and gives no sum.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream, ThreadPoolExecutor(1) as pool:
        begin_with = len(text).to_bytes(8, "little") + text
        contents = (bytes_of(tensor) for _, tensor in ordered)
        for content in itertools.chain([memoryview(begin_with)], contents):
            summed = pool.submit(digest.update, content)
            stream.write(content)
            summed.result()
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers as they lie in memory, row by row."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()
