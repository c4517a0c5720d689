"""The pictures that a fine-tuning is watched on, and its best epoch.

    validation.jsonl     one object a look: step, accuracy (or mean average precision), loss
    best/step-00001200/  the weights of the best one

A look changes nothing of the training, and one that has been made is not made again: a resumed run has
the looks, and the best weights, of an unbroken one.

Shapes: n pictures, C classes; truth int64 (n,) labels, or bool (n, C) where pictures have several.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beit import distributed
from beit.atomic import CannotWrite, write_atomically
from beit.data import ImageSource
from beit.engine import Engine
from beit.image import BadImage
from beit.metrics import (
    average_precision,
    binary_cross_entropy,
    negative_log_likelihood,
    top_k_accuracy,
)
from beit.model import BeitForImageClassification
from beit.precision import Precision
from beit.run import NotFinite, read_metrics
from beit.snapshots import drop, load_snapshot, snapshots, write_snapshot
from beit.split import take

Line = dict[str, float]


def score(logits: np.ndarray, truth: np.ndarray) -> Line:
    """Accuracy, or mean average precision where pictures have several labels, and loss in nats."""
    if truth.ndim == 2:
        precision = float(np.nanmean(average_precision(logits, truth)))
        return {"accuracy": precision, "loss": binary_cross_entropy(logits, truth)}
    return {
        "accuracy": top_k_accuracy(logits, truth),
        "loss": negative_log_likelihood(logits, truth),
    }


def logits_of(engine: Engine, source: ImageSource) -> np.ndarray:
    """Logits (n, C) float32 of all pictures, each process seeing its share. Raises BadImage, in all."""
    world, rank = distributed.size(), distributed.rank()
    if world == 1:
        return engine.logits_of(source)
    logits = np.zeros((len(source), len(engine.labels)), dtype=np.float32)
    share = np.arange(rank, len(source), world)

    def look() -> None:
        if len(share):
            logits[share] = engine.logits_of(take(source, share))

    distributed.on_each(look)
    return distributed.total(torch.from_numpy(logits)).numpy()


class Validation:
    """Looks at a model in training, and keeps the best. Every process must take part in each look."""

    def __init__(
        self,
        out: Path,
        source: ImageSource,
        truth: np.ndarray,
        model: BeitForImageClassification,
        device: torch.device,
        precision: Precision,
    ) -> None:
        """model: of the same shape; it is copied, as a checkpoint may be saved while one looks."""
        self.out, self.source, self.truth = out, source, truth
        watched = copy.deepcopy(model)
        self.engine = Engine(watched, "torch", precision, device=str(device), batch_size=64)
        self.lines: dict[int, Line] = distributed.on_main(lambda: read_lines(out))

    @property
    def best(self) -> int:
        """The step of the highest accuracy; of several the one with the lowest loss."""
        return max(self.lines, key=lambda step: _rank(self.lines[step]))

    def look(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Score the weights that a run has after a step, unless that is known; keep them if best.

        A look at a picture that cannot be read, or with a loss that is not finite, is told and left out,
        but in a run that has none yet: raises BadImage, or NotFinite.
        """
        if step in self.lines:
            return
        self.engine.model.load_state_dict(weights, strict=False)
        try:
            line = score(logits_of(self.engine, self.source), self.truth)
            if not math.isfinite(line["loss"]):
                raise NotFinite(
                    f"the loss on the validation pictures is {line['loss']}; a lower --lr may help"
                )
        except (BadImage, NotFinite) as error:
            if not self.lines:
                raise
            distributed.say(f"the look at step {step} is left out, and the training goes on: {error}")
            return
        is_best = not self.lines or _rank(line) > _rank(self.lines[self.best])
        self.lines[step] = line
        distributed.on_main(lambda: self._keep(step, weights if is_best else None))

    def _keep(self, step: int, weights: Mapping[str, Tensor] | None) -> None:
        try:
            if weights is not None:
                (self.out / "best").mkdir(exist_ok=True)
                folder = self.out / "best" / f"step-{step:08d}"
                write_snapshot(folder, {"model.safetensors": weights}, {"step": step})
            rows = [json.dumps({"step": step, **line}) + "\n" for step, line in self.lines.items()]
            write_atomically(self.out / "validation.jsonl", "".join(rows).encode())
            if weights is not None:  # the older ones go when the line is there that names this one
                for old in snapshots(self.out / "best"):
                    if old != folder:
                        drop(old)
        except OSError as error:
            raise CannotWrite(
                f"cannot write the best epoch to {self.out}: {error.strerror or error}. Make room there, "
                "then give the same command, without --overwrite, to go on"
            ) from error

    def best_weights(self) -> Mapping[str, Tensor]:
        """The tensors of the best step."""
        files, _ = load_snapshot(self.out / "best" / f"step-{self.best:08d}")
        return files["model.safetensors"]


def _rank(line: Line) -> tuple[float, float]:
    accuracy, loss = line["accuracy"], line["loss"]
    return accuracy if math.isfinite(accuracy) else -1.0, -loss if math.isfinite(loss) else -math.inf


def read_lines(out: Path) -> dict[int, Line]:
    """{step: accuracy and loss} of the looks of a run so far."""
    return {
        line["step"]: {key: line[key] for key in ("accuracy", "loss")}
        for line in read_metrics(out / "validation.jsonl")
    }
