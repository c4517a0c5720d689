"""`beit finetune` on a few pictures of shapes."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Cli, command_line, write_shapes
from forked import beit as beit_command
from forked import ranks
from PIL import Image
from safetensors.torch import load_file, save_file

import beit.commands.finetune
import beit.finetune_defaults
import beit.validation
from beit.augment import EraseAndMix
from beit.checkpoints import load, save
from beit.commands.finetune import Finetune, length_of
from beit.criterion import Criterion
from beit.data import open_source
from beit.engine import Engine
from beit.frozen import frozen_classifier
from beit.image import BadImage, preprocess, read_image, transformers_spec
from beit.model import VARIANTS, BeitForImageClassification
from beit.recipes import FOLDER
from beit.run import NotFinite, read_metrics

from .conftest import FINETUNE, Broken, Done, Stopping, run, same_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
        "README.md", "best", "checkpoints", "config.json", "label_review.csv", "metrics.jsonl",
        "model.safetensors", "preprocessor_config.json", "report.html", "resolved.toml", "run.toml",
        "validation.jsonl",
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


def test_a_run_stopped_at_twenty_points_drawn_at_random_is_that_of_an_unbroken_one(
    shapes: Path, tmp_path: Path, stopped_run: Stopping
) -> None:
    """At each of them weights, moments and average are equal bit for bit, and so is what comes out."""
    options = {
        **FINETUNE, "model": "beit_mini_patch8_32", "steps": 40, "save_every": 1, "keep_last": 40,
        "drop_path": 0.3, "ema_decay": 0.9, "clip_grad_norm": 1.0, "rand_augment": 9, "reprob": 0.25,
        "mixup": 0.8, "cutmix": 1.0, "workers": 0, "no_report": True,
    }  # fmt: skip
    whole = run(tmp_path / "whole", "finetune", shapes, **options)
    points = np.sort(np.random.default_rng(20).permutation(np.arange(1, 40))[:20]).tolist()
    out, before = tmp_path / "broken", 0
    for point in points:
        stopped_run(out, point - before, point, "finetune", shapes, **options)
        before = point
        for file in ("model", "optimizer", "ema"):
            name = Path("checkpoints", f"step-{point:08d}", f"{file}.safetensors")
            assert (out / name).read_bytes() == (whole.folder / name).read_bytes(), name
    broken = run(out, "finetune", shapes, **options)
    same_weights(broken, whole)
    assert broken.result == whole.result
    looks = [read_metrics(done.folder / "validation.jsonl") for done in (broken, whole)]
    assert looks[0] == looks[1]


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


@pytest.mark.parametrize("recipe", ["digits", "digits_long"])
def test_our_recipes_run(shapes: Path, tmp_path: Path, cli: Cli, recipe: str) -> None:
    options = {"recipe": recipe, "model": "beit_mini_patch8_32", "steps": 2, "no_report": True}
    code, _, err = cli("finetune", shapes / "train", **options, out=tmp_path / "run", workers=0)
    assert code == 0, err
    wanted = tomllib.loads((FOLDER / "finetune" / f"{recipe}.toml").read_text())["settings"]
    settings = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    assert {key: settings[key] for key in wanted} == {**wanted, "steps": 2}


IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122  # pictures to train on


@pytest.mark.parametrize(
    ("recipe", "pictures", "steps"),  # floor(pictures / batch) of an epoch, times the published epochs
    [
        ("beit_base_1k", IMAGENET_1K, (100 * 1251, 20 * 1251)),
        ("beit_base_22k", IMAGENET_22K, (90 * 3466, 5 * 3466)),
        ("beit_base_22kto1k", IMAGENET_1K, (30 * 2502, 5 * 2502)),
        ("beit_base_22kto1k_384", IMAGENET_1K, (30 * 2502, 5 * 2502)),
        ("beit_large_1k", IMAGENET_1K, (50 * 1251, 5 * 1251)),
        ("beit_large_22k", IMAGENET_22K, (90 * 6932, 5 * 6932)),
        ("beit_large_22kto1k", IMAGENET_1K, (30 * 2502, 5 * 2502)),
        ("beit_large_22kto1k_384", IMAGENET_1K, (30 * 2502, 5 * 2502)),
        ("beit_large_22kto1k_512", IMAGENET_1K, (30 * 2502, 5 * 2502)),
        ("beitv2_base_1k", IMAGENET_1K, (100 * 1251, 20 * 1251)),
        ("beitv2_base_21k", IMAGENET_22K, (90 * 3466, 20 * 3466)),
        ("beitv2_base_21kto1k", IMAGENET_1K, (30 * 1251, 20 * 1251)),
        ("beitv2_base_300_1k", IMAGENET_1K, (100 * 1251, 20 * 1251)),
        ("beitv2_large_1k", IMAGENET_1K, (50 * 1251, 5 * 1251)),
        ("beitv2_large_21k", IMAGENET_22K, (90 * 3466, 20 * 3466)),
        ("beitv2_large_21kto1k", IMAGENET_1K, (20 * 1251, 5 * 1251)),
        ("beitv2_large_300_1k", IMAGENET_1K, (50 * 1251, 5 * 1251)),
        ("digits", 1_169, (800, 160)),  # ours, which leaves the warm-up to the command
    ],
)
def test_each_recipe_is_as_long_and_warms_up_as_long_as_published(
    recipe: str, pictures: int, steps: tuple[int, int]
) -> None:
    settings = tomllib.loads((FOLDER / "finetune" / f"{recipe}.toml").read_text())["settings"]
    assert length_of(Finetune(Path("data"), **settings), pictures) == steps


def test_a_warm_up_is_capped_only_where_none_was_given() -> None:
    ten = Finetune(Path("data"), batch_size=10, epochs=10)
    assert length_of(ten, 1000) == (1000, 200)
    assert length_of(replace(ten, epochs=200), 1000) == (20_000, 2000)
    assert length_of(replace(ten, warmup_epochs=9.5), 1000) == (1000, 950)
    assert length_of(replace(ten, steps=6), 1000) == (6, 1)
    with pytest.raises(ValueError, match=r"warmup_epochs 10 is 1,000 steps, and the run has 1,000"):
        length_of(replace(ten, warmup_epochs=10), 1000)


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


def test_another_fine_tuning_keeps_what_the_head_knows_by_name(
    shapes: Path, tmp_path: Path, short: dict[str, Any], finetuned: Done
) -> None:
    """At a rate of nothing the rows of two of three classes are what they were; a new class drops all."""
    options = {**short, "model": finetuned.folder, "lr": 0, "min_lr": 0, "steps": 1, "no_report": True}
    shutil.copytree(shapes, tmp_path / "data")
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / "data" / part / "disc")
    two = run(tmp_path / "two", "finetune", tmp_path / "data", **options)
    assert list(load(two.folder).id2label.values()) == ["square", "triangle"]
    assert torch.equal(two.weights["classifier.weight"], finetuned.weights["classifier.weight"][1:])
    assert "matched head" in two.said
    for part in ("train", "val"):
        (tmp_path / "data" / part / "square").rename(tmp_path / "data" / part / "hexagon")
    other = run(tmp_path / "other", "finetune", tmp_path / "data", **options)
    assert "new head" in other.said


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
    done = run(tmp_path / "run", "finetune", shapes / "train", **short, val_share=0)
    assert done.result == {"steps": 6}
    assert "validation pictures" not in done.said


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
        ({"warmup_epochs": 2}, 2, "warmup_epochs 2 is 6 steps, and the run has 6"),
        ({"crop_ratio": 1.2}, 2, '"1.2" for --crop-ratio. Must be <= 1'),
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
        (
            tokenizer.folder,
            "not a BEiT encoder or a plain ViT; it is what `beit pretrain DATA --tokenizer` takes",
        ),
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
        (shapes / "train", other, "classes the training part does not know: hexagon"),
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


# --- The loop --------------------------------------------------------------------------------------

MINI: dict[str, Any] = {**FINETUNE, "model": "beit_mini_patch8_32", "drop_path": 0, "steps": 6}


def test_parts_of_a_batch_train_as_the_whole_does(shapes: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "finetune", shapes, **MINI, use_epoch="last")
    parts = run(
        tmp_path / "parts", "finetune", shapes, **MINI, use_epoch="last", device_batch_size=5,
        gradient_checkpointing=True,
    )  # fmt: skip
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


def test_a_set_smaller_than_a_batch_is_taken_in_parts_too(shapes: Path, tmp_path: Path) -> None:
    options = {**MINI, "batch_size": 64, "use_epoch": "last"}
    whole = run(tmp_path / "whole", "finetune", shapes, **options)
    parts = run(tmp_path / "parts", "finetune", shapes, **options, device_batch_size=1)
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


def test_two_processes_train_what_one_does(shapes: Path, tmp_path: Path) -> None:
    """The augmentation of a picture does not depend on who prepares it; a mix of pictures does."""
    options = {**MINI, "rand_augment": 9, "ema_decay": 0.9, "log_every": 1}
    one = run(tmp_path / "one", "finetune", shapes, **options)
    both = ranks(2, beit_command, *command_line("finetune", shapes, **options, out=tmp_path / "two"))
    said = "".join(rank.communicate()[1] for rank in both)
    assert [rank.returncode for rank in both] == [0, 0], said
    two = Done(tmp_path / "two", {}, said)
    assert said.count("a fresh network, nothing is loaded") == 1
    assert [line["step"] for line in two.metrics] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=1e-6)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(two.weights[name], tensor, atol=5e-5, rtol=1e-3, msg=name)
    ours, theirs = (read_metrics(d.folder / "validation.jsonl") for d in (two, one))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [3, 6]
    assert [line["accuracy"] for line in ours] == [line["accuracy"] for line in theirs]


def test_the_average_of_the_weights_is_validated_and_saved(shapes: Path, tmp_path: Path) -> None:
    options = {**MINI, "use_epoch": "last", "save_every": 1, "keep_last": 10}
    plain = run(tmp_path / "plain", "finetune", shapes, **options)
    done = run(tmp_path / "ema", "finetune", shapes, **options, ema_decay=0.5)
    steps = [
        load_file(done.folder / "checkpoints" / f"step-{n:08d}" / "model.safetensors")
        for n in range(1, 7)
    ]
    last = load_file(plain.folder / "checkpoints" / "step-00000006" / "model.safetensors")
    torch.testing.assert_close(steps[-1]["head.weight"], last["head.weight"], rtol=0, atol=0)
    first = load_file(done.folder / "checkpoints" / "step-00000001" / "ema.safetensors")["head.weight"]
    average = first
    for before, step in enumerate(steps[1:], 1):
        decay = min(0.5, (1 + before) / (10 + before))
        average = decay * average + (1 - decay) * step["head.weight"]
    torch.testing.assert_close(done.weights["classifier.weight"], average)
    said = done.result["val_accuracy"]
    assert said == read_metrics(done.folder / "validation.jsonl")[-1]["accuracy"]


@pytest.mark.parametrize("fault", ["unreadable", "not finite"])
def test_a_look_that_fails_later_is_left_out_and_ends_no_training(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    options = {**MINI, "steps": 9}
    whole = run(tmp_path / "whole", "finetune", shapes, **options, use_epoch="last")
    honest, looked = beit.validation.logits_of, 0

    def failing(*given: Any) -> np.ndarray:
        nonlocal looked
        looked += 1
        if looked == 2 and fault == "unreadable":
            raise BadImage("unreadable", "a.png", "no file")
        return honest(*given) * (math.nan if looked == 2 else 1)

    monkeypatch.setattr(beit.validation, "logits_of", failing)
    done = run(tmp_path / "run", "finetune", shapes, **options, use_epoch="last")
    why = {"unreadable": "a.png: no file", "not finite": "the loss on the validation pictures is nan"}
    assert f"the look at step 6 is left out, and the training goes on: {why[fault]}" in done.said
    assert [line["step"] for line in read_metrics(done.folder / "validation.jsonl")] == [3, 9]
    same_weights(done, whole)
    looked = 1
    with pytest.raises((BadImage, NotFinite), match=why[fault]):
        run(tmp_path / "first", "finetune", shapes, **options)


def test_the_start_may_move_and_another_is_refused(
    shapes: Path, tmp_path: Path, pretrained: Done
) -> None:
    start = shutil.copytree(pretrained.folder, tmp_path / "start")
    options = {**FINETUNE, "steps": 1, "method": "full"}
    first = run(tmp_path / "run", "finetune", shapes, model=start, **options)
    start = start.rename(tmp_path / "moved")
    same_weights(run(tmp_path / "run", "finetune", shapes, model=start, **options), first)
    weights = load_file(start / "model.safetensors")
    name = next(name for name in weights if name.endswith("cls_token"))
    save_file({**weights, name: weights[name] + 1}, start / "model.safetensors")
    with pytest.raises(ValueError, match=f"{start} is another model now"):
        run(tmp_path / "run", "finetune", shapes, model=start, **options)


def test_the_best_epoch_is_kept_and_a_broken_run_keeps_the_same(
    shapes: Path, tmp_path: Path, short: dict[str, Any], broken_run: Broken
) -> None:
    """At a wild rate the last epoch is not the best."""
    options = {**short, "steps": 18, "lr": 0.05, "precision": "fp32"}
    done = run(tmp_path / "run", "finetune", shapes, **options)
    looks = read_metrics(done.folder / "validation.jsonl")
    assert [look["step"] for look in looks] == [3, 6, 9, 12, 15, 18]
    best = max(looks, key=lambda look: (look["accuracy"], -look["loss"]))
    assert done.result["best_step"] == best["step"]
    assert done.result["val_accuracy"] == best["accuracy"]
    broken = broken_run(7, "finetune", shapes, **options)
    same_weights(broken, done)
    assert read_metrics(broken.folder / "validation.jsonl") == looks
    last = run(tmp_path / "last", "finetune", shapes, **options, use_epoch="last")
    assert last.result["val_accuracy"] == looks[-1]["accuracy"]
    with (broken.folder / "validation.jsonl").open("a") as file:
        file.write('{"step": 21, "accu')  # as a full disk leaves it
    longer = run(broken.folder, "finetune", shapes, **options)
    assert longer.result["best_step"] == best["step"]
    again = run(tmp_path / "run", "finetune", shapes, **options)  # a finished run, once more
    assert again.result == done.result


def test_a_step_that_is_not_finite_moves_nothing(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def spoiled(self: Criterion, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=self.smoothing)
        return loss * math.nan if calls == 6 else loss

    monkeypatch.setattr(Criterion, "__call__", spoiled)
    options = {**MINI, "save_every": 1, "keep_last": 10, "log_every": 1, "workers": 0}
    done = run(tmp_path / "run", "finetune", shapes, **options)
    before, after = (
        load_file(done.folder / "checkpoints" / f"step-0000000{n}" / "model.safetensors") for n in (5, 6)
    )
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    state = done.folder / "checkpoints" / "step-00000006" / "state.json"
    assert json.loads(state.read_text())["skipped"] == 1
    assert (done.folder / "nonfinite" / "step-00000005").is_dir()


def test_speed_waiting_and_memory_are_logged(finetuned: Done) -> None:
    for line in finetuned.metrics:
        assert line["images_per_second"] > 0
        assert line["memory_mib"] > 0
        assert 0 <= line["data_wait_percent"] <= 100
        assert 0 < line["mfu_percent"] < 100


def test_a_look_does_not_slow_the_pace(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = beit.commands.finetune.Validation.look

    def slow(self: Any, step: int, weights: Any) -> None:
        if step < 6:
            time.sleep(3)
        look(self, step, weights)

    monkeypatch.setattr(beit.commands.finetune.Validation, "look", slow)
    done = run(tmp_path / "run", "finetune", shapes, **{**MINI, "log_every": 1}, workers=0)
    slowed = done.metrics[3]  # the fourth step begins with the look after the third
    assert 12 / slowed["images_per_second"] < 2


# --- What no flag says -------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "hflip": 0.0,
    "crop_ratio": 1,
    "workers": 0,
}


def settings_of(done: Done) -> dict[str, Any]:
    return tomllib.loads((done.folder / "run.toml").read_text())


def test_a_folder_alone_is_enough(
    shapes: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shapes / "train", tmp_path / "my shapes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beit.finetune_defaults, "IMAGE_PASSES", 100)
    code, out, err = cli("finetune", "my shapes")
    assert (code, out) == (0, "")
    assert "no --model was named: beit_mini_patch8_32 begins from nothing" in err
    assert "give -m beit_base_patch16_224_pt22k" in err
    assert "6 of 36 pictures are held out" in err
    settings = tomllib.loads((tmp_path / "my shapes.run" / "run.toml").read_text())
    chosen = {
        "model": "beit_mini_patch8_32", "method": "best", "batch_size": 8, "lr": 0.001,
        "layer_decay": 1.0, "crop_scale": [0.3, 1.0], "epochs": 10, "out": "my shapes.run",
    }  # fmt: skip
    assert {key: settings[key] for key in chosen} == chosen
    for name, value in chosen.items():
        if name not in ("out", "crop_scale"):
            assert f"{name} {value}" in err
    with (tmp_path / "my shapes.run" / "split.csv").open(newline="") as stream:
        parts = [row["part"] for row in csv.DictReader(stream)]
    assert (parts.count("train"), parts.count("val")) == (30, 6)
    assert "validation pictures right" in err
    reported = json.loads((tmp_path / "my shapes.run" / "config.json").read_text())["beit"]["provenance"]
    code, out, err = cli("evaluate", "my shapes", model="my shapes.run", json=True)
    assert code == 0
    assert "30 of 36 pictures are those that my shapes.run was trained on" in err
    assert "held out: beit evaluate 'my shapes.run/split.csv' -m 'my shapes.run'" in err
    assert json.loads(out)["trained_on"] == 30
    code, out, err = cli("evaluate", "my shapes.run/split.csv", model="my shapes.run", json=True)
    assert (code, err) == (0, "")
    held_out = json.loads(out)
    assert (held_out["trained_on"], held_out["pictures"]) == (0, 6)
    assert held_out["top1"] == reported["val_accuracy"]
    options = {"model": "my shapes.run", "split": "train", "json": True}
    _, out, err = cli("evaluate", "my shapes.run/split.csv", **options)
    assert json.loads(out)["pictures"] == 30
    assert "30 of 30 pictures are those" in err
    code, _, err = cli("evaluate", "my shapes.run/split.csv", model="my shapes.run", split="test")
    assert code == 2
    assert "no row of the part 'test'; its parts are train, val" in err
    code, out, _ = cli("classify", tmp_path / "my shapes" / "disc" / "00.png", model="my shapes.run")
    assert code == 0


def test_given_settings_are_not_changed(shapes: Path, tmp_path: Path) -> None:
    given = {"epochs": 2, "lr": 0.002, "batch_size": 4, "layer_decay": 0.9, "method": "full"}
    done = run(tmp_path / "run", "finetune", shapes, **QUICK, **given)
    settings = settings_of(done)
    assert {key: settings[key] for key in given} == given
    assert settings["crop_scale"] == [0.08, 1.0]
    assert "class_weights" not in settings
    assert "linear head" not in done.said


def test_few_pictures_and_a_trained_model_give_a_head_on_frozen_features(
    shapes: Path, tmp_path: Path, pretrained: Done
) -> None:
    done = run(tmp_path / "run", "finetune", shapes, **QUICK, model=pretrained.folder)
    assert settings_of(done)["method"] == "head"
    assert done.metrics == []
    model, start = load(done.folder), load(pretrained.folder)
    layer = done.result["head_layer"]
    assert model.config.depth == layer <= 4
    for name, tensor in model.state_dict().items():
        if name.startswith(("blocks", "patch_embed", "cls_token")) and "bias_table" not in name:
            assert torch.equal(tensor, start.state_dict()[name]), name
    answers = Engine(model).logits_of(open_source(shapes, "val")).argmax(axis=1)
    right = (answers == open_source(shapes, "val").labels).mean()
    assert done.result["val_accuracy"] == right
    assert done.result["val_accuracy"] > 0.5
    again = run(tmp_path / "run", "finetune", shapes, **QUICK, model=pretrained.folder)
    assert again.result == done.result


def test_the_result_is_never_below_the_head_on_frozen_features(
    shapes: Path, tmp_path: Path, pretrained: Done
) -> None:
    """Two steps at a rate of nothing leave a head that knows nothing."""
    options = {**QUICK, "model": pretrained.folder, "method": "best", "steps": 2, "lr": 0, "min_lr": 0}
    done = run(tmp_path / "run", "finetune", shapes, **options)
    assert "the head is taken" in done.said
    assert done.result["method"] == "linear head on frozen features"
    assert done.result["val_accuracy"] == done.result["head_accuracy"]
    assert done.result["head_accuracy"] > done.result["finetuned_accuracy"]


def test_fine_tuning_that_is_better_is_taken(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FINETUNE, "model": "beit_mini_patch8_32", "method": "best", "steps": 60}

    def nothing(*_: Any) -> Any:
        frozen = frozen_classifier(*_)
        torch.nn.init.zeros_(frozen.model.head.weight)
        return frozen

    monkeypatch.setattr(beit.commands.finetune, "frozen_classifier", nothing)
    done = run(tmp_path / "run", "finetune", shapes, **options)
    assert done.result["method"] == "fine-tuned"
    assert done.result["val_accuracy"] == done.result["finetuned_accuracy"]


def test_the_saved_model_is_calibrated_on_the_validation_pictures(
    tmp_path: Path, pretrained: Done
) -> None:
    """No other temperature fits them better, and the engine's probabilities are these."""
    write_shapes(tmp_path / "train", 12, seed=0)
    write_shapes(tmp_path / "val", 20, seed=1)
    options = {**FINETUNE, "model": pretrained.folder, "steps": 15}
    done = run(tmp_path / "run", "finetune", tmp_path, **options)
    plain = run(tmp_path / "plain", "finetune", tmp_path, **options, no_calibrate=True)
    assert done.result["val_accuracy"] == plain.result["val_accuracy"]
    config = json.loads((done.folder / "config.json").read_text())
    assert config["beit"]["provenance"]["temperature"] == done.result["temperature"]
    val = open_source(tmp_path, "val")
    ours, theirs = (Engine(d.folder, precision="fp32").logits_of(val) for d in (done, plain))
    np.testing.assert_allclose(ours * done.result["temperature"], theirs, atol=1e-4)
    truth = torch.from_numpy(val.labels)
    losses = [float(F.cross_entropy(torch.from_numpy(ours) * t, truth)) for t in (0.9, 1.0, 1.1)]
    assert min(losses) == losses[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("squash", "bilinear", 1.0)),
        ({"crop_ratio": 0.5}, ("short_side", "bilinear", 0.5)),
        ({"preset": "unilm"}, ("short_side", "bicubic", 0.875)),
        ({"preset": "unilm", "crop_ratio": 1}, ("short_side", "bicubic", 1.0)),
    ],
)
def test_the_preparation_is_the_models_unless_another_is_asked_for(
    shapes: Path, tmp_path: Path, pretrained: Done, options: dict[str, Any], expected: Any
) -> None:
    start = load(pretrained.folder)
    start.image_spec = transformers_spec(32)  # as those released have it
    save(start, tmp_path / "start")
    done = run(
        tmp_path / "run", "finetune", shapes, **{**QUICK, "crop_ratio": None, **options},
        method="head", model=tmp_path / "start",
    )  # fmt: skip
    spec = load(done.folder).image_spec
    assert (spec.resize, spec.filter, spec.crop_ratio) == expected


