"""The folder of embeddings: what is sealed is whole, what is read is what was written, search is exact."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT

import beit.embeddings
from beit.atomic import CannotWrite
from beit.embeddings import (
    BadPicture,
    Embeddings,
    EmbeddingsError,
    Manifest,
    begin,
    make_scratch,
    model_sha256,
    sweep,
    unit,
)
from beit.hub import sha256_of

MANIFEST = Manifest(
    pictures=25, pictures_sha256="p", model="m", model_sha256="m", image_spec={"size": [32, 32]},
    image_spec_sha256="s", runtime="torch", precision="fp32", batch_size=16, pooling="mean", layer=None,
    shape=(12,), dtype="fp32", normalise=False, format="npy", shard_size=10,
)  # fmt: skip


def filled(folder: Path, rows: np.ndarray, **fields: Any) -> Embeddings:
    """A folder with these rows, all of them, in shards of ten."""
    made = begin(folder, replace(MANIFEST, pictures=len(rows), shape=rows.shape[1:], **fields))
    for shard in range(made.manifest.shards):
        numbers = made.manifest.pictures_of(shard)
        ids = [(i, f"{i}.png") for i in numbers]
        made.write(shard, ids, rows[numbers.start : numbers.stop], [])
    made.close()
    return Embeddings(folder)


def random_rows(count: int, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- Writing and reading -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_what_is_read_is_what_was_written(tmp_path: Path, form: str, dtype: str) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    rows = random_rows(25).astype(beit.embeddings.DTYPES[dtype])
    folder = filled(tmp_path / "v", rows, format=form, dtype=dtype)
    assert len(folder) == 25
    read = [folder.vectors(shard) for shard in range(3)]
    assert {vectors.dtype for vectors in read} == {rows.dtype}
    np.testing.assert_array_equal(np.concatenate(read), rows)
    assert [i for shard in range(3) for i in folder.ids(shard)] == [(i, f"{i}.png") for i in range(25)]
    assert folder.paths([24, 0, 9, 10, 0]) == ["24.png", "0.png", "9.png", "10.png", "0.png"]
    ending = {"npy": {"npy", "csv", "json"}, "parquet": {"parquet", "json"}}[form]
    expected = {f"0000{shard}.{end}" for shard in range(3) for end in ending}
    assert names(folder.folder) == expected | {"embeddings.json"}


def test_other_programs_can_read_parquet_and_npy(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = random_rows(10)
    filled(tmp_path / "p", rows, format="parquet")
    table = parquet.read_table(tmp_path / "p" / "00000.parquet").to_pydict()
    np.testing.assert_array_equal(np.array(table["vector"], np.float32), rows)
    assert table["path"][3] == "3.png"
    filled(tmp_path / "n", rows)
    np.testing.assert_array_equal(np.load(tmp_path / "n" / "00000.npy"), rows)


def test_any_name_of_a_file_comes_back(tmp_path: Path) -> None:
    strange = ["a,b.png", 'c"d.png', "line\nbreak.png", "back\r.png", "ü.png", os.fsdecode(b"\xff.png")]
    folder = begin(tmp_path / "v", replace(MANIFEST, pictures=6))
    folder.write(0, list(enumerate(strange)), random_rows(6), [])
    assert [name for _, name in folder.ids(0)] == strange


def test_parquet_has_a_name_for_a_file_whose_own_is_not_text(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = begin(tmp_path / "v", replace(MANIFEST, pictures=1, format="parquet"))
    folder.write(0, [(0, os.fsdecode(b"\xff.png"))], random_rows(1), [])
    assert folder.ids(0) == [(0, "?.png")]


def test_rows_of_bad_pictures_are_absent_and_the_others_keep_their_order(tmp_path: Path) -> None:
    folder = begin(tmp_path / "v", replace(MANIFEST, pictures=13))
    folder.write(0, [(i, f"{i}") for i in (0, 1, 3)], random_rows(3),
                 [BadPicture(i, f"{i}", "broken") for i in (2, 4, 5, 6, 7, 8, 9)])  # fmt: skip
    folder.write(
        1, [], np.empty((0, 12), np.float32), [BadPicture(i, f"{i}", "x") for i in (10, 11, 12)]
    )
    folder.write_bad_images()
    folder.close()
    assert len(folder) == 3
    assert folder.paths([2]) == ["3"]
    assert folder.vectors(1).shape == (0, 12)
    lines = (tmp_path / "v" / "bad_images.csv").read_text().splitlines()
    assert lines[:2] == ["index,path,reason", "2,2,broken"]
    assert [int(line.split(",")[0]) for line in lines[1:]] == [2, *range(4, 13)]
    before = os.stat(tmp_path / "v" / "bad_images.csv").st_mtime_ns
    folder.write_bad_images()
    assert os.stat(tmp_path / "v" / "bad_images.csv").st_mtime_ns == before


def test_a_list_of_bad_pictures_that_is_no_longer_true_goes(tmp_path: Path) -> None:
    folder = begin(tmp_path / "v", replace(MANIFEST, pictures=1))
    folder.write(0, [], np.empty((0, 12), np.float32), [BadPicture(0, "0", "x")])
    folder.write_bad_images()
    assert (tmp_path / "v" / "bad_images.csv").exists()
    folder.write(0, [(0, "0")], random_rows(1), [])
    folder.write_bad_images()
    assert not (tmp_path / "v" / "bad_images.csv").exists()


# --- Seals ---------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("ending", ["npy", "csv", "json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda file: file.write_bytes(b"{}")])
def test_a_shard_that_lacks_something_is_not_sealed(tmp_path: Path, ending: str, damage: Any) -> None:
    folder = filled(tmp_path / "v", random_rows(25))
    assert set(folder.seals()) == {0, 1, 2}
    damage(folder.folder / f"00001.{ending}")
    assert set(folder.seals()) == {0, 2}
    with pytest.raises(EmbeddingsError, match="has 2 of 3 shards; give the same `beit embed` again"):
        len(Embeddings(folder.folder))


@pytest.mark.parametrize(
    "harm",
    [
        lambda seal: seal.update(rows=9),
        lambda seal: seal["files"].pop("00001.csv"),
        lambda seal: seal["bad"].append([3, "3", "broken"]),
    ],
)
def test_a_seal_that_does_not_account_for_every_picture_and_file_is_none(
    tmp_path: Path, harm: Any
) -> None:
    folder = filled(tmp_path / "v", random_rows(25))
    file = folder.folder / "00001.json"
    seal = json.loads(file.read_text())
    harm(seal)
    file.write_text(json.dumps(seal))
    assert set(folder.seals()) == {0, 2}


@pytest.mark.parametrize("ending", ["npy", "csv"])
def test_a_changed_byte_is_seen_by_the_checksums(tmp_path: Path, ending: str) -> None:
    folder = filled(tmp_path / "v", random_rows(25))
    assert len(folder.seals(thorough=True)) == 3
    flip(folder.folder / f"00002.{ending}")
    assert set(folder.seals(thorough=True)) == {0, 1}


def test_a_seal_is_the_last_to_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    whole = os.replace

    def noted(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        whole(source, target)

    monkeypatch.setattr(os, "replace", noted)
    filled(tmp_path / "v", random_rows(10))
    assert order == ["00000.npy", "00000.csv", "00000.json"]


def test_what_is_sealed_is_on_the_disk_before_its_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(tmp_path / "v", MANIFEST)
    done: list[str] = []
    whole, flushed = os.replace, beit.embeddings.flush

    def replaced(source: Any, target: Any) -> None:
        done.append(f"name {Path(target).name}")
        whole(source, target)

    def noted(path: Path) -> None:
        done.append(f"flush {path.name}")
        flushed(path)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(beit.embeddings, "flush", noted)
    folder.write(0, [(i, f"{i}") for i in range(10)], random_rows(10), [])
    files = [f"00000.{ending}" for ending in ("npy", "csv", "json")]
    assert done == [
        *(f"flush {name}" for name in files),
        *(f"name {name}" for name in files[:2]),
        "flush v",
        f"name {files[2]}",
        "flush v",
    ]
    folder.close()


def test_no_manifest_or_a_damaged_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingsError, match="holds no embeddings; make some: beit embed"):
        Embeddings(tmp_path)
    (tmp_path / "embeddings.json").write_text("{")
    with pytest.raises(EmbeddingsError, match=r"embeddings.json cannot be read"):
        Embeddings(tmp_path)


def test_of_two_that_begin_the_first_decides(tmp_path: Path) -> None:
    begin(tmp_path / "v", MANIFEST)
    second = begin(tmp_path / "v", replace(MANIFEST, runtime="openvino"))
    assert second.manifest.runtime == "torch"
    assert second.manifest.differences(
        {"runtime": "openvino", "model": "elsewhere", "batch_size": 16}
    ) == ["runtime was torch, now openvino"]


def test_where_there_are_no_links_the_first_decides_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert begin(tmp_path / "v", MANIFEST).manifest == MANIFEST
    assert begin(tmp_path / "v", replace(MANIFEST, runtime="openvino")).manifest == MANIFEST
    assert names(tmp_path / "v") == {"embeddings.json"}


@pytest.mark.parametrize("name", sorted(asdict(MANIFEST)))
def test_every_setting_but_how_the_model_was_called_makes_a_difference(name: str) -> None:
    """The hash of the spec is told by the spec itself."""
    told = MANIFEST.differences({**asdict(MANIFEST), name: "another"})
    assert len(told) == (name not in ("model", "image_spec_sha256"))


# --- What goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EIO])
def test_a_write_that_fails_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = begin(tmp_path / "v", MANIFEST)
    before = names(folder.folder)
    whole = Path.write_bytes

    def full(file: Path, content: bytes) -> int:
        if file.suffix == ".csv":
            raise OSError(number, os.strerror(number))
        return whole(file, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*make room or choose another place") as caught:
        folder.write(0, [(i, str(i)) for i in range(10)], random_rows(10), [])
    assert caught.value.exit_code == 6
    assert names(folder.folder) == before


def test_what_dead_processes_were_writing_is_swept_and_the_living_keep_theirs(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from beit.embeddings import make_scratch\n"
        f"print(make_scratch(pathlib.Path({str(tmp_path)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    dead, living = Path(done.stdout.strip()), make_scratch(tmp_path)
    pid = dead.name.split("-")[1]  # of no process here
    elsewhere = tmp_path / f".writing-{pid}-another.host-abc"
    elsewhere.mkdir()
    os.utime(elsewhere, (time.time() - 80_000,) * 2)  # not a day ago
    sweep(tmp_path)
    assert (dead.exists(), living.exists(), elsewhere.exists()) == (False, True, True)
    os.utime(elsewhere, (0, 0))
    sweep(tmp_path)
    assert not elsewhere.exists()


def test_who_is_swept_by_mistake_writes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(tmp_path / "v", MANIFEST)
    folder.write(0, [(i, str(i)) for i in range(10)], random_rows(10), [])
    for left in folder.folder.glob(".writing-*"):
        shutil.rmtree(left)
    folder.write(1, [(i, str(i)) for i in range(10, 20)], random_rows(10), [])
    folder.close()
    assert set(folder.seals(thorough=True)) == {0, 1}
    assert not list(folder.folder.glob(".*"))


# --- The hash of a model -------------------------------------------------------------------------


def test_the_hash_of_a_model_is_of_all_that_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    first = model_sha256(model)
    assert not (tmp_path / "cache").exists()  # files of this second may change in it
    for name in ("README.md", "scores.json", "graph.bin", "optimizer.safetensors"):
        (model / name).write_text("of no matter")
    assert sha256_of(model) == sha256_of(model / "model.safetensors")
    assert model_sha256(model) == first
    (model / "config.json").write_text("{}")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "odd.safetensors"}}')
    shards = [model_sha256(model)]
    for content in (b"a", b"b"):  # it may name its shards as it likes
        (model / "odd.safetensors").write_bytes(content)
        shards.append(model_sha256(model))
    assert len({first, *shards}) == 4
    for name in ("odd.safetensors", "model.safetensors.index.json"):
        (model / name).unlink()
    (model / "config.json").write_text("[]")
    second = model_sha256(model)
    (model / "model.safetensors").write_bytes(b"Weights")
    third = model_sha256(model)
    graph = tmp_path / "graph.xml"
    graph.write_text("<net/>")
    graph.with_suffix(".bin").write_bytes(b"weights")
    fourth = model_sha256(graph)
    graph.with_suffix(".bin").write_bytes(b"Weights")
    assert len({first, second, third, fourth, model_sha256(graph)}) == 5


def test_a_known_hash_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.pth"
    file.write_bytes(b"weights")
    os.utime(file, (1e9, 1e9))
    first = model_sha256(file)
    monkeypatch.setattr(beit.embeddings, "sha256_of", None)
    assert model_sha256(file) == first
    os.utime(file, (1e9, 1e9 + 1))
    with pytest.raises(TypeError):  # it has to be read
        model_sha256(file)


# --- Search --------------------------------------------------------------------------------------


def brute_force(rows: np.ndarray, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Every cosine in float64, sorted; equal ones by row."""
    cosines = unit(queries.astype(np.float64)) @ unit(rows.astype(np.float64)).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(cosines, order, axis=1), order


