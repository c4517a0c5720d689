"""The page about a classifier: every number is that of `metrics`, every picture that of the mistake."""

from __future__ import annotations

import csv
import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shapes
from PIL import Image

from beit.classifier_report import (
    Answers,
    augmented,
    calibration_curve,
    confusions,
    curves,
    headline,
    how_good,
    mistakes,
    per_class,
    same_pictures,
)
from beit.data import ImageSource, open_source
from beit.label_review import label_errors, suspects_of
from beit.metrics import calibration, confusion_matrix, top_k_accuracy
from beit.probe import review_labels
from beit.report import Page
from beit.split import take

NAMES = ("disc", "square", "<triangle>")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return open_source(write_shapes(tmp_path_factory.mktemp("data"), 10, seed=0))


@pytest.fixture(scope="module")
def answers(source: ImageSource) -> Answers:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((30, 3)).astype(np.float32) + 2 * np.eye(3)[source.labels]
    return Answers(source, source.labels, logits.astype(np.float32), NAMES)


def text_of(page: Page) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page.html()))


def test_the_numbers_are_those_of_the_metrics(answers: Answers) -> None:
    page = Page("t", "l")
    headline(page, answers)
    calibration_curve(page, answers)
    text = text_of(page)
    assert f"{top_k_accuracy(answers.logits, answers.truth):.1%}" in text
    assert f"The mean distance is {calibration(answers.logits, answers.truth).error:.1%}" in text


def test_the_matrix_counts_every_picture(answers: Answers) -> None:
    page = Page("t", "l")
    confusions(page, answers)
    matrix = confusion_matrix(answers.logits.argmax(axis=1), answers.truth, 3)
    titles = re.findall(r"<title>(.*?), answered (.*?): (\d+)</title>", page.parts[-1])
    found = np.zeros((3, 3), dtype=int)
    for one, other, often in titles:
        found[NAMES.index(html.unescape(one)), NAMES.index(html.unescape(other))] = int(often)
    assert np.array_equal(found, matrix)
    assert "<triangle>" not in page.html()


def test_beyond_fifty_classes_the_pairs_and_the_worst_are_listed(source: ImageSource) -> None:
    names = [f"class {number}" for number in range(60)]
    truth = np.arange(30) * 2
    logits = np.eye(60, dtype=np.float32)[np.where(np.arange(30) < 5, truth + 1, truth)]
    many = Answers(source, truth, logits, names)
    page = Page("t", "l")
    confusions(page, many)
    assert "<svg" not in page.html()
    assert "<tr><td>class 4</td><td>class 5</td><td>1</td></tr>" in page.html()
    per_class(page, many)
    assert "30 of 60" in page.html()


def test_the_surest_mistakes_come_first_and_right_answers_never(answers: Answers) -> None:
    page = Page("t", "l")
    mistakes(page, answers)
    p = torch.from_numpy(answers.logits).softmax(dim=1).numpy()
    wrong = np.flatnonzero(p.argmax(axis=1) != answers.truth)
    order = wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")]
    shown = re.findall(r"<figcaption>(.*?)<small>(.*?)</small>", page.html())
    assert [file for _, file in shown] == [
        "/".join(Path(answers.source.name(i)).parts[-2:]) for i in order
    ]
    i = order[0]
    given, said = NAMES[answers.truth[i]], NAMES[p[i].argmax()]
    assert html.unescape(shown[0][0]) == f"{given} → {said}, {p[i].max():.0%} sure"


def test_no_mistakes_are_said_to_be_none(source: ImageSource) -> None:
    page = Page("t", "l")
    mistakes(page, Answers(source, source.labels, np.eye(3, dtype=np.float32)[source.labels], NAMES))
    assert "every answer is right" in page.html()
    assert "<img" not in page.html()


