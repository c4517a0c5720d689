"""Names of models: what is a path, what is downloaded, what is refused; the released table; classes."""

from __future__ import annotations

import bisect
import errno
import fnmatch
import hashlib
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import ENVIRONMENT
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import beit.hub
from beit.cli import exit_code
from beit.hub import (
    RELEASED,
    SIZES,
    HubError,
    class_names,
    is_offline,
    is_remote,
    other_names,
    resolve,
    sha256_of,
    synsets,
)
from beit.model import (
    VARIANTS,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    variant,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin",
         "flax_model.msgpack", "tf_model.h5", "README.md", "run.py", "onnx/model.safetensors")  # fmt: skip


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BEIT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in this file may open a connection or look up an address."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"touched the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Hub:
    """Stands for snapshot_download: one folder of the hub, and what was asked of it."""

    def __init__(self, root: Path, files: tuple[str, ...]) -> None:
        self.root, self.files = root, files
        self.asked: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **asked: Any) -> str:
        self.asked.append({"repo_id": repo_id, **asked})
        place = self.root / repo_id.replace("/", "--") / COMMIT
        place.mkdir(parents=True, exist_ok=True)
        for name in self.files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"]):
                (place / name).parent.mkdir(exist_ok=True)
                (place / name).touch()
        return str(place)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Hub]:
    def of(*files: str) -> Hub:
        found = Hub(tmp_path / "cache", files or WHOLE)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
        return found

    return of


# --- Paths ---------------------------------------------------------------------------------------


def test_the_guard_sees_a_connection() -> None:
    with pytest.raises(AssertionError, match="touched the network"):
        socket.create_connection(("localhost", 9))


@pytest.mark.parametrize("name", ["mine", "beit-base-patch16-384", "beitv2_base_patch16_224_pt1k"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_path_stays_a_path_whatever_it_is_called(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Callable[..., Hub]
) -> None:
    asked = hub().asked
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir() if kind == "folder" else (tmp_path / name).write_bytes(b"x")
    for source in (name, f"./{name}", str(tmp_path / name)):
        assert not is_remote(source)
        assert resolve(source) == Path(source)
    assert not asked


def test_sizes_are_those_of_the_model() -> None:
    assert tuple(VARIANTS) == SIZES


def test_a_misspelt_path_names_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "flowers.run").mkdir(parents=True)
    (tmp_path / "flowers.run").mkdir()
    for source, meant in (
        ("flowers.rum", "flowers.run"),
        ("flowers.rum/", "flowers.run"),
        ("./flwers.run", "flowers.run"),
        ("runs/flowers", "runs/flowers.run"),
    ):
        with pytest.raises(HubError, match=rf"does not exist.* did you mean {meant}\?"):
            resolve(source)
    with pytest.raises(ValueError, match=r"did you mean flowers\.run\?"):
        variant("flowers.rum", other_names())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/nowhere/model", r"^/nowhere/model does not exist, nor does its folder /nowhere; check"),
        (
            "runs/flowers/best",
            r"^runs/flowers/best does not exist, nor does its folder runs/flowers; check",
        ),
        ("flowers", "flowers does not exist and is no released model's name; `beit models` lists them"),
        ("beit_base_patch16_385", "did you mean .*beit-base-patch16-384"),
        (
            "beit_base_patch16_384",
            r"is a size, .*, such as beit_base_patch16_384_\w+, or the folder of a",
        ),
        (
            "beit_tiny_patch8_64",
            "is a size, which has no weights; .* finetune DATA -m beit_tiny_patch8_64",
        ),
        ("beit_base_patch16_384_pt22k_ft22kto1k.pth", "mean beit_base_patch16_384_pt22k_ft22kto1k or"),
        ("microsoft/beit-base-patch16-384", "write hub:microsoft/beit-base-patch16-384$"),
    ],
)
def test_what_is_neither_a_path_nor_a_name_is_refused_without_the_network(
    source: str, says: str, hub: Callable[..., Hub]
) -> None:
    asked = hub().asked
    assert not is_remote(source)
    with pytest.raises(HubError, match=says) as caught:
        resolve(source)
    assert exit_code(caught.value) == 5
    assert not asked


