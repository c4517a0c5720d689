"""A validation split: of each class its share, the same from one seed, duplicates on one side."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import beit.split
from beit.data import open_source
from beit.duplicates import duplicates
from beit.listing import Places
from beit.split import data_hash, divide, file_hashes, hold_out, look, real_place, take, write_split


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=6),
    st.floats(0.05, 0.5),
    st.integers(0, 99),
    st.data(),
)
def test_each_class_gives_its_share_and_no_group_is_cut(
    sizes: list[int], share: float, seed: int, data: st.DataObject
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.arange(len(labels))
    for number in range(1, len(labels)):  # some are copies of the one before
        if labels[number] == labels[number - 1] and data.draw(st.booleans()):
            groups[number] = groups[number - 1]
    chosen = hold_out(labels, groups, share, seed)
    assert np.array_equal(chosen, hold_out(labels, groups, share, seed))
    for group in np.unique(groups):
        assert len(set(chosen[groups == group])) == 1
    for label, size in enumerate(sizes):
        own = labels == label
        different = len(np.unique(groups[own]))
        largest = np.unique(groups[own], return_counts=True)[1].max()
        assert not chosen[own].all()
        assert chosen[own].any() == (different > 1)
        if different > 1:  # one more group than fits, at most half of it too much
            assert chosen[own].sum() <= max(share * size + largest / 2, largest)


def test_without_duplicates_a_fifth_is_a_fifth_and_seeds_differ() -> None:
    labels = np.repeat(np.arange(4), [50, 100, 5, 10])
    groups = np.arange(len(labels))
    one, other = (hold_out(labels, groups, 0.2, seed) for seed in (0, 1))
    for chosen in (one, other):
        assert [int(chosen[labels == label].sum()) for label in range(4)] == [10, 20, 1, 2]
    assert not np.array_equal(one, other)


def test_a_million_pictures_are_divided_at_once() -> None:
    labels = np.arange(1_000_000) % 1000
    chosen = hold_out(labels, np.arange(len(labels)), 0.1, 0)
    assert chosen.sum() == 100_000


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Shapes, of which some are copied: exactly, under another class, and as a JPEG."""
    write_shapes(tmp_path / "data", 12, seed=0, size=64)
    for number in range(4):
        file = tmp_path / "data" / "disc" / f"{number:02d}.png"
        shutil.copy(file, tmp_path / "data" / "disc" / f"copy-{number}.png")
        Image.open(file).save(tmp_path / "data" / "disc" / f"jpeg-{number}.jpg", quality=90)
    shutil.copy(tmp_path / "data" / "square" / "01.png", tmp_path / "data" / "triangle" / "wrong.png")
    return tmp_path / "data"


@pytest.mark.parametrize("seed", range(5))
def test_planted_duplicates_never_cross_the_split(planted: Path, seed: int) -> None:
    source = open_source(planted)
    divided = divide(source, None, 0.25, seed, workers=0)
    assert sorted([*divided.train, *divided.val]) == list(range(len(source)))
    names = [[Path(source.name(i)).stem for i in group] for group in divided.exact]
    assert sorted(map(sorted, names)) == [["00", "copy-0"], ["01", "copy-1"], ["01", "wrong"],
                                          ["02", "copy-2"], ["03", "copy-3"]]  # fmt: skip
    assert divided.across(divided.exact) == divided.across(divided.near) == []
    jpegs = [i for i in range(len(source)) if "jpeg" in source.name(i)]
    assert all(any(i in group and len(group) == 3 for group in divided.near) for i in jpegs)


def test_exact_duplicates_across_given_splits_are_all_named(planted: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "val", 4, seed=9, size=64)
    copied = {f"{n:02d}.png": tmp_path / "val" / "square" / f"leak-{n}.png" for n in (2, 5, 7, 11)}
    for name, to in copied.items():
        shutil.copy(planted / "square" / name, to)
    source, val = open_source(planted), open_source(tmp_path / "val")
    divided = divide(source, val, 0.2, 0, workers=0)
    assert (len(divided.train), len(divided.val)) == (len(source), len(val))
    leaks = divided.across(divided.exact)
    names = [source.name(g[0]) for g in leaks], [val.name(g[-1] - len(source)) for g in leaks]
    assert names == ([str(planted / "square" / n) for n in copied], [str(to) for to in copied.values()])


