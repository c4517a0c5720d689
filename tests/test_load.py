"""Every format that a BEiT is published in: read by what it says, answering as its own code does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import (
    GOLDEN,
    MODELS,
    NAMES,
    PLAIN,
    SMALL,
    TABLE,
    build,
    pictures,
    randomise,
    same_tensors,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import beit
from beit import hub
from beit.checkpoints import load, load_model, save
from beit.export import export
from beit.image import IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from beit.model import Beit, BeitForImageClassification, BeitForMaskedImageModeling
from beit.relative_position import relative_position_index
from beit.tokenizer import DalleTokenizer, DiscreteVAE, DiscreteVAEConfig
from beit.tokenizer_files import load_tokenizer, save_tokenizer
from beit.unpickle import RefusedFile
from beit.vqkd import VQKD
from beit.weight_files import CheckpointError

Tensors = dict[str, Tensor]


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def logits_are_golden(model: Any, expected: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input"]).to(model.cls_token.dtype))
    np.testing.assert_allclose(logits.float().numpy(), expected["logits"], atol=atol)


def with_index(tensors: Tensors, grid: tuple[int, int] = (4, 4)) -> Tensors:
    """As unilm saves it: an int64 index beside each table."""
    index = relative_position_index(grid)
    tables = [name for name in tensors if name.endswith(TABLE)]
    return {**tensors, **{name.replace("bias_table", "index"): index.clone() for name in tables}}


@pytest.fixture(scope="module")
def finetuned() -> Tensors:
    """unilm's names, 4 x 4 patches of 8 pixels, 7 classes."""
    return load_file(GOLDEN / "unilm-v1-finetune-relbias.safetensors")


FINETUNED = golden("unilm-v1-finetune-relbias.npz")

# --- unilm's files -------------------------------------------------------------------------------------


@torch.no_grad()
def test_unilms_fine_tuned_file_gives_its_logits() -> None:
    model = load(GOLDEN / "unilm-v1-finetune-relbias.pth")
    assert isinstance(model, BeitForImageClassification)
    logits_are_golden(model, FINETUNED)
    x = torch.from_numpy(FINETUNED["input"]).double()
    np.testing.assert_allclose(model.double()(x).numpy(), FINETUNED["logits_f64"], atol=1e-10)
    assert not model.training
    assert model.provenance["layout"] == "unilm file"
    assert set(model.load_report.ignored) == {
        f"blocks.{i}.attn.relative_position_index" for i in range(3)
    }
    assert len(model.load_report.used) == 55
    assert model.load_report.new == model.load_report.resized == model.load_report.expanded == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["unilm-v1-pretrain-shared", "unilm-v1-pretrain-run"])
def test_unilms_pretrained_files_give_their_logits(name: str, tmp_path: Path) -> None:
    """The run's file holds its optimizer, its scaler and an argparse.Namespace beside the model."""
    file = GOLDEN / f"{name}.pth"
    if not file.exists():
        file = tmp_path / f"{name}.pth"
        torch.save({"model": with_index(load_file(GOLDEN / f"{name}.safetensors"))}, file)
    model, expected = load(file), golden(f"{name}.npz")
    assert isinstance(model, BeitForMaskedImageModeling)
    x, mask = torch.from_numpy(expected["input"]), torch.from_numpy(expected["bool_masked_pos"]).bool()
    np.testing.assert_allclose(model(x, mask).numpy(), expected["logits_masked"], atol=1e-5)
    every = model.logits(Beit.forward(model, x, mask))
    np.testing.assert_allclose(every.numpy(), expected["logits_all"], atol=1e-5)
    if name.endswith("run"):
        beside = {"optimizer", "epoch", "scaler", "args"}
        assert beside <= model.load_report.ignored.keys()
    else:
        every = model.double().logits(Beit.forward(model, x.double(), mask))
        np.testing.assert_allclose(every.numpy(), expected["logits_all_f64"], atol=1e-10)


@torch.no_grad()
def test_unilms_v2_file_gives_both_sets_of_logits(tmp_path: Path) -> None:
    file = tmp_path / "v2.pth"
    torch.save({"model": with_index(load_file(GOLDEN / "unilm-v2-pretrain-clspt.safetensors"))}, file)
    model, expected = load(file, early_layer=2), golden("unilm-v2-pretrain-clspt.npz")
    assert model.image_spec.mean == IMAGENET_MEAN
    x, mask = torch.from_numpy(expected["input"]), torch.from_numpy(expected["bool_masked_pos"]).bool()
    for part, logits in zip(("main", "cls"), model.forward_aggregated(x, mask), strict=True):
        np.testing.assert_allclose(logits.numpy(), expected[f"logits_masked_{part}"], atol=1e-5)
    model.double()
    main, _ = model.forward_aggregated(x.double(), torch.ones_like(mask) & mask)
    rows = expected["logits_all_f64_main"][mask.numpy()]
    np.testing.assert_allclose(main.numpy(), rows, atol=1e-10)
    assert load(file, early_layer=1).config.early_layer == 1


@torch.no_grad()
def test_a_pretrained_file_at_another_size_and_task_is_what_the_original_loader_makes(
    tmp_path: Path,
) -> None:
    expected, file = golden("unilm-v1-load-pt-to-ft-64.npz"), tmp_path / "pt.pth"
    torch.save({"model": with_index(load_file(GOLDEN / "unilm-v1-pretrain-shared.safetensors"))}, file)
    model = load(file, img_size=64, num_classes=7)
    report, ours = model.load_report, model.state_dict()
    assert sorted(report.new) == sorted(expected["missing"])
    dropped = {name for name in report.ignored if "relative_position_index" not in name}
    assert dropped == set(expected["unexpected"])
    assert report.expanded == [f"rel_pos_bias.{TABLE}"]
    assert report.resized == [f"blocks.{i}.attn.{TABLE}" for i in range(3)]
    source = load_file(GOLDEN / "unilm-v1-pretrain-shared.safetensors")
    for name in ours.keys() - report.new:  # what the original changed, then what it only took
        if f"result.{name}" in expected:
            np.testing.assert_allclose(ours[name], expected[f"result.{name}"], atol=1e-6, err_msg=name)
        else:
            assert torch.equal(ours[name], source[name]), name
    fresh = {name: torch.from_numpy(expected[f"result.{name}"]) for name in report.new}
    model.load_state_dict({**ours, **fresh})
    logits_are_golden(model, expected)
    logits = model.double()(torch.from_numpy(expected["input"]).double())
    np.testing.assert_allclose(logits.numpy(), expected["logits_f64"], atol=1e-5)
    assert model.image_spec.size == (64, 64)