# --- The hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "folder", "revision"),
    [
        ("hub:someone/flowers", "someone/flowers", None),
        ("hub:someone/flowers@v1.0", "someone/flowers", "v1.0"),
        ("hub:someone/flowers@refs/pr/3", "someone/flowers", "refs/pr/3"),
        ("beit_base_patch16_384_pt22k_ft22kto1k", "microsoft/beit-base-patch16-384", None),
        ("beit-base-patch16-384", "microsoft/beit-base-patch16-384", None),
        (f"beit-base-patch16-384@{COMMIT}", "microsoft/beit-base-patch16-384", COMMIT),
        ("hub:beit-base-patch16-384", "microsoft/beit-base-patch16-384", None),
        (
            "beit_base_patch16_384.in22k_ft_in22k_in1k",
            "timm/beit_base_patch16_384.in22k_ft_in22k_in1k",
            None,
        ),
        ("beitv2_base_patch16_224_pt1k_ft1k", "timm/beitv2_base_patch16_224.in1k_ft_in1k", None),
        ("dit-base", "microsoft/dit-base", None),
    ],
)
def test_a_name_of_the_hub_becomes_the_folder_that_was_downloaded(
    source: str, folder: str, revision: str | None, hub: Callable[..., Hub]
) -> None:
    fake = hub()
    assert is_remote(source)
    place = resolve(source)
    assert place.name == COMMIT
    assert [(call["repo_id"], call["revision"]) for call in fake.asked] == [(folder, revision)]
    assert fake.asked[0]["local_files_only"] is False


def test_of_a_hub_folder_only_configs_and_safetensors_are_fetched(hub: Callable[..., Hub]) -> None:
    hub()
    got = sorted(p.name for p in resolve("hub:a/b").iterdir())
    assert got == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_shards_come_with_their_index(hub: Callable[..., Hub]) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    hub("config.json", "model.safetensors.index.json", *shards, "pytorch_model.bin")
    got = {p.name for p in resolve("hub:a/b").iterdir()}
    assert got == {"config.json", "model.safetensors.index.json", *shards}


def test_a_pickle_is_fetched_only_where_there_is_no_safetensors(hub: Callable[..., Hub]) -> None:
    fake = hub("config.json", "pytorch_model.bin", "training_args.bin")
    got = {p.name for p in resolve("hub:a/b@main").iterdir()}
    assert got == {"config.json", "pytorch_model.bin"}
    assert [call["revision"] for call in fake.asked] == ["main", COMMIT], "both from one commit"


