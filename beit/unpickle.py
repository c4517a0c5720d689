"""Read foreign .pth, .pkl, .bin and .safetensors files; nothing they say is ever run.

A pickle is a program. This is a machine for the few of its instructions that weights need: opcodes
and names stand in tables, everything else is refused by its name, nothing is imported. What a file
names becomes a tensor, a plain container or an `Inert` record. Tensors are views of the file, which
is mapped copy-on-write; every size is held against the file before it is believed.

Formats: PyTorch's zip archive (1.6 and later), its older stream (five pickles, then raw storages) and
safetensors, told apart by content. After torch/serialization.py, the zip specification (APPNOTE.TXT)
and the opcode table of Python's pickletools.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from pickletools import opcodes
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# A large model with optimizer and EMA takes 60,000 steps and 0.2 MiB of pickle. The limits keep what a
# hostile file can make of its bytes under 200 MB.
MAX_STEPS = 300_000
MAX_INDEX_BYTES = 2**23  # of data.pkl, of a zip directory, of a safetensors header
MAX_TENSORS = 50_000  # and members of an archive
MAX_DIMENSIONS = 32
MAX_DEPTH = 100  # of containers in containers
MAX_VALUES = 1_000_000  # in the result, what is shared counted each time it is met
MAX_TENSOR_COPIES = 8  # bytes of all tensors of the result : bytes of the file; views of one storage

AGAIN = "download or copy it again"
TRUSTED = (
    "Nothing of it was run. Tensors, plain containers, argparse.Namespace and the DALL-E modules are"
    " read; if you trust the file, load it with the program that wrote it and save its state_dict() as"
    " safetensors"
)
# struct, torch and safetensors say in their own words what does not fit.
DAMAGE = (
    ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error, SafetensorError
)  # fmt: skip


class RefusedFile(ValueError):
    """A file that is not read: its name, what came, why not, what to do."""

    exit_code = 5


@dataclass(slots=True)
class Inert:
    """An object of a foreign class, as data.

    name: "module.Class".
    state: what the file sets, usually the attribute dict; the constructor's arguments (a tuple) where it
    sets nothing after them; (arguments, state) where it does both.
    """

    name: str
    state: Any


def read_weights(path: str | Path) -> Any:
    """Read one foreign weight file, whatever its name.

    Returns dict, list, tuple, set, str, bytes, numbers, None, torch.dtype, Inert and Tensor; an
    OrderedDict is a dict, a Parameter a Tensor, a torch.Size a tuple. Tensors are on the CPU and
    writable: writing changes memory, never the file. They are views of the file, except where it puts
    a storage off its alignment. Raises RefusedFile for anything that is not whole or not on the list.
    """
    path = Path(path)
    try:
        return _read(path)
    except RefusedFile as refusal:
        raise RefusedFile(f"{path}: {refusal}") from None
    except OSError as error:
        raise RefusedFile(f"{path}: cannot be read ({error.strerror or error})") from None
    except DAMAGE as error:
        raise RefusedFile(f"{path}: is damaged ({ascii(error)[:300]}); {AGAIN}") from None


def module_tensors(inert: Inert) -> dict[str, Tensor]:
    """The state dict of a pickled nn.Module: {"blocks.group_1.w": tensor}, parameters before buffers.

    Raises RefusedFile where `_modules`, `_parameters` or `_buffers` are not what torch writes.
    """
    found: dict[str, Tensor] = {}
    todo: list[tuple[str, Any]] = [("", inert)]
    visits = 0
    while todo:
        prefix, module = todo.pop()
        visits += 1
        deep = prefix.count(".") > MAX_DEPTH or len(prefix) > 1000
        if deep or max(visits, len(found)) > MAX_TENSORS:
            _refuse(f"{prefix[:80]!a} lies too deep: modules hold each other without end. {TRUSTED}")
        state = module.state if isinstance(module, Inert) else None
        if not isinstance(state, dict):
            _refuse(f"{prefix[:80]!a} is {_shown(module)} where a module belongs. {TRUSTED}")
        parameters, buffers, modules, passing = (
            {} if (part := state.get(name)) is None else part
            for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        )
        for part in (parameters, buffers, modules):
            if not isinstance(part, dict) or not all(type(n) is str and len(n) <= 1000 for n in part):
                _refuse(f"{prefix[:80]!a} does not keep its parts by name. {TRUSTED}")
        own = parameters | {
            n: b for n, b in buffers.items() if not isinstance(passing, set) or n not in passing
        }
        for name, tensor in own.items():
            if tensor is not None:
                if not isinstance(tensor, Tensor) or prefix + name in found:
                    _refuse(f"{(prefix + name)[:80]!a} is {_shown(tensor)}, or there twice. {TRUSTED}")
                found[prefix + name] = tensor
        todo += [(f"{prefix}{name}.", m) for name, m in reversed(modules.items()) if m is not None]
    return found


def _refuse(reason: str) -> NoReturn:
    raise RefusedFile(reason)


# --- the file ---------------------------------------------------------------------------------------

# What people have under such names. First bytes (of text: its first word, in lower case) -> what to do.
OTHER_FILES = {
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it and give the weights inside",
    b"\x1f\x8b": "is compressed with gzip; unpack it (gunzip) and give the weights inside",
    b"BZh": "is compressed with bzip2; unpack it (bunzip2) and give the weights inside",
    b"\xfd7zXZ\0": "is compressed with xz; unpack it (unxz) and give the weights inside",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it (unzstd) and give the weights inside",
    b"Rar!": "is a rar archive; unpack it and give the weights inside",
    b"\x89HDF": "is an HDF5 file (Keras?); only PyTorch files and safetensors are read",
    b"\x93NUMPY": "is a NumPy array; only PyTorch files and safetensors are read",
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; run: git lfs pull",
    b"<": "is a web page, not weights: the link has expired or wants a login; get a new link",
    b"{": "is JSON text, not weights; give the weight file or the folder it is in",
}


def _read(path: Path) -> Any:
    if not path.is_file():  # neither a fifo nor a device is opened
        if path.is_dir():
            _refuse("is a folder; give one file of it")
        _refuse(
            "is a device or a pipe; give a file" if path.exists() else "does not exist; check the path"
        )
    size = path.stat().st_size
    if size == 0:
        _refuse(f"is empty (0 bytes): nothing was downloaded; {AGAIN}")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    head = content[:512]
    # safetensors first: the length it begins with may spell any other beginning, "PK" in base models
    if head[6:9] == b"\0\0{":
        return _read_safetensors(path, content)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _read_zip(content)
    if head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        return _read_stream(content)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, advice in OTHER_FILES.items():
        if head.startswith(start) or text.startswith(start):
            _refuse(advice)
    if head[257:262] == b"ustar":
        _refuse("is a tar archive; unpack it and give the weights inside")
    _refuse(f"is neither a PyTorch file nor safetensors: it begins with {head[:8]!a}; check the path")


def _read_safetensors(path: Path, content: mmap.mmap) -> dict[str, Tensor]:
    (header,) = struct.unpack_from("<Q", content)
    if header > MAX_INDEX_BYTES or 8 + header > len(content):
        _refuse(
            f"claims a safetensors header of {header} bytes in {len(content)}: cut off or no such file"
        )
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) > MAX_TENSORS:
            _refuse(f"holds {len(names)} tensors; {MAX_TENSORS} are read at most")
        tensors = {}
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.dim() > MAX_DIMENSIONS:
                _refuse(f"has a tensor of {tensor.dim()} dimensions; {AGAIN}")
            aligned = tensor.data_ptr() % tensor.element_size() == 0  # as in `_finish`
            tensors[name] = tensor if aligned else tensor.clone()
        return tensors


def _read_zip(content: mmap.mmap) -> Any:
    members = _zip_members(content)
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        shown = ", ".join(f"{name[:60]!a}" for name in list(members)[:3]) or "nothing"
        _refuse(f"is a zip archive of {shown}, not one saved by PyTorch; unpack it and give the weights")
    root = roots[0]
    if any(name == f"{root}/constants.pkl" or name.startswith(f"{root}/code/") for name in members):
        _refuse(
            "is a TorchScript program, not a state dict; load it with torch.jit.load in a place that you"
            " can lose, and save its state_dict()"
        )
    if packed := [name for name, member in members.items() if member.packed]:
        _refuse(f"has a packed part, {packed[0][:60]!a}; PyTorch packs none: unpack it, zip it with -0")
    order = members.get(f"{root}/byteorder")
    if order and content[order.start : min(order.end, order.start + 8)] != b"little":
        _refuse("was saved on a big-endian machine; load it there and save it as safetensors")
    pickle = members[f"{root}/data.pkl"]
    if pickle.end - pickle.start > MAX_INDEX_BYTES:
        _refuse(
            f"has a data.pkl of {pickle.end - pickle.start} bytes; {MAX_INDEX_BYTES} are read at most"
        )
    program = content[pickle.start : pickle.end]
    if zlib.crc32(program) != pickle.crc:
        _refuse(f"has a data.pkl that does not fit its checksum; {AGAIN}")
    machine = _Machine()
    value = machine.run(io.BytesIO(program))
    storages = {}
    for key, claim in machine.storages.items():
        member = members.get(f"{root}/data/{key}")
        if member is None or claim.nbytes > member.end - member.start:
            _refuse(f"has no storage {key!a} of {claim.nbytes} bytes; {AGAIN}")
        storages[key] = (member.start, member.end)
    return _finish(machine, value, storages, content)


def _read_stream(content: mmap.mmap) -> Any:
    """The older form: magic number, version, byte order, the object, its storages' keys; then each
    storage as a count (int64) and its raw elements."""
    stream = io.BytesIO(content[:MAX_INDEX_BYTES])
    machine = _Machine()
    if machine.run(stream) != 0x1950A86A20F9469CFC6C or machine.run(stream) != 1001:
        _refuse(f"is a pickle, but not one of PyTorch's. {TRUSTED}")
    system = machine.run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        _refuse("was saved on a big-endian machine; load it there and save it as safetensors")
    value = machine.run(stream)
    keys = machine.run(stream)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        _refuse(f"has no list of its storages; {AGAIN}")
    if sorted(keys) != sorted(machine.storages):
        _refuse(f"lists other storages than it uses; {AGAIN}")
    storages = {}
    at = stream.tell()
    for key in keys:
        claim = machine.storages[key]
        (count,) = struct.unpack_from("<q", content, at)
        end = at + 8 + claim.nbytes
        if count != claim.count or end > len(content):
            _refuse(f"ends before storage {key!a} does, or its sizes disagree: it is cut off; {AGAIN}")
        storages[key] = (at + 8, end)
        at = end
    return _finish(machine, value, storages, content)


def _finish(
    machine: _Machine, value: Any, storages: dict[str, tuple[int, int]], content: mmap.mmap
) -> Any:
    """Put the tensors on their bytes, {key: (first, end)}, and look at the whole once."""
    for key, tensors in machine.tensors.items():
        start, end = storages[key]
        flat = torch.empty(0, dtype=torch.uint8, device="cpu")
        if end > start:
            flat = torch.frombuffer(content, dtype=torch.uint8, count=end - start, offset=start)
        if start % max(tensor.element_size() for tensor, *_ in tensors):
            flat = flat.clone()  # vector instructions may crash on elements off their alignment
        storage = flat.untyped_storage()
        for tensor, offset, size, stride in tensors:
            tensor.set_(storage, offset, size, stride)
    _check_extent(value, MAX_TENSOR_COPIES * len(content))
    return value


def _check_extent(value: Any, tensor_bytes: int) -> None:
    """Whoever walks the result must come to an end: no cycles, no towers, nothing repeated at length."""
    values = 0
    path: list[Iterator[Any]] = [iter((value,))]
    while path:
        for item in path[-1]:
            values += 1
            inside: Iterable[Any] | None = None
            if isinstance(item, dict):
                inside = chain(item.keys(), item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                inside = item
            elif isinstance(item, Inert):
                inside = (item.state,)
            elif isinstance(item, (str, bytes)):
                values += len(item) // 32
            elif isinstance(item, Tensor):
                tensor_bytes -= item.nbytes
            elif isinstance(item, (_Global, _Storage)):
                _refuse(f"holds {item} itself, not a value of it. {TRUSTED}")
            if values > MAX_VALUES or tensor_bytes < 0:
                _refuse(f"repeats what it holds until it is many times the file's size. {TRUSTED}")
            if inside is not None:
                path.append(iter(inside))
                if len(path) > MAX_DEPTH:
                    _refuse(f"nests more than {MAX_DEPTH} deep, or holds itself. {TRUSTED}")
                break
        else:
            path.pop()


# --- zip --------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    start: int  # of its data in the file
    end: int
    crc: int
    packed: bool


def _zip_members(content: mmap.mmap) -> dict[str, _Member]:
    """The directory of a zip archive, each size held against the file. {name: where it is}."""
    end = content.rfind(b"PK\5\6", max(0, len(content) - 22 - 0xFFFF))
    if end < 0:
        _refuse(f"is a zip archive (PyTorch's, perhaps) without its end: it is cut off; {AGAIN}")
    count, size, start, comment = struct.unpack_from("<10xHLLH", content, end)
    cut = end + 22 + comment != len(content)
    locator, record = struct.unpack_from("<4s4xQ", content, end - 20) if end >= 20 else (b"", 0)
    if locator == b"PK\6\7":  # zip64
        signature, count, size, start = struct.unpack_from("<4s28x3Q", content, record)
        cut |= signature != b"PK\6\6" or record + 56 > end - 20
        end = record
    if count > MAX_TENSORS or size > MAX_INDEX_BYTES:
        _refuse(
            f"is a zip archive of {count} members, listed in {size} bytes; at most {MAX_TENSORS} in"
            f" {MAX_INDEX_BYTES} are read"
        )
    if cut or start + size != end or 46 * count > size:
        _refuse(f"is a zip archive whose directory is not where it should be; {AGAIN}")
    members: dict[str, _Member] = {}
    spans = []
    at = start
    for _ in range(count):
        # fmt: off
        (signature, flags, method, crc, packed, unpacked, name_length, extra_length, comment,
         header) = struct.unpack_from("<4s4xHH4x3L3H8xL", content, at)
        # fmt: on
        raw_name = content[at + 46 : at + 46 + name_length]
        extra = content[at + 46 + name_length : at + 46 + name_length + extra_length]
        at += 46 + name_length + extra_length + comment
        unpacked, packed, header = _zip64_sizes(extra, [unpacked, packed, header])
        name = raw_name.decode(errors="replace")
        if signature != b"PK\1\2" or at > end or flags & 1 or name in members:
            _refuse(f"is a zip archive with a damaged, encrypted or double entry {name[:60]!a}; {AGAIN}")
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            _refuse(f"is a zip archive with a member {name[:60]!a} outside its folder: do not unpack it")
        local, name_length, extra_length = struct.unpack_from("<4s22x2H", content, header)
        first = header + 30 + name_length + extra_length
        if local != b"PK\3\4" or content[header + 30 : header + 30 + name_length] != raw_name:
            _refuse(f"is a zip archive whose entry {name[:60]!a} is not where it should be; {AGAIN}")
        if first + packed > start or (method == 0 and packed != unpacked):
            _refuse(f"is a zip archive whose entry {name[:60]!a} is longer than the file; {AGAIN}")
        spans.append((header, first + packed))
        members[name] = _Member(first, first + packed, crc, method != 0)
    spans.sort()
    if at != end or any(before[1] > after[0] for before, after in pairwise(spans)):
        _refuse("is a zip archive whose parts lie on each other (a zip bomb?); do not unpack it")
    return members


def _zip64_sizes(extra: bytes, sizes: list[int]) -> list[int]:
    """Take each size that is full (0xFFFFFFFF) from the zip64 field, in order."""
    at = 0
    while 0xFFFFFFFF in sizes and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = at + 4
            for place, size in enumerate(sizes):
                if size == 0xFFFFFFFF:
                    (sizes[place],) = struct.unpack_from("<Q", extra, field)
                    field += 8
            break
        at += 4 + length
    return sizes


# --- pickle -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A name that a pickle may use, and what becomes of a call."""

    name: str
    kind: str
    dtype: torch.dtype = torch.uint8  # of a storage

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _Storage:
    """What a pickle says of a run of elements that the file holds elsewhere."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def __str__(self) -> str:
        return "a storage"


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,  # torch 1.11 and 1.12
}
# fmt: off
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32",
    "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "float8_e5m2", "float8_e4m3fn",
    "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu",
)
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
INERT = {
    "argparse": ("Namespace",),
    "torch": ("device",),
    "numpy": ("dtype",), "numpy.core.multiarray": ("scalar",), "numpy._core.multiarray": ("scalar",),
    "pathlib": PATHS, "pathlib._local": PATHS,  # Python 3.13
    "dall_e.encoder": ("Encoder", "EncoderBlock"),
    "dall_e.decoder": ("Decoder", "DecoderBlock"),
    "dall_e.utils": ("Conv2d",),
    "torch.nn.modules.container": ("Sequential", "ModuleList", "ModuleDict"),
    "torch.nn.modules.linear": ("Identity", "Linear"),
    "torch.nn.modules.activation": ("ReLU", "GELU"),
    "torch.nn.modules.pooling": ("MaxPool2d", "AvgPool2d"),
    "torch.nn.modules.upsampling": ("Upsample",),
    "torch.nn.modules.conv": ("Conv2d",),
}
CALLS = {
    ("torch._utils", "_rebuild_tensor"): "tensor",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "tensor of a dtype",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("torch._utils", "_rebuild_parameter_with_state"): "parameter",
    ("torch", "Size"): "tuple",
    ("collections", "OrderedDict"): "dict",
    ("builtins", "set"): "set", ("__builtin__", "set"): "set",
    ("builtins", "frozenset"): "frozenset", ("__builtin__", "frozenset"): "frozenset",
    ("_codecs", "encode"): "bytes",
    ("__builtin__", "bytes"): "bytes",  # b"" before protocol 3; other bytes are encoded text
} | {(module, name): "inert" for module, names in INERT.items() for name in names}
GLOBALS: dict[tuple[str, str], _Global | torch.dtype] = {
    **{(module, name): _Global(f"{module}.{name}", kind) for (module, name), kind in CALLS.items()},
    **{(module, name): _Global(f"{module}.{name}", "storage", dtype)
       for module in ("torch", "torch.cuda", "torch.storage") for name, dtype in STORAGES.items()},
    **{("torch", name): getattr(torch, name) for name in DTYPES if hasattr(torch, name)},
}

OPCODES = {opcode.code.encode("latin1"): opcode.name for opcode in opcodes}
# What follows an opcode; of those in COUNTED, how many bytes do.
LAYOUTS = {
    name: struct.Struct(layout)
    for layout, names in {
        "<B": ("PROTO", "BININT1", "BINGET", "BINPUT", "LONG1", "SHORT_BINUNICODE", "SHORT_BINBYTES"),
        "<H": ("BININT2",),
        "<i": ("BININT", "LONG4"),
        "<I": ("LONG_BINGET", "LONG_BINPUT", "BINUNICODE", "BINBYTES"),
        "<Q": ("FRAME", "BINUNICODE8", "BINBYTES8"),
        ">d": ("BINFLOAT",),
    }.items()
    for name in names
}
COUNTED = frozenset([
    "LONG1", "LONG4", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8",
])
VALUES = COUNTED | {"BININT", "BININT1", "BININT2", "BINFLOAT"}
# fmt: on
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FROM_MARK = frozenset(["TUPLE", "SETITEMS", "APPENDS", "ADDITEMS", "FROZENSET"])


def _opcodes(pickle: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """The opcodes of one pickle with their arguments: a number, a text, bytes, or a module and a name.

    The standard library's table names them; its readers are not used, for they read before we can refuse
    and warn about strange text.
    """
    while code := pickle.read(1):
        name = OPCODES.get(code, f"0x{code.hex()}")
        argument: Any = None
        if layout := LAYOUTS.get(name):
            (argument,) = layout.unpack(pickle.read(layout.size))
        if name in COUNTED:
            raw = pickle.read(max(argument, 0))
            if len(raw) != argument:
                _refuse(f"claims {argument} bytes where {len(raw)} are left: it is cut off; {AGAIN}")
            if name.startswith("LONG"):
                if len(raw) > 128:
                    _refuse(f"holds a whole number of {len(raw)} bytes. {TRUSTED}")
                argument = int.from_bytes(raw, "little", signed=True)
            else:
                argument = raw.decode() if "UNICODE" in name else raw
        elif name == "GLOBAL":
            lines = [pickle.readline(), pickle.readline()]
            if not lines[1].endswith(b"\n"):
                _refuse(f"ends in the middle of a name: it is cut off; {AGAIN}")
            argument = [line[:-1].decode() for line in lines]
        yield name, argument
        if name == "STOP":
            return
    _refuse(f"ends in the middle: it is cut off; {AGAIN}")


class _Machine:
    """Runs pickles of one file. Tensors stay empty until the file's storages are known.

    storages: {key: what the pickle says of it}.
    tensors: {key: [(tensor, first element, size, stride)]}.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self.tensors: dict[str, list[tuple[Tensor, int, list[int], list[int]]]] = {}
        self.tensor_count = 0
        self.steps = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            _refuse(f"needs more than {MAX_STEPS} steps to read; weights need a few thousand. {TRUSTED}")

    def run(self, pickle: io.BytesIO) -> Any:
        """Run one pickle to its end. Stack errors are IndexErrors."""
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stack under each mark
        memo: dict[Any, Any] = {}
        items: list[Any] = []
        for name, argument in _opcodes(pickle):
            self.spend(1)
            if name in FROM_MARK:
                items, stack = stack, below.pop()
            if name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in VALUES:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name == "TUPLE":
                stack.append(tuple(items))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                length = int(name[-1])
                if len(stack) < length:
                    _refuse(f"takes more from its stack than is there; {AGAIN}")
                stack[-length:] = [tuple(stack[-length:])]
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            elif name == "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                if not isinstance(made, _Global) or made.kind != "inert":
                    _refuse(f"makes an object of {_shown(made)}. {TRUSTED}")
                stack.append(self.call(made, arguments))
            elif name == "BUILD":
                state, made = stack.pop(), stack[-1]
                if isinstance(made, Inert):
                    bare = isinstance(made.state, tuple) and not made.state
                    made.state = state if bare else (made.state, state)
                elif not isinstance(made, dict):  # an OrderedDict's attributes (_metadata) are dropped
                    _refuse(f"sets the state of {_shown(made)}. {TRUSTED}")
            elif name == "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            elif name == "GLOBAL":
                stack.append(_global(*argument))
            elif name == "STACK_GLOBAL":
                attribute = stack.pop()
                stack.append(_global(stack.pop(), attribute))
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "EMPTY_SET":
                stack.append(set())
            elif name == "FROZENSET":
                stack.append(frozenset(map(_key, items)))
            elif name in ("SETITEM", "SETITEMS"):
                if name == "SETITEM":
                    value = stack.pop()
                    items = [stack.pop(), value]
                if not isinstance(stack[-1], dict) or len(items) % 2:
                    _refuse(f"sets items of {_shown(stack[-1])}. {TRUSTED}")
                stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))
            elif name in ("APPEND", "APPENDS"):
                items = [stack.pop()] if name == "APPEND" else items
                if not isinstance(stack[-1], list):
                    _refuse(f"appends to {_shown(stack[-1])}. {TRUSTED}")
                stack[-1].extend(items)
            elif name == "ADDITEMS":
                if not isinstance(stack[-1], set):
                    _refuse(f"adds to {_shown(stack[-1])}. {TRUSTED}")
                stack[-1].update(map(_key, items))
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name not in ("PROTO", "FRAME", "STOP"):
                _refuse(f"uses the pickle opcode {name}, which weights never need. {TRUSTED}")
        if len(stack) != 1 or below:
            _refuse(f"leaves {len(stack)} values where one belongs; {AGAIN}")
        return stack[0]

    def call(self, function: Any, arguments: Any) -> Any:
        """What the allowed functions would return, as data."""
        kind = function.kind if isinstance(function, _Global) else ""
        match kind, arguments:
            case "inert", tuple():
                return Inert(function.name, arguments)
            case "tensor", (storage, offset, size, stride, *rest):
                return self.tensor(storage, offset, size, stride, metadata=rest[2:])
            case "tensor of a dtype", (storage, offset, size, stride, _, _, dtype, *rest):
                return self.tensor(storage, offset, size, stride, dtype=dtype, metadata=rest)
            case "parameter", (Tensor() as data, *_):
                return data
            case "dict", ():
                return {}
            case "bytes", ():
                return b""
            case "bytes", (str() as text, "latin1"):
                self.spend(len(text) // 16)  # what is made without reading more of the file costs steps
                return text.encode("latin1")
            case (("tuple" | "set" | "frozenset"), ((list() | tuple()) as values,)):
                self.spend(len(values))
                return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_key, values))
        _refuse(f"calls {_shown(function)} with {_shown(arguments)}. {TRUSTED}")

    def persistent(self, reference: Any) -> Any:
        """("storage", type, key, device, elements[, None]), or ("module", class, file, source) of old."""
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            return reference[1]  # a name from the list or it would not be here; the source is not read
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            _refuse(f"refers to {_shown(reference)} outside of itself. {TRUSTED}")
        _, kind, key, _, count, *view = reference
        if not isinstance(kind, _Global) or kind.kind != "storage" or any(v is not None for v in view):
            _refuse(f"has a storage of type {_shown(kind)}, or a view of one. {TRUSTED}")
        if type(key) is not str or len(key) > 100:
            _refuse(f"has a storage with the name {_shown(key)}. {TRUSTED}")
        claim = _Storage(key, kind.dtype, _size(count))
        if self.storages.setdefault(key, claim) != claim:
            _refuse(f"has two sizes or types for storage {key!a}; {AGAIN}")
        return claim

    def tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, metadata: list[Any], dtype: Any = None
    ) -> Tensor:
        """A tensor that gets its storage later; where it lies in it is checked now."""
        if (
            not isinstance(storage, _Storage)
            or not isinstance(size, tuple)
            or not isinstance(stride, tuple)
        ):
            parts = ", ".join(_shown(part) for part in (storage, size, stride))
            _refuse(f"rebuilds a tensor from {parts}. {TRUSTED}")
        dtype = storage.dtype if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            _refuse(f"has a tensor of type {_shown(dtype)}. {TRUSTED}")
        if metadata not in ([], [None], [{}]):
            _refuse("has a conjugate or negated view; save it again after resolve_conj().resolve_neg()")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            _refuse(f"has a tensor of {len(size)} dimensions and {len(stride)} strides; {AGAIN}")
        first, sizes, strides = _size(offset), [_size(n) for n in size], [_size(n) for n in stride]
        count = math.prod(sizes)
        end = first + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
        if count == 0:  # torch keeps the place of an empty slice, wherever that was
            first = end = 0
        if max(count, end) * dtype.itemsize > storage.nbytes:
            _refuse(
                f"has a tensor of {sizes} elements with strides {strides} at {first}, more than its"
                f" storage of {storage.nbytes} bytes; if it was expanded, save it again as contiguous"
            )
        self.tensor_count += 1
        if self.tensor_count > MAX_TENSORS:
            _refuse(f"holds more than {MAX_TENSORS} tensors. {TRUSTED}")
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        self.tensors.setdefault(storage.key, []).append((tensor, first, sizes, strides))
        return tensor


def _global(module: Any, name: Any) -> _Global | torch.dtype:
    if type(module) is not str or type(name) is not str or (module, name) not in GLOBALS:
        _refuse(f"asks for {_shown(module)}.{_shown(name)}, which is not on the list. {TRUSTED}")
    return GLOBALS[module, name]


def _key(value: Any) -> Any:
    """What may be a key: it is hashed, which for nested tuples or chosen numbers can take for ever."""
    if value is None or isinstance(value, (str, bytes, float)):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    _refuse(f"uses {_shown(value)} as a key; text and numbers are allowed. {TRUSTED}")


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        _refuse(f"has {_shown(value)} where a size belongs; {AGAIN}")
    return value


def _shown(value: Any) -> str:
    """A name or the type of what came: never its content, which may be of any size."""
    if isinstance(value, (str, int, _Global)) and not isinstance(value, bool):
        return str(value)[:80].encode("ascii", "backslashreplace").decode()
    return f"a {type(value).__name__}"
