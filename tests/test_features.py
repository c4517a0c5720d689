"""Features of layers, against the model's own states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beit.features import default_layer, extract_features, pool_tokens
from beit.model import Beit, BeitConfig, BeitForMaskedImageModeling

CONFIG = BeitConfig(img_size=16, patch_size=8, embed_dim=12, depth=4, num_heads=3).for_pretraining(10)


def model_and_batches(drop_path_rate: float = 0.0) -> tuple[Beit, list[Tensor]]:
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(replace(CONFIG, drop_path_rate=drop_path_rate, init_values=1.0))
    return model, [torch.randn(3, 3, 16, 16), torch.randn(1, 3, 16, 16)]


def test_pooling_by_hand() -> None:
    tokens = torch.tensor([[[9.0, 8.0], [1.0, 2.0], [3.0, 6.0]]])
    assert pool_tokens(tokens, "mean").tolist() == [[2.0, 4.0]]
    assert pool_tokens(tokens, "cls").tolist() == [[9.0, 8.0]]
    assert pool_tokens(tokens, "both").tolist() == [[9.0, 8.0, 2.0, 4.0]]


@pytest.mark.parametrize("pooling", ["mean", "cls", "both"])
@torch.no_grad()
def test_features_are_the_pooled_states_of_the_layers_in_the_order_of_the_pictures(pooling: str) -> None:
    model, batches = model_and_batches()
    features = extract_features(model, batches, [3, 1], pooling, "fp32")  # type: ignore[arg-type]
    assert list(features) == [3, 1]
    for layer, found in features.items():
        states = [model.layers(batch, [layer])[0] for batch in batches]
        expected = torch.cat([pool_tokens(state, pooling) for state in states])  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        assert found.shape == (4, 24 if pooling == "both" else 12)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_features_are_without_gradients_and_without_dropped_branches() -> None:
    model, batches = model_and_batches(drop_path_rate=0.9)
    model.train()
    first = extract_features(model, batches, [4], precision="fp32")[4]
    again = extract_features(model, batches, [4], precision="fp32")[4]
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert not model.training


def test_batches_may_come_from_a_generator_of_any_sizes() -> None:
    model, batches = model_and_batches()
    together = extract_features(model, [torch.cat(batches)], [2], precision="fp32")[2]
    apart = extract_features(model, (b for b in torch.cat(batches).split(1)), [2], precision="fp32")[2]
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=0)


def test_half_precision_is_close_and_comes_back_in_float32() -> None:
    model, batches = model_and_batches()
    exact = extract_features(model, batches, [0, 4], precision="fp32")
    half = extract_features(model, batches, [0, 4], precision="bf16")
    for layer, features in half.items():
        assert features.dtype == torch.float32
        difference = float((features - exact[layer]).abs().max())
        assert 0 < difference < 0.05 * float(exact[layer].abs().max())


def test_missing_layer_is_named() -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match="layer 5 does not exist; this model has layers 0 to 4"):
        extract_features(model, batches, [5])


@pytest.mark.parametrize(("depth", "layer"), [(12, 9), (24, 14), (4, 3), (6, 4), (2, 2), (1, 1)])
def test_default_layer_is_the_papers_or_three_quarters(depth: int, layer: int) -> None:
    assert default_layer(depth) == layer
