"""The encoder and its heads, against golden outputs of the original code, published counts and closed
forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import beit.model
from beit.image import unilm_spec
from beit.model import (
    VARIANTS,
    Beit,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    resize_positions,
)
from beit.relative_position import Grid, resize_bias_table

GOLDEN = Path(__file__).parent / "golden"
# The golden models: 4 x 4 patches of 8 pixels.
SMALL = BeitConfig(
    img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7, vocab_size=32
)
SHARED = SMALL.for_pretraining(vocab_size=32)
AGGREGATING = replace(SHARED, early_layer=2)
PLAIN = replace(SMALL, rel_pos_bias="none", use_abs_pos_emb=True, init_values=0.0, pooling="cls")


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Fill every parameter with random numbers: no zero table, no zero token, no equal gammas."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half_mask(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < 0.5


# --- The original code ---------------------------------------------------------------------------


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        numbers = {key: file[key] for key in file.files}
    return {k: torch.from_numpy(v) for k, v in numbers.items() if v.dtype.kind != "U"}


def golden_model(name: str, model: Beit) -> Any:
    model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"))
    return model.eval()


def classifier() -> tuple[BeitForImageClassification, dict[str, Tensor]]:
    name = "unilm-v1-finetune-relbias"
    return golden_model(name, BeitForImageClassification(SMALL)), golden(name)


def masked_model() -> tuple[BeitForMaskedImageModeling, dict[str, Tensor]]:
    name = "unilm-v1-pretrain-shared"
    return golden_model(name, BeitForMaskedImageModeling(SHARED)), golden(name)


def aggregating_model() -> tuple[BeitForMaskedImageModeling, dict[str, Tensor]]:
    name = "unilm-v2-pretrain-clspt"
    return golden_model(name, BeitForMaskedImageModeling(AGGREGATING)), golden(name)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def close_gradients(model: nn.Module, name: str) -> None:
    """Norms of all gradients, and all entries of the small ones, within 1e-4 of their size."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        norms = dict(zip(file["grad_names"].tolist(), file["grad_norms"].tolist(), strict=True))
        small = {key[len("grad.") :]: file[key] for key in file.files if key.startswith("grad.")}
    ours = {key: p.grad for key, p in model.named_parameters()}
    assert ours.keys() == norms.keys()
    for key, gradient in ours.items():
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(norms[key], rel=1e-4), key
        if key in small:
            difference = (gradient - torch.from_numpy(small[key])).norm()
            assert difference <= 1e-4 * norms[key], key


@torch.no_grad()
def test_classifier_outputs_are_those_of_the_original() -> None:
    model, expected = classifier()
    x = expected["input"]
    close(model(x), expected["logits"], 1e-5)
    close(model.pool(Beit.forward(model, x)), expected["features"], 1e-5)
    close(F.cross_entropy(model(x), expected["labels"]), expected["loss"], 1e-5)
    close(model.double()(x.double()), expected["logits_f64"], 1e-10)


@torch.no_grad()
def test_masked_model_outputs_are_those_of_the_original() -> None:
    model, expected = masked_model()
    x, mask = expected["input"], expected["bool_masked_pos"]
    tokens = Beit.forward(model, x, mask)
    logits = model(x, mask)
    close(logits, expected["logits_masked"], 1e-5)
    close(tokens, expected["features_norm"], 1e-5)
    close(model.logits(tokens), expected["logits_all"], 1e-5)
    close(model(x), expected["logits_all_no_mask"], 1e-5)
    labels = expected["labels"][mask]
    close(F.cross_entropy(logits, labels), expected["loss"], 1e-5)
    close((logits.argmax(-1) == labels).float().mean(), expected["mlm_acc"], 1e-7)
    close(model.double()(x.double(), mask), expected["logits_all_f64"][mask], 1e-10)


