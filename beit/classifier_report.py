"""What a classifier's page shows: how it went, how good it is, what it gets wrong, what is there twice.

Each function adds a section to a `report.Page`; a command calls those for which it has the numbers.

Shapes: n pictures, C classes; logits float32 (n, C); truth int64 (n,), or bool (n, C) where pictures have
several labels.
"""

from __future__ import annotations

import csv
import html
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit.atomic import write_atomically
from beit.data import ImageSource
from beit.image import BadImage
from beit.metrics import (
    accuracy_interval,
    average_precision,
    calibration,
    confusion_matrix,
    log_softmax,
    most_confused,
    negative_log_likelihood,
    top_k_right,
)
from beit.report import Page
from beit.visualize import data_tag, img_tag, line_chart

MANY = 50  # classes: beyond, pairs are listed instead of the whole matrix, and the worst classes only
SHOWN_MISTAKES = 24
SHOWN_GROUPS = 30
WORST_CLASSES = 30
TILE = 112  # pixels
LABEL = 17  # letters of a class beside the matrix
VERSIONS = ("beit", "torch", "numpy", "pillow")


@dataclass(frozen=True, eq=False)
class Answers:
    """Pictures, the truth about them, and what a classifier says."""

    source: ImageSource
    truth: np.ndarray
    logits: np.ndarray
    classes: Sequence[str]

    @property
    def several(self) -> bool:
        """Whether a picture may have several labels."""
        return self.truth.ndim == 2


# --- How it was made -----------------------------------------------------------------------------


def about(page: Page, settings: Mapping[str, object], facts: Mapping[str, object], command: str) -> None:
    """Settings, versions, hash of the data, and the command that does it again."""
    page.section("How it was made", "This command does it again:")
    page.code(command)
    rows = [*facts.items(), *((name, version(name)) for name in VERSIONS)]
    page.table(("", ""), [*rows, ("python", platform.python_version())])
    page.details("All settings", "\n".join(f"{key} = {value}" for key, value in settings.items()))


def curves(
    page: Page, metrics: Sequence[Mapping[str, Any]], looks: Mapping[int, Mapping[str, float]],
    best: int | None, several: bool,
) -> None:  # fmt: skip
    """Loss, accuracy and learning rate over the steps."""
    if not metrics:
        return
    text = (
        "Training pictures are cropped at random, and mixed where asked for; validation ones are whole."
    )
    if best is not None:
        text += f" The weights of step {best} are kept."
    page.section("Curves", text)

    def line(key: str) -> list[tuple[float, float]]:
        return [(m["step"], m[key]) for m in metrics if m.get(key) is not None]

    def watched(key: str) -> list[tuple[float, float]]:
        return [(step, look[key]) for step, look in sorted(looks.items())]

    right, judged = {"training": line("train_accuracy")}, {"validation": watched("accuracy")}
    charts = {"accuracy": {**right, **judged}}
    if several:  # two measures: of yes and no nine in ten are right where every answer is no
        charts = {
            "share of yes and no right, training": right, "mean average precision, validation": judged,
        }  # fmt: skip
    page.charts(
        [
            line_chart({"training": line("loss"), "validation": watched("loss")}, "step", "loss, nats"),
            *(line_chart(lines, "step", what) for what, lines in charts.items()),
            line_chart({"": line("lr")}, "step", "learning rate"),
        ]
    )


def augmented(page: Page, pictures: Sequence[np.ndarray]) -> None:
    """A batch as the network saw it, uint8 pictures of one size."""
    page.section("A batch as the network saw it", "Cropped, mirrored, changed and mixed as in training.")
    page.tiles([(tile(picture, "augmented picture"), "", "") for picture in pictures[:16]])


# --- How good it is ------------------------------------------------------------------------------


def how_good(page: Page, answers: Answers, note: str = "", calibrated: str = "") -> None:
    """All that answers to labelled pictures show; with a sentence on where they are from, and how sure."""
    headline(page, answers, note)
    confusions(page, answers)
    per_class(page, answers)
    calibration_curve(page, answers, calibrated)
    mistakes(page, answers)


def headline(page: Page, answers: Answers, note: str = "") -> None:
    """Accuracy with its interval, calibration, and how many pictures that is from."""
    logits, truth = answers.logits, answers.truth
    if answers.several:
        each = average_precision(logits, truth)
        page.section("Result", note)
        page.table(
            ("mean average precision", "classes", "pictures"),
            [[f"{np.nanmean(each):.1%}", len(answers.classes), len(truth)]],
        )
        return
    right = top_k_right(logits, truth)
    low, high = accuracy_interval(right)
    page.section("Result", note)
    cells = {
        "right": f"{right.mean():.1%}",
        "95 % interval": f"{low:.1%} to {high:.1%}",
        "pictures": len(truth),
        "classes": len(answers.classes),
        "calibration error": f"{calibration(logits, truth).error:.1%}",
        "nats a picture": f"{negative_log_likelihood(logits, truth):.3f}",
    }
    if len(answers.classes) > 10:
        cells["in the first 5"] = f"{top_k_right(logits, truth, 5).mean():.1%}"
    page.table(("", ""), list(cells.items()))


