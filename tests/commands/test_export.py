"""`beit export`: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file

import beit.commands.export
from beit.data import open_source
from beit.engine import Engine
from beit.graphs import open_graph
from beit.hub import sha256_of

from .conftest import Done


def test_an_int8_graph_is_calibrated_on_pictures_and_scored_by_evaluate(
    cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path
) -> None:
    file = tmp_path / "small.onnx"
    words = {"to": "onnx", "out": file, "precision": "int8", "pictures": shapes / "train"}
    code, out, _ = cli("export", finetuned.folder, **words, json=True)
    assert code == 0
    report = json.loads(out)
    assert report == json.loads(file.with_suffix(".json").read_text())
    told = json.loads(cli("info", file, json=True)[1])
    assert (told["precision"], told["img_size"]) == ("int8", "32 x 32 pixels, patches of 8")
    assert told["agreement"] == f"same best class {report['agreement']:.2%} of 18 pictures"
    assert (report["calibrated_on"], report["measured_on"]) == (18, 18)
    assert open_graph(file).about.model_sha256 == sha256_of(finetuned.folder)
    file.with_suffix(".json").write_text("{}")
    assert "agreement" not in json.loads(cli("info", file, json=True)[1])
    code, out, _ = cli("evaluate", shapes, model=file, json=True)
    assert code == 0
    exact = json.loads(cli("evaluate", shapes, model=finetuned.folder, json=True)[1])
    assert abs(json.loads(out)["top1"] - exact["top1"]) <= 1 / 15
    assert json.loads(out)["preprocessing"] == exact["preprocessing"]


@pytest.mark.usefixtures("trusted")
def test_another_size_resizes_the_bias(cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "large.pt2"
    code, _, _ = cli("export", finetuned.folder, to="torch", out=file, img_size=48)
    assert code == 0
    engine = Engine(file)
    assert engine.image_spec.size == (48, 48)
    assert engine.logits_of(open_source(shapes, "val")).shape == (15, 3)


def test_a_graph_of_any_size_answers_at_its_usual_one_and_says_what_it_takes(
    cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path
) -> None:
    file = tmp_path / "any.onnx"
    assert cli("export", finetuned.folder, to="onnx", out=file, max_size=64)[0] == 0
    ours = Engine(file).logits_of(open_source(shapes, "val"))
    exact = Engine(finetuned.folder, "torch", "fp32").logits_of(open_source(shapes, "val"))
    np.testing.assert_allclose(ours, exact, atol=1e-3)
    code, out, _ = cli("info", file)
    assert code == 0
    assert "graph for onnx: classes" in out
    assert "32 x 32 pixels, and any size up to 64, patches of 8" in out
    assert "3: disc; square; triangle" in out


@pytest.mark.parametrize("out", [None, "pytorch_model.xml"])
def test_no_graph_is_written_over_the_weights(
    cli: Cli, finetuned: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    """OpenVINO's has two files, and one ends in .bin as PyTorch's weights do."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "pytorch_model.bin"
    torch.save({"model": load_file(finetuned.folder / "model.safetensors")}, weights)
    before = weights.read_bytes()
    code, _, err = cli("export", weights, to="openvino", **({"out": out} if out else {}))
    assert (code, weights.read_bytes()) == (6, before)
    assert "cannot write pytorch_model.bin: it is what the command reads" in err


def test_models_whose_names_have_dots_give_graphs_of_their_own(
    cli: Cli, finetuned: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    monkeypatch.setattr(
        beit.commands.export, "write_graph", lambda model, out, *_, **__: named.append(str(out)) or {}
    )
    monkeypatch.chdir(tmp_path)
    for name in ("flowers-1.0", "flowers-1.1.run"):
        shutil.copytree(finetuned.folder, name)
        cli("export", name, to="onnx", json=True)
    assert named == ["flowers-1.0.onnx", "flowers-1.1.onnx"]


def test_a_report_is_not_written_over_something_else(
    cli: Cli, shapes: Path, finetuned: Done, tmp_path: Path
) -> None:
    scores = tmp_path / "a.json"
    scores.write_text('{"top1": 1}')
    options = {"to": "onnx", "precision": "int8", "pictures": shapes, "out": tmp_path / "a.onnx"}
    code, _, err = cli("export", finetuned.folder, **options)
    assert code == 6
    assert f"{scores}, where the report goes, is something else; name another graph file" in err
    assert scores.read_text() == '{"top1": 1}'


@pytest.mark.parametrize(
    ("wrong", "code", "cause"),
    [
        ({"max_size": 36}, 2, "max_size 36 is not a multiple of 8 from 32 on"),
        ({"precision": "int8"}, 2, "--pictures PLACE"),
        ({"to": "coreml"}, 2, "coreml"),
        ({"out": "no/such/a.onnx"}, 6, "no/such is not a folder"),
        ({"out": "a.xml"}, 2, "a.xml must end in .onnx"),
        ({"kind": "masked"}, 5, "guesses no tokens"),
        ({"min_agreement": 99}, 2, '"99.0" for --min-agreement. Must be <= 1.'),
        ({"kind": "features", "layer": 9}, 2, "layers 0 to 4"),
    ],
)
def test_wrong_settings_are_named(
    cli: Cli, finetuned: Done, wrong: dict[str, object], code: int, cause: str
) -> None:
    ours, out, err = cli("export", finetuned.folder, **{"to": "onnx", **wrong})
    assert (ours, out) == (code, "")
    assert cause in err
