"""`beit embed`: the right vectors, the same bytes however the work was cut, nothing half on the disk."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, Cli, command_line, draw_shape, write_shapes

from beit.checkpoints import save
from beit.commands.embed import Embed, embed, which_part
from beit.data import SomeSkipped
from beit.embeddings import Embeddings, unit
from beit.engine import Engine
from beit.model import BeitConfig, BeitForImageClassification
from beit.plural import counted

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny = BeitConfig(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    save(BeitForImageClassification(tiny), folder)
    os.utime(folder / "model.safetensors", (1e9, 1e9))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 pictures of three folders. To be read only."""
    return write_shapes(tmp_path_factory.mktemp("data") / "photos", 15, seed=0)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """27 pictures; the fourth and the last cannot be read."""
    folder = write_shapes(tmp_path / "broken", 9, seed=1)
    (folder / "disc" / "03.png").write_bytes(b"no picture")
    (folder / "triangle" / "08.png").write_bytes(b"")
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_rows(folder: Path) -> tuple[np.ndarray, list[str]]:
    made = Embeddings(folder)
    shards = range(made.manifest.shards)
    return (
        np.concatenate([made.vectors(shard) for shard in shards]),
        [path for shard in shards for _, path in made.ids(shard)],
    )


def process(*words: str | Path, **options: object) -> list[str]:
    return [sys.executable, "-m", "beit", *command_line(*words, **options)]


# --- What is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pooling", "layer"),
    [
        ({"dtype": "fp32"}, "mean", None),
        ({}, "mean", None),
        ({"pooling": "cls", "layer": 1, "dtype": "fp32"}, "cls", 1),
        ({"pooling": "tokens", "normalise": True}, "tokens", None),
        ({"normalise": True, "dtype": "fp32", "format": "parquet"}, "mean", None),
    ],
)
def test_vectors_are_the_engines_in_the_order_of_the_pictures(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, options: Any, pooling: Any, layer: int | None
) -> None:
    if options.get("format") == "parquet":
        pytest.importorskip("pyarrow")
    code, out, err = cli("embed", photos, model=model, out=tmp_path / "v", shard_size=16,
                         batch_size=4, precision="fp32", **options)  # fmt: skip
    assert (code, out) == (0, "")
    assert "45 vectors" in err
    assert " a second" in err
    vectors, paths = all_rows(tmp_path / "v")
    assert paths == [str(p) for p in sorted(photos.rglob("*.png"))]
    answers = Engine(model, "torch", "fp32", batch_size=4).embed(paths, pooling, layer)
    expected = np.stack([answer.vector for answer in answers if answer.vector is not None])
    if "normalise" in options:
        expected = unit(expected)
    half = options.get("dtype") != "fp32"
    assert vectors.dtype == (np.float16 if half else np.float32)
    np.testing.assert_allclose(
        vectors, expected, rtol=2e-3 if half else 1e-5, atol=1e-3 if half else 1e-6
    )


def test_the_manifest_says_what_decides_the_bytes(
    cli: Cli, model: Path, photos: Path, tmp_path: Path
) -> None:
    assert cli("embed", photos, model=model, out=tmp_path / "v", precision="fp32")[0] == 0
    content = json.loads((tmp_path / "v" / "embeddings.json").read_text())
    assert {"model_sha256", "image_spec_sha256", "pictures_sha256"} < content.keys()
    asked = {"pictures": 45, "shard_size": 10_000, "dtype": "fp16", "normalise": False, "shape": [32],
             "precision": "fp32", "runtime": "torch", "pooling": "mean", "layer": None}  # fmt: skip
    assert {key: content[key] for key in asked} == asked


