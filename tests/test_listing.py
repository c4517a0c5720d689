"""Listings: tar shards, Parquet, links, addresses, patterns, and the index that is kept."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import beit.image
import beit.listing
from beit.data import ImageSource, find_pictures, has_split, open_source
from beit.image import BadImage


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "beit" / "index"


def png(value: int, size: tuple[int, int] = (4, 3)) -> bytes:
    """A picture whose first pixel tells which it is."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 7, 9)).save(stream, "PNG")
    return stream.getvalue()


def shown(source: ImageSource) -> list[int]:
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


def named(source: ImageSource) -> list[str]:
    return [source.classes[label] for label in source.labels]


def write_tar(file: Path, members: dict[str, bytes | str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            raw = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return file


# --- Tar shards ----------------------------------------------------------------------------------


def test_webdataset_shards_have_pictures_and_the_numbers_of_their_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", {"a.jpg": png(1), "a.cls": "10", "b.jpg": png(2), "b.cls": "9\n"})
    write_tar(tmp_path / "s-1.tar", {"c.cls": "2", "c.webp": png(3)})
    source = open_source(tmp_path, labelled=True)
    assert shown(source) == [1, 2, 3]
    assert source.classes == ("2", "9", "10")  # by value, so that 0 ... n - 1 are their own places
    assert named(source) == ["10", "9", "2"]
    assert [source.name(i) for i in range(3)] == [
        f"{tmp_path}/s-0.tar/a.jpg", f"{tmp_path}/s-0.tar/b.jpg", f"{tmp_path}/s-1.tar/c.webp",
    ]  # fmt: skip


@pytest.mark.parametrize("file", ["classes.txt", "classnames.txt"])
def test_numbers_are_named_by_the_lines_of_a_file_beside_the_shards(tmp_path: Path, file: str) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": png(1), "a.cls": "2", "b.jpg": png(2), "b.cls": "0"})
    (tmp_path / file).write_text("zebra\nyak\nant\n")
    source = open_source(tmp_path, labelled=True)
    assert source.classes == ("zebra", "yak", "ant")
    assert named(source) == ["ant", "zebra"]


def test_classes_of_one_name_stay_apart(tmp_path: Path) -> None:
    members = {f"{i}.{end}": v for i in range(3) for end, v in (("jpg", png(i)), ("cls", str(i)))}
    write_tar(tmp_path / "s.tar", members)
    (tmp_path / "classes.txt").write_text("crane\nowl\ncrane\n")
    source = open_source(tmp_path, labelled=True)
    assert source.classes == ("crane (0)", "owl", "crane (2)")
    assert source.labels.tolist() == [0, 1, 2]


def test_a_label_beyond_the_named_classes_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": png(1), "a.cls": "2"})
    (tmp_path / "classes.txt").write_text("zebra\nyak\n")
    with pytest.raises(ValueError, match="a label is 2, beyond the last of 2 named classes"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"a.json": '{"label": 3, "width": 4}'}, "3"),
        ({"a.json": '{"class_name": "cat", "label": 3}'}, "cat"),
        ({"a.json": '{"width": 4}', "a.txt": "cat"}, "cat"),
        ({"a.json": '[{"label": 3}]', "a.txt": "cat"}, "cat"),
        ({"a.json": '{"label": [3, 4], "cls": 0}'}, "0"),
        ({"a.TXT": "cat"}, "cat"),
        ({"a.txt": "tabby cat\n"}, "tabby cat"),
        ({"a.cls": "1", "a.json": '{"label": 3}', "a.txt": "cat"}, "1"),
        ({"a.txt": "cat", "a.json": '{"label": 3}', "a.cls": "1"}, "1"),
    ],
)
def test_labels_may_be_json_or_text_and_cls_comes_first(
    tmp_path: Path, members: dict[str, str], label: str
) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": png(1), **members})
    assert named(open_source(tmp_path / "s.tar", labelled=True)) == [label]


@pytest.mark.parametrize("content", ["a cat\non a mat", "a cat " * 40])
def test_captions_are_no_labels(tmp_path: Path, content: str) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": png(1), "a.txt": content})
    assert not len(open_source(tmp_path / "s.tar").labels)


def test_more_texts_than_a_set_has_classes_are_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beit.listing, "MAX_CLASSES", 3)
    for number in (3, 4):
        members = {
            f"{i}.{end}": v for i in range(number) for end, v in (("jpg", png(i)), ("txt", f"n{i}"))
        }
        source = open_source(write_tar(tmp_path / f"{number}.tar", members))
        assert len(source.classes) == (3 if number == 3 else 0)


