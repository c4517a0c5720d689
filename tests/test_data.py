"""Sources of pictures, the order of a run, and loading ahead of it."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import beit.data
from beit.augment import TwoViews
from beit.data import (
    MOST_IN_A_ROW,
    Bad,
    BadImages,
    ImageSource,
    Loader,
    TooManyBadImages,
    batch_at,
    epoch_order,
    find_pictures,
    has_split,
    open_source,
    sample_rng,
)
from beit.image import OpenImage, open_image
from beit.masking import sample_mask


def put(root: Path, *names: str) -> Path:
    """Pictures of different colours under the given names."""
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 0, 0)).save(file)
    return root


def names(source: ImageSource, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in source.paths]


# --- Layouts -------------------------------------------------------------------------------------


def test_flat_folder_has_pictures_without_labels(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a.jpg", "C.PNG")
    (tmp_path / "notes.md").write_text("no picture")
    source = open_source(tmp_path)
    assert sorted(names(source, tmp_path)) == ["C.PNG", "a.jpg", "b.png"]
    assert (source.labels.tolist(), source.classes) == ([], ())
    assert len(source) == 3


def test_class_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png", "ant/9.png")
    source = open_source(tmp_path, labelled=True)
    assert source.classes == ("ant", "cat", "dog")
    assert names(source, tmp_path) == ["ant/9.png", "cat/1.png", "cat/2.png", "dog/1.png"]
    assert source.labels.tolist() == [0, 1, 1, 2]


def test_folders_in_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    put(tmp_path, "cat/2023/05/1.png", "cat/2.png", "dog/x/1.png")
    source = open_source(tmp_path, labelled=True)
    assert source.classes == ("cat", "dog")
    assert [source.classes[label] for label in source.labels] == [
        path.relative_to(tmp_path).parts[0] for path in source.paths
    ]


def test_a_folder_without_pictures_is_no_class(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("none here")
    assert open_source(tmp_path).classes == ("cat", "dog")


def test_pictures_beside_folders_make_it_a_nest_without_labels(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "stray.png")
    assert len(open_source(tmp_path)) == 2
    assert not len(open_source(tmp_path).labels)


def test_train_and_val_are_opened_by_their_name(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "test/dog/4.png")
    assert names(open_source(tmp_path), tmp_path) == ["train/cat/1.png", "train/dog/2.png"]
    assert names(open_source(tmp_path, "val"), tmp_path) == ["val/cat/3.png"]
    assert open_source(tmp_path, "test").classes == ("dog",)


def test_csv_lists_paths_beside_it_with_labels(tmp_path: Path) -> None:
    put(tmp_path, "pictures/1.png", "pictures/2.png", "3.png")
    absolute = put(tmp_path / "elsewhere", "4.png") / "4.png"
    rows = ["label,path,note", "dog,pictures/1.png,x", "cat,pictures/2.png,", "dog,3.png,y"]
    (tmp_path / "list.csv").write_text("\n".join([*rows, f"cat,{absolute},"]) + "\n")
    source = open_source(tmp_path / "list.csv", labelled=True)
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, 0, 1, 0]
    assert names(source, tmp_path) == ["pictures/1.png", "pictures/2.png", "3.png", "elsewhere/4.png"]
    assert source.read(3).shape == (3, 4, 3)


def test_csv_of_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "list.csv").write_text("path,label\n1.png,katze ä\n", encoding="utf-8-sig")
    assert open_source(tmp_path / "list.csv").classes == ("katze ä",)


def test_csv_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n1.png,Bär\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"list\.csv is not UTF-8 \(B\\xe4r\)"):
        open_source(tmp_path / "list.csv")


def test_csv_without_labels_is_a_source_without_labels(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "list.csv").write_text("path\n1.png\n")
    source = open_source(tmp_path / "list.csv")
    assert names(source, tmp_path) == ["1.png"]
    assert not len(source.labels)


def test_txt_lists_paths_beside_it(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "2.png")
    (tmp_path / "list.txt").write_text("a/1.png\n\n  2.png \n")
    assert names(open_source(tmp_path / "list.txt"), tmp_path) == ["a/1.png", "2.png"]


def test_a_picture_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 9).save(tmp_path / "grey.png")
    image = open_source(tmp_path).read(0)
    np.testing.assert_array_equal(image, np.full((4, 5, 3), 9, dtype=np.uint8))


# --- Refusals ------------------------------------------------------------------------------------


def test_missing_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_folder_without_pictures_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match=r"holds no pictures.*\.jpg.*\.png"):
        open_source(tmp_path)


def test_a_split_that_is_there_alone_is_no_class(tmp_path: Path) -> None:
    put(tmp_path, "set/validation/disc/0.png", "set/validation/square/0.png")
    assert has_split(tmp_path / "set", "val")
    assert open_source(tmp_path / "set", "val", labelled=True).classes == ("disc", "square")
    put(tmp_path, "set/other/0.png")  # now both are classes
    assert not has_split(tmp_path / "set", "val")
    assert open_source(tmp_path / "set", "val").classes == ("other", "validation")


def test_missing_split_is_named(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/1.png")
    with pytest.raises(ValueError, match="has a train folder but no val folder"):
        open_source(tmp_path, "val")


def test_unlabelled_source_says_how_to_label_it(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    with pytest.raises(ValueError, match=r"no classes; put each class's pictures in a folder.*csv"):
        open_source(tmp_path, labelled=True)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"data\.zip is not a folder, a \.tar, a \.parquet, a \.csv or a \.txt; unpack"
    ):
        open_source(tmp_path / "data.zip")


@pytest.mark.parametrize("content", ["", "file,class\n1.png,cat\n", "1.png,cat\n2.png,dog\n"])
def test_csv_without_column_names_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ValueError, match="first line that names its columns: path,label"):
        open_source(tmp_path / "list.csv")


@pytest.mark.parametrize("columns", ["path,label", "path,part"])
def test_csv_with_an_open_quotation_mark_names_where_it_broke(tmp_path: Path, columns: str) -> None:
    (tmp_path / "list.csv").write_text(f'{columns}\n"0.png,cat\n' + "1.png,train\n" * 20_000)
    with pytest.raises(ValueError, match=r"line \d+ of .*list\.csv is no row .* quotation mark"):
        open_source(tmp_path / "list.csv")


def test_csv_with_a_row_cut_short_names_the_line(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "list.csv").write_text("path,label\n1.png,cat\n2.png\n")
    with pytest.raises(ValueError, match="line 3"):
        open_source(tmp_path / "list.csv", labelled=True)


def test_pictures_are_known_by_their_endings(tmp_path: Path) -> None:
    """Browsers on Windows save JPEGs as .jfif."""
    names = ["a.JPG", "b.jpeg", "c.jfif", "d.jpe", "e.webp", "f.tif", "g.avif"]
    for name in [*names, "h.txt", "i.jpg.part"]:
        (tmp_path / name).write_bytes(b"picture")
    source = open_source(tmp_path)
    assert [Path(source.name(i)).name for i in range(len(source))] == names


# --- Classes by name -----------------------------------------------------------------------------


def source_of(tmp_path: Path, *labels: str) -> ImageSource:
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    return open_source(tmp_path / "list.csv", labelled=True)


def test_labels_follow_the_models_classes_by_name_not_by_place(tmp_path: Path) -> None:
    ours = source_of(tmp_path, "cat", "dog", "cat")
    theirs = ours.with_classes(["dog", "eel", "cat"])
    assert theirs.labels.tolist() == [2, 0, 2]
    assert theirs.classes == ("dog", "eel", "cat")
    assert theirs.paths == ours.paths


def test_an_accent_that_is_a_letter_of_its_own_is_no_other_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a Mac writes names. Where a model has both, each is its own."""
    composed, apart = "Ros\u00e9", "Rose\u0301"
    source = source_of(tmp_path, apart, "ant", apart)
    assert source.with_classes(["ant", composed]).labels.tolist() == [1, 0, 1]
    assert source.with_classes([apart, "ant", composed]).labels.tolist() == [0, 1, 0]
    assert capsys.readouterr().err == f"no picture of 1 of 3 classes: {composed}\n"