def test_a_planted_label_error_is_first_with_neighbours_that_agree(
    source: ImageSource, tmp_path: Path
) -> None:
    labels = torch.from_numpy(source.labels.copy())
    labels[4] = 2  # a disc
    features = torch.eye(3)[torch.from_numpy(source.labels)]
    features[7] += torch.tensor([0.0, 0.1, 0.0])  # a little farther
    probability = 0.1 + 0.7 * torch.eye(3, dtype=torch.float64)[torch.from_numpy(source.labels)]
    pictures = [(source, i) for i in range(30)]
    suspects = suspects_of(pictures, labels, NAMES, review_labels(probability, labels), features)
    first = suspects[0]
    assert (first.number, first.given, first.suggested) == (4, "<triangle>", "disc")
    assert first.confidence == pytest.approx(0.8)
    assert len(first.alike) == 3
    assert all(labels[i] == 0 and i != 7 for _, i in first.alike)
    page = Page("t", "l")
    label_errors(page, tmp_path / "review.csv", suspects, "Judged.")
    assert page.html().count("<img") == 4  # the picture and its neighbours; no other is contradicted
    with (tmp_path / "review.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 30
    assert rows[0] == {
        "path": source.name(4), "label": "<triangle>", "suggested": "disc", "confidence": "0.8000",
    }  # fmt: skip


def test_several_labels_are_told_by_what_is_missed_and_added(source: ImageSource) -> None:
    truth = np.zeros((30, 3), dtype=bool)
    truth[:, 0] = True
    logits = np.where(truth, 5.0, -5.0).astype(np.float32)
    logits[3] = [-4.0, 4.0, -4.0]
    page = Page("t", "l")
    several = Answers(source, truth, logits, ("a", "b", "c"))
    for section in (headline, confusions, per_class, calibration_curve, mistakes):
        section(page, several)
    assert "misses a; adds b" in page.html()
    assert "mean average precision" in page.html()
    assert "<svg" not in page.html()


def test_curves_are_left_out_where_nothing_was_trained() -> None:
    page = Page("t", "l")
    curves(page, [], {}, None, False)
    assert page.parts == []
    curves(page, [{"step": 1, "loss": 1.0, "train_accuracy": 0.5, "lr": 0.1}], {}, 1, False)
    assert page.html().count("<svg") == 3
    assert "step 1 are kept" in page.html()


def test_groups_of_copies_are_listed_up_to_thirty() -> None:
    page = Page("t", "l")
    same_pictures(page, [("equal pixels", [f"a/{n}.png", f"b/{n}.png"]) for n in range(40)])
    assert page.html().count("equal pixels") == 30
    assert "and 10 more" in page.html()
    page = Page("t", "l")
    same_pictures(page, [])
    assert "None, as far as" in page.html()


@pytest.mark.parametrize("count", [50, 1000])
def test_the_largest_page_is_under_five_megabytes(tmp_path: Path, count: int) -> None:
    """Noise is what JPEG makes largest; a matrix of 50 classes with a number in each field."""
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    noise = Image.fromarray(rng.integers(0, 256, (150, 150, 3), dtype=np.uint8))
    noise.save(tmp_path / "a" / f"{'long ' * 30}.png")
    one = open_source(tmp_path)
    many = take(one, np.zeros(5000, dtype=np.int64))
    names = [f"class {n} with quite a long name, and a synonym" for n in range(count)]
    truth = rng.integers(0, count, 5000)
    answers = Answers(many, truth, rng.standard_normal((5000, count), dtype=np.float32), names)
    page = Page("t", "l")
    how_good(page, answers)
    labels = torch.from_numpy(truth)
    probability = torch.from_numpy(answers.logits).double().mul(9).softmax(dim=1)
    review, pictures = review_labels(probability, labels), [(many, n) for n in range(5000)]
    label_errors(
        page,
        tmp_path / "review.csv",
        suspects_of(pictures, labels, names, review, torch.randn(5000, 8)),
        "",
    )
    same_pictures(page, [("equal pixels", [many.name(0)] * 3)] * 5000)
    augmented(page, [np.asarray(noise)] * 16)
    assert page.html().count("<img") > 24 + 12 + 16
    assert len(page.html()) < 5_000_000
