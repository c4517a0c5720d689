"""The page of a fine-tuning: how good it is, what may be wrong with the pictures, how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from beit import distributed
from beit.augment import CropAndFlip, EraseAndMix, normalise, to_unit
from beit.classifier_report import (
    Answers,
    about,
    augmented,
    curves,
    how_good,
    same_pictures,
    write_same_pictures,
)
from beit.data import batch_at, sample_rng
from beit.frozen import FrozenClassifier
from beit.hub import is_size
from beit.image import BadImage, ImageSpec
from beit.label_review import review
from beit.labelled import NOT_LOOKED_FOR, Labelled, Side
from beit.model import BeitForImageClassification
from beit.plural import counted
from beit.report import Page
from beit.run import Run
from beit.validation import read_lines
from beit.visualize import to_bytes

SAME = "same_pictures.csv"
FLATTERED = "the epoch, the temperature or the method was chosen on them, which flatters it a little"


def write_report(
    run: Run, settings: Mapping[str, Any], provenance: Mapping[str, Any], data: Labelled,
    answers: Answers | None, final: BeitForImageClassification, frozen: FrozenClassifier | None,
    view: CropAndFlip | None, erase_and_mix: EraseAndMix,
) -> None:  # fmt: skip
    """Write it to the run folder; beside it the labels to review, and the pictures that are there twice.

    settings: as in run.toml. provenance: as saved with the model. answers: of the validation pictures.
    view: what was done to a training picture; None where only a head was fitted.
    """
    name = run.out.resolve().name
    page = Page(name, f"A classifier of {len(data.classes)} classes, made by beit finetune.")
    count = 0 if answers is None else len(answers.truth)
    if answers is not None:
        note = f"On {counted(count, 'validation picture')}; {FLATTERED}."
        calibrated = (
            "The temperature was fitted to these pictures." if "temperature" in provenance else ""
        )
        if provenance.get("temperature") == 1.0:
            calibrated = "Every answer is right, so no temperature fits best: the logits are as trained."
        how_good(page, answers, note, calibrated)
    workers, seed = settings["workers"], settings["seed"]
    fresh = is_size(settings["model"])
    review(page, run.out, data, final, frozen, fresh, settings["precision"], workers, seed)
    twins = data.twins()
    same_pictures(page, twins, f"{SAME} has all")
    if data.divided.looked is None:
        page.note(f"Files with equal bytes were compared; {NOT_LOOKED_FOR}.")
    if twins:
        write_same_pictures(run.out / SAME, twins)
    kept = provenance.get("best_step") if frozen is None or final is not frozen.model else None
    curves(page, run.read_metrics(), read_lines(run.out), kept, data.several)
    if view is not None:
        seen = first_batch(
            data.train, settings["batch_size"], seed, view, erase_and_mix, final.image_spec
        )
        augmented(page, seen)
    facts = {
        "pictures": f"{len(data.train.source)} to train on, {count} to validate on",
        "data hash": provenance["data_hash"],
    }
    config = ["--config", str(run.out / "run.toml"), "--out", "again.run"]
    about(page, settings, facts, shlex.join(["beit", "finetune", settings["data"], *config]))
    page.write(run.out / "report.html")
    distributed.say(f"the page: {run.out / 'report.html'}")


def first_batch(
    train: Side, batch_size: int, seed: int, view: CropAndFlip, erase_and_mix: EraseAndMix,
    spec: ImageSpec,
) -> list[np.ndarray]:  # fmt: skip
    """Pictures of a run's first batch as the network saw them, uint8 (height, width, 3)."""
    pictures, labels = [], []
    batch = batch_at(0, len(train.source), batch_size, seed, 0, distributed.size())
    shown = 16
    for epoch, index in batch if erase_and_mix.does_something else batch[:shown]:
        with suppress(BadImage):
            pictures.append(view(train.source.open(index), sample_rng(seed, epoch, index)))
            labels.append(train.truth[index])
    if not pictures:
        return []
    images = normalise(to_unit(pictures, torch.device("cpu")), spec)
    truth, classes = torch.from_numpy(np.array(labels)), len(train.source.classes)
    images, _ = erase_and_mix(images, truth, classes, np.random.default_rng([seed, 0, 2, 0]))
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return list(to_bytes(images[:shown] * std + mean))
