"""`beit convert`: what it writes, what it says is not kept, what it refuses; and -m takes every source."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from random_models import GOLDEN, NAMES, build, same_tensors
from safetensors.torch import load_file, save_file

import beit.commands.convert as convert_module
from beit.checkpoints import load, load_model, save
from beit.commands.convert import Convert, parity
from beit.model import BeitForImageClassification
from beit.tokenizer_files import load_tokenizer

from .conftest import EXACT, FINETUNE, PRETRAIN, Done

FILE = GOLDEN / "unilm-v1-finetune-relbias.pth"


def test_a_unilm_file_becomes_our_folder(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("convert", FILE, tmp_path / "model")
    assert (code, out) == (0, "")
    assert "used 55 tensors" in err
    assert "a picture read back through it differs by" in err
    back = load(tmp_path / "model")
    same_tensors(back, load(FILE))
    assert back.config == load(FILE).config
    provenance = json.loads((tmp_path / "model" / "config.json").read_text())["beit"]["provenance"]
    assert provenance["source"] == str(FILE)
    assert provenance["source_sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert provenance["layout"] == "unilm file"
    assert provenance["source_sha256"] in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["classifier", "classifier of several labels", "encoder of a masked model", "rectangle", "thin"],
)
def test_every_format_is_written_and_read_back(name: str, cli: Cli, tmp_path: Path) -> None:
    model = build(name)
    save(model, tmp_path / "a")
    for to, place in (("timm", "b"), ("unilm", "c.pth"), ("transformers", "d")):
        code, _, err = cli("convert", tmp_path / "a", tmp_path / place, to=to)
        assert code == 0, err
    x = torch.zeros(1, 3, *model.config.image_height_width)
    with torch.no_grad():
        for place in ("b", "c.pth", "d"):
            back = load(tmp_path / place, img_size=model.config.img_size)
            torch.testing.assert_close(back(x), model(x), atol=1e-5, rtol=0)
            kept = place != "c.pth" and model.config.several_labels
            assert back.config.several_labels == kept  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("classifier", "unilm", "not kept: the class names and how pictures are prepared"),
        ("classifier of several labels", "unilm", "not kept: that a picture may have several labels"),
        ("rectangle", "unilm", "not kept: which side of the rectangle is which"),
        ("encoder", "unilm", "not kept: how pictures are prepared"),
        ("thin", "timm", "not kept: layer_norm_eps 1e-12, timm always has 1e-06"),
        ("thin", "unilm", "not kept: layer_norm_eps 1e-12, unilm always has 1e-06"),
        ("encoder of a masked model", "timm", "not kept: mask_token"),
        ("v2 masked model", "transformers", "in transformers: v2's extra blocks"),
        ("rectangle", "transformers", "in transformers: a rectangle's positions"),
        ("rectangle", "transformers", "in transformers: how the rectangle is cut"),
    ],
)
def test_what_a_format_cannot_hold_is_said(
    name: str, to: str, words: str, cli: Cli, tmp_path: Path
) -> None:
    save(build(name), tmp_path / "a")
    place = tmp_path / ("b.pth" if to == "unilm" else "b")
    code, _, err = cli("convert", tmp_path / "a", place, to=to)
    assert code == 0, err
    assert words in err


def test_nothing_is_said_of_what_is_kept(cli: Cli, tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "a")
    for to, place in (("timm", "b"), ("transformers", "c")):
        assert "not kept" not in cli("convert", tmp_path / "a", tmp_path / place, to=to)[2]


def test_the_number_format_is_kept_or_made_float32(cli: Cli, tmp_path: Path) -> None:
    save(load(FILE, dtype=torch.float16), tmp_path / "half")
    assert cli("convert", tmp_path / "half", "-o", tmp_path / "a")[0] == 0
    assert cli("convert", tmp_path / "half", tmp_path / "b", fp32=True)[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.float16}
    assert {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.float32}


def test_size_and_classes_can_be_changed_on_the_way(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("convert", FILE, tmp_path / "a", img_size=64, num_classes=0)
    assert code == 0
    assert "resized blocks.*.attn.relative_position_bias_table" in err
    config = load(tmp_path / "a").config
    assert (config.img_size, config.num_classes) == (64, 0)


def test_a_pretrained_model_leaves_its_head_to_go_to_timm(cli: Cli, tmp_path: Path) -> None:
    file = GOLDEN / "unilm-v1-pretrain-run.pth"
    code, _, err = cli("convert", file, tmp_path / "a", to="timm")
    assert code == 2
    assert "give num_classes=0" in err
    code, _, err = cli("convert", file, tmp_path / "a", to="timm", num_classes=0)
    assert code == 0
    assert "expanded rel_pos_bias.relative_position_bias_table" in err
    assert load(tmp_path / "a").config.rel_pos_bias == "per_block"


def test_nothing_is_written_over_unless_asked(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "letter.txt").write_text("dear")
    (tmp_path / "a" / "config.json").write_text("{}")
    for options in ({}, {"overwrite": True}):
        code, _, err = cli("convert", FILE, tmp_path / "a", **options)
        assert (code, "is not empty and holds no model" in err) == (6, True)
    assert (tmp_path / "a" / "config.json").read_text() == "{}"
    assert cli("convert", FILE, tmp_path / "b")[0] == 0
    (tmp_path / "a" / "letter.txt").rename(tmp_path / "b" / "letter.txt")
    code, _, err = cli("convert", FILE, tmp_path / "b")
    assert code == 6
    assert "is there already; --overwrite replaces it" in err
    assert cli("convert", FILE, tmp_path / "b", overwrite=True)[0] == 0
    assert (tmp_path / "b" / "letter.txt").read_text() == "dear"


def test_a_folder_can_be_converted_in_its_place(cli: Cli, tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "a")
    assert cli("convert", tmp_path / "a", tmp_path / "a", overwrite=True, to="timm")[0] == 0
    same_tensors(load(tmp_path / "a"), build("classifier"))
    assert load(tmp_path / "a").id2label == NAMES


def test_a_file_is_not_taken_for_a_folder_nor_the_other_way(cli: Cli, tmp_path: Path) -> None:
    save(build("classifier"), tmp_path / "a")
    (tmp_path / "b").write_text("mine")
    (tmp_path / "c.pth").mkdir()
    for place, to, words in (
        ("b", "transformers", "b is a file, and transformers's format is a folder"),
        ("c.pth", "unilm", "c.pth is a folder, and unilm's format is a file"),
    ):
        for more in ([], ["--overwrite"]):
            code, _, err = cli("convert", tmp_path / "a", tmp_path / place, "--to", to, *more)
            assert code == 6
            assert words in err
    assert (tmp_path / "b").read_text() == "mine"


def test_a_class_token_without_a_head_is_nothing_for_unilms_file(cli: Cli, tmp_path: Path) -> None:
    save(build("class token without classes"), tmp_path / "a")
    code, _, err = cli("convert", tmp_path / "a", tmp_path / "b.pth", to="unilm")
    assert code == 2
    assert "cannot say that features are those of the class token" in err
    assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize(
    ("out", "to", "words"),
    [
        ("folder", "unilm", "unilm's format is one file: name it .pth"),
        ("file.pth", "timm", "timm's format is a folder, and file.pth looks like a file"),
        ("file.safetensors", "transformers", "looks like a file"),
    ],
)
def test_a_place_of_the_wrong_kind_is_refused(
    out: str, to: str, words: str, cli: Cli, tmp_path: Path
) -> None:
    code, _, err = cli("convert", FILE, tmp_path / out, to=to)
    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_model_is_refused_with_code_5(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>Not found</html>")
    for source in (tmp_path / "page.pth", tmp_path / "nowhere.pth"):
        code, _, err = cli("convert", source, tmp_path / "a")
        assert code == 5
        assert source.name in err
    assert not (tmp_path / "a").exists()


def test_a_written_file_that_answers_otherwise_is_reported(tmp_path: Path) -> None:
    model = load_model(FILE)
    save(model, tmp_path)
    settings = Convert(str(FILE), tmp_path)
    assert parity(load_model(FILE), settings) < 1e-6
    for name in ("beit.encoder.layer.1.output.dense.weight", "classifier.bias"):
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({**tensors, name: tensors[name] + 0.01}, tmp_path / "model.safetensors")
        with pytest.raises(convert_module.CheckpointError, match="answers otherwise"):
            parity(load_model(FILE), settings)
        save_file(tensors, tmp_path / "model.safetensors")


def test_a_part_that_a_picture_does_not_reach_is_compared_too(tmp_path: Path) -> None:
    """v2's extra blocks have no share in the logits."""
    model = build("v2 masked model")
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "cls_pt_layers.0.mlp.fc1.weight"
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(convert_module.CheckpointError, match="answers otherwise"):
        parity(model, Convert("v2", tmp_path))


