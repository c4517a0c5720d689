"""What is kept between commands goes when it is too much."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import beit.graph_cache
from beit.cache import forget_old
from beit.graph_cache import key_of


def put(folder: Path, names: str, suffix: str, size: int) -> list[Path]:
    """A file a letter, the first the longest unused."""
    files = [folder / f"{name}{suffix}" for name in names]
    for age, file in enumerate(files):
        file.write_bytes(bytes(size))
        os.utime(file, (1000 + age, 1000 + age))
    return files


def test_the_longest_unused_go_first_and_the_new_one_stays(tmp_path: Path) -> None:
    files = put(tmp_path, "abcd", "", 100)
    forget_old([(file,) for file in files], 250, new=files[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_graph_and_its_weights_are_counted_and_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(beit.graph_cache, "KEPT_BYTES", 250)
    folder = beit.graph_cache.graph_folder()
    graphs = put(folder, "abc", ".xml", 10)
    put(folder, "abc", ".bin", 100)
    (folder / "choice.json").write_bytes(bytes(1000))  # no graph
    beit.graph_cache.forget_old_graphs(graphs[2])
    left = {path.name for path in folder.iterdir()}
    assert left == {"b.xml", "b.bin", "c.xml", "c.bin", "choice.json"}


def test_what_a_killed_export_left_goes_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = beit.graph_cache.graph_folder()
    for name, age in ((".a.xml.123", 2 * 86_400), (".b.xml.456", 3600)):
        (folder / name).mkdir()
        (folder / name / "b.bin").write_bytes(bytes(100))
        then = time.time() - age
        os.utime(folder / name, (then, then))
    beit.graph_cache.forget_old_graphs(folder / "c.xml")
    assert [path.name for path in folder.iterdir()] == [".b.xml.456"]


def test_a_graph_is_known_by_all_that_decides_its_answers_and_by_nothing_else(tmp_path: Path) -> None:
    """Of a file its name, which says how pictures are prepared; of a folder its two files of JSON."""
    for name in ("mine.pth", "beitv2_mine.pth"):
        (tmp_path / name).write_bytes(b"the same")
    assert key_of(tmp_path / "mine.pth") != key_of(tmp_path / "beitv2_mine.pth")
    folder = tmp_path / "model"
    (folder / "odd.json").mkdir(parents=True)
    (folder / "notes.json").write_bytes(b"\xe9")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    before = key_of(folder)
    (folder / "notes.json").write_bytes(b"{}")
    assert key_of(folder) == before
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text('{"other": 1}')
        assert key_of(folder) != before
        before = key_of(folder)
