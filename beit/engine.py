"""The inference engine: load a model once, prepare pictures ahead, answer in batches.

A picture that cannot be read is an answer with an error, never the end of the batch. Preparation is
`image.preprocess` with the spec that came with the weights, by threads, while the model works on the
batch before. One engine serves any number of threads: the model works for one of them at a time, with
all its own threads.

Shapes: B batch, D width, C classes, N = 1 + L tokens.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image

from beit.checkpoints import CheckpointError, load_model
from beit.data import ImageSource
from beit.features import Embedding as Pooling
from beit.features import embed
from beit.image import BadImage, ImageSpec, Source, open_image, preprocess
from beit.model import Beit, BeitForImageClassification
from beit.precision import Precision, autocast, pick_device, resolve_precision
from beit.workers import make_ahead

Runtime = Literal["auto", "torch"]


@dataclass(frozen=True)
class Entry:
    """Picture `index` of a source, read when its turn comes."""

    source: ImageSource
    index: int


Picture = Source | Entry
Pictures = Iterable[Picture] | Picture | ImageSource  # many or one


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture; `label` is None where `error` says why there is none."""

    path: str
    label: str | None
    score: float | None  # probability of `label`
    top: tuple[tuple[str, float], ...]  # the best classes, most likely first
    error: str | None = None
    ms: float | None = field(
        default=None, compare=False
    )  # the model's: its batch's, divided by pictures

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

    model: a folder, file or name, or a loaded model.
    runtime: "torch", or "auto".
    precision: "fp32", "bf16", or "auto", bf16 where the processor multiplies it in hardware. With fp32
        the answer does not depend on the processor but for rounding.
    threads: of the model; torch's own choice where None. For torch it holds for the whole process.
    batch_size: pictures that the model sees at once. As many are prepared ahead.
    workers: threads that read and prepare pictures; one a processor, up to 8, where None.
    """

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
    ) -> None:
        for name, value in (("batch_size", batch_size), ("threads", threads), ("workers", workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not 1 or more")
        if runtime not in get_args(Runtime):
            raise ValueError(f"runtime {runtime!r} is not one of {', '.join(get_args(Runtime))}")
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        loaded = load_model(model) if isinstance(model, (str, Path)) else model
        self.device = pick_device(device)
        self.model = loaded.to(self.device, torch.float32).eval()  # many files hold float16
        self.runtime = "torch"
        self.precision = resolve_precision(precision, self.device)
        self.batch_size = batch_size
        if threads is not None:
            torch.set_num_threads(threads)
        self._turn = threading.Lock()  # one batch at a time: it takes all threads of the model
        self._readers = ThreadPoolExecutor(workers or min(8, available_processors()))

    @property
    def image_spec(self) -> ImageSpec:
        """How pictures are prepared."""
        return self.model.image_spec

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of the logits."""
        names = self.model.id2label
        return [names.get(i, str(i)) for i in range(self._classifier().config.num_classes)]

    def classify(self, images: Pictures, top: int = 5) -> Iterator[Prediction]:
        """Answers in the order of the pictures; any number fits in memory.

        images: paths, files' bytes, Pillow images, uint8 (H, W, 3) arrays, entries of a source, or an
        iterator of them, read as answers are taken; or a single one; or a source.
        """
        if top < 1:
            raise ValueError(f"top {top} is not 1 or more")
        labels = self.labels

        def answers() -> Iterator[Prediction]:
            for name, logits, ms in self._answers(images, self.logits_array):
                if isinstance(logits, BadImage):
                    yield Prediction(name, None, None, (), logits.reason)
                    continue
                best = torch.topk(torch.from_numpy(logits).softmax(dim=0), min(top, len(labels)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ranked = tuple((labels[i], score) for i, score in pairs)
                yield Prediction(name, *ranked[0], ranked, ms=ms)

        return answers()

    def embed(
        self, images: Pictures, pooling: Pooling = "mean", layer: int | None = None
    ) -> Iterator[Embedding]:
        """Features in the order of the pictures; pooling and layer as in `features.embed`."""
        depth = self.model.config.depth
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling {pooling!r} is not one of {', '.join(get_args(Pooling))}")
        if layer is not None and not -depth - 1 <= layer <= depth:
            raise ValueError(f"layer {layer} does not exist; this model has layers 0 to {depth}")

        def answers() -> Iterator[Embedding]:
            compute = lambda batch: self.features_array(batch, pooling, layer)  # noqa: E731
            for name, row, ms in self._answers(images, compute):
                if isinstance(row, BadImage):
                    yield Embedding(name, None, row.reason)
                else:
                    yield Embedding(name, row, ms=ms)

        return answers()

    def logits_of(self, source: ImageSource) -> np.ndarray:
        """Logits (n, C) float32 of all pictures of a source. Raises BadImage."""
        rows = []
        for _, row, _ in self._answers(source, self.logits_array):
            if isinstance(row, BadImage):
                raise row
            rows.append(row)
        return np.stack(rows)

    def logits(self, images: np.ndarray) -> torch.Tensor:
        """Prepared pictures (B, 3, H, W) float32 -> logits (B, C) float32 on the CPU."""
        return torch.from_numpy(self.logits_array(images))

    def logits_array(self, images: np.ndarray) -> np.ndarray:
        """As `logits`, as an array."""
        return self._compute(self._classifier(), images)

    def features_array(
        self, images: np.ndarray, pooling: Pooling = "mean", layer: int | None = None
    ) -> np.ndarray:
        """Prepared pictures (B, 3, H, W) float32 -> float32 (B, D), or (B, N, D) for tokens."""
        return self._compute(lambda batch: embed(self.model, batch, pooling, layer), images)

    def _classifier(self) -> BeitForImageClassification:
        if not isinstance(self.model, BeitForImageClassification) or not self.model.config.num_classes:
            raise CheckpointError(
                f"{self.name} has no classifier; fine-tune it first: beit finetune DATA -m MODEL -o RUN"
            )
        return self.model

    def _compute(self, output: Callable[[torch.Tensor], torch.Tensor], images: np.ndarray) -> np.ndarray:
        with self._turn, torch.inference_mode(), autocast(self.precision, self.device):
            return output(torch.from_numpy(images).to(self.device)).float().cpu().numpy()

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


def each(images: Pictures) -> Iterator[Picture]:
    """The pictures of what may be one, many, or a source."""
    if isinstance(images, ImageSource):
        return (Entry(images, index) for index in range(len(images)))
    if isinstance(images, (str, os.PathLike, bytes, Image.Image, Entry)):
        return iter([images])
    if isinstance(images, np.ndarray) and images.ndim < 4:
        return iter([images])
    return iter(images)


def available_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
