"""`beit check`: what it counts, what it finds, and its exit codes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import Cli, write_shapes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train/ of 3 x 4 pictures of 36 pixels and val/ of 3 x 2 of 40, all different."""
    write_shapes(tmp_path / "data" / "train", 4, seed=0)
    write_shapes(tmp_path / "data" / "val", 2, seed=1, size=40)
    return tmp_path / "data"


def test_a_sound_dataset_is_told_in_numbers_and_ends_with_0(cli: Cli, data: Path) -> None:
    code, out, err = cli("check", data)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "train: 12 pictures, 3 classes of 4 to 4, short side 36 to 36 pixels (median 36), 0 bad",
        "val: 6 pictures, 3 classes of 2 to 2, short side 40 to 40 pixels (median 40), 0 bad",
        "0 duplicates, 0 of them of a picture in another split",
    ]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_everything_wrong_is_found_and_listed_whoever_reads(
    cli: Cli, data: Path, tmp_path: Path, workers: int
) -> None:
    train, val = data / "train", data / "val"
    (train / "disc" / "01.png").write_bytes(b"no picture")
    shutil.copy(train / "disc" / "00.png", train / "disc" / "twin.png")
    shutil.copy(train / "disc" / "00.png", train / "square" / "label.png")
    shutil.copy(train / "square" / "02.png", val / "square" / "leak.png")
    (val / "oval").mkdir()
    shutil.copy(val / "disc" / "00.png", val / "oval" / "new.png")
    shutil.rmtree(val / "triangle")
    code, out, err = cli(
        "check", data, json=True, out=tmp_path / "found.csv", workers=workers, max_bad_images=0.1
    )
    assert code == 3
    assert "1 of 20 pictures cannot be read" in err
    result = json.loads(out)
    assert result["train"]["pictures"] == 14
    assert result["train"]["bad"] == 1
    assert (result["train"]["smallest_class"], result["train"]["largest_class"]) == (4, 5)
    assert result["val"]["pictures"] == 6
    assert (result["duplicates"], result["duplicates_across_splits"]) == (4, 1)
    assert result["classes_only_outside_train"] == ["oval"]
    assert result["classes_only_in_train"] == ["triangle"]
    with (tmp_path / "found.csv").open(newline="") as stream:
        rows = {tuple(row) for row in list(csv.reader(stream))[1:]}
    bad = next(row for row in rows if row[2] == "bad")
    assert bad[:2] == ("train", str(train / "disc" / "01.png"))
    assert "not a readable picture" in bad[3]
    assert {row for row in rows if row[2] == "duplicate"} == {
        ("train", str(train / "disc/twin.png"), "duplicate", str(train / "disc/00.png")),
        ("train", str(train / "square/label.png"), "duplicate", str(train / "disc/00.png")),
        ("val", str(val / "square/leak.png"), "duplicate", str(train / "square/02.png")),
        ("val", str(val / "oval/new.png"), "duplicate", str(val / "disc/00.png")),
    }


def test_what_is_wrong_is_also_told_in_words(cli: Cli, data: Path) -> None:
    (data / "train" / "disc" / "01.png").unlink()
    (data / "train" / "disc" / "01.png").symlink_to("nowhere")
    shutil.copy(data / "train" / "disc" / "00.png", data / "val" / "disc" / "leak.png")
    code, out, _ = cli("check", data)
    assert code == 3
    assert f"bad in train: {data / 'train/disc/01.png'} (no such file)" in out
    assert f"duplicate in val: {data / 'val/disc/leak.png'} ({data / 'train/disc/00.png'})" in out
    assert "1 duplicate, 1 of them of a picture in another split" in out


def test_a_name_gives_no_orders_to_a_terminal(cli: Cli, data: Path) -> None:
    (data / "train" / "disc" / "\x1b[2J\n.png").write_bytes(b"no picture")
    code, out, _ = cli("check", data, max_bad_images=0.5)
    assert code == 3
    assert rf"bad in train: {data}/train/disc/\x1b[2J\n.png (" in out
    assert "\x1b" not in out


def test_more_bad_pictures_than_a_run_bears_end_with_4(cli: Cli, data: Path) -> None:
    for number in range(2):
        (data / "train" / "disc" / f"0{number}.png").write_bytes(b"")
    code, _, err = cli("check", data)
    assert code == 4
    assert "2 of 18 pictures cannot be read; a run stops at 1.0%" in err
    assert cli("check", data, max_bad_images=0.5)[0] == 3


def test_one_class_alone_is_warned_of(cli: Cli, data: Path) -> None:
    for shape in ("square", "triangle"):
        shutil.rmtree(data / "train" / shape)
    code, out, _ = cli("check", data)
    assert code == 0
    assert "train has one class; to fine-tune takes two or more, each in a folder of its name" in out
    assert "val has one class" not in out


def test_pictures_that_a_run_has_made_are_no_data(cli: Cli, data: Path) -> None:
    run = data / "train" / "tokenizer"
    (run / "looks").mkdir(parents=True)
    (run / "run.toml").write_text('command = "TrainTokenizer"\n')
    for name in ("reconstructions.png", "looks/1.png"):
        (run / name).write_bytes((data / "train" / "disc" / "00.png").read_bytes())
    found = json.loads(cli("check", data, json=True)[1])
    assert (found["train"]["pictures"], found["train"]["classes"]) == (12, 3)
    assert json.loads(cli("check", run, json=True)[1])["all"]["pictures"] == 2  # asked for by name


def test_a_flat_folder_is_checked_as_one(cli: Cli, data: Path) -> None:
    code, out, _ = cli("check", data / "train" / "disc", json=True)
    assert code == 0
    assert json.loads(out)["all"]["pictures"] == 4
    assert json.loads(out)["all"]["classes"] == 0


def test_the_list_that_is_checked_is_not_written_over(cli: Cli, data: Path) -> None:
    names = data / "names.csv"
    names.write_text("path,label\ntrain/disc/00.png,disc\n")
    code, _, err = cli("check", names, out=names)
    assert code == 6
    assert f"cannot write {names}: it is what the command reads; name another file" in err
    assert names.read_text().startswith("path,label\n")


def test_a_list_that_cannot_be_written_is_refused_before_reading(cli: Cli, data: Path) -> None:
    code, out, err = cli("check", data, out=data / "none" / "found.csv")
    assert (code, out) == (6, "")
    assert "is not a folder" in err