# --- Tokenizers ------------------------------------------------------------------------------------------


def test_openais_dvae_becomes_a_folder_with_the_same_tokens(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("convert", GOLDEN / "dalle-tiny-encoder.pkl", tmp_path / "dvae")
    assert code == 0
    assert "DalleTokenizer, the same tokens" in err
    tokenizer = load_tokenizer(tmp_path / "dvae")
    with np.load(GOLDEN / "dalle-tiny.npz") as expected:
        ids = tokenizer.encode(torch.from_numpy(expected["square_raw"]))
        np.testing.assert_array_equal(ids.numpy(), expected["square_ids"])
    assert tokenizer.can_draw


def test_a_vqkd_file_becomes_a_folder_once_its_heads_are_known(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": load_file(GOLDEN / "vqkd-tiny.safetensors")}, tmp_path / "vqkd.pth")
    code, _, err = cli("convert", tmp_path / "vqkd.pth", tmp_path / "a")
    assert code == 5
    assert "--num-heads N" in err
    assert cli("convert", tmp_path / "vqkd.pth", tmp_path / "a", num_heads=4)[0] == 0
    with np.load(GOLDEN / "vqkd-tiny.npz") as expected:
        ids = load_tokenizer(tmp_path / "a").encode(torch.from_numpy(expected["input"]))
        np.testing.assert_array_equal(ids.flatten(1).numpy(), expected["ids"])


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ({"to": "timm"}, "a tokenizer has no timm format; leave --to out"),
        ({"num_classes": 3}, "a tokenizer has no num_classes; leave --num-classes out"),
    ],
)
def test_a_tokenizer_takes_nothing_of_a_model(
    cli: Cli, tmp_path: Path, flag: dict[str, Any], told: str
) -> None:
    code, _, err = cli("convert", GOLDEN / "dalle-tiny-encoder.pkl", tmp_path / "a", **flag)
    assert code == 2
    assert told in err


