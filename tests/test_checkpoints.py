"""Model folders: round trips, exchange with transformers, what a damaged one says, hand-over."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import beit.atomic
from beit.checkpoints import (
    CheckpointError,
    load,
    load_model,
    load_tokenizer,
    save,
    save_tokenizer,
)
from beit.handover import LoadReport, to_classifier
from beit.hub import HubError
from beit.image import IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit.relative_position import resize_bias_table
from beit.tokenizer import DalleConfig, DalleTokenizer, DiscreteVAE, DiscreteVAEConfig
from beit.unpickle import RefusedFile

GOLDEN = Path(__file__).parent / "golden"
SMALL = BeitConfig(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=4)
SHARED = SMALL.for_pretraining(vocab_size=40)
V2 = replace(SHARED, early_layer=2)
PLAIN = replace(SMALL, rel_pos_bias="none", use_abs_pos_emb=True, init_values=0.0, pooling="cls")
MODELS: dict[str, tuple[type[Beit], BeitConfig]] = {
    "classifier": (BeitForImageClassification, SMALL),
    "classifier without classes": (BeitForImageClassification, replace(SMALL, num_classes=0)),
    "classifier from the class token": (BeitForImageClassification, replace(SMALL, pooling="cls")),
    "plain classifier": (BeitForImageClassification, PLAIN),
    "shared-bias classifier": (BeitForImageClassification, replace(SMALL, rel_pos_bias="shared")),
    "masked model": (BeitForMaskedImageModeling, SHARED),
    "plain masked model": (BeitForMaskedImageModeling, PLAIN.for_pretraining(40)),
    "v2 masked model": (BeitForMaskedImageModeling, V2),
    "encoder": (Beit, replace(SMALL, num_classes=0)),
    "encoder of a masked model": (Beit, SHARED),
    "rectangle": (BeitForImageClassification, replace(SMALL, img_size=(32, 48))),
    "plain rectangle": (BeitForImageClassification, replace(PLAIN, img_size=(32, 48))),
    "thin": (BeitForImageClassification, replace(SMALL, mlp_ratio=2.5, layer_norm_eps=1e-12)),
}
NAMES = {0: "Katze", 1: "dog, big", 2: '猫 "x"', 3: "4"}


def randomise(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(name: str) -> Any:
    kind, config = MODELS[name]
    model = randomise(kind(config))
    if config.num_classes == 4 and kind is BeitForImageClassification:
        model.id2label = dict(NAMES)
    return model


def pictures(config: BeitConfig, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *config.image_height_width, generator=generator)


def same_tensors(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# --- Round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_comes_back_as_it_went(name: str, tmp_path: Path) -> None:
    model = build(name)
    save(model, tmp_path)
    back = load(tmp_path)
    assert type(back) is type(model)
    assert back.config == model.config
    assert back.image_spec == model.image_spec
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())
    same_tensors(model, back)
    x = pictures(model.config)
    assert torch.equal(back(x), model(x))


def test_a_saved_model_is_the_documented_files(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "deep" / "folder")
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_number_format_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("classifier").to(dtype)
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    back = load(tmp_path)
    assert back.cls_token.dtype == dtype
    same_tensors(model, back)


def test_class_names_come_back_in_any_script(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path)
    assert load(tmp_path).id2label == NAMES


def test_image_spec_comes_back(tmp_path: Path) -> None:
    model = build("classifier")
    model.image_spec = ImageSpec((32, 48), "squash", "lanczos", 0.93, IMAGENET_MEAN, IMAGENET_STD)
    save(model, tmp_path)
    assert load(tmp_path).image_spec == model.image_spec


def test_provenance_is_kept_in_config_and_card(tmp_path: Path) -> None:
    facts = {"made_by": "a test", "steps": 12, "val_accuracy": 0.5}
    save(build("classifier"), tmp_path, facts)
    assert json.loads((tmp_path / "config.json").read_text())["beit"]["provenance"] == facts
    card = (tmp_path / "README.md").read_text()
    assert "| steps | 12 |" in card
    assert "Katze" in card


def test_loaded_model_trains(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path)
    model = load(tmp_path).train()
    model(pictures(SMALL)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_a_golden_model_survives_the_folder(tmp_path: Path) -> None:
    config = BeitConfig(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7)
    model = BeitForImageClassification(config)
    model.load_state_dict(load_file(GOLDEN / "unilm-v1-finetune-relbias.safetensors"))
    save(model, tmp_path)
    with np.load(GOLDEN / "unilm-v1-finetune-relbias.npz") as file, torch.no_grad():
        logits = load(tmp_path)(torch.from_numpy(file["input"]))
        np.testing.assert_allclose(logits.numpy(), file["logits"], atol=1e-5)


# --- transformers ------------------------------------------------------------------------------------

# Without v2's extra blocks and without rectangles: transformers 5.23 knows none of the first, reads a
# rectangle's bias table with its sides exchanged, and its positions as a square's.
EXCHANGED = ["classifier", "classifier from the class token", "plain classifier",
             "shared-bias classifier", "masked model", "plain masked model", "encoder",
             "encoder of a masked model", "thin"]  # fmt: skip


def theirs_from(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not [key for key in info["unexpected_keys"] if "relative_position_index" not in key]
    return model.eval()


def output(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, or the tokens of a bare encoder; transformers' masked model answers for all tokens."""
    answer = model(images)
    if isinstance(answer, Tensor):
        return answer
    if "logits" not in answer:
        return answer.last_hidden_state
    return answer.logits