@pytest.mark.parametrize("files", [("README.md",), ("config.json",), ("model.safetensors",)])
def test_a_hub_folder_without_a_model_is_refused(
    files: tuple[str, ...], hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(*files)
    with pytest.raises(HubError, match=r"hub:a/b lacks config\.json, or model\.safetensors"):
        resolve("hub:a/b")
    monkeypatch.setenv("BEIT_OFFLINE", "1")
    with pytest.raises(HubError, match="run once without --offline"):
        resolve("hub:a/b")


def test_a_revision_may_be_given_apart(hub: Callable[..., Hub]) -> None:
    fake = hub()
    resolve("hub:a/b", revision="v2")
    resolve("hub:a/b@v2", revision="v2")
    assert [call["revision"] for call in fake.asked] == ["v2", "v2"]


@pytest.mark.parametrize(
    ("source", "revision", "says"),
    [
        ("hub:b", None, "hub:b must be hub:owner/name or hub:owner/name@revision"),
        ("hub:", None, "must be hub:owner/name"),
        ("hub:a/b/c", None, "must be hub:owner/name"),
        ("hub:../b", None, "must be hub:owner/name"),
        ("hub:a/b@v1", "v2", "hub:a/b@v1 and revision v2 are two revisions"),
        (".", "v2", "a local path, which has no revision v2"),
    ],
)
def test_a_request_that_makes_no_sense_is_a_usage_error(
    source: str, revision: str | None, says: str, hub: Callable[..., Hub]
) -> None:
    asked = hub().asked
    with pytest.raises(ValueError, match=says) as caught:
        resolve(source, revision)
    assert exit_code(caught.value) == 2
    assert not asked


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("404 Client Error.\nmore", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(RepositoryNotFoundError), "https://huggingface.co/a/b does not exist or is private"),
        (http_error(GatedRepoError), "a/b is gated; accept its terms at https://huggingface.co/a/b"),
        (
            http_error(RevisionNotFoundError),
            "a/b has no revision v9; https://huggingface.co/a/b/commits",
        ),
        (http_error(HfHubHTTPError), "could not download a/b: 404 Client Error.; try again"),
        (
            LocalEntryNotFoundError("Got: no route\nto host"),
            "could not download a/b: Got: no route; try",
        ),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "could not download a/b: .*reset; try again"),
        (RuntimeError(), "could not download a/b: RuntimeError; try again, what has arrived is kept"),
    ],
)
def test_an_error_of_the_hub_says_what_to_do(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match=says) as caught:
        resolve("hub:a/b@v9")
    assert "\n" not in str(caught.value)
    assert exit_code(caught.value) == 5
    assert caught.value.__cause__ is error


def test_a_full_disk_is_not_the_hubs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="full") as caught:
        resolve("hub:a/b")
    assert exit_code(caught.value) == 6


# --- Offline -------------------------------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The library's cache with microsoft/beit-base-patch16-384 in it, as a download leaves it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--microsoft--beit-base-patch16-384"
    place = model / "snapshots" / COMMIT
    place.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (place / name).touch()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return place


