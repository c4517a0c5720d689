"""`beit evaluate`: how often a classifier is right, how sure it may be, and what it takes for what.

The logits are the engine's. Classes are matched by name; a set that has only some of the model's classes,
such as ImageNet-A, is scored among those, and the report says so.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beit.atomic import check_place, not_there, write_atomically
from beit.classifier_report import MANY, Answers, about, how_good, same_pictures
from beit.data import ImageSource, SomeSkipped, TooManyBadImages, has_split, open_source
from beit.engine import Engine
from beit.graphs import is_graph
from beit.hub import model_files, synsets
from beit.image import ImageSpec, Preset, preset_spec
from beit.label_review import label_errors, suspects_of
from beit.labelled import Side, in_order, with_truth
from beit.metrics import (
    accuracy_interval,
    average_precision,
    calibration,
    confusion_matrix,
    most_confused,
    negative_log_likelihood,
    real_accuracy,
    top_k_right,
)
from beit.names import printable
from beit.plural import counted
from beit.precision import Precision
from beit.probe import review_labels, review_several
from beit.ranges import Share
from beit.report import Page
from beit.settings import command_line, describe_settings
from beit.split import MOST_LOOKED_AT, Looked, data_hash, look, real_place
from beit.validation import score


@Parameter(name="*")
@dataclass(frozen=True)
class Evaluate:
    data: Path
    """Folder with one sub-folder a class, or with train/ and val/ of such, or val/ alone; or a .csv of
    path,label, such as the split.csv of a run that held pictures out."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, or a name that `beit models` lists."""
    split: str = "val"
    """Folder of DATA to score, where it has train/ and others; of a .csv its rows of that part."""
    img_size: PositiveInt | None = None
    """Pixels a side that the model sees, if not its own: its tables of positions are resized."""
    preset: Preset | None = None
    """Prepare pictures by the rule of another code instead of the model's own."""
    real_labels: Path | None = None
    """ImageNet's reassessed labels: a .json with a list of class numbers for each validation picture."""
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """Write all numbers to this .json as well."""
    report: Path | None = None
    """Write a page to this .html: confusions, calibration, the worst mistakes, labels that look wrong; all
    labels, the most doubtful first, to PAGE_label_review.csv beside it."""
    max_bad_images: Share = 0.01
    """Share of the pictures that may be unreadable, one at least unless 0; they are left out. More end with
    exit code 4."""
    batch_size: PositiveInt = 64
    precision: Precision = "fp32"
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""
    json: bool = False
    """Print one JSON line instead of a table."""


def evaluate(settings: Evaluate) -> dict[str, Any]:
    """Score a classifier on labelled pictures."""
    read = [*model_files(settings.model), settings.data, settings.real_labels or settings.data]
    check_place(settings.out, read, ".json")
    check_place(settings.report, ending=".html")
    engine = Engine(
        settings.model,
        "auto" if is_graph(settings.model) else "torch",
        settings.precision,
        device=settings.device,
        batch_size=settings.batch_size,
        img_size=settings.img_size,
    )
    if settings.preset is not None:
        engine.model.image_spec = preset_spec(
            engine.model.image_spec, settings.preset, engine.model.config.embed_dim
        )
    opened = open_source(settings.data, settings.split, labelled=True)
    opened_side = with_truth(opened, settings.data, engine.several_labels)
    side, matched_by = in_the_models_words(engine, settings, opened_side)
    known, warning = trained_on(engine, settings, opened_side.source)
    if warning:
        print(warning, file=sys.stderr)
    logits, bad = engine.readable_logits_of(side.source)
    for one in bad:
        print(printable(f"{one.path}: {one.reason}"), file=sys.stderr)
    told = f"{len(bad):,} of {counted(len(side.source), 'picture')} could not be read"
    if not len(logits):
        raise TooManyBadImages(told)
    allowed = math.ceil(settings.max_bad_images * len(side.source))
    side = side.some(np.delete(np.arange(len(side.source)), [b.sample for b in bad]))

    often = Counter(engine.labels)
    classes = [f"{n} ({i})" if often[n] > 1 else n for i, n in enumerate(engine.labels)]
    answers = Answers(side.source, side.truth, logits, classes)
    if not answers.several:
        answers = among_present(answers)
    result: dict[str, Any] = {
        **(scores_of_several(answers) if answers.several else scores(answers)),
        "pictures": len(side.source),
        "trained_on": known,
        "bad_images": [{"path": b.path, "reason": b.reason} for b in bad],
        "classes": len(answers.classes),
        "model_classes": len(classes),
        "classes_without_pictures": without_pictures(side, engine.labels),
        "matched_by": matched_by,
        "preset": settings.preset or "the model's own",
        "preprocessing": asdict(engine.model.image_spec),
    }
    if len(answers.classes) < len(classes):
        result["top1_among_all"] = float(top_k_right(logits, side.truth).mean())
    if settings.real_labels is not None:
        accepted = real_labels(settings.real_labels, side.source, len(classes))
        result["real_top1"] = real_accuracy(logits.argmax(axis=1), accepted)
    if settings.json:
        print(json.dumps(result))
    elif answers.several:
        show_several(result, settings, answers)
    else:
        show(result, settings, confusion_of(answers), answers.classes)
    if settings.out is not None:
        document = {
            "beit": version("beit"),
            "settings": asdict(settings),
            **result,
            "class_names": answers.classes,
            **({} if answers.several else curves(answers)),
        }
        write_atomically(settings.out, json.dumps(document, default=str, indent=1).encode() + b"\n")
    if settings.report is not None:
        notes = f"{warning}. " * bool(warning) + f"Prepared as {result['preset']}."
        write_page(settings.report, settings, answers, notes)
    if len(bad) > allowed:
        raise TooManyBadImages(f"{told}, where {allowed} may; mend them, or raise --max-bad-images")
    if bad:
        raise SomeSkipped(f"{told}; they are left out")
    return result


