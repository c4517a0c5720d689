"""Looks at a pre-training: what is probed and drawn when, and the page that shows it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import beit.watch
from beit.data import open_source
from beit.model import Beit, BeitConfig
from beit.settings import RunError
from beit.watch import MOST_SHEETS, Watch, probe_pictures, share_of_each


@pytest.fixture
def model() -> Beit:
    torch.manual_seed(0)
    return Beit(BeitConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)).eval()


def watch(out: Path, shapes: Path, **others: Any) -> Watch:
    """A watch that draws noise, the hardest to make small."""
    rng = np.random.default_rng(0)

    def draw(_: Beit) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (804, 504, 3), dtype=np.uint8))

    out.mkdir(exist_ok=True)
    (out / "run.toml").write_text("seed = 0\n")
    return Watch(out, open_source(shapes), (1, 2), "fp32", 1, draw, **others)


def test_a_page_shows_a_dozen_sheets_evenly_spread_and_stays_below_5_mb(
    shapes: Path, tmp_path: Path, model: Beit
) -> None:
    looks = watch(tmp_path / "run", shapes)
    for step in range(0, 340, 10):
        looks.look(model, step, probe=step % 100 == 0)
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 34
    lines = [{"step": step, "loss": 1 / (1 + step), "lr": 1e-3} for step in range(50_000)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    looks.write_page("A run", [("steps", "0", "")], 16)
    page = (tmp_path / "run" / "report.html").read_text()
    shown = [int(step) for step in re.findall(r'alt="step-(\d+)"', page)]
    assert len(shown) == MOST_SHEETS
    assert (shown[0], shown[-1]) == (0, 330)
    assert np.diff(shown).min() == np.diff(shown).max() == 30
    assert "In run/pictures: 34 sheets." in page
    assert len(page) < 5e6


def test_a_look_without_probes_draws_alone_but_the_first_probes_always(
    shapes: Path, tmp_path: Path, model: Beit
) -> None:
    looks = watch(tmp_path / "run", shapes)
    for step, probe in ((0, False), (1, False), (2, True)):
        looks.look(model.train(step == 1), step, probe)
        assert model.training == (step == 1)
    assert [look["step"] for look in looks.looks] == [0, 2]
    assert looks.looks == json.loads((tmp_path / "run" / "looks.json").read_text())
    assert looks.looks[0].keys() == {"step", "pictures", "effective_rank_1", "effective_rank_2"}
    sheets = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == [f"step-{step:08d}.jpg" for step in range(3)]


def test_a_run_that_goes_on_forgets_later_looks(shapes: Path, tmp_path: Path, model: Beit) -> None:
    looks = watch(tmp_path / "run", shapes)
    for step in (0, 4, 8):
        looks.look(model, step)
    again = watch(tmp_path / "run", shapes)
    again.look(model, 6, probe=False)
    assert [look["step"] for look in again.looks] == [0, 4]


# --- Labelled pictures to probe with --------------------------------------------------------------


def test_looks_at_other_pictures_are_kept_apart(shapes: Path, tmp_path: Path, model: Beit) -> None:
    """What linear probes name right of few pictures says nothing beside that of others."""
    all_of_them, some = (probe_pictures(place, 0, 1) for place in (shapes, shapes / "train"))
    for step, (train, test) in enumerate((all_of_them, some, all_of_them)):
        looks = watch(tmp_path / "run", shapes, train=train, test=test)
        looks.look(model, step, probe=False)
        assert [look["step"] for look in looks.alike] == [[0], [1], [0]][step]
    assert [look["step"] for look in looks.looks] == [0, 1]
    looks.write_page("A run", [], 16)
    assert "1 look at other pictures" in (tmp_path / "run" / "report.html").read_text()


def names(source: Any) -> set[str]:
    return {source.name(i) for i in range(len(source))}


def test_train_and_val_are_taken_as_they_are(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known, asked = probe_pictures(shapes, seed=0, workers=0)
    assert names(known) == {str(file) for file in (shapes / "train").rglob("*.png")}
    assert names(asked) == {str(file) for file in (shapes / "val").rglob("*.png")}
    assert capsys.readouterr().err == f"probes: fitted to 36 pictures of {shapes}, scored on 15 others\n"


def test_a_fifth_of_each_class_is_held_out_where_there_is_no_val(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, asked = probe_pictures(shapes / "train", seed=0, workers=0)
    assert names(known) | names(asked) == {str(file) for file in (shapes / "train").rglob("*.png")}
    assert not names(known) & names(asked)
    assert np.bincount(asked.labels).tolist() == [2, 2, 2]  # of 12
    assert "a fifth held out, as there is no val" in capsys.readouterr().err
    assert names(probe_pictures(shapes / "train", seed=0, workers=0)[1]) == names(asked)
    assert names(probe_pictures(shapes / "train", seed=1, workers=0)[1]) != names(asked)


def test_copies_of_a_picture_are_on_one_side(shapes: Path, tmp_path: Path) -> None:
    for file in sorted((shapes / "train").rglob("*.png")):
        for number in range(3):
            place = tmp_path / file.parent.name / f"{file.stem}-{number}.png"
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(file)
    sides = probe_pictures(tmp_path, seed=0, workers=0)
    shown = [{Path(name).resolve() for name in names(side)} for side in sides]
    assert [len(names(side)) for side in sides] == [90, 18]
    assert not shown[0] & shown[1]


def test_a_train_folder_alone_and_a_list_do_as_well(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(shapes / "train")
    rows = [f"{file},{file.parent.name}" for file in sorted((shapes / "val").rglob("*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    for place, known, asked in ((tmp_path / "set", 30, 6), (tmp_path / "list.csv", 12, 3)):
        assert [len(source) for source in probe_pictures(place, seed=0, workers=0)] == [known, asked]


def test_large_sets_are_probed_in_part_each_class_with_its_share(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beit.watch, "MOST_KNOWN", 9)
    monkeypatch.setattr(beit.watch, "MOST_ASKED", 6)
    known, asked = probe_pictures(shapes, seed=0, workers=0)
    assert np.bincount(known.labels).tolist() == [3, 3, 3]
    assert np.bincount(asked.labels).tolist() == [2, 2, 2]
    assert "fitted to 9 of 36 pictures" in capsys.readouterr().err
    for source in (known, asked):  # labels still belong to their pictures
        for i in range(len(source)):
            assert Path(source.name(i)).parent.name == source.classes[source.labels[i]]


@pytest.mark.parametrize("most", [7, 100, 1999, 2000])
def test_shares_differ_by_less_than_a_picture(most: int) -> None:
    labels = np.random.default_rng(0).choice(5, 2000, p=[0.5, 0.25, 0.15, 0.09, 0.01])
    chosen = share_of_each(labels, most, seed=3)
    assert len(set(chosen.tolist())) == most
    expected = np.bincount(labels) * most / 2000
    assert np.abs(np.bincount(labels[chosen], minlength=5) - expected).max() < 1.01
    np.testing.assert_array_equal(chosen, share_of_each(labels, most, seed=3))
    assert most == 2000 or (chosen != share_of_each(labels, most, seed=4)).any()


def test_what_tells_no_classes_apart_is_refused(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "disc").mkdir()
    (tmp_path / "disc" / "0.png").symlink_to(shapes / "val" / "disc" / "00.png")
    with pytest.raises(ValueError, match="learn from, of 1 classes, and 0 to ask of"):
        probe_pictures(tmp_path, seed=0, workers=0)
    (tmp_path / "all" / "disc").mkdir(parents=True)
    for number in range(4):
        place = tmp_path / "all" / "disc" / f"{number}.png"
        place.symlink_to(shapes / "val" / "disc" / f"{number:02d}.png")
    with pytest.raises(ValueError, match="a probe tells two classes or more apart"):
        probe_pictures(tmp_path / "all", seed=0, workers=0)


def test_a_set_of_four_pictures_is_probed(shapes: Path, tmp_path: Path, model: Beit) -> None:
    for shape in ("disc", "square"):
        (tmp_path / "set" / shape).mkdir(parents=True)
        for number in range(2):
            place = tmp_path / "set" / shape / f"{number}.png"
            place.symlink_to(shapes / "val" / shape / f"{number:02d}.png")
    known, asked = probe_pictures(tmp_path / "set", seed=0, workers=0)
    looks = watch(tmp_path / "run", shapes, train=known, test=asked)
    looks.look(model, 0)
    assert looks.looks[0].keys() > {"linear_1", "knn_2", "effective_rank_2"}


def test_pictures_that_cannot_be_read_are_named_once_and_counted_out(
    shapes: Path, tmp_path: Path, model: Beit, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    (data / "val" / "disc" / "00.png").write_text("no picture")
    known, asked = probe_pictures(data, seed=0, workers=0)
    looks = watch(tmp_path / "run", shapes, train=known, test=asked)
    for step in (0, 4):
        looks.look(model, step)
    assert capsys.readouterr().err.count("left out: ") == 1
    looks.write_page("A run", [], 16)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Share of {len(asked) - 1} labelled pictures" in page


def test_a_disk_that_fails_during_one_look_leaves_the_others_alike(
    shapes: Path, tmp_path: Path, model: Beit, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    known, held_out = probe_pictures(data, 0, 0)
    looks = watch(tmp_path / "run", shapes, train=known, test=held_out)
    asked, gone = len(held_out), tmp_path / "gone"
    for step in range(3):
        if step == 1:
            (data / "val" / "disc").rename(gone)
        looks.look(model, step)
        if step == 1:
            gone.rename(data / "val" / "disc")
            assert [look["step"] for look in looks.alike] == [1]
    assert [look["read"][1] for look in looks.looks] == [asked, asked - 5, asked]
    assert [look["step"] for look in looks.alike] == [0, 2]
    looks.write_page("A run", [], 16)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Share of {asked} labelled pictures" in page
    assert "1 look at other pictures" in page


def test_looks_that_are_not_json_are_named(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "looks.json").write_text('[{"step": 0,')
    with pytest.raises(RunError, match=r"looks\.json is not JSON"):
        watch(tmp_path, shapes)


def test_the_rank_is_that_of_pictures_spread_over_the_classes(
    shapes: Path, tmp_path: Path, model: Beit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation pictures stand class by class: the first 256 of Imagenette's are of one."""
    monkeypatch.setattr(beit.watch, "MOST_FOR_RANK", 3)
    ranked = []

    def noted(features: np.ndarray) -> float:
        ranked.append(features)
        return 1.0

    monkeypatch.setattr(beit.watch, "effective_rank", noted)
    known, asked = probe_pictures(shapes, seed=0, workers=0)
    watch(tmp_path / "run", shapes, train=known, test=asked).look(model, 0)
    all_features = beit.watch.features_of(model, asked, [1], "fp32", 1).layers[1].numpy()
    np.testing.assert_array_equal(ranked[0], all_features[[0, 7, 14]])
    assert asked.labels[[0, 7, 14]].tolist() == [0, 1, 2]
