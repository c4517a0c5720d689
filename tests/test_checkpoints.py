"""Model folders: round trips, exchange with transformers, what a damaged one says."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import (
    GOLDEN,
    MODELS,
    NAMES,
    SHARED,
    SMALL,
    build,
    pictures,
    randomise,
    same_tensors,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import beit.atomic
from beit.checkpoints import load, load_model, save
from beit.hub import HubError
from beit.image import IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit.tokenizer import DalleConfig, DalleTokenizer, DiscreteVAE, DiscreteVAEConfig
from beit.tokenizer_files import load_tokenizer, save_tokenizer
from beit.unpickle import RefusedFile
from beit.weight_files import CheckpointError

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
    every = model.logits(Beit.forward(model, x, mask))
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
        CheckpointError, match=r"unknown: 2 \(beit\.layernorm\.bias, beit\.layernorm\.weight"
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
    with pytest.raises(RefusedFile, match=r"beit_base.pth: ends in the middle"):
        load(tmp_path / "beit_base.pth")


def test_unfinished_run_is_told_apart_from_no_model(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('command = "Finetune"\n')
    refused(tmp_path, "has not finished; give its command again")


def test_what_stands_beside_models_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    moments = tmp_path / "optimizer.safetensors"
    save_file({"blocks.0.attn.qkv.weight.exp_avg": torch.zeros(2)}, moments)
    refused(moments, "is what an optimiser keeps; the weights are in model.safetensors")
    refused(tmp_path, "is a checkpoint of a training", str(tmp_path / "model.safetensors"))
    save_file({"counts": torch.zeros(2)}, tmp_path / "tally.safetensors")
    refused(tmp_path / "tally.safetensors", "is what a training counts; the weights are in model.saf")
    moments.unlink()
    (tmp_path / "shards.json").write_text("{}")
    refused(tmp_path, "holds shards of pictures, to be given as DATA")
    (tmp_path / "run.toml").write_text("seed = 0")
    refused(tmp_path / "run.toml", "is settings, not a model")


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
    change(folder, model_type="swin")
    refused(folder, "holds a 'swin', not a BEiT encoder or a plain ViT", "export it as a .pt2")
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
        folder, "looks like a BEiT classifier of 4 classes", "missing: 1 tensor (head.bias",
        "unknown: 1 (beit.surprise", "cls_token is (1, 1, 25), not (1, 1, 24)",
    )  # fmt: skip


QUERY = "beit.encoder.layer.1.attention.attention.query.weight"


def test_a_missing_or_misshapen_query_is_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    query = tensors.pop(QUERY)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "missing: 1 tensor (blocks.1.attn.qkv.weight")
    save_file({**tensors, QUERY: query[:, :20].contiguous()}, folder / "model.safetensors")
    refused(folder, "blocks.1.attn.qkv.weight")


def test_other_class_names_than_head_rows_are_refused(folder: Path) -> None:
    change(folder, id2label={"0": "cat", "1": "dog"})
    refused(folder, "head.weight is (4, 24), not (2, 24)")


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
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}"):
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


def test_an_exported_graph_says_who_takes_it_and_what_to_give(tmp_path: Path) -> None:
    for name in ("flowers.xml", "flowers.onnx", "flowers.pt2"):
        (tmp_path / name).write_text("<?xml")
        for read in (load_model, load_tokenizer):
            refused(tmp_path / name, "is an exported graph, which classify, embed", "from", read=read)
    refused(tmp_path, "holds an exported graph", f"take as {tmp_path / 'flowers.onnx'}", read=load_model)


def test_a_tokenizer_and_a_model_are_told_apart(tmp_path: Path) -> None:
    save_tokenizer(TOKENIZERS["vq"](), tmp_path / "tokenizer")
    save(build("classifier"), tmp_path / "model")
    refused(
        tmp_path / "tokenizer", "beit-discrete-vae", "`beit pretrain DATA --tokenizer`", read=load_model
    )
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
    refused(tmp_path, "codebook.weight is (25, 8), not (24, 8)", read=load_tokenizer)


def test_a_tokenizers_config_says_its_sizes(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["gumbel"]()
    save_tokenizer(tokenizer, tmp_path, {"steps": 7})
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["sizes"] == dataclasses.asdict(tokenizer.config)
    assert content["provenance"] == {"steps": 7}