@torch.no_grad()
def test_both_heads_of_v2_are_those_of_the_original() -> None:
    model, expected = aggregating_model()
    x, mask = expected["input"], expected["bool_masked_pos"]
    labels = expected["labels"][mask]
    for suffix, logits in zip(["main", "cls"], model.forward_aggregated(x, mask), strict=True):
        close(logits, expected[f"logits_masked_{suffix}"], 1e-5)
        close(F.cross_entropy(logits, labels), expected[f"loss_{suffix}"], 1e-5)
    close(model(x, mask), expected["logits_masked_main"], 1e-5)
    double = model.double().forward_aggregated(x.double(), mask)
    for suffix, logits in zip(["main", "cls"], double, strict=True):
        close(logits, expected[f"logits_all_f64_{suffix}"][mask], 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("build", [classifier, masked_model, aggregating_model])
def test_layers_are_the_blocks_of_the_original(
    build: Callable[[], tuple[Beit, dict[str, Tensor]]],
) -> None:
    model, expected = build()
    states = model.layers(expected["input"], [1, 2, 3], expected.get("bool_masked_pos"))
    for number, state in enumerate(states):
        close(state, expected[f"block_{number}"], 2e-5)


def test_classifier_gradients_are_those_of_the_original() -> None:
    model, expected = classifier()
    F.cross_entropy(model(expected["input"]), expected["labels"]).backward()
    close_gradients(model, "unilm-v1-finetune-relbias")


def test_masked_model_gradients_are_those_of_the_original() -> None:
    model, expected = masked_model()
    mask = expected["bool_masked_pos"]
    F.cross_entropy(model(expected["input"], mask), expected["labels"][mask]).backward()
    close_gradients(model, "unilm-v1-pretrain-shared")


def test_v2_gradients_are_those_of_the_original() -> None:
    model, expected = aggregating_model()
    mask = expected["bool_masked_pos"]
    main, aggregated = model.forward_aggregated(expected["input"], mask)
    labels = expected["labels"][mask]
    (F.cross_entropy(main, labels) + F.cross_entropy(aggregated, labels)).backward()
    close_gradients(model, "unilm-v2-pretrain-clspt")


@torch.no_grad()
def test_classifying_at_another_size_is_what_the_original_loader_leads_to() -> None:
    """The original resizes the tables when it loads; ours does so when it meets the image."""
    expected = golden("unilm-v1-load-pt-to-ft-64")
    state = load_file(GOLDEN / "unilm-v1-pretrain-shared.safetensors")
    table = state["rel_pos_bias.relative_position_bias_table"]
    fitting = {k: v for k, v in state.items() if k.startswith(("cls_token", "patch_embed", "blocks"))}
    fitting |= {f"blocks.{i}.attn.relative_position_bias_table": table for i in range(3)}
    fresh = ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    fitting |= {key: expected[f"result.{key}"] for key in fresh}
    model = BeitForImageClassification(SMALL).eval()
    model.load_state_dict(fitting)
    close(model(expected["input"]), expected["logits"], 1e-5)
    # In double only this far: the original rounds its resized tables to float32.
    close(model.double()(expected["input"].double()), expected["logits_f64"], 2e-6)


# --- Sizes and names -----------------------------------------------------------------------------


def build(name: str) -> Beit:
    kind = BeitForMaskedImageModeling if name.endswith("8k_vocab") else BeitForImageClassification
    with torch.device("meta"):
        return kind(VARIANTS[name])


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("beit_base_patch16_224_8k_vocab", 91_965_776),
        ("beit_base_patch16_224_pt1k_8k_vocab", 92_089_856),
        ("beit_large_patch16_224_8k_vocab", 311_534_016),
        ("beit_base_patch16_224", 86_530_984),
        ("beit_base_patch16_384", 86_744_104),
        ("beit_base_patch16_512", 86_997_544),
        ("beit_base_patch16_224_in22k", 102_557_713),
        ("beit_large_patch16_224", 304_430_568),
        ("beit_large_patch16_384", 304_998_888),
        ("beit_large_patch16_512", 305_674_728),
        ("beit_large_patch16_224_in22k", 325_792_593),
        ("beitv2_base_patch16_224", 86_530_984),
        ("beitv2_large_patch16_224", 304_430_568),
        ("beitv2_base_patch16_224_in22k", 102_557_713),
        ("beitv2_large_patch16_224_in22k", 325_792_593),
        ("beitv2_base_patch16_224_8k_vocab", 106_143_056),
        ("beitv2_large_patch16_224_8k_vocab", 336_728_512),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    assert count(build(name)) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("beit_base_patch16_224", 85_761_984), ("beit_large_patch16_224", 303_405_568)],
)
def test_without_classes_the_backbone_and_its_norm_are_left(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = BeitForImageClassification(replace(VARIANTS[name], num_classes=0))
    assert count(model) == parameters


@pytest.mark.parametrize(
    ("name", "entries", "index_buffers"),
    [
        ("beit_base_patch16_224_8k_vocab", 190, 1),
        ("beit_large_patch16_224_8k_vocab", 370, 1),
        ("beit_base_patch16_224", 211, 12),
        ("beit_large_patch16_224", 415, 24),
        ("beitv2_base_patch16_224_8k_vocab", 220, 1),
        ("beitv2_large_patch16_224_8k_vocab", 400, 1),
    ],
)
def test_state_dicts_have_the_published_entries_less_the_index_buffers(
    name: str, entries: int, index_buffers: int
) -> None:
    assert len(build(name).state_dict()) == entries - index_buffers


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_classifies_or_predicts_as_its_name_says(name: str) -> None:
    config, model = VARIANTS[name], build(name)
    size = int(name.split("_patch")[1].split("_")[1])
    assert config.image_height_width == (size, size)
    assert config.patch_size == int(name.split("_patch")[1].split("_")[0])
    x = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        shape = tuple(model(x).shape)
    if name.endswith("8k_vocab"):
        assert shape == (1, config.grid[0] * config.grid[1], 8192)
    else:
        assert shape == (1, 21841 if name.endswith("in22k") else 1000)


# --- Initial weights -----------------------------------------------------------------------------

# Enough weights for a standard deviation within a few tenths of a percent.
WIDE = BeitConfig(
    img_size=64, patch_size=8, embed_dim=192, depth=4, num_heads=3, num_classes=500, vocab_size=500
)
STD = 0.02
_density = math.exp(-0.5) / math.sqrt(2 * math.pi)
CUT_STD = STD * math.sqrt(1 - 2 * _density / math.erf(1 / math.sqrt(2)))  # of a normal cut at ±1 sd


def has_std(weight: Tensor, std: float) -> None:
    """Five standard errors; those of a normal are the widest of our distributions."""
    assert float(weight.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel())


def blocks_are_initialised(model: Beit, std: float, cut: float) -> None:
    for number, block in enumerate(model.blocks, 1):
        for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
            has_std(weight, std)
            assert weight.abs().max() <= cut
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            has_std(weight, std / math.sqrt(2 * number))
            assert weight.abs().max() <= cut / math.sqrt(2 * number)


def zeros_ones_and_gammas(model: Beit) -> None:
    extra = getattr(model, "cls_pt_layers", [])
    for block in [*model.blocks, *extra]:
        assert not block.attn.q_bias.any()
        assert not block.attn.v_bias.any()
        for gamma in (block.gamma_1, block.gamma_2):
            assert torch.equal(gamma, torch.full_like(gamma, model.config.init_values))
    for block in model.blocks:
        for bias in (block.attn.proj.bias, block.mlp.fc1.bias, block.mlp.fc2.bias):
            assert not bias.any()
    for table in model._bias_tables():
        assert not table.any()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()


def test_cut_normal_has_the_standard_deviation_that_theory_gives() -> None:
    assert math.isclose(CUT_STD, 0.5396 * STD, rel_tol=1e-4)


@torch.no_grad()
def test_initial_weights_of_pretraining_are_the_published_ones() -> None:
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(replace(WIDE.for_pretraining(500), use_abs_pos_emb=True))
    blocks_are_initialised(model, CUT_STD, STD)
    zeros_ones_and_gammas(model)
    assert model.mask_token is not None
    assert model.pos_embed is not None
    for weight in (
        model.patch_embed.proj.weight,
        model.lm_head.weight,
        model.cls_token,
        model.mask_token,
        model.pos_embed,
    ):
        has_std(weight, CUT_STD)
        assert weight.abs().max() <= STD
    assert not model.patch_embed.proj.bias.any()
    assert not model.lm_head.bias.any()


@torch.no_grad()
def test_initial_weights_of_classification_are_the_published_ones() -> None:
    torch.manual_seed(0)
    model = BeitForImageClassification(replace(WIDE, use_abs_pos_emb=True))
    blocks_are_initialised(model, STD, math.inf)
    zeros_ones_and_gammas(model)
    assert model.pos_embed is not None
    for token in (model.cls_token, model.pos_embed):
        has_std(token, STD)
        assert token.abs().max() > STD  # not cut
    has_std(model.head.weight, STD * 0.001)
    assert not model.head.bias.any()
    bound = 1 / math.sqrt(3 * 8 * 8)  # torch's default for a convolution: uniform within this
    has_std(model.patch_embed.proj.weight, bound / math.sqrt(3))
    for weight in (model.patch_embed.proj.weight, model.patch_embed.proj.bias):
        assert 0.9 * bound < weight.abs().max() <= bound


@torch.no_grad()
def test_extra_blocks_of_v2_keep_torchs_linears_but_for_the_depth() -> None:
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(replace(WIDE.for_pretraining(500), early_layer=3))
    blocks_are_initialised(model, CUT_STD, STD)
    zeros_ones_and_gammas(model)
    for number, block in enumerate(model.cls_pt_layers, 3 + 1):
        depth = math.sqrt(2 * number)
        for linear, scale in [
            (block.attn.qkv, 1.0),
            (block.attn.proj, depth),
            (block.mlp.fc1, 1.0),
            (block.mlp.fc2, depth),
        ]:
            bound = 1 / math.sqrt(linear.in_features) / scale
            has_std(linear.weight, bound / math.sqrt(3))
            assert 0.99 * bound < linear.weight.abs().max() <= bound
            if linear.bias is not None:
                assert 0.9 * bound * scale < linear.bias.abs().max() <= bound * scale


def test_without_layer_scale_there_are_no_gammas() -> None:
    assert not [key for key in Beit(PLAIN).state_dict() if "gamma" in key]


# --- The bias cache ------------------------------------------------------------------------------


class Counter:
    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        return self.function(*arguments)


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter(beit.model.gather_bias)
    monkeypatch.setattr(beit.model, "gather_bias", counter)
    return counter


@pytest.mark.parametrize(("config", "tables"), [(SMALL, 3), (SHARED, 1)])
def test_in_evaluation_the_bias_is_gathered_once_a_grid(
    config: BeitConfig, tables: int, gathers: Counter
) -> None:
    model = randomise(Beit(config))
    with torch.no_grad():
        for _ in range(3):
            model(images(2, 3, 32, 32))
        assert gathers.calls == tables
        for _ in range(3):
            model(images(2, 3, 40, 24))
            model(images(2, 3, 32, 32))
        assert gathers.calls == 2 * tables
        first = model.relative_position_biases((4, 4))
        assert model.relative_position_biases((4, 4)) is first


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_attention_says_the_same_with_gradients_and_without(
    dtype: torch.dtype, tolerance: float
) -> None:
    """With them it is written out on a processor; without, torch's fused kernel."""
    model = randomise(BeitForImageClassification(SMALL)).to(dtype)
    pictures = images(2, 3, 32, 32).to(dtype)
    learning = model.layers(pictures, [3])[0]
    assert learning.requires_grad
    with torch.no_grad():
        fused = model.layers(pictures, [3])[0]
    torch.testing.assert_close(learning.detach(), fused, atol=tolerance, rtol=tolerance)


def test_with_gradients_or_in_training_the_bias_is_gathered_anew(gathers: Counter) -> None:
    model = randomise(Beit(SMALL))
    for _ in range(2):
        model(images(1, 3, 32, 32))
    assert gathers.calls == 6
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(images(1, 3, 32, 32))
    assert gathers.calls == 12


def a_step(optimiser: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Beit], Beit]:
    """A training step in evaluation mode, as probes and adversaries do."""

    def change(model: Beit) -> Beit:
        model(images(2, 3, 32, 32)).square().sum().backward()
        optimiser(model.parameters(), lr=0.3, **options).step()
        return model

    return change