@pytest.mark.parametrize("form", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("top", [1, 7, 500])
def test_search_is_a_sorted_list_of_all_cosines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, dtype: str, top: int
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(beit.embeddings, "BLOCK_BYTES", 4 * 12 * 7)  # blocks of 7 rows in shards of 10
    rows = (random_rows(203) * np.geomspace(0.01, 100, 203, dtype=np.float32)[:, None]).astype(
        beit.embeddings.DTYPES[dtype]
    )
    queries = random_rows(5, seed=1) * 30
    folder = filled(tmp_path / "v", rows, format=form, dtype=dtype)
    cosines, found = folder.nearest(queries, top)
    expected_cosines, expected = brute_force(rows, queries, top)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(cosines, expected_cosines, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 2, 5, 6])
def test_many_queries_are_each_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    rows, queries = random_rows(30), random_rows(5, seed=1)
    folder = filled(tmp_path / "v", rows)
    monkeypatch.setattr(beit.embeddings, "QUERIES", at_once)
    np.testing.assert_array_equal(folder.nearest(queries, 30)[1], brute_force(rows, queries, 30)[1])


def test_rows_are_numbered_without_the_bad_pictures(tmp_path: Path) -> None:
    rows = random_rows(16)
    folder = begin(tmp_path / "v", replace(MANIFEST, pictures=20))
    bad = [BadPicture(i, "", "") for i in range(6, 10)]
    folder.write(0, [(i, f"{i}") for i in range(6)], rows[:6], bad)
    folder.write(1, [(i, f"{i}") for i in range(10, 20)], rows[6:], [])
    _, found = folder.nearest(rows[8:9], 1)
    assert found.tolist() == [[8]]
    assert folder.paths([8]) == ["12"]
    np.testing.assert_array_equal(folder.rows(found[0]), rows[8:9])


