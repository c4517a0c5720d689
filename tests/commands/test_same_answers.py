"""A thousand pictures: the engine, the command line, exported files and the server name each one alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, draw_shape
from PIL import Image

import beit
from beit.data import open_source
from beit.engine import TIE

from .conftest import Done, serving

COUNT = 1000


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes under so much noise that not all are recognised, as PNG and JPEG, some of them oblong."""
    folder, rng = tmp_path_factory.mktemp("thousand"), np.random.default_rng(0)
    for number in range(COUNT):
        shape = ("disc", "square", "triangle")[number % 3]
        pixels = np.asarray(draw_shape(shape, 32, rng)) + rng.normal(0, 90, (32, 32, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if number % 4 == 3:
            picture = picture.resize((40, 32))
        file = folder / shape / f"{number:03d}.{'jpg' if number % 2 else 'png'}"
        file.parent.mkdir(exist_ok=True)
        picture.save(file)
    return folder


def test_engine_command_line_exported_files_and_server_agree_on_every_picture(
    thousand: Path, finetuned: Done, cli: Cli, tmp_path: Path
) -> None:
    source = open_source(thousand)
    truth = np.array([source.classes[label] for label in source.labels])
    names = [source.name(i) for i in range(COUNT)]
    engine = beit.Engine(finetuned.folder, "torch", "fp32")
    logits = engine.logits_of(source)
    first, second = np.sort(logits, axis=1)[:, :-3:-1].T
    clear = first - second > TIE["fp32"] * logits.std()
    assert clear.sum() > 0.99 * COUNT
    expected = np.array(engine.labels)[logits.argmax(axis=1)]
    assert 0.5 < (expected == truth).mean() < 0.99  # a set on which one can be wrong

    from_python = list(beit.Engine(finetuned.folder, precision="fp32").classify(source))
    assert [answer.path for answer in from_python] == names
    assert (np.array([answer.label for answer in from_python]) == expected)[clear].all()

    models = [finetuned.folder]
    for runtime, name in (("openvino", "shapes.xml"), ("onnx", "shapes.onnx")):
        pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
        code, _, err = cli("export", finetuned.folder, to=runtime, out=tmp_path / name)
        assert code == 0, err
        models.append(tmp_path / name)
    for model in models:
        options = {"model": model, "precision": "fp32", "batch_size": 50, "json": True}
        code, out, err = cli("classify", thousand, **options)
        assert code == 0, err
        answers = [json.loads(line) for line in out.splitlines()]
        assert [answer["path"] for answer in answers] == names
        labels = np.array([answer["label"] for answer in answers])
        assert (labels == expected)[clear].all(), model
        code, out, err = cli("evaluate", thousand, **options)
        assert code == 0, err
        assert json.loads(out)["top1"] == pytest.approx((labels == truth).mean()), model

    with serving("--model", finetuned.folder, "--precision", "fp32") as server:
        served = [server.ask("POST", "/v1/classify", (thousand / name).read_bytes()) for name in names]
    assert {status for status, _, _ in served} == {200}
    labels = np.array([answer["label"] for _, _, answer in served])
    assert (labels == expected)[clear].all()
    scores = np.array([answer["score"] for _, _, answer in served])
    assert np.allclose(scores, [answer.score for answer in from_python], atol=1e-6)
