"""`beit info`: the truth about a file, in words and as JSON."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import Cli
from random_models import GOLDEN, build
from safetensors.torch import load_file

from beit.checkpoints import load, save
from beit.model import VARIANTS, BeitForImageClassification, BeitForMaskedImageModeling

FILE = GOLDEN / "unilm-v1-finetune-relbias.pth"


def test_a_file_is_described_in_words(cli: Cli) -> None:
    code, out, err = cli("info", FILE)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    count = sum(p.numel() for p in load(FILE).parameters())
    for line in (
        str(FILE),
        "family BEiT classifier of 7 classes, 3 blocks of width 48, one bias table a block",
        "format unilm file",
        "img size 32 x 32 pixels, patches of 8",
        "heads 4",
        "forward 0.00328 GFLOP a picture",
        f"parameters {count:,}",
        "dtype float32",
        "ignored 3 items: computed from the grid, never read",
        "assumed layer_norm_eps 1e-06",
        f"sha256 {hashlib.sha256(FILE.read_bytes()).hexdigest()}",
    ):
        assert line in lines


def test_the_same_is_told_as_one_json_line(cli: Cli) -> None:
    code, out, _ = cli("info", FILE, json=True)
    assert code == 0
    assert out.count("\n") == 1
    facts = json.loads(out)
    assert facts["parameters"] == sum(p.numel() for p in load(FILE).parameters())
    assert facts["preparation"]["crop_ratio"] == 0.875
    assert facts["heads"] == 4


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("masked model", "BEiT masked-image model of 40 tokens, 3 blocks of width 24, one shared"),
        ("v2 masked model", "BEiT v2 masked-image model of 40 tokens"),
        ("plain classifier", "no bias table, absolute positions, no LayerScale"),
        ("classifier without classes", "BEiT encoder, 3 blocks"),
        ("encoder", "BEiT encoder, 3 blocks"),
    ],
)
def test_families_are_told_apart(name: str, family: str, cli: Cli, tmp_path: Path) -> None:
    save(build(name), tmp_path)
    assert family in " ".join(cli("info", tmp_path)[1].split())


def test_classes_and_provenance_are_shown(cli: Cli, tmp_path: Path) -> None:
    save(build("classifier"), tmp_path, {"made_by": "a test"})
    out = cli("info", tmp_path)[1]
    assert "4: Katze; dog, big" in out
    assert "made_by a test" in out


def test_a_tokenizer_is_described(cli: Cli, tmp_path: Path) -> None:
    facts = json.loads(cli("info", GOLDEN / "dalle-tiny-encoder.pkl", json=True)[1])
    assert facts["family"] == "visual tokenizer, DalleTokenizer"
    assert facts["tokens"] == "48, one for 8 x 8 pixels"
    assert facts["can_draw"] is True
    torch.save(load_file(GOLDEN / "vqkd-tiny.safetensors"), tmp_path / "vqkd.pth")
    facts = json.loads(cli("info", tmp_path / "vqkd.pth", num_heads=4, json=True)[1])
    assert facts["tokens"] == "64, one for 8 x 8 pixels"


@pytest.mark.parametrize(
    ("name", "parameters", "gflop"),  # of the papers, and timm's count of half as many multiply-adds
    [
        ("beit_base_patch16_224", 86_530_984, 35.1),
        ("beit_large_patch16_224", 304_430_568, 123),
        ("beit_tiny_patch8_64", None, None),
        ("beit_base_patch16_224_8k_vocab", None, None),
    ],
)
def test_a_size_is_described_by_its_name(
    name: str, parameters: int | None, gflop: float | None, cli: Cli
) -> None:
    code, out, err = cli("info", name, json=True)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    config = VARIANTS[name]
    assert facts["config"] == json.loads(json.dumps(asdict(config)))
    kind = BeitForMaskedImageModeling if "vocab" in name else BeitForImageClassification
    built = sum(p.numel() for p in kind(config).parameters()) if parameters is None else parameters
    assert facts["parameters"] == built
    if gflop is not None:
        assert facts["forward"] == f"{gflop} GFLOP a picture"
    verb = "pretrain" if "vocab" in name else "finetune"
    assert facts["weights"].endswith(f"beit {verb} DATA --model {name}")


def test_a_folder_that_is_named_as_a_size_is_the_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(build("classifier"), tmp_path / "beit_tiny_patch8_64")
    assert "sha256" in json.loads(cli("info", "beit_tiny_patch8_64", json=True)[1])


def test_what_is_no_model_ends_in_code_5(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>Not found</html>")
    for source in (tmp_path / "page.pth", tmp_path, tmp_path / "nowhere"):
        code, out, err = cli("info", source)
        assert (code, out) == (5, "")
        assert source.name in err


def test_a_damaged_pt2_is_named(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "a.pt2"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/extra/beit.json", "x" * 10_000)
    content = bytearray(file.read_bytes())
    content[50:70] = b"\xff" * 20
    file.write_bytes(content)
    code, out, err = cli("info", file)
    assert (code, out) == (5, "")
    assert "a.pt2 is no torch.export file" in err


def test_the_names_of_classes_give_no_orders_to_a_terminal(cli: Cli, tmp_path: Path) -> None:
    model = build("classifier")
    model.id2label = {0: "a\x1b[31m", 1: "b\nc", 2: "d", 3: "e"}
    save(model, tmp_path / "m")
    code, out, _ = cli("info", tmp_path / "m")
    assert code == 0
    assert r"4: a\x1b[31m; b\nc; d; e" in out


def test_a_folder_named_as_a_graph_is_a_folder(cli: Cli, tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "m.onnx")
    code, out, _ = cli("info", tmp_path / "m.onnx")
    assert code == 0
    assert "beit folder" in out


def test_a_graph_that_is_not_there_or_none_of_ours_ends_in_code_5(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"no graph")
    for file, cause in (
        (tmp_path / "b.pt2", "does not exist"),
        (tmp_path / "a.pt2", "is no torch.export"),
    ):
        code, out, err = cli("info", file)
        assert (code, out) == (5, "")
        assert cause in err
