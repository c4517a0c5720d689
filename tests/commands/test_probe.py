"""`beit probe` on the features of a model that learned shapes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image

import beit.commands.probe as probe_command
from beit.checkpoints import load
from beit.commands.probe import Probe, probe, stratified_fifth
from beit.data import ImageSource, open_source
from beit.features import extract_features
from beit.image import preprocess
from beit.probe import SGD_RATES

from .conftest import Done


def result(cli: Cli, shapes: Path, model: Path, **options: object) -> dict[str, Any]:
    code, out, _ = cli("probe", shapes, model=model, json=True, precision="fp32", **options)
    assert code == 0
    (line,) = out.splitlines()
    return json.loads(line)


def test_a_linear_layer_reads_the_shapes(cli: Cli, shapes: Path, finetuned: Done) -> None:
    found = result(cli, shapes, finetuned.folder, layers=4)
    assert found["layer"] == 4
    assert float(str(found["accuracy"])) >= 0.8


def test_the_accuracy_is_scikit_learns_on_the_same_features(
    cli: Cli, shapes: Path, finetuned: Done
) -> None:
    """The penalty may be another; these features tell the classes apart with any."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = load(finetuned.folder)
    features, labels = {}, {}
    for split in ("train", "val"):
        source = open_source(shapes, split)
        images = [preprocess(source.read(i), model.image_spec) for i in range(len(source))]
        batch = torch.from_numpy(np.stack(images))
        features[split] = extract_features(model, [batch], [4], precision="fp32")[4].numpy()
        labels[split] = source.labels
    mean, std = features["train"].mean(axis=0), features["train"].std(axis=0)
    theirs = linear_model.LogisticRegression(max_iter=5000).fit(
        (features["train"] - mean) / std, labels["train"]
    )
    accuracy = theirs.score((features["val"] - mean) / std, labels["val"])
    found = result(cli, shapes, finetuned.folder, layers=4, baseline=True)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1.01 / 15)  # one picture of 15


