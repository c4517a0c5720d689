"""The inference engine: load a model once, prepare pictures, answer in batches.

A picture that cannot be read is an answer with an error, never the end of the batch. Preparation is
`image.preprocess` with the spec that came with the weights, so the numbers are those of `evaluate`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit.checkpoints import CheckpointError, load_model
from beit.data import ImageSource
from beit.image import BadImage, preprocess, read_image
from beit.model import Beit, BeitForImageClassification
from beit.precision import Precision, autocast, pick_device

Picture = str | os.PathLike[str] | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture; `label` is None where `error` says why there is none."""

    path: str
    label: str | None
    score: float | None  # probability of `label`
    top: tuple[tuple[str, float], ...]  # the best classes, most likely first
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Engine:
    """A classifier, ready to answer.

    model: a folder, or a loaded `BeitForImageClassification`. fp32 unless asked otherwise, so that
    the answer does not depend on the processor.
    """

    def __init__(
        self,
        model: Beit | str | Path,
        device: str = "auto",
        precision: Precision = "fp32",
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not 1 or more")
        loaded = load_model(model) if isinstance(model, (str, Path)) else model
        if not isinstance(loaded, BeitForImageClassification) or not loaded.config.num_classes:
            raise CheckpointError(
                f"{model if isinstance(model, (str, Path)) else type(model).__name__} has no classifier; "
                "fine-tune it first: beit finetune DATA -m MODEL -o RUN"
            )
        self.device = pick_device(device)
        self.model = loaded.to(self.device, torch.float32).eval()  # many files hold float16
        self.precision = precision
        self.batch_size = batch_size

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of the logits."""
        names = self.model.id2label
        return [names.get(i, str(i)) for i in range(self.model.config.num_classes)]

    def classify(self, pictures: Iterable[Picture], top: int = 5) -> Iterator[Prediction]:
        """Answers in the order of the pictures, batch by batch; any number fits in memory."""
        if top < 1:
            raise ValueError(f"top {top} is not 1 or more")
        labels = self.labels
        waiting = iter(pictures)
        while chunk := list(islice(waiting, self.batch_size)):
            prepared = [self._prepare(picture) for picture in chunk]
            good = [image for image in prepared if isinstance(image, np.ndarray)]
            scores = iter(self.logits(np.stack(good)).softmax(dim=1) if good else ())
            for picture, image in zip(chunk, prepared, strict=True):
                name = os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else ""
                if isinstance(image, BadImage):
                    yield Prediction(name, None, None, (), image.reason)
                    continue
                best = torch.topk(next(scores), min(top, len(labels)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ranked = tuple((labels[i], score) for i, score in pairs)
                yield Prediction(name, *ranked[0], ranked)

    def _prepare(self, picture: Picture) -> np.ndarray | BadImage:
        try:
            return preprocess(read_image(picture), self.model.image_spec)
        except BadImage as error:
            return error

    def logits_of(self, source: ImageSource) -> np.ndarray:
        """Logits (n, C) float32 of all pictures of a source. Raises BadImage."""
        spec = self.model.image_spec
        parts = np.array_split(np.arange(len(source)), -(-len(source) // self.batch_size))
        scored = [
            self.logits(np.stack([preprocess(source.read(int(i)), spec) for i in part]))
            for part in parts
        ]
        return torch.cat(scored).numpy()

    @torch.no_grad()
    def logits(self, images: np.ndarray) -> torch.Tensor:
        """Prepared pictures (B, 3, H, W) float32 -> logits (B, C) float32 on the CPU."""
        batch = torch.from_numpy(images).to(self.device)
        with autocast(self.precision, self.device):
            return self.model(batch).float().cpu()
