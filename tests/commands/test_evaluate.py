"""`beit evaluate` against counting the answers of `beit classify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, write_shapes
from PIL import Image

from beit.checkpoints import load
from beit.engine import Engine

from .conftest import Done


def counted(cli: Cli, finetuned: Done, folder: Path) -> tuple[float, dict[str, float]]:
    """Share of right answers, and of each class, from the lines of `classify --json`."""
    code, out, _ = cli("classify", folder, model=finetuned.folder, json=True)
    assert code == 0
    right: dict[str, list[bool]] = {}
    for line in out.splitlines():
        answer = json.loads(line)
        truth = Path(answer["path"]).parent.name
        right.setdefault(truth, []).append(answer["label"] == truth)
    every = [value for values in right.values() for value in values]
    return sum(every) / len(every), {name: sum(v) / len(v) for name, v in right.items()}


@pytest.fixture
def noisy(shapes: Path, tmp_path: Path) -> Path:
    """Labelled pictures of which about a third are in a wrong folder, so that not all is right."""
    folder = write_shapes(tmp_path / "noisy", 6, seed=5)
    for number in range(3):
        other = folder / "disc" / f"{number:02d}.png"
        other.write_bytes((folder / "square" / f"{number:02d}.png").read_bytes())
    return folder


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_top1_is_what_counting_the_answers_of_classify_gives(
    cli: Cli, finetuned: Done, noisy: Path, batch_size: int
) -> None:
    code, out, _ = cli("evaluate", noisy, model=finetuned.folder, json=True, batch_size=batch_size)
    assert code == 0
    result = json.loads(out)
    top1, per_class = counted(cli, finetuned, noisy)
    assert result["top1"] == pytest.approx(top1)
    assert 0.3 < top1 < 0.9
    assert result["per_class"] == pytest.approx(per_class)
    assert result["pictures"] == 18
    assert result["top5"] == 1.0  # of three classes


def test_val_is_scored_unless_another_split_is_named(cli: Cli, finetuned: Done, shapes: Path) -> None:
    one = json.loads(cli("evaluate", shapes, model=finetuned.folder, json=True)[1])
    assert one["pictures"] == 15
    assert one["top1"] == finetuned.result["val_accuracy"]
    other = json.loads(cli("evaluate", shapes, model=finetuned.folder, split="train", json=True)[1])
    assert other["pictures"] == 36


def test_the_table_names_classes_counts_and_mistakes(cli: Cli, finetuned: Done, noisy: Path) -> None:
    code, out, err = cli("evaluate", noisy, model=finetuned.folder)
    assert (code, err) == (0, "")
    top1, per_class = counted(cli, finetuned, noisy)
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 3}
    for name, share in per_class.items():
        assert "6" in rows[name]
        assert f"{share:.1%}" in rows[name]
    assert "square" in rows["disc"]  # what the misplaced squares are taken for
    assert f"top-1 {top1:.2%}" in out
    assert "of 18 pictures" in out


def test_the_preparation_is_named_as_it_was(cli: Cli, finetuned: Done, shapes: Path) -> None:
    result = json.loads(cli("evaluate", shapes, model=finetuned.folder, json=True)[1])
    assert load(finetuned.folder).image_spec.crop_ratio == 1.0
    assert "1.0" in result["preprocessing"]


def test_a_set_with_some_of_the_classes_is_scored_by_name(
    cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path
) -> None:
    """`square` and `triangle` alone would be classes 0 and 1 by their place."""
    for name in ("square", "triangle"):
        (tmp_path / name).mkdir()
        for file in (shapes / "val" / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    result = json.loads(cli("evaluate", tmp_path, model=finetuned.folder, json=True)[1])
    assert result["per_class"].keys() == {"square", "triangle"}
    top1, _ = counted(cli, finetuned, tmp_path)
    assert result["top1"] == pytest.approx(top1)
    assert top1 > 0.5


def cases(shapes: Path, pretrained: Done, finetuned: Done, tmp_path: Path) -> dict[str, Any]:
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    other = tmp_path / "other" / "hexagon"
    other.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(other / "1.png")
    broken = write_shapes(tmp_path / "broken", 1, seed=4)
    (broken / "disc" / "00.png").write_text("no picture")
    good = finetuned.folder
    return {
        "no classifier": (shapes, pretrained.folder, 5, "has no classifier; fine-tune it first"),
        "no model": (shapes, tmp_path / "nothing", 5, "nothing does not exist"),
        "no data": (tmp_path / "nowhere", good, 2, "nowhere does not exist"),
        "no labels": (shapes / "val" / "disc", good, 2, "has no classes"),
        "unknown class": (tmp_path / "other", good, 2, "the model does not know: hexagon"),
        "broken picture": (broken, good, 2, "00.png: not a readable picture"),
    }


@pytest.mark.parametrize(
    "case", ["no classifier", "no model", "no data", "no labels", "unknown class", "broken picture"]
)
def test_what_cannot_be_scored_is_named(
    cli: Cli, shapes: Path, pretrained: Done, finetuned: Done, tmp_path: Path, case: str
) -> None:
    data, model, expected, cause = cases(shapes, pretrained, finetuned, tmp_path)[case]
    code, out, err = cli("evaluate", data, model=model)
    assert (code, out) == (expected, "")
    assert cause in err


def test_scores_do_not_depend_on_who_asks(finetuned: Done, shapes: Path) -> None:
    from beit.commands.evaluate import Evaluate, evaluate

    result = evaluate(Evaluate(shapes, model=str(finetuned.folder), json=True))
    assert result["top1"] == finetuned.result["val_accuracy"]
    assert Engine(finetuned.folder).labels == ["disc", "square", "triangle"]
