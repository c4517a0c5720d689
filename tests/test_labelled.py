"""Labelled pictures: one label each or several, validation pictures given or held out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shapes

from beit.labelled import open_labelled


def csv_file(file: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    return file


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_shapes(tmp_path, 8, seed=0)


def test_labels_with_semicolons_and_in_several_rows_are_the_same(pictures: Path) -> None:
    one = [(f"disc/{n:02d}.png", "red;round" if n % 2 else "round") for n in range(8)]
    rows = [
        (f"disc/{n:02d}.png", word)
        for n in range(8)
        for word in (("red", "round") if n % 2 else ("round",))
    ]
    first, second = (
        open_labelled(csv_file(pictures / name, lines), None, 0, 0, 0)
        for name, lines in (("a.csv", one), ("b.csv", rows))
    )
    for found in (first, second):
        assert found.several
        assert found.classes == ("red", "round")
        assert found.val is None
        assert found.train.truth.tolist() == [[bool(n % 2), True] for n in range(8)]
        assert found.train.source.labels.tolist() == [1, 0] * 4  # the rarer of each


def test_one_label_a_picture_stays_one(pictures: Path) -> None:
    rows = [(f"{shape}/{n:02d}.png", shape) for shape in ("disc", "square") for n in range(8)]
    found = open_labelled(csv_file(pictures / "a.csv", [*rows, rows[3]]), None, 0, 0, 0)
    assert not found.several
    assert found.train.truth.tolist() == [0] * 8 + [1] * 8


def test_validation_labels_are_matched_by_name(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = csv_file(pictures / "a.csv", [(f"disc/{n:02d}.png", "b;c" if n else "a") for n in range(8)])
    val = csv_file(pictures / "v.csv", [("square/00.png", "c"), ("square/01.png", "b;a")])
    found = open_labelled(train, val, None, 0, 0)
    assert found.val is not None
    assert found.val.truth.tolist() == [[False, False, True], [True, True, False]]
    assert "no picture of" not in capsys.readouterr().err
    assert not found.held_out


def test_held_out_pictures_are_a_fifth_of_each_class(pictures: Path) -> None:
    found = open_labelled(pictures, None, 0.25, 0, 0)
    assert found.held_out
    assert np.bincount(found.val.truth).tolist() == [2, 2, 2]
    assert np.bincount(found.train.truth).tolist() == [6, 6, 6]
    names = [{side.source.name(i) for i in range(len(side.source))} for side in (found.train, found.val)]
    assert names[0].isdisjoint(names[1])


@pytest.mark.parametrize(
    ("rows", "val", "cause"),
    [
        ([("disc/00.png", "a;"), ("disc/01.png", "b")], None, "has the label 'a;'; give names with ;"),
        ([("disc/00.png", "a;b"), ("disc/01.png", "b")], [("disc/02.png", "c")], "does not know: c"),
        ([("disc/00.png", "a"), ("disc/01.png", "a")], None, "has one class (a)"),
        ([("disc/00.png", "a"), ("disc/01.png", "b")], [("disc/02.png", "c")], "does not know: c"),
    ],
)
def test_labels_that_cannot_be_are_named(
    pictures: Path, rows: list, val: list | None, cause: str
) -> None:
    train = csv_file(pictures / "a.csv", rows)
    other = csv_file(pictures / "v.csv", val) if val else None
    with pytest.raises(ValueError, match=re.escape(cause)):
        open_labelled(train, other, None, 0, 0)


def test_several_labels_are_validated_on_several(pictures: Path) -> None:
    train = csv_file(pictures / "a.csv", [("disc/00.png", "a;b"), ("disc/01.png", "b")])
    with pytest.raises(ValueError, match="one label a picture, the training pictures several"):
        open_labelled(train, pictures, None, 0, 0)


def test_a_class_with_a_semicolon_in_its_name_is_refused(pictures: Path) -> None:
    (pictures / "disc").rename(pictures / "a;b")
    with pytest.raises(ValueError, match=r"has the class 'a;b', and in lists a ; stands between labels"):
        open_labelled(pictures, None, 0, 0, 0)


def test_the_rarest_label_of_each_picture_is_the_first_of_equally_rare_ones(pictures: Path) -> None:
    said = ["a;b", "a;c", "a;b", "b;c", "a", "c", "b;a", "c"]  # a 5, b 4, c 4
    rows = [(f"disc/{n:02d}.png", label) for n, label in enumerate(said)]
    found = open_labelled(csv_file(pictures / "a.csv", rows), None, 0, 0, 0)
    assert [found.classes[label] for label in found.train.source.labels] == list("bcbbacbc")


def test_a_list_may_have_more_combinations_of_labels_than_a_folder_has_classes(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beit.listing.MAX_CLASSES", 2)
    rows = [(f"disc/{n:02d}.png", label) for n, label in enumerate(["a", "b", "a;b", "c", "a;c"])]
    found = open_labelled(csv_file(pictures / "a.csv", rows), None, 0, 0, 0)
    assert found.classes == ("a", "b", "c")