def test_classes_without_a_picture_are_named_and_shift_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of(tmp_path, "cat").with_classes(["ant", "bee", "cat"])
    assert source.labels.tolist() == [2]
    assert capsys.readouterr().err == "no picture of 2 of 3 classes: ant, bee\n"


def test_classes_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"classes the model does not know: eel, fox; the model's are ant"
    ):
        source_of(tmp_path, "ant", "fox", "eel").with_classes(["ant", "bee"])


def test_a_long_list_of_classes_is_cut_in_the_message(tmp_path: Path) -> None:
    many = source_of(tmp_path, *(f"c{i:03d}" for i in range(500)))
    with pytest.raises(ValueError, match=r"c000, .*c007 and 492 more") as caught:
        many.with_classes(["x"])
    assert len(str(caught.value)) < 300


# --- Order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_an_epoch_is_a_permutation(count: int) -> None:
    for epoch in (0, 1, 99):
        assert sorted(epoch_order(count, 0, epoch)) == list(range(count))


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first = epoch_order(50, 3, 4)
    epoch_order(50, 9, 9)
    np.testing.assert_array_equal(epoch_order(50, 3, 4), first)


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_every_picture_is_as_likely_in_every_place() -> None:
    places = np.zeros((4, 4))
    for epoch in range(2000):
        places[np.arange(4), epoch_order(4, 0, epoch)] += 1
    assert ((places - 500) ** 2 / 500).sum() < 34  # chi-squared, 9 degrees, far beyond 0.999


