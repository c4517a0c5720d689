"""Sources of pictures, the order of a run, and loading ahead of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit.data import (
    ImageSource,
    batch_at,
    epoch_order,
    load_ahead,
    open_source,
    sample_rng,
)


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
    assert (source.labels, source.classes) == ((), ())
    assert len(source) == 3


def test_class_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png", "ant/9.png")
    source = open_source(tmp_path, labelled=True)
    assert source.classes == ("ant", "cat", "dog")
    assert names(source, tmp_path) == ["ant/9.png", "cat/1.png", "cat/2.png", "dog/1.png"]
    assert source.labels == (0, 1, 1, 2)


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
    assert open_source(tmp_path).labels == ()


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
    assert source.labels == (1, 0, 1, 0)
    assert names(source, tmp_path) == ["pictures/1.png", "pictures/2.png", "3.png", "elsewhere/4.png"]
    assert source.read(3).shape == (3, 4, 3)


def test_csv_of_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "list.csv").write_text("path,label\n1.png,katze ä\n", encoding="utf-8-sig")
    assert open_source(tmp_path / "list.csv").classes == ("katze ä",)


def test_csv_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n1.png,Bär\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"list\.csv is not UTF-8"):
        open_source(tmp_path / "list.csv")


def test_csv_without_labels_is_a_source_without_labels(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "list.csv").write_text("path\n1.png\n")
    source = open_source(tmp_path / "list.csv")
    assert names(source, tmp_path) == ["1.png"]
    assert source.labels == ()


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
    with pytest.raises(ValueError, match=r"data\.zip is not a folder, a \.csv or a \.txt"):
        open_source(tmp_path / "data.zip")


@pytest.mark.parametrize("content", ["", "file,class\n1.png,cat\n", "1.png,cat\n2.png,dog\n"])
def test_csv_without_column_names_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ValueError, match="first line that names its columns: path,label"):
        open_source(tmp_path / "list.csv")


def test_csv_with_a_row_cut_short_names_the_line(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "list.csv").write_text("path,label\n1.png,cat\n2.png\n")
    with pytest.raises(ValueError, match="line 3"):
        open_source(tmp_path / "list.csv", labelled=True)


# --- Classes by name -----------------------------------------------------------------------------


def source_of(*labels: str) -> ImageSource:
    classes = tuple(sorted(set(labels)))
    numbers = tuple(classes.index(label) for label in labels)
    return ImageSource(tuple(Path(f"{i}.png") for i in range(len(labels))), numbers, classes)


def test_labels_follow_the_models_classes_by_name_not_by_place() -> None:
    ours = source_of("cat", "dog", "cat")
    theirs = ours.with_classes(["dog", "eel", "cat"])
    assert theirs.labels == (2, 0, 2)
    assert theirs.classes == ("dog", "eel", "cat")
    assert theirs.paths == ours.paths


def test_a_set_may_lack_classes_the_model_knows() -> None:
    assert source_of("cat").with_classes(["ant", "bee", "cat"]).labels == (2,)


def test_classes_the_model_does_not_know_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"classes the model does not know: eel, fox; the model's are ant"
    ):
        source_of("ant", "fox", "eel").with_classes(["ant", "bee"])


def test_a_long_list_of_classes_is_cut_in_the_message() -> None:
    many = source_of(*(f"c{i:03d}" for i in range(500)))
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


# --- Loading ahead -------------------------------------------------------------------------------

WORKERS = [0, 1, 3]


def within(seconds: float, work: Callable[[], object]) -> object:
    """The result of work, or a failure where it hangs."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return found[0]


def until(happened: Callable[[], bool]) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it has not happened in 10 s")


@pytest.mark.parametrize("workers", WORKERS)
def test_loading_ahead_keeps_the_order_whoever_is_first(workers: int) -> None:
    def make(step: int) -> int:
        time.sleep(0.002 * (step % 3 == 0))  # some take longer than those after them
        return step * step

    assert list(load_ahead(make, range(5, 40), workers)) == [step * step for step in range(5, 40)]


@pytest.mark.parametrize("workers", WORKERS)
def test_nothing_to_load_gives_nothing(workers: int) -> None:
    assert list(load_ahead(str, range(3, 3), workers)) == []


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_is_raised_at_its_step(workers: int) -> None:
    def make(step: int) -> int:
        if step == 4:
            raise ValueError("picture 4 is broken")
        return step

    loader = load_ahead(make, range(20), workers)
    assert [next(loader) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="picture 4 is broken"):
        next(loader)


@pytest.mark.parametrize("workers", [1, 3])
def test_work_is_done_ahead_but_not_without_bound(workers: int) -> None:
    made: list[int] = []
    loader = load_ahead(lambda step: made.append(step), range(1000), workers)
    next(loader)
    until(lambda: len(made) == 2 * workers + 1)
    time.sleep(0.02)
    assert len(made) == 2 * workers + 1
    within(10, loader.close)  # type: ignore[attr-defined]


def test_without_workers_nothing_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    loader = load_ahead(lambda step: made.append(step), range(10), 0)
    next(loader)
    assert made == [0]


@pytest.mark.parametrize("workers", WORKERS)
def test_stopping_early_does_not_hang_and_makes_no_more(workers: int) -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step

    def work() -> int:
        loader = load_ahead(make, range(100_000), workers)
        first = next(loader)
        loader.close()  # type: ignore[attr-defined]
        return first

    assert within(10, work) == 0
    count = len(made)
    time.sleep(0.02)
    assert len(made) == count <= 2 * workers + 1


def test_what_was_not_begun_is_not_done_after_stopping() -> None:
    made: list[int] = []
    go_on = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        assert step == 0 or go_on.wait(10)
        return step

    loader = load_ahead(make, range(10), 1)
    next(loader)
    until(lambda: made == [0, 1])  # and 2 waits for its turn
    closing = threading.Thread(target=loader.close)  # type: ignore[attr-defined]
    closing.start()
    time.sleep(0.05)
    go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    assert made == [0, 1]


def test_work_is_done_in_as_many_threads_as_asked_for() -> None:
    meeting = threading.Barrier(3, timeout=10)  # passes only where three work at once
    list(load_ahead(lambda _: meeting.wait(), range(3), 3))