def a_training_step(model: Beit) -> Beit:
    return a_step(torch.optim.SGD)(model.train()).eval()


def a_loaded_state_dict(model: Beit) -> Beit:
    model.load_state_dict(randomise(Beit(SMALL), seed=5).state_dict())
    return model


def an_assigned_state_dict(model: Beit) -> Beit:
    model.load_state_dict(randomise(Beit(SMALL), seed=5).state_dict(), assign=True)
    return model


@torch.no_grad()
def a_copy_in_place(model: Beit) -> Beit:
    for table in model._bias_tables():
        table.copy_(images(*table.shape, seed=4))
    return model


def new_data(model: Beit) -> Beit:
    for table in model._bias_tables():
        table.data = 2 * table.data
    return model


def data_in_place(model: Beit) -> Beit:
    for table in model._bias_tables():
        table.data.mul_(2)
    return model


@torch.no_grad()
def a_deep_copy_that_is_changed(model: Beit) -> Beit:
    return a_copy_in_place(copy.deepcopy(model))


@torch.no_grad()
def another_grid_in_between(model: Beit) -> Beit:
    model(images(1, 3, 48, 16))
    a_copy_in_place(model)
    model(images(1, 3, 48, 16))
    return model


def a_cache_made_in_inference_mode(model: Beit) -> Beit:
    a_copy_in_place(model)
    with torch.inference_mode():
        model(images(2, 3, 32, 32))
    return model