def test_one_picture_without_a_label_leaves_the_source_without(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": png(1), "a.cls": "1", "b.jpg": png(2)})
    assert not len(open_source(tmp_path).labels)


def test_a_plain_tar_of_class_folders_is_read_as_the_folders_would_be(tmp_path: Path) -> None:
    members = {
        "./cat/1.png": png(1),
        "./dog/IMG.2020.png": png(2),
        "./cat/._1.png": b"Mac",
        "x.md": b"no",
    }
    source = open_source(write_tar(tmp_path / "s.tar", members), labelled=True)
    assert shown(source) == [1, 2]
    assert named(source) == ["cat", "dog"]


def test_what_belongs_to_a_picture_is_not_one(tmp_path: Path) -> None:
    members = {"a.jpg": png(1), "a.mask.png": png(99), "a.cls": "0", "IMG.2020.01.jpg": png(2)}
    assert shown(open_source(write_tar(tmp_path / "s.tar", members))) == [1, 2]


def test_long_and_foreign_names_are_kept(tmp_path: Path) -> None:
    name = "Übungen/" + "x" * 150 + "/füße.png"
    source = open_source(write_tar(tmp_path / "s.tar", {name: png(5)}))
    assert source.name(0) == f"{tmp_path}/s.tar/{name}"
    assert shown(source) == [5]


def test_a_shards_json_of_somebody_else_counts_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": png(1)})
    (tmp_path / "shards.json").write_text('{"wids_version": 1, "shardlist": [{"url": "s.tar"}]}')
    assert shown(open_source(tmp_path)) == [1]


def test_shards_of_a_split_are_told_by_their_names(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["train-00000", "train-00001", "validation-0", "test_0", "in1k-val-3"]
    ):
        write_tar(tmp_path / "data" / f"{name}.tar", {"a.jpg": png(number)})
    assert shown(open_source(tmp_path)) == [0, 1]
    assert sorted(shown(open_source(tmp_path, "val"))) == [2, 4]
    assert shown(open_source(tmp_path, "test")) == [3]
    assert [has_split(tmp_path, split) for split in ("train", "val", "dev")] == [True, True, False]
    with pytest.raises(ValueError, match="has shards named train but none named dev"):
        open_source(tmp_path, "dev")


def test_folders_of_splits_may_hold_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", {"a.jpg": png(1)})
    write_tar(tmp_path / "validation" / "0.tar", {"a.jpg": png(2)})
    assert shown(open_source(tmp_path)) == [1]
    assert shown(open_source(tmp_path, "val")) == [2]
    assert has_split(tmp_path, "val")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{00000..00002}.tar", [0, 1, 2]),
        ("s-{00001..00002}.tar", [1, 2]),
        ("s-0000{0,2}.tar", [0, 2]),
        ("s-*.tar", [0, 1, 2, 3]),
        ("?-00003.tar", [3]),
        ("s-0000[1-3].tar", [1, 2, 3]),
        ("{s,t}-00001.tar", [1, 11]),
    ],
)
def test_patterns_name_shards(tmp_path: Path, pattern: str, expected: list[int]) -> None:
    for number in range(4):
        write_tar(tmp_path / f"s-{number:05d}.tar", {"a.jpg": png(number)})
    write_tar(tmp_path / "t-00001.tar", {"a.jpg": png(11)})
    assert shown(open_source(tmp_path / pattern)) == expected


def test_a_pattern_that_names_what_is_not_there_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", {"a.jpg": png(0)})
    with pytest.raises(
        ValueError, match=r"s-1\.tar does not exist; missing of .*\{0\.\.2\}\.tar: 2 files"
    ):
        open_source(tmp_path / "s-{0..2}.tar")


def test_compressed_and_cut_tars_are_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=r"a\.tar is not a whole, uncompressed tar"):
        open_source(tmp_path / "a.tar")
    whole = write_tar(tmp_path / "b.tar", {"a.jpg": png(1), "b.jpg": bytes(4000)}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"b\.tar is not a whole, uncompressed tar"):
        open_source(tmp_path / "b.tar")


@pytest.mark.parametrize("harm", ["header", "cut in a header"])
def test_a_tar_that_breaks_off_is_refused_and_not_read_in_part(tmp_path: Path, harm: str) -> None:
    """tarfile takes a damaged header for the end of the archive."""
    file = write_tar(tmp_path / "a.tar", {f"{i}.jpg": png(i) for i in range(4)})
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        at = tar.getmembers()[2].offset
    damaged = whole[:at] + b"A" * 512 + whole[at + 512 :]
    file.write_bytes(damaged if harm == "header" else whole[: at + 100])
    with pytest.raises(ValueError, match=rf"a\.tar is not a whole.*damaged or cut at byte {at:,}"):
        open_source(file)


