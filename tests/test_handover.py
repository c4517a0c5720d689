"""From one model's tensors to another's: against the original's loader, scipy's spline, closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_models import GOLDEN, PLAIN, SHARED, SMALL, TABLE, V2, build, pictures, randomise
from safetensors.torch import load_file

from beit.handover import LoadReport, hand_over, resize_patch_kernel, to_classifier
from beit.image import IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from beit.model import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit.relative_position import resize_bias_table

CLASSES = ["ant", "bee", "cat", "dog"]


@torch.no_grad()
def test_hand_over_to_another_size_is_that_of_the_original() -> None:
    """unilm's fine-tuning loader on a pre-trained 4 x 4 model, for an 8 x 8 grid."""
    with np.load(GOLDEN / "unilm-v1-load-pt-to-ft-64.npz") as file:
        expected = {key: file[key] for key in file.files}
    config = BeitConfig(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4)
    source = BeitForMaskedImageModeling(config.for_pretraining(32))
    source.load_state_dict(load_file(GOLDEN / "unilm-v1-pretrain-shared.safetensors"))
    model, report = to_classifier(source, list("abcdefg"), img_size=64)
    ours = model.eval().state_dict()
    for i in range(3):
        name = f"blocks.{i}.attn.{TABLE}"
        np.testing.assert_allclose(ours[name].numpy(), expected[f"result.{name}"], atol=1e-6)
    assert sorted(report.new) == sorted(expected["missing"].tolist())
    assert sorted(report.ignored) == sorted(expected["unexpected"].tolist())
    fresh = {name: torch.from_numpy(expected[f"result.{name}"]) for name in report.new}
    model.load_state_dict({**ours, **fresh})
    logits = model(torch.from_numpy(expected["input"]))
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-5)


def masked_source(config: BeitConfig = SHARED) -> Any:
    return randomise(BeitForMaskedImageModeling(config))


@pytest.mark.parametrize("config", [SHARED, V2])
def test_at_the_same_size_the_encoder_is_taken_as_it_is(config: BeitConfig) -> None:
    source = masked_source(config)
    model, report = to_classifier(source, CLASSES)
    theirs = source.state_dict()
    shared = theirs.pop(f"rel_pos_bias.{TABLE}")
    for name, tensor in model.state_dict().items():
        if name.endswith(TABLE):
            assert torch.equal(tensor, shared)
        elif name in report.new:
            assert name in ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert not report.resized
    extra = {name for name in theirs if name.startswith("cls_pt_layers.")}
    assert bool(extra) == (config is V2)
    assert set(report.ignored) == extra | {"mask_token", "norm.weight", "norm.bias", "lm_head.weight",
                                           "lm_head.bias"}  # fmt: skip
    assert model.config == replace(SMALL, vocab_size=40)


