"""Graph files that other runtimes run: what each says of itself, and a way to run it.

    .xml with its .bin   OpenVINO     .onnx   ONNX Runtime     .pt2   torch.export

A graph carries how its pictures were prepared, its class names and what it computes, as one JSON text in
the place that its format has for such; without it a file is refused. No torch here, but for .pt2.

Shapes: B batch, any; H, W as the file says: one size, or any up to its `max_size`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from beit.atomic import not_there
from beit.image import ImageSpec

Kind = Literal["classification", "features", "masked"]
EmbedPooling = Literal["mean", "cls", "tokens"]
RUNTIME_OF = {".xml": "openvino", ".onnx": "onnx", ".pt2": "torch"}
SUFFIX_OF = {runtime: suffix for suffix, runtime in RUNTIME_OF.items()}
# runtime: the extra that installs it, and the module that shows that it is there.
EXTRAS = {"openvino": ("openvino", "openvino"), "onnx": ("onnx", "onnxruntime")}
KEY = "beit"  # of the JSON text in the file
MOST_TOLD = 32_000_000  # bytes of it; 22,000 names of classes are under one million
TRUST = "BEIT_TRUST_PT2"  # in the environment


class GraphError(ValueError):
    """A graph file that cannot be read, or does not hold what was asked of it."""

    exit_code = 5


@dataclass(frozen=True)
class Output:
    """What of a model is computed; pooling and layer of features, as in `features.embed`."""

    kind: Kind = "classification"
    pooling: EmbedPooling = "mean"
    layer: int | None = None

    def check(self, depth: int) -> None:
        """Raise a ValueError for what no model of so many blocks has."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if self.pooling not in get_args(EmbedPooling):
            allowed = ", ".join(get_args(EmbedPooling))
            raise ValueError(f"pooling {self.pooling!r} is not one of {allowed}")
        if self.layer is not None and not -depth - 1 <= self.layer <= depth:
            raise ValueError(f"layer {self.layer} does not exist; this model has layers 0 to {depth}")

    def in_words(self) -> str:
        """For people."""
        if self.kind != "features":
            return self.kind
        layer = "the last layer" if self.layer is None else f"layer {self.layer}"
        return f"features ({self.pooling}, {layer})"

    def as_flags(self) -> str:
        """As `beit export` takes it."""
        flags = f"--kind {self.kind}"
        if self.kind == "features":
            flags += f" --pooling {self.pooling}"
            flags += "" if self.layer is None else f" --layer {self.layer}"
        return flags


@dataclass(frozen=True)
class About:
    """What a graph file says of itself."""

    kind: Kind
    pooling: EmbedPooling
    layer: int | None
    precision: str  # fp32 or int8: the numbers in the file
    labels: tuple[str, ...]
    image_spec: ImageSpec
    config: dict[str, Any]  # of the model it was made from
    model_sha256: str
    made_by: str
    max_size: int | None = None  # pixels of the longest side, where any size of whole patches will do

    def check(self, size: tuple[int, ...]) -> None:
        """Raise a GraphError for a size (H, W) of prepared pictures that the graph cannot take."""
        patch = int(self.config["patch_size"])
        if self.max_size is None:
            fits, allowed = size == self.image_spec.size, "{} x {}".format(*self.image_spec.size)
        else:
            fits = all(2 * patch <= side <= self.max_size and side % patch == 0 for side in size)
            allowed = f"any multiple of {patch} from {2 * patch} to {self.max_size} a side"
        if not fits:
            raise GraphError(f"the graph takes pictures of {allowed}, not {' x '.join(map(str, size))}")

    @property
    def output(self) -> Output:
        """What of the model it computes."""
        return Output(self.kind, self.pooling, self.layer)

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of_json(cls, text: str, file: Path) -> About:
        """Read what `to_json` wrote. Raises GraphError."""
        try:
            content = json.loads(text)
            spec: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in content["image_spec"].items()
            }
            return cls(
                **{**content, "labels": tuple(content["labels"]), "image_spec": ImageSpec(**spec)}
            )
        except (TypeError, KeyError, ValueError) as error:
            raise GraphError(f"{file}: what it says of itself cannot be read ({error})") from None


class Graph(Protocol):
    """A graph, ready to run. One call at a time."""

    about: About

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """Prepared pictures (B, 3, H, W) float32, and for `masked` (B, L) bool, -> float32."""