def confusions(page: Page, answers: Answers) -> None:
    """The confusion matrix; of more than 50 classes the pairs most often confused."""
    if answers.several:
        return
    names = answers.classes
    matrix = confusion_matrix(answers.logits.argmax(axis=1), answers.truth, len(names))
    pairs = most_confused(matrix, 20)
    if len(names) <= MANY:
        page.section(
            "Confusions",
            "A row is a class, a column an answer. Blue is right, red wrong; numbers count.",
        )
        page.figure(matrix_chart(matrix, names), "")
    else:
        page.section("Confusions", f"The pairs most often confused of {len(names)} classes.")
        page.table(
            ("class", "taken for", "times"), [(names[i], names[j], often) for i, j, often in pairs]
        )


def matrix_chart(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A confusion matrix as an SVG element, shaded by the share of each row."""
    count = len(names)
    cell = max(14, min(44, 620 // count))
    longest = max(len(short(name, LABEL)) for name in names)
    left, top = 14 + 7 * longest, 18 + 5 * longest  # the names above are turned
    size = left + count * cell + 4 * longest, top + count * cell + 6
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    parts = [
        f'<svg viewBox="0 0 {size[0]} {size[1]}" style="min-width:{min(size[0], left + 26 * count)}px;'
        f'max-width:{size[0]}px" role="img" aria-label="confusion matrix">'
    ]
    for i, name in enumerate(names):
        label, y = html.escape(short(name, LABEL)), top + i * cell + cell / 2 + 4
        x = left + i * cell + cell / 2
        parts.append(f'<text x="{left - 6}" y="{y:.0f}" text-anchor="end">{label}</text>')
        turn = f"rotate(-50 {x:.0f} {top - 8})"
        parts.append(f'<text x="{x:.0f}" y="{top - 8}" transform="{turn}">{label}</text>')
    for i, j in zip(*np.nonzero(matrix), strict=True):
        x, y = left + j * cell, top + i * cell
        colour = "#2563eb" if i == j else "#dc2626"
        strength = 0.15 + 0.85 * share[i, j]
        told = html.escape(f"{names[i]}, answered {names[j]}: {matrix[i, j]}")
        parts.append(
            f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{colour}" '
            f'fill-opacity="{strength:.2f}"><title>{told}</title></rect>'
        )
        if cell >= 20:
            ink = "#fff" if strength > 0.55 else "var(--ink)"
            parts.append(
                f'<text x="{x + cell / 2:.0f}" y="{y + cell / 2 + 4:.0f}" text-anchor="middle" '
                f'style="fill:{ink}">{matrix[i, j]}</text>'
            )
    return "".join([*parts, "</svg>"])


def per_class(page: Page, answers: Answers) -> None:
    """Of each class its pictures, how many are found, and what else it is called; the worst first."""
    names = answers.classes
    if answers.several:
        each = average_precision(answers.logits, answers.truth)
        order = np.argsort(np.nan_to_num(each, nan=2))
        text = "Each is a question of its own; the hardest first."
        if len(names) > MANY:
            text += f" {WORST_CLASSES} of {len(names)}."
            order = order[:WORST_CLASSES]
        page.section("Classes", text)
        page.table(
            ("class", "pictures", "average precision"),
            [(names[c], int(answers.truth[:, c].sum()), percent(each[c])) for c in order.tolist()],
        )
        return
    matrix = confusion_matrix(answers.logits.argmax(axis=1), answers.truth, len(names))
    counts, answered, right = matrix.sum(axis=1), matrix.sum(axis=0), np.diag(matrix)
    found = np.where(counts, right / np.maximum(counts, 1), np.nan)
    exact = np.where(answered, right / np.maximum(answered, 1), np.nan)
    order = np.argsort(np.nan_to_num(found, nan=2), kind="stable")
    text = "The hardest first. Found: of the pictures of a class; exact: of the answers that name it."
    if len(names) > MANY:
        text += f" {WORST_CLASSES} of {len(names)}."
        order = order[:WORST_CLASSES]
    wrong = matrix - np.diag(right)
    rows = []
    for c in order.tolist():
        worst = int(wrong[c].argmax())
        taken = f"{names[worst]} ({wrong[c, worst]})" if wrong[c, worst] else ""
        rows.append((names[c], counts[c], percent(found[c]), percent(exact[c]), taken))
    page.section("Classes", text)
    page.table(("class", "pictures", "found", "exact", "most often taken for"), rows)


def calibration_curve(page: Page, answers: Answers, note: str = "") -> None:
    """Confidence against the share that is right."""
    if answers.several:
        return
    curve = calibration(answers.logits, answers.truth)
    used = curve.counts > 0
    points = list(zip(curve.confidence[used].tolist(), curve.accuracy[used].tolist(), strict=True))
    page.section(
        "Calibration",
        "Of the answers given with 80 % confidence 80 % should be right: then the curve is the diagonal. "
        f"The mean distance is {curve.error:.1%}. {note}".strip(),
    )
    bars = list(zip(curve.confidence[used].tolist(), (curve.counts[used] / curve.counts.sum()).tolist(),
                    strict=True))  # fmt: skip
    page.charts(
        [
            line_chart({"answers": points, "ideal": [(0, 0), (1, 1)]}, "confidence", "share right"),
            line_chart({"": bars}, "confidence", "share of the answers"),
        ]
    )


# --- What it gets wrong --------------------------------------------------------------------------


def mistakes(page: Page, answers: Answers) -> None:
    """The wrong answers given with the most confidence."""
    if answers.several:
        losses = np.logaddexp(0, np.where(answers.truth, -answers.logits, answers.logits)).mean(axis=1)
        worst = np.argsort(-losses, kind="stable")[:SHOWN_MISTAKES].tolist()
        told = {i: _answers_in_words(answers, i) for i in worst}
        page.section("The worst mistakes", "The pictures whose labels surprise the model most.")
    else:
        probability = np.exp(log_softmax(answers.logits))
        answer = answers.logits.argmax(axis=1)
        sure = np.where(answer == answers.truth, -1, probability[np.arange(len(answer)), answer])
        worst = [i for i in np.argsort(-sure, kind="stable")[:SHOWN_MISTAKES].tolist() if sure[i] >= 0]
        names = answers.classes
        told = {
            i: f"{names[answers.truth[i]]} → {names[int(answer[i])]}, {sure[i]:.0%} sure" for i in worst
        }
        total = int((answer != answers.truth).sum())
        page.section(
            "The worst mistakes",
            f"{len(worst)} of {total} wrong answers, the surest first: label → answer."
            if total
            else "There is none: every answer is right.",
        )
    page.tiles(
        [(picture_of(answers.source, i), told[i], file_name(answers.source.name(i))) for i in worst]
    )


def _answers_in_words(answers: Answers, index: int) -> str:
    names, truth, logits = answers.classes, answers.truth[index], answers.logits[index]
    missed = [names[c] for c in np.flatnonzero(truth & (logits <= 0)).tolist()]
    added = [names[c] for c in np.flatnonzero(~truth & (logits > 0)).tolist()]
    parts = [f"misses {', '.join(missed)}" * bool(missed), f"adds {', '.join(added)}" * bool(added)]
    return "; ".join(part for part in parts if part) or "right, but unsure"


# --- What is wrong with the data -----------------------------------------------------------------


def same_pictures(
    page: Page,
    groups: Sequence[tuple[str, Sequence[str]]],
    rest: str = "`beit check` lists all exact ones",
) -> None:
    """Groups of pictures that are the same: what is to know of each, and their names; where the rest is."""
    page.section(
        "Pictures that are there twice",
        "Copies are kept on one side of a split that was made here. Where some lie in both parts of one "
        "that was given, the result is too good; where they have two labels, one is wrong."
        if groups
        else "None, as far as pixels and thumbnails tell.",
    )
    rows = [(names[0], "; ".join(map(file_name, names[1:])), what) for what, names in groups]
    if rows:
        page.table(("picture", "is also", ""), rows[:SHOWN_GROUPS])
    if len(rows) > SHOWN_GROUPS:
        page.note(f"and {len(rows) - SHOWN_GROUPS} more; {rest}")


def write_same_pictures(file: Path, groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    """A .csv of all of them: path, the number of its group, what is to know of that."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "group", "note"])
    for number, (what, names) in enumerate(groups, 1):
        writer.writerows((name, number, what) for name in names)
    write_atomically(file, text.getvalue().encode(errors="surrogateescape"))


# --- Words and pictures ----------------------------------------------------------------------------


def percent(value: float) -> str:
    """A share for people; nothing for one that does not exist."""
    return "" if np.isnan(value) else f"{value:.1%}"


def short(text: str, most: int) -> str:
    """A text, cut where it is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def file_name(name: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(name).parts[-2:])


def picture_of(source: ImageSource, index: int) -> str:
    """A picture as an element; an empty tile where it cannot be read."""
    try:
        return tile(source.read(index), file_name(source.name(index)))
    except BadImage:
        return img_tag(Image.new("RGB", (TILE, TILE), "#9ca3af"), "cannot be read")


def tile(image: np.ndarray, alt: str) -> str:
    """A picture, uint8 (H, W, 3), as an element of some kilobytes: JPEG, its larger side 112 pixels.

    Smaller ones are enlarged by whole pixels.
    """
    picture = Image.fromarray(image)
    scale = TILE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    stream = io.BytesIO()
    picture.resize(size, how).save(stream, format="JPEG", quality=85)
    return data_tag(stream.getvalue(), "jpeg", alt)