def test_the_shared_table_becomes_a_table_of_its_own_in_every_block() -> None:
    model, report = to_classifier(masked_source(), CLASSES)
    assert report.expanded == [f"rel_pos_bias.{TABLE}"]
    tables = [block.attn.relative_position_bias_table for block in model.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        tables[0].zero_()  # type: ignore[operator]
    assert tables[1].any()  # type: ignore[operator]
    assert tables[2].any()  # type: ignore[operator]


def test_the_source_is_left_as_it_was() -> None:
    source = masked_source()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model, _ = to_classifier(source, CLASSES, img_size=48)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def tuned_source() -> Any:
    model = build("classifier")
    model.id2label = dict(enumerate(CLASSES))
    return model


@torch.no_grad()
def test_same_classes_in_the_same_order_keep_the_head_and_the_answers() -> None:
    source = tuned_source()
    model, report = to_classifier(source, CLASSES)
    assert report.new == []
    assert report.ignored == {}
    assert torch.equal(model.eval()(pictures(SMALL)), source(pictures(SMALL)))


@torch.no_grad()
@pytest.mark.parametrize("classes", [["bee", "ant", "cat", "dog"], ["dog", "bee"]])
def test_known_classes_keep_their_rows_of_the_head_by_name(classes: list[str]) -> None:
    source = tuned_source()
    model, report = to_classifier(source, classes)
    rows = [CLASSES.index(name) for name in classes]
    assert report.new == []
    assert "matched head" in str(report)
    torch.testing.assert_close(model.eval()(pictures(SMALL)), source(pictures(SMALL))[:, rows])


def test_two_classes_of_one_name_are_not_told_apart() -> None:
    source = tuned_source()
    source.id2label = dict(enumerate(["crane", "bee", "crane", "dog"]))
    assert to_classifier(source, ["crane", "bee", "crane", "dog"])[1].new == []  # as they are
    assert set(to_classifier(source, ["bee", "crane"])[1].new) == {"head.weight", "head.bias"}
    assert to_classifier(source, ["dog", "bee"])[1].new == []


@pytest.mark.parametrize("classes", [["ant", "bee", "cat", "eel"], ["ant", "eel"], ["Ant", "bee"]])
def test_other_classes_begin_with_a_fresh_head(classes: list[str]) -> None:
    source = tuned_source()
    model, report = to_classifier(source, classes)
    assert set(report.new) == {"head.weight", "head.bias"}
    assert set(report.ignored) == {"head.weight", "head.bias"}
    assert "fc_norm.weight" in report.used
    assert model.head.weight.std() < 1e-3
    assert model.id2label == dict(enumerate(classes))


def test_another_size_resizes_every_table_and_keeps_a_head_of_the_same_classes() -> None:
    source = tuned_source()
    model, report = to_classifier(source, CLASSES, img_size=(40, 48))
    assert model.config.grid == (5, 6)
    assert report.resized == [f"blocks.{i}.attn.{TABLE}" for i in range(3)]
    for block, old in zip(model.blocks, source.blocks, strict=True):
        expected = resize_bias_table(old.attn.relative_position_bias_table, (4, 4), (5, 6))
        assert torch.equal(block.attn.relative_position_bias_table, expected)  # type: ignore[union-attr]
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.image_spec.size == (40, 48)


def test_absolute_positions_are_resized_too() -> None:
    source = randomise(BeitForMaskedImageModeling(PLAIN.for_pretraining(40)))
    model, report = to_classifier(source, CLASSES, img_size=48)
    assert report.resized == ["pos_embed"]
    assert model.pos_embed is not None
    assert model.pos_embed.shape == (1, 37, 24)
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])


def test_a_classifier_looks_at_pictures_as_its_source_did() -> None:
    source = masked_source()
    source.image_spec = ImageSpec((32, 32), "squash", "lanczos", 0.7, IMAGENET_MEAN, IMAGENET_STD)
    model, _ = to_classifier(source, CLASSES, drop_path_rate=0.2)
    assert model.image_spec == source.image_spec
    assert model.config.drop_path_rate == 0.2


def test_from_384_pixels_on_the_whole_picture_is_looked_at() -> None:
    """The original rule; a crop that was chosen stays."""
    source = masked_source(replace(SHARED, img_size=224, patch_size=32))
    assert source.image_spec.crop_ratio == 0.875
    assert to_classifier(source, CLASSES, img_size=256)[0].image_spec.crop_ratio == 0.875
    assert to_classifier(source, CLASSES, img_size=384)[0].image_spec.crop_ratio == 1.0
    source.image_spec = replace(source.image_spec, crop_ratio=0.8)
    assert to_classifier(source, CLASSES, img_size=384)[0].image_spec.crop_ratio == 0.8


def test_the_report_is_short_and_names_what_is_new() -> None:
    _, report = to_classifier(masked_source(), CLASSES, img_size=48)
    text = str(report)
    assert f"expanded rel_pos_bias.{TABLE}" in text
    assert f"resized blocks.*.attn.{TABLE}" in text
    assert "new fc_norm, head" in text
    assert "ignored" in text
    assert "mask_token" in text
    assert len(text) < 400
    assert str(LoadReport(used=["a", "b"])) == "used 2 tensors"


# --- Resizes -------------------------------------------------------------------------------------------


