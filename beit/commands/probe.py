"""`beit probe`: how much a linear layer can read off the frozen features of one layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from torch import Tensor

from beit.checkpoints import load_model
from beit.data import ImageSource, load_ahead, open_source
from beit.features import Pooling, default_layer, extract_features
from beit.image import preprocess
from beit.model import Beit
from beit.precision import Precision, pick_device
from beit.probe import fit_best_probe, fit_probe


@Parameter(name="*")
@dataclass(frozen=True)
class Probe:
    data: Path
    """Folder with train/ and val/, each with one sub-folder a class."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, or a name that `beit models` lists."""
    layer: int | None = None
    """Block to read, counted from 1; 9 of 12, 14 of 24, else three quarters where not given."""
    pooling: Pooling = "mean"
    """Mean of the patches, class token, or both."""
    split: str = "val"
    """Folder of DATA to score on."""
    baseline: Annotated[bool, Parameter(negative="--no-baseline")] = True
    """Probe the same network untrained beside it."""
    seed: int = 0
    """Of the untrained network and of the fifth held out to choose the penalty."""
    batch_size: PositiveInt = 64
    precision: Precision = "auto"
    device: str = "auto"
    workers: NonNegativeInt = 2
    """Threads that prepare pictures."""
    json: bool = False
    """Print one JSON line instead of words."""


def probe(settings: Probe) -> dict[str, float | int | str]:
    """Linear-probe a model: logistic regression on frozen features."""
    train = open_source(settings.data, "train", labelled=True)
    test = open_source(settings.data, settings.split, labelled=True).with_classes(train.classes)
    if train.paths == test.paths:
        raise ValueError(
            f"{settings.data} needs a train and a {settings.split} folder, to score on others"
        )
    model = load_model(settings.model, dtype=torch.float32)
    layer = default_layer(model.config.depth) if settings.layer is None else settings.layer
    result: dict[str, float | int | str] = {"layer": layer, "pooling": settings.pooling}
    result["accuracy"] = probe_accuracy(settings.model, model, train, test, layer, settings)
    if settings.baseline:
        torch.manual_seed(settings.seed)
        untrained = type(model)(model.config)
        untrained.image_spec = model.image_spec
        result["untrained_accuracy"] = probe_accuracy(
            "the same, untrained", untrained, train, test, layer, settings
        )
    if settings.json:
        import json

        print(json.dumps(result))
    else:
        beside = (
            f"; the same network untrained {result['untrained_accuracy']:.1%}"
            if settings.baseline
            else ""
        )
        print(
            f"linear probe of layer {layer}, {settings.pooling}: "
            f"{result['accuracy']:.1%} of {len(test)} pictures right{beside}"
        )
    return result


def probe_accuracy(
    name: str, model: Beit, train: ImageSource, test: ImageSource, layer: int, settings: Probe
) -> float:
    """Fit on `train` (a fifth of it chooses the penalty, then all of it is fitted), score on `test`."""
    print(f"{name}: features of {len(train)} + {len(test)} pictures", file=sys.stderr)
    x, y = features_and_labels(model, train, layer, settings)
    held_out = stratified_fifth(train.labels, settings.seed)
    fitted = (x[~held_out], y[~held_out]), (x[held_out], y[held_out])
    chosen, _ = fit_best_probe(*fitted, num_classes=len(train.classes))
    penalty = chosen.penalty * len(x) / max(int((~held_out).sum()), 1)  # it is per picture
    final = fit_probe(x, y, len(train.classes), penalty)
    return final.accuracy(*features_and_labels(model, test, layer, settings))


def features_and_labels(
    model: Beit, source: ImageSource, layer: int, settings: Probe
) -> tuple[Tensor, Tensor]:
    """(n, D) features and (n,) labels of a source."""
    model = model.to(pick_device(settings.device))
    parts = np.array_split(np.arange(len(source)), -(-len(source) // settings.batch_size))

    def prepare(number: int) -> Tensor:
        images = [preprocess(source.read(int(i)), model.image_spec) for i in parts[number]]
        return torch.from_numpy(np.stack(images))

    def batches() -> Iterator[Tensor]:
        yield from load_ahead(prepare, range(len(parts)), settings.workers)

    features = extract_features(model, batches(), [layer], settings.pooling, settings.precision)
    return features[layer], torch.tensor(source.labels)


def stratified_fifth(labels: tuple[int, ...], seed: int) -> Tensor:
    """A (n,) bool choice of a fifth of each class; classes with fewer than five give none or one."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    array = np.array(labels)
    for label in np.unique(array):
        members = rng.permutation(np.flatnonzero(array == label))
        held_out[members[: len(members) // 5]] = True
    if not held_out.any():  # too few to hold any out: judge the penalty on all
        held_out[:] = False
        held_out[rng.permutation(len(labels))[: max(1, len(labels) // 5)]] = True
    return torch.from_numpy(held_out)