def is_graph(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a graph file."""
    return Path(path).suffix in RUNTIME_OF and not os.path.isdir(path)


def open_graph(
    file: Path, precision: str = "fp32", threads: int | None = None, *, trusted: bool = False
) -> Graph:
    """Open a graph file. Raises GraphError for a wrong file, ValueError for a missing extra.

    precision: fp32, or bf16 for what the file does not hold as int8; OpenVINO alone can choose.
    trusted: run a .pt2 whose writer is known, see `open_program`.
    """
    if not file.is_file():
        raise GraphError(not_there(file))
    runtime = RUNTIME_OF[file.suffix]
    require(runtime)
    if runtime == "torch":
        return TorchGraph(file, precision, threads, trusted)
    kinds: dict[str, Callable[[Path, str, int | None], Graph]]
    kinds = {"openvino": OpenVinoGraph, "onnx": OnnxGraph}
    return kinds[runtime](file, precision, threads)


def about_of(file: Path) -> About:
    """What a graph file says of itself; of a .pt2 without running it. Raises as `open_graph`."""
    if file.suffix != ".pt2" or not file.is_file():
        return open_graph(file).about
    try:
        with zipfile.ZipFile(file) as archive:
            told = (m for m in archive.infolist() if m.filename.endswith(f"/extra/{KEY}.json"))
            member = next((m for m in told if m.file_size <= MOST_TOLD), None)
            text = archive.read(member) if member else b""
    except Exception as error:  # of a damaged archive it raises what zip and zlib raise
        raise GraphError(f"{file} is no torch.export file ({_last_line(error)})") from None
    if not text:
        raise GraphError(_foreign(file))
    return About.of_json(text.decode(errors="replace"), file)


def open_program(file: Path, held: dict[str, str] | None = None, trusted: bool = False) -> Any:
    """The program in a .pt2, as torch.export.load gives it. It can run whatever its writer put there, from
    the moment it is opened: it has pickles, and formulas that are evaluated. So it is opened where $TRUST
    says 1, or where it was written a moment ago. Raises GraphError."""
    import torch

    if not file.is_file():
        raise GraphError(not_there(file))
    if not trusted and os.environ.get(TRUST) != "1":
        raise GraphError(
            f"{file}: a .pt2 is a program, which runs whatever its writer put there when it is opened. "
            f"Where you trust that, set {TRUST}=1; a model's folder, an .xml or an .onnx runs nothing"
        )
    try:
        return torch.export.load(file, extra_files=held)
    except Exception as error:  # it raises what its pickles and archives raise
        raise GraphError(f"{file} is no torch.export file ({_last_line(error)})") from None


def installed(runtime: str) -> bool:
    """Whether a runtime can be imported."""
    from importlib.util import find_spec

    return runtime == "torch" or find_spec(EXTRAS[runtime][1]) is not None


def require(runtime: str) -> None:
    """Raise a ValueError with the install line where a runtime is missing."""
    if not installed(runtime):
        extra, module = EXTRAS[runtime]
        raise ValueError(f'runtime {runtime} needs {module}: pip install "beit[{extra}]"')


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions for bf16, so that it is faster than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return " avx512_bf16" in flags or " amx_bf16" in flags


def import_openvino() -> Any:
    """The `openvino` module, unable to report on its users.

    OpenVINO's converter and NNCF send what they are used for to their makers, from forked processes, where
    the package openvino_telemetry can be imported. Here it cannot.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


class _SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give this thread back the stack it handles signals on, which OpenVINO's processor plugin replaces.

    Each plugin brings a stack and, when it goes, puts back the one before, which went with its own plugin
    if that was the first to go. Then the next signal, a Ctrl-C, is a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


class OpenVinoGraph:
    """An .xml by OpenVINO on the processor."""

    def __init__(self, file: Path, precision: str, threads: int | None) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        try:
            model = core.read_model(file)
        except RuntimeError as error:
            raise GraphError(f"{file} is no OpenVINO graph ({_last_line(error)})") from None
        if not model.has_rt_info(KEY):
            raise GraphError(_foreign(file))
        self.about = About.of_json(model.get_rt_info(KEY).astype(str), file)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",  # one picture by all threads: batches come from the engine
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        with signal_stack_kept():
            self._compiled = core.compile_model(model, "CPU", settings)

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        self.about.check(inputs[0].shape[2:])
        return np.array(self._compiled(list(inputs), share_inputs=True)[0])


class OnnxGraph:
    """An .onnx by ONNX Runtime on the processor."""

    def __init__(self, file: Path, precision: str, threads: int | None) -> None:
        import onnxruntime

        if precision == "bf16":
            raise ValueError(f"{file}: ONNX Runtime has no bf16 on a processor; use --precision fp32")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # its warnings are about its own choices
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class
            raise GraphError(f"{file} is no ONNX graph ({_last_line(error)})") from None
        about = self._session.get_modelmeta().custom_metadata_map
        if KEY not in about:
            raise GraphError(_foreign(file))
        self.about = About.of_json(about[KEY], file)
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        self.about.check(inputs[0].shape[2:])
        (output,) = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return np.asarray(output)


class TorchGraph:
    """A .pt2 by torch, on the processor."""

    def __init__(self, file: Path, precision: str, threads: int | None, trusted: bool) -> None:
        import torch

        if precision == "bf16":
            raise ValueError(
                f"{file} computes in fp32; for bf16 give the model itself, or --precision fp32"
            )
        held = {f"{KEY}.json": ""}
        program = open_program(file, held, trusted)
        if not held[f"{KEY}.json"]:
            raise GraphError(_foreign(file))
        self.about = About.of_json(held[f"{KEY}.json"], file)
        self._module = program.module()
        if threads is not None:
            torch.set_num_threads(threads)

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        import torch

        self.about.check(inputs[0].shape[2:])
        with torch.no_grad():
            return self._module(*map(torch.from_numpy, inputs)).numpy()


def cosines(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(B,) of two outputs (B, ...), picture by picture."""
    a, b = ours.reshape(len(ours), -1), exact.reshape(len(exact), -1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(lengths, 1e-12)


def milliseconds(
    runs: Mapping[str, Callable[[np.ndarray], np.ndarray]], images: np.ndarray
) -> dict[str, list[float]]:
    """How long each takes, three times; in turn, so that what else the machine does meets all of them."""
    ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(4):
        for name, run in runs.items():
            began = time.perf_counter()
            run(images)
            ms[name].append(1000 * (time.perf_counter() - began))
    return {name: times[1:] for name, times in ms.items()}  # the first takes memory


def _foreign(file: Path) -> str:
    return (
        f"{file} does not say how its pictures are prepared, so it was not written by beit; "
        f"write it anew: beit export MODEL --to {RUNTIME_OF[file.suffix]}"
    )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
