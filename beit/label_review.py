"""Which labels look wrong: a list with the likeliest errors first, and its section of a classifier's page.

A linear probe that has not seen a label says what it would be. Its features are frozen ones where there
are such, as a trained network may know its labels by heart.

Shapes: n pictures, D features, C classes; truth int64 (n,), or bool (n, C) where pictures have several
labels: then each class is a question, and a suggestion answers one of them the other way.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit.atomic import write_atomically
from beit.classifier_report import file_name, picture_of
from beit.data import ImageSource
from beit.features import default_layer
from beit.frozen import MOST_PICTURES, FrozenClassifier, features_of
from beit.labelled import Labelled
from beit.model import Beit
from beit.precision import Precision
from beit.probe import (
    LabelReview,
    out_of_fold,
    out_of_fold_several,
    review_labels,
    review_several,
)
from beit.report import Page
from beit.split import SEPARATOR

SHOWN = 12
NEIGHBOURS = 3
MOST_NUMBERS = 2e8  # pictures x features x classes: a minute or so


class Suspect(NamedTuple):
    """A label that may be wrong."""

    source: ImageSource
    number: int
    given: str
    suggested: str
    confidence: float  # probability of what is suggested, by a probe that has not seen the label
    alike: list[tuple[ImageSource, int]]  # the nearest pictures that have the suggested label


def review(
    page: Page, folder: Path, data: Labelled, model: Beit, frozen: FrozenClassifier | None,
    from_nothing: bool, precision: Precision, workers: int, seed: int,
) -> None:  # fmt: skip
    """Judge all labels of a fine-tuning; list them in a file of a folder, and show the first ones.

    model: what came of it, which is looked at where there are no `frozen` features.
    from_nothing: such a network knows little of shapes; small pictures tell more.
    """
    model = model if frozen is None else frozen.model
    layer = default_layer(model.config.depth) if frozen is None else frozen.layer
    parts = [data.train] if data.val is None else [data.train, data.val]
    sides = [part.source for part in parts]
    count = sum(map(len, sides))
    if count > MOST_PICTURES or count * model.config.embed_dim * len(data.classes) > MOST_NUMBERS:
        page.section("Labels that may be wrong", "Not looked for: there are too many pictures.")
        return
    found = [frozen.features] if frozen is not None else []
    for source in sides[len(found) :]:
        found.append(features_of(model, source, [layer], precision, workers))
    pictures = [(s, int(i)) for s, f in zip(sides, found, strict=True) for i in f.kept]
    features = torch.cat([f.layers[layer] for f in found])
    truth = torch.from_numpy(
        np.concatenate([p.truth[f.kept] for p, f in zip(parts, found, strict=True)])
    )
    kind = "frozen features" if frozen is not None else "trained features"
    if from_nothing and data.divided.looked is not None:
        numbers = zip((data.divided.train, data.divided.val), found, strict=False)
        chosen = np.concatenate([side[f.kept] for side, f in numbers])
        thumbnails = torch.from_numpy(data.divided.looked.thumbnails[chosen]).flatten(1).float() / 64
        features, kind = torch.cat([features, thumbnails], dim=1), f"{kind} and thumbnails"
    if data.several:
        probability = out_of_fold_several(features, truth, seed)
        judged, right = review_several(probability, truth), (probability > 0.5) == truth
    else:
        probability = out_of_fold(features, truth, len(data.classes), seed=seed)
        judged, right = review_labels(probability, truth), probability.argmax(dim=1) == truth
    suspects = suspects_of(pictures, truth, data.classes, judged, features)
    label_errors(
        page,
        folder / "label_review.csv",
        suspects,
        f"Judged by a linear probe on {kind}, which is right for {right.double().mean():.1%} of the "
        f"{'answers' if data.several else 'labels'} that it has not seen.",
    )


def suspects_of(
    pictures: Sequence[tuple[ImageSource, int]], truth: Tensor, classes: Sequence[str],
    review: LabelReview, features: Tensor | None = None,
) -> list[Suspect]:  # fmt: skip
    """Labels in the order of a review; the first ones with the nearest pictures that would agree.

    features: (n, D), to find those by.
    """

    def named(row: Tensor) -> str:
        return SEPARATOR.join(classes[i] for i in row.nonzero().flatten().tolist())

    found = []
    normed = None if features is None else F.normalize(features.float(), dim=1)
    for place, number in enumerate(review.order.tolist()):
        other = int(review.suggestion[number])
        if truth.ndim == 2:
            proposed = truth[number].clone()
            proposed[other] = ~proposed[other]
            given, suggested = named(truth[number]), named(proposed)
            agree = truth[:, other] == proposed[other]
        else:
            given, suggested = classes[int(truth[number])], classes[other]
            agree = truth == other
        alike: list[tuple[ImageSource, int]] = []
        if normed is not None and place < SHOWN:
            agreeing = torch.where(agree)[0]
            nearest = (normed[agreeing] @ normed[number]).topk(min(NEIGHBOURS, len(agreeing))).indices
            alike = [pictures[int(i)] for i in agreeing[nearest]]
        confidence = float(review.confidence[number])
        source, index = pictures[number]
        found.append(Suspect(source, index, given, suggested, confidence, alike))
    return found


def label_errors(page: Page, file: Path, suspects: Sequence[Suspect], judged_by: str) -> None:
    """The labels that a look should begin with; a file has them all."""
    _write_csv(file, suspects)
    likely = [s for s in suspects if s.confidence > 0.5][:SHOWN]
    page.section(
        "Labels that may be wrong",
        f"{judged_by} {file.name} has all pictures in this order; correct those that are "
        "wrong, in the folders or the .csv that they come from, and train again."
        if likely
        else f"None is contradicted with confidence. {judged_by}",
    )
    for suspect in likely:
        suggested = suspect.suggested or "none"  # of several labels
        tiles = [
            (
                picture_of(suspect.source, suspect.number),
                f"labelled {suspect.given}; {suggested}? {suspect.confidence:.0%}",
                file_name(suspect.source.name(suspect.number)),
            )
        ]
        for source, index in suspect.alike:
            name = file_name(source.name(index))
            tiles.append((picture_of(source, index), f"alike, {suggested}", name))
        page.tiles(tiles)


def _write_csv(file: Path, suspects: Sequence[Suspect]) -> None:
    """A .csv of all labels, likeliest error first: path, label, suggested, confidence."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "label", "suggested", "confidence"])
    for s in suspects:
        writer.writerow([s.source.name(s.number), s.given, s.suggested, f"{s.confidence:.4f}"])
    write_atomically(file, text.getvalue().encode(errors="surrogateescape"))
