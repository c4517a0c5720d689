"""Foreign weight files: what torch wrote comes back equal, and nothing that is opened can run code."""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import gzip
import io
import json
import math
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ENVIRONMENT
from torch import Tensor

from beit import unpickle
from beit.unpickle import Inert, RefusedFile, module_tensors, read_weights

GOLDEN = Path(__file__).parent / "golden"
FORMS = {"zip": True, "stream": False}  # PyTorch's two forms: _use_new_zipfile_serialization


def same(ours: Any, theirs: Any) -> bool:
    """Equal to what torch loaded: tensors bit by bit with their strides, objects as inert data."""
    if isinstance(theirs, Tensor):
        assert type(ours) is Tensor
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        return bits(ours) == bits(theirs)
    if isinstance(theirs, argparse.Namespace):
        return ours.name == "argparse.Namespace" and same(ours.state or {}, vars(theirs))
    if isinstance(theirs, np.generic):
        kind, raw = ours.state
        return np.frombuffer(raw, np.dtype(kind.state[0][0]))[0] == theirs
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(value: Any, form: str = "zip", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # torch cannot always find the source it stores in streams
        warnings.simplefilter("ignore")
        torch.save(value, buffer, _use_new_zipfile_serialization=FORMS[form], **options)
    return buffer.getvalue()


def read(tmp_path: Path, content: bytes, name: str = "weights.pth") -> Any:
    (tmp_path / name).write_bytes(content)
    return read_weights(tmp_path / name)


# --- what torch wrote comes back equal --------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "unilm-v1-finetune-relbias.pth",
        "unilm-v1-pretrain-run.pth",
        "hf418-beit-cls-meanpool-relbias/pytorch_model.bin",
    ],
)
def test_files_of_the_original_code_hold_what_torch_reads_in_them(name: str) -> None:
    from numpy._core.multiarray import scalar

    allowed = [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
    ]
    with torch.serialization.safe_globals(allowed):
        theirs = torch.load(GOLDEN / name, weights_only=True)
    assert same(read_weights(GOLDEN / name), theirs)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("dalle-tiny-encoder.pkl", "encoder"),
        ("dalle-tiny-encoder-legacy.pkl", "encoder"),
        ("dalle-tiny-decoder.pkl", "decoder"),
    ],
)
def test_pickled_dalle_modules_become_the_state_dict_that_the_original_code_gave(
    name: str, part: str
) -> None:
    module = read_weights(GOLDEN / name)
    assert module.name == f"dall_e.{part}.{part.title()}"
    assert module.state["n_hid"] == 8
    assert module.state["device"] == Inert("torch.device", ("cpu",))
    ours = module_tensors(module)
    with np.load(GOLDEN / "dalle-tiny.npz") as expected:
        theirs = {key.split(".", 1)[1]: expected[key] for key in expected if key.startswith(f"{part}.")}
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key].numpy(), theirs[key]) for key in theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", unpickle.DTYPES)
def test_every_dtype_comes_back_bit_by_bit(tmp_path: Path, name: str, form: str) -> None:
    dtype = getattr(torch, name)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    theirs = {"a": raw.view(dtype).reshape(2, 3), "b": torch.zeros(5, dtype=dtype)}
    assert same(read(tmp_path, saved(theirs, form)), theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_shapes_views_and_containers_come_back(tmp_path: Path, form: str, protocol: int) -> None:
    base = torch.randn(4, 6, 3)
    theirs = {
        "transposed": base.permute(2, 0, 1),
        "every other": base[1:, ::2],
        "scalar": torch.tensor(3.5),
        "empty": [torch.empty(0), torch.empty(3, 0, 2), torch.empty(0, 7)[:, 1:2]],
        "list": [1, -1, 2**31, -(2**63), 2**100, 0.1, math.inf, True, None, "ä\ud7ff😀", (), [], {}],
        "tuple": (1, (2, (3, (4, (5, 6))))),
        "bytes": [b"", b"\x00\xff", bytes(range(256)) * 3],
        "sets": [{1, "a"}, frozenset([2.5]), set()],
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "args": argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.98], inner=argparse.Namespace()),
        7: OrderedDict(a=OrderedDict()),
        "double": np.float64(0.25),
    }
    ours = read(tmp_path, saved(theirs, form, pickle_protocol=protocol))
    assert ours.pop("size") == tuple(theirs.pop("size"))
    assert same(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_models_and_optimizers_come_back(tmp_path: Path, form: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model.mark = torch.nn.Parameter(torch.randn(2), requires_grad=False)
    model.mark.note = "kept with the parameter"  # torch then rebuilds it by another function
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    theirs = {"model": model.state_dict(), "mark": model.mark, "optimizer": optimizer.state_dict()}
    ours = read(tmp_path, saved(theirs, form))
    assert not any(tensor.requires_grad for tensor in ours["model"].values())
    theirs["mark"] = theirs["mark"].data
    assert same(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_what_shared_a_storage_shares_it_again(tmp_path: Path, form: str) -> None:
    base = torch.arange(10.0)
    ours = read(tmp_path, saved({"a": base, "b": base[3:6], "c": base.view(2, 5), "again": base}, form))
    ours["a"][4] = -1
    assert ours["b"].tolist() == [3, -1, 5]
    assert ours["c"][0, 4] == -1
    assert ours["again"] is ours["a"]


@pytest.mark.parametrize("form", FORMS)
def test_a_pickled_module_becomes_its_state_dict(tmp_path: Path, form: str) -> None:
    model = torch.nn.Sequential(OrderedDict(stem=torch.nn.Conv2d(3, 4, 2), body=torch.nn.ModuleList()))
    model.body.append(torch.nn.Linear(4, 2, bias=False))
    model.body.append(torch.nn.Identity())
    model.body[1].register_buffer("kept", torch.arange(3))
    model.body[1].register_buffer("passing", torch.arange(3), persistent=False)
    ours = module_tensors(read(tmp_path, saved(model, form)))
    assert same(ours, dict(model.state_dict()))


def test_module_tensors_refuses_what_is_no_tree_of_modules() -> None:
    def module(**state: Any) -> Inert:
        return Inert("torch.nn.modules.container.Sequential", state)

    loop = module(_modules={})
    loop.state["_modules"] = {"a": loop, "b": loop}
    wide = module()
    for _ in range(60):
        wide = module(_modules={"a": wide, "b": wide})
    shapeless = module(_parameters=torch.ones(2))
    twice = module(
        _modules={"a": module(_parameters={"b": torch.ones(1)})}, _buffers={"a.b": torch.ones(1)}
    )
    deep_name = module(_modules={"x" * 600: module(_modules={"x" * 600: module()})})
    long_name = module(_parameters={"x" * 1001: torch.ones(1)})
    leaf = module(_parameters={str(n): torch.ones(1) for n in range(300)})
    many = module(_modules={str(n): leaf for n in range(300)})
    texts = [
        module(_parameters={"w": "text"}),
        module(_modules={"m": "text"}),
        module(_buffers={1: None}),
    ]
    for wrong in (
        loop,
        wide,
        shapeless,
        twice,
        deep_name,
        long_name,
        many,
        *texts,
        Inert("argparse.Namespace", ()),
        None,
    ):
        with pytest.raises(RefusedFile):
            module_tensors(wrong)  # type: ignore[arg-type]


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    theirs = {"w": torch.randn(3)}
    for content in (saved(theirs), saved(theirs, "stream"), safetensors.torch.save(theirs)):
        for name in ("w.jpg", "w.safetensors", "w.pth", "w"):
            assert same(read(tmp_path, content, name), theirs)


@pytest.mark.parametrize(
    "length",
    [int.from_bytes(start, "little") for start in (b"PK", b"\x80\2", b"\x80\4", b"\x1f\x8b", b"<a")],
)
def test_a_safetensors_header_may_have_the_length_that_spells_another_format(
    tmp_path: Path, length: int
) -> None:
    content = safetensors.torch.save({"w": torch.arange(4.0)})
    (old,) = struct.unpack_from("<Q", content)
    header = content[8 : 8 + old].ljust(length)
    ours = read(tmp_path, struct.pack("<Q", length) + header + content[8 + old :])
    assert ours["w"].tolist() == [0, 1, 2, 3]


def test_an_archive_with_64_bit_sizes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"w": torch.randn(30)}
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 1)
        content = rewritten(saved(theirs))
    assert b"PK\6\6" in content
    assert same(read(tmp_path, content), theirs)


def mapped(tensor: Tensor, path: Path) -> bool:
    """Does the tensor lie in a mapping of the file?"""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(str(path))
    return False


def stream_at(offset: int) -> bytes:
    """A stream whose storage begins at `offset` modulo 8."""
    contents = (saved({"w": torch.arange(1000.0), "name": "x" * n}, "stream") for n in range(8))
    return next(content for content in contents if content.find(struct.pack("<2f", 0, 1)) % 8 == offset)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list its mappings")
@pytest.mark.parametrize("offset", range(8))
def test_stream_tensors_are_views_of_the_file_where_the_processor_may_read_them(
    tmp_path: Path, offset: int
) -> None:
    ours = read(tmp_path, stream_at(offset))["w"]
    assert torch.equal(ours, torch.arange(1000.0))
    assert ours.data_ptr() % 4 == 0
    assert mapped(ours, tmp_path / "weights.pth") == (offset % 4 == 0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list its mappings")
@pytest.mark.parametrize("write", [saved, safetensors.torch.save])
def test_writing_to_a_tensor_changes_memory_and_never_the_file(
    tmp_path: Path, write: Callable[[Any], bytes]
) -> None:
    content = write({"w": torch.arange(1000.0)})
    ours = read(tmp_path, content)["w"]
    assert mapped(ours, tmp_path / "weights.pth")
    ours.zero_()
    assert (tmp_path / "weights.pth").read_bytes() == content
    assert ours.abs().sum() == 0


def test_safetensors_off_their_alignment_are_copied_to_it(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}'
    for spaces in range(8):
        content = (
            struct.pack("<Q", len(header) + spaces) + header + b" " * spaces + struct.pack("<2d", 1, 2)
        )
        ours = read(tmp_path, content)["w"]
        assert ours.tolist() == [1, 2]
        assert ours.data_ptr() % 8 == 0


@pytest.mark.parametrize("form", FORMS)
def test_reading_does_not_depend_on_default_device_or_inference_mode(tmp_path: Path, form: str) -> None:
    theirs = {"w": torch.randn(3), "empty": torch.empty(0)}
    content = saved(theirs, form)
    with torch.device("meta"), torch.inference_mode():
        ours = read(tmp_path, content)
    assert same(ours, theirs)


def test_threads_read_side_by_side() -> None:
    names = ["dalle-tiny-encoder.pkl", "dalle-tiny-encoder-legacy.pkl", "unilm-v1-pretrain-run.pth"] * 4
    alone = {name: repr(read_weights(GOLDEN / name)) for name in set(names)}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name, ours in zip(names, pool.map(lambda n: read_weights(GOLDEN / n), names), strict=True):
            assert repr(ours) == alone[name]


# --- hostile files ----------------------------------------------------------------------------------
# Programs are written opcode by opcode (pickletools has the table): most come from no pickler.


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def storage(count: int = 4, kind: str = "FloatStorage", key: str = "0", *view: bytes) -> bytes:
    return (
        tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(count), *view)
        + b"Q"
    )


def tensor(
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    of: bytes | None = None,
    more: bytes = b"",
) -> bytes:
    numbers = [tuple_of(*map(number, values)) for values in (size, stride)]
    hooks = called(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return called(rebuild, of or storage(), number(offset), *numbers, b"\x89", hooks, more)


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def archive(body: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> bytes:
    """The zip form of a program. Without `storages` there is one, "0", of 16 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", program(body))
        for key, raw in ({"0": bytes(16)} if storages is None else storages).items():
            file.writestr(f"archive/data/{key}", raw)
        for member, raw in members.items():
            file.writestr(f"archive/{member}", raw)
    return buffer.getvalue()


NUMBER = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
MAGIC = NUMBER + pickle.dumps(1001, 2)
LITTLE = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)


def stream(body: bytes, keys: Any = None, raw: bytes | None = None, system: bytes = LITTLE) -> bytes:
    """The older form of a program, by default with the same storage where the program uses one."""
    keys = ["0"][: body.count(b"storage")] if keys is None else keys
    raw = struct.pack("<q", 4) + bytes(16) if raw is None else raw
    return MAGIC + system + program(body) + pickle.dumps(list(keys), 2) + raw


def rewritten(
    content: bytes, method: int = zipfile.ZIP_STORED, rename: Callable[[str], str] = str
) -> bytes:
    """The same archive as Python's zipfile writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for member in old.namelist():
            new.writestr(rename(member), old.read(member))
    return buffer.getvalue()


def patched(content: bytes, member: str, at: int, layout: str, value: int) -> bytes:
    """An archive with one field of a member's directory entry changed."""
    new = bytearray(content)
    entry = content.rindex(member.encode()) - 46
    assert content[entry : entry + 4] == b"PK\1\2"
    struct.pack_into(layout, new, entry + at, value)
    return bytes(new)


def ending(content: bytes, at: int, layout: str, value: int) -> bytes:
    """An archive with one field of its end record changed."""
    new = bytearray(content)
    struct.pack_into(layout, new, content.rindex(b"PK\5\6") + at, value)
    return bytes(new)


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file."""
    raw = text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(name: str, first: int, last: int, shape: object = (1,), dtype: str = "F32") -> str:
    return f'"{name}":' + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [first, last]})


def listed(*entries: str) -> str:
    return "{" + ",".join(entries) + "}"


def compressed(body: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    return rewritten(archive(body, {"0": bytes(50_000_000)}), method)


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for member, raw in members.items():
            file.writestr(member, raw)
    return buffer.getvalue()


def unzipped_into(member: str) -> bytes:
    return rewritten(archive(tensor()), rename=lambda old: member if old.endswith("/0") else old)


def overlapping() -> bytes:
    """ "archive/data/0" reaches over the member after it."""
    content = archive(tensor(), {"0": bytes(16), "1": bytes(400)})
    return patched(patched(content, "archive/data/0", 20, "<L", 200), "archive/data/0", 24, "<L", 200)


def attacks(canary: Path, port: int) -> dict[str, bytes]:
    """Programs that would run code: a file is made, or a port is called."""
    command, touch = text(f"touch {canary}"), text(f"open({str(canary)!r}, 'w').close()")
    system = name("os", "system")
    ran = called(system, command)
    namespace = name("argparse", "Namespace") + b")\x81"
    return {
        "os.system": ran,
        "posix.system": called(name("posix", "system"), command),
        "os.popen": called(name("os", "popen"), command),
        "subprocess.Popen": called(
            name("subprocess", "Popen"), b"(" + text("touch") + text(str(canary)) + b"l"
        ),
        "subprocess.check_output": called(name("subprocess", "check_output"), command),
        "builtins.eval": called(name("builtins", "eval"), touch),
        "builtins.exec": called(name("builtins", "exec"), touch),
        "__builtin__.eval": called(name("__builtin__", "eval"), touch),
        "builtins.getattr": called(name("builtins", "getattr"), name("os", "path"), text("os")),
        "builtins.__import__": called(name("builtins", "__import__"), text("antigravity")),
        "builtins.open": called(name("builtins", "open"), text(str(canary)), text("w")),
        "builtins.compile": called(name("builtins", "compile"), touch, text("x"), text("exec")),
        "importlib.import_module": called(name("importlib", "import_module"), text("antigravity")),
        "runpy._run_code": called(name("runpy", "_run_code"), touch, b"}"),
        "pickle.loads": called(name("pickle", "loads"), text("")),
        "torch.load": called(name("torch", "load"), text(str(canary))),
        "torch.hub.load": called(name("torch.hub", "load"), text("a/b"), text("c")),
        "torch.storage._load_from_bytes": called(name("torch.storage", "_load_from_bytes"), text("")),
        "torch._utils._rebuild_wrapper_subclass": called(
            name("torch._utils", "_rebuild_wrapper_subclass")
        ),
        "torch._utils._rebuild_device_tensor_from_numpy": called(
            name("torch._utils", "_rebuild_device_tensor_from_numpy")
        ),
        "torch.jit.load": called(name("torch.jit", "load"), text(str(canary))),
        "numpy.load": called(name("numpy", "load"), text(str(canary))),
        "functools.partial": called(name("functools", "partial"), system),
        "operator.attrgetter": called(name("operator", "attrgetter"), text("system")),
        "types.CodeType": called(name("types", "CodeType")),
        "copyreg._reconstructor": called(name("copyreg", "_reconstructor"), system),
        "dill._dill._create_function": called(name("dill._dill", "_create_function")),
        "webbrowser.open": called(name("webbrowser", "open"), text(f"http://127.0.0.1:{port}")),
        "socket.create_connection": called(
            name("socket", "create_connection"), tuple_of(text("127.0.0.1"), number(port))
        ),
        "asyncio": called(name("asyncio.subprocess", "create_subprocess_shell"), command),
        "pathlib.Path.unlink": called(name("pathlib", "Path.unlink"), command),
        "a module that is not there": name("beit_hostile_module", "anything"),
        "a name of our own": name("beit.unpickle", "read_weights"),
        "dotted name": name("torch", "serialization.os.system") + tuple_of(command) + b"R",
        "dotted name on the list": name("collections", "OrderedDict.__init__.__globals__"),
        "name on the stack": text("os") + text("system") + b"\x93" + tuple_of(command) + b"R",
        "numbers for a name": b"K\1K\2\x93",
        "list for a name": b"]]\x93",
        "attack that is thrown away": ran + b"0" + b"}",
        "attack in a memo": ran + b"q\0" + b"}",
        "INST": b"(" + command + b"ios\nsystem\n",
        "INST of a name on the list": b"(iargparse\nNamespace\n",
        "OBJ": b"(" + name("argparse", "Namespace") + b"o",
        "NEWOBJ of a class": name("subprocess", "Popen") + tuple_of(command) + b"\x81",
        "NEWOBJ of a function on the list": name("_codecs", "encode") + b")\x81",
        "NEWOBJ of text": text("os.system") + b")\x81",
        "NEWOBJ_EX": name("argparse", "Namespace") + b")}\x92",
        "EXT1": b"\x82\1",
        "EXT2": b"\x83\1\0",
        "EXT4": b"\x84\1\0\0\0",
        "DUP": b"]2\x86",
        "POP_MARK": b"](1",
        "NEXT_BUFFER": b"\x97",
        "READONLY_BUFFER": b"]\x98",
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1) + b"x",
        "protocol 0 text": b"I1\n",
        "protocol 0 long": b"L" + b"9" * 5000 + b"L\n",
        "protocol 0 string": b"S'x'\n",
        "protocol 0 unicode": b"Vx\n",
        "protocol 0 reference": b"Pos.system\n",
        "BUILD of a function": system + b"}b",
        "BUILD of a list": b"]}b",
        "BUILD of a tensor": tensor() + b"}b",
        "BUILD of a name": name("argparse", "Namespace") + b"}b",
        "REDUCE of text": text("os.system") + tuple_of(command) + b"R",
        "REDUCE of a dtype": name("torch", "float32") + b")R",
        "REDUCE of a record": namespace + b")R",
        "REDUCE with a list": name("argparse", "Namespace") + b"]R",
        "OrderedDict of a list": called(name("collections", "OrderedDict"), b"]"),
        "encode with another codec": called(name("_codecs", "encode"), text("x"), text("zip")),
        "encode with no text": called(name("_codecs", "encode"), number(2**40), text("latin1")),
        "set of a number": called(name("builtins", "set"), number(2**40)),
        "bytes of a number": called(name("__builtin__", "bytes"), number(2**40)),
        "reference to a module with source": (
            tuple_of(text("module"), name("os", "system"), text("x.py"), text("import os")) + b"Q"
        ),
        "reference to something else": tuple_of(text("file"), text("/etc/passwd")) + b"Q",
        "reference that is text": text("os.system") + b"Q",
        "class as a value": name("argparse", "Namespace"),
        "class in a list": b"]" + name("torch", "FloatStorage") + b"a",
        "storage as a value": storage(),
    }


def bombs() -> dict[str, dict[str, bytes]]:
    """Programs that would take memory, time or the stack: {words of the refusal: {what: body}}.

    Words for the zip and the stream form are parted by "|" where they differ.
    """
    encode, make_set, size = name("_codecs", "encode"), name("builtins", "set"), name("torch", "Size")
    rebuild, double = name("torch._utils", "_rebuild_tensor"), name("torch", "float64")
    many = b"](" + b"K\1" * 100_000 + b"eq\0"
    doubling = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    tower = b"\x85" * 200_000
    v3 = name("torch._utils", "_rebuild_tensor_v3")
    no_type = storage().replace(name("torch", "FloatStorage"), text("FloatStorage"))
    return {
        "repeats what it holds": {
            "memo bomb": b"(]q\0" + doubling + b"t",
            "text repeated": b"(" + text("x" * 1_000_000) + b"q\0" + b"h\0" * 100_000 + b"t",
        },
        "nests more than 100 deep, or holds itself": {
            "list that holds itself": b"]q\0h\0a",
            "record that holds itself": name("argparse", "Namespace") + b")\x81q\0}" + text("a") + b"h\0sb",
            "dictionary that holds itself": b"}q\0" + text("a") + b"h\0s",
            "10,000 lists deep": b"]" * 10_000 + b"a" * 9_999,
            "200,000 tuples deep": b")" + tower,
            "tuples deep as a state": name("argparse", "Namespace") + b")\x81" + b")" + tower + b"b",
        },
        "a tuple as a key": {
            "200,000 tuples deep as a key": b"})" + tower + b"K\1s",
            "200,000 tuples deep in a set": b"\x8f()" + tower + b"\x90",
        },
        f"needs more than {unpickle.MAX_STEPS} steps": {
            "a million steps": b"N" + b"q\0" * 1_000_000,
            "a million values": b"](" + b"N" * 1_000_000 + b"e",
            "500,000 sets": b"](" + b"\x8f" * 500_000 + b"e",
            "500,000 dictionaries": b"](" + b"}" * 500_000 + b"e",
            "500,000 marks": b"(" * 500_000,
            "sets of one list": b"(" + many + make_set + b"q\1" + b"h\1h\0\x85R" * 50_000 + b"t",
            "sizes of one list": b"(" + many + size + b"q\1" + b"h\1h\0\x85R" * 50_000 + b"t",
            "encoding of one text": (
                b"(" + text("x" * 4_000_000) + b"q\0" + encode + b"q\1"
                + (b"h\1h\0" + text("latin1") + b"\x86R") * 9_000 + b"t"
            ),
        },
        "holds argparse.Namespace itself": {
            "90,000 records": b"(" + name("argparse", "Namespace") + b"q\0" + b"h\0)\x81" * 90_000 + b"t",
        },
        "as a key; text and numbers": {
            "keys of one hash": b"}(" + b"N".join(number(i * (2**61 - 1)) for i in range(9, 3_000)) + b"Nu",
            "list as a key": b"}]K\1s",
            "tensor as a key": b"}" + tensor() + b"K\1s",
        },
        "holds a whole number of": {
            "number of 4 MB": b"\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000,
            "size of 2,000 bits": tensor((2**2000,)),
        },
        "are left: it is cut off": {
            "number longer than the file": b"\x8b" + struct.pack("<i", 2**31 - 1),
            "number of negative length": b"\x8b" + struct.pack("<i", -1),
            "text longer than the file": b"\x8d" + struct.pack("<Q", 2**62),
            "bytes longer than the file": b"\x8e" + struct.pack("<Q", 2**40),
        },
        "damaged (OverflowError": {"text longer than memory": b"\x8d" + struct.pack("<Q", 2**64 - 1)},
        "damaged (UnicodeDecodeError": {"text that is not UTF-8": b"X\4\0\0\0\xff\xff\xff\xff"},
        "damaged (KeyError": {"memo that is not there": b"]r\xff\xff\xff\xff" + b"h\1"},
        "damaged (IndexError": {
            "call from an empty stack": b"R",
            "mark that is not there": b"t",
            "memo of an empty stack": b"q\0",
            "list to append to that is not there": b"Na",
        },
        "takes more from its stack": {"tuple from an empty stack": b"\x87"},
        "values where one belongs": {"nothing": b"", "two values": b"NN", "open mark": b"N(N"},
        "more than 50000 tensors": {
            "60,000 tensors": (
                b"(" + rebuild + b"q\0" + tuple_of(storage(), b"K\0))") + b"q\1"
                + b"h\0h\1R" * 60_000 + b"t"
            ),
        },
        "more than its storage of 16 bytes": {
            "stride 0": tensor((2**30,), (0,)),
            "stride 0 beside others": tensor((4, 2**20), (1, 0)),
            "offset past the end": tensor((1,), (1,), 4),
            "size past the end": tensor((5,)),
            "stride past the end": tensor((2,), (4,)),
            "size that overflows": tensor((2**32, 2**32), (1, 1)),
            "doubles in a storage of floats": called(
                v3, storage(), b"K\0", tuple_of(b"K\4"), tuple_of(b"K\1"), b"\x89N", double
            ),
        },
        "where a size belongs": {
            "negative size": tensor((-4,), (1,)),
            "negative stride": tensor((4,), (-1,), 3),
            "negative offset": tensor((4,), (1,), -1),
            "size that is true": called(rebuild, storage(), b"K\0", tuple_of(b"\x88"), tuple_of(b"K\1")),
            "storage of negative count": tensor((0,), of=storage(-1)),
            "storage of a huge count": tensor((0,), of=storage(2**900)),
        },
        "damaged (RuntimeError('numel": {
            "empty size that overflows": tensor((2**47,) * 30 + (0,), (2**47,) * 31)
        },
        "dimensions and": {
            "more sizes than strides": tensor((1, 4), (1,)),
            "1,000 dimensions": tensor((1,) * 1000, (1,) * 1000),
        },
        "rebuilds a tensor from": {
            "tensor without a storage": tensor(of=b"N"),
            "tensor on a tensor": tensor(of=tensor()),
            "size that is text": called(rebuild, storage(), b"K\0", text("ab"), text("ab")),
        },
        "with a tuple": {
            "tensor of two arguments": called(rebuild, b"N", b"N"),
            "parameter of no tensor": called(name("torch._utils", "_rebuild_parameter"), b"N", b"N", b"N"),
        },
        "conjugate or negated": {"conjugate tensor": tensor(more=b"}" + text("conj") + b"\x88s")},
        "tensor of type float32": {
            "dtype that is text": called(v3, storage(), b"K\0))\x89N", text("float32")),
        },
        "has no storage|sizes disagree": {
            "storage of another count": tensor((5,), of=storage(5)),
            "storage of 2**47 elements": tensor((2**47,), of=storage(2**47)),
        },
        "has no storage|lists other storages": {
            "storage that is not there": tensor(of=storage(4, key="1")),
            "storage outside": tensor(of=storage(4, key="../data.pkl")),
        },
        "two sizes or types": {
            "storage of two types": tensor() + tensor(of=storage(2, "DoubleStorage")) + b"\x86",
        },
        "has a storage with the name": {"storage with a long name": tensor(of=storage(4, key="0" * 1000))},
        "has a storage of type": {
            "storage of no type": tensor(of=no_type),
            "view of a storage": tensor(of=storage(4, "FloatStorage", "0", tuple_of(text("0"), b"K\0K\1"))),
        },
        "asks for torch.QInt8Storage": {"quantised storage": tensor(of=storage(4, "QInt8Storage"))},
        "sets items of": {"items of a list": b"]K\1K\2s", "items without values": b"}(K\1u"},
        "appends to a dict": {"appended to a dictionary": b"}K\1a"},
        "adds to a list": {"added to a list": b"](K\1\x90"},
        "opcode 0xff": {"unknown opcode": b"\xff"},
        "ends in the middle of a name": {"name without an end": b"cos\nsystem"},
    }  # fmt: skip


def files(canary: Path, port: int) -> dict[str, tuple[bytes, str]]:
    """{what it is: (content, words of the refusal)}."""
    good, old = archive(tensor()), stream(tensor())
    tensors = safetensors.torch.save({"a": torch.ones(4), "b": torch.ones(4)})
    attack = called(name("os", "system"), text(f"touch {canary}"))
    metadata = '{"__metadata__":{"format":"pt"},'
    plain = {
        "empty": (b"", "is empty"),
        "one byte": (b"\x80", "neither"),
        "web page": (b"\n<!DOCTYPE html><html>404</html>", "the link has expired"),
        "web error": (b'\xef\xbb\xbf<?xml version="1.0"?><Error>Authentication', "the link has expired"),
        "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "7z archive; unpack"),
        "gzip": (gzip.compress(good), "gzip"),
        "bzip2": (b"BZh91AY&SY" + bytes(64), "bzip2"),
        "xz": (b"\xfd7zXZ\0" + bytes(64), "xz"),
        "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "zstd"),
        "rar": (b"Rar!\x1a\7" + bytes(64), "rar archive"),
        "tar": (tarred(), "tar archive"),
        "HDF5": (b"\x89HDF\r\n" + bytes(64), "HDF5"),
        "NumPy array": (b"\x93NUMPY" + bytes(64), "NumPy array"),
        "JSON": (b'{"weight_map": {}}', "JSON"),
        "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "noise": (random.Random(0).randbytes(4096), "neither"),
        "zeros": (bytes(4096), "neither"),
        "plain pickle": (pickle.dumps({"w": [1.0]}, 2), "not one of PyTorch's"),
        "plain pickle attack": (program(attack), "os.system"),
        # zip
        "zip of weights": (zipped(**{"weights.pth": good}), "'weights.pth', not one saved"),
        "zip of a zip": (zipped(**{"inner.zip": zipped(**{"weights.pth": good})}), "inner.zip"),
        "zip of nothing": (zipped(), "zip archive of nothing"),
        "zip in a folder more": (rewritten(good, rename=lambda n: "x/" + n), "not one saved by PyTorch"),
        "two programs": (
            rewritten(archive(tensor(), b=b""), rename=lambda n: "b/data.pkl" if n.endswith("/b") else n),
            "not one saved by PyTorch",
        ),
        "TorchScript": (archive(tensor(), **{"constants.pkl": b"", "code/a.py": b""}), "TorchScript"),
        "big-endian zip": (archive(tensor(), byteorder=b"big"), "big-endian"),
        "deflated archive": (rewritten(good, zipfile.ZIP_DEFLATED), "packed part"),
        "zip bomb": (compressed(tensor((12_500_000,), of=storage(12_500_000))), "packed part"),
        "bzip2 bomb": (compressed(tensor(), zipfile.ZIP_BZIP2), "packed part"),
        "overlapping members": (overlapping(), "lie on each other"),
        "member said to be longer": (
            patched(patched(good, "archive/data/0", 20, "<L", 9999), "archive/data/0", 24, "<L", 9999),
            "longer than the file",
        ),
        "member of a size kept nowhere": (patched(good, "archive/data/0", 24, "<L", 2**32 - 1), "longer"),
        "member said to be smaller unpacked": (patched(good, "archive/data/0", 24, "<L", 8), "longer than"),
        "member of an unknown method": (patched(good, "archive/data/0", 10, "<H", 99), "packed part"),
        "encrypted member": (patched(good, "archive/data/0", 8, "<H", 1), "encrypted"),
        "member elsewhere": (patched(good, "archive/data/0", 42, "<L", 0), "not where it should be"),
        "member past the end": (patched(good, "archive/data/0", 42, "<L", 2**31), "damaged"),
        "name longer than the file": (patched(good, "archive/data/0", 28, "<H", 0xFFFF), "damaged"),
        "member twice": (
            patched_name(archive(tensor(), {"0": bytes(16), "1": attack}), b"data/1", b"data/0"),
            "double entry",
        ),
        "wrong checksum": (patched(good, "archive/data.pkl", 16, "<L", 1), "checksum"),
        "changed program": (good.replace(b"OrderedDict", b"OrderedDicu"), "checksum"),
        "program over the limit": (
            archive(b"0" * unpickle.MAX_INDEX_BYTES), f"{unpickle.MAX_INDEX_BYTES} are read at most"
        ),
        "member above its folder": (unzipped_into("../../tmp/evil"), "outside its folder"),
        "absolute member": (unzipped_into("/etc/passwd"), "outside its folder"),
        "member with backslashes": (unzipped_into("archive\\..\\evil"), "outside its folder"),
        "65,535 members": (ending(good, 10, "<H", 0xFFFF), "65535 members"),
        "more members than bytes": (ending(good, 10, "<H", 0x7FFF), "directory"),
        "fewer members than there are": (ending(good, 10, "<H", 1), "lie on each other"),
        "directory of 4 GB": (ending(good, 12, "<L", 0xFFFFFFFE), "members"),
        "directory elsewhere": (ending(good, 16, "<L", 0), "directory"),
        "comment longer than the file": (ending(good, 20, "<H", 9), "directory"),
        "64-bit record at 2**64": (
            good[:-22] + b"PK\6\7" + struct.pack("<LQL", 0, 2**64 - 1, 1) + good[-22:], "damaged"
        ),
        "64-bit record of 2**60 members": (
            good[:-22] + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, 2**62, 0)
            + b"PK\6\7" + struct.pack("<LQL", 0, len(good) - 22, 1) + good[-22:],
            "members",
        ),
        "data before the archive": (b"PK\3\4" + good, "directory"),
        "data after the archive": (good + b"x", "directory"),
        "one tensor 1,000 times": (
            archive(
                b"(" + tensor((1024,), of=storage(1024)) + b"q\0" + b"h\0" * 1000 + b"t", {"0": bytes(4096)}
            ),
            "repeats what it holds",
        ),
        # stream
        "big-endian stream": (
            stream(tensor(), system=pickle.dumps({"little_endian": False}, 2)), "big-endian"
        ),
        "stream of no system": (stream(tensor(), system=pickle.dumps([], 2)), "big-endian"),
        "stream of another version": (NUMBER + pickle.dumps(1, 2), "PyTorch's"),
        "attack before the magic number": (program(attack) + old, "os.system"),
        "attack for the version": (NUMBER + program(attack), "os.system"),
        "attack in the system": (stream(tensor(), system=program(attack)), "os.system"),
        "attack in the keys": (MAGIC + LITTLE + program(tensor()) + program(attack), "os.system"),
        "keys that are no text": (stream(tensor(), keys=[0]), "list of its storages"),
        "keys deep in tuples": (
            MAGIC + LITTLE + program(tensor()) + program(b"])" + b"\x85" * 200_000 + b"a"),
            "list of its storages",
        ),
        "key too few": (stream(tensor(), keys=[]), "lists other storages"),
        "key too many": (stream(tensor(), keys=["0", "1"]), "lists other storages"),
        "key twice": (stream(tensor(), keys=["0", "0"]), "lists other storages"),
        "count that disagrees": (stream(tensor(), raw=struct.pack("<q", 3) + bytes(16)), "sizes disagree"),
        "negative count": (stream(tensor(), raw=struct.pack("<q", -4) + bytes(16)), "sizes disagree"),
        "storage longer than the stream": (
            stream(tensor((2**40,), of=storage(2**40)), raw=struct.pack("<q", 2**40) + bytes(16)), "cut off"
        ),
        # safetensors
        "header longer than the file": (header('{"a"', length=2**40), "header of 1099511627776"),
        "header of the whole address space": (b"\xff" * 8 + b"{", "neither"),
        "header that ends early": (header(metadata, length=10), "damaged"),
        "header of 100,000 levels": (header('{"a":' * 100_000), "recursion"),
        "overlapping tensors": (header(listed(entry("a", 0, 4), entry("b", 0, 4)), b"1234"), "offset"),
        "crossed tensors": (header(listed(entry("a", 0, 4), entry("b", 2, 6)), b"123456"), "offset"),
        "tensor past the end": (header(listed(entry("a", 0, 4000, (1000,))), b"1234"), "damaged"),
        "gap between tensors": (header(listed(entry("a", 0, 4), entry("b", 8, 12)), bytes(12)), "offset"),
        "bytes that no tensor has": (header(listed(entry("a", 0, 4)), bytes(8)), "not fully covered"),
        "tensor that ends before it begins": (header(listed(entry("a", 4, 0)), bytes(4)), "damaged"),
        "offset of 2**64": (header(listed(entry("a", 0, 2**64)), bytes(4)), "damaged"),
        "shape that overflows": (header(listed(entry("a", 0, 4, (2**40, 2**40))), bytes(4)), "overflow"),
        "shape that disagrees": (header(listed(entry("a", 0, 4, (2,))), bytes(4)), "damaged"),
        "shape that is negative": (header(listed(entry("a", 0, 4, (-1,))), bytes(4)), "damaged"),
        "shape of 100,000 dimensions": (
            header(listed(entry("a", 0, 4, (1,) * 100_000)), bytes(4)), "100000 dimensions"
        ),
        "dtype that nobody knows": (header(listed(entry("a", 0, 4, dtype="F31")), bytes(4)), "damaged"),
        "tensor that is a list": (header('{"a":[]}'), "damaged"),
        "header that is not text": (struct.pack("<Q", 8) + b"{" + b"\xff" * 7, "damaged"),
        "60,000 tensors": (
            header(listed(*(entry(str(i), 0, 0, (0,)) for i in range(60_000)))), "are read at most"
        ),
    }  # fmt: skip
    for what, content in {"archive": good, "stream": old, "safetensors": tensors}.items():
        for left in (len(content) - 1, len(content) * 2 // 3, len(content) // 3, 20, 9):
            plain[f"{what} cut after {left} bytes"] = (content[:left], "")
    for what, body in attacks(canary, port).items():
        plain[f"zip: {what}"] = (archive(body), "Nothing of it was run")
        plain[f"stream: {what}"] = (stream(body), "Nothing of it was run")
    for words, programs in bombs().items():
        for what, body in programs.items():
            plain[f"zip: {what}"] = (archive(body), words)
            plain[f"stream: {what}"] = (stream(body), words)
    return plain


def patched_name(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 2
    return content.replace(old, new)


READER = """
import json, resource, sys, time
from beit.unpickle import RefusedFile, read_weights

def memory(field):  # VmRSS now, VmHWM at most; elsewhere than on Linux, at most (of the parent too)
    try:
        lines = open("/proc/self/status").read().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

warm_up, paths = json.load(sys.stdin)
for path in warm_up:  # what torch and safetensors import on first use is not the file's doing
    read_weights(path)
start = memory("VmRSS")
seen = []
allowed = {"open", "mmap.__new__", "object.__getattr__", "object.__setattr__", "sys._getframe"}
def watch(event, arguments):
    if event not in allowed or (event == "open" and (arguments[1] or "r") not in ("r", "rb")):
        seen.append(event)
sys.addaudithook(watch)
results = {}
for path in paths:
    began = time.perf_counter()
    try:
        value = read_weights(path)
        result = ["no error", type(value).__name__, 0]
    except RefusedFile as error:
        result = ["RefusedFile", str(error), error.exit_code]
    except BaseException as error:
        result = [type(error).__name__, str(error), 0]
    results[path] = [*result, time.perf_counter() - began, memory("VmHWM") - start]
print(json.dumps([results, seen]))
"""


def run_reader(
    warm_up: list[Path], paths: list[Path], cwd: Path
) -> tuple[dict[str, list[Any]], list[str]]:
    """Read files one after the other in a process of their own, watched by an audit hook."""
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([[str(path) for path in warm_up], [str(path) for path in paths]]),
        env=ENVIRONMENT,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results, seen = json.loads(done.stdout)
    return results, seen


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every hostile file, read once in one process."""
    folder = tmp_path_factory.mktemp("hostile")
    canary = folder / "canary"
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    wanted: dict[Path, str] = {}
    (folder / "files").mkdir()
    for number, (what, (content, words)) in enumerate(files(canary, listener.getsockname()[1]).items()):
        path = folder / "files" / f"{number:03d} {''.join(c if c.isalnum() else '_' for c in what)}.pth"
        path.write_bytes(content)
        wanted[path] = words
    odd = {
        "folder": "is a folder",
        "fifo": "a device or a pipe",
        "loop": "does not exist",
        "gone": "does not exist",
    }
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop2")
    (folder / "loop2").symlink_to(folder / "loop")
    (folder / "page.html").write_text("<html>")
    (folder / "link").symlink_to(folder / "page.html")
    wanted |= {folder / what: words for what, words in odd.items()}
    wanted |= {Path("/dev/zero"): "a device or a pipe", folder / "link": "the link has expired"}
    warm_up = []
    for what, content in {
        "zip": saved({"w": torch.ones(2)}),
        "stream": saved({"w": torch.ones(2)}, "stream"),
        "safetensors": safetensors.torch.save({"w": torch.ones(2)}),
    }.items():
        (folder / f"good {what}").write_bytes(content)
        warm_up.append(folder / f"good {what}")
    results, seen = run_reader(warm_up, list(wanted), folder)
    try:
        listener.accept()
        called = True
    except BlockingIOError:
        called = False
    listener.close()
    return {"results": results, "seen": seen, "wanted": wanted, "canary": canary, "called": called}


def test_every_hostile_file_is_refused_with_its_name_a_reason_and_exit_code_5(
    hostile: dict[str, Any],
) -> None:
    assert len(hostile["wanted"]) > 300
    wrong = []
    for path, words in hostile["wanted"].items():
        kind, message, exit_code, *_ = hostile["results"][str(path)]
        refused = kind == "RefusedFile" and exit_code == 5 and message.startswith(f"{path}: ")
        if (
            not refused
            or not any(part in message for part in words.split("|"))
            or len(message) > 1000 + len(str(path))
        ):
            wrong.append((path.name, kind, message[:300], words))
    assert not wrong


def test_no_hostile_file_runs_code(hostile: dict[str, Any]) -> None:
    assert not hostile["canary"].exists()
    assert not hostile["called"]
    assert not hostile["seen"], "audit events other than reading the file"


def test_no_hostile_file_takes_200_mb(hostile: dict[str, Any]) -> None:
    growth = {Path(path).name: result[4] for path, result in hostile["results"].items()}
    assert max(growth.values()) < 200e6, next(what for what, size in growth.items() if size >= 200e6)


def test_a_refusal_names_what_was_asked_for(hostile: dict[str, Any]) -> None:
    messages = {Path(path).name[4:]: result[1] for path, result in hostile["results"].items()}
    asked = {
        "os_system": "asks for os.system, which is not on the list",
        "name_on_the_stack": "asks for os.system,",
        "dotted_name": "asks for torch.serialization.os.system,",
        "INST": "the pickle opcode INST",
        "EXT1": "the pickle opcode EXT1",
        "NEWOBJ_EX": "the pickle opcode NEWOBJ_EX",
        "a_module_that_is_not_there": "asks for beit_hostile_module.anything,",
        "stride_0": "more than its storage of 16 bytes",
    }
    for what, words in asked.items():
        for form in ("zip", "stream"):
            assert words in messages[f"{form}__{what}.pth"]


def test_the_attacks_would_work_on_a_general_unpickler(tmp_path: Path) -> None:
    for what in ("os.system", "builtins.eval", "name on the stack", "INST", "subprocess.check_output"):
        canary = tmp_path / "canary"
        body = attacks(canary, 1)[what].replace(b"subprocess\ncheck_output", b"os\nsystem")
        subprocess.run(
            [sys.executable, "-c", f"import pickle; pickle.loads({program(body)!r})"], check=True
        )
        assert canary.exists()
        canary.unlink()


def test_the_watch_sees_what_a_general_unpickler_does(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(OrderedDict(), 2))
    blind = READER.replace("value = read_weights(path)", "import pickle; pickle.load(open(path, 'rb'))")
    done = subprocess.run(
        [sys.executable, "-c", blind], input=json.dumps([[], [str(tmp_path / "w.pth")]]), env=ENVIRONMENT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "pickle.find_class" in json.loads(done.stdout)[1]


def test_the_programs_of_these_tests_are_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    for content in (archive(tensor()), stream(tensor())):
        assert read(tmp_path, content).tolist() == [0, 0, 0, 0]


def test_nothing_that_the_list_allows_is_a_function() -> None:
    for allowed in unpickle.GLOBALS.values():
        assert isinstance(allowed, (unpickle._Global, torch.dtype))


def test_importing_the_reader_brings_no_general_loader_into_reach() -> None:
    source = Path(unpickle.__file__).read_text()
    for word in (
        "Unpickler",
        "pickle.load",
        "torch.load(",
        "import_module",
        "__import__",
        "eval(",
        "exec(",
    ):
        assert word not in source


# --- mutations --------------------------------------------------------------------------------------


def seeds() -> dict[str, bytes]:
    """One file a form, with one of everything that is allowed."""
    shared = torch.arange(6.0)
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.Identity())
    for parameter in module.parameters():
        parameter.data.fill_(0.5)
    value = {
        "a": shared,
        "b": shared.view(2, 3).t(),
        "p": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "u": torch.ones(3, dtype=torch.uint16),
        "args": argparse.Namespace(lr=0.1, names={"x"}, path=Path("a/b"), device=torch.device("cpu")),
        "n": [np.float32(1), 2**70, b"\xff", None, True, torch.Size([1]), torch.bfloat16],
        "m": module,
    }
    named = {"a": shared, "b": torch.ones(2, 2, dtype=torch.bfloat16), "e": torch.empty(0, 3)}
    return {
        "zip": saved(value),
        "stream": saved(value, "stream"),
        "protocol 4": saved(value, pickle_protocol=4),
        "safetensors": safetensors.torch.save(named, metadata={"format": "pt"}),
    }


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, opcodes, numbers of 4 and 8 bytes, parts cut, doubled, moved."""
    new = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(new))
        to = min(len(new), at + rng.randint(1, 40))
        kind = rng.randrange(8)
        if kind == 0:
            new[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            new[at] = rng.choice(b"\0\1\x7f\x80\xff().0NRQbcehjlqrstu]}\x81\x85\x86\x87\x8a\x8b\x93")
        elif kind == 2:
            number = rng.choice(
                [0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, rng.getrandbits(64)]
            )
            width = rng.choice([1, 2, 4, 8])
            new[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif kind == 3 and len(new) > 60:
            del new[at:to]
        elif kind == 4:
            new[at:at] = new[at:to]
        elif kind == 5:
            start = rng.randrange(len(new))
            new[start : start + to - at] = new[at:to]
        elif kind == 6:
            new[at:at] = rng.randbytes(rng.randint(1, 8))
        elif rng.random() < 0.1 and at > 60:
            del new[at:]
        else:  # a digit, for the numbers in JSON
            digits = [place for place, byte in enumerate(new) if chr(byte).isdigit()]
            new[rng.choice(digits or [at])] = ord(rng.choice('0123456789-eE. [{"'))
    return bytes(new)


def mutant(form: str, content: bytes, rng: random.Random) -> bytes:
    """A mutated file; in archives mostly the program, with its checksum put right."""
    if form == "safetensors":
        end = 8 + struct.unpack_from("<Q", content)[0]
        return mutated(content[:end], rng) + content[end:]
    if form == "stream" or rng.random() < 0.2:
        return mutated(content, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            raw = old.read(member)
            new.writestr(member, mutated(raw, rng) if member.endswith("data.pkl") else raw)
    return buffer.getvalue()


def touch(value: Any) -> int:
    """Read every byte of every tensor and walk every container. Returns how many tensors there are."""
    if isinstance(value, Tensor):
        copy.deepcopy(value)
        assert len(bits(value)) == value.numel() * value.element_size()
        return 1
    if isinstance(value, Inert):
        return touch(value.state)
    if isinstance(value, dict):
        return touch(list(value)) + touch(list(value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return sum(map(touch, value))
    assert value is None or isinstance(value, (str, bytes, int, float, torch.dtype))
    return 0


@pytest.mark.parametrize("form", seeds())
def test_a_mutated_file_is_refused_or_can_be_read_through(tmp_path: Path, form: str) -> None:
    """BEIT_FUZZ=100000 asks for so many mutations instead of 3,000."""
    count = int(os.environ.get("BEIT_FUZZ", "3000")) // len(seeds())
    rng = random.Random(form)
    content = seeds()[form]
    path = tmp_path / "mutant"
    path.write_bytes(content)
    assert touch(read_weights(path)) >= 3
    loaded = 0
    for turn in range(count):
        path.unlink()  # a mapped file must not change
        path.write_bytes(mutant(form, content, rng))
        try:
            touch(read_weights(path))
            loaded += 1
        except RefusedFile:
            pass
        except BaseException as error:
            keep = Path(os.environ.get("BEIT_FUZZ_KEEP", tmp_path)) / f"{form} {turn}"
            keep.write_bytes(path.read_bytes())
            raise AssertionError(f"{keep}: {error!r}") from error
    assert 0 < loaded < count
    print(f"{form}: {count} mutations, {loaded} loaded")