def test_all_that_classify_takes_is_taken(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a list, a tar, a table, a pattern, single files and stdin give the same vectors."""
    files = sorted(photos.rglob("*.png"))
    lines = "".join(f"{file}\n" for file in files)
    (tmp_path / "list.txt").write_text(lines)
    (tmp_path / "list.csv").write_text("path\n" + lines)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(photos))
    (tmp_path / "typed").write_text(lines)
    ways: dict[str, list[Path | str]] = {
        "folder": [photos],
        "txt": [tmp_path / "list.txt"],
        "csv": [tmp_path / "list.csv"],
        "tar": [tmp_path / "a.tar"],
        "pattern": [f"{photos}/*/*.png"],
        "files": list(files),
        "mixed": [*files[:15], photos / "square", *files[30:]],
        "stdin": ["-"],
    }
    found = {}
    for name, words in ways.items():
        with (tmp_path / "typed").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code, _, err = cli("embed", *words, model=model, out=tmp_path / name, shard_size=20)
        assert code == 0, err
        found[name] = all_rows(tmp_path / name)
    for name, (vectors, paths) in found.items():
        assert len(paths) == 45
        np.testing.assert_array_equal(vectors, found["folder"][0], err_msg=name)
        assert name == "tar" or paths == found["folder"][1], name
    assert found["tar"][1][0] == f"{tmp_path / 'a.tar'}/disc/00.png"


def test_one_bad_picture_is_left_out_and_listed(
    cli: Cli, model: Path, broken: Path, tmp_path: Path
) -> None:
    words = {"model": model, "out": tmp_path / "v", "shard_size": 5, "max_bad_images": 0.1}
    for _ in range(2):  # the second time there is nothing to do, and it says the same
        code, _, err = cli("embed", broken, **words)
        assert code == 3
        assert f"2 of 27 pictures could not be read; see {tmp_path / 'v' / 'bad_images.csv'}" in err
    vectors, paths = all_rows(tmp_path / "v")
    bad = [str(broken / "disc" / "03.png"), str(broken / "triangle" / "08.png")]
    assert paths == [str(p) for p in sorted(broken.rglob("*.png")) if str(p) not in bad]
    assert np.isfinite(vectors).all()
    with (tmp_path / "v" / "bad_images.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["index"], row["path"]) for row in rows] == [("3", bad[0]), ("26", bad[1])]
    assert "not a readable picture" in rows[0]["reason"]
    assert [index for index, _ in Embeddings(tmp_path / "v").ids(0)] == [0, 1, 2, 4]


def test_pictures_that_were_mended_come_in_with_retry_bad(
    cli: Cli, model: Path, broken: Path, tmp_path: Path
) -> None:
    words = {"model": model, "out": tmp_path / "v", "shard_size": 5, "max_bad_images": 0.1}
    assert cli("embed", broken, **words)[0] == 3
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "v").iterdir()}
    for name in ("disc/03.png", "triangle/08.png"):
        (broken / name).write_bytes((broken / "square" / "00.png").read_bytes())
    assert cli("embed", broken, **words)[0] == 3  # it was not asked to look
    assert cli("embed", broken, retry_bad=True, **words)[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "v").iterdir()}
    changed = {name[:5] for name in after if after[name] != before[name]}
    assert changed == {"00000", "00005"}
    assert set(before) - set(after) == {"bad_images.csv"}
    assert len(all_rows(tmp_path / "v")[1]) == 27


def test_too_many_bad_pictures_end_with_4_and_seal_none_of_them(
    cli: Cli, model: Path, broken: Path, tmp_path: Path
) -> None:
    for number in range(9):
        (broken / "square" / f"0{number}.png").write_bytes(b"")
    code, _, err = cli("embed", broken, model=model, out=tmp_path / "v", shard_size=9)
    assert code == 4
    assert "10 of 27 pictures cannot be read, where 1.0% (1) may" in err
    assert "--max-bad-images" in err
    assert set(Embeddings(tmp_path / "v").seals()) == {0}
    assert not list((tmp_path / "v").glob(".*"))


def test_a_shard_of_bad_pictures_alone_has_no_rows(cli: Cli, model: Path, tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "data", 2, seed=1)
    for file in (folder / "disc").iterdir():
        file.write_bytes(b"")
    words = {"model": model, "out": tmp_path / "v", "shard_size": 2, "max_bad_images": 1}
    assert cli("embed", folder, **words)[0] == 3
    assert Embeddings(tmp_path / "v").vectors(0).shape == (0, 32)
    assert len(all_rows(tmp_path / "v")[1]) == 4


# --- However the work is cut ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one run in one process, in shards of 6."""
    out = tmp_path_factory.mktemp("unbroken") / "v"
    done = subprocess.run(
        process("embed", photos, model=model, out=out, shard_size=6, batch_size=4),
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return bytes_of(out)


def test_three_parts_make_what_one_run_makes(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "v"
    for part, left in (("3/3", 6), ("1/3", 3), ("2/3", 0)):
        words = {"model": model, "out": out, "shard_size": 6, "batch_size": 4, "part": part}
        code, _, err = cli("embed", photos, **words)
        assert code == 0
        assert (f"{counted(left, 'shard')} left to other parts than {part}" in err) == (left > 0)
    assert bytes_of(out) == unbroken


def test_processes_of_torchrun_take_their_parts_unasked(
    model: Path, photos: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = {"model": model, "out": tmp_path / "v", "shard_size": 6, "batch_size": 4}
    done = subprocess.run(
        [*command, "-m", "beit", *command_line("embed", photos, **options)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count(" a second") == 2
    assert bytes_of(tmp_path / "v") == unbroken


def test_under_torchrun_only_the_last_process_tells_of_bad_pictures(
    model: Path, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends all processes when the first ends with a code."""
    settings = Embed(
        [str(broken)], model=str(model), out=tmp_path / "v", shard_size=5, max_bad_images=0.1
    )
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("TORCHELASTIC_RUN_ID", "1")):
        monkeypatch.setenv(name, value)
    assert embed(settings) == 14  # shards 0, 2 and 4, with a bad picture
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SomeSkipped, match="2 of 27 pictures could not be read"):
        embed(settings)


@pytest.mark.parametrize(
    ("environment", "given", "part"),
    [
        ({}, None, (1, 1)),
        ({"RANK": "3"}, None, (1, 1)),  # somebody else's word
        ({"RANK": "3", "WORLD_SIZE": "4"}, None, (4, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "2/8", (2, 8)),
    ],
)
def test_the_part_is_as_given_or_torchruns(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    given: str | None,
    part: tuple[int, int],
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert which_part(given) == part


@pytest.mark.parametrize("damage", ["npy", "csv", "json", "cut", "all"])
def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, unbroken: dict[str, bytes], damage: str
) -> None:
    out = tmp_path / "v"
    out.mkdir()
    for name, content in unbroken.items():
        (out / name).write_bytes(content)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    if damage == "cut":
        (out / "00003.npy").write_bytes(unbroken["00003.npy"][:-20])
    for ending in ("npy", "csv", "json"):
        if damage in (ending, "all"):
            (out / f"00003.{ending}").unlink()
    code, _, err = cli("embed", photos, model=model, out=out, shard_size=6, batch_size=4)
    assert code == 0
    assert "6 pictures in" in err
    assert bytes_of(out) == unbroken
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {name[:5] for name in after if after[name] != before[name]} == {"00003"}


def test_verify_finds_a_changed_byte(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "v"
    out.mkdir()
    for name, content in unbroken.items():
        (out / name).write_bytes(content)
    (out / "00002.npy").write_bytes(unbroken["00002.npy"][:-1] + b"\x01")
    words = {"model": model, "out": out, "shard_size": 6, "batch_size": 4}
    assert cli("embed", photos, **words)[0] == 0
    assert bytes_of(out) != unbroken  # of the right size: taken for whole
    assert cli("embed", photos, verify=True, **words)[0] == 0
    assert bytes_of(out) == unbroken


@POSIX
def test_killed_processes_lose_and_double_nothing(
    model: Path, photos: Path, tmp_path: Path, unbroken: dict[str, bytes], cli: Cli
) -> None:
    """Two at a time on 200 pictures, some of them on the same shards."""
    rng = random.Random(0)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(200):
        shape = ("disc", "square", "triangle")[number % 3]
        draw_shape(shape, 36, np.random.default_rng(number)).save(data / f"{number:03d}.png")
    options = {"model": model, "shard_size": 6, "batch_size": 4}
    out = tmp_path / "v"
    kills = 0
    for parts in (("1/2", "2/2"), ("1/1", "1/1")):
        crew = [
            subprocess.Popen(
                process("embed", data, out=out, part=part, **options),
                env=ENVIRONMENT, stderr=subprocess.DEVNULL,
            )
            for part in parts
        ]  # fmt: skip
        sealed = len(list(out.glob("0*.json")))
        until = time.monotonic() + 60
        while len(list(out.glob("0*.json"))) < sealed + 2 and time.monotonic() < until:
            if all(one.poll() is not None for one in crew):
                break
            time.sleep(0.002)
        for one in crew:
            time.sleep(0.02 * rng.random())
            kills += one.poll() is None
            one.send_signal(signal.SIGKILL)
            one.wait()
        if (out / "embeddings.json").exists():
            folder = Embeddings(out)
            assert folder.seals() == folder.seals(thorough=True)  # what is sealed is whole
    assert kills >= 2
    assert cli("embed", data, out=out, **options)[0] == 0
    assert cli("embed", data, out=tmp_path / "unbroken", **options)[0] == 0
    assert bytes_of(out) == bytes_of(tmp_path / "unbroken")
    assert all_rows(out)[1] == [str(data / f"{number:03d}.png") for number in range(200)]


@POSIX
def test_sigterm_ends_with_143_and_leaves_nothing_half(model: Path, tmp_path: Path) -> None:
    """At the second shard, when the first is sealed."""
    code = (
        "import os, signal, sys\n"
        "import beit.commands.embed as command\n"
        "whole, made = command.embed_shard, []\n"
        "def stopping(*words):\n"
        "    if made: signal.raise_signal(signal.SIGTERM)\n"
        "    made.append(1)\n"
        "    return whole(*words)\n"
        "command.embed_shard = stopping\n"
        "from beit.cli import main\n"
        "main()\n"
    )
    data = write_shapes(tmp_path / "data", 3, seed=0)
    words = command_line("embed", data, model=model, out=tmp_path / "v", shard_size=3)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM; give the same command to go on" in done.stderr
    assert set(Embeddings(tmp_path / "v").seals(thorough=True)) == {0}
    assert not list((tmp_path / "v").glob(".*"))


def test_a_finished_job_is_known_without_torch_and_writes_nothing(
    model: Path, photos: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "v"
    out.mkdir()
    for name, content in unbroken.items():
        (out / name).write_bytes(content)
    stamps = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
    words = command_line("embed", photos, model=model, out=out, shard_size=6, batch_size=4)
    code = (
        f"import sys\nsys.modules['torch'] = None\nsys.argv = ['beit', *{words!r}]\n"
        "from beit.cli import main\nmain()\n"
        "assert not [name for name in sys.modules if name.startswith('torch.')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "45 vectors of 32 in 8 shards" in done.stderr
    assert stamps == {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "fp32"}, "dtype was fp16, now fp32"),
        ({"normalise": True}, "normalise was False, now True"),
        ({"pooling": "cls"}, "pooling was mean, now cls"),
        ({"layer": 1}, "layer was None, now 1"),
        ({"batch_size": 5}, "batch_size was 4, now 5"),
        ({"shard_size": 7}, "shard_size was 6, now 7"),
        ({"precision": "int8"}, "now int8"),
    ],
)
def test_other_settings_are_refused_by_name(
    cli: Cli,
    model: Path,
    photos: Path,
    tmp_path: Path,
    unbroken: dict[str, bytes],
    options: Any,
    says: str,
) -> None:
    out = tmp_path / "v"
    out.mkdir()
    for name, content in unbroken.items():
        (out / name).write_bytes(content)
    words = {"model": model, "out": out, "shard_size": 6, "batch_size": 4, **options}
    code, _, err = cli("embed", photos, **words)
    assert code == 2
    assert f"{out} was made otherwise (" in err
    assert says in err
    assert "use the same pictures, model and settings to go on, or another folder" in err
    assert bytes_of(out) == unbroken


@pytest.mark.parametrize("spelled", ["photos/", "./photos", "other/../photos"])
def test_the_same_folder_spelled_otherwise_goes_on(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli("embed", "photos", model=model, out="v")[0] == 0
    code, _, err = cli("embed", spelled, model=model, out="v")
    assert (code, "made otherwise" in err) == (0, False), err


def test_another_model_and_other_pictures_are_refused(
    cli: Cli, model: Path, photos: Path, tmp_path: Path
) -> None:
    assert cli("embed", photos / "disc", model=model, out=tmp_path / "v")[0] == 0
    code, _, err = cli("embed", photos / "square", model=model, out=tmp_path / "v")
    assert code == 2
    assert "(the pictures are others, or in other places)" in err
    code, _, err = cli("embed", photos, model=model, out=tmp_path / "v")
    assert "pictures was 15, now 45" in err
    torch.manual_seed(1)
    tiny = BeitConfig(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    save(BeitForImageClassification(tiny), tmp_path / "other")
    code, _, err = cli("embed", photos / "disc", model=tmp_path / "other", out=tmp_path / "v")
    assert code == 2
    assert f"(the weights of {tmp_path / 'other'} are others)" in err


def test_the_same_model_elsewhere_is_the_same(
    cli: Cli, model: Path, photos: Path, tmp_path: Path
) -> None:
    assert cli("embed", photos / "disc", model=model, out=tmp_path / "v")[0] == 0
    (tmp_path / "moved").symlink_to(model)
    assert cli("embed", photos / "disc", model=tmp_path / "moved", out=tmp_path / "v")[0] == 0


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"part": "3/2"}, 2, "--part 3/2 must be like 2/8"),
        ({"part": "0/2"}, 2, "--part 0/2 must be like 2/8"),
        ({"part": "two"}, 2, "--part two must be like 2/8"),
        ({"layer": 7}, 2, "layer 7 does not exist; this model has layers 0 to 2"),
        ({"max_bad_images": 2}, 2, '"2.0" for --max-bad-images. Must be <= 1.'),
        ({"pooling": "tokens", "format": "parquet"}, 2, "--pooling tokens is for --format npy"),
        ({"model": "nowhere/at.all"}, 5, "nowhere/at.all does not exist"),
    ],
)
def test_a_mistake_is_said_before_anything_is_made(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, options: Any, code: int, says: str
) -> None:
    found, _, err = cli("embed", photos, **{"model": model, "out": tmp_path / "v", **options})
    assert found == code
    assert says in err
    assert not (tmp_path / "v").exists()


def test_a_folder_with_something_else_is_left_alone(cli: Cli, model: Path, photos: Path) -> None:
    before = sorted(photos.rglob("*"))
    code, _, err = cli("embed", photos, model=model, out=photos / "disc")
    assert code == 2
    assert "is not empty and holds no embeddings; choose another folder" in err
    assert sorted(photos.rglob("*")) == before


def test_a_vector_that_fp16_cannot_hold_is_said(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Engine.features_array
    monkeypatch.setattr(Engine, "features_array", lambda *words: whole(*words) * np.float32(1e6))
    code, _, err = cli("embed", photos, model=model, out=tmp_path / "v")
    assert code == 2
    assert "has numbers that fp16 cannot hold; use --dtype fp32" in err
    assert cli("embed", photos, model=model, out=tmp_path / "w", dtype="fp32")[0] == 0


# --- Disks ---------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("size", [300, 2000])
def test_a_full_disk_ends_with_6_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, cli: Cli, size: int
) -> None:
    """No file may grow beyond a size: at 300 bytes not the manifest, at 2,000 not a shard."""
    data = write_shapes(tmp_path / "data", 10, seed=0)
    options = {"model": model, "out": tmp_path / "v", "shard_size": 30, "dtype": "fp32"}
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))\n"
        "from beit.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command_line("embed", data, **options)],
        env=ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert f"cannot write {tmp_path / 'v'}: File too large; make room" in done.stderr
    assert {path.name for path in (tmp_path / "v").iterdir()} <= {"embeddings.json"}
    assert cli("embed", data, **options)[0] == 0
    assert len(all_rows(tmp_path / "v")[1]) == 30


@POSIX
def test_a_place_that_cannot_be_written_ends_with_6_before_the_model_is_loaded(
    cli: Cli, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beit.commands.embed.Engine", None)
    (tmp_path / "file").write_text("")
    code, _, err = cli("embed", photos, model=model, out=tmp_path / "file" / "v")
    assert code == 6
    assert "cannot write" in err
    (tmp_path / "closed").mkdir(mode=0o555)
    if os.access(tmp_path / "closed", os.W_OK):  # root may
        monkeypatch.setattr("tempfile.mkdtemp", refuse)
    code, _, err = cli("embed", photos, model=model, out=tmp_path / "closed")
    assert code == 6
    assert "make room or choose another place" in err
    assert not list((tmp_path / "closed").iterdir())


def refuse(**_: object) -> str:
    raise PermissionError(13, "Permission denied")