def test_tokens_of_a_picture_cannot_be_searched(tmp_path: Path) -> None:
    folder = filled(tmp_path / "v", random_rows(10 * 3).reshape(10, 3, 12))
    with pytest.raises(EmbeddingsError, match="only single vectors of one model can be compared"):
        folder.nearest(np.zeros((1, 3, 12), np.float32), 3)


def test_equal_vectors_come_in_their_order(tmp_path: Path) -> None:
    rows = random_rows(60, width=40)
    rows[[3, 17, 18, 44, 59]] = rows[30]
    folder = filled(tmp_path / "v", rows)
    cosines, found = folder.nearest(rows[30:31], 4)
    assert found.tolist() == [[3, 17, 18, 30]]
    np.testing.assert_allclose(cosines, 1, atol=1e-12)


def test_neighbours_that_differ_by_less_than_float32_are_told_apart(tmp_path: Path) -> None:
    """Cosines from 1 to 1 - 2e-7, which a product in float32 puts into another order."""
    query = unit(random_rows(1, width=64))
    rows = query + 1e-4 * np.linspace(0, 1, 300, dtype=np.float32)[:, None] * unit(
        random_rows(300, 64, 1)
    )
    rows = np.random.default_rng(2).permutation(rows)
    folder = filled(tmp_path / "v", rows)
    _, expected = brute_force(rows, query, 300)
    coarse = np.argsort(-(unit(rows) @ query[0]), kind="stable")
    assert coarse.tolist() != expected[0].tolist()
    for top in range(1, 100):
        np.testing.assert_array_equal(folder.nearest(query, top)[1], expected[:, :top])


