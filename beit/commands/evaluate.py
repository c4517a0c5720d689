"""`beit evaluate`: how often a classifier is right, how sure it may be, and what it takes for what.

The logits are the engine's. Classes are matched by name; a set that has only some of the model's classes,
such as ImageNet-A, is scored among those, and the report says so.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console
from rich.table import Table

from beit.atomic import check_place, write_atomically
from beit.classifier_report import Answers, about, how_good, same_pictures
from beit.data import ImageSource, open_source
from beit.engine import Engine
from beit.graphs import is_graph
from beit.hub import synsets
from beit.image import IMAGENET_MEAN, ImageSpec, timm_spec, transformers_spec, unilm_spec
from beit.label_review import FILE, label_errors, suspects_of, write_label_review
from beit.metrics import (
    bootstrap_interval,
    calibration,
    confusion_matrix,
    most_confused,
    negative_log_likelihood,
    real_accuracy,
    top_k_right,
)
from beit.model import Beit
from beit.precision import Precision
from beit.probe import review_labels
from beit.report import Page
from beit.run import describe_settings
from beit.split import MOST_LOOKED_AT, Looked, data_hash, look

MANY = 50  # classes: beyond, the table shows the worst of them and the report has no whole matrix


@Parameter(name="*")
@dataclass(frozen=True)
class Evaluate:
    data: Path
    """Folder with one sub-folder a class, or with val/ of such; or a .csv of path,label."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, or a name that `beit models` lists."""
    split: str = "val"
    """Folder of DATA to score, where it has train/ and others."""
    preset: Literal["unilm", "timm", "transformers"] | None = None
    """Prepare pictures by the rule of another code instead of the model's own."""
    real_labels: Path | None = None
    """ImageNet's reassessed labels: a .json with a list of class numbers for each validation picture."""
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """Write all numbers to this .json as well."""
    report: Path | None = None
    """Write a page to this .html: confusions, calibration, the worst mistakes, labels that look wrong."""
    batch_size: PositiveInt = 64
    precision: Precision = "fp32"
    device: str = "auto"
    json: bool = False
    """Print one JSON line instead of a table."""


def evaluate(settings: Evaluate) -> dict[str, Any]:
    """Score a classifier on labelled pictures."""
    for file in (settings.out, settings.report):
        check_place(file)
    engine = Engine(
        settings.model,
        "auto" if is_graph(settings.model) else "torch",
        settings.precision,
        device=settings.device,
        batch_size=settings.batch_size,
    )
    if settings.preset is not None:
        engine.model.image_spec = preset_spec(engine.model, settings.preset)
    source = open_source(settings.data, settings.split, labelled=True)
    matched_by, names = as_the_data_says(engine.labels, source)
    source = source.with_classes(names)
    accepted = None
    if settings.real_labels is not None:
        accepted = real_labels(settings.real_labels, source, len(names))

    every = engine.logits_of(source)
    often = Counter(engine.labels)
    classes = [f"{n} ({i})" if often[n] > 1 else n for i, n in enumerate(engine.labels)]
    labels, logits = np.array(source.labels), every
    present = np.unique(labels)
    if 1 < len(present) < len(classes):  # among one class everything is right
        logits, labels = every[:, present], np.searchsorted(present, labels)
        classes = [classes[i] for i in present]
    right, right5 = top_k_right(logits, labels, 1), top_k_right(logits, labels, 5)
    confusion = confusion_matrix(logits.argmax(axis=1), labels, len(classes))
    counts = confusion.sum(axis=1)
    curve = calibration(logits, labels)
    result: dict[str, Any] = {
        "top1": float(right.mean()),
        "top1_interval": bootstrap_interval(right),
        "top5": float(right5.mean()),
        "top5_interval": bootstrap_interval(right5),
        "nll": negative_log_likelihood(logits, labels),
        "ece": curve.error,
        "pictures": len(source),
        "classes": len(classes),
        "model_classes": len(names),
        "classes_without_pictures": [n for i, n in enumerate(engine.labels) if i not in present],
        "matched_by": matched_by,
        "preset": settings.preset or "the model's own",
        "preprocessing": asdict(engine.model.image_spec),
        "per_class": {n: float(confusion[i, i] / counts[i]) for i, n in enumerate(classes) if counts[i]},
        "most_confused": [(classes[i], classes[j], often) for i, j, often in most_confused(confusion)],
    }
    if len(classes) < len(names):
        result["top1_among_all"] = float(top_k_right(every, source.labels).mean())
    if accepted is not None:
        result["real_top1"] = real_accuracy(every.argmax(axis=1), accepted)
    if settings.out is not None:
        document = {
            "beit": version("beit"),
            "settings": {k: v for k, v in asdict(settings).items() if k != "_"},
            **result,
            "class_names": classes,
            "calibration": {key: value.tolist() for key, value in curve._asdict().items()},
            "confusion": confusion.tolist() if len(classes) <= MANY else None,
        }
        write_atomically(settings.out, json.dumps(document, default=str, indent=1).encode() + b"\n")
    if settings.report is not None:
        answers = Answers(source, labels, logits, classes)
        write_page(settings.report, settings, answers, result["preset"])
    if settings.json:
        print(json.dumps(result))
    else:
        show(result, settings, confusion, classes)
    return result