@torch.no_grad()
def agrees_with_a_fresh_model(model: Beit) -> None:
    fresh = type(model)(model.config).to(model.cls_token.dtype).eval()
    fresh.load_state_dict(model.state_dict())
    for shape in [(2, 3, 32, 32), (1, 3, 48, 16)]:
        x = images(*shape).to(model.cls_token.dtype)
        assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(a_step(torch.optim.SGD), id="sgd"),
        pytest.param(a_step(torch.optim.AdamW), id="adamw"),
        pytest.param(a_step(torch.optim.AdamW, foreach=True), id="adamw-foreach"),
        pytest.param(a_step(torch.optim.AdamW, fused=True), id="adamw-fused"),
        a_training_step,
        a_loaded_state_dict,
        an_assigned_state_dict,
        a_copy_in_place,
        new_data,
        data_in_place,
        a_deep_copy_that_is_changed,
        another_grid_in_between,
        a_cache_made_in_inference_mode,
    ],
)
def test_cached_bias_is_never_stale_after(change: Callable[[Beit], Beit]) -> None:
    model = randomise(Beit(SMALL))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        model(x)  # fills the cache
        before = torch.cat([bias.flatten() for bias in model.relative_position_biases((4, 4))])
        model(images(1, 3, 48, 16))
    model = change(model)
    agrees_with_a_fresh_model(model)
    with torch.no_grad():
        after = torch.cat([bias.flatten() for bias in model.relative_position_biases((4, 4))])
    assert not torch.allclose(before, after)  # so a stale bias would have shown


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_cached_bias_is_never_stale_after_a_change_of_dtype(dtype: torch.dtype) -> None:
    model = randomise(Beit(SMALL))
    model(images(2, 3, 32, 32))
    model.to(dtype)
    assert model.relative_position_biases((4, 4))[0].dtype == dtype
    agrees_with_a_fresh_model(model)


@torch.no_grad()
def test_cached_bias_is_never_stale_after_a_rounding_there_and_back() -> None:
    """Both conversions replace the data; the second may come to lie where the first one was."""
    model = randomise(Beit(replace(SMALL, img_size=28, patch_size=2, num_heads=48, depth=1)))
    for _ in range(5):
        randomise(model)
        model(images(1, 3, 28, 28))
        model.to(torch.bfloat16).to(torch.float32)
        table = model._bias_tables()[0]
        gathered = table[model.relative_position_index.flatten()].view(197, 197, 48)
        assert torch.equal(model.relative_position_biases((14, 14))[0][0], gathered.permute(2, 0, 1))