def test_what_cannot_be_read_is_trained_on_or_left_out_never_validated_on(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train", 10, seed=0)
    write_shapes(tmp_path / "val", 3, seed=1)
    for number in range(10):
        (tmp_path / "train" / "disc" / f"{number:02d}.png").write_text("no picture")
    (tmp_path / "val" / "square" / "00.png").write_text("no picture")
    source, val = open_source(tmp_path / "train"), open_source(tmp_path / "val")
    divided = divide(source, None, 0.2, 0, workers=2)
    assert len(divided.bad) == 10
    assert set(source.labels[divided.val]) == {1, 2}  # all of class 0 is for the run's budget
    given = divide(source, val, 0.2, 0, workers=0)
    assert len(given.val) == 8
    assert given.bad[-1].path.endswith("val/square/00.png")
    assert given.bad[-1].sample == len(source) + 3


def test_looking_keeps_no_file_of_a_worker_open(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beit.split, "CHUNK", 1)
    source = open_source(shapes)
    before = len(os.listdir("/proc/self/fd"))
    looked = look(source, workers=2)
    assert len(looked.hashes) == len(source) > 30
    assert len(os.listdir("/proc/self/fd")) < before + 5


def test_some_pictures_of_a_source_are_those_pictures(shapes: Path) -> None:
    source = open_source(shapes)
    chosen = take(source, np.array([30, 2, 17]))
    assert [chosen.name(i) for i in range(3)] == [source.name(i) for i in (30, 2, 17)]
    assert chosen.labels.tolist() == source.labels[[30, 2, 17]].tolist()
    assert np.array_equal(chosen.read(1), source.read(2))
    assert len(take(source, [])) == 0


def test_the_hash_of_data_changes_with_a_pixel_a_name_and_a_label(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", 2, seed=0)

    def now() -> str:
        source = open_source(tmp_path / "data")
        return data_hash([source], look(source, 0))

    file = tmp_path / "data" / "disc" / "00.png"
    seen = [now()]
    assert now() == seen[0]
    image = np.array(Image.open(file))
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(file)
    seen.append(now())
    seen.append((file.rename(file.with_name("99.png")), now())[1])
    seen.append((file.with_name("99.png").rename(tmp_path / "data" / "square" / "99.png"), now())[1])
    assert len(set(seen)) == 4


def test_the_split_is_written_with_labels_and_with_paths_that_lead_to_the_pictures(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder that it lies in, wherever the pictures were named from."""
    monkeypatch.chdir(shapes.parent)
    source = open_source(shapes.name)
    assert not Path(source.name(0)).is_absolute()
    train, val = take(source, [0, 20]), take(source, [35])
    (tmp_path / "real" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "real" / "run")
    file = tmp_path / "run" / "split.csv"
    write_split(file, {"train": (train, train.labels), "val": (val, val.labels)})
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["label"], row["part"]) for row in rows] == [
        ("disc", "train"), ("square", "train"), ("triangle", "val"),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for part, wanted, number in (("train", train, 1), ("val", val, 0)):
        again = open_source(file, part, labelled=True)
        assert len(again) == len(wanted)
        assert real_place(again.name(number)) == str(shapes.parent.resolve() / wanted.name(number))
        expected = Image.open(shapes.parent / wanted.name(number)).convert("RGB")
        assert np.array_equal(again.read(number), np.asarray(expected))


def test_the_split_of_shards_names_the_same_pictures(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "a.tar", "w") as tar:
        for folder in sorted((shapes / "train").iterdir()):
            tar.add(folder, folder.name)
    source = open_source(tmp_path / "s", labelled=True)
    chosen = take(source, [3, 17, 25])
    (tmp_path / "run").mkdir()
    write_split(
        tmp_path / "run" / "split.csv",
        {"train": (source, source.labels), "val": (chosen, chosen.labels)},
    )
    monkeypatch.chdir(tmp_path / "run")
    again = open_source("split.csv", "val", labelled=True)
    for number in range(3):
        assert np.array_equal(again.read(number), chosen.read(number))
        assert again.classes[again.labels[number]] == source.classes[chosen.labels[number]]
        assert real_place(again.name(number)) == chosen.name(number)


def test_the_split_has_all_labels_of_a_picture(tmp_path: Path, shapes: Path) -> None:
    some = take(open_source(shapes), [0, 20])
    truth = np.array([[True, False, True], [False, True, False]])
    write_split(tmp_path / "split.csv", {"train": (some, truth)})
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["disc;triangle", "square"]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_equal_files_are_found_and_only_those_alike_at_a_glimpse_are_read_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    one, other, third = (rng.bytes(20_000) for _ in range(3))
    begins_otherwise = b"x" + one[1:]
    contents = [one, other, begins_otherwise, third[:30], one, b"", b"", third]
    names = [f"{i}.jpg" for i in range(len(contents))]
    if kind == "folder":
        for name, content in zip(names, contents, strict=True):
            (tmp_path / name).write_bytes(content)
    elif kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, content in zip(names, contents, strict=True):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table({"image": contents})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    source = open_source(tmp_path)
    read: list[int] = []
    content_of = Places.content

    def content(self: Places, index: int) -> bytes:
        read.append(index)
        return content_of(self, index)

    monkeypatch.setattr(Places, "content", content)
    assert duplicates(file_hashes([source], 0)) == [[0, 4], [5, 6]]
    assert duplicates(file_hashes([source, source], 0))[0] == [0, 4, 8, 12]
    if kind != "parquet":
        read.clear()
        file_hashes([source], 0)
        assert read == [0, 2, 4, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_among_too_many_pictures_equal_files_stay_together_and_what_validates_can_be_read(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(beit.split, "MOST_LOOKED_AT", 10)
    source = open_source(planted)
    divided = divide(source, None, 0.25, 0, workers)
    names = [[Path(source.name(i)).stem for i in group] for group in divided.exact]
    assert sorted(map(sorted, names)) == [["00", "copy-0"], ["01", "copy-1"], ["01", "wrong"],
                                          ["02", "copy-2"], ["03", "copy-3"]]  # fmt: skip
    assert divided.near == divided.exact
    assert divided.across(divided.exact) == []
    assert sorted([*divided.train, *divided.val]) == list(range(len(source)))
    Path(source.name(int(divided.val[1]))).write_text("no picture")
    again = divide(source, None, 0.25, 0, workers)
    assert [b.sample for b in again.bad] == [divided.val[1]]
    assert set(again.val) == set(divided.val) - {divided.val[1]}
    write_shapes(tmp_path / "val", 3, seed=1)
    (tmp_path / "val" / "square" / "00.png").write_text("no picture")
    given = divide(source, open_source(tmp_path / "val"), 0, 0, workers)
    assert len(given.val) == 8
    assert [b.sample for b in given.bad] == [len(source) + 3]


def test_the_last_group_of_a_class_is_not_held_out_though_it_counts_as_another() -> None:
    for seed in range(20):
        chosen = hold_out(np.array([0, 1, 0, 0]), np.array([0, 0, 2, 3]), 0.5, seed)
        assert chosen.any()
        assert not chosen[1], "the only picture of class 1, whose group counts as class 0"
