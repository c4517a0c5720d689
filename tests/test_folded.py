"""Folded blocks say what the blocks say that they were made from."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_models import MODELS, build
from torch import Tensor

import beit
import beit.folded
import beit.torch_model
from beit.engine import Engine
from beit.export import export
from beit.folded import Layer, by_mkl, by_onednn, fold, is_right, linear, plain


def folded(model: Any, precision: str = "fp32") -> Any:
    other = copy.deepcopy(model)
    fold(other, precision)
    return other


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [None, (40, 24)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_states_are_those_of_the_plain_blocks(
    name: str, batch: int, size: tuple[int, int] | None
) -> None:
    """At every layer. Another size has another number of rows than the weights were ordered for."""
    model = build(name)
    images = noise(batch, 3, *(size or model.config.image_height_width))
    layers = range(model.config.depth + 1)
    for ours, theirs in zip(
        folded(model).layers(images, layers), model.layers(images, layers), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens_kept", [256, 1])
@torch.inference_mode()
def test_bf16_is_as_near_to_float32_as_autocast(
    tokens_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beit.folded, "FEW_TOKENS", tokens_kept)
    model = build("classifier")
    images = noise(4, 3, 32, 32)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        usual = (model(images) - exact).abs().max()
        ours = (folded(model, "bf16")(images) - exact).abs().max()
    assert 0 < ours < 2 * usual


# --- The operators -------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_the_operators_of_torch_that_we_pin_are_right() -> None:
    assert is_right(by_mkl, torch.float32)
    assert is_right(by_onednn, torch.bfloat16)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 12])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (33, 17)])
def test_a_layer_is_the_product_in_float64(
    shape: tuple[int, int], precision: str, rows: int, gelu: bool
) -> None:
    weight, bias, x = noise(*shape), noise(shape[0]), noise(rows, shape[1])
    if precision == "bf16":
        weight, bias, x = (t.bfloat16().float() for t in (weight, bias, x))
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = F.gelu(exact) if gelu else exact
    ours = linear(weight, bias, precision, 5, gelu)(x)
    few = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(ours.double(), exact, rtol=few, atol=few)


def absent(*_: object) -> Layer:
    return torch.ops.mkl._no_such_operator  # type: ignore[no-any-return]


def silent(weight: Tensor, bias: Tensor, tokens: int, gelu: bool) -> Layer:
    """An operator that multiplies what it should only take the shape of."""
    return plain(torch.zeros_like(weight), bias, tokens, gelu)


@pytest.mark.parametrize("kind", [absent, silent])
def test_an_operator_that_is_missing_or_wrong_is_not_used(
    kind: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beit.folded, "by_mkl", kind)
    weight, bias, x = noise(24, 16), noise(24), noise(5, 16)
    assert torch.equal(linear(weight, bias, "fp32", 5)(x), F.linear(x, weight, bias))
    assert not fold(build("classifier"), "fp32"), "plain products are fastest all at once"


# --- In the engine -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_engine_folds_its_own_model_and_leaves_yours(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    model = build("classifier")
    beit.save(model, tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yours = Engine(model, "torch", precision)  # type: ignore[arg-type]
    own = Engine(tmp_path / "model", "torch", precision)  # type: ignore[arg-type]
    images = noise(3, 3, 32, 32).numpy()
    few = 1e-5 if precision == "fp32" else 0.1
    np.testing.assert_allclose(own.logits_array(images), yours.logits_array(images), few, few)
    assert isinstance(own.model.blocks[0], beit.folded.FoldedBlock)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    for refused in (
        lambda: beit.save(own.model, tmp_path / "copy"),
        lambda: export(own.model, tmp_path / "copy.onnx", "onnx"),
    ):
        with pytest.raises(ValueError, match=r"tensors are not those of its config: .* `beit\.load`"):
            refused()
    assert not list(tmp_path.glob("copy*"))
    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 1e9)
    assert not isinstance(Engine(tmp_path / "model", "torch").model.blocks[0], beit.folded.FoldedBlock)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_file_of_the_weights_does_not_stay_in_memory(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded model's tensors lie in the mapped file; a single one that stayed would keep all of it."""
    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    beit.save(build("classifier"), tmp_path / "model")
    file = str(tmp_path / "model" / "model.safetensors")
    plain_model = beit.load(tmp_path / "model")
    assert file in Path("/proc/self/maps").read_text(), "else this says nothing"
    del plain_model
    engine = Engine(tmp_path / "model", "torch", precision)  # type: ignore[arg-type]
    gc.collect()
    assert file not in Path("/proc/self/maps").read_text()
    assert engine.logits_array(noise(1, 3, 32, 32).numpy()).shape == (1, 4)