def test_the_length_of_a_vector_does_not_matter(tmp_path: Path) -> None:
    rows, queries = random_rows(60), random_rows(20, seed=1)
    short = rows.copy()
    short[::2] *= 1e-6
    for vectors in (short, short.astype(np.float64)):
        np.testing.assert_allclose(np.linalg.norm(unit(vectors), axis=1), 1, atol=1e-6)
    expected = filled(tmp_path / "v", rows).nearest(queries, 1)
    cosines, found = filled(tmp_path / "short", short).nearest(1e-6 * queries, 1)
    np.testing.assert_array_equal(found, expected[1])
    np.testing.assert_allclose(cosines, expected[0], atol=1e-6)


def test_a_vector_of_zeros_is_like_nothing(tmp_path: Path) -> None:
    rows = random_rows(12)
    rows[5] = 0
    cosines, found = filled(tmp_path / "v", rows).nearest(rows[:1], 12)
    assert cosines[0, found[0].tolist().index(5)] == 0


def test_float16_moves_a_cosine_by_less_than_a_thousandth() -> None:
    rows = random_rows(400, width=64)
    exact = unit(rows.astype(np.float64)) @ unit(rows.astype(np.float64)).T
    kept = unit(rows.astype(np.float16).astype(np.float64))
    assert 0 < np.abs(kept @ kept.T - exact).max() < 0.001


def test_queries_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path / "v", random_rows(10))
    with pytest.raises(EmbeddingsError, match="only single vectors of one model can be compared"):
        folder.nearest(np.zeros((1, 5), np.float32), 3)