def test_a_tar_without_the_zeros_at_its_end_is_whole(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {f"{i}.jpg": png(i) for i in range(4)})
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    blocks = -(-last.size // tarfile.BLOCKSIZE)
    file.write_bytes(file.read_bytes()[: last.offset_data + blocks * tarfile.BLOCKSIZE])
    assert shown(open_source(file)) == [0, 1, 2, 3]


def test_pictures_come_before_stray_shards_which_are_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(png(1))
    write_tar(tmp_path / "download.tar", {"a.jpg": png(2)})
    assert shown(open_source(tmp_path)) == [1]
    assert "left out 1 shard beside the pictures" in capsys.readouterr().err


# --- Parquet -------------------------------------------------------------------------------------


def write_parquet(
    file: Path, values: list[int | None], names: list[str] | None, **options: object
) -> None:
    """The layout of Hugging Face's datasets: image {bytes, path}, label, features in the metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pyarrow.array(
        [{"bytes": None if v is None else png(v), "path": f"{v}.png"} for v in values],
        type=pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    )
    label = pyarrow.array([(v or 0) % 3 for v in values], type=pyarrow.int64())
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    about = json.dumps({"info": {"features": features}})
    table = pyarrow.table({"image": image, "label": label}).replace_schema_metadata(
        {"huggingface": about}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, **options)


def test_parquet_of_hugging_face_has_pictures_labels_and_names(tmp_path: Path) -> None:
    names = ["tench", "snake", "church"]
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", [4, 5, 6, 7], names, row_group_size=3)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", [8], names)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [9], names)
    source = open_source(tmp_path, labelled=True)
    assert shown(source) == [4, 5, 6, 7, 8]
    assert source.classes == ("tench", "snake", "church")
    assert named(source) == [names[v % 3] for v in (4, 5, 6, 7, 8)]
    assert source.name(4).endswith("train-00001-of-00002.parquet/row 0")
    assert shown(open_source(tmp_path, "val")) == [9]


@pytest.mark.parametrize(
    "features", [{"tags": [{"_type": "Value"}], "label": {"_type": "ClassLabel"}}, None]
)
def test_features_that_are_lists_or_none_hide_no_pictures(tmp_path: Path, features: Any) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.table({"tags": [["a"]], "image": [png(5)], "label": [0]})
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    assert shown(open_source(tmp_path / "a.parquet")) == [5]


@pytest.mark.parametrize("unknown", [None, -1])
def test_a_test_sets_unknown_labels_are_none(tmp_path: Path, unknown: int | None) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [png(1), png(2)], "label": [unknown, unknown]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert (shown(source), source.classes) == ([1, 2], ())


def test_only_large_row_groups_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2], None)
    open_source(tmp_path / "a.parquet")
    assert not capsys.readouterr().err


def test_parquet_may_be_read_in_any_order_by_several_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    write_parquet(tmp_path / "a.parquet", list(range(60)), None, row_group_size=7)
    source = open_source(tmp_path / "a.parquet")
    order = np.random.default_rng(0).permutation(60)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: int(source.read(i)[0, 0, 0]), order)) == order.tolist()


def test_a_column_of_bytes_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"image.bytes": [png(5), png(6)]}), tmp_path / "a.parquet"
    )
    assert shown(open_source(tmp_path / "a.parquet")) == [5, 6]


def test_a_glimpse_of_a_row_is_its_size_and_what_follows_its_middle(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = np.random.default_rng(0).bytes(20_001)
    parquet.write_table(pyarrow.table({"image": [content]}), tmp_path / "a.parquet")
    (tmp_path / "a.png").write_bytes(content)
    for place in (tmp_path / "a.parquet", tmp_path):
        seen = open_source(place).paths.glimpse(0)
        assert seen == b"20001 " + content[10_000:14_096]


def test_a_row_without_bytes_is_a_bad_picture(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1, None], None)
    with pytest.raises(BadImage, match="row 1: a row without bytes"):
        open_source(tmp_path / "a.parquet").read(1)


def test_parquet_without_pictures_names_its_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"x": [1], "y": ["a"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="has no column of bytes; its columns are x, y"):
        open_source(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        open_source(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("library", "place", "extra"),
    [("pyarrow", "a.parquet", "parquet"), ("fsspec.core", "s3://bucket/x.tar", "remote")],
)
def test_missing_extra_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, place: str, extra: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf'pip install "beit\[{extra}\]"'):
        open_source(place)


# --- Folders on odd disks ------------------------------------------------------------------------


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/._1.png", ".thumbnails/1.png", "cat/.cache/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "cat" / "1.png")]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(png(1))
    (tmp_path / "data" / "dog").mkdir(parents=True)
    (tmp_path / "data" / "dog" / "2.png").write_bytes(png(2))
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "dog" / "up").symlink_to(tmp_path / "data")
    source = open_source(tmp_path / "data", labelled=True)
    assert shown(source) == [1, 2]
    assert named(source) == ["cat", "dog"]


@pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
def test_names_that_are_not_utf8_and_names_with_line_ends_can_be_read(tmp_path: Path) -> None:
    for number, name in enumerate([b"\xff\xfe.png", b"a\nb.png", b"c d.png"]):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as stream:
            stream.write(png(number))
    assert sorted(shown(open_source(tmp_path))) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_a_folder_and_a_dead_link_are_bad_pictures_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere")
    source = open_source(tmp_path)
    with pytest.raises(BadImage, match=r"a\.png: not a file"):
        source.read(0)
    with pytest.raises(BadImage, match=r"b\.png: no such file"):
        source.read(1)


def test_a_place_is_a_sequence_of_paths(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(1))
    paths = open_source(tmp_path).paths
    expected = [tmp_path / f"{name}.png" for name in "abc"]
    assert (list(paths), len(paths), paths[1:], paths[-1]) == (expected, 3, expected[1:], expected[2])
    assert paths == open_source(tmp_path).paths
    (tmp_path / "d.png").write_bytes(png(1))
    assert paths != open_source(tmp_path).paths
    with pytest.raises(IndexError):
        paths[3]


# --- Addresses -----------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[Callable[[str, bytes], None]]:
    """Put files into fsspec's file system in memory."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    yield lambda path, content: system.pipe_file(f"/bucket/{path}", content)
    system.rm("/bucket", recursive=True)


def test_a_folder_behind_an_address_is_as_one_on_disk(bucket: Callable[[str, bytes], None]) -> None:
    bucket("set/train/cat/1.png", png(1))
    bucket("set/train/dog/2.png", png(2))
    bucket("set/val/dog/3.png", png(3))
    for place in ("memory://bucket/set", Path("memory://bucket/set")):
        source = open_source(place, labelled=True)
        assert shown(source) == [1, 2]
        assert named(source) == ["cat", "dog"]
    assert source.name(0) == "memory://bucket/set/train/cat/1.png"
    assert shown(open_source("memory://bucket/set", "val")) == [3]
    assert has_split("memory://bucket/set", "val")


def test_a_folder_behind_an_address_has_the_order_of_one_on_disk(
    bucket: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    names = [
        "cat/1.png",
        "cat-big/2.png",
        "cat.png",
        "a.run/report/3.png",
        "a.run/run.toml",
        "dog/.4.png",
        "dog/b/5.png",
    ]
    for number, name in enumerate(names):
        content = png(number)
        bucket(f"set/{name}", content)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert shown(open_source("memory://bucket/set")) == shown(open_source(tmp_path)) == [0, 1, 2, 6]


def test_a_library_that_lost_its_connection_is_asked_again(
    bucket: Callable[[str, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class HungUp(Exception):  # aiohttp's are no OSErrors
        pass

    bucket("set/1.png", png(1))
    source = open_source("memory://bucket/set")
    system = beit.listing.file_system("memory://bucket")[0]
    real, left = type(system).cat_file, [2]

    def cat_file(*given: Any, **options: Any) -> bytes:
        if left[0]:
            left[0] -= 1
            raise HungUp("server disconnected")
        return bytes(real(*given, **options))

    monkeypatch.setattr(type(system), "cat_file", cat_file)
    monkeypatch.setattr("beit.image.PAUSES_S", (0.0, 0.0))
    assert shown(source) == [1]
    left[0] = 3
    with pytest.raises(BadImage, match="HungUp: server disconnected"):
        source.open(0)


def test_shards_and_lists_behind_an_address_are_as_those_on_disk(
    bucket: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    for number in range(2):
        tar = write_tar(tmp_path / "x.tar", {"a.jpg": png(number), "a.cls": str(number)})
        bucket(f"s/{number}.tar", tar.read_bytes())
    bucket("s/classes.txt", b"ant\nbee\n")
    bucket("p/1.png", png(7))
    bucket("p/list.csv", b"path,label\n1.png,cat\n")
    for place in ("memory://bucket/s", "memory://bucket/s/*.tar", "memory://bucket/s/{0..1}.tar"):
        source = open_source(place, labelled=True)
        assert (shown(source), named(source)) == ([0, 1], ["ant", "bee"])
    source = open_source("memory://bucket/p/list.csv", labelled=True)
    assert (shown(source), named(source)) == ([7], ["cat"])
    (tmp_path / "list.txt").write_text("memory://bucket/p/1.png\n")
    assert shown(open_source(tmp_path / "list.txt")) == [7]


def test_an_address_that_leads_nowhere_is_named(bucket: Callable[[str, bytes], None]) -> None:
    bucket("x", b"")
    with pytest.raises(ValueError, match="memory://bucket/none does not exist"):
        open_source("memory://bucket/none")


# --- The index that is kept ----------------------------------------------------------------------


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beit.listing, "WORTH_KEEPING_S", -1.0)


def grow_old(*places: Path) -> None:
    """As if nothing had changed for an hour."""
    for place in places:
        for path in [place, *place.rglob("*")]:
            os.utime(path, (time.time() - 3600, time.time() - 3600))


def layouts(root: Path) -> dict[str, Path]:
    """The same three labelled pictures in five layouts."""
    for name, value in (("cat/1", 1), ("cat/2", 2), ("dog/3", 3)):
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / f"{name}.png").write_bytes(png(value))
    members = {
        "1.png": png(1),
        "1.cls": "cat",
        "2.png": png(2),
        "2.cls": "cat",
        "3.png": png(3),
        "3.cls": "dog",
    }
    write_tar(root / "tar" / "s.tar", members)  # type: ignore[arg-type]
    (root / "list.csv").write_text(
        "path,label\nfolder/cat/1.png,cat\nfolder/cat/2.png,cat\nfolder/dog/3.png,dog\n"
    )
    (root / "list.txt").write_text("folder/cat/1.png\nfolder/cat/2.png\nfolder/dog/3.png\n")
    grow_old(root)
    return {
        "folder": root / "folder",
        "tar": root / "tar",
        "csv": root / "list.csv",
        "txt": root / "list.txt",
    }


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("layout", ["folder", "tar", "csv", "txt"])
def test_a_kept_index_says_the_same_and_is_not_made_again(
    tmp_path: Path, cache: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = layouts(tmp_path / "data")[layout]
    made = open_source(place)
    assert list(cache.iterdir())
    assert not list(cache.glob(".*")), "nothing half-written is left"
    monkeypatch.setattr(beit.listing, "_Rows", None)  # whoever makes one anew, fails
    kept = open_source(place)
    assert isinstance(kept.paths.text, np.memmap)
    assert kept.paths == made.paths
    assert (shown(kept), kept.classes) == ([1, 2, 3], made.classes)
    np.testing.assert_array_equal(kept.labels, made.labels)


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("settled", [True, False])
def test_what_changed_is_listed_anew(tmp_path: Path, settled: bool) -> None:
    places = layouts(tmp_path / "data")
    for place in places.values():
        open_source(place)
    (places["folder"] / "dog" / "4.png").write_bytes(png(4))
    write_tar(
        places["tar"] / "s.tar", {"1.png": png(1), "2.png": png(2), "3.png": png(3), "4.png": png(4)}
    )
    with places["csv"].open("a") as stream:
        stream.write("folder/dog/4.png,dog\n")
    with places["txt"].open("a") as stream:
        stream.write("folder/dog/4.png\n")
    for place in places.values():
        assert shown(open_source(place)) == [1, 2, 3, 4]
    if settled:
        grow_old(tmp_path / "data")
    for place in places.values():
        assert shown(open_source(place)) == [1, 2, 3, 4]


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("same", ["size", "time"])
def test_a_shard_that_changed_in_its_size_or_its_time_alone_is_listed_anew(
    tmp_path: Path, same: str
) -> None:
    file = write_tar(tmp_path / "s.tar", {"a.png": png(1)})
    grow_old(tmp_path)
    open_source(file)
    time_before = file.stat().st_mtime_ns
    size_before = file.stat().st_size
    names = ("b.png",) if same == "size" else tuple(f"{i}.png" for i in range(20))
    write_tar(file, {name: png(2) for name in names})
    assert (file.stat().st_size == size_before) == (same == "size")
    os.utime(file, ns=(time_before, time_before) if same == "time" else (time_before - 9**10,) * 2)
    assert [Path(path).name for path in open_source(file).paths] == list(names)


@pytest.mark.usefixtures("keep_all")
def test_new_names_of_classes_beside_a_shard_are_seen(tmp_path: Path) -> None:
    """A file that was not there when the index was made is watched too."""
    write_tar(tmp_path / "d" / "s.tar", {"a.png": png(1), "a.cls": "0"})
    grow_old(tmp_path / "d")
    assert open_source(tmp_path / "d", labelled=True).classes == ("0",)
    (tmp_path / "d" / "classes.txt").write_text("cat\n")
    assert open_source(tmp_path / "d" / "s.tar", labelled=True).classes == ("cat",)


@pytest.mark.usefixtures("keep_all")
def test_a_relative_path_is_of_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, folder in enumerate("ab"):
        write_tar(tmp_path / folder / "s.tar", {f"{folder}.png": png(number)})
        grow_old(tmp_path / folder)
        os.utime(tmp_path / folder / "s.tar", (1e9, 1e9))
        monkeypatch.chdir(tmp_path / folder)
        assert open_source("s.tar").name(0) == f"s.tar/{folder}.png"


@pytest.mark.usefixtures("keep_all")
def test_a_dead_link_that_leads_somewhere_at_last_is_followed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(png(1))
    (tmp_path / "d" / "more").symlink_to(tmp_path / "later")
    grow_old(tmp_path / "d" / "a.png")
    os.utime(tmp_path / "d", (1e9, 1e9))
    assert shown(open_source(tmp_path / "d")) == [1]
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "b.png").write_bytes(png(2))
    assert shown(open_source(tmp_path / "d")) == [1, 2]


@pytest.mark.usefixtures("keep_all")
def test_what_has_only_just_changed_is_not_kept(tmp_path: Path, cache: Path) -> None:
    """Another change might leave it the same size within the same tick of the clock."""
    (tmp_path / "a.png").write_bytes(png(1))
    open_source(tmp_path)
    assert not cache.exists()


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("name", ["*.*", "*.npy", "labels.npy"])
@pytest.mark.parametrize("size", [20, 0, None])
def test_a_broken_index_is_made_anew(tmp_path: Path, cache: Path, name: str, size: int | None) -> None:
    place = layouts(tmp_path / "data")["tar"]
    open_source(place)
    for file in cache.rglob(name):
        if file.is_file():
            content = file.read_bytes()
            file.unlink()  # as another process that makes it anew
            if size is not None:
                file.write_bytes(content[:size])
    for _ in range(2):
        source = open_source(place)
        assert shown(source) == [1, 2, 3]
        assert named(source) == ["cat", "cat", "dog"]


@pytest.mark.usefixtures("keep_all")
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, cache: Path) -> None:
    place = layouts(tmp_path / "data")["tar"]
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    assert shown(open_source(place)) == [1, 2, 3]


def test_a_million_paths_take_less_than_100_bytes_each() -> None:
    rows = beit.listing._Rows()
    for number in range(100_000):
        rows.add(f"n{number % 1000:08d}/n{number:08d}_{number}.JPEG", f"n{number % 1000:08d}")
    listing = rows.listing(["root"])
    held = sum(column.nbytes for column in beit.listing._columns(listing).values())
    assert held / len(listing.places) < 60
    assert listing.places.name(77_777) == "root/n00000777/n00077777_77777.JPEG"
    assert listing.classes[listing.labels[77_777]] == "n00000777"


# --- What is easily lost -------------------------------------------------------------------------


def test_all_shards_of_a_folder_are_found_whatever_split_they_are_of(tmp_path: Path) -> None:
    for number, name in enumerate(("train-00000", "val-00000", "deeper/val/0")):
        write_tar(tmp_path / "shards" / f"{name}.tar", {"a.jpg": png(number)})
    (found,) = find_pictures([str(tmp_path / "shards")], "classify")
    assert isinstance(found, ImageSource)
    assert sorted(shown(found)) == [0, 1, 2]


def test_shards_beside_pictures_are_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "all" / "s-0.tar", {"a.jpg": png(1)})
    (tmp_path / "all" / "b.png").write_bytes(png(2))
    (found,) = find_pictures([str(tmp_path / "all")], "embed")
    assert isinstance(found, ImageSource)
    assert shown(found) == [2]
    assert "left out 1 shard beside the pictures" in capsys.readouterr().err


def test_a_pattern_that_goes_deeper_names_each_picture_once(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b/c.png", "b/d/e.png", "bb.png")):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(png(number))
    found = find_pictures([f"{tmp_path}/p/**/*"], "classify")
    names = [str(p.paths[i]) for p in found if isinstance(p, ImageSource) for i in range(len(p))]
    names += [place for place in found if isinstance(place, str)]
    told = sorted(os.path.relpath(name, tmp_path / "p") for name in names)
    assert told == ["a.png", "b/c.png", "b/d/e.png", "bb.png"]


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(png(1))
    (tmp_path / "p" / "loop").symlink_to("loop")
    assert shown(open_source(tmp_path / "p")) == [1]


def test_links_in_a_tar_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.png", "b.png", "c.png"):
            tar.add(tmp_path / name, name)
    assert shown(open_source(tmp_path / "s.tar")) == [1]
    assert "left out 2 links" in capsys.readouterr().err


def test_a_folder_of_a_run_is_listed_where_it_is_asked_for_itself(tmp_path: Path) -> None:
    for name in ("p/run.toml", "p/a.png", "p/deeper/run.toml", "p/deeper/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(4))
    assert [path.name for path in open_source(tmp_path / "p").paths] == ["a.png"]


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(6))
    for name, text in (("list.txt", "a.png\n"), ("list.csv", "path,label\na.png,x\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert shown(open_source(tmp_path / name)) == [6]


def test_a_list_may_name_pictures_in_several_shards_and_folders(tmp_path: Path) -> None:
    for number, shard in enumerate(("x.tar", "y.tar")):
        write_tar(tmp_path / shard, {"a.png": png(2 * number), "b.png": png(2 * number + 1)})
    names = ["y.tar/b.png", "x.tar/a.png", "y.tar/a.png", "x.tar/b.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    source = open_source(tmp_path / "list.txt")
    assert shown(source) == [3, 0, 2, 1]
    assert [source.name(i) for i in range(4)] == [f"{tmp_path}/{name}" for name in names]


def test_a_column_part_tells_a_split_only_where_one_part_is_train(tmp_path: Path) -> None:
    """Of others it may be a part of a machine. A short row has none."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = "path,part\n0.png,{}\n1.png,{}\n2.png,{}\n3.png\n"
    (tmp_path / "a.csv").write_text(rows.format("train", "val", "train"))
    (tmp_path / "b.csv").write_text(rows.format("wheel", "val", "wheel"))
    for part, expected in (("train", [0, 2]), ("val", [1])):
        listing = beit.listing.list_csv(str(tmp_path / "a.csv"), False, part)
        assert [int(path.stem) for path in listing.places] == expected
    assert len(beit.listing.list_csv(str(tmp_path / "a.csv"), False).places) == 4
    assert len(beit.listing.list_csv(str(tmp_path / "b.csv"), False, "val").places) == 4
    with pytest.raises(ValueError, match="no row of the part 'test'; its parts are train, val"):
        beit.listing.list_csv(str(tmp_path / "a.csv"), False, "test")


def test_a_piece_of_any_size_is_never_taken_for_a_small_one() -> None:
    rows = beit.listing._Rows()
    rows.add("a.png", None, (0, 512, 2**32 + 5))
    assert rows.listing(["s.tar"]).places.size.tolist() == [2**32 - 1]


def test_labels_that_were_asked_for_are_no_captions_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beit.listing, "MAX_CLASSES", 3)
    rows = [f"{i}.png,n{i}" for i in range(5)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    assert len(open_source(tmp_path / "list.csv", labelled=True).classes) == 5
    assert open_source(tmp_path / "list.csv").classes == ()


def test_a_list_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png\nb.png\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"list\.txt is no list of paths in UTF-8"):
        open_source(tmp_path / "list.txt")


def test_a_csv_may_name_a_file_whose_name_is_no_utf8(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(png(3))
    (tmp_path / "list.csv").write_bytes(b"path,label\ncaf\xe9.png,x\n")
    assert shown(open_source(tmp_path / "list.csv", labelled=True)) == [3]
    (tmp_path / "list.csv").write_bytes(b"path,label\nth\xe9.png,x\n")
    with pytest.raises(ValueError, match=r"line 2 of .*list\.csv is not UTF-8 \(th\\xe9\.png\)"):
        open_source(tmp_path / "list.csv", labelled=True)


def test_a_picture_of_unknown_size_behind_an_address_is_read(
    bucket: Callable[[str, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket("set/a.png", png(5))
    source = open_source("memory://bucket/set")
    system = beit.listing.file_system("memory://bucket")[0]
    monkeypatch.setattr(type(system), "size", lambda *_: None)
    assert shown(source) == [5]
    monkeypatch.setattr(beit.listing, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(beit.image, "MAX_FILE_BYTES", 10)
    with pytest.raises(BadImage, match="the limit is 10"):
        source.read(0)


def test_classes_named_by_numbers_keep_their_names_and_come_by_value(tmp_path: Path) -> None:
    for number, name in enumerate(("1", "010", "002", "01")):
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "a.png").write_bytes(png(number))
    source = open_source(tmp_path / "p", labelled=True)
    assert source.classes == ("01", "1", "002", "010")
    assert dict(zip(shown(source), named(source), strict=True)) == {0: "1", 1: "010", 2: "002", 3: "01"}


def test_threads_read_a_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [png(i) for i in range(16)], "label": list(range(16))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    source, read = open_source(tmp_path / "a.parquet"), []
    ours = beit.listing._open_parquet
    monkeypatch.setattr(beit.listing, "_open_parquet", lambda file: read.append(file) or ours(file))
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda i: int(source.read(i)[0, 0, 0]), range(16)))
    assert values == list(range(16))
    assert len(read) == 2


def test_files_that_number_their_classes_otherwise_are_read_by_name(tmp_path: Path) -> None:
    for folder, names in (("a", "cat\ndog\n"), ("b", "dog\ncat\n")):
        write_tar(tmp_path / folder / "0.tar", {"x.png": png(1), "x.cls": "0"})
        (tmp_path / folder / "classes.txt").write_text(names)
    assert named(open_source(tmp_path, labelled=True)) == ["cat", "dog"]
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = pa.table({"image": [png(1), png(2)], "label": [0, 1]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
        parquet.write_table(table, tmp_path / f"{number}.parquet")
    source = open_source(tmp_path / "{0,1}.parquet", labelled=True)
    assert named(source) == ["cat", "dog", "dog", "cat"]


def test_a_plain_tar_of_class_folders_keeps_names_with_dots(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"x/a.png": png(1), "x/a.edited.png": png(2), "y/a.png": png(3)}
    source = open_source(write_tar(tmp_path / "s.tar", members), labelled=True)
    assert shown(source) == [1, 2, 3]
    assert named(source) == ["x", "x", "y"]


def test_a_list_may_name_pictures_in_shards(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"a.png": png(1), "a.cls": "0", "d/b.png": png(2), "d/b.cls": "1"}
    write_tar(tmp_path / "s" / "x.tar", members)
    (tmp_path / "c.png").write_bytes(png(3))
    rows = ["path,label", "s/x.tar/d/b.png,p", "c.png,q", "s/x.tar/a.png,q", "s/x.tar/lost.png,p"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    source = open_source(tmp_path / "list.csv", labelled=True)
    assert named(source) == ["p", "q", "q", "p"]
    assert [source.name(i) for i in range(3)] == [
        f"{tmp_path}/s/x.tar/d/b.png", f"{tmp_path}/c.png", f"{tmp_path}/s/x.tar/a.png",
    ]  # fmt: skip
    assert [int(source.read(i)[0, 0, 0]) for i in range(3)] == [2, 3, 1]
    for i, content in enumerate(map(png, (2, 3, 1))):
        assert source.paths.glimpse(i) == b"%d " % len(content) + content[len(content) // 2 :]
    with pytest.raises(BadImage, match=r"lost\.png: cannot be read"):
        source.read(3)
    (tmp_path / "list.txt").write_text("s/x.tar/a.png\n")
    assert shown(open_source(tmp_path / "list.txt")) == [1]


def test_a_kept_list_sees_a_shard_that_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beit.listing, "WORTH_KEEPING_S", 0.0)
    monkeypatch.setattr(beit.listing, "UNSETTLED_S", -10.0)
    (tmp_path / "list.txt").write_text("x.tar/a.png\n")
    with pytest.raises(BadImage, match=r"x\.tar/a\.png: no such file"):
        open_source(tmp_path / "list.txt").read(0)
    write_tar(tmp_path / "x.tar", {"a.png": png(7)})
    assert shown(open_source(tmp_path / "list.txt")) == [7]


def test_a_list_names_pictures_in_parquet_as_well(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [png(i) for i in range(6)]}), tmp_path / "a.parquet")
    (tmp_path / "list.txt").write_text("a.parquet/row 4\na.parquet/row 1\n")
    assert shown(open_source(tmp_path / "list.txt")) == [4, 1]


def test_an_address_that_nothing_speaks_is_a_bad_picture(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    (tmp_path / "list.txt").write_text("abc://x/y.png\n")
    with pytest.raises(BadImage, match=r"abc://x/y\.png: cannot be read"):
        open_source(tmp_path / "list.txt").read(0)


def test_the_picture_that_has_no_label_is_named(tmp_path: Path) -> None:
    for name in ("p/x/1.png", "p/y/2.png", "p/cover.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    with pytest.raises(ValueError, match=r"p has no classes: .*p/cover\.png has none, though others"):
        open_source(tmp_path / "p", labelled=True)
    write_tar(tmp_path / "s.tar", {"a.png": png(1), "a.cls": "1", "b.png": png(2)})
    with pytest.raises(ValueError, match=r"has no classes: .*s\.tar/b\.png has none"):
        open_source(tmp_path / "s.tar", labelled=True)


def test_an_empty_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "train" / "x").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "x" / "1.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"val holds no pictures; put some there, or remove it"):
        open_source(tmp_path, "val")


def test_a_class_whose_name_is_no_utf8_is_refused_where_labels_count(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/1.png", "wb") as file:
        file.write(png(1))
    assert shown(open_source(tmp_path)) == [1]
    with pytest.raises(ValueError, match=r"has the class caf\\xe9, whose name is not UTF-8; rename it"):
        open_source(tmp_path, labelled=True)


def test_a_kept_index_sees_a_link_that_begins_to_lead_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beit.listing, "WORTH_KEEPING_S", 0.0)
    monkeypatch.setattr(beit.listing, "UNSETTLED_S", -10.0)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "1.png").write_bytes(png(1))
    (tmp_path / "p" / "more").symlink_to(tmp_path / "disk")
    assert shown(open_source(tmp_path / "p")) == [1]
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "2.png").write_bytes(png(2))
    assert sorted(shown(open_source(tmp_path / "p"))) == [1, 2]