@pytest.mark.parametrize(("count", "size"), [(10, 3), (12, 4), (7, 7), (100, 9)])
def test_an_epoch_shows_each_picture_at_most_once_and_leaves_the_rest_out(count: int, size: int) -> None:
    per_epoch = count // size
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [batch_at(step, count, size, seed=1) for step in steps]
        assert all(len(batch) == size for batch in batches)
        assert all(e == epoch for batch in batches for e, _ in batch)
        shown = [index for batch in batches for _, index in batch]
        assert len(set(shown)) == len(shown) == per_epoch * size
        assert shown == epoch_order(count, 1, epoch)[: len(shown)].tolist()


def test_pictures_left_out_of_one_epoch_come_in_others() -> None:
    shown = {index for step in range(30) for _, index in batch_at(step, 10, 3, seed=0)}
    assert shown == set(range(10))


def test_a_set_smaller_than_a_batch_is_one_batch_an_epoch() -> None:
    for step in range(4):
        batch = batch_at(step, 3, 8, seed=0)
        assert sorted(batch) == [(step, 0), (step, 1), (step, 2)]


def test_samples_draw_alike_in_one_epoch_and_apart_otherwise() -> None:
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3).random()
    draws = {
        sample_rng(seed, epoch, index).random()
        for seed in range(5)
        for epoch in range(5)
        for index in range(20)
    }
    assert len(draws) == 500


def test_a_sample_does_not_draw_what_the_order_drew() -> None:
    order = np.random.default_rng([0, 1]).random(4)
    assert not np.array_equal(sample_rng(0, 1, 0).random(4), order)


def test_an_epochs_order_cannot_be_changed_by_who_reads_it() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 3


# --- Batches: the same for any number of workers and ranks, and after a stop anywhere ------------