def test_a_size_read_from_json_is_the_same_config() -> None:
    listed = replace(SMALL, img_size=[32, 48])  # type: ignore[arg-type]
    assert listed == replace(SMALL, img_size=(32, 48))
    assert hash(listed) == hash(replace(SMALL, img_size=(32, 48)))


def test_a_config_for_one_task_leaves_the_heads_of_the_other() -> None:
    config = replace(SMALL, early_layer=1)
    assert config.for_classification(7).early_layer == 0
    assert config.for_classification(7).for_pretraining(11).num_classes == 0
    assert config.for_pretraining(11).early_layer == 1  # v2's second head is for this


def test_a_rectangle_is_prepared_as_high_and_wide_as_it_is_and_cropped_by_its_longer_side() -> None:
    spec = Beit(replace(SMALL, img_size=(384, 224), patch_size=16)).image_spec
    assert spec == replace(unilm_spec(384), size=(384, 224))
    assert spec.crop_ratio != unilm_spec(224).crop_ratio


@torch.no_grad()
def test_a_deep_copy_leaves_the_cache_of_the_original_right() -> None:
    model = randomise(Beit(SMALL))
    model(images(2, 3, 32, 32))
    a_deep_copy_that_is_changed(model)
    agrees_with_a_fresh_model(model)


@torch.no_grad()
def test_biases_of_the_last_few_grids_are_kept_and_none_in_training() -> None:
    model = randomise(Beit(SMALL))
    for height in range(16, 8 * (beit.model.KEPT_GRIDS + 4), 8):
        model(images(1, 3, height, 32))
    heights = [grid[0] for grid in model._bias_cache]
    assert heights == list(range(heights[-1] - beit.model.KEPT_GRIDS + 1, heights[-1] + 1))
    model.train()
    assert model._bias_cache == {}


def test_only_a_training_computes_activations_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Beit(SMALL))
    model.gradient_checkpointing = True
    monkeypatch.setattr(beit.model, "checkpoint", None)
    model(images(1, 3, 32, 32)).sum().backward()
    with pytest.raises(TypeError):
        model.train()(images(1, 3, 32, 32))


# --- Any size ------------------------------------------------------------------------------------


def native(model: Beit, height: int, width: int) -> Beit:
    """A model built for this image size with the same weights, its positions resized."""
    config = replace(model.config, img_size=(height, width))
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("relative_position_bias_table"):
            state[key] = resize_bias_table(value, model.config.grid, config.grid)
        elif key == "pos_embed":
            state[key] = resize_positions(value, model.config.grid, config.grid)
    built = type(model)(config)
    built.load_state_dict(state)
    return built.eval()


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (48, 64), (24, 40), (8, 8)])
@pytest.mark.parametrize("config", [SMALL, SHARED, PLAIN])
@torch.no_grad()
def test_any_size_gives_what_a_model_built_for_it_gives(
    config: BeitConfig, size: tuple[int, int]
) -> None:
    model = randomise(Beit(config))
    x = images(2, 3, *size)
    close(model(x), native(model, *size)(x), 1e-6)


@torch.no_grad()
def test_a_model_of_a_rectangle_takes_other_sizes_too() -> None:
    model = randomise(BeitForImageClassification(replace(SMALL, img_size=(24, 40))))
    assert model.config.grid == (3, 5)
    for size in [(24, 40), (40, 24), (32, 32)]:
        x = images(2, 3, *size)
        close(model(x), native(model, *size)(x), 1e-6)


def bicubic(values: np.ndarray, target: Grid) -> np.ndarray:
    """Bicubic interpolation by its definition: Keys' kernel with a = -0.75, half-pixel centres, the
    edge repeated. values: (h, w, D)."""

    def matrix(source: int, target: int) -> np.ndarray:
        weights = np.zeros((target, source))
        for place in range(target):
            centre = (place + 0.5) * source / target - 0.5
            for near in range(math.floor(centre) - 1, math.floor(centre) + 3):
                d = abs(centre - near)
                if d <= 1:
                    weight = 1.25 * d**3 - 2.25 * d**2 + 1
                else:
                    weight = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
                weights[place, min(max(near, 0), source - 1)] += weight
        return weights

    to_y, to_x = matrix(values.shape[0], target[0]), matrix(values.shape[1], target[1])
    return np.einsum("ay,yxd,bx->abd", to_y, values, to_x)