def write_page(file: Path, settings: Evaluate, answers: Answers, preset: str) -> None:
    """The page: what is right, what is wrong, and what is wrong with the pictures."""
    page = Page(f"{settings.model} on {settings.data}", "A classifier, scored by beit evaluate.")
    how_good(page, answers, f"Prepared as {preset}.")
    truth = torch.from_numpy(answers.truth)
    review = review_labels(torch.from_numpy(answers.logits).double().softmax(dim=1), truth)
    pictures = [(answers.source, number) for number in range(len(truth))]
    suspects = suspects_of(pictures, truth, answers.classes, review)
    write_label_review(file.with_name(FILE), suspects)
    label_errors(page, suspects, "Judged by the classifier itself, if it has not learned these labels.")
    looked = None
    if len(truth) <= MOST_LOOKED_AT:
        looked = look(answers.source, 2)
        same_pictures(page, same_of(answers.source, looked))
    words = ["beit", "evaluate", str(settings.data), "-m", settings.model, "--split", settings.split]
    words += ["--preset", settings.preset] if settings.preset else []
    facts = {"pictures": len(truth), "data hash": data_hash([answers.source], looked)}
    about(page, describe_settings(settings), facts, shlex.join([*words, "--report", str(file)]))
    page.write(file)
    print(f"the page: {file}", file=sys.stderr)


def same_of(source: ImageSource, looked: Looked) -> list[tuple[str, list[str]]]:
    """Groups of pictures with equal pixels, those with two labels first."""
    groups = []
    for group in looked.exact():
        labels = sorted({source.classes[source.labels[i]] for i in group})
        note = f"two labels: {', '.join(labels)}; equal pixels" if len(labels) > 1 else "equal pixels"
        groups.append((len(labels) < 2, note, [source.name(i) for i in group]))
    return [(note, names) for _, note, names in sorted(groups)]


def preset_spec(model: Beit, preset: str) -> ImageSpec:
    """How another code prepares pictures for a model of this size; mean and std stay the model's."""
    size, (mean, std) = model.config.image_height_width[0], (model.image_spec.mean, model.image_spec.std)
    if preset == "unilm":
        return unilm_spec(size, mean, std)
    if preset == "timm":  # its large v2 models have a ratio of their own; v1's large have other means
        return timm_spec(
            size, mean, std, large_v2=model.config.embed_dim == 1024 and mean == IMAGENET_MEAN
        )
    return transformers_spec(size, mean, std)


def as_the_data_says(labels: Sequence[str], source: ImageSource) -> tuple[str, list[str]]:
    """The model's classes by the names that the data has for them, and by what they were matched.

    name: as the model has them. synset: ImageNet's folders, n01440764. number: 0 to 999, as ImageNet-V2
    has them. synonym: one of several names after commas, whatever the case. The way that knows most wins.
    """
    present = [source.classes[i] for i in np.unique(source.labels)]
    ways = {
        "name": list(labels),
        "synset": synsets(len(labels)) or [],
        "number": [str(number) for number in range(len(labels))],
        "synonym": by_synonym(labels, present),
    }
    matched_by = max(ways, key=lambda way: len(set(present) & set(ways[way])))
    often = Counter(ways[matched_by])
    several = [name for name in present if often[name] > 1]
    if several:
        raise ValueError(
            f"the model has {often[several[0]]} classes named {several[0]}; "
            f"name that folder by its number, 0 to {len(labels) - 1}, or synset, and all others so too"
        )
    return matched_by, ways[matched_by]