@pytest.mark.parametrize("name", EXCHANGED)
@torch.no_grad()
def test_transformers_reads_our_folder_and_answers_alike(name: str, tmp_path: Path) -> None:
    model = build(name)
    save(model, tmp_path)
    theirs = theirs_from(tmp_path)
    x = pictures(model.config)
    torch.testing.assert_close(output(theirs, x), model(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_transformers_masks_as_we_do(tmp_path: Path) -> None:
    model = build("masked model")
    save(model, tmp_path)
    theirs = theirs_from(tmp_path)
    x, mask = pictures(SHARED), torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    logits = theirs(x, bool_masked_pos=mask).logits
    torch.testing.assert_close(logits[mask], model(x, mask), atol=1e-5, rtol=0)


def test_transformers_knows_the_class_names_and_the_preparation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = build("classifier")
    model.image_spec = ImageSpec((32, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    save(model, tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).id2label == NAMES
    processor = transformers.BeitImageProcessorPil.from_pretrained(tmp_path)
    assert dict(processor.crop_size) == {"height": 32, "width": 32}
    assert processor.size["shortest_edge"] == 36
    assert tuple(processor.image_mean) == IMAGENET_MEAN


@pytest.mark.parametrize("name", EXCHANGED)
@torch.no_grad()
def test_we_read_what_transformers_writes_and_answer_alike(name: str, tmp_path: Path) -> None:
    kind, config = MODELS[name]
    save(build(name), tmp_path / "ours")
    theirs = randomise(theirs_from(tmp_path / "ours"), seed=4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    assert type(back) is kind
    x = pictures(config)
    torch.testing.assert_close(back(x), output(theirs, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_we_read_a_model_that_transformers_made_from_nothing(masked: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    their_config = transformers.BeitConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96, vocab_size=50, use_mask_token=masked, out_indices=[1, 2],
        use_relative_position_bias=not masked, use_shared_relative_position_bias=masked, num_labels=5,
    )  # fmt: skip
    kind = "BeitForMaskedImageModeling" if masked else "BeitForImageClassification"
    theirs = randomise(getattr(transformers, kind)(their_config))
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.layer_norm_eps == 1e-12
    x = pictures(ours.config)
    torch.testing.assert_close(ours(x), output(theirs, x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_folder_from_transformers_gives_the_logits_it_was_written_with() -> None:
    folder = GOLDEN / "hf-beit-mim-sharedbias"
    model = load(folder)
    assert isinstance(model, BeitForMaskedImageModeling)
    with np.load(folder / "expected.npz") as file:
        expected = {key: file[key] for key in file.files}
    x = torch.from_numpy(expected["input"])
    mask = torch.from_numpy(expected["bool_masked_pos"])
    every = model.logits(Beit.forward(model, x, mask), None)
    np.testing.assert_allclose(every.numpy(), expected["logits_all"], atol=1e-5)


def test_a_masked_model_that_normalises_twice_is_refused(tmp_path: Path) -> None:
    """transformers' masked model without mean pooling has two norms; ours would drop one of them."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    their_config = transformers.BeitConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96, vocab_size=50, use_mask_token=True, use_mean_pooling=False,
        out_indices=[1, 2],
    )  # fmt: skip
    transformers.BeitForMaskedImageModeling(their_config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"unknown \(beit\.layernorm\.bias, beit\.layernorm\.weight"
    ):
        load(tmp_path)


# --- What a folder that cannot be used says --------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(build("classifier"), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, *words: str, read: Callable[[Path], object] = load) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.exit_code == 5
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json, so it is not a model folder")


def test_half_a_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "beit_base.pth").write_bytes(b"\x80\x02")
    with pytest.raises(RefusedFile, match=r"beit_base.pth.* is damaged"):
        load(tmp_path / "beit_base.pth")


def test_unfinished_run_is_told_apart_from_no_model(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('command = "Finetune"\n')
    refused(tmp_path, "has not finished; give its command again")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"model: beit"])
def test_config_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "is not JSON")


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")
    refused(folder, "is not a JSON object")


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for key, value in values.items():
        if value is ...:
            del content[key]
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def test_another_kind_of_model_is_named(folder: Path) -> None:
    change(folder, model_type="vit")
    refused(folder, "holds a 'vit', not a BEiT encoder")
    change(folder, model_type="beit", architectures=["BeitForDepth"])
    refused(folder, "BeitForDepth", "BeitForImageClassification")


def test_missing_and_wrong_sizes_are_named(folder: Path) -> None:
    change(folder, hidden_size=...)
    refused(folder, "does not describe a BEiT", "hidden_size")
    change(folder, hidden_size=24, image_size=33)
    refused(folder, "does not describe a BEiT", "33 is not a multiple of patch_size 8")


NEEDED = ["image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "intermediate_size", "num_channels", "layer_scale_init_value", "id2label", "beit"]  # fmt: skip
WRONG: list[Any] = [None, 0, -8, 2.5, "x", [], {}, [1, 2, 3], {"a": 1}]


@pytest.mark.parametrize("key", NEEDED)
def test_a_wrong_value_in_config_is_a_checkpoint_error_or_harmless(folder: Path, key: str) -> None:
    refusals = 0
    for value in WRONG:
        change(folder, **{key: value})
        try:
            load(folder)
        except CheckpointError:
            refusals += 1
    assert refusals >= 1


def test_a_wrong_image_spec_is_a_checkpoint_error(folder: Path) -> None:
    for spec in ({"sighs": [1, 2]}, {"size": 32}, {"size": [32]}, {"resize": "stretch"}, 7):
        content = json.loads((folder / "config.json").read_text())
        change(folder, beit={**content["beit"], "image_spec": spec})
        refused(folder, "does not describe a BEiT")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_missing_extra_and_wrong_tensors_are_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["classifier.bias"]
    tensors["beit.surprise"] = torch.zeros(1)
    tensors["beit.embeddings.cls_token"] = torch.zeros(1, 1, 25)
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder, "does not fit its own config", "1 tensors are missing (head.bias",
        "1 are unknown (beit.surprise", "cls_token is (1, 1, 25), its config says (1, 1, 24)",
    )  # fmt: skip


QUERY = "beit.encoder.layer.1.attention.attention.query.weight"


def test_a_missing_or_misshapen_query_is_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    query = tensors.pop(QUERY)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "missing (blocks.1.attn.qkv.weight")
    save_file({**tensors, QUERY: query[:, :20].contiguous()}, folder / "model.safetensors")
    refused(folder, "blocks.1.attn.qkv.weight")


def test_other_class_names_than_head_rows_are_refused(folder: Path) -> None:
    change(folder, id2label={"0": "cat", "1": "dog"})
    refused(folder, "head.weight is (4, 24), its config says (2, 24)")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_weights_are_damaged(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(folder, "model.safetensors is damaged")


def test_a_header_that_lies_is_damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[:8] = struct.pack("<Q", 1 << 60)
    file.write_bytes(content)
    refused(folder, "model.safetensors is damaged")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors and no pytorch_model.bin")


# --- A save that fails -------------------------------------------------------------------------------


class DiskFull(OSError):
    pass


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_save_cut_short_while_it_writes_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Of the four files of a model, whichever does not fit on the disk."""
    old, new = build("classifier"), randomise(BeitForImageClassification(SMALL), seed=9)
    save(old, tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fsync, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise DiskFull(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(beit.atomic.os, "fsync", full)
    with pytest.raises(DiskFull):
        save(new, tmp_path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    same_tensors(load(tmp_path), old)


def test_a_save_cut_short_at_its_first_rename_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build("classifier")
    save(old, tmp_path)

    def cut(*_: object) -> None:
        raise DiskFull(5, "Input/output error")

    monkeypatch.setattr(beit.atomic.os, "replace", cut)
    with pytest.raises(DiskFull):
        save(randomise(BeitForImageClassification(SMALL), seed=9), tmp_path)
    monkeypatch.undo()
    same_tensors(load(tmp_path), old)


def test_a_first_save_cut_short_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_, count = os.replace, 0

    def cut(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise DiskFull(5, "Input/output error")
        replace_(source, target)

    monkeypatch.setattr(beit.atomic.os, "replace", cut)
    with pytest.raises(DiskFull):
        save(build("classifier"), tmp_path)
    refused(tmp_path, "has no config.json")


# --- Hand-over to a classifier -----------------------------------------------------------------------

CLASSES = ["ant", "bee", "cat", "dog"]
TABLE = "relative_position_bias_table"


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


@pytest.mark.parametrize(
    "classes", [["bee", "ant", "cat", "dog"], ["ant", "bee", "cat", "eel"], ["ant", "bee"]]
)
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
    source.image_spec = replace(source.image_spec, crop_ratio=0.9)
    assert to_classifier(source, CLASSES, img_size=384)[0].image_spec.crop_ratio == 0.9


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


# --- Tokenizers --------------------------------------------------------------------------------------

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "vq": lambda: DiscreteVAE(DiscreteVAEConfig(32, 24, 8, 8, num_layers=2)),
    "gumbel": lambda: DiscreteVAE(DiscreteVAEConfig(32, 24, 8, 8, 3, "gumbel")),
    "dalle": lambda: DalleTokenizer(DalleConfig(24, n_hid=8, n_init=8, n_blk_per_group=1, img_size=32)),
    "dalle without decoder": lambda: DalleTokenizer(DalleConfig(24, 8, 8, 1, 32), with_decoder=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_comes_back_as_it_went(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]()
    if isinstance(tokenizer, DiscreteVAE):
        tokenizer.train()(torch.rand(4, 3, 32, 32))  # codebook, statistics and counters have moved
    tokenizer.eval()
    save_tokenizer(tokenizer, tmp_path, {"steps": 1})
    back = load_tokenizer(tmp_path)
    assert type(back) is type(tokenizer)
    assert back.config == tokenizer.config
    assert not back.training
    same_tensors(tokenizer, back)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(back.encode(images), tokenizer.encode(images))
    if "without" in name:
        with pytest.raises(ValueError, match="without its decoder"):
            back.decode(back.encode(images))
    else:
        assert torch.equal(back.decode(back.encode(images)), tokenizer.decode(back.encode(images)))


def test_a_tokenizer_and_a_model_are_told_apart(tmp_path: Path) -> None:
    save_tokenizer(TOKENIZERS["vq"](), tmp_path / "tokenizer")
    save(build("classifier"), tmp_path / "model")
    refused(tmp_path / "tokenizer", "beit-discrete-vae", "give it as --tokenizer", read=load_model)
    refused(tmp_path / "model", "not a visual tokenizer", "beit train-tokenizer", read=load_tokenizer)


@pytest.mark.parametrize(
    "sizes", [None, [], {}, {"vocab": 3}, {"img_size": 33}, {"code_dim": "x"}, {"num_layers": -1}]
)
def test_wrong_sizes_of_a_tokenizer_are_a_checkpoint_error(tmp_path: Path, sizes: Any) -> None:
    save_tokenizer(TOKENIZERS["vq"](), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    wrong = {**content["sizes"], **sizes} if isinstance(sizes, dict) and sizes else sizes
    (tmp_path / "config.json").write_text(json.dumps({**content, "sizes": wrong}))
    refused(tmp_path, read=load_tokenizer)


def test_tensors_that_do_not_fit_a_tokenizer_are_named(tmp_path: Path) -> None:
    save_tokenizer(TOKENIZERS["vq"](), tmp_path)
    tensors = tensors_of(tmp_path)
    tensors["codebook.weight"] = torch.zeros(25, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "codebook.weight is (25, 8), its config says (24, 8)", read=load_tokenizer)


def test_a_tokenizers_config_says_its_sizes(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["gumbel"]()
    save_tokenizer(tokenizer, tmp_path, {"steps": 7})
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["sizes"] == dataclasses.asdict(tokenizer.config)
    assert content["provenance"] == {"steps": 7}