@pytest.mark.parametrize("target", [(8, 8), (3, 7), (2, 2)])
def test_absolute_positions_are_resized_by_the_definition_of_bicubic(target: Grid) -> None:
    positions = images(1, 1 + 20, 6).double()
    resized = resize_positions(positions, (4, 5), target)
    expected = bicubic(positions[0, 1:].view(4, 5, 6).numpy(), target)
    assert torch.equal(resized[:, 0], positions[:, 0])
    np.testing.assert_allclose(resized[0, 1:].view(*target, 6), expected, atol=1e-12)
    assert resize_positions(positions, (4, 5), (4, 5)) is positions


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 30, 32), "30 is not a multiple of patch_size 8; use 24 or 32"),
        ((1, 3, 32, 33), "33 is not a multiple of patch_size 8; use 32 or 40"),
        ((1, 3, 32, 5), "5 is not a multiple of patch_size 8; use 8$"),
        ((1, 3, 0, 8), "0 is not a multiple of patch_size 8; use 8$"),
        ((1, 1, 32, 32), r"images are \(1, 1, 32, 32\); expected \(B, 3, height, width\)"),
        ((3, 32, 32), r"images are \(3, 32, 32\); expected \(B, 3, height, width\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_what_does(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Beit(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(2, 15, dtype=torch.bool), r"torch.bool \(2, 15\).*need torch.bool \(2, 16\)"),
        (torch.zeros(1, 16, dtype=torch.bool), r"torch.bool \(1, 16\).*need torch.bool \(2, 16\)"),
        (torch.zeros(2, 16), r"torch.float32 \(2, 16\).*need torch.bool \(2, 16\)"),
        (torch.zeros(2, 16, dtype=torch.int64), r"torch.int64 \(2, 16\)"),
        (torch.zeros(2, 2, 8, dtype=torch.bool), r"\(2, 2, 8\).*\(2, 16\) or \(2, 4, 4\)"),
        (torch.zeros(16, dtype=torch.bool), r"torch.bool \(16,\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_with_what_does(mask: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BeitForMaskedImageModeling(SHARED)(torch.zeros(2, 3, 32, 32), mask)


def test_a_model_without_mask_token_says_so() -> None:
    with pytest.raises(ValueError, match=r"no mask token.*config.for_pretraining\(\)"):
        BeitForImageClassification(SMALL)(images(1, 3, 32, 32), half_mask(1, 16))


def test_a_model_without_extra_blocks_says_so() -> None:
    with pytest.raises(ValueError, match="no extra blocks; set early_layer"):
        BeitForMaskedImageModeling(SHARED).forward_aggregated(images(1, 3, 32, 32), half_mask(1, 16))


@pytest.mark.parametrize("index", [4, -5, 100])
def test_a_layer_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"layer {index} does not exist.*layers 0 to 3"):
        Beit(SMALL).layers(images(1, 3, 32, 32), [0, index])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"embed_dim": 50}, "embed_dim 50 is not a multiple of num_heads 4"),
        ({"img_size": 230, "patch_size": 16}, "img_size 230 is not a multiple of.*use 224 or 240"),
        ({"img_size": (32, 36)}, "img_size 36 is not a multiple of patch_size 8; use 32 or 40"),
        ({"drop_path_rate": 1.0}, "drop_path 1.0 is not from 0 to below 1"),
        ({"early_layer": 4}, "early_layer 4 is not a block of depth 3"),
        ({"early_layer": 2, "head_layers": 0}, "head_layers 0 must be 1 or more; 2 are usual"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **wrong)


# --- Layers --------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_come_in_the_order_asked_for_and_later_blocks_are_not_run() -> None:
    model = randomise(Beit(SMALL))
    run: list[int] = []
    for number, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, number=number: run.append(number))
    x = images(2, 3, 32, 32)
    every = model.layers(x, [0, 1, 2, 3])
    assert run == [1, 2, 3]
    run.clear()
    some = model.layers(x, [2, 0, 2, -2])
    assert run == [1, 2]
    for state, index in zip(some, [2, 0, 2, 2], strict=True):
        assert torch.equal(state, every[index])
    run.clear()
    assert torch.equal(model.layers(x, [-4])[0], every[0])
    assert run == []
    assert torch.equal(model.layers(x, [-1])[0], every[3])


@torch.no_grad()
def test_layer_0_is_the_class_token_before_the_patches_and_norm_of_the_last_is_forward() -> None:
    model = randomise(Beit(SMALL))
    x = images(2, 3, 32, 40)
    first, last = model.layers(x, [0, -1])
    assert torch.equal(first[:, 0], model.cls_token[0].expand(2, -1))
    kernel, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    for y in range(4):
        for column in range(5):
            patch = x[:, :, 8 * y : 8 * y + 8, 8 * column : 8 * column + 8]
            projected = torch.einsum("bchw,dchw->bd", patch, kernel) + bias
            close(first[:, 1 + 5 * y + column], projected, 1e-5)
    assert torch.equal(model(x), model.norm(last))


# --- Stochastic depth ----------------------------------------------------------------------------


