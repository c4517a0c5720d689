"""`beit shard`: what the shards hold, that they are whole or absent, and that it goes on."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, Cli, held_by_another_process, write_shapes
from PIL import Image

import beit.folder_lock
from beit.data import open_source
from beit.image import read_image


def photo(path: Path, size: tuple[int, int], seed: int, **options: object) -> Path:
    """A smooth colourful picture, as JPEG keeps it well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 215, (5, 5, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train/ of 3 x 5 and val/ of 3 x 2 pictures of shapes."""
    write_shapes(tmp_path / "data" / "train", 5, seed=0)
    write_shapes(tmp_path / "data" / "val", 2, seed=1)
    return tmp_path / "data"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_the_same_pictures_and_labels_in_the_same_order(
    cli: Cli, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    code, printed, err = cli("shard", data, out, shard_size=4, quality=95)
    assert (code, printed) == (0, "")
    assert "21 pictures in 6 shards" in err
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.txt", "shards.json", *(f"train-{i:05d}.tar" for i in range(4)),
        "val-00000.tar", "val-00001.tar",
    ]  # fmt: skip
    for split in ("train", "val"):
        before, after = open_source(data, split), open_source(out, split, labelled=True)
        assert after.classes == before.classes
        assert after.labels.tolist() == before.labels.tolist()
        for index in range(len(before)):
            difference = before.read(index).astype(int) - after.read(index)
            assert np.abs(difference).mean() < 10  # of 255: what JPEG does to hard edges
            assert f"{index:08d}-{before.paths[index].stem}" in after.name(index)


def test_large_pictures_get_the_short_side_and_small_ones_stay(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    wide = photo(data / "a.png", (600, 300), 0)
    tall = photo(data / "b.jpg", (200, 500), 1, quality=95)
    small = photo(data / "c.jpg", (90, 70), 2, quality=95)
    assert cli("shard", data, tmp_path / "s", short_side=100)[0] == 0
    source = open_source(tmp_path / "s")
    assert [source.read(i).shape for i in range(3)] == [(100, 200, 3), (250, 100, 3), (70, 90, 3)]
    for index, (path, size) in enumerate([(wide, (200, 100)), (tall, (100, 250))]):
        expected = Image.fromarray(read_image(path)).resize(size, Image.Resampling.LANCZOS)
        assert np.abs(source.read(index).astype(int) - np.asarray(expected)).mean() < 3
    assert source.paths.content(2) == small.read_bytes()  # not compressed a second time


def test_a_picture_that_lies_on_its_side_or_is_not_rgb_is_made_upright_rgb(
    cli: Cli, tmp_path: Path
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    path = photo(tmp_path / "data" / "a.jpg", (60, 40), 0, quality=95, exif=turned)
    grey = tmp_path / "data" / "b.jpg"
    Image.new("L", (50, 50), 77).save(grey)
    Image.new("CMYK", (50, 50), (200, 10, 60, 3)).save(tmp_path / "data" / "c.jpg")
    assert cli("shard", tmp_path / "data", tmp_path / "s", quality=95)[0] == 0
    source = open_source(tmp_path / "s")
    for index, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        with Image.open(io.BytesIO(source.paths.content(index))) as stored:
            assert (stored.mode, stored.getexif().get(0x0112)) == ("RGB", None)
        expected = read_image(tmp_path / "data" / name).astype(int)
        assert np.abs(expected - source.read(index)).mean() < 2
    assert source.read(0).shape == (60, 40, 3) == read_image(path).shape


def test_quality_decides_the_size(cli: Cli, tmp_path: Path) -> None:
    photo(tmp_path / "data" / "a.png", (400, 400), 0)
    sizes = []
    for quality in (30, 60, 95):
        assert cli("shard", tmp_path / "data", tmp_path / f"q{quality}", quality=quality)[0] == 0
        sizes.append(len(open_source(tmp_path / f"q{quality}").paths.content(0)))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_pictures_without_labels_make_shards_without(cli: Cli, data: Path, tmp_path: Path) -> None:
    assert cli("shard", data / "train" / "disc", "-o", tmp_path / "s")[0] == 0
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["shard-00000.tar", "shards.json"]
    with tarfile.open(tmp_path / "s" / "shard-00000.tar") as tar:
        assert all(name.endswith(".jpg") for name in tar.getnames())
    assert len(open_source(tmp_path / "s")) == 5


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_bytes_do_not_depend_on_who_writes_nor_on_a_stop(
    cli: Cli, data: Path, tmp_path: Path, workers: int
) -> None:
    assert cli("shard", data, tmp_path / "one", shard_size=4, workers=2)[0] == 0
    other = tmp_path / "other"
    assert cli("shard", data, other, shard_size=4, workers=workers)[0] == 0
    assert files_of(other) == files_of(tmp_path / "one")
    before = {path.name: path.stat().st_mtime_ns for path in other.iterdir()}
    (other / "train-00002.tar").unlink()
    (other / ".train-00002.tar").write_bytes(b"half of one")
    with pytest.raises(ValueError, match="has 5 of 6 shards; run `beit shard` again to end it"):
        open_source(other)
    assert cli("shard", data, other, shard_size=4, workers=workers)[0] == 0
    assert files_of(other) == files_of(tmp_path / "one")
    after = {path.name: path.stat().st_mtime_ns for path in other.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"train-00002.tar"}


def test_bad_pictures_are_left_out_listed_and_end_with_3(cli: Cli, data: Path, tmp_path: Path) -> None:
    (data / "train" / "disc" / "01.png").write_bytes(b"no picture")
    (data / "val" / "square" / "00.png").write_bytes(b"")
    for _ in range(2):  # the second time there is nothing to do, and it says the same
        code, _, err = cli("shard", data, tmp_path / "s", shard_size=4, max_bad_images=0.1)
        assert code == 3
        assert "2 of 21 pictures left out" in err
    with (tmp_path / "s" / "bad_images.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["path"] for row in rows} == {
        str(data / "train/disc/01.png"), str(data / "val/square/00.png"),
    }  # fmt: skip
    assert len(open_source(tmp_path / "s")) == 14
    assert len(open_source(tmp_path / "s", "val")) == 5


def test_too_many_bad_pictures_end_with_4(cli: Cli, data: Path, tmp_path: Path) -> None:
    for number in range(3):
        (data / "train" / "disc" / f"0{number}.png").write_bytes(b"")
    code, _, err = cli("shard", data, tmp_path / "s", shard_size=4)
    assert code == 4
    assert "3 of 21 pictures cannot be read, where 1.0% (1) may" in err


def test_other_settings_or_data_are_refused_by_name(cli: Cli, data: Path, tmp_path: Path) -> None:
    assert cli("shard", data, tmp_path / "s", quality=80)[0] == 0
    code, _, err = cli("shard", data, tmp_path / "s", quality=90)
    assert code == 2
    assert "(quality was 80, now 90)" in err
    (data / "train" / "disc" / "new.png").write_bytes((data / "train/disc/00.png").read_bytes())
    code, _, err = cli("shard", data, tmp_path / "s", quality=80)
    assert code == 2
    assert "holds shards made otherwise (pictures was" in err


def test_other_pictures_of_the_same_names_are_refused(cli: Cli, data: Path, tmp_path: Path) -> None:
    assert cli("shard", data, tmp_path / "s")[0] == 0
    write_shapes(tmp_path / "other" / "train", 5, seed=2)
    write_shapes(tmp_path / "other" / "val", 2, seed=3)
    code, _, err = cli("shard", tmp_path / "other", tmp_path / "s")
    assert code == 2
    assert "holds shards made otherwise (pictures was" in err
    shutil.move(data, tmp_path / "moved")
    assert cli("shard", tmp_path / "moved", tmp_path / "s")[0] == 0, "the same ones, in another place"


def test_a_folder_that_another_process_writes_is_refused(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").mkdir()
    monkeypatch.setattr(beit.folder_lock, "WAIT_S", 0)
    with held_by_another_process(tmp_path / "s"):
        code, _, err = cli("shard", data, tmp_path / "s")
    assert code == 2
    assert f"another process is at work on {tmp_path / 's'}" in err
    assert not list((tmp_path / "s").iterdir())
    assert cli("shard", data, tmp_path / "s")[0] == 0


def test_a_class_whose_name_is_no_utf8_keeps_it(cli: Cli, data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        os.rename(data / split / "disc", os.fsencode(data / split) + b"/caf\xe9")
    assert cli("shard", data, tmp_path / "s")[0] == 0
    assert b"caf\xe9" in map(os.fsencode, open_source(tmp_path / "s").classes)


def test_a_folder_with_something_else_is_left_alone(cli: Cli, data: Path) -> None:
    code, _, err = cli("shard", data / "train", data / "val")
    assert code == 2
    assert "is not empty and holds no shards" in err
    assert not (data / "val" / "shards.json").exists()


def test_a_folder_that_cannot_be_made_ends_with_6(cli: Cli, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = cli("shard", data, tmp_path / "file" / "s")
    place = tmp_path / "file" / "s"
    told = f"cannot write {place}: Not a directory; make room or choose another place"
    assert (code, err) == (6, f"beit: {told}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_ends_with_6_and_leaves_whole_shards(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    import beit.commands.shard as command

    whole, how = command._add, {"shard_size": 4, "workers": workers}

    def full(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        if name.startswith("00000006"):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tar, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_add", full)
        code, _, err = cli("shard", data, tmp_path / "s", **how)
    told = f"cannot write {tmp_path / 's'}: No space left on device; make room or choose another place"
    assert (code, err) == (6, f"beit: {told}")
    assert not list((tmp_path / "s").glob(".*"))
    assert cli("shard", data, tmp_path / "s", **how)[0] == 0
    assert cli("shard", data, tmp_path / "unbroken", shard_size=4)[0] == 0
    assert files_of(tmp_path / "s") == files_of(tmp_path / "unbroken")


def test_a_validation_class_that_train_lacks_is_refused(cli: Cli, data: Path, tmp_path: Path) -> None:
    (data / "val" / "disc").rename(data / "val" / "oval")
    code, _, err = cli("shard", data, tmp_path / "s")
    assert code == 2
    assert "classes its train part does not know: oval; its train part's are" in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux")
def test_a_process_killed_at_any_moment_leaves_whole_shards_and_goes_on(
    data: Path, tmp_path: Path, cli: Cli
) -> None:
    for number in range(60):
        photo(data / "train" / "disc" / f"p{number}.png", (500, 500), number)
    words = [sys.executable, "-m", "beit", "shard", str(data), str(tmp_path / "s"), "--shard-size", "5"]
    finished = 0
    for delay in (0.0, 0.1):
        with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            for _ in range(3000):
                whole = list((tmp_path / "s").glob("train-*.tar"))
                if len(whole) > finished or process.poll() is not None:
                    break
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        whole = list((tmp_path / "s").glob("train-*.tar"))
        for shard in whole:
            with tarfile.open(shard) as tar:
                assert len(tar.getnames()) == 10  # five pictures and their labels
        finished = len(whole)
    assert cli("shard", data, tmp_path / "s", shard_size=5)[0] == 0
    assert cli("shard", data, tmp_path / "unbroken", shard_size=5)[0] == 0
    assert files_of(tmp_path / "s") == files_of(tmp_path / "unbroken")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux")
def test_a_killed_worker_is_reported_with_its_picture(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import beit.commands.shard as command

    whole = command.jpeg

    def deadly(content: bytes, name: str, settings: command.Shard) -> bytes:
        if name.endswith("square/03.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(content, name, settings)

    monkeypatch.setattr(command, "jpeg", deadly)
    code, _, err = cli("shard", data, tmp_path / "s", shard_size=4, workers=2)
    assert code == 1
    assert "beit: a worker process was killed by SIGKILL while reading" in err
    assert "square/03.png, twice. If memory was short" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "s" / "shards.json").read_text())["shards"] == {"train": 4, "val": 2}