def trained_on(engine: Engine, settings: Evaluate, source: ImageSource) -> tuple[int, str]:
    """How many of the pictures the model has learned from, and a warning that tells what to score."""
    run, count, apart = Path(settings.model), 0, ""
    if (run / "split.csv").is_file():
        scored = [real_place(source.name(i)) for i in range(len(source))]
        learned = places_of(run / "split.csv", "train")
        count = sum(place in learned for place in scored)
        knew = engine.model.provenance.get("start_knew_val")
        if knew and not count and not places_of(run / "split.csv", "val").isdisjoint(scored):
            return 0, (
                f"{settings.model} was begun from one that had learned from some of the pictures held out, "
                "which makes the numbers too good"
            )
        again = shlex.join(["beit", "evaluate", str(run / "split.csv"), "-m", str(run)])
        apart = f"; those that were held out: {again}"
    elif not is_graph(settings.model):
        same = engine.model.provenance.get("train_hash") == data_hash([source], None)
        count = len(source) if same else 0
        apart = "; give pictures that it has not seen"
        if settings.split != "val" and has_split(settings.data, "val"):
            again = shlex.join(["beit", "evaluate", str(settings.data), "-m", settings.model])
            apart = f"; others: {again}"
    if not count:
        return 0, ""
    told = (
        f"{count:,} of {counted(len(source), 'picture')} are those that {settings.model} was trained on"
    )
    return count, f"{told}, which makes the numbers too good{apart}"


def places_of(split: Path, part: str) -> set[str]:
    """The pictures of a part of a split.csv, each by one path."""
    source = open_source(split, part)
    return {real_place(source.name(i)) for i in range(len(source))}


def in_the_models_words(engine: Engine, settings: Evaluate, side: Side) -> tuple[Side, str]:
    """The pictures, their labels numbered as the model's, and by what the classes were matched."""
    if side.truth.ndim == 1:
        matched_by, names = as_the_data_says(engine.labels, side.source)
        source = side.source.with_classes(names)
        if settings.real_labels is not None:  # refuses what does not fit, before the work
            real_labels(settings.real_labels, source, len(names))
        return Side(source, source.labels), matched_by
    if not engine.several_labels:
        raise ValueError(
            f"{settings.data} has several labels a picture, and {settings.model} gives one; fine-tune on "
            "pictures with several"
        )
    if settings.real_labels is not None:
        raise ValueError("--real-labels is for ImageNet, whose pictures have one label each")
    return in_order(side, tuple(engine.labels), settings.data, "the model"), "name"


