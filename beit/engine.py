"""The inference engine: load a model once, prepare pictures ahead, answer in batches.

A picture that cannot be read is an answer with an error, never the end of the batch. Preparation is
`image.preprocess` with the spec that came with the weights, by threads, while the model works on the
batch before. One engine serves any number of threads: the model works for one of them at a time, with
all its own threads.

torch, OpenVINO or ONNX Runtime computes. A runtime other than torch gets a graph that `export` found equal
to the model, kept in the cache folder; torch is imported only where it is needed, so a graph file, and a
model whose graph is kept, are opened without it.

Shapes: B batch, D width, C classes, N = 1 + L tokens.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from beit.atomic import write_atomically
from beit.data import Bad, ImageSource, names_on_stdin
from beit.graph_cache import (
    digest,
    forget_old_graphs,
    graph_folder,
    keep_choice,
    kept_choice,
    key_of,
    making,
    versions,
)
from beit.graphs import (
    RUNTIME_OF,
    SUFFIX_OF,
    About,
    EmbedPooling,
    Graph,
    GraphError,
    Output,
    cosines,
    installed,
    is_graph,
    milliseconds,
    multiplies_bf16,
    open_graph,
    require,
)
from beit.hub import resolve
from beit.image import BadImage, ImageSpec, Source, open_image, preprocess, resized_spec
from beit.workers import available_processors, make_ahead

if TYPE_CHECKING:
    import torch

    from beit.model import Beit

Runtime = Literal["auto", "torch", "openvino", "onnx"]
Precision = Literal["auto", "fp32", "bf16", "int8"]

TIE = {"fp32": 1e-3, "bf16": 0.05}  # classes this near, in deviations of the logits, may change places
MOST_GRAPHS = 3  # held open at once
LEAST_COSINE = {"fp32": 0.9999, "bf16": 0.999}  # of logits or features, to torch's in fp32


@dataclass(frozen=True)
class Entry:
    """Picture `index` of a source, read when its turn comes."""

    source: ImageSource
    index: int


Picture = Source | Entry
Pictures = Iterable[Picture] | Picture | ImageSource  # many or one


def each_picture(places: Iterable[ImageSource | str]) -> Iterator[Picture]:
    """The pictures of `data.find_pictures`, one after the other; those of a list on stdin as they come."""
    for place in places:
        if isinstance(place, ImageSource):
            yield from (Entry(place, index) for index in range(len(place)))
        elif place == "-":
            yield from names_on_stdin()
        else:
            yield place


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture; `label` is None where `error` says why there is none."""

    path: str
    label: str | None
    score: float | None  # probability of `label`; where pictures show several classes, each has its own
    top: tuple[tuple[str, float], ...]  # the best classes, most likely first
    error: str | None = None
    # The model's: its batch's, divided by pictures.
    ms: float | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The features of one picture; `vector` is None where `error` says why there are none."""

    path: str
    vector: np.ndarray | None  # float32 (D,), or (N, D) for tokens
    error: str | None = None
    ms: float | None = None  # the model's: its batch's, divided by pictures

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        vector = None if self.vector is None else self.vector.tolist()
        return {"path": self.path, "vector": vector, "error": self.error, "ms": self.ms}


class _Answered(NamedTuple):
    name: str
    row: np.ndarray | BadImage
    ms: float | None


class Engine:
    """A model, ready to answer, from any number of threads.

    model: a folder, file or name, a loaded model, or a graph file that `beit export` wrote. What the
        engine loads itself it makes ready for the processor, which is faster. Of a loaded model only mode
        (evaluation), dtype (float32) and device change; what you change in it later torch sees, while a
        graph is of what it was.
    runtime: "torch", "openvino", "onnx", or "auto": the fastest that is installed and agrees, measured
        once for a model on a machine; `why` says what was found.
    precision: "fp32", "bf16", or "auto", bf16 where the processor multiplies it in hardware. With torch
        and fp32 the answer does not depend on the processor but for rounding. "int8" is for graph files.
    threads: of the model; the runtime's choice where None. torch's are those of the whole process.
    device: "cpu", "cuda", ... of torch; the other runtimes work on the processor.
    batch_size: pictures that the model sees at once. As many are prepared ahead.
    workers: threads that read and prepare pictures; one a processor, up to 8, where None.
    compile: torch alone: compile each block, for many pictures on a GPU; the first batch then takes long.
    img_size: pixels a side of what the model sees, where it is not the model's own: tables and positions
        are resized. Of graph files only those of any size take it.
    """

    runtime: str
    precision: str
    why: str

    def __init__(
        self,
        model: Beit | str | Path,
        runtime: Runtime = "auto",
        precision: Precision = "auto",
        threads: int | None = None,
        *,
        device: str = "auto",
        batch_size: int = 16,
        workers: int | None = None,
        compile: bool = False,
        img_size: int | None = None,
    ) -> None:
        counts = {"batch_size": batch_size, "threads": threads, "workers": workers, "img_size": img_size}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not 1 or more")
        for name, given, known in (
            ("runtime", runtime, get_args(Runtime)),
            ("precision", precision, get_args(Precision)),
        ):
            if given not in known:
                raise ValueError(f"{name} {given!r} is not one of {', '.join(known)}")
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        self.batch_size, self.threads, self._img_size = batch_size, threads, img_size
        self._turn = threading.Lock()  # one batch at a time: it takes all threads of the model
        self._readers = ThreadPoolExecutor(workers or min(8, available_processors()))
        self._graphs: dict[Output, Graph] = {}
        self._model: Beit | None = None
        self._about: About | None = None
        self._path: Path | None = None
        self._is_file = False  # a graph file, which has no weights to make another graph of
        self._key = ""
        if isinstance(model, (str, Path)) and is_graph(model):
            self._open_file(Path(model), runtime, precision)
            return
        if precision == "int8":
            raise ValueError(
                "int8 is calibrated on pictures: beit export MODEL --to openvino --precision int8 "
                "--pictures PLACE; then give that file as the model"
            )
        if isinstance(model, (str, Path)):
            self._path = resolve(str(model))
        elif img_size is None:
            self._model = model
        else:
            raise ValueError("img_size is for a model that is yet to load; load_model takes it too")
        self._device, self._compile = device, compile
        self._choose(runtime, precision)

    # --- What computes ---

    def _open_file(self, file: Path, runtime: Runtime, precision: Precision) -> None:
        if runtime not in ("auto", RUNTIME_OF[file.suffix]):
            raise ValueError(f"{file} is for {RUNTIME_OF[file.suffix]}, not {runtime}")
        self.runtime, self._is_file = RUNTIME_OF[file.suffix], True
        rest = "bf16" if self.runtime == "openvino" and multiplies_bf16() else "fp32"
        rest = precision if precision in ("fp32", "bf16") else rest
        graph = open_graph(file, rest, self.threads)
        self._about = graph.about
        if self._img_size is not None:
            size = self._img_size, self._img_size
            self._about.check(size)
            self._about = replace(self._about, image_spec=resized_spec(self._about.image_spec, size))
        if precision == "int8" and graph.about.precision != "int8":
            raise ValueError(f"{file} holds fp32; write it anew: beit export MODEL --precision int8")
        self.precision = "int8" if graph.about.precision == "int8" else rest
        self.why = f"{file} is a graph for {self.runtime}"
        self._graphs[graph.about.output] = graph

    def _choose(self, runtime: Runtime, precision: Precision) -> None:
        """Settle runtime and precision, and load what they need."""
        if runtime in ("openvino", "onnx"):
            require(runtime)
            self.runtime, self.why = runtime, "as asked for"
            best = "bf16" if multiplies_bf16() and runtime == "openvino" else "fp32"
            self.precision = best if precision == "auto" else precision
            if runtime == "onnx" and precision == "bf16":
                raise ValueError("ONNX Runtime has no bf16 on a processor; use --precision fp32")
            if self._device not in ("auto", "cpu"):
                raise ValueError(f"{runtime} works on the processor here, not on {self._device}")
            self._about = self._graph(self._main_output()).about
            return
        others = [name for name in ("openvino", "onnx") if installed(name)]
        if (
            runtime == "auto"
            and others
            and self._device in ("auto", "cpu")
            and not _has_gpu(self._device)
        ):
            try:
                choice = kept_choice(self._model_key(), self.threads, precision) or self._measure(
                    precision, others
                )
                self.runtime, self.precision = choice["runtime"], choice["precision"]
                self.why = choice["why"]
                if self.runtime != "torch":
                    self._about = self._graph(self._main_output()).about
                    return
            except OSError as error:
                self._graphs = {}
                self.why = f"other runtimes need the cache folder, and it cannot be written ({error})"
        else:
            self.why = "as asked for" if runtime == "torch" else "the only one installed for this device"
            if runtime == "auto" and not others:
                self.why += '; pip install "beit[openvino]" may be faster on a processor'
        self._use_torch(precision)

    def _use_torch(self, precision: Precision) -> None:
        import torch

        from beit.precision import pick_device, resolve_precision
        from beit.torch_model import TorchModel

        self.runtime, self.device = "torch", pick_device(self._device)
        assert precision != "int8"
        self.precision = resolve_precision(precision, self.device)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        own = self._path is not None
        self._torch = TorchModel(self._loaded(), self.device, self.precision, own, self._compile)

    def _loaded(self) -> Beit:
        """The model in torch, loaded where it was not."""
        if self._model is None:
            from beit.checkpoints import load_model

            assert self._path is not None
            self._model = load_model(self._path, img_size=self._img_size)
        return self._model

    @property
    def model(self) -> Beit:
        """The model in torch, for its shapes, classes and preparation: what the engine loaded itself it has
        changed for speed, and of a graph file there is no more. `beit.load` gives one to work with."""
        if self._model is None and self._is_file:
            import torch

            from beit.model import BeitConfig, BeitForImageClassification

            assert self._about is not None
            with torch.device("meta"):
                self._model = BeitForImageClassification(BeitConfig(**self._about.config))
            self._model.image_spec = self._about.image_spec
            self._model.id2label = dict(enumerate(self._about.labels))
        return self._loaded()

    @property
    def image_spec(self) -> ImageSpec:
        """How pictures are prepared."""
        if self._model is not None:
            return self._model.image_spec
        assert self._about is not None
        return self._about.image_spec

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of the logits."""
        self._check_classifier()
        if self._model is None:
            assert self._about is not None
            return list(self._about.labels)
        names = self._model.id2label
        return [names.get(i, str(i)) for i in range(self._model.config.num_classes)]

    @property
    def depth(self) -> int:
        """The blocks of the model."""
        if self._model is not None:
            return self._model.config.depth
        assert self._about is not None
        return int(self._about.config["depth"])

    def _check_classifier(self) -> None:
        if self.has_classifier:
            return
        from beit.weight_files import CheckpointError

        raise CheckpointError(
            f"{self.name} has no classifier; fine-tune it first: beit finetune DATA -m MODEL -o RUN"
        )

    @property
    def has_classifier(self) -> bool:
        """Whether it can classify; every model but a graph file of something else can embed."""
        if self._about is not None:
            return self._about.kind == "classification"
        from beit.model import BeitForImageClassification

        model = self._loaded()
        return isinstance(model, BeitForImageClassification) and bool(model.config.num_classes)

    # --- Answers ---

    def classify(self, images: Pictures, top: int = 5) -> Iterator[Prediction]:
        """Answers in the order of the pictures; any number fits in memory.

        images: paths, files' bytes, Pillow images, uint8 (H, W, 3) arrays, entries of a source, or an
        iterator of them, read as answers are taken; or a single one; or a source.
        """
        if top < 1:
            raise ValueError(f"top {top} is not 1 or more")
        labels = self.labels
        width = min(top, len(labels))
        several = self.several_labels

        def answers() -> Iterator[Prediction]:
            for name, logits, ms in self._answers(images, self.logits_array):
                if isinstance(logits, BadImage):
                    yield Prediction(name, None, None, (), logits.reason)
                    continue
                if not np.isfinite(logits).all():
                    yield Prediction(name, None, None, (), "the model's answer is not finite")
                    continue
                scores = sigmoid(logits) if several else softmax(logits)
                ranked = tuple(
                    (labels[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:width]
                )
                yield Prediction(name, *ranked[0], ranked, ms=ms)

        return answers()

    def embed(
        self, images: Pictures, pooling: EmbedPooling = "mean", layer: int | None = None
    ) -> Iterator[Embedding]:
        """Features in the order of the pictures; pooling and layer as in `features.embed`."""
        self._features(pooling, layer)  # refuses what is none, before it is asked

        def answers() -> Iterator[Embedding]:
            compute = lambda batch: self.features_array(batch, pooling, layer)  # noqa: E731
            for name, row, ms in self._answers(images, compute):
                if isinstance(row, BadImage):
                    yield Embedding(name, None, row.reason)
                else:
                    yield Embedding(name, row, ms=ms)

        return answers()

    @property
    def several_labels(self) -> bool:
        """Whether a picture may have several of the classes, each answered by a sigmoid."""
        config = self._about.config if self._about else vars(self.model.config)
        return bool(config["several_labels"])

    def logits_of(self, source: ImageSource) -> np.ndarray:
        """Logits (n, C) float32 of all pictures of a source. Raises BadImage."""
        rows = []
        for _, row, _ in self._answers(source, self.logits_array):
            if isinstance(row, BadImage):
                raise row
            rows.append(row)
        return np.stack(rows)

    def readable_logits_of(self, source: ImageSource) -> tuple[np.ndarray, list[Bad]]:
        """Logits (n - b, C) float32 of the pictures of a source, without the b that cannot be read."""
        rows, bad = [], []
        for number, (name, row, _) in enumerate(self._answers(source, self.logits_array)):
            if isinstance(row, BadImage):
                bad.append(Bad(number, name, row.code, row.reason))
            else:
                rows.append(row)
        return np.stack(rows) if rows else np.empty((0, len(self.labels)), dtype=np.float32), bad

    def logits(self, images: np.ndarray) -> torch.Tensor:
        """Prepared pictures (B, 3, H, W) float32 -> logits (B, C) float32 on the CPU."""
        import torch

        return torch.from_numpy(self.logits_array(images))

    def logits_array(self, images: np.ndarray) -> np.ndarray:
        """As `logits`, as an array."""
        self._check_classifier()
        return self._compute(Output(), images)

    def usual_array(self, images: np.ndarray) -> np.ndarray:
        """Prepared pictures (B, 3, H, W) float32 -> what a graph file holds; else logits, or features."""
        return self._compute(next(iter(self._graphs)) if self._is_file else self._main_output(), images)

    def features_array(
        self, images: np.ndarray, pooling: EmbedPooling = "mean", layer: int | None = None
    ) -> np.ndarray:
        """Prepared pictures (B, 3, H, W) float32 -> float32 (B, D), or (B, N, D) for tokens."""
        return self._compute(self._features(pooling, layer), images)

    def _features(self, pooling: EmbedPooling, layer: int | None) -> Output:
        """The output of features, its layer counted from the first. Raises ValueError for what is none."""
        Output("features", pooling, layer).check(self.depth)
        if layer is not None and layer < 0:
            layer += self.depth + 1
        return Output("features", pooling, layer)

    def _compute(self, output: Output, images: np.ndarray) -> np.ndarray:
        with self._turn:
            if self.runtime == "torch" and not self._graphs:
                return self._torch(output, images)
            return self._graph(output)(images)

    def _answers(
        self, images: Pictures, compute: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[_Answered]:
        """Each picture's name with its row of what `compute` makes of a batch, or why it has none."""
        prepared = make_ahead(self._readers, self._prepare, each(images), self.batch_size)
        while chunk := list(islice(prepared, self.batch_size)):
            good = [image for _, image in chunk if not isinstance(image, BadImage)]
            began = time.perf_counter()
            rows = iter(compute(np.stack(good)) if good else ())
            ms = 1000 * (time.perf_counter() - began) / max(1, len(good))
            for name, image in chunk:
                bad = isinstance(image, BadImage)
                yield _Answered(name, image if bad else next(rows), None if bad else ms)

    def _prepare(self, picture: Picture) -> tuple[str, np.ndarray | BadImage]:
        name = ""
        if isinstance(picture, Entry):
            name = picture.source.name(picture.index)
        elif isinstance(picture, (str, os.PathLike)):
            name = os.fspath(picture)
        try:
            opened = (
                picture.source.open(picture.index) if isinstance(picture, Entry) else open_image(picture)
            )
            return name, preprocess(opened.read(), self.image_spec)
        except BadImage as error:
            return name, error
        except MemoryError:
            return name, BadImage("memory", name, "there is not enough memory to prepare it")

    # --- Graphs that are kept ---

    def _main_output(self) -> Output:
        """What a graph is made of first."""
        kept = graph_folder() / f"{self._model_key()}.kind"
        if self._model is None and kept.is_file():
            return Output() if kept.read_text() == "classification" else Output("features")
        output = Output() if self.has_classifier else Output("features")
        write_atomically(kept, output.kind.encode())
        return output

    def _model_key(self) -> str:
        """A name for the model and for the versions that its graphs depend on."""
        if not self._key and self._path is not None:
            key = key_of(self._path)
            self._key = key if self._img_size is None else f"{key}-{self._img_size}px"
        elif not self._key:
            from beit.export import hash_of

            self._key = digest(hash_of(self._loaded()) + versions())
        return self._key

    def _graph(self, output: Output) -> Graph:
        """The graph of an output: open, kept on the disk, or made now."""
        if output in self._graphs:
            self._graphs[output] = graph = self._graphs.pop(output)  # the last used
            return graph
        if self._is_file:
            held = next(iter(self._graphs))
            raise GraphError(
                f"{self.name} holds {held.in_words()}, not {output.in_words()}; "
                f"write what is needed: beit export MODEL --to {self.runtime} {output.as_flags()}"
            )
        name = "-".join(map(str, (self._model_key(), *asdict(output).values(), self.precision)))
        file = graph_folder() / f"{name}{SUFFIX_OF[self.runtime]}"
        if not file.is_file():
            self._keep_graph(file, output)
        try:
            graph = open_graph(file, self.precision, self.threads)
        except GraphError:  # what a crash, or a hand, has left of it
            self._keep_graph(file, output)
            graph = open_graph(file, self.precision, self.threads)
        with suppress(OSError):
            os.utime(file)
        while len(self._graphs) >= MOST_GRAPHS:  # whoever asks for all layers holds two of them
            del self._graphs[next(old for old in self._graphs if old.kind == "features")]
        self._graphs[output] = graph
        return graph

    def _keep_graph(self, file: Path, output: Output) -> None:
        """Make a graph in the cache folder, unless another process has made one that opens."""
        from beit.export import export

        assert self.runtime in ("openvino", "onnx")
        with making():
            with suppress(GraphError):
                if file.is_file():
                    open_graph(file, self.precision, self.threads)
                    return
            half = self.precision == "bf16"
            export(self._loaded(), file, self.runtime, output, half_size=half)  # type: ignore[arg-type]
            forget_old_graphs(file)

    # --- Which is fastest ---

    def _measure(self, precision: Precision, others: list[str]) -> dict[str, Any]:
        """Time each runtime that agrees with torch in fp32 on three pictures; keep the answer."""
        import torch

        from beit.export import OutputOf
        from beit.torch_model import TorchModel, is_small

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = self._loaded().float().eval()
        best = "bf16" if multiplies_bf16() else "fp32"
        wanted = best if precision == "auto" else str(precision)
        torch_choice = {"runtime": "torch", "precision": wanted}
        if is_small(model.config):
            return {**torch_choice, "why": "so small a model is not measured, and torch begins at once"}
        output = self._main_output()
        size = model.config.image_height_width
        noise = np.random.default_rng(0).standard_normal((3, model.config.in_chans, *size), np.float32)
        with torch.inference_mode():
            expected = OutputOf(model, output)(torch.from_numpy(noise)).numpy()
        cpu = torch.device("cpu")
        candidates: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        ours = TorchModel(copy.deepcopy(model), cpu, wanted, own=True)
        candidates["torch"] = lambda images: ours(output, images)
        left_out = {}
        for name in others:
            if name == "onnx" and wanted == "bf16":
                continue  # it has no bf16 here, and fp32 cannot win
            self.runtime, self.precision, self._graphs = name, wanted, {}  # each its own graph
            try:
                graph = self._graph(output)
            except (GraphError, RuntimeError, OSError) as error:
                left_out[name] = str(error)
                continue
            agrees, cosine = agree(graph(noise), expected, wanted, output)
            if agrees:
                candidates[name] = graph
            else:
                left_out[name] = f"does not agree with torch (cosine {cosine:.5f})"
        ms = {name: min(times) for name, times in milliseconds(candidates, noise[:1]).items()}
        # A tie is torch's.
        fastest = min(ms, key=lambda name: ms[name] * (0.95 if name == "torch" else 1))
        told = ", ".join(
            f"{name} {each:.0f} ms" for name, each in sorted(ms.items(), key=lambda x: x[1])
        )
        why = f"fastest of those that agree with torch in fp32: {told} a picture in {wanted}"
        for name, reason in left_out.items():
            why += f"; {name} left out: {reason}"
        choice = {"runtime": fastest, "precision": wanted, "why": why, "ms": ms}
        self._graphs = {}
        keep_choice(choice, self._model_key(), self.threads, precision)
        return choice


def agree(ours: np.ndarray, exact: np.ndarray, precision: str, output: Output) -> tuple[bool, float]:
    """Whether outputs (B, ...) are those of torch in fp32 but for rounding and ties; the lowest cosine."""
    lowest = float(cosines(ours, exact).min())
    close = lowest >= LEAST_COSINE[precision]
    if output.kind == "classification":
        best = exact[np.arange(len(exact)), ours.argmax(axis=1)]
        lost = exact.max(axis=1) - best  # 0 where the best class is the same
        close = close and bool((lost <= TIE[precision] * exact.std(axis=1)).all())
    return close, lowest


def softmax(logits: np.ndarray) -> np.ndarray:
    """(C,) logits -> (C,) probabilities."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """(C,) logits -> (C,) probabilities, each of its own class alone."""
    positive: np.ndarray = 1 / (1 + np.exp(-np.abs(logits)))
    return np.where(logits >= 0, positive, 1 - positive)


def _has_gpu(device: str) -> bool:
    if device == "cpu":
        return False
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    if sys.platform == "linux" and not any(map(os.path.exists, drivers)):
        return False  # and no need to wait for torch
    import torch

    return torch.cuda.is_available()


def each(images: Pictures) -> Iterator[Picture]:
    """The pictures of what may be one, many, or a source."""
    if isinstance(images, ImageSource):
        return (Entry(images, index) for index in range(len(images)))
    if isinstance(images, (str, os.PathLike, bytes, Image.Image, Entry)):
        return iter([images])
    if isinstance(images, np.ndarray) and images.ndim < 4:
        return iter([images])
    return iter(images)
