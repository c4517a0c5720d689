"""Files that are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import beit.atomic
from beit.atomic import CannotWrite, check_place, replacing, write_atomically


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content in (b"one", b"second", b""):
        write_atomically(file, content)
        assert file.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_written_through_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "real.json").write_bytes(b"old")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "store" / "real.json")
    os.mkfifo(tmp_path / "pipe.json")
    check_place(link)
    write_atomically(link, b"new")
    with replacing(link) as beside:
        assert beside.parent == tmp_path / "store"
        beside.write_bytes(b"newer")
    assert link.is_symlink()
    assert [p.read_bytes() for p in (tmp_path / "store").iterdir()] == [b"newer"]
    for wrong, what in ((tmp_path / "pipe.json", "a device"), (tmp_path / "store", "a folder")):
        with pytest.raises(CannotWrite, match=f"it is {what}; name a file"):
            check_place(wrong)
        with pytest.raises(CannotWrite, match=f"it is {what}; name a file"):
            write_atomically(wrong, b"new")
    assert (tmp_path / "pipe.json").is_fifo()


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_write_cut_short_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, b"old")

    def cut(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(beit.atomic.os, where, cut)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "a part is left beside it"
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_full_disk_is_told_of_the_file_that_was_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "a.json", b"new")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_content_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(beit.atomic.os, "fsync", lambda handle: order.append("fsync") or fsync(handle))
    monkeypatch.setattr(beit.atomic.os, "replace", lambda a, b: order.append("replace") or replace(a, b))
    write_atomically(tmp_path / "a", b"x")
    assert order[:2] == ["fsync", "replace"]