@pytest.mark.parametrize("variable", ["BEIT_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    "source",
    [
        "hub:microsoft/beit-base-patch16-384",
        "beit_base_patch16_384_pt22k_ft22kto1k",
        f"beit-base-patch16-384@{COMMIT}",
    ],
)
def test_offline_the_librarys_cache_is_used_and_nothing_else(
    variable: str, source: str, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    assert resolve(source).resolve() == cached.resolve()
    with pytest.raises(HubError, match="microsoft/beit-large-patch16-384 has not been downloaded yet"):
        resolve("beit-large-patch16-384")
    with pytest.raises(HubError, match="beit-base-patch16-384 at v7 has not been downloaded yet"):
        resolve("beit-base-patch16-384", "v7")


@pytest.mark.parametrize(("value", "off"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_is_read_as_the_library_reads_it(
    value: str, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEIT_OFFLINE", value)
    assert is_offline() is off
    assert huggingface_hub.constants._is_true(value) is off


def test_importing_and_reading_names_waits_for_neither_torch_nor_the_hubs_library() -> None:
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['huggingface_hub'] = None\n"
        "from beit.hub import class_names, resolve\nclass_names(1000), resolve('.')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- Hashes --------------------------------------------------------------------------------------

# The example of FIPS 180: SHA-256 of "abc".
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == ABC
    block = b"beit" * 2**18 + b"!"  # one byte more than is read at once
    (tmp_path / "long").write_bytes(block)
    assert sha256_of(tmp_path / "long") == hashlib.sha256(block).hexdigest()


@pytest.mark.parametrize("published", [ABC, ABC[:8]])
def test_a_file_with_a_released_name_must_have_its_published_hash(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "beit_base_patch16_224_pt22k_ft22kto1k"
    row = replace(RELEASED[name], sha256=published, num_bytes=3)
    monkeypatch.setitem(beit.hub.RELEASED, name, row)
    file = tmp_path / f"{name}.pth"
    file.write_bytes(b"abc")
    assert resolve(str(file)) == file
    file.write_bytes(b"abd")
    with pytest.raises(HubError, match=f"but {published} is published for that name; download https"):
        resolve(str(file))
    file.write_bytes(b"abcd")  # no broken copy: somebody's own, or an older release
    assert resolve(str(file)) == file


def test_a_tokenizer_must_have_the_hash_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"
    file.write_bytes(b"abc")
    with pytest.raises(HubError, match=f"has sha256 {ABC}, but d5036aa7 is published"):
        resolve(str(file))
    other = file.rename(tmp_path / "mine.pth")
    assert resolve(str(other)) == other


# --- The released table --------------------------------------------------------------------------


@cache
def parameters(name: str) -> int:
    config = variant(name)
    model_class = BeitForImageClassification if config.num_classes else BeitForMaskedImageModeling
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).parameters())


ENCODERS = [
    row for row in RELEASED.values()
    if row.release and row.task in ("masked-image", "classification")
]  # fmt: skip


@pytest.mark.parametrize("row", ENCODERS, ids=lambda row: row.name)
def test_parameters_are_those_of_the_model_that_the_row_describes(row: beit.hub.Released) -> None:
    family, size = row.name.split("_")[:2]
    plain = "_pt1k" if row.name == "beit_base_patch16_224_pt1k_800ep" else ""
    head = {None: "_8k_vocab", 21841: "_in22k", 1000: ""}[row.num_classes]
    name = f"{family}_{size}_patch16_{row.img_size}{plain}{head}"
    assert row.num_parameters == parameters(name)
    assert (row.task == "masked-image") == (row.num_classes is None)
    assert f"patch16_{row.img_size}_" in row.name


# timm's own measurement of its copies (its results tables), at other crops than the authors'.
MEASURED = {
    "timm/beit_large_patch16_512.in22k_ft_in22k_in1k": 88.576,
    "timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k": 88.406,
    "timm/beit_large_patch16_384.in22k_ft_in22k_in1k": 88.380,
    "timm/beit_large_patch16_224.in22k_ft_in22k_in1k": 87.486,
    "timm/beitv2_large_patch16_224.in1k_ft_in1k": 87.414,
    "timm/beit_base_patch16_384.in22k_ft_in22k_in1k": 86.814,
    "timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k": 86.494,
    "timm/beitv2_base_patch16_224.in1k_ft_in1k": 85.596,
    "timm/beit_base_patch16_224.in22k_ft_in22k_in1k": 85.238,
}


@pytest.mark.parametrize("folder", MEASURED)
def test_published_top1_is_what_others_measured_on_the_hub_folder_of_the_row(folder: str) -> None:
    (row,) = [row for row in RELEASED.values() if folder in (row.hub, *row.also)]
    assert row.top1 == pytest.approx(MEASURED[folder], abs=0.15)


def test_every_released_file_is_listed_once() -> None:
    released = [row for row in RELEASED.values() if row.release]
    assert len([row for row in released if row.release == "v1.0"]) == 14
    assert len([row for row in released if row.release == "BEiT-v2"]) == 16 + 3  # and tokenizers
    folders = [f for row in RELEASED.values() for f in (row.hub, *row.also) if f]
    assert len(set(folders)) == len(folders)
    for name, row in RELEASED.items():
        assert name == row.name
        assert row.release or row.hub, "something to get"


def test_the_one_file_with_a_published_size_has_its_hash() -> None:
    row = RELEASED["beit_base_patch16_224_pt22k_ft22kto1k"]
    assert row.num_bytes == 176_830_615
    assert row.sha256 == "9370c265f91e2da137926b2662f12aa4010b42120a28db70bc2bfda7aa9106a9"
    assert row.url == (
        "https://github.com/addf400/files/releases/download/v1.0/"
        "beit_base_patch16_224_pt22k_ft22kto1k.pth"
    )


@pytest.mark.parametrize("name", [row.name for row in RELEASED.values() if row.task == "tokenizer"])
def test_the_hash_of_a_tokenizer_ends_its_name(name: str) -> None:
    assert name.rpartition("-")[2] == RELEASED[name].sha256


@pytest.mark.parametrize("row", [r for r in RELEASED.values() if not r.hub], ids=lambda r: r.name)
def test_a_release_that_is_not_on_the_hub_is_to_be_fetched_by_hand(
    row: beit.hub.Released, hub: Callable[..., Hub]
) -> None:
    asked = hub().asked
    assert not is_remote(row.name)
    with pytest.raises(HubError, match=f"download {row.url} by hand and give the file's path"):
        resolve(row.name)
    assert not asked


# --- Classes -------------------------------------------------------------------------------------


def names(count: int) -> list[str]:
    found = class_names(count)
    assert found is not None
    return found


def folders(count: int) -> list[str]:
    found = synsets(count)
    assert found is not None
    return found


@pytest.mark.parametrize("count", [1000, 21841])
def test_synsets_are_the_sorted_folder_names_and_as_many_as_the_head_has_classes(count: int) -> None:
    found = folders(count)
    assert len(found) == len(set(found)) == count
    assert found == sorted(found)
    assert all(len(s) == 9 and s[0] == "n" and s[1:].isdigit() for s in found)
    assert len(names(count)) == count
    assert all(name and name == name.strip() for name in names(count))


@pytest.mark.parametrize("count", [0, 2, 150, 999, 21842, 21843])
def test_a_head_of_another_size_has_no_names(count: int) -> None:
    assert class_names(count) is None
    assert synsets(count) is None


@pytest.mark.parametrize(
    ("count", "index", "synset", "name"),
    [
        (1000, 0, "n01440764", "tench, Tinca tinca"),
        (1000, 281, "n02123045", "tabby, tabby cat"),
        (1000, 285, "n02124075", "Egyptian cat"),
        (1000, 761, "n04074963", "remote control, remote"),
        (1000, 850, "n04399382", "teddy, teddy bear"),
        # What the released 22k heads say of two cats on a sofa (COCO val2017 39769).
        (21841, 2397, "n02123045", "tabby, tabby cat"),
        (21841, 2396, "n02122948", "kitten, kitty"),
    ],
)
def test_a_class_has_the_name_that_the_released_heads_mean(
    count: int, index: int, synset: str, name: str
) -> None:
    assert folders(count)[index] == synset
    assert names(count)[index] == name


def test_the_22k_list_is_the_21843_of_others_without_the_two_that_transformers_removes() -> None:
    """Its converter deletes numbers 9205 and 15027 of a sorted list that also holds these two."""
    found = folders(21841)
    for number, synset in ((9205, "n03931044"), (15027, "n09859684")):
        place = bisect.bisect(found, synset)
        assert place == number
        assert found[place - 1] != synset
        found.insert(place, synset)


def test_1k_names_are_those_of_the_22k_list() -> None:
    full = dict(zip(folders(21841), names(21841), strict=True))
    lacking = {synset for synset in folders(1000) if synset not in full}
    assert lacking == {"n04399382"}
    other = [
        (name, full[synset])
        for synset, name in zip(folders(1000), names(1000), strict=True)
        if synset not in lacking and name != full[synset]
    ]
    # Names that are one class's in the short list and several classes' in the long one.
    assert other
    assert all(long.startswith(f"{short} (n") for short, long in other)


@pytest.mark.parametrize("count", [1000, 21841])
def test_names_tell_every_class_from_the_others(count: int) -> None:
    label2id = {name: i for i, name in enumerate(names(count))}
    assert len(label2id) == count


def test_the_two_cranes_carry_their_synsets() -> None:
    cranes = [(i, name) for i, name in enumerate(names(1000)) if name.startswith("crane")]
    assert cranes == [(134, "crane (n02012849)"), (517, "crane (n03126707)")]
    assert sum(name.endswith(")") and "(n" in name for name in names(1000)) == 2


def test_a_list_of_names_is_the_callers_own() -> None:
    names(1000)[0] = "spoiled"
    folders(1000)[0] = "spoiled"
    assert (names(1000)[0], folders(1000)[0]) == ("tench, Tinca tinca", "n01440764")