def spline_of_scipy(table: np.ndarray, source: int, target: tuple[int, int]) -> np.ndarray:
    """The published rule, worked out here: offsets spread by a geometric sequence, cubic spline,
    edges repeated; the class rows as they are. (2s-1)^2 + 3 rows -> (2h-1)(2w-1) + 3."""
    interpolate = pytest.importorskip("scipy.interpolate")

    def places(side: int) -> np.ndarray:
        if side == source:  # nothing to resize along this side
            return np.arange(1 - side, side)
        low, high = 1.01, 1.5
        while high - low > 1e-6:
            q = (low + high) / 2
            if sum(q**i for i in range(source - 1)) > side - 1:
                high = q
            else:
                low = q
        steps = np.cumsum([q**i for i in range(source - 1)])
        return np.concatenate([-steps[::-1], [0], steps])

    known = [places(side) for side in target]
    wanted = [np.arange(1 - s, s).clip(k[0], k[-1]) for s, k in zip(target, known, strict=True)]
    grids = table[:-3].reshape(2 * source - 1, 2 * source - 1, -1).astype(np.float64)
    heads = [
        interpolate.RectBivariateSpline(*known, grids[..., h])(*wanted).ravel()
        for h in range(grids.shape[-1])
    ]
    return np.concatenate([np.stack(heads, axis=1), table[-3:]])


@pytest.mark.parametrize("size", [384, (320, 448), (448, 320), (224, 288), 192])
def test_a_table_of_224_pixels_becomes_that_of_an_independent_cubic_spline(size: Any) -> None:
    config = BeitConfig(embed_dim=8, depth=1, num_heads=2, num_classes=3, mlp_ratio=1)
    source = randomise(BeitForImageClassification(config))
    source.id2label = dict(enumerate("abc"))
    model, report = to_classifier(source, list("abc"), img_size=size)
    assert report.resized == [f"blocks.0.attn.{TABLE}"]
    ours = model.state_dict()[f"blocks.0.attn.{TABLE}"].numpy()
    theirs = spline_of_scipy(
        source.state_dict()[f"blocks.0.attn.{TABLE}"].numpy(), 14, model.config.grid
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 12), (14, 16), (16, 32)])
def test_enlarged_patches_meet_an_enlarged_kernel_with_the_old_products(old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, old, old, generator=generator, dtype=torch.float64)
    patches = torch.randn(7, 3, old, old, generator=generator, dtype=torch.float64)
    enlarged = F.interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    products = torch.einsum("dcij,bcij->bd", resize_patch_kernel(kernel, new), enlarged)
    torch.testing.assert_close(products, torch.einsum("dcij,bcij->bd", kernel, patches))


def test_a_smaller_kernel_is_the_least_squares_answer() -> None:
    """No other kernel brings the products of shrunken patches nearer to the old ones."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(1, 1, 12, 12, generator=generator, dtype=torch.float64)
    basis = torch.eye(144, dtype=torch.float64).view(144, 1, 12, 12)
    shrunken = F.interpolate(basis, size=(8, 8), mode="bicubic", antialias=True).view(144, 64)
    wanted, *_ = np.linalg.lstsq(shrunken.numpy(), kernel.flatten().numpy(), rcond=None)
    np.testing.assert_allclose(resize_patch_kernel(kernel, 8).flatten().numpy(), wanted, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_positions_and_tables_are_resized_in_full(dtype: torch.dtype) -> None:
    source = randomise(BeitForImageClassification(replace(SMALL, use_abs_pos_emb=True))).to(dtype)
    larger = BeitForImageClassification(replace(SMALL, use_abs_pos_emb=True, img_size=48))
    half, _, _ = hand_over(source.state_dict(), source.config, larger)
    full, _, _ = hand_over(source.float().state_dict(), source.config, larger)
    for name in ("pos_embed", f"blocks.1.attn.{TABLE}"):
        assert half[name].dtype == dtype
        assert torch.equal(half[name], full[name].to(dtype)), name


def test_what_no_rule_knows_is_given_back_by_name() -> None:
    model = build("classifier")
    tensors = {**model.state_dict(), "blocks.0.attn.surprise": torch.zeros(1)}
    taken, report, unknown = hand_over(tensors, model.config, model)
    assert unknown == ["blocks.0.attn.surprise"]
    assert taken.keys() == model.state_dict().keys()
    assert report.new == []


def test_a_number_of_classes_is_not_their_names() -> None:
    with pytest.raises(ValueError, match=r"classes 3 are not their names.*num_classes=3"):
        to_classifier(build("encoder"), 3)  # type: ignore[arg-type]
