"""An index finds what exact search finds but for a hundredth, with the same cosines, and is never stale."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from test_embeddings import filled

import beit.faiss_index
from beit.embeddings import Embeddings, EmbeddingsError
from beit.faiss_index import key_of, nearest

pytest.importorskip("faiss")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "beit" / "faiss"


def groups(count: int, seed: int, width: int = 16) -> np.ndarray:
    """Rows around 40 centres, of lengths from 0.1 to 10."""
    centres = np.random.default_rng(0).standard_normal((40, width))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(40, size=count)] + 0.3 * rng.standard_normal((count, width))
    return (rows * rng.uniform(0.1, 10, (count, 1))).astype(np.float32)


@pytest.mark.parametrize("top", [1, 10, 60])
def test_what_it_finds_are_the_neighbours_of_exact_search(
    top: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = filled(tmp_path / "v", groups(3000, seed=1), shard_size=700)
    queries = groups(50, seed=2)
    cosines, rows = nearest(folder, queries, top)
    true_cosines, true = folder.nearest(queries, top)
    assert "looks into" in capsys.readouterr().err
    assert np.mean([np.isin(*pair).mean() for pair in zip(true, rows, strict=True)]) >= 0.97
    for ours, right, found, expected in zip(cosines, true_cosines, rows, true, strict=True):
        assert (np.diff(ours) <= 0).all()
        both = np.intersect1d(found, expected, return_indices=True)[1:]
        np.testing.assert_array_equal(ours[both[0]], right[both[1]])


def test_the_picture_itself_is_not_counted_as_found(tmp_path: Path) -> None:
    folder = filled(tmp_path / "v", groups(3000, seed=1), shard_size=700)
    index = beit.faiss_index.opened(folder)
    queries = beit.faiss_index.sample(folder, 200)
    true = folder.nearest(queries, 11)[1][:, 1:]
    found = beit.faiss_index.found_by(index, folder, queries, 11)[1]
    assert np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(true, found, strict=True)]) >= 0.99


def test_not_every_list_is_looked_into(tmp_path: Path) -> None:
    folder = filled(tmp_path / "v", groups(3000, seed=1), shard_size=700)
    index = beit.faiss_index.opened(folder)
    assert (index.ntotal, index.nlist) == (3000, 76)
    assert index.nprobe < 20


@pytest.mark.parametrize("count", [1, 2, 30])
def test_few_vectors_are_found_all(count: int, tmp_path: Path) -> None:
    folder = filled(tmp_path / "v", groups(count, seed=3))
    for ours, exact in zip(
        nearest(folder, groups(4, seed=4), 50), folder.nearest(groups(4, 4), 50), strict=True
    ):
        np.testing.assert_array_equal(ours, exact)


def test_who_finds_too_few_in_the_lists_is_answered_exactly(tmp_path: Path) -> None:
    folder = filled(tmp_path / "v", groups(3000, seed=1), shard_size=700)
    index = beit.faiss_index.opened(folder)
    index.nprobe = 1
    queries = groups(5, seed=2)
    found = beit.faiss_index.found_by(index, folder, queries, 2000)
    for ours, exact in zip(found, folder.nearest(queries, 2000), strict=True):
        np.testing.assert_array_equal(ours, exact)


def test_an_index_is_made_once_and_anew_for_other_vectors(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, queries = filled(tmp_path / "v", groups(200, seed=1)), groups(3, seed=2)
    first = nearest(folder, queries, 5)
    assert "making an index of 200 vectors" in capsys.readouterr().err
    second = nearest(Embeddings(folder.folder), queries, 5)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(first, second)
    other = filled(tmp_path / "w", groups(200, seed=9))
    assert key_of(other) != key_of(folder)
    nearest(other, queries, 5)
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_index_is_made_anew(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, queries = filled(tmp_path / "v", groups(200, seed=1)), groups(3, seed=2)
    expected = nearest(folder, queries, 5)
    (file,) = cache.iterdir()
    file.write_bytes(b"no index")
    np.testing.assert_array_equal(nearest(folder, queries, 5), expected)
    assert capsys.readouterr().err.count("making an index") == 2
    assert file.stat().st_size > 200


def test_a_cache_that_cannot_be_written_costs_only_the_keeping(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, queries = filled(tmp_path / "v", groups(200, seed=1)), groups(3, seed=2)
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where a folder should be")
    assert nearest(folder, queries, 5)[1].shape == (3, 5)
    assert "not kept: " in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r'--approximate needs faiss: pip install "beit\[faiss\]"'):
        nearest(filled(tmp_path / "v", groups(9, seed=1)), groups(1, seed=2), 3)


def test_queries_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingsError, match="only single vectors of one model can be compared"):
        nearest(filled(tmp_path / "v", groups(9, seed=1)), np.zeros((1, 5), np.float32), 3)