def without_pictures(side: Side, labels: Sequence[str]) -> list[str]:
    """The classes of which there is no picture."""
    count = len(labels)
    several = side.truth.ndim == 2
    often = side.truth.sum(axis=0) if several else np.bincount(side.truth, minlength=count)
    return [name for name, number in zip(labels, often.tolist(), strict=True) if not number]


def among_present(answers: Answers) -> Answers:
    """The answers among those classes that have pictures; all where only one has: it would be right."""
    present = np.unique(answers.truth)
    if not 1 < len(present) < len(answers.classes):
        return answers
    truth, classes = np.searchsorted(present, answers.truth), [answers.classes[i] for i in present]
    return Answers(answers.source, truth, answers.logits[:, present], classes)


def confusion_of(answers: Answers) -> np.ndarray:
    """int64 (C, C): rows are classes, columns answers."""
    return confusion_matrix(answers.logits.argmax(axis=1), answers.truth, len(answers.classes))


def scores(answers: Answers) -> dict[str, Any]:
    """How often the model is right, and how sure it may be."""
    logits, labels, classes = answers.logits, answers.truth, answers.classes
    right, right5 = top_k_right(logits, labels, 1), top_k_right(logits, labels, 5)
    confusion = confusion_of(answers)
    counts = confusion.sum(axis=1)
    return {
        "top1": float(right.mean()),
        "top1_interval": accuracy_interval(right),
        "top5": float(right5.mean()),
        "top5_interval": accuracy_interval(right5),
        "nll": negative_log_likelihood(logits, labels),
        "ece": calibration(logits, labels).error,
        "per_class": {n: float(confusion[i, i] / counts[i]) for i, n in enumerate(classes) if counts[i]},
        "most_confused": [(classes[i], classes[j], often) for i, j, often in most_confused(confusion)],
    }


def scores_of_several(answers: Answers) -> dict[str, Any]:
    """The same where each class is a question of its own; the score is finetune's."""
    each = average_precision(answers.logits, answers.truth)
    told = score(answers.logits, answers.truth)
    yes = answers.logits.reshape(-1, 1)  # each answer, of two classes: no, whose logit is 0, and yes
    answered = calibration(
        np.concatenate([np.zeros_like(yes), yes], 1), answers.truth.ravel().astype(int)
    )
    return {
        "mean_average_precision": told["accuracy"],
        "binary_cross_entropy": told["loss"],
        "ece": answered.error,
        "per_class": {
            name: float(value)
            for name, value in zip(answers.classes, each, strict=True)
            if not np.isnan(value)
        },
    }


def curves(answers: Answers) -> dict[str, Any]:
    """The calibration curve, and the confusion matrix where it is not too large."""
    curve, whole = calibration(answers.logits, answers.truth), len(answers.classes) <= MANY
    return {
        "calibration": {key: value.tolist() for key, value in curve._asdict().items()},
        "confusion": confusion_of(answers).tolist() if whole else None,
    }


def write_page(file: Path, settings: Evaluate, answers: Answers, notes: str) -> None:
    """The page: what is right, what is wrong, and what is wrong with the pictures."""
    page = Page(f"{settings.model} on {settings.data}", "A classifier, scored by beit evaluate.")
    how_good(page, answers, notes)
    truth = torch.from_numpy(answers.truth)
    logits = torch.from_numpy(answers.logits).double()
    if answers.several:
        review = review_several(logits.sigmoid(), truth)
    else:
        review = review_labels(logits.softmax(dim=1), truth)
    pictures = [(answers.source, number) for number in range(len(truth))]
    suspects = suspects_of(pictures, truth, answers.classes, review)
    label_errors(
        page,
        file.with_name(f"{file.stem}_label_review.csv"),  # beside a run's own
        suspects,
        "Judged by the classifier itself, if it has not learned these labels.",
    )
    looked = None
    if len(truth) <= MOST_LOOKED_AT:
        looked = look(answers.source, 2)
        same_pictures(page, same_of(answers, looked))
    facts = {"pictures": len(truth), "data hash": data_hash([answers.source], looked)}
    about(page, describe_settings(settings), facts, command_line(settings))
    page.write(file)
    print(f"the page: {file}", file=sys.stderr)