def by_synonym(labels: Sequence[str], present: Sequence[str]) -> list[str]:
    """The labels, each replaced by the name in `present` that is one of its synonyms and of no other's."""

    def synonyms(label: str) -> set[str]:
        return {word.strip().replace("_", " ").casefold() for word in label.split(",")}

    often = Counter(word for label in labels for word in synonyms(label))
    meant = {word: name for name in present for word in synonyms(name) if often[word] == 1}
    return [next((meant[word] for word in synonyms(label) if word in meant), label) for label in labels]


def real_labels(file: Path, source: ImageSource, num_classes: int) -> list[list[int]]:
    """The accepted classes of each picture, from a list over ImageNet's 50,000 validation pictures."""
    if not file.exists():
        raise ValueError(f"--real-labels {file} does not exist")
    lists = json.loads(file.read_text())
    found = [re.search(r"ILSVRC2012_val_(\d{8})", source.name(i)) for i in range(len(source))]
    places = [int(match[1]) - 1 if match else -1 for match in found]
    if not all(0 <= place < len(lists) for place in places):
        wrong = next(i for i, place in enumerate(places) if not 0 <= place < len(lists))
        raise ValueError(
            f"--real-labels {file} has {len(lists)} pictures, ILSVRC2012_val_00000001 and on; "
            f"{source.name(wrong)} is none of them"
        )
    accepted = [lists[place] for place in places]
    if max((number for numbers in accepted for number in numbers), default=0) >= num_classes:
        raise ValueError(f"--real-labels {file} numbers more classes than the model's {num_classes}")
    return accepted


def words(spec: ImageSpec) -> str:
    """A preparation in a line."""
    height, width = spec.size
    if spec.resize == "squash":
        geometry = f"squashed to {height} x {width}"
    else:
        geometry = f"short side / {spec.crop_ratio:g}, centre {height} x {width}"
    mean, std = ("/".join(f"{v:g}" for v in values) for values in (spec.mean, spec.std))
    return f"{geometry}, {spec.filter}, mean {mean}, std {std}"


def show(
    result: dict[str, Any], settings: Evaluate, confusion: np.ndarray, classes: Sequence[str]
) -> None:
    """The results as a table and some lines, for people."""
    table = Table(title=f"{settings.model} on {settings.data}")
    table.add_column("class", no_wrap=True, overflow="ellipsis")
    table.add_column("pictures", justify="right")
    table.add_column("right", justify="right")
    table.add_column("most often taken for", no_wrap=True, overflow="ellipsis")
    wrong = confusion - np.diag(np.diag(confusion))
    counts = confusion.sum(axis=1)
    shown = [i for i in range(len(classes)) if counts[i]]
    if len(shown) > MANY:
        table.caption = f"the 20 worst of {len(shown)} classes; -o FILE has all"
        shown = sorted(shown, key=lambda i: confusion[i, i] / counts[i])[:20]
    for i in shown:
        worst = int(wrong[i].argmax())
        taken = f"{classes[worst]} ({wrong[i, worst]})" if wrong[i, worst] else ""
        table.add_row(classes[i], str(counts[i]), f"{confusion[i, i] / counts[i]:.1%}", taken)
    console = Console(highlight=False)
    console.print(table)
    for name in ("top1", "top5"):
        low, high = result[f"{name}_interval"]
        console.print(
            f"top-{name[3]} {result[name]:.2%} of {result['pictures']} pictures; "
            f"95 % interval {low:.2%} to {high:.2%}"
        )
    if "top1_among_all" in result:
        console.print(
            f"scored among the {result['classes']} classes that the data has; among all "
            f"{result['model_classes']} of the model top-1 is {result['top1_among_all']:.2%}"
        )
    if "real_top1" in result:
        console.print(f"by the reassessed labels top-1 is {result['real_top1']:.2%}")
    console.print(
        f"calibration error {result['ece']:.2%} in 15 bins; {result['nll']:.3f} nats a picture"
    )
    if result["matched_by"] != "name":
        console.print(f"classes matched by {result['matched_by']}")
    console.print(
        f"prepared as {result['preset']}: {words(ImageSpec(**result['preprocessing']))}",
        soft_wrap=True,
    )