def test_the_penalty_that_was_chosen_is_the_one_of_the_final_fit(
    cli: Cli, shapes: Path, pretrained: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per picture, on all pictures; it is chosen on a fifth of them that was held out."""
    best, fit, seen = probe_command.fit_best_probe, probe_command.fit_probe, []

    def watch_best(train: Any, held_out: Any, num_classes: int) -> Any:
        chosen, accuracy = best(train, held_out, num_classes)
        seen.append((len(train[0]), len(held_out[0]), chosen.penalty / len(train[0])))
        return chosen, accuracy

    def watch_fit(features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float) -> Any:
        seen.append((len(features), penalty / len(features)))
        return fit(features, labels, classes, penalty)

    monkeypatch.setattr(probe_command, "fit_best_probe", watch_best)
    monkeypatch.setattr(probe_command, "fit_probe", watch_fit)
    result(cli, shapes, pretrained.folder)
    for (fitted, held_out, chosen), (every, final) in zip(seen[::2], seen[1::2], strict=True):
        assert (fitted, held_out, every) == (30, 6, 36)
        assert final == pytest.approx(chosen)


def test_same_seed_gives_the_same_numbers(cli: Cli, shapes: Path, pretrained: Done) -> None:
    one = result(cli, shapes, pretrained.folder)
    assert one == result(cli, shapes, pretrained.folder, workers=0, batch_size=5)
    assert (one["layer"], one["pooling"], one["kind"]) == (3, "mean", "linear")
    (row,) = one["rows"]
    assert row["linear"]["accuracy"] == one["accuracy"]
    assert row.keys() == {"layer", "pooling", "linear", "knn"}


def test_the_untrained_network_may_be_left_out(cli: Cli, shapes: Path, pretrained: Done) -> None:
    code, out, _ = cli("probe", shapes, "--no-baseline", "--pooling", "both", model=pretrained.folder)
    assert code == 0
    assert "linear probe of layer 3, both: " in out
    assert "of 15 pictures right" in out
    assert "untrained" not in out


def test_all_layers_and_poolings_come_from_one_pass(
    cli: Cli, shapes: Path, finetuned: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, names = ImageSource.read, []

    def watch(self: ImageSource, index: int) -> np.ndarray:
        names.append(self.name(index))
        return read(self, index)

    monkeypatch.setattr(ImageSource, "read", watch)
    settings = Probe(shapes, model=str(finetuned.folder), layers="2,4", pooling="all", baseline=False)
    found = probe(settings)
    assert [(r["layer"], r["pooling"]) for r in found["rows"]] == [
        (layer, pooling) for layer in (2, 4) for pooling in ("mean", "cls", "both")
    ]
    assert len(names) == len(set(names)) == 36 + 15
    for row in (found["rows"][0], found["rows"][4]):  # each as if it were asked for alone
        alone = probe(replace(settings, layers=str(row["layer"]), pooling=row["pooling"]))
        assert alone["rows"] == [row]


def test_sgd_finds_about_the_line_that_is_best(cli: Cli, shapes: Path, finetuned: Done) -> None:
    found = result(cli, shapes, finetuned.folder, layers="2,4", kinds="sgd,linear", no_baseline=True)
    assert found["kind"] == "sgd"
    for row in found["rows"]:
        assert row["sgd"]["lr"] in SGD_RATES
        assert row["sgd"]["accuracy"] == pytest.approx(row["linear"]["accuracy"], abs=0.1)
    code, out, _ = cli("probe", shapes, model=finetuned.folder, layers=4, kinds="sgd", no_baseline=True)
    assert code == 0
    assert "linear, SGD probe of layer 4, mean: " in out


def test_the_best_layer_is_the_one_that_the_held_out_fifth_names(
    cli: Cli, shapes: Path, finetuned: Done
) -> None:
    for kind in ("linear", "knn"):
        found = result(
            cli, shapes, finetuned.folder, layers="2,4", pooling="all", kinds=f"{kind},few-shot"
        )
        rows = {(row["layer"], row["pooling"]): row[kind] for row in found["rows"]}
        chosen = rows[found["layer"], found["pooling"]]
        assert chosen["held_out"] == max(row["held_out"] for row in rows.values())
        assert (found["accuracy"], found["interval"]) == (chosen["accuracy"], chosen["interval"])
        assert found["kind"] == kind
    assert [few["shots"] for few in found["few-shot"]] == [1, 5, 10]  # of 12 a class


def test_attentive_and_few_shot_probes_read_one_layer(cli: Cli, shapes: Path, finetuned: Done) -> None:
    found = result(cli, shapes, finetuned.folder, layers=4, kinds="attentive,few-shot")
    assert found["attentive"]["layer"] == 4
    assert found["accuracy"] == found["attentive"]["accuracy"] >= 0.8
    assert found["rows"] == [{"layer": 4, "pooling": "mean"}]
    code, out, _ = cli("probe", shapes, model=finetuned.folder, layers=4, kinds="few-shot,linear")
    assert code == 0
    few = [line for line in out.splitlines() if "a class, linear probe of layer 4, mean: " in line]
    assert len(few) == 3
    assert few[0].startswith("1 a class")


def test_the_table_fits_a_terminal_and_marks_the_layer_of_the_paper(
    cli: Cli, shapes: Path, finetuned: Done
) -> None:
    code, out, _ = cli(
        "probe", shapes, model=finetuned.folder, layers="all", pooling="all", kinds="knn,linear"
    )
    assert code == 0
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows if "mean" in row[1]] == ["1", "2", "3 *", "4"]
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "20 nearest" in out
    assert "3 of 4" in out


def test_the_results_are_written_with_their_settings(
    cli: Cli, shapes: Path, pretrained: Done, tmp_path: Path
) -> None:
    file = tmp_path / "probe.json"
    found = result(cli, shapes, pretrained.folder, out=file, seed=3)
    written = json.loads(file.read_text())
    settings = written.pop("settings")
    assert written == found
    assert (settings["seed"], settings["model"]) == (3, str(pretrained.folder))


def test_pictures_that_are_in_both_splits_are_all_named(
    cli: Cli, shapes: Path, pretrained: Done, tmp_path: Path
) -> None:
    """Equal pixels, whatever the file; copies within a split are no leak."""
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    shutil.copy(data / "train/disc/03.png", data / "val/disc/leak.png")
    with Image.open(data / "train/square/05.png") as image:
        image.save(data / "val/disc/also.bmp")
    shutil.copy(data / "train/disc/04.png", data / "train/disc/twice.png")
    found = result(cli, data, pretrained.folder)
    assert found["duplicates"] == [
        [str(data / "train/disc/03.png"), str(data / "val/disc/leak.png")],
        [str(data / "train/square/05.png"), str(data / "val/disc/also.bmp")],
    ]
    _, _, err = cli("probe", data, model=pretrained.folder)
    assert "2 pictures in both splits" in err
    assert result(cli, shapes, pretrained.folder)["duplicates"] == []


def test_words_and_json_say_the_same(cli: Cli, shapes: Path, pretrained: Done) -> None:
    found = result(cli, shapes, pretrained.folder)
    _, out, _ = cli("probe", shapes, model=pretrained.folder, precision="fp32")
    for key in ("accuracy", "untrained_accuracy"):
        assert f"{float(str(found[key])):.1%}" in out


def test_the_split_that_is_scored_can_be_named(cli: Cli, shapes: Path, pretrained: Done) -> None:
    code, _, err = cli("probe", shapes, model=pretrained.folder, split="test")
    assert code == 2
    assert "has a train folder but no test folder" in err


@pytest.mark.parametrize(
    ("wrong", "code", "cause"),
    [
        ({"layers": "1,5"}, 2, "layer 5 does not exist; this model has layers 0 to 4"),
        ({"layers": "last"}, 2, "--layers last is not all, paper, or numbers from 1 to 4, with commas"),
        ({"layers": "-1"}, 2, "--layers"),
        ({"kinds": "linear,svm"}, 2, "'svm' is not one of linear, sgd, knn, attentive, few-shot"),
        ({"kinds": "attentive", "layers": "all"}, 2, "begin with linear, which chooses it"),
        (
            {"out": "/nowhere/probe.json"},
            6,
            "cannot write /nowhere/probe.json: /nowhere is not a folder",
        ),
        ({"pooling": "max"}, 2, "max"),
        ({"batch_size": 0}, 2, "--batch-size"),
        ({"seed": -1}, 2, '"-1" for --seed. Must be >= 0.'),
        ({"model": "nowhere"}, 5, "nowhere does not exist"),
    ],
)
def test_wrong_settings_are_named(
    cli: Cli, shapes: Path, pretrained: Done, wrong: dict[str, object], code: int, cause: str
) -> None:
    ours, out, err = cli("probe", shapes, **{"model": pretrained.folder, **wrong})
    assert (ours, out) == (code, "")
    assert cause in err


def test_scoring_on_the_pictures_it_was_fitted_on_is_refused(
    cli: Cli, shapes: Path, pretrained: Done
) -> None:
    for data, split in ((shapes / "train", "test"), (shapes, "train")):
        code, _, err = cli("probe", data, model=pretrained.folder, split=split)
        assert code == 2
        assert "to score on others" in err


def test_one_class_is_refused(cli: Cli, shapes: Path, tmp_path: Path, pretrained: Done) -> None:
    shutil.copytree(shapes / "train" / "disc", tmp_path / "one" / "disc")
    code, out, err = cli("probe", tmp_path / "one", model=pretrained.folder)
    assert (code, out) == (2, "")
    assert "has one class; a probe tells two or more apart" in err


def test_a_folder_without_val_gives_a_fifth_of_it_copies_on_one_side(
    cli: Cli, shapes: Path, tmp_path: Path, pretrained: Done
) -> None:
    shutil.copytree(shapes / "train", tmp_path / "all")
    for number, file in enumerate(sorted((tmp_path / "all" / "square").glob("*.png"))):
        shutil.copy(file, file.with_name(f"copy-{number}.png"))
    count = sum(1 for _ in (tmp_path / "all").rglob("*.png"))
    options = {"model": pretrained.folder, "json": True}
    code, out, err = cli("probe", tmp_path / "all", **options)
    assert code == 0
    held_out = re.search(rf"has no val: (\d+) of {count} pictures are held out", err)
    assert held_out is not None
    assert 0.15 * count < int(held_out[1]) < 0.25 * count
    assert json.loads(out)["duplicates"] == []  # across the two sides
    assert cli("probe", tmp_path / "all", **options)[1] == out


def test_pictures_that_cannot_be_read_are_named_and_left_out(
    cli: Cli, shapes: Path, tmp_path: Path, pretrained: Done
) -> None:
    for name in ("bad", "without"):
        shutil.copytree(shapes, tmp_path / name)
    for file in ("train/disc/00.png", "val/square/01.png"):
        (tmp_path / "bad" / file).write_text("no picture")
        (tmp_path / "without" / file).unlink()
    options = {"model": pretrained.folder, "json": True, "kinds": "linear,knn,attentive"}
    code, out, err = cli("probe", tmp_path / "bad", **options)
    assert code == 3
    assert "train/disc/00.png" in err
    assert "val/square/01.png" in err
    assert "2 of 51 pictures could not be read" in err
    without = json.loads(cli("probe", tmp_path / "without", **options)[1])
    assert json.loads(out) == {**without, "bad_images": 2}
    for file in (tmp_path / "bad" / "val").rglob("*.png"):
        file.write_text("no picture")
    code, _, err = cli("probe", tmp_path / "bad", **options)
    assert code == 4
    assert "can be read" in err


def test_a_fifth_of_every_class_is_held_out() -> None:
    labels = (0,) * 10 + (1,) * 25 + (2,) * 4
    chosen = stratified_fifth(labels, seed=3)
    counts = np.bincount(np.array(labels)[chosen.numpy()], minlength=3)
    assert counts.tolist() == [2, 5, 0]
    assert torch.equal(chosen, stratified_fifth(labels, seed=3))
    assert not torch.equal(chosen, stratified_fifth(labels, seed=4))


@pytest.mark.parametrize("labels", [(0, 1), (0, 0, 1, 1, 2, 2), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_with_few_pictures_a_class_some_are_held_out_and_some_left(labels: tuple[int, ...]) -> None:
    chosen = stratified_fifth(labels, seed=0)
    assert 0 < int(chosen.sum()) < len(labels)