NUM_PICTURES, CLASSES = 23, 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """23 pictures of different sizes; the first pixel's red is 10 times the number."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        pixels = rng.integers(0, 255, (20 + number, 44 - number, 3), dtype=np.uint8)
        pixels[0, 0, 0] = 10 * number
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
    return open_source(root)


def loader_of(source: ImageSource, folder: Path, **options: object) -> Loader:
    """A loader of six at a time, in this process, with seed 7 and room for any number of bad pictures."""
    budget = options.pop("budget", 1.0)
    bad_images = BadImages(folder / "bad_images.csv", len(source), budget)  # type: ignore[arg-type]
    chosen = {"batch_size": 6, "seed": 7, "workers": 0, **options}
    return Loader(source, bad_images=bad_images, **chosen)  # type: ignore[arg-type]


def crops_and_mask(picture: OpenImage, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return *TwoViews(16, 8)(picture, rng), sample_mask((6, 6), 12, rng, min_block=4)


Seen = list[tuple[int, tuple[bytes, ...]]]


def seen(loader: Loader, steps: range) -> list[Seen]:
    """(index, bytes of both crops and the mask) of each sample of each step."""
    return [
        [(index, tuple(part.tobytes() for part in parts)) for index, parts in batch]
        for batch in loader.batches(steps, crops_and_mask)
    ]


def test_small_pictures_are_read_once_and_are_the_same_when_none_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):  # JPEGs that a crop of 16 pixels could be decoded at half their size for
        Image.fromarray(rng.integers(0, 255, (60, 62, 3), dtype=np.uint8)).save(
            tmp_path / f"{number}.jpg"
        )
    Image.fromarray(rng.integers(0, 255, (70, 60, 3), dtype=np.uint8)).save(tmp_path / "large.jpg")
    source = open_source(tmp_path)
    opened: list[int] = []
    open_one = ImageSource.open

    def watch(self: ImageSource, index: int) -> OpenImage:
        opened.append(index)
        return open_one(self, index)

    monkeypatch.setattr(ImageSource, "open", watch)
    kept = seen(loader_of(source, tmp_path, batch_size=7), range(3))
    assert sorted(opened) == [0, 1, 2, 3, 4, 5, 6, 6, 6], "the large one each time"
    monkeypatch.setattr(beit.data, "KEPT_BYTES", 0)
    assert seen(loader_of(source, tmp_path, batch_size=7), range(3)) == kept
    assert len(opened) == 9 + 21


@pytest.fixture(scope="module")
def expected(pictures: ImageSource) -> Callable[[int], list[tuple[int, tuple[bytes, ...]]]]:
    """What a step must hold, by the definition: a permutation, its slice, and a generator for each."""

    def step_of(step: int) -> list[tuple[int, tuple[bytes, ...]]]:
        epoch, place = divmod(step, NUM_PICTURES // 8)
        order = np.random.default_rng([7, epoch]).permutation(NUM_PICTURES)[8 * place : 8 * place + 8]
        return [
            (
                i,
                tuple(
                    part.tobytes() for part in crops_and_mask(pictures.open(i), sample_rng(7, epoch, i))
                ),
            )
            for i in order.tolist()
        ]

    return step_of


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.sampled_from([0, 1, 2, 4]),
    world=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 20),
    length=st.integers(0, 8),
)
def test_samples_crops_and_masks_are_the_same_for_any_workers_ranks_and_place_of_resuming(
    pictures: ImageSource,
    expected: Callable[[int], Seen],
    tmp_path: Path,
    workers: int,
    world: int,
    start: int,
    length: int,
) -> None:
    steps = range(start, start + length)
    ranks = [
        seen(loader_of(pictures, tmp_path, batch_size=8, workers=workers, rank=rank, world=world), steps)
        for rank in range(world)
    ]
    for place, step in enumerate(steps):
        whole = expected(step)
        for rank in range(world):
            assert ranks[rank][place] == whole[rank::world]


@given(
    count=st.integers(1, 50),
    size=st.integers(1, 60),
    step=st.integers(0, 300),
    world=st.sampled_from([1, 2, 4, 7]),
)
def test_ranks_share_a_batch_without_overlap_or_gap(
    count: int, size: int, step: int, world: int
) -> None:
    whole = batch_at(step, count, size, seed=3)
    parts = [batch_at(step, count, size, 3, rank, world) for rank in range(world)]
    assert sorted(sample for part in parts for sample in part) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(
    pictures: ImageSource, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="batch_size 6 does not divide among 4 processes"):
        loader_of(pictures, tmp_path, world=4)


def test_the_same_pictures_in_tar_shards_come_in_the_same_order(
    pictures: ImageSource, tmp_path: Path
) -> None:
    import tarfile

    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in pictures.paths[shard * 8 : shard * 8 + 8]:
                tar.add(path, path.name)
    assert seen(loader_of(open_source(tmp_path), tmp_path), range(9)) == seen(
        loader_of(pictures, tmp_path), range(9)
    )


# --- Bad pictures --------------------------------------------------------------------------------


def put_with_bad(root: Path, count: int, bad: set[int]) -> ImageSource:
    put(root, *(f"{number:03d}.png" for number in range(count)))
    for number in bad:
        (root / f"{number:03d}.png").write_bytes(b"no picture")
    return open_source(root)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def draw(picture: OpenImage, rng: np.random.Generator) -> tuple[int, float]:
    return int(picture.read()[0, 0, 0]), rng.random()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bad=st.sets(st.integers(0, 11), max_size=9), workers=st.sampled_from([0, 1, 2, 4]))
def test_a_bad_picture_gives_way_to_the_next_position_and_keeps_its_draws(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], workers: int
) -> None:
    root = tmp_path_factory.mktemp("bad")
    source = put_with_bad(root, 12, bad)
    loader = loader_of(source, root, workers=workers, batch_size=4)
    batches = list(loader.batches(range(6), draw))
    for step, batch in enumerate(batches):
        epoch, place = divmod(step, 3)
        order = np.random.default_rng([7, epoch]).permutation(12).tolist()
        for offset, (index, (red, number)) in enumerate(batch):
            position = place * 4 + offset
            after = (order[(position + ahead) % 12] for ahead in range(12))
            assert index == red == next(i for i in after if i not in bad)
            assert number == sample_rng(7, epoch, order[position]).random()
    assert set(loader.bad_images.found) == bad


@pytest.mark.parametrize(
    ("code", "times", "asked", "listed"),
    [
        (errno.EIO, 2, 3, 0),  # a disk that recovers loses nothing
        (errno.ETIMEDOUT, 5, 6, 0),  # when another has been read, so that the disk is there
        (errno.ETIMEDOUT, 9, 6, 1),
        (errno.EACCES, 9, 1, 1),  # will be so the next time too
    ],
    ids=["recovers", "recovers late", "does-not", "forbidden"],
)
def test_a_disk_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, times: int, asked: int, listed: int
) -> None:
    source = put_with_bad(tmp_path, 6, set())
    hard, calls = Path(source.name(3)).name, 0

    def opened(path: str, flags: int, *rest: int) -> int:
        nonlocal calls
        if os.fspath(path).endswith(hard):
            calls += 1
            if calls <= times:
                raise OSError(code, os.strerror(code))
        return real(path, flags, *rest)

    real = os.open
    monkeypatch.setattr("beit.image.os.open", opened)
    monkeypatch.setattr("beit.image.PAUSES_S", (0.0, 0.0))
    loader = loader_of(source, tmp_path, workers=0, batch_size=6)
    (batch,) = loader.batches(range(1), draw)
    assert calls == asked
    assert len(loader.bad_images) == listed
    assert (3 in [index for index, _ in batch]) == (not listed)
    for index, (red, _) in batch:
        assert index == red


def test_while_a_disk_is_away_no_picture_is_bad_and_none_stands_in_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = put_with_bad(tmp_path, 12, {5})
    (tmp_path / "before").mkdir()
    before = loader_of(source, tmp_path / "before", workers=0, batch_size=6)
    wanted = list(before.batches(range(4), draw))
    opened, calls = os.open, 0

    def away(path: Any, *rest: Any) -> int:
        nonlocal calls
        if str(path).endswith(".png"):
            calls += 1
            if 4 < calls < 21:  # five or six pictures, three times each
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *rest)

    monkeypatch.setattr("beit.image.os.open", away)
    monkeypatch.setattr("beit.image.PAUSES_S", (0.0, 0.0))
    loader = loader_of(source, tmp_path, workers=0, batch_size=6)
    assert list(loader.batches(range(4), draw)) == wanted
    assert set(loader.bad_images.found) == {5}


@pytest.mark.parametrize("where", ["a path", "a table", "a glimpse"])
def test_any_reader_asks_a_network_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source = put_with_bad(tmp_path, 2, set())
    content = Path(source.name(1)).read_bytes()
    pauses: list[float] = []
    asked = 0

    def away(real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: str, *rest: Any) -> Any:
            nonlocal asked
            if os.fspath(path) == source.name(1):
                asked += 1
                if asked < 3:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(path, *rest)

        return opened

    monkeypatch.setattr("beit.image.os.open", away(os.open))
    monkeypatch.setattr("beit.listing.open", away(open), raising=False)
    monkeypatch.setattr("beit.image.time.sleep", pauses.append)
    if where == "a path":
        assert open_image(source.name(1)).size
    elif where == "a table":
        assert source.paths.content(1) == content
    else:
        assert source.paths.glimpse(1).startswith(b"%d " % len(content))
    assert (asked, pauses) == (3, [0.2, 1.0])


def test_bad_pictures_are_listed_once_with_their_reasons(tmp_path: Path) -> None:
    source = put_with_bad(tmp_path, 12, {3, 5})
    (tmp_path / "007.png").unlink()
    for _ in range(2):  # also where the run goes on
        loader = loader_of(source, tmp_path, batch_size=4, workers=2)
        list(loader.batches(range(9), draw))
        assert len(loader.bad_images) == 3
    rows = {row["path"]: row for row in rows_of(tmp_path / "bad_images.csv")}
    assert len(rows_of(tmp_path / "bad_images.csv")) == 3
    assert set(rows) == {str(tmp_path / f"{number:03d}.png") for number in (3, 5, 7)}
    assert rows[str(tmp_path / "007.png")]["code"] == "missing"
    assert "not a readable picture" in rows[str(tmp_path / "003.png")]["reason"]
    assert rows[str(tmp_path / "003.png")]["sample"] == "3"


def test_a_set_without_bad_pictures_leaves_no_list(tmp_path: Path) -> None:
    list(loader_of(put_with_bad(tmp_path, 12, set()), tmp_path).batches(range(4), draw))
    assert not (tmp_path / "bad_images.csv").exists()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_over_the_budget_the_run_stops_at_the_same_step_whoever_reads(
    tmp_path: Path, workers: int
) -> None:
    order = np.random.default_rng([7, 0]).permutation(30).tolist()
    source = put_with_bad(tmp_path, 30, {order[position] for position in (3, 10, 17, 25)})
    loader = loader_of(source, tmp_path, workers=workers, batch_size=2, budget=0.05)
    given = 0
    with pytest.raises(TooManyBadImages) as stopped:  # noqa: PT012
        for _ in loader.batches(range(15), draw):
            given += 1
    assert given == 17 // 2  # the third; 2 of 30 may be bad
    assert stopped.value.exit_code == 4
    said = str(stopped.value)
    assert "3 of 30 pictures cannot be read, where 5.0% (2) may" in said
    assert "bad_images.csv" in said
    assert ".png (not a readable picture" in said
    assert len(rows_of(tmp_path / "bad_images.csv")) == 3


@pytest.mark.parametrize(("count", "budget", "allowed"), [(30, 0.0, 0), (30, 0.01, 1), (300, 0.01, 3)])
def test_a_share_of_the_pictures_may_be_bad_and_one_always_unless_none(
    tmp_path: Path, count: int, budget: float, allowed: int
) -> None:
    bad_images = BadImages(tmp_path / "bad.csv", count, budget)
    bad = [Bad(number, f"{number}.png", "unreadable", "why") for number in range(allowed + 1)]
    bad_images.add(bad[:allowed])
    with pytest.raises(TooManyBadImages):
        bad_images.add(bad[allowed:])


def test_the_budget_is_of_all_pictures_however_many_processes_share_them(tmp_path: Path) -> None:
    """A process comes to see others each epoch, so it meets all that are bad."""
    bad = [Bad(number, f"{number}.png", "unreadable", "why") for number in range(5)]
    source = put_with_bad(tmp_path, 40, set())
    for rank in range(8):
        loader = Loader.of_run(source, 8, 0, 0, tmp_path, 0.1, rank, 8)
        loader.bad_images.add(bad[:4])
        with pytest.raises(
            TooManyBadImages, match=r"5 of 40 pictures cannot be read, where 10.0% \(4\) may"
        ):
            loader.bad_images.add(bad[4:])


def test_the_same_command_again_is_over_the_budget_too(tmp_path: Path) -> None:
    bad = [Bad(number, f"{number}.png", "unreadable", "why") for number in range(3)]
    for _ in range(2):
        with pytest.raises(TooManyBadImages):
            BadImages(tmp_path / "bad.csv", 10, 0.1).add(bad)
    assert len(rows_of(tmp_path / "bad.csv")) == 3
    BadImages(tmp_path / "bad.csv", 10, 0.1).add([])  # they were mended
    BadImages(tmp_path / "bad.csv", 10, 0.3).add(bad)


def test_pictures_of_a_validation_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    BadImages(file, 200, 0.01).add([Bad(100, "v.png", "unreadable", "why")])
    ours = [Bad(number, f"{number}.png", "unreadable", "why") for number in range(2)]
    train = BadImages(file, 100, 0.01)
    train.add(ours[:1])
    with pytest.raises(TooManyBadImages, match="2 of 100 pictures") as stopped:
        train.add(ours[1:])
    assert "v.png" not in str(stopped.value)


def test_a_budget_that_is_no_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_bad_images 5 is not a share from 0 to 1; 0\.01 is usual"):
        BadImages(tmp_path / "bad.csv", 10, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hundred_in_a_row_stop_the_run_whatever_the_budget(tmp_path: Path, workers: int) -> None:
    source = put_with_bad(tmp_path, MOST_IN_A_ROW + 50, set(range(MOST_IN_A_ROW + 50)))
    loader = loader_of(source, tmp_path, workers=workers)
    with pytest.raises(
        TooManyBadImages, match=r"100 pictures in a row cannot be read: .* Is their place"
    ):
        next(loader.batches(range(9), draw))
    assert not (tmp_path / "bad_images.csv").exists()  # the same command can go on when they are there


def test_an_error_that_is_not_the_pictures_fault_is_raised(
    pictures: ImageSource, tmp_path: Path
) -> None:
    def prepare(picture: OpenImage, rng: np.random.Generator) -> int:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        next(loader_of(pictures, tmp_path, workers=1).batches(range(3), prepare))


def test_a_csv_that_tells_train_from_val_gives_the_part_asked_for(tmp_path: Path) -> None:
    rows = ["path,label,part", "a.png,cat,train", "b.png,dog,train", "c.png,cat,val"]
    file = tmp_path / "split.csv"
    file.write_text("\n".join(rows) + "\n")
    assert [p.name for p in open_source(file).paths] == ["a.png", "b.png"]
    assert [p.name for p in open_source(file, "val", labelled=True).paths] == ["c.png"]
    assert has_split(file, "val")
    assert not has_split(file, "test")
    (every,) = find_pictures([str(file)], "classify")
    assert isinstance(every, ImageSource)
    assert len(every) == 3
    file.write_text("path,label,part\na.png,cat,wheel\nb.png,cat,door\n")
    assert len(open_source(file, "val")) == 2, "a column of another meaning"