def test_drop_path_rates_rise_linearly_from_0() -> None:
    model = Beit(replace(SMALL, depth=5, drop_path_rate=0.2))
    assert [b.drop_path_rate for b in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert model.blocks[0].drop_path_rate == 0.0


def test_extra_blocks_of_v2_take_the_rates_after_their_layer() -> None:
    """As published: indices early, early + 1 of linspace(0, rate, max(depth, early + 2))."""
    config = replace(AGGREGATING, depth=5, drop_path_rate=0.4)
    rates = [b.drop_path_rate for b in BeitForMaskedImageModeling(config).cls_pt_layers]
    assert rates == pytest.approx([0.2, 0.3])
    config = replace(AGGREGATING, depth=3, early_layer=3, drop_path_rate=0.4)
    rates = [b.drop_path_rate for b in BeitForMaskedImageModeling(config).cls_pt_layers]
    assert rates == pytest.approx([0.3, 0.4])


@torch.no_grad()
def test_in_training_each_branch_of_each_sample_is_left_out_or_scaled_up() -> None:
    torch.manual_seed(0)
    block = randomise(beit.model.Block(replace(SMALL, rel_pos_bias="none"), 0.3)).double()
    x = images(200, 17, 48).double()

    def attention(x: Tensor) -> Tensor:
        return block.gamma_1 * block.attn(block.norm1(x), None)

    def mlp(x: Tensor) -> Tensor:
        return block.gamma_2 * block.mlp(block.norm2(x))

    outcomes = []
    for first in (0.0, 1 / 0.7):
        between = x + first * attention(x)
        outcomes += [between + second * mlp(between) for second in (0.0, 1 / 0.7)]
    close(block(x, None), x + attention(x) + mlp(x + attention(x)), 1e-12)  # evaluation mode
    difference = (block.train()(x, None) - torch.stack(outcomes)).abs().amax(dim=(2, 3))  # (4, 200)
    chosen = difference.argmin(dim=0)
    assert difference.amin(dim=0).max() < 1e-12
    assert difference.sort(dim=0).values[1].min() > 1e-3  # no two outcomes look alike
    # Both branches are drawn on their own: kept with 0.7 each.
    for outcome, share in enumerate([0.09, 0.21, 0.21, 0.49]):
        spread = math.sqrt(200 * share * (1 - share))
        assert abs(int((chosen == outcome).sum()) - 200 * share) < 5 * spread


def test_samples_are_left_out_as_often_as_the_rate_says() -> None:
    torch.manual_seed(0)
    block = beit.model.Block(SMALL, 0.1).train()
    x = torch.ones(20_000, 1, 1)
    kept = block.drop_path(x)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.9)}
    dropped = int((kept == 0).sum())
    assert abs(dropped - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)
    assert block.eval().drop_path(x) is x


def test_the_first_block_never_drops() -> None:
    block = Beit(replace(SMALL, drop_path_rate=0.9)).train().blocks[0]
    x = images(50, 17, 48)
    assert block.drop_path(x) is x


@torch.no_grad()
def test_in_evaluation_stochastic_depth_is_off() -> None:
    model = randomise(Beit(replace(SMALL, drop_path_rate=0.9)))
    plain = Beit(SMALL).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images(4, 3, 32, 32)), plain(images(4, 3, 32, 32)))


# --- Equal by other ways -------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, AGGREGATING])
def test_gradient_checkpointing_changes_no_gradient(config: BeitConfig) -> None:
    config = replace(config, drop_path_rate=0.3)
    x, mask = images(4, 3, 32, 32), half_mask(4, 16)

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)  # the same samples are left out
        if config.early_layer:
            model: Any = randomise(BeitForMaskedImageModeling(config)).train()
            model.gradient_checkpointing = checkpointing
            first, second = model.forward_aggregated(x, mask)
            (first.square().mean() + second.square().mean()).backward()
        else:
            model = randomise(BeitForImageClassification(config)).train()
            model.gradient_checkpointing = checkpointing
            model(x).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
        assert gradient.any(), name


def test_gradient_checkpointing_keeps_no_activations_of_a_block() -> None:
    def saved(checkpointing: bool) -> int:
        model = randomise(Beit(SMALL)).train()
        model.gradient_checkpointing = checkpointing
        elements = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images(8, 3, 32, 32))
        return elements

    assert saved(True) < saved(False) / 3


@pytest.mark.parametrize("kind", [Beit, BeitForImageClassification])
@torch.no_grad()
def test_padding_a_batch_changes_no_result(kind: type[Beit]) -> None:
    model = randomise(kind(SMALL)).double()
    x = images(5, 3, 32, 32).double()
    padded = torch.cat([x, torch.zeros(3, 3, 32, 32)])
    close(model(padded)[:5], model(x), 1e-12)
    close(model(x[2:3]), model(x)[2:3], 1e-12)


@torch.no_grad()
def test_a_mask_may_be_flat_or_a_grid() -> None:
    model = randomise(BeitForMaskedImageModeling(SHARED))
    x, mask = images(3, 3, 24, 40), half_mask(3, 15)
    assert torch.equal(model(x, mask), model(x, mask.view(3, 3, 5)))


@torch.no_grad()
def test_rows_of_masked_logits_go_image_by_image_and_row_by_row() -> None:
    model = randomise(BeitForMaskedImageModeling(SHARED))
    x, mask = images(3, 3, 32, 32), half_mask(3, 4, 4)
    tokens = Beit.forward(model, x, mask)
    rows = [
        model.lm_head(tokens[image, 1 + 4 * y + column])
        for image in range(3)
        for y in range(4)
        for column in range(4)
        if mask[image, y, column]
    ]
    close(model(x, mask), torch.stack(rows), 1e-6)


