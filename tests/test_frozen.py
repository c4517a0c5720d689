"""A classifier from frozen features: an ordinary model whose answers are the probe's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shapes

from beit.data import ImageSource, open_source
from beit.engine import Engine
from beit.frozen import candidate_layers, features_of, frozen_classifier, shortened
from beit.model import BeitConfig, BeitForImageClassification, Pooling
from beit.probe import LinearProbe, fit_probe

CONFIG = BeitConfig(
    img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2, num_classes=3
)


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    return open_source(write_shapes(tmp_path / "data", 20, seed=0))


def model(pooling: Pooling = "mean", **changes: object) -> BeitForImageClassification:
    torch.manual_seed(0)
    made = BeitForImageClassification(BeitConfig(**{**vars(CONFIG), "pooling": pooling, **changes}))
    for name, parameter in made.named_parameters():  # so that norms and heads would be seen
        torch.nn.init.normal_(parameter, std=0.3 if "gamma" not in name else 1.0)
    made.id2label = {0: "disc", 1: "square", 2: "triangle"}
    return made


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_models_logits_are_the_probes(source: ImageSource, pooling: Pooling) -> None:
    start = model(pooling)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    frozen = frozen_classifier(start, source, "fp32", 1, seed=0)
    features = frozen.features.layers[frozen.layer]
    labels = torch.from_numpy(source.labels)
    logits = Engine(frozen.model, "torch", "fp32", device="cpu").logits_of(source)
    fits = []
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        probe = fit_probe(features, labels, 3, penalty * len(labels))
        fits.append(np.abs(probe.logits(features).numpy() - logits).max())
    assert min(fits) < 1e-3
    assert frozen.model.config.depth == frozen.layer
    assert (logits.argmax(axis=1) == source.labels).mean() > 0.8
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_probe_is_a_head_without_standardising() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) * 7 + 3
    weights, ones = torch.randn(4, 6, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    probe = LinearProbe(x.mean(0), x.std(0), weights, ones, 1.0)
    weight, bias = probe.as_head()
    torch.testing.assert_close(x @ weight.T + bias, probe.logits(x))


def test_features_are_what_a_fresh_head_gets(source: ImageSource) -> None:
    start = model()
    short = shortened(start, 3)
    features = features_of(start, source, [3, 4], "fp32", 0)
    seen = []
    short.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    Engine(short, "torch", "fp32", device="cpu", batch_size=60).logits_of(source)
    torch.testing.assert_close(features.layers[3], torch.cat(seen), atol=1e-4, rtol=1e-4)


def test_pictures_that_cannot_be_read_are_left_out_and_named(
    tmp_path: Path, source: ImageSource, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "disc" / "03.png").write_text("no picture")
    features = features_of(model(), source, [2], "fp32", 1)
    assert features.kept.tolist() == [i for i in range(60) if i != 3]
    assert len(features.layers[2]) == 59
    assert "disc/03.png" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of 1 picture can be read"):
        features_of(model(), source, [2], "fp32", 1, np.array([3]))


@pytest.mark.parametrize(
    ("depth", "layers"), [(12, [6, 8, 9, 10, 12]), (24, [12, 14, 16, 20, 24]), (4, [2, 3, 4]), (1, [1])]
)
def test_candidates_are_in_the_upper_half_with_the_papers_layer(depth: int, layers: list[int]) -> None:
    assert candidate_layers(depth) == layers
