"""`beit finetune` on a few pictures of shapes."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, write_shapes

from beit.checkpoints import load
from beit.commands.finetune import Finetune
from beit.data import open_source
from beit.engine import Engine
from beit.model import VARIANTS, BeitForImageClassification

from .conftest import FINETUNE, Broken, Done, run, same_weights

CLASSES = ["disc", "square", "triangle"]


def test_shapes_are_learned(finetuned: Done) -> None:
    last = finetuned.metrics[-1]
    assert last["loss"] < 0.6 * math.log(3)  # a guess costs ln 3; label smoothing keeps it above 0
    assert last["train_accuracy"] > 0.8
    assert finetuned.result["val_accuracy"] >= 0.8  # a guess is right in 1 of 3


def test_the_accuracy_it_reports_is_that_of_the_saved_model(finetuned: Done, shapes: Path) -> None:
    source = open_source(shapes, "val")
    answers = list(Engine(finetuned.folder).classify(source.paths))
    right = [a.label == source.classes[n] for a, n in zip(answers, source.labels, strict=True)]
    assert finetuned.result["val_accuracy"] == sum(right) / len(right)
    assert f"{sum(right) / len(right):.1%} of 15 validation pictures right" in finetuned.said


def test_the_model_has_the_classes_of_the_folders(finetuned: Done) -> None:
    model = load(finetuned.folder)
    assert isinstance(model, BeitForImageClassification)
    assert model.id2label == dict(enumerate(CLASSES))
    assert model.config.num_classes == 3
    assert model.config.rel_pos_bias == "per_block"


def test_the_folder_is_as_documented(finetuned: Done) -> None:
    assert sorted(p.name for p in finetuned.folder.iterdir()) == [
        "README.md", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors",
        "preprocessor_config.json", "run.toml",
    ]  # fmt: skip
    assert [line["step"] for line in finetuned.metrics] == [10, 20, 30, 40, 50]


def test_what_was_taken_from_the_pretrained_model_is_told(finetuned: Done, pretrained: Done) -> None:
    assert f"{pretrained.folder}: used " in finetuned.said
    assert "new fc_norm, head" in finetuned.said


@pytest.fixture
def short(pretrained: Done) -> dict[str, Any]:
    return {**FINETUNE, "model": pretrained.folder, "steps": 6}


def test_it_begins_with_the_pretrained_encoder(
    shapes: Path, tmp_path: Path, short: dict[str, Any], pretrained: Done
) -> None:
    """At a learning rate of nothing the encoder stays what it was."""
    done = run(tmp_path / "run", "finetune", shapes, **{**short, "lr": 0, "min_lr": 0, "steps": 2})
    ours, theirs = load(done.folder).state_dict(), load(pretrained.folder).state_dict()
    shared = theirs["rel_pos_bias.relative_position_bias_table"]
    for name, tensor in ours.items():
        if name.endswith("relative_position_bias_table"):
            assert torch.equal(tensor, shared), name
        elif name.startswith(("blocks", "patch_embed", "cls_token")):
            assert torch.equal(tensor, theirs[name]), name


def test_same_seed_gives_bit_equal_weights_and_a_stopped_run_goes_on_to_them(
    shapes: Path, tmp_path: Path, short: dict[str, Any], broken_run: Broken
) -> None:
    options = {**short, "drop_path": 0.5}
    one = run(tmp_path / "1", "finetune", shapes, **options, workers=0)
    broken = broken_run(4, "finetune", shapes, **options)
    same_weights(one, broken)
    assert one.result == broken.result
    other = run(tmp_path / "2", "finetune", shapes, **options, seed=1)
    assert not torch.equal(one.weights["classifier.weight"], other.weights["classifier.weight"])


def test_published_augmentation_trains_and_a_stopped_run_goes_on_to_the_same_weights(
    shapes: Path, broken_run: Broken, tmp_path: Path
) -> None:
    options = {"model": "beit_mini_patch8_32", "steps": 12, **FINETUNE}
    published = {"rand_augment": 9, "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0}
    whole = run(tmp_path / "whole", "finetune", shapes, **options, **published)
    same_weights(broken_run(7, "finetune", shapes, **options, **published), whole)
    plain = run(tmp_path / "plain", "finetune", shapes, **options).weights["classifier.weight"]
    for name, value in published.items():
        changed = run(tmp_path / name, "finetune", shapes, **options, **{name: value})
        assert not torch.equal(changed.weights["classifier.weight"], plain), name


def test_augmentation_is_off_unless_asked_for() -> None:
    settings = Finetune(Path("data"), model="beit_mini_patch8_32", out=Path("run"))
    assert (settings.rand_augment, settings.reprob, settings.mixup, settings.cutmix) == (0, 0, 0, 0)


def test_without_a_model_folder_a_size_begins_from_nothing(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    done = run(tmp_path / "run", "finetune", shapes, **{**short, "model": "beit_mini_patch8_32"})
    expected = VARIANTS["beit_mini_patch8_32"].for_classification(3)
    assert load(done.folder).config.grid == expected.grid
    assert "a fresh network, nothing is loaded" in done.said


def test_pictures_may_be_larger_than_in_pretraining(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    done = run(tmp_path / "run", "finetune", shapes, **{**short, "img_size": 48, "steps": 2})
    model = load(done.folder)
    assert model.config.grid == (6, 6)
    assert model.image_spec.size == (48, 48)
    assert "resized blocks.*.attn.relative_position_bias_table" in done.said


def test_a_csv_of_labels_trains_and_another_validates(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    for name, split in (("some.csv", "train"), ("val.csv", "val")):
        source = open_source(shapes, split)
        with (tmp_path / name).open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["path", "label"])
            for path, label in zip(source.paths, source.labels, strict=True):
                writer.writerow([path, f"a {source.classes[label]}"])
    done = run(tmp_path / "run", "finetune", tmp_path / "some.csv", **short, val=tmp_path / "val.csv")
    assert list(load(done.folder).id2label.values()) == ["a disc", "a square", "a triangle"]
    assert 0 <= done.result["val_accuracy"] <= 1


def test_without_validation_pictures_no_accuracy_is_claimed(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    done = run(tmp_path / "run", "finetune", shapes / "train", **short)
    assert done.result == {"steps": 6}
    assert "validation" not in done.said


def test_layer_decay_slows_the_lower_layers(
    shapes: Path, tmp_path: Path, short: dict[str, Any], pretrained: Done
) -> None:
    """Adam's steps are as long as the rate: at 0.5 the lowest of 4 blocks moves 0.5^4 as far as at 1."""
    start = load(pretrained.folder).state_dict()

    def moved(layer_decay: float) -> dict[str, float]:
        options = {**short, "layer_decay": layer_decay, "steps": 1, "weight_decay": 0}
        done = run(tmp_path / f"{layer_decay}", "finetune", shapes, **options)
        ours = load(done.folder).state_dict()
        return {name: float((ours[name] - start[name]).abs().median()) for name in layers}

    layers = {"patch_embed.proj.weight": 5, "blocks.0.mlp.fc1.weight": 4, "blocks.3.mlp.fc1.weight": 1}
    slow, same = moved(0.5), moved(1.0)
    for name, below_the_head in layers.items():
        assert slow[name] / same[name] == pytest.approx(0.5**below_the_head, rel=0.02), name


