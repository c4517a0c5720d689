"""Every command that computes does so on a device which no tensor of the processor may meet.

No GPU is at hand where these run; `other_device` stands in for one. Numbers must be the processor's.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command_line
from forked import Forked
from other_device import answer
from safetensors.torch import load_file

from beit.checkpoints import save
from beit.cli import app
from beit.model import BeitConfig, BeitForMaskedImageModeling
from beit.run import read_metrics

MINI = {"model": "beit_mini_patch8_32", "img_size": 32}
EXACT: dict[str, Any] = {"precision": "fp32", "batch_size": 12, "workers": 0, "log_every": 1}
AGGREGATING = BeitConfig(
    img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, early_layer=2, use_mask_token=True,
    vocab_size=16,
)  # fmt: skip


def commands(shapes: Path, out: Path) -> dict[str, list[str]]:
    """What is run in a folder, in this order: later ones use what earlier ones made."""
    train, val = shapes / "train", shapes / "val"
    words = {
        "dvae": command_line("train-tokenizer", train, img_size=32, vocab_size=32, code_dim=8,
                             hidden_dim=32, steps=6, revive_after_steps=3, lr=3e-3, **EXACT),
        "vqkd": command_line("train-tokenizer", train, kind="vqkd", vocab_size=16, code_dim=8,
                             decoder_depth=1, device_batch_size=5, steps=5, revive_after_steps=2,
                             **MINI, **EXACT),
        "v1": command_line("pretrain", train, tokenizer=out / "dvae", steps=8, save_every=4,
                           device_batch_size=6, gradient_checkpointing=True, drop_path=0.1,
                           **MINI, **EXACT),
        "v2": command_line("pretrain", train, tokenizer=out / "vqkd", steps=3, model=out / "start",
                           masks="random", probe_data=shapes, probe_layers=3, look_epochs=9, **EXACT),
        "pixels": command_line("pretrain", train, tokenizer="pixels", steps=3, **MINI, **EXACT),
        "tuned": command_line("finetune", shapes, model=out / "v1", epochs=2, method="full", mixup=0.8,
                              cutmix=1, reprob=0.25, rand_augment=5, ema_decay=0.9, drop_path=0.1,
                              label_smoothing=0.1, lr=1e-3, **EXACT),
    }  # fmt: skip
    words = {name: [*each, "--out", str(out / name)] for name, each in words.items()}
    words["v1 again"] = words["v1"]
    words["probe"] = command_line("probe", shapes, model=out / "v1", layers="3",
                                  kinds="knn", precision="fp32",
                                  out=out / "probe.json")  # fmt: skip
    words["evaluate"] = command_line("evaluate", shapes, model=out / "tuned", precision="fp32")
    words["embed"] = command_line("embed", val, model=out / "v1", precision="fp32", out=out / "vectors")
    words["classify"] = command_line("classify", val, model=out / "tuned", precision="fp32",
                                     out=out / "answers.jsonl")  # fmt: skip
    return words


def forget_the_end(run: Path) -> None:
    """As if the run had been killed after step 4."""
    (run / "config.json").unlink()
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000008")


@dataclass
class Both:
    """The folders of the processor and of the device, and what each command returned."""

    cpu: Path
    gpu: Path
    results: dict[str, tuple[Any, Any]]


@pytest.fixture(scope="module")
def both(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    if not hasattr(torch._C, "_acc"):
        pytest.skip("this torch has no backends written in Python")
    places = {device: tmp_path_factory.mktemp(device) for device in ("cpu", "gpu")}
    torch.manual_seed(0)
    start = BeitForMaskedImageModeling(AGGREGATING)
    returned: dict[str, list[Any]] = {}
    for device, out in places.items():
        save(start, out / "start")
        todo = {name: [*words, "--device", device] for name, words in commands(shapes, out).items()}
        names = list(todo)
        again = names.index("v1 again")
        returned[device] = run_all(device, [todo[name] for name in names[:again]])
        forget_the_end(out / "v1")
        returned[device] += run_all(device, [todo[name] for name in names[again:]])
    return Both(**places, results=dict(zip(names, zip(*returned.values(), strict=True), strict=True)))


def run_all(device: str, todo: list[list[str]]) -> list[Any]:
    """What each command returns, as JSON does."""
    if device == "cpu":
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return [json.loads(json.dumps(app(words), default=str)) for words in todo]
    return [result for result, _ in on_the_device(todo)]


def on_the_device(todo: list[list[str]]) -> list[tuple[Any, int]]:
    """What each command returns there, and how often it waited for the device."""
    process = Forked(answer, json.dumps(todo))
    out, said = process.communicate(600)
    assert process.returncode == 0, said[-3000:]
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("name", ["dvae", "vqkd", "v1", "v2", "pixels", "tuned"])
def test_a_training_on_another_device_is_that_of_the_processor(both: Both, name: str) -> None:
    ours, theirs = (read_metrics(place / name / "metrics.jsonl") for place in (both.cpu, both.gpu))
    pace = {"images_per_second", "data_wait_percent", "mfu_percent", "memory_mib"}
    assert len(ours) > 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - pace:
            assert other[key] == pytest.approx(one[key], rel=1e-4), (one["step"], key)
    weights = [load_file(place / name / "model.safetensors") for place in (both.cpu, both.gpu)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def test_looks_and_probes_on_another_device_see_the_same(both: Both) -> None:
    looks = [json.loads((place / "v2" / "looks.json").read_text()) for place in (both.cpu, both.gpu)]
    assert len(looks[0]) == 2
    assert "linear_3" in looks[0][0]
    for one, other in zip(*looks, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            wanted = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert other[key] == wanted, key
    (one,), (other,) = (result["rows"] for result in both.results["probe"])
    assert one["knn"]["accuracy"] == other["knn"]["accuracy"]


def test_answers_on_another_device_are_the_same(both: Both) -> None:
    vectors = [np.load(place / "vectors" / "00000.npy") for place in (both.cpu, both.gpu)]
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=1e-2, atol=1e-3)  # stored in 16 bits
    answers = [
        [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
        for place in (both.cpu, both.gpu)
    ]
    for one, other in zip(*answers, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    top1 = [result["top1"] for result in both.results["evaluate"]]
    assert top1[0] == top1[1]


def test_a_step_of_pre_training_waits_for_nothing(both: Both, shapes: Path, tmp_path: Path) -> None:
    """Six steps more, and not one wait more: what is waited for is lines of metrics, looks and saves."""
    few, many = (
        command_line("pretrain", shapes / "train", tokenizer=both.gpu / "dvae", steps=steps, device="gpu",
                     out=tmp_path / str(steps), look_epochs=9, **MINI, **EXACT | {"log_every": 100})
        for steps in (2, 8)
    )  # fmt: skip
    (_, first), (_, second) = on_the_device([few, many])
    assert first == second > 0


def test_tensors_of_two_devices_do_not_meet(both: Both) -> None:
    """Else the tests above could not fail."""
    code = """
import torch, other_device
other_device.plug_in()
with other_device.Plugged():
    layer = torch.nn.Linear(3, 4).to("gpu")
    print(layer(torch.ones(2, 3, device="gpu")).sum().backward(), layer.weight.grad.device)
    try:
        layer(torch.ones(2, 3))
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "None gpu:0", "aten.addmm.default: (2, 3) on cpu beside tensors on gpu"
    ], done.stderr  # fmt: skip
