"""`beit bench`: a row a case and a batch size, measured in processes of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli

import beit.commands.bench as bench
from beit.checkpoints import load_model
from beit.export import export
from beit.flops import forward_flops
from beit.graphs import Output, installed, multiplies_bf16

from .conftest import Done


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "installed", lambda runtime: runtime == "torch")
    monkeypatch.setattr(bench, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.usefixtures("trusted")
def test_each_case_has_a_row_for_each_batch_size(cli: Cli, finetuned: Done, tmp_path: Path) -> None:
    file = tmp_path / "graph.pt2"
    model = load_model(finetuned.folder)
    export(model, file, "torch")
    (tmp_path / "other").mkdir()
    other = shutil.copy(file, tmp_path / "other")
    graphs = (file, other)
    words = {"batch_sizes": 2, "repeats": 3, "rounds": 2, "graphs": graphs, "threads": 1}
    code, out, _ = cli("bench", finetuned.folder, **words, json=True)
    assert code == 0
    result = json.loads(out)
    assert [(r["name"], r["batch"]) for r in result["rows"]] == [
        ("beit torch fp32", 2),
        ("graph.pt2", 2),
        (str(other), 2),
    ]
    for row in result["rows"]:
        assert row["batches"] == 6
        assert 0 < row["ms_min"] <= row["ms_p50"] <= row["ms_p99"]
        assert row["images_per_second"] == pytest.approx(2000 / row["ms_p50"])
        gflops = row["images_per_second"] * forward_flops(model.config) / 1e9
        assert row["gflops"] == pytest.approx(gflops)
        assert set(result["ceiling_gflops"]) == {"fp32", "bf16", "int8"}
        share = gflops / result["ceiling_gflops"]["fp32"]
        assert row["share_of_ceiling"] == pytest.approx(share)
        assert row["peak_mib"] > 100


def test_what_is_timed_is_the_model_beside_the_same_weights_in_transformers(
    finetuned: Done, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    answers = []
    for runtime in ("torch", "transformers"):
        case = {"runtime": runtime, "precision": "fp32", "model": str(finetuned.folder), "threads": None}
        run, size, precision = bench.runner(case)
        assert (size, precision) == ((32, 32), "fp32")
        answer = run(images)
        answers.append(np.asarray(getattr(answer, "logits", answer)))
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-4)


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
def test_a_file_is_timed_in_the_precision_that_the_engine_computes_it_in(
    cli: Cli, finetuned: Done, tmp_path: Path
) -> None:
    file = tmp_path / "graph.xml"
    export(load_model(finetuned.folder), file, "openvino")
    words = {"repeats": 1, "rounds": 1, "threads": 1, "json": True}
    code, out, _ = cli("bench", file, "--batch-sizes", "3", "1", **words)
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["batch"] for row in rows] == [3, 1]
    assert {row["precision"] for row in rows} == {"bf16" if multiplies_bf16() else "fp32"}
    assert all(row["share_of_ceiling"] > 0 for row in rows)
    assert rows[0]["peak_mib"] >= rows[1]["peak_mib"]


def test_a_file_of_some_features_is_timed_at_these(finetuned: Done, tmp_path: Path) -> None:
    file = tmp_path / "second.onnx"
    model = load_model(finetuned.folder)
    export(model, file, "onnx", Output("features", "cls", 2))
    run, size, _ = bench.runner({"runtime": "file", "model": str(file), "threads": 1})
    assert run(np.zeros((3, 3, *size), np.float32)).shape == (3, model.config.embed_dim)


def test_a_wrong_file_is_named_before_anything_is_timed(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("bench", tmp_path / "no.onnx")
    assert (code, out) == (5, "")
    assert "no.onnx does not exist" in err