@pytest.mark.parametrize(
    ("wrong", "code", "cause"),
    [
        ({"model": "beit_bas_patch16_224"}, 2, "did you mean beit_base_patch16_224"),
        ({"model": "runs/nothing"}, 5, "runs/nothing does not exist"),
        ({"img_size": 30}, 2, "img_size 30 is not a multiple of patch_size 8; use 24 or 32"),
        ({"batch_size": 0}, 2, "--batch-size"),
        ({"steps": -1}, 2, "--steps"),
        ({"crop_ratio": 1.2}, 2, "crop_ratio 1.2 is not in (0, 1]"),
        ({"val": "nowhere"}, 2, "nowhere does not exist"),
    ],
)
def test_wrong_settings_are_named_and_leave_no_folder(
    cli: Cli, shapes: Path, tmp_path: Path, short: dict[str, Any], wrong: Any, code: int, cause: str
) -> None:
    options = {**short, **wrong, "out": tmp_path / "run"}
    ours, out, err = cli("finetune", shapes, **options)
    assert (ours, out) == (code, "")
    assert cause in err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_ends_with_5(
    cli: Cli, shapes: Path, tmp_path: Path, short: dict[str, Any], tokenizer: Done
) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.toml").write_text('command = "Pretrain"\n')
    for place, cause in (
        (tmp_path / "unfinished", "has not finished; give its command again"),
        (tokenizer.folder, "not a BEiT encoder; give it as --tokenizer"),
        (shapes, "has no config.json"),
    ):
        options = {**short, "model": place, "out": tmp_path / "run"}
        code, out, err = cli("finetune", shapes, **options)
        assert (code, out) == (5, "")
        assert cause in err
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_learned_from_is_named(
    cli: Cli, shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    other = write_shapes(tmp_path / "other", 1, seed=3)
    (other / "square").rename(other / "hexagon")
    for data, val, cause in (
        (shapes / "train" / "disc", None, "has no classes; put each class's pictures in a folder"),
        (tmp_path / "one", None, "has one class (disc); two or more are needed"),
        (shapes / "train", other, "classes the model does not know: hexagon"),
    ):
        if data.name == "one":
            (data / "disc").mkdir(parents=True)
            (data / "disc" / "1.png").write_bytes((other / "disc" / "00.png").read_bytes())
        options = {**short, "out": tmp_path / "run"} | ({"val": val} if val else {})
        code, _, err = cli("finetune", data, **options)
        assert code == 2
        assert cause in err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_things_is_kept(
    cli: Cli, shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = cli("finetune", shapes, **short, out=tmp_path, overwrite=True)
    assert code == 2
    assert "is not empty and holds no run" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
