"""A classifier from frozen features: the blocks up to the best layer, and a linear head on them.

With few labels this is what there is to learn, in one pass over the pictures; with more it is what
fine-tuning has to beat. The layer and the penalty are chosen on a fifth of the training pictures. The head
reads what any classifier's does, the normed mean of the patches, so it is saved as an ordinary model.

Shapes: n pictures, D features, C classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit.data import ImageSource
from beit.features import default_layer, layer_states
from beit.image import BadImage, preprocess
from beit.model import Beit, BeitForImageClassification
from beit.plural import counted
from beit.precision import Precision
from beit.probe import fit_best_probe, fit_probe, stratified_fifth
from beit.workers import load_ahead

BATCH = 32
MOST_PICTURES = 20_000  # that a head is fitted to


@dataclass(frozen=True, eq=False)
class Features:
    """Features of the pictures of a source that can be read."""

    kept: np.ndarray  # (n,) int64, their numbers in the source
    layers: dict[int, Tensor]  # each (n, D) float32 on the CPU


@dataclass(frozen=True, eq=False)
class FrozenClassifier:
    """A linear head on frozen blocks, and what it was chosen by."""

    model: BeitForImageClassification
    layer: int  # how many blocks it has
    held_out: float  # accuracy on the fifth that chose
    features: Features  # of the training pictures
    depth: int  # blocks of the model that it was cut from

    def __str__(self) -> str:
        return (
            f"a linear head on the frozen block {self.layer} of {self.depth} is right for "
            f"{self.held_out:.1%} of a fifth of the training pictures that it had not seen"
        )


def frozen_classifier(
    start: BeitForImageClassification,
    train: ImageSource,
    precision: Precision,
    workers: int,
    seed: int,
) -> FrozenClassifier:
    """Fit a head to the frozen features of a model; of more than 20,000 pictures to so many.

    start: has the classes of `train`; its own head is not used, and its weights are not changed.
    """
    layers = candidate_layers(start.config.depth)
    features = features_of(start, train, layers, precision, workers, some_of(train, seed))
    labels = torch.from_numpy(train.labels[features.kept])
    out = stratified_fifth(labels.numpy(), seed)
    classes, usual = len(train.classes), default_layer(start.config.depth)
    scored = []
    for layer, x in features.layers.items():
        probe, accuracy = fit_best_probe((x[~out], labels[~out]), (x[out], labels[out]), classes)
        scored.append((accuracy, layer == usual, layer, probe.penalty / max(int((~out).sum()), 1)))
    accuracy, _, layer, penalty = max(scored)
    probe = fit_probe(features.layers[layer], labels, classes, penalty * len(labels))
    model = shortened(start, layer)
    weight, bias = probe.as_head()
    model.head.load_state_dict({"weight": weight, "bias": bias})
    return FrozenClassifier(model, layer, accuracy, features, start.config.depth)


def candidate_layers(depth: int) -> list[int]:
    """The upper half of the blocks, five of them at most, the paper's among them."""
    spread = np.linspace(depth / 2, depth, 4).round().astype(int).tolist()
    return sorted({max(1, layer) for layer in spread} | {default_layer(depth)})


def shortened(start: BeitForImageClassification, layer: int) -> BeitForImageClassification:
    """The first blocks of a classifier, with a new norm and a new head."""
    model = BeitForImageClassification(replace(start.config, depth=layer, drop_path_rate=0.0))
    model.image_spec, model.id2label = start.image_spec, start.id2label
    wanted = model.state_dict()
    taken = {
        name: tensor
        for name, tensor in start.state_dict().items()
        if name in wanted and name.split(".")[0] not in ("norm", "fc_norm", "head")
    }
    model.load_state_dict(taken, strict=False)
    return model.to(start.cls_token.device).eval()


def some_of(source: ImageSource, seed: int) -> np.ndarray:
    """The numbers of all pictures, or of 20,000 of them."""
    if len(source) <= MOST_PICTURES:
        return np.arange(len(source))
    return np.sort(np.random.default_rng([seed, 4]).permutation(len(source))[:MOST_PICTURES])


def features_of(
    model: Beit,
    source: ImageSource,
    layers: Sequence[int],
    precision: Precision,
    workers: int,
    chosen: np.ndarray | None = None,
    told: set[str] | None = None,
) -> Features:
    """What a head on each of the layers would get, for the pictures of a source or some, by number (m,).

    Those that cannot be read are named on stderr, once where `told` keeps them; ValueError where none can.
    """
    told = set() if told is None else told
    numbers = np.arange(len(source)) if chosen is None else chosen
    kept: list[int] = []

    def batches() -> Iterator[Tensor]:
        parts = range(0, len(numbers), BATCH)
        chunks = [numbers[begin : begin + BATCH] for begin in parts]

        def prepare(place: int) -> list[tuple[int, np.ndarray]]:
            good = []
            for number in chunks[place].tolist():
                try:
                    good.append((number, preprocess(source.read(number), model.image_spec)))
                except BadImage as error:
                    if str(error) not in told:
                        told.add(str(error))
                        print(f"left out: {error}", file=sys.stderr)
            return good

        for good in load_ahead(prepare, range(len(chunks)), max(1, workers)):
            if good:
                kept.extend(number for number, _ in good)
                yield torch.from_numpy(np.stack([image for _, image in good]))

    was_training = model.training
    pooled = [
        torch.stack([head_input(model, state) for state in states], dim=1).cpu()
        for states in layer_states(model, batches(), layers, precision)
    ]
    model.train(was_training)
    if not pooled:
        raise ValueError(
            f"none of {counted(len(numbers), 'picture')} can be read; `beit check` tells why"
        )
    features = torch.cat(pooled).unbind(dim=1)
    return Features(np.array(kept, dtype=np.int64), dict(zip(layers, features, strict=True)))


def head_input(model: Beit, states: Tensor) -> Tensor:
    """(B, 1 + L, D) -> (B, D): pooled as the model pools, normed without weights."""
    mean = model.config.pooling == "mean"
    pooled = states[:, 1:].mean(dim=1) if mean else states[:, 0]
    return F.layer_norm(pooled, pooled.shape[1:], eps=model.config.layer_norm_eps)