def same_of(answers: Answers, looked: Looked) -> list[tuple[str, list[str]]]:
    """Groups of pictures with equal pixels, those with two labels first."""
    groups = []
    source = answers.source
    for group in looked.exact():
        labels = sorted({source.classes[source.labels[i]] for i in group})
        two = len(labels) > 1 and not answers.several
        note = f"two labels: {', '.join(labels)}; equal pixels" if two else "equal pixels"
        groups.append((not two, note, [source.name(i) for i in group]))
    return [(note, names) for _, note, names in sorted(groups)]


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
        words = unicodedata.normalize("NFC", label).split(",")
        return {word.strip().replace("_", " ").casefold() for word in words}

    often = Counter(word for label in labels for word in synonyms(label))
    meant = {word: name for name in present for word in synonyms(name) if often[word] == 1}
    return [next((meant[word] for word in synonyms(label) if word in meant), label) for label in labels]


def real_labels(file: Path, source: ImageSource, num_classes: int) -> list[list[int]]:
    """The accepted classes of each picture, from a list over ImageNet's 50,000 validation pictures."""
    if not file.exists():
        raise ValueError(f"--real-labels {not_there(file)}")
    try:
        lists = json.loads(file.read_bytes())
    except ValueError:
        lists = None
    if not isinstance(lists, list) or not all(
        isinstance(numbers, list) and all(isinstance(number, int) for number in numbers)
        for numbers in lists
    ):
        raise ValueError(
            f"--real-labels {file} is not the reassessed labels: a .json with a list of class numbers for "
            "each validation picture, [[65], [970, 795], ...]; ReaL's real.json is such"
        )
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


def cut(name: str) -> Text:
    """A name in a table, of which a narrow terminal shows what fits: a column that may not wrap would take
    the room of the numbers."""
    return Text(printable(name), no_wrap=True, overflow="ellipsis")


def show_several(result: dict[str, Any], settings: Evaluate, answers: Answers) -> None:
    """The same of several labels a picture."""
    table = Table(title=Text(f"{settings.model} on {settings.data}"))
    table.add_column("class")
    table.add_column("pictures", justify="right", no_wrap=True)
    table.add_column("average precision", justify="right", no_wrap=True)
    counts = dict(zip(answers.classes, answers.truth.sum(axis=0).tolist(), strict=True))
    shown = result["per_class"]
    if len(shown) > MANY:
        table.caption = f"the 20 worst of {len(shown)} classes; -o FILE has all"
        shown = dict(sorted(shown.items(), key=lambda row: row[1])[:20])
    for name, value in shown.items():
        table.add_row(cut(name), str(counts[name]), f"{value:.1%}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"mean average precision {result['mean_average_precision']:.2%} on "
        f"{counted(result['pictures'], 'picture')}, of {counted(len(result['per_class']), 'class')}"
    )
    console.print(
        f"calibration error {result['ece']:.2%} in 15 bins; {result['binary_cross_entropy']:.3f} nats an "
        "answer"
    )
    console.print(
        f"prepared as {result['preset']}: {words(ImageSpec(**result['preprocessing']))}",
        soft_wrap=True,
    )


def show(
    result: dict[str, Any], settings: Evaluate, confusion: np.ndarray, classes: Sequence[str]
) -> None:
    """The results as a table and some lines, for people."""
    table = Table(title=Text(f"{settings.model} on {settings.data}"))
    table.add_column("class")
    table.add_column("pictures", justify="right", no_wrap=True)
    table.add_column("right", justify="right", no_wrap=True)
    table.add_column("most often taken for")
    wrong = confusion - np.diag(np.diag(confusion))
    counts = confusion.sum(axis=1)
    shown = [i for i in range(len(classes)) if counts[i]]
    if len(shown) > MANY:
        table.caption = f"the 20 worst of {len(shown)} classes; -o FILE has all"
        shown = sorted(shown, key=lambda i: confusion[i, i] / counts[i])[:20]
    for i in shown:
        worst = int(wrong[i].argmax())
        taken = f"{classes[worst]} ({wrong[i, worst]})" if wrong[i, worst] else ""
        right = f"{confusion[i, i] / counts[i]:.1%}"
        table.add_row(cut(classes[i]), str(counts[i]), right, cut(taken))
    console = Console(highlight=False)
    console.print(table)
    for name in ("top1", "top5"):
        low, high = result[f"{name}_interval"]
        console.print(
            f"top-{name[3]} {result[name]:.2%} of {counted(result['pictures'], 'picture')}; "
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
