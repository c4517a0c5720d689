"""What is kept between commands goes when it is too much."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import beit.graph_cache
from beit.cache import forget_old


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
