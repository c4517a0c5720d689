"""What a fine-tuning does where nobody says: by the number of pictures, and never against what is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit.commands.finetune import Finetune
from beit.data import open_source
from beit.finetune_defaults import chosen, run_name, size_for
from beit.labelled import Labelled, Side
from beit.split import Divided, take


def pictures(shapes: Path, counts: list[int], val: bool = True) -> Labelled:
    """So many pictures of three classes, the same ones again and again."""
    source = open_source(shapes, "train", labelled=True)
    numbers = np.concatenate([np.full(n, 12 * label) for label, n in enumerate(counts)])
    train = take(source, numbers)
    side = Side(train, train.labels)
    nothing = np.empty(0, dtype=np.int64)
    divided = Divided(nothing, nothing, [], [], [], None)
    return Labelled(side, side if val else None, (train,), divided, val)


TRAINED = "runs/pretrained"


def test_a_large_model_is_told_by_its_blocks_whatever_it_is_called(shapes: Path) -> None:
    data = pictures(shapes, [300, 300])
    for model, depth, decay in (("runs/large-pictures", 12, 0.65), ("runs/mine", 24, 0.75)):
        settings = vars(Finetune(Path("flowers"), model=model))
        assert chosen(settings, data, depth)["layer_decay"] == decay


@pytest.mark.parametrize(
    ("count", "given", "expected"),
    [
        (36, {"model": TRAINED}, {"method": "head"}),
        (36, {}, {"method": "best", "model": "beit_mini_patch8_32", "layer_decay": 1.0, "batch_size": 8,
                  "epochs": 100, "lr": 1e-3, "crop_scale": (0.3, 1.0)}),
        (149, {"model": TRAINED}, {"method": "head"}),
        (150, {"model": TRAINED}, {"method": "best", "batch_size": 8, "layer_decay": 0.65}),
        (639, {"model": TRAINED}, {"method": "best", "batch_size": 32, "epochs": 78}),
        (640, {"model": TRAINED}, {"method": "best", "batch_size": 64, "layer_decay": 0.65}),
        (6000, {"model": TRAINED}, {"batch_size": 64, "epochs": 10}),
        (36, {"model": TRAINED, "lr": 0.0}, {"method": "full", "crop_scale": (0.08, 1.0)}),
        (36, {"model": TRAINED, "steps": 9}, {"method": "full", "batch_size": 8}),
        (36, {"model": TRAINED, "method": "best"}, {"crop_scale": (0.3, 1.0)}),
    ],
)  # fmt: skip
def test_settings_follow_the_number_of_pictures(
    shapes: Path, count: int, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    data = pictures(shapes, [count // 3, count // 3, count - 2 * (count // 3)])
    found = chosen(vars(Finetune(Path("flowers"), **given)), data, 12 if "model" in given else None)
    assert {key: found.get(key) for key in expected} == expected
    assert not set(given) & set(found), "what is given stays"
    assert ("batch_size" in found) == (expected.get("method") != "head")
    assert ("epochs" in found) == (expected.get("method") != "head" and "steps" not in given)
    assert "class_weights" not in found


def test_rare_classes_count_more_from_three_times_on(shapes: Path) -> None:
    settings = vars(Finetune(Path("flowers")))
    assert "class_weights" not in chosen(settings, pictures(shapes, [30, 10, 20]))
    assert chosen(settings, pictures(shapes, [31, 10, 20]))["class_weights"] is True
    given = vars(Finetune(Path("flowers"), lr=1e-3))
    assert "class_weights" not in chosen(given, pictures(shapes, [31, 10, 20]))


def test_without_validation_pictures_all_is_trained(shapes: Path) -> None:
    data = pictures(shapes, [12, 12, 12], val=False)
    assert chosen(vars(Finetune(Path("x"), model=TRAINED)), data)["method"] == "full"
    with pytest.raises(ValueError, match="--method best compares on validation pictures"):
        chosen(vars(Finetune(Path("x"), method="best")), data)


def test_what_begins_from_nothing_fits_the_pictures(shapes: Path, tmp_path: Path) -> None:
    assert size_for(open_source(shapes, "train")) == "beit_mini_patch8_32"
    for number in range(3):
        Image.new("RGB", (48, 90)).save(tmp_path / f"{number}.png")
    (tmp_path / "none.png").write_text("no picture")
    assert size_for(open_source(tmp_path)) == "beit_tiny_patch8_64"


def test_the_run_is_named_for_its_data() -> None:
    assert run_name(Path("flowers/")) == "flowers"
    assert run_name(Path("a/flowers.v2")) == "flowers.v2"
    assert run_name(Path("labels.csv")) == "labels"
    assert run_name(Path("s/train-{000..009}.tar")) == "train"
    assert run_name(Path("*.tar")) == "finetune"