def test_pretraining_takes_a_pickled_tokenizer_as_it_was_published(
    cli: Cli, shapes: Path, tmp_path: Path
) -> None:
    """Patches of 8 pixels for its 8-pixel tokens."""
    options = {**PRETRAIN, "steps": 2, "log_every": 1, "warmup_epochs": 0}
    file = GOLDEN / "dalle-tiny-encoder.pkl"
    code, _, err = cli("pretrain", shapes / "train", tokenizer=file, out=tmp_path / "run", **options)
    assert code == 0, err
    assert load_model(tmp_path / "run").config.vocab_size == 48


# --- Every command takes every source --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float16 .pth", "timm folder", "transformers .bin"])
def source(
    request: pytest.FixtureRequest, finetuned: Done, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The fine-tuned shapes, as others keep their weights."""
    model, place = load_model(finetuned.folder), tmp_path_factory.mktemp("source")
    if request.param == "timm folder":
        save(model, place / "m", to="timm")
        return place / "m"
    if request.param == "float16 .pth":
        save(model.half(), place / "m.pth", to="unilm")
        return place / "m.pth"
    save(model, place / "m")
    weights = place / "m" / "model.safetensors"
    torch.save(load_file(weights), place / "m" / "pytorch_model.bin")
    weights.unlink()
    return place / "m"


def test_classify_and_probe_and_finetune_take_it(
    source: Path, cli: Cli, shapes: Path, finetuned: Done, tmp_path: Path
) -> None:
    picture = next((shapes / "val" / "disc").iterdir())
    code, out, err = cli("classify", picture, model=source, device="cpu", top=1, json=True)
    assert code == 0, err
    label = json.loads(out)["label"]
    labels = load_model(finetuned.folder).id2label
    assert label in labels.values() or labels[int(label)] in labels.values()

    code, out, err = cli("probe", shapes, model=source, device="cpu", json=True, no_baseline=True)
    assert code == 0, err
    assert json.loads(out)["accuracy"] > 0.5

    options = {**FINETUNE, "steps": 2, "log_every": 1, "warmup_epochs": 0}
    code, _, err = cli("finetune", shapes, model=source, out=tmp_path / "run", **options)
    assert code == 0, err
    again = load_model(tmp_path / "run")
    assert isinstance(again, BeitForImageClassification)
    assert again.cls_token.dtype == torch.float32


def test_evaluate_takes_it_where_it_has_class_names(
    source: Path, cli: Cli, shapes: Path, finetuned: Done
) -> None:
    code, out, err = cli("evaluate", shapes, model=source, device=EXACT["device"], json=True)
    if source.suffix == ".pth":  # unilm's file has no names to match the folders with
        assert code == 2
        return
    assert code == 0, err
    _, expected, _ = cli("evaluate", shapes, model=finetuned.folder, device="cpu", json=True)
    assert json.loads(out) == json.loads(expected)