CONTAINERS: dict[str, Callable[[Tensors], Any]] = {
    "bare": lambda t: t,
    "bare with indices": with_index,
    "model": lambda t: {"model": t},
    "module, as DeepSpeed writes it": lambda t: {"module": with_index(t), "mp_world_size": 1},
    "state_dict": lambda t: {"state_dict": t, "meta": {"CLASSES": ["wall"]}},
    "from DistributedDataParallel": lambda t: {"model": {f"module.{k}": v for k, v in t.items()}},
    "beside an average": lambda t: {
        "model": t,
        "model_ema": {k: v + 1 for k, v in t.items()},
        "args": argparse.Namespace(lr=1e-3),
        "epoch": 3,
    },
    "as timm's features_only": lambda t: {f"model.{k}": v for k, v in t.items()},
    "as transformers' wrapper of timm": lambda t: {f"timm_model.{k}": v for k, v in t.items()},
    "with a segmentation head": lambda t: {
        "state_dict": {
            **{f"backbone.{k}": v for k, v in with_index(t).items()},
            "backbone.fpn1.0.weight": torch.zeros(48, 48, 2, 2),
            "backbone.fpn1.1.num_batches_tracked": torch.zeros((), dtype=torch.int64),
            "decode_head.conv_seg.weight": torch.zeros(150, 48, 1, 1),
            "auxiliary_head.convs.0.bn.running_mean": torch.zeros(48),
        }
    },
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy stream"])
def test_weights_are_found_in_every_container(
    container: str, legacy: bool, finetuned: Tensors, tmp_path: Path
) -> None:
    file = tmp_path / "model.pth"
    content = CONTAINERS[container](finetuned)
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    model = load(file)
    logits_are_golden(model, FINETUNED)
    assert len(model.load_report.used) == 55
    if "segmentation" in container:
        ignored = model.load_report.ignored
        assert ignored["decode_head.conv_seg.weight"] == "a segmentation head"
        assert "fpn1.0.weight" in ignored
    if container == "beside an average":
        assert model.load_report.ignored["model_ema"] == "the state of a training run"


def test_a_file_of_safetensors_is_read_too(finetuned: Tensors, tmp_path: Path) -> None:
    save_file(finetuned, tmp_path / "any name.bin")
    logits_are_golden(load(tmp_path / "any name.bin"), FINETUNED)


def test_damaged_index_buffers_of_an_average_change_nothing(finetuned: Tensors, tmp_path: Path) -> None:
    """The old averaging truncates the integers: some are one too small (golden data, note 1)."""
    damaged = with_index(finetuned)
    for name in damaged:
        if name.endswith("index"):
            damaged[name] = damaged[name] - 1
    torch.save({"model": damaged}, tmp_path / "ema.pth")
    logits_are_golden(load(tmp_path / "ema.pth"), FINETUNED)


# --- What the tensors say, for every published list of names ---------------------------------------------

BASE = {"img_size": 224, "embed_dim": 768, "depth": 12, "num_heads": 12, "rel_pos_bias": "per_block"}
LARGE = {**BASE, "embed_dim": 1024, "depth": 24, "num_heads": 16}
C, M = BeitForImageClassification, BeitForMaskedImageModeling
# name: (class, what the config says, parameters, entries of the file). Counts with a published total
# are that total; a backbone's are counted without its norm and its segmentation head.
PUBLISHED: dict[str, tuple[type[Beit], dict[str, Any], int, int]] = {
    "unilm-beit_base_patch16_224": (C, {**BASE, "num_classes": 1000}, 86_530_984, 211),
    "unilm-beit_base_patch16_224_8k_vocab": (M, {**BASE, "rel_pos_bias": "shared"}, 91_965_776, 190),
    "unilm-upernet_beit_base_640_ade20k": (C, {**BASE, "img_size": 640}, 86_554_176, 300),
    "timm-beit_base_patch16_224": (C, {**BASE, "num_classes": 1000}, 86_530_984, 199),
    "timm-beit_large_patch16_512": (C, {**LARGE, "img_size": 512}, 305_674_728, 391),
    "timm-beitv2_large_patch16_224": (C, LARGE, 304_430_568, 391),
    "timm-beit_base_patch16_224-abspos": (C, {**BASE, "use_abs_pos_emb": True}, 86_682_280, 200),
    "timm-beit_base_patch16_224-tokenpool": (C, {**BASE, "pooling": "cls"}, 86_530_984, 199),
    "timm-beit_base_patch16_224-shared-relpos": (C, {**BASE, "rel_pos_bias": "shared"}, 86_434_360, 188),
    "timm-beit_base_patch16_224-nohead": (C, {**BASE, "num_classes": 0}, 85_761_984, 197),
    "timm-beit_base_patch16_224-features_only": (C, {**BASE, "num_classes": 0}, 85_760_448, 195),
    "hf-beit-base-patch16-224.file": (C, {**BASE, "num_classes": 1000}, 86_530_984, 223),
    "hf-beit-base-patch16-224.module": (C, {**BASE, "num_classes": 1000}, 86_530_984, 223),
    "hf-beit-base-patch16-384.file": (C, {**BASE, "img_size": 384}, 86_744_104, 223),
    "hf-beit-large-patch16-512.file": (C, {**LARGE, "img_size": 512}, 305_674_728, 439),
    "hf-beit-base-patch16-224-pt22k.file": (M, {**BASE, "rel_pos_bias": "shared"}, 91_965_776, 213),
    "hf-beit-base-patch16-224-pt22k.module": (M, {**BASE, "rel_pos_bias": "shared"}, 91_965_776, 213),
    "hf-beit-large-patch16-224-pt22k.module": (M, {**LARGE, "rel_pos_bias": "shared"}, 311_534_016, 417),
    "hf-beit-base-patch16-224-pt22k-ft22k.file": (C, {**BASE, "num_classes": 21841}, 102_557_713, 223),
    "hf-beit-base-finetuned-ade-640-640.file": (C, {**BASE, "img_size": 640}, 86_554_176, 312),
    "hf-beit-base-finetuned-ade-640-640.module": (C, {**BASE, "img_size": 640}, 86_554_176, 312),
    "hf-BeitModel-base-224.file": (C, {**BASE, "num_classes": 0}, 85_761_984, 221),
    "hf-BeitModel-base-224-clspool.module": (Beit, BASE, 85_761_984, 221),
    "hf-BeitBackbone-base-fpn.file": (C, {**BASE, "num_classes": 0}, 85_760_448, 230),
    "hf-BeitBackbone-base-fpn.module": (C, {**BASE, "num_classes": 0}, 85_760_448, 230),
    "hf-data2vec-vision-base": (C, {**BASE, "num_classes": 2}, 85_763_522, 223),
}


def published(name: str) -> Tensors:
    """Tensors without content, of the names and shapes of a published file."""
    lists = json.loads((GOLDEN / "published-names.json").read_text())[name]
    integers = ("relative_position_index", "num_batches_tracked")
    return {
        row.replace("{i}", str(i)): torch.empty(
            shape, dtype=torch.int64 if row.endswith(integers) else torch.float32, device="meta"
        )
        for row, shape in lists["shapes"].items()
        for i in (range(lists["depth"]) if "{i}" in row else [0])
    }


@pytest.fixture
def load_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Load tensors without content as if they had been in a file."""

    def call(tensors: Tensors, **options: Any) -> Any:
        monkeypatch.setattr("beit.weight_files.read_weights", lambda _: tensors)
        (tmp_path / "file.pth").touch()
        return load_model(tmp_path / "file.pth", **options)

    return call


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_say_what_the_model_is(
    name: str, load_names: Callable[..., Any]
) -> None:
    kind, says, parameters, entries = PUBLISHED[name]
    tensors = published(name)
    assert len(tensors) == entries
    model = load_names(tensors)
    assert type(model) is kind
    for field, value in says.items():
        assert getattr(model.config, field) == value, field
    assert model.config.layer_norm_eps == (1e-12 if name.startswith("hf-") else 1e-6)
    new = [p.numel() for n, p in model.named_parameters() if n in model.load_report.new]
    assert sum(p.numel() for p in model.parameters()) - sum(new) == parameters
    backbone = not {"fc_norm.weight", "norm.weight"} & set(model.load_report.used)
    assert set(model.load_report.new) == ({"fc_norm.weight", "fc_norm.bias"} if backbone else set())


def test_the_list_of_published_names_is_all_tested() -> None:
    lists = set(json.loads((GOLDEN / "published-names.json").read_text()))
    assert lists - PUBLISHED.keys() == {"timm-beit3_base_patch16_224"}


def test_v2s_pretrained_file_has_two_blocks_more(load_names: Callable[..., Any]) -> None:
    tensors = published("unilm-beit_base_patch16_224_8k_vocab")
    extra = {n: t for n, t in tensors.items() if re.match(r"blocks\.[01]\.", n)}
    tensors |= {n.replace("blocks", "cls_pt_layers", 1): t for n, t in extra.items()}
    assert len(tensors) == 220
    model = load_names(tensors)
    assert (model.config.early_layer, model.config.head_layers) == (9, 2)
    assert sum(p.numel() for p in model.parameters()) == 106_143_056
    assert "early_layer 9 of 12; early_layer= sets it" in model.load_report.assumed


def test_the_plain_vit_of_the_paper_is_told_by_its_positions(load_names: Callable[..., Any]) -> None:
    tensors = published("unilm-beit_base_patch16_224_8k_vocab")
    tensors = {n: t for n, t in tensors.items() if "gamma" not in n and "rel_pos_bias" not in n}
    tensors["pos_embed"] = torch.empty(1, 197, 768, device="meta")
    model = load_names(tensors)
    assert (model.config.rel_pos_bias, model.config.use_abs_pos_emb) == ("none", True)
    assert model.config.init_values == 0
    assert sum(p.numel() for p in model.parameters()) == 92_089_856
    assert "num_heads 12: 64 wide each; num_heads= sets it" in model.load_report.assumed
    assert load_names(tensors, num_heads=8).config.num_heads == 8


def test_a_released_classifier_predicts_words(load_names: Callable[..., Any]) -> None:
    model = load_names(published("unilm-beit_base_patch16_224"))
    assert model.id2label[281].startswith("tabby")
    assert len(model.id2label) == 1000


# --- timm ------------------------------------------------------------------------------------------------

TIMM = GOLDEN / "timm-beit-relbias"


@torch.no_grad()
def test_timms_folder_gives_its_logits() -> None:
    model, expected = load(TIMM), golden("timm-beit-relbias/expected.npz")
    logits_are_golden(model, expected)
    x = torch.from_numpy(expected["input"])
    np.testing.assert_allclose(model.double()(x.double()), expected["logits_f64"], atol=1e-10)
    assert model.image_spec == ImageSpec((32, 32), crop_ratio=0.9)
    assert model.config.layer_norm_eps == 1e-6
    assert model.provenance["layout"] == "timm folder"


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    shutil.copytree(TIMM, tmp_path / "timm", ignore=shutil.ignore_patterns("*.npz"))
    return tmp_path / "timm"


def change(folder: Path, file: str = "config.json", **values: Any) -> dict[str, Any]:
    content = json.loads((folder / file).read_text())
    content = {k: v for k, v in {**content, **values}.items() if v is not ...}
    (folder / file).write_text(json.dumps(content))
    return content


def test_timms_older_config_of_one_level_is_read(timm_folder: Path) -> None:
    content = change(timm_folder)
    flat = {
        **content["pretrained_cfg"],
        "architecture": content["architecture"],
        "mean": [0.1, 0.2, 0.3],
    }
    (timm_folder / "config.json").write_text(json.dumps(flat))
    assert load(timm_folder).image_spec.mean == (0.1, 0.2, 0.3)


def test_transformers_wrapper_of_timm_is_read(timm_folder: Path) -> None:
    tensors = load_file(timm_folder / "model.safetensors")
    save_file({f"timm_model.{k}": t for k, t in tensors.items()}, timm_folder / "model.safetensors")
    change(timm_folder, model_type="timm_wrapper", label_names=list("abcdefg"))
    model = load(timm_folder)
    logits_are_golden(model, golden("timm-beit-relbias/expected.npz"))
    assert model.id2label == dict(enumerate("abcdefg"))


def test_timms_class_descriptions_are_words(timm_folder: Path) -> None:
    change(timm_folder, label_names=[f"n{i}" for i in range(7)], label_descriptions={"n1": "cat"})
    assert load(timm_folder).id2label[1] == "cat"
    assert load(timm_folder).id2label[2] == "n2"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_classes": 5}, "num_classes 5, its tensors 7"),
        ({"model_args": {"depth": 12}}, "depth 12, its tensors 3"),
        ({"model_args": {"global_pool": "token"}}, "global_pool is 'token' and it has fc_norm"),
        ({"model_args": {"global_pool": "max"}}, "global_pool is 'max'"),
        ({"label_names": ["cat", "dog"]}, "names 2 classes, its head has 7"),
        ({"architecture": "swin_base_patch4"}, "timm's swin_base_patch4, not a BEiT or a plain ViT"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode 'border' is not center or squash"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "must be above 0"),
    ],
)
def test_a_timm_config_that_contradicts_its_tensors_is_refused(
    values: dict[str, Any], words: str, timm_folder: Path
) -> None:
    change(timm_folder, **values)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load(timm_folder)


def test_timms_rectangle_is_taken_at_its_word(tmp_path: Path) -> None:
    """2 x 14 patches have as many table rows as 5 x 5, and 4 x 9 as many positions as 6 x 6."""
    for config in (
        replace(SMALL, img_size=(16, 112)),
        replace(PLAIN, img_size=(32, 72)),
    ):
        save(randomise(BeitForImageClassification(config)), tmp_path, to="timm")
        assert load(tmp_path).config.img_size == config.img_size


# --- transformers ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf418-beit-cls-meanpool-relbias", "hf-beit-mim-sharedbias"])
def test_transformers_folders_old_and_new_give_their_logits(name: str) -> None:
    """Version 4.18 with index buffers in a .bin; version 5.23 in safetensors."""
    model, expected = load(GOLDEN / name), golden(f"{name}/expected.npz")
    assert model.config.layer_norm_eps == 1e-12
    if "logits" in expected:
        logits_are_golden(model, expected)
        assert model.id2label == {i: f"LABEL_{i}" for i in range(7)}
        assert len(model.load_report.ignored) == 3
        return
    x, mask = torch.from_numpy(expected["input"]), torch.from_numpy(expected["bool_masked_pos"]).bool()
    np.testing.assert_allclose(model(x, mask).numpy(), expected["logits_masked"], atol=1e-5)
    every = model.double().logits(Beit.forward(model, x.double(), mask))
    # Its softmax is float32 in any case; an epsilon of 1e-6 would be 6.6e-6 off.
    np.testing.assert_allclose(every.numpy(), expected["logits_all_f64"], atol=5e-7)


TINY = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 40, "out_indices": [1, 2, 3],
}  # fmt: skip


def theirs(kind: str, **settings: Any) -> Any:
    """One of transformers' models, random."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config_class = "Data2VecVisionConfig" if kind.startswith("Data2Vec") else "BeitConfig"
    config = getattr(transformers, config_class)(**{**TINY, **settings})
    return randomise(getattr(transformers, kind)(config))


# kind: settings -> what our answer is compared with.
THEIRS: dict[str, tuple[str, dict[str, Any], Callable[[Any], Tensor]]] = {
    "classifier": ("BeitForImageClassification", {"use_relative_position_bias": True, "num_labels": 5},
                   lambda o: o.logits),
    "two unnamed classes": ("BeitForImageClassification", {"num_labels": 2}, lambda o: o.logits),
    "one class": ("BeitForImageClassification", {"num_labels": 1}, lambda o: o.logits),
    "absolute positions, class token": (
        "BeitForImageClassification",
        {"use_absolute_position_embeddings": True, "use_mean_pooling": False, "num_labels": 3,
         "layer_scale_init_value": 0.0},
        lambda o: o.logits,
    ),
    "data2vec-vision": ("Data2VecVisionForImageClassification",
                        {"use_relative_position_bias": True, "num_labels": 5}, lambda o: o.logits),
    "bare with a pooler": ("BeitModel", {"use_relative_position_bias": True},
                           lambda o: o.pooler_output),
    "bare without a pooler": ("BeitModel", {"use_relative_position_bias": True,
                                            "use_mean_pooling": False}, lambda o: o.last_hidden_state),
    "masked": ("BeitForMaskedImageModeling",
               {"use_shared_relative_position_bias": True, "use_mask_token": True}, lambda o: o.logits),
    "masked, absolute positions": (
        "BeitForMaskedImageModeling",
        {"use_absolute_position_embeddings": True, "use_mask_token": True}, lambda o: o.logits,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", THEIRS)
def test_models_of_transformers_answer_alike_here(kind: str, tmp_path: Path) -> None:
    name, settings, answer = THEIRS[kind]
    model = theirs(name, **settings)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    x = pictures(SMALL)
    torch.testing.assert_close(ours(x), answer(model(x)), atol=1e-5, rtol=0)
    assert ours.load_report.new == []
    assert len(ours.id2label) == settings.get("num_labels", 0)


def as_shards(folder: Path, tensors: Tensors, suffix: str) -> None:
    """Three files and the index that says what is where."""
    stem, names = (
        ("model", sorted(tensors)) if suffix == "safetensors" else ("pytorch_model", [*tensors])
    )
    weight_map = {}
    for number in range(3):
        part = {name: tensors[name].contiguous() for name in names[number::3]}
        file = f"{stem}-0000{number + 1}-of-00003.{suffix}"
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def as_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


WAYS: dict[str, Callable[[Path, Tensors], None]] = {
    "one .bin": as_bin,
    "shards of safetensors": lambda folder, tensors: as_shards(folder, tensors, "safetensors"),
    "shards of .bin": lambda folder, tensors: as_shards(folder, tensors, "bin"),
    "one safetensors": lambda folder, tensors: save_file(tensors, folder / "model.safetensors"),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", ["on disk", "of version 5's modules"])
def test_every_way_a_transformers_folder_keeps_its_weights(way: str, names: str, tmp_path: Path) -> None:
    model = theirs("BeitForImageClassification", use_relative_position_bias=True, num_labels=5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if names != "on disk":
        on_disk, tensors = tensors.keys(), model.state_dict()
        assert on_disk != tensors.keys()
    WAYS[way](tmp_path, tensors)
    x = pictures(SMALL)
    torch.testing.assert_close(load(tmp_path)(x), model(x).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BeitForSemanticSegmentation", "BeitBackbone"])
def test_the_encoder_of_a_segmentation_model_is_read_and_the_rest_named(
    kind: str, tmp_path: Path
) -> None:
    model = theirs(
        kind, use_relative_position_bias=True, num_hidden_layers=4, out_indices=[1, 2, 3, 4],
        add_fpn=True, num_labels=6, pool_scales=[1, 2],
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    ours, x = load(tmp_path), pictures(SMALL)
    assert (ours.config.num_classes, ours.id2label) == (0, {})
    assert set(ours.load_report.new) == {"fc_norm.weight", "fc_norm.bias"}
    assert set(ours.load_report.ignored.values()) == {"a segmentation head"}
    encoder = model.beit if kind.startswith("BeitFor") else model
    states = encoder(x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours.layers(x, [4])[0], states[-1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_bare_data2vec_encoder_is_read(tmp_path: Path) -> None:
    model = theirs("Data2VecVisionModel", use_shared_relative_position_bias=True)
    model.save_pretrained(tmp_path)
    ours, x = load(tmp_path), pictures(SMALL)
    assert ours.config.rel_pos_bias == "shared"
    states = model(x).last_hidden_state
    torch.testing.assert_close(ours.layers(x, [3])[0], states, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_weight_file_of_transformers_alone_is_enough(tmp_path: Path) -> None:
    model = theirs("BeitForImageClassification", use_relative_position_bias=True, num_labels=5)
    model.save_pretrained(tmp_path)
    ours, x = load(tmp_path / "model.safetensors"), pictures(SMALL)
    torch.testing.assert_close(ours(x), model(x).logits, atol=1e-5, rtol=0)
    assert (ours.image_spec.resize, ours.image_spec.filter) == ("squash", "bilinear")


def test_class_names_with_gaps_are_renumbered_by_key_and_it_is_said(tmp_path: Path) -> None:
    """As the 22k folders have them, whose two classes were deleted from the list."""
    save(build("classifier"), tmp_path)
    change(tmp_path, id2label={"10": "d", "0": "a", "2": "b", "9": "c"})
    model = load(tmp_path)
    assert model.id2label == dict(enumerate("abcd"))
    assert any("gaps up to 10" in line for line in model.load_report.assumed)


def test_class_names_in_the_order_of_words_are_put_in_the_order_of_numbers(tmp_path: Path) -> None:
    model = randomise(BeitForImageClassification(replace(SMALL, num_classes=12)))
    model.id2label = {i: f"class {i}" for i in range(12)}
    save(model, tmp_path)
    change(tmp_path, id2label={str(i): f"class {i}" for i in sorted(range(12), key=str)})
    back = load(tmp_path)
    assert list(back.id2label.items()) == list(model.id2label.items())
    assert not any("gaps" in line for line in back.load_report.assumed)


# --- preprocessor_config.json ----------------------------------------------------------------------------

PROCESSORS: dict[str, tuple[dict[str, Any], ImageSpec]] = {
    "published": (
        {"feature_extractor_type": "BeitFeatureExtractor", "do_resize": True, "do_center_crop": False,
         "crop_size": 224, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
         "resample": 2, "size": 224},
        ImageSpec((224, 224), "squash", "bilinear", 1.0),
    ),
    "saved again by version 5": (
        {"do_resize": True, "do_center_crop": False, "crop_size": {"height": 224, "width": 224},
         "do_rescale": True, "rescale_factor": 0.00392156862745098, "resample": 3,
         "size": {"height": 384, "width": 384}, "image_mean": list(IMAGENET_MEAN),
         "image_std": list(IMAGENET_STD), "do_reduce_labels": False},
        ImageSpec((384, 384), "squash", "bicubic", 1.0, IMAGENET_MEAN, IMAGENET_STD),
    ),
    "short side and crop": (
        {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3},
        ImageSpec((224, 224), "short_side", "bicubic", 0.875),
    ),
    "not normalised": (
        {"size": 224, "do_normalize": False, "resample": 1},
        ImageSpec((224, 224), "squash", "lanczos", 1.0, (0.0,) * 3, (1.0,) * 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_preprocessor_config_says_how_pictures_are_prepared(name: str, tmp_path: Path) -> None:
    content, spec = PROCESSORS[name]
    save(build("classifier"), tmp_path)
    change(tmp_path, beit=...)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert load(tmp_path).image_spec == spec


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resample": 0}, "Pillow's filter 0; known are"),
        ({"do_resize": False}, "does not resize"),
        ({"rescale_factor": 1.0}, "rescales by 1.0, not by 1/255"),
        ({"do_center_crop": False, "size": {"shortest_edge": 256}}, "gives no fixed size"),
        ({"do_center_crop": True, "size": 256, "crop_size": 224}, "and then cuts"),
        ({"image_mean": [0.5, 0.5]}, "is not three numbers"),
        ({"image_std": [0.5, 0.5, 0.0]}, "must be above 0"),
    ],
)
def test_a_preparation_without_an_equal_here_is_refused(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save(build("classifier"), tmp_path)
    change(tmp_path, beit=...)
    content, _ = PROCESSORS["published"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, **values}))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load(tmp_path)


SPECS = [
    ImageSpec((224, 224), crop_ratio=0.875), ImageSpec((224, 224), crop_ratio=0.9),
    ImageSpec((224, 224), crop_ratio=0.95), ImageSpec((384, 384), crop_ratio=1.0),
    ImageSpec((224, 320), crop_ratio=0.875), ImageSpec((384, 384), "squash", "bilinear", 1.0),
    ImageSpec((32, 32), crop_ratio=0.77, mean=IMAGENET_MEAN, std=IMAGENET_STD),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_preparation_survives_in_transformers_words_alone(spec: ImageSpec, tmp_path: Path) -> None:
    """Without our key: the same pictures come out, whatever the ratio is called."""
    from beit.image import preprocess

    model = build("classifier")
    model.image_spec = spec
    save(model, tmp_path)
    change(tmp_path, beit=...)
    back = load(tmp_path).image_spec
    picture = np.random.default_rng(0).integers(0, 256, (301, 411, 3), dtype=np.uint8)
    np.testing.assert_array_equal(preprocess(picture, back), preprocess(picture, spec))


def test_a_preparation_for_another_size_is_told_and_not_exported(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path)
    change(tmp_path, beit=...)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": 48, "do_center_crop": False}))
    back = load(tmp_path)
    assert "pictures of 48 x 48, as they are prepared, where the model's own are 32 x 32" in (
        back.load_report.assumed
    )
    with pytest.raises(
        ValueError, match=r"prepared at 48 x 48 and the model is of 32 x 32; .*--img-size"
    ):
        export(back, tmp_path / "a.onnx", "onnx")
    export(load(tmp_path, img_size=48), tmp_path / "a.onnx", "onnx")


def test_a_rectangle_that_transformers_fills_up_is_told(tmp_path: Path) -> None:
    save(build("rectangle"), tmp_path)
    change(tmp_path, beit=...)
    assert any("transformers fills up with black" in told for told in load(tmp_path).load_report.assumed)


@pytest.mark.parametrize("spec", [SPECS[i] for i in (0, 1, 3, 5, 6)])
def test_transformers_prepares_a_picture_as_we_do(spec: ImageSpec, tmp_path: Path) -> None:
    """Where no odd margin is cut, whose half pixel it rounds down, and no rectangle."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from beit.image import preprocess

    model = build("classifier")
    model.image_spec = spec
    save(model, tmp_path)
    processor = transformers.BeitImageProcessorPil.from_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    pixels = processor(picture, return_tensors="np", input_data_format="channels_last").pixel_values[0]
    np.testing.assert_allclose(pixels, preprocess(picture, spec), atol=1e-6)


# --- Round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["classifier", "plain classifier", "shared-bias classifier", "encoder", "rectangle",
             "classifier from the class token", "class token without classes"]
)  # fmt: skip
@torch.no_grad()
def test_round_the_three_formats_every_tensor_comes_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.image_spec = replace(model.image_spec, crop_ratio=0.9, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    known = {"num_heads": 3, "img_size": model.config.img_size}  # what unilm's file cannot say
    save(model, tmp_path / "a")
    there = load(tmp_path / "a")
    save(there, tmp_path / "b", to="timm")
    there = load(tmp_path / "b")
    assert (there.image_spec, there.id2label) == (model.image_spec, model.id2label)
    save(there, tmp_path / "c.pth", to="unilm")
    there = load(tmp_path / "c.pth", **known, image_spec=model.image_spec)
    if name != "class token without classes":  # nothing in unilm's file tells it from an encoder
        there.id2label = model.id2label
        save(there, tmp_path / "d")
        there = load(tmp_path / "d")
        assert type(there) is type(model)
        assert (there.config, there.image_spec) == (model.config, model.image_spec)
        if model.config.num_classes:
            assert there.id2label == model.id2label
    same_tensors(model, there)


@pytest.mark.parametrize("name", ["masked model", "plain masked model", "v2 masked model"])
def test_a_masked_model_goes_through_unilm_and_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    save(model, tmp_path / "a.pth", to="unilm")
    same_tensors(model, load(tmp_path / "a.pth", num_heads=3))


def test_unilms_file_has_the_entries_its_strict_loading_asks_for(tmp_path: Path) -> None:
    for name in ("unilm-v1-finetune-relbias", "unilm-v1-pretrain-run"):
        given = torch.load(GOLDEN / f"{name}.pth", weights_only=False)["model"]
        save(load(GOLDEN / f"{name}.pth"), tmp_path / "out.pth", to="unilm")
        written = torch.load(tmp_path / "out.pth")["model"]
        assert written.keys() == given.keys()
        for key, tensor in given.items():
            assert torch.equal(written[key], tensor), key
            assert written[key].dtype == tensor.dtype


def test_timm_is_not_given_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no masked-image head; give num_classes=0"):
        save(build("masked model"), tmp_path, to="timm")
    save(build("encoder of a masked model"), tmp_path, to="timm")
    assert "mask_token" not in load_file(tmp_path / "model.safetensors")


def test_timms_own_config_is_written_as_timm_writes_it(tmp_path: Path) -> None:
    save(load(TIMM), tmp_path, to="timm")
    ours, given = change(tmp_path), change_nothing(TIMM)
    assert ours["architecture"] == given["architecture"]
    for key in ("num_classes", "num_features", "global_pool"):
        assert ours[key] == given[key]
    for key, value in given["model_args"].items():
        assert ours["model_args"][key] == value, key
    for key in ours["pretrained_cfg"]:
        assert ours["pretrained_cfg"][key] == given["pretrained_cfg"][key], key
    assert (
        load_file(tmp_path / "model.safetensors").keys() == load_file(TIMM / "model.safetensors").keys()
    )


def change_nothing(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# --- What can be asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_files_number_format_is_kept_unless_another_is_asked_for(
    dtype: torch.dtype, finetuned: Tensors, tmp_path: Path
) -> None:
    torch.save({"model": {k: t.to(dtype) for k, t in finetuned.items()}}, tmp_path / "a.pth")
    assert {p.dtype for p in load(tmp_path / "a.pth").parameters()} == {dtype}
    asked = load(tmp_path / "a.pth", dtype=torch.float32)
    assert {p.dtype for p in asked.parameters()} == {torch.float32}
    logits_are_golden(asked, FINETUNED, atol=0.05)


def test_a_new_head_has_the_files_number_format(finetuned: Tensors, tmp_path: Path) -> None:
    torch.save({"model": {k: t.half() for k, t in finetuned.items()}}, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", num_classes=3)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.float16)).shape == (1, 3)


def test_a_file_of_two_number_formats_is_read_in_the_wider(finetuned: Tensors, tmp_path: Path) -> None:
    mixed = {k: t.half() if "mlp" in k else t for k, t in finetuned.items()}
    torch.save(mixed, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits_are_golden(model, FINETUNED, atol=0.05)


def test_a_new_head_drops_the_old_one_and_its_names_and_says_so(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path)
    model = load(tmp_path, num_classes=9)
    assert model.config.num_classes == 9
    assert model.id2label == {}
    assert set(model.load_report.new) == {"head.weight", "head.bias"}
    assert model.load_report.ignored.keys() == {"head.weight", "head.bias"}
    features = load(tmp_path, num_classes=0)
    assert features(pictures(SMALL)).shape == (2, 24)
    assert features.load_report.new == []
    kept = load(tmp_path, num_classes=4)
    assert kept.id2label == NAMES
    same_tensors(kept, build("classifier"))


def test_expanded_tables_are_of_their_own(tmp_path: Path) -> None:
    save(build("masked model"), tmp_path)
    model = load(tmp_path, num_classes=2)
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    with torch.no_grad():
        tables[0].zero_()
    assert tables[1].any()
    assert len({table.data_ptr() for table in tables}) == 3


@torch.no_grad()
def test_larger_patches_of_larger_pictures_answer_alike(tmp_path: Path) -> None:
    """Patches of 16 enlarged from patches of 8: the same products, so the same logits."""
    import torch.nn.functional as F

    model = build("classifier")
    save(model, tmp_path)
    x = pictures(SMALL)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (B L, 3, 8, 8)
    patches = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    larger = patches.view(2, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    back = load(tmp_path, patch_size=16, img_size=64)
    assert back.load_report.resized == ["patch_embed.proj.weight"]
    torch.testing.assert_close(back(larger), model(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"img_size": 33}, "33 is not a multiple of patch_size 8; use 32 or 40"),
        ({"img_size": 0}, "0 is not a multiple of patch_size 8"),
        ({"patch_size": 7}, "32 is not a multiple of patch_size 7"),
        ({"patch_size": 0}, "patch_size 0 must be 1 or more"),
        ({"num_classes": -1}, "num_classes -1 is not 0, for none, or more"),
    ],
)
def test_what_cannot_be_asked_for_is_the_callers_mistake(
    asked: dict[str, int], words: str, tmp_path: Path
) -> None:
    save(build("classifier"), tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path, **asked)
    assert not isinstance(caught.value, CheckpointError)


@torch.no_grad()
def test_heads_of_a_file_without_a_table_are_assumed_or_asked_for(tmp_path: Path) -> None:
    save(build("plain classifier"), tmp_path / "a.pth", to="unilm")
    with pytest.raises(CheckpointError, match="width 24 is no multiple of 64; num_heads="):
        load(tmp_path / "a.pth")
    x = pictures(PLAIN)
    assert torch.equal(load(tmp_path / "a.pth", num_heads=3)(x), build("plain classifier")(x))
    assert not torch.allclose(load(tmp_path / "a.pth", num_heads=4)(x), build("plain classifier")(x))


def test_heads_that_contradict_what_the_source_says_are_refused(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "a.pth", to="unilm")
    with pytest.raises(CheckpointError, match="num_heads 4 was asked for; its bias has 3 heads"):
        load(tmp_path / "a.pth", num_heads=4)
    save(build("plain classifier"), tmp_path / "b")
    with pytest.raises(CheckpointError, match="num_heads 4 was asked for; its config says 3"):
        load(tmp_path / "b", num_heads=4)
    with pytest.raises(CheckpointError, match="early_layer 2 was asked for; it has no cls_pt_layers"):
        load(tmp_path / "a.pth", early_layer=2)


def test_a_rectangle_without_a_config_must_be_named(tmp_path: Path) -> None:
    save(build("rectangle"), tmp_path / "a.pth", to="unilm")
    with pytest.raises(CheckpointError, match=r"no square; img_size=\(height, width\).*\(32, 48\)"):
        load(tmp_path / "a.pth")
    same_tensors(load(tmp_path / "a.pth", img_size=(32, 48)), build("rectangle"))


def test_a_rectangle_asked_for_does_not_change_how_a_square_is_read(tmp_path: Path) -> None:
    """5 x 5 patches have as many table rows as 2 x 14: the table is resized, not read across."""
    model = randomise(BeitForImageClassification(replace(SMALL, img_size=40)))
    save(model, tmp_path / "a.pth", to="unilm")
    back = load(tmp_path / "a.pth", img_size=(16, 112))
    assert back.config.grid == (2, 14)
    assert back.load_report.resized == [f"blocks.{i}.attn.{TABLE}" for i in range(3)]


def test_the_preparation_can_be_given(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "a.pth", to="unilm")
    spec = ImageSpec((32, 32), "squash", "lanczos", 1.0, IMAGENET_MEAN, IMAGENET_STD)
    assert load(tmp_path / "a.pth", image_spec=spec).image_spec == spec
    assert load(tmp_path / "a.pth").image_spec == ImageSpec((32, 32))


def test_statistics_of_a_bare_file_follow_its_family(finetuned: Tensors, tmp_path: Path) -> None:
    names = {"beit_base.pth": 0.5, "beitv2_base_patch16_224_pt1k_ft1k.pth": IMAGENET_MEAN[0]}
    for name, mean in names.items():
        torch.save({"model": finetuned}, tmp_path / name)
        model = load(tmp_path / name)
        assert model.image_spec.mean[0] == mean
        assert any(f"mean {mean}" in line for line in model.load_report.assumed)


def test_a_gpu_can_be_reached_from_what_was_loaded(tmp_path: Path) -> None:
    """No tensor is left without content, of a model without bias neither."""
    for name in MODELS:
        save(build(name), tmp_path / name)
        model = load(tmp_path / name)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), name


def test_where_a_model_came_from_is_kept(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "a.pth", to="unilm")
    model = load(tmp_path / "a.pth")
    assert model.provenance == {"source": str(tmp_path / "a.pth"), "layout": "unilm file"}


# --- What is refused, and what it says -------------------------------------------------------------------


def refused(source: Path, *words: str, **options: Any) -> str:
    begun = time.monotonic()
    with pytest.raises((CheckpointError, RefusedFile)) as caught:
        load(source, **options)
    assert caught.value.exit_code == 5  # type: ignore[union-attr]
    message = str(caught.value)
    for word in (source.name, *words):
        assert word in message, message
    assert len(message) < 1000
    assert time.monotonic() - begun < 30, "a refusal is no search"
    return message


MISTAKES: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "a plain ViT with tables": (
        lambda t: {**t, "blocks.0.attn.qkv.bias": torch.zeros(144)},
        ("it is a ViT with no absolute positions, which is not computed here",),
    ),
    "no encoder at all": (
        lambda t: {"conv1.weight": torch.zeros(1)}, ("no tensors of a BEiT", "conv1.weight")
    ),
    "a missing block": (
        lambda t: {k: v for k, v in t.items() if not k.startswith("blocks.1.")},
        ("it has blocks.2 and lacks blocks.1",),
    ),
    "a block far away": (
        lambda t: {**t, "blocks.999999999.norm1.weight": torch.zeros(48)},
        ("it has blocks.999999999 and lacks blocks.3",),
    ),
    "a missing tensor": (
        lambda t: {k: v for k, v in t.items() if k != "blocks.1.mlp.fc2.bias"},
        ("looks like a BEiT classifier of 7 classes, 3 blocks of width 48", "missing: 1 tensor",
         "blocks.1.mlp.fc2.bias"),
    ),
    "a missing table": (
        lambda t: {k: v for k, v in t.items() if k != f"blocks.1.attn.{TABLE}"},
        ("missing", f"blocks.1.attn.{TABLE}"),
    ),
    "two families in one": (
        lambda t: {**t, f"rel_pos_bias.{TABLE}": torch.zeros(52, 4)}, ("unknown: 1 ", "rel_pos_bias")
    ),
    "an unknown tensor": (
        lambda t: {**t, "blocks.0.adapter.weight": torch.zeros(4)},
        ("unknown: 1 (blocks.0.adapter.weight)",),
    ),
    "a wrong shape": (
        lambda t: {**t, "fc_norm.weight": torch.zeros(47)}, ("fc_norm.weight is (47,), not (48,)",)
    ),
    "integers": (
        lambda t: {**t, "head.weight": torch.zeros(7, 48, dtype=torch.int8)},
        ("tensors of int8; known are bfloat16, float16, float32, float64",),
    ),
    "complex numbers": (
        lambda t: {k: v.to(torch.complex64) for k, v in t.items()}, ("tensors of complex64",)
    ),
    "a table of no grid": (
        lambda t: {k: v[:-1] if k.endswith(TABLE) else v for k, v in t.items()}, ("is of no square",)
    ),
    "a flat class token": (lambda t: {**t, "cls_token": torch.zeros(())}, ("does not describe a BEiT",)),
    "patches that are no squares": (
        lambda t: {**t, "patch_embed.proj.weight": torch.zeros(48, 3, 8, 4)}, ("no square patches",)
    ),
    "no class token": (
        lambda t: {k: v for k, v in t.items() if k != "cls_token"}, ("it lacks cls_token",)
    ),
    "a grid beyond all pictures": (
        lambda t: {
            k: torch.zeros((2 * 200 - 1) ** 2 + 3, 4).half() if k.endswith(TABLE) else v
            for k, v in t.items()
        },
        ("grid of (200, 200) patches has more than 16384",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_has_its_message(mistake: str, finetuned: Tensors, tmp_path: Path) -> None:
    spoil, words = MISTAKES[mistake]
    torch.save({"model": spoil(dict(finetuned))}, tmp_path / "beit.pth")
    refused(tmp_path / "beit.pth", *words)


def test_a_file_without_tensors_is_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "no tensors", "epoch, lr")
    torch.save([torch.zeros(1)], tmp_path / "b.pth")
    refused(tmp_path / "b.pth", "holds a list, not a state dict")


def test_positions_never_pass_for_a_bias_nor_the_reverse(tmp_path: Path) -> None:
    save(build("plain classifier"), tmp_path / "plain")
    save(build("classifier"), tmp_path / "biased")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "biased")]
    save_file(weights[1], tmp_path / "plain" / "model.safetensors")
    save_file(weights[0], tmp_path / "biased" / "model.safetensors")
    refused(tmp_path / "plain", "pos_embed", TABLE)
    refused(tmp_path / "biased", "pos_embed", TABLE)


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path)
    change(tmp_path, beit={"format": 2})
    refused(tmp_path, "format 2 and this version of beit reads up to 1; update it")


def test_shards_outside_the_folder_or_missing_are_refused(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "away.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    for part, words in (
        ("../away.safetensors", "outside its folder"),
        ("gone.safetensors", "not exist"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": part}}))
        refused(tmp_path / "m", words)
    index.write_text(json.dumps({"weight_map": {}}))
    refused(tmp_path / "m", "outside its folder: none")


def deep(content: str, depth: int) -> str:
    return '{"a":' * depth + content + "}" * depth


HOSTILE: dict[str, str | dict[str, Any]] = {
    "nested without end": deep("1", 200_000),
    "nested a little": {"model_type": json.loads("[" * 500 + "]" * 500)},
    "a type that is a list": {"model_type": ["beit"]},
    "a type that is an object": {"model_type": {"beit": 1}},
    "a number of many digits": '{"image_size": ' + "9" * 10_000 + "}",
    "a depth of a thousand million": {"num_hidden_layers": 1_000_000_000},
    "a width of a thousand million": {"hidden_size": 3_000_000_000, "intermediate_size": 3_000_000_000},
    "a picture of a thousand million": {"image_size": 8_000_000_000},
    "heads below nothing": {"num_attention_heads": -3},
    "heads of a half": {"num_attention_heads": 2.5},
    "a true width": {"hidden_size": True},
    "an epsilon in words": {"layer_norm_eps": "small"},
    "an epsilon that is none": {"layer_norm_eps": float("nan")},
    "a drop path above all": {"drop_path_rate": 7},
    "architectures of numbers": {"architectures": [5]},
    "architectures of code": {"architectures": ["os.system"]},
    "classes of numbers": {"id2label": [1, 2]},
    "classes by words": {"id2label": {"cat": 0}},
    "an activation by path": {"hidden_act": "os.system"},
    "our key as a list": {"beit": [1]},
    "our format in words": {"beit": {"format": "one"}},
    "a provenance that is none": {"beit": {"format": 1, "provenance": [1]}},
    "a mean of words": {"beit": {"format": 1, "image_spec": {"mean": ["a", "b", "c"]}}},
    "a mean of two": {"beit": {"format": 1, "image_spec": {"mean": [0.5, 0.5]}}},
    "a deviation of nothing": {"beit": {"format": 1, "image_spec": {"std": [0, 0, 0]}}},
    "a pooling that is none": {"beit": {"format": 1, "pooling": "max"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_refused_at_once(name: str, tmp_path: Path) -> None:
    save(build("classifier"), tmp_path)
    content = HOSTILE[name]
    if isinstance(content, str):
        (tmp_path / "config.json").write_text(content)
    else:
        change(tmp_path, **content)
    refused(tmp_path)


def test_extra_blocks_without_end_are_refused_at_once(tmp_path: Path) -> None:
    for name in ("masked model", "v2 masked model"):
        save(build(name), tmp_path)
        change(tmp_path, beit={"format": 1, "early_layer": 2, "head_layers": 1_000_000_000})
        refused(tmp_path, "cls_pt_layers, its config says 1000000000")


def test_a_config_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * 20_000_000 + b"{}")
    refused(tmp_path, "larger than the 16,777,216 bytes of any real config")


# --- Tokenizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dalle-tiny-encoder.pkl", "dalle-tiny-encoder-legacy.pkl"])
def test_openais_pickles_give_the_originals_tokens(name: str) -> None:
    tokenizer, expected = load(GOLDEN / name), golden("dalle-tiny.npz")
    assert isinstance(tokenizer, DalleTokenizer)
    assert tokenizer.can_draw == ("legacy" not in name)  # only the other has its decoder beside it
    for shape in ("square", "rect"):
        ids = tokenizer.encode(torch.from_numpy(expected[f"{shape}_raw"]))
        np.testing.assert_array_equal(ids.numpy(), expected[f"{shape}_ids"])


def test_openais_decoder_alone_asks_for_the_encoder(tmp_path: Path) -> None:
    refused(GOLDEN / "dalle-tiny-decoder.pkl", "is the decoder; give the encoder")


@pytest.fixture
def vqkd_file(tmp_path: Path) -> Path:
    """As unilm saves it, with what only its training needs."""
    beside = {"teacher_model.visual.proj": torch.zeros(2, 2), "loss_fn.scale": torch.zeros(1),
              "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}  # fmt: skip
    file = tmp_path / "vqkd.pth"
    torch.save({"model": {**load_file(GOLDEN / "vqkd-tiny.safetensors"), **beside}}, file)
    return file


def test_a_vqkd_file_gives_the_originals_tokens(vqkd_file: Path) -> None:
    tokenizer, expected = load(vqkd_file, num_heads=4), golden("vqkd-tiny.npz")
    assert isinstance(tokenizer, VQKD)
    ids = tokenizer.encode(torch.from_numpy(expected["input"]))
    np.testing.assert_array_equal(ids.flatten(1).numpy(), expected["ids"])


def test_heads_of_a_vqkd_file_are_not_guessed_where_no_rule_fits(vqkd_file: Path) -> None:
    refused(vqkd_file, "width 48 is no multiple of 64", "--num-heads N")


def test_a_tokenizer_and_a_model_file_are_told_apart(vqkd_file: Path) -> None:
    with pytest.raises(
        CheckpointError, match="a visual tokenizer, not a model; it is what `beit pretrain"
    ):
        load_model(vqkd_file)
    with pytest.raises(CheckpointError, match="is not a visual tokenizer; its first tensors are blocks"):
        load_tokenizer(GOLDEN / "unilm-v1-finetune-relbias.pth")


def test_a_vqkd_file_with_a_block_far_away_is_refused(vqkd_file: Path) -> None:
    tensors = load_file(GOLDEN / "vqkd-tiny.safetensors")
    torch.save({**tensors, "encoder.blocks.99999999.norm1.weight": torch.zeros(1)}, vqkd_file)
    refused(vqkd_file, "it has encoder.blocks.99999999 and lacks encoder.blocks.3", num_heads=4)


@pytest.mark.parametrize(
    "sizes", [{"num_layers": 10**9}, {"vocab_size": 10**12}, {"hidden_dim": 10**9}, {"code_dim": -1}]
)
def test_a_hostile_tokenizer_config_is_refused_before_anything_is_allocated(
    sizes: dict[str, int], tmp_path: Path
) -> None:
    config = DiscreteVAEConfig(32, 24, 8, 8, num_layers=2)
    save_tokenizer(DiscreteVAE(config), tmp_path)
    change(tmp_path, sizes={**dataclasses.asdict(config), **sizes})
    refused(tmp_path)
    change(tmp_path, model_type=[1])
    refused(tmp_path)


# --- The engine ------------------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[Path], Any]] = {
    "our folder": lambda place: save(load(GOLDEN / "unilm-v1-finetune-relbias.pth"), place / "m"),
    "timm's folder": lambda place: save(
        load(GOLDEN / "unilm-v1-finetune-relbias.pth"), place / "m", to="timm"
    ),
    "unilm's file": lambda place: shutil.copy(GOLDEN / "unilm-v1-finetune-relbias.pth", place / "m"),
    "float16": lambda place: save(
        load(GOLDEN / "unilm-v1-finetune-relbias.pth", dtype=torch.float16), place / "m"
    ),
    "an old .bin": lambda place: shutil.copytree(
        GOLDEN / "hf418-beit-cls-meanpool-relbias", place / "m"
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_engine_answers_from_every_source(source: str, tmp_path: Path) -> None:
    SOURCES[source](tmp_path)
    engine = beit.Engine(tmp_path / "m", device="cpu", runtime="torch", precision="fp32")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (answer,) = engine.classify([picture])
    assert answer.error is None
    assert len(answer.top) == 5
    assert engine.model.cls_token.dtype == torch.float32
    if source == "float16":
        full = beit.Engine(
            load(GOLDEN / "unilm-v1-finetune-relbias.pth"),
            device="cpu",
            runtime="torch",
            precision="fp32",
        )
        (same,) = full.classify([picture])
        assert answer.score == pytest.approx(same.score, abs=1e-2)


# --- The released files, where they are ------------------------------------------------------------------

# COCO val2017 000000039769, squashed, bilinear: the first three logits and the best class, as the
# conversion scripts and tests of transformers publish them.
RELEASED = {
    "beit_base_patch16_224_pt22k_ft22k": ((2.2288, 2.4671, 0.7395), 2397),
    "beit_large_patch16_224_pt22k_ft22k": ((1.6881, -0.2787, 0.5901), 2396),
    "beit_base_patch16_224_pt22k_ft1k": ((0.1241, 0.0798, -0.6569), 285),
    "beit_base_patch16_224_pt22k_ft22kto1k": ((-1.2385, -1.0987, -1.0108), 281),
    "beit_base_patch16_384_pt22k_ft22kto1k": ((-1.5303, -0.9484, -0.3147), 761),
    "beit_large_patch16_224_pt22k_ft1k": ((0.4610, -0.0928, 0.2086), 761),
    "beit_large_patch16_224_pt22k_ft22kto1k": ((-0.4804, 0.6257, -0.1837), 761),
    "beit_large_patch16_384_pt22k_ft22kto1k": ((-0.5122, 0.5117, -0.2113), 761),
    "beit_large_patch16_512_pt22k_ft22kto1k": ((-0.3062, 0.7261, 0.4852), 761),
}


def squashed(path: Path, size: int) -> Tensor:
    from beit.image import preprocess, read_image, transformers_spec

    return torch.from_numpy(preprocess(read_image(path), transformers_spec(size))).unsqueeze(0)


@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_a_released_classifier_gives_its_published_logits(
    name: str, real_weights: Callable[[str], Path]
) -> None:
    model = load(real_weights(f"{name}.pth"), dtype=torch.float32)
    row = hub.RELEASED[name]
    assert sum(p.numel() for p in model.parameters()) == row.num_parameters
    assert model.load_report.new == []
    logits = model(squashed(real_weights("000000039769.jpg"), row.img_size))[0]
    first, best = RELEASED[name]
    np.testing.assert_allclose(logits[:3].numpy(), first, atol=5e-3)  # some files hold float16
    assert int(logits.argmax()) == best


@torch.no_grad()
def test_the_released_masked_model_gives_its_published_logits(
    real_weights: Callable[[str], Path],
) -> None:
    model = load(real_weights("beit_base_patch16_224_pt22k.pth"), dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 91_965_776
    x = squashed(real_weights("000000039769.jpg"), 224)
    logits = model(x, torch.ones(1, 196, dtype=torch.bool))[:3, :3]
    expected = [[-3.2437, 0.5072, -13.9174], [-3.2456, 0.4948, -13.9401], [-3.2033, 0.5121, -13.8550]]
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-2)


FILES = [row.name for row in hub.RELEASED.values() if row.release and row.task != "segmentation"]


@pytest.mark.parametrize("name", FILES)
def test_a_released_file_has_its_published_number_of_parameters(
    name: str, real_weights: Callable[[str], Path]
) -> None:
    row = hub.RELEASED[name]
    model = load(real_weights(f"{name}.pth"))
    if row.num_parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == row.num_parameters