@torch.no_grad()
def test_what_lies_under_a_masked_patch_is_not_seen() -> None:
    model = randomise(BeitForMaskedImageModeling(SHARED))
    x, mask = images(2, 3, 32, 32), half_mask(2, 4, 4)
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    assert torch.equal(model(torch.where(hidden, 7.0, x), mask), model(x, mask))
    assert not torch.equal(model(torch.where(hidden, x, 7.0), mask), model(x, mask))


def test_no_masked_patch_gives_no_rows() -> None:
    model = randomise(BeitForMaskedImageModeling(SHARED))
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    assert model(images(2, 3, 32, 32), nothing).shape == (0, 32)


@torch.no_grad()
def test_pooling_takes_the_mean_of_the_patches_or_the_class_token() -> None:
    tokens = images(2, 17, 48)
    mean = randomise(BeitForImageClassification(SMALL))
    average = tokens[:, 1:].sum(dim=1) / 16
    expected = (average - average.mean(-1, keepdim=True)) / torch.sqrt(
        average.var(-1, keepdim=True, correction=0) + 1e-6
    )
    close(mean.pool(tokens), expected * mean.fc_norm.weight + mean.fc_norm.bias, 1e-6)
    assert isinstance(mean.norm, nn.Identity)
    by_class = randomise(BeitForImageClassification(replace(SMALL, pooling="cls")))
    assert torch.equal(by_class.pool(tokens), tokens[:, 0])
    assert not hasattr(by_class, "fc_norm")
    features = BeitForImageClassification(replace(SMALL, num_classes=0))
    assert features(images(2, 3, 32, 32)).shape == (2, 48)


# --- Compile and export --------------------------------------------------------------------------

SHALLOW = replace(SMALL, depth=2)


def model_and_inputs(kind: type[Beit], batch: int) -> tuple[Beit, tuple[Tensor, ...]]:
    masked = kind is BeitForMaskedImageModeling
    model = randomise(kind(SHALLOW.for_pretraining(32) if masked else SHALLOW))
    x = images(batch, 3, 32, 32)
    return model, (x, half_mask(batch, 16)) if masked else (x,)


every_kind = pytest.mark.parametrize(
    "kind", [Beit, BeitForImageClassification, BeitForMaskedImageModeling]
)


@every_kind
def test_compiled_model_is_one_graph_with_equal_results_and_gradients(kind: type[Beit]) -> None:
    torch._dynamo.reset()
    model, inputs = model_and_inputs(kind, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(*inputs)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, plain in zip(*results, strict=True):
        close(ours, plain, 1e-6)


@torch.no_grad()
def test_compiled_model_takes_other_sizes() -> None:
    torch._dynamo.reset()
    model, _ = model_and_inputs(BeitForImageClassification, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in [(48, 40), (40, 64), (32, 32)]:
        x = images(2, 3, *size)
        close(compiled(x), model(x), 1e-6)


@every_kind
def test_exported_model_takes_another_batch_size(kind: type[Beit]) -> None:
    model, inputs = model_and_inputs(kind, 2)
    batch = torch.export.Dim("batch", min=1, max=16)
    names = ("images", "bool_masked_pos")[: len(inputs)]
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes={n: {0: batch} for n in names})
        for size in (1, 5):
            _, others = model_and_inputs(kind, size)
            close(program.module()(*others), model(*others), 1e-6)


@pytest.mark.parametrize("early_layer", [0, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_block_at_the_masked_patches_is_all_of_it_and_a_choice(
    early_layer: int, checkpointing: bool
) -> None:
    """Logits, gradients and what stochastic depth draws are those of a last block run on every token."""
    config = BeitConfig(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, drop_path_rate=0.5
    )
    config = replace(config.for_pretraining(40), early_layer=early_layer)
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(config).double().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.gradient_checkpointing = checkpointing
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    mask = torch.rand(5, 16) < 0.4
    mask[2] = False  # a picture of which nothing is hidden

    def by_all() -> tuple[Tensor, ...]:
        if not early_layer:
            return (model.logits(Beit.forward(model, images, mask))[mask],)
        early, last = model.layers(images, [early_layer, config.depth], mask)
        (bias, *_) = model.relative_position_biases((4, 4))
        x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
        for block in model.cls_pt_layers:
            x = block(x, bias)
        return tuple(model.logits(model.norm(each))[mask] for each in (last, x))

    def by_some() -> tuple[Tensor, ...]:
        return model.forward_aggregated(images, mask) if early_layer else (model(images, mask),)

    found = []
    for compute in (by_all, by_some):
        torch.manual_seed(1)
        model.zero_grad()
        logits = compute()
        torch.stack([each.square().mean() for each in logits]).sum().backward()
        found.append(
            (logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (every, gradients), (some, our_gradients) = found
    for one, other in zip(every, some, strict=True):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=0)
    assert gradients.keys() == our_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-10, rtol=1e-8, msg=name)
