"""Features of layers, against the model's own states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import beit.features
from beit.features import (
    BeitFeatures,
    Pooling,
    default_layer,
    embed,
    extract_features,
    layer_states,
    pool_tokens,
    pooled,
    storage,
)
from beit.image import ImageSpec, preprocess, read_image
from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

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


def test_the_input_in_half_precision_comes_back_in_float32_too() -> None:
    model, batches = model_and_batches()
    for pooling in get_args(Pooling):
        assert extract_features(model, batches, [0], pooling, "bf16")[0].dtype == torch.float32
    for (state,) in layer_states(model, batches, [0], "bf16"):
        assert state.dtype == torch.float32


@torch.no_grad()
def test_an_embedding_of_the_end_is_what_the_head_gets_and_of_a_layer_its_states() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    models: list[Any] = [model_and_batches()[0]]
    for pooling in ("mean", "cls"):
        config = replace(CONFIG.for_classification(5), pooling=pooling, init_values=1.0)
        models.append(BeitForImageClassification(config))
    for model in models:
        for norm in model.modules():
            if isinstance(norm, torch.nn.LayerNorm):  # one that was built changes little
                torch.nn.init.normal_(norm.weight)
                torch.nn.init.normal_(norm.bias)
        model.eval()
        for layer in (0, 2, -1, 4):
            (states,) = model.layers(images, [layer])
            assert torch.equal(embed(model, images, "tokens", layer), states)
            assert torch.equal(embed(model, images, "cls", layer), states[:, 0])
            assert torch.equal(embed(model, images, "mean", layer), states[:, 1:].mean(dim=1))
        tokens = Beit.forward(model, images)
        assert torch.equal(embed(model, images, "tokens"), tokens)
        assert torch.equal(embed(model, images, "cls"), tokens[:, 0])
        if isinstance(model, BeitForImageClassification):
            of_head = embed(model, images, model.config.pooling)
            torch.testing.assert_close(model.head(of_head), model(images))
        else:
            assert torch.equal(embed(model, images), tokens[:, 1:].mean(dim=1))


def test_an_embedding_that_does_not_exist_is_named() -> None:
    model, batches = model_and_batches()
    for wrong in ({"layer": 5}, {"layer": -6}, {"pooling": "both"}):
        with pytest.raises(ValueError, match=r"layer|pooling"):
            embed(model, batches[0], **wrong)  # type: ignore[arg-type]


def test_missing_layer_is_named() -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match="layer 5 does not exist; this model has layers 0 to 4"):
        extract_features(model, batches, [5])


@pytest.mark.parametrize(("depth", "layer"), [(12, 9), (24, 14), (4, 3), (6, 4), (2, 2), (1, 1)])
def test_default_layer_is_the_papers_or_three_quarters(depth: int, layer: int) -> None:
    assert default_layer(depth) == layer


def test_an_unknown_pooling_is_named() -> None:
    with pytest.raises(ValueError, match="pooling 'max' is not one of mean, cls, both"):
        pool_tokens(torch.zeros(1, 3, 4), "max")  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_every_pooling_is_a_part_of_both(pooling: Pooling) -> None:
    model, batches = model_and_batches()
    both = extract_features(model, batches, [2, 4], "both", "fp32")
    asked = extract_features(model, batches, [2, 4], pooling, "fp32")
    for layer in (2, 4):
        assert torch.equal(pooled(both[layer], pooling), asked[layer])


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_features_in_a_file_are_those_in_memory(
    monkeypatch: pytest.MonkeyPatch, limit: int, pooling: Pooling
) -> None:
    model, batches = model_and_batches()
    expected = extract_features(model, batches, [3, 1], pooling, "fp32")
    monkeypatch.setattr(beit.features, "IN_MEMORY_BYTES", limit)
    found = extract_features(model, batches, [3, 1], pooling, "fp32", count=4)
    assert list(found) == [3, 1]
    for layer in (1, 3):
        assert torch.equal(found[layer], expected[layer])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_storage_beyond_memory_can_be_written_and_read(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(beit.features, "IN_MEMORY_BYTES", 0)
    kept = storage((3, 5), dtype)
    kept[1:] = torch.arange(10).view(2, 5)
    assert kept.dtype == dtype
    assert kept[1:].flatten().tolist() == list(range(10))


# --- scikit-learn --------------------------------------------------------------------------------


def encoder() -> Beit:
    model, _ = model_and_batches()
    model.image_spec = ImageSpec((16, 16), crop_ratio=1.0)
    return model


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[str]]:
    """Forty pictures of noise, dark or bright, and what they are."""
    rng = np.random.default_rng(0)
    files, names = [], []
    for number in range(40):
        name = "dark" if number % 2 else "bright"
        low = 0 if name == "dark" else 130
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(low, low + 120, (20, 18, 3), dtype=np.uint8)).save(files[-1])
        names.append(name)
    return files, names


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_transformer_gives_the_features_of_the_prepared_pictures(
    pictures: tuple[list[Path], list[str]], pooling: Pooling
) -> None:
    model, (files, _) = encoder(), pictures
    images = torch.from_numpy(np.stack([preprocess(read_image(f), model.image_spec) for f in files]))
    expected = extract_features(model, [images], [3], pooling, "fp32")[3].numpy()
    for given in (files, [str(f) for f in files], [read_image(f) for f in files]):
        features = BeitFeatures(model, None, pooling, batch_size=7, precision="fp32")
        found = features.fit(given).transform(given)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert len(features.get_feature_names_out()) == found.shape[1]
    other = BeitFeatures(model, 1, pooling, precision="fp32").fit_transform(files)
    assert not np.allclose(other, expected)


def test_any_estimator_stands_on_top_of_it(pictures: tuple[list[Path], list[str]]) -> None:
    pipeline = pytest.importorskip("sklearn.pipeline")
    linear_model = pytest.importorskip("sklearn.linear_model")
    model_selection = pytest.importorskip("sklearn.model_selection")
    files, names = pictures
    pipe = pipeline.make_pipeline(BeitFeatures(encoder()), linear_model.LogisticRegression())
    scores = model_selection.cross_val_score(pipe, files, names, cv=4)
    assert scores.mean() > 0.95
    grid = {"beitfeatures__layer": [1, 3], "beitfeatures__pooling": ["cls", "both"]}
    search = model_selection.GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(files, names)
    assert search.best_estimator_[0].layer in (1, 3)
    assert search.predict(files[:2]).tolist() == names[:2]
    assert "BeitFeatures(BeitForMaskedImageModeling" in repr(pipe)


def test_it_keeps_scikit_learns_rules_for_estimators() -> None:
    base = pytest.importorskip("sklearn.base")
    utils = pytest.importorskip("sklearn.utils")
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    features = BeitFeatures(encoder(), 2, "cls", 7, "bf16")
    for rule in (
        "check_estimator_cloneable",
        "check_get_params_invariance",
        "check_set_params",
        "check_no_attributes_set_in_init",
        "check_estimator_repr",
        "check_estimator_get_tags_default_keys",
    ):
        if hasattr(checks, rule):  # they differ between versions
            getattr(checks, rule)("BeitFeatures", features)
    clone = base.clone(features)
    assert clone is not features
    assert clone.model is features.model  # a frozen network needs no copy
    given = {"layer": 2, "pooling": "cls", "batch_size": 7, "precision": "bf16"}
    assert clone.get_params() == {"model": features.model, **given}
    if hasattr(utils, "get_tags"):
        tags = utils.get_tags(features)
        assert (tags.requires_fit, tags.input_tags.two_d_array) == (False, False)
    with pytest.raises(ValueError, match="no parameter 'depth'; it has model, layer, pooling"):
        features.set_params(depth=3)


def test_a_name_is_no_model_for_scikit_learn(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model 'pre' is not a loaded one: BeitFeatures\(beit\.load\('pre'\)\)"
    ):
        BeitFeatures("pre").transform([])  # type: ignore[arg-type]


def test_no_pictures_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no pictures to take features of"):
        BeitFeatures(model_and_batches()[0]).transform([])