def test_a_rectangular_model_learns_from_rectangles(
    shapes: Path, tmp_path: Path, pretrained: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(load(pretrained.folder, img_size=(32, 64)), tmp_path / "start")
    seen = []
    normalise = beit.commands.finetune.normalise

    def watch(images: torch.Tensor, spec: Any) -> torch.Tensor:
        seen.append(tuple(images.shape[2:]))
        return normalise(images, spec)

    monkeypatch.setattr(beit.commands.finetune, "normalise", watch)
    options = {**FINETUNE, "model": tmp_path / "start", "steps": 2}
    done = run(tmp_path / "run", "finetune", shapes, **options)
    assert set(seen) == {(32, 64)}
    assert load(done.folder).config.img_size == (32, 64)


def test_what_a_linear_head_has_no_use_for_is_named(
    shapes: Path, tmp_path: Path, pretrained: Done
) -> None:
    options = {"model": pretrained.folder, "hflip": 0, "mixup": 0.8, "workers": 0}
    done = run(tmp_path / "run", "finetune", shapes, **options, method="head")
    assert "not used: hflip, mixup; a linear head is fitted" in done.said


def test_the_page_shows_the_first_batch_as_the_network_saw_it(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which partner a picture is mixed with, and where boxes are erased, depends on the whole batch."""
    seen: list[torch.Tensor] = []
    erase_and_mix = EraseAndMix.__call__

    def watch(*given: Any) -> Any:
        images, wanted = erase_and_mix(*given)
        seen.append(images.clone())
        return images, wanted

    monkeypatch.setattr(EraseAndMix, "__call__", watch)
    options = {**FINETUNE, "model": "beit_mini_patch8_32", "steps": 2, "batch_size": 24}
    run(tmp_path / "run", "finetune", shapes, **options, mixup=0.8, cutmix=1.0, reprob=0.5, report=True)
    first, second, shown = seen
    torch.testing.assert_close(shown, first, atol=0, rtol=0)
    assert not torch.equal(first, second)


def test_unbalanced_classes_are_weighed_and_said_so(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beit.finetune_defaults, "IMAGE_PASSES", 100)
    shutil.copytree(shapes / "train", tmp_path / "data")
    for number in range(4, 12):
        (tmp_path / "data" / "disc" / f"{number:02d}.png").unlink()
    done = run(tmp_path / "run", "finetune", tmp_path / "data", **QUICK)
    assert settings_of(done)["class_weights"] is True
    assert "classes have 3 to 10 pictures: rare ones count more in the loss" in done.said


def test_a_csv_with_several_labels_trains_a_question_a_class(tmp_path: Path) -> None:
    write_shapes(tmp_path, 16, seed=0)
    rows = ["path,label"]
    for shape in ("disc", "square", "triangle"):
        for number in range(16):
            words = [shape, *(["edges"] if shape != "disc" else ["warm"])]
            rows.append(f"{shape}/{number:02d}.png,{';'.join(words)}")
    (tmp_path / "some.csv").write_text("\n".join(rows) + "\n")
    options = {**FINETUNE, "model": "beit_mini_patch8_32", "steps": 60, "mixup": 0.8, "cutmix": 1.0}
    done = run(tmp_path / "run", "finetune", tmp_path / "some.csv", **options)
    assert list(load(done.folder).id2label.values()) == ["disc", "edges", "square", "triangle", "warm"]
    assert "mean average precision on 9 validation pictures" in done.said
    page = (done.folder / "report.html").read_text()
    assert "share of yes and no right" in page  # not in one chart with mean average precision
    with pytest.raises(ValueError, match="--class-weights is for one label a picture"):
        run(tmp_path / "weighed", "finetune", tmp_path / "some.csv", **options, class_weights=True)
    assert done.result["val_accuracy"] > 0.8  # chance is about the classes' shares, 0.44
    config = json.loads((done.folder / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"  # transformers' word for it
    picture = tmp_path / "disc" / "00.png"
    engine = Engine(done.folder, "torch", "fp32")
    (answer,) = engine.classify(picture)
    logits = engine.logits_array(preprocess(read_image(picture), engine.image_spec)[None])[0]
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert dict(answer.top) == pytest.approx(dict(zip(engine.labels, scores, strict=True)), abs=1e-6)
    assert sum(score for _, score in answer.top) != pytest.approx(1, abs=0.05), "no softmax"


def test_a_wrong_one_of_several_labels_is_on_the_review_list(tmp_path: Path, pretrained: Done) -> None:
    write_shapes(tmp_path, 16, seed=0)
    rows = ["path,label"]
    for shape in ("disc", "square", "triangle"):
        rows += [f"{shape}/{i:02d}.png,{shape}{';edges' if shape != 'disc' else ''}" for i in range(16)]
    rows[rows.index("disc/03.png,disc")] = "disc/03.png,disc;edges"
    rows[rows.index("square/05.png,square;edges")] = "square/05.png,square"
    (tmp_path / "some.csv").write_text("\n".join(rows) + "\n")
    done = run(tmp_path / "run", "finetune", tmp_path / "some.csv", **QUICK, model=pretrained.folder)
    with (done.folder / "label_review.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 48
    first = {(row["path"][-len("disc/03.png") :], row["label"], row["suggested"]) for row in found[:8]}
    assert ("disc/03.png", "disc;edges", "disc") in first
    assert ("uare/05.png", "square", "edges;square") in first
    confidence = [float(row["confidence"]) for row in found]
    assert confidence == sorted(confidence, reverse=True)
    assert "of the answers that it has not seen" in (done.folder / "report.html").read_text()


# --- The page ----------------------------------------------------------------------------------------


def test_the_page_is_whole_small_and_needs_no_network(finetuned: Done) -> None:
    page = (finetuned.folder / "report.html").read_text()
    for section in (
        "Result", "Curves", "Confusions", "Classes", "Calibration", "The worst mistakes",
        "Labels that may be wrong", "Pictures that are there twice", "A batch as the network saw it",
        "How it was made", "All settings",
    ):  # fmt: skip
        assert f">{section}<" in page, section
    assert f"<td>{finetuned.result['val_accuracy']:.1%}</td>" in page
    assert len(page) < 5_000_000
    assert "<script" not in page
    assert not set(re.findall(r"https?://[^\s\"']+", page)) - {"http://www.w3.org/2000/svg"}
    config = json.loads((finetuned.folder / "config.json").read_text())
    assert config["beit"]["provenance"]["data_hash"] in page
    assert "lr = 0.002" in page


def test_the_command_on_the_page_does_it_again(shapes: Path, tmp_path: Path, cli: Cli) -> None:
    data = shutil.copytree(shapes, tmp_path / "my pictures")
    done = run(tmp_path / "run", "finetune", data, **{**MINI, "steps": 3})
    page = (done.folder / "report.html").read_text()
    words = shlex.split(html.unescape(re.findall(r"<pre>(beit finetune .*?)</pre>", page)[0]))
    code, _, err = cli(*words[1:-1], tmp_path / "again")
    assert code == 0, err
    same_weights(done, Done(tmp_path / "again", {}, ""))


def test_planted_copies_and_wrong_labels_are_on_the_page(
    shapes: Path, tmp_path: Path, pretrained: Done
) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    for number in range(3):  # copies in both parts
        name = tmp_path / "data" / "train" / "disc" / f"{number:02d}.png"
        shutil.copy(name, tmp_path / "data" / "val" / "disc" / f"leak-{number}.png")
    for name in ("05", "06"):  # discs among the squares
        wrong = tmp_path / "data" / "train" / "square" / f"wrong-{name}.png"
        (tmp_path / "data" / "train" / "disc" / f"{name}.png").rename(wrong)
    done = run(tmp_path / "run", "finetune", tmp_path / "data", **QUICK, model=pretrained.folder)
    page = (done.folder / "report.html").read_text()
    for number in range(3):
        assert f"disc/{number:02d}.png</td><td>disc/leak-{number}.png</td><td>in both parts" in page
    with (done.folder / "label_review.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 36 + 18
    found = [place for place, row in enumerate(rows) if "wrong-" in row["path"]]
    assert max(found) < 6
    assert {rows[place]["suggested"] for place in found} == {"disc"}


def test_every_exact_copy_in_both_parts_is_named(shapes: Path, tmp_path: Path) -> None:
    """Also those that the page has no room for."""
    shutil.copytree(shapes, tmp_path / "data")
    planted = set()
    for number, file in enumerate(sorted((tmp_path / "data" / "train").glob("*/*.png"))):
        copy = tmp_path / "data" / "val" / file.parent.name / f"copy-{number}.png"
        shutil.copy(file, copy)
        planted.add(frozenset((str(file), str(copy))))
    done = run(tmp_path / "run", "finetune", tmp_path / "data", **{**MINI, "steps": 1})
    groups: dict[str, set[str]] = {}
    with (done.folder / "same_pictures.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            assert row["note"].startswith("in both parts"), row
            groups.setdefault(row["group"], set()).add(row["path"])
    assert len(planted) == 36
    assert all(any(pair <= group for group in groups.values()) for pair in planted)
    assert "same_pictures.csv has all" in (done.folder / "report.html").read_text()


def test_no_report_writes_none(shapes: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", "finetune", shapes, **MINI, no_report=True)
    assert not (done.folder / "report.html").exists()
    assert not (done.folder / "label_review.csv").exists()


def test_copies_in_both_parts_are_said(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    one, other = tmp_path / "data/train/disc/03.png", tmp_path / "data/val/disc/leak.png"
    shutil.copy(one, other)
    again = shutil.copy(one, one.with_name("00-again.png"))  # of two on one side the first is told
    done = run(tmp_path / "run", "finetune", tmp_path / "data", **MINI, no_report=True)
    told = "1 validation picture also among the training pictures, which makes numbers too good: "
    assert f"{told}{other} is {again}" in done.said


@pytest.mark.parametrize("val_share", [0, 0.2])
def test_planted_wrong_labels_come_first_in_the_review_also_from_nothing(
    tmp_path: Path, val_share: float
) -> None:
    """Of 5 % wrong labels on handwritten digits, 80 % are in the first 10 % of the list."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    rng = np.random.default_rng(0)
    wrong = set(rng.permutation(600)[:30].tolist())
    for number, (image, digit) in enumerate(zip(digits.images[:600], digits.target, strict=False)):
        label = (digit + rng.integers(1, 10)) % 10 if number in wrong else digit
        folder = tmp_path / "data" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(folder / f"{number}.png")
    options = {**QUICK, "method": "head", "model": "beit_mini_patch8_32", "val_share": val_share}
    done = run(tmp_path / "run", "finetune", tmp_path / "data", **options)
    with (done.folder / "label_review.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 600
    first = {int(Path(row["path"]).stem) for row in rows[:60]}
    assert len(first & wrong) >= 0.8 * len(wrong)


def test_a_head_is_not_fitted_where_too_many_pictures_are_bad(
    shapes: Path, tmp_path: Path, cli: Cli
) -> None:
    shutil.copytree(shapes / "train", tmp_path / "data")
    for number in range(3):
        (tmp_path / "data" / "disc" / f"{number:02d}.png").write_text("no picture")
    options = {**QUICK, "method": "head", "model": "beit_mini_patch8_32", "out": tmp_path / "run"}
    code, _, err = cli("finetune", tmp_path / "data", **options)
    assert code == 4
    assert "3 of 36 pictures cannot be read" in err
    code, _, err = cli(
        "finetune", tmp_path / "data", **{**options, "out": tmp_path / "b"}, max_bad_images=0.2
    )
    assert code == 0
    assert len((tmp_path / "b" / "bad_images.csv").read_text().splitlines()) == 4


def test_a_start_that_knows_what_is_held_out_now_is_told(
    cli: Cli, shapes: Path, pretrained: Done, tmp_path: Path
) -> None:
    options = {**FINETUNE, "steps": 2, "model": pretrained.folder}
    first = run(tmp_path / "1.run", "finetune", shapes / "train", **options, seed=0)
    options["model"] = first.folder
    other = run(tmp_path / "2.run", "finetune", shapes / "train", **options, seed=1)
    told = "has learned from some of the pictures that are held out now"
    assert told in other.said
    code, _, err = cli("evaluate", other.folder / "split.csv", model=other.folder)
    assert code == 0
    assert "begun from one that had learned from some of the pictures held out" in err
    code, _, err = cli("evaluate", shapes / "val", model=other.folder)
    assert code == 0
    assert "had learned" not in err, "these are others"
    same = run(tmp_path / "3.run", "finetune", shapes / "train", **options, seed=0)
    assert told not in same.said
    options["model"] = other.folder
    assert told in run(tmp_path / "4.run", "finetune", shapes / "train", **options, seed=1).said


def test_a_share_to_hold_out_is_not_used_where_pictures_are_given(
    shapes: Path, pretrained: Done, tmp_path: Path
) -> None:
    options = {**FINETUNE, "steps": 2, "model": pretrained.folder, "val_share": 0.3}
    said = run(tmp_path / "1.run", "finetune", shapes, **options).said
    assert "not used: val_share; pictures to validate on are given" in said
