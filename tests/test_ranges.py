"""The bounds of settings: what is beyond them is refused by flag and recipe, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli

TRAININGS = ("train-tokenizer", "pretrain", "finetune")
BEYOND = [
    *(
        (command, "crop_scale", wrong)
        for command in TRAININGS
        for wrong in ((0.5, 0.2), (0, 1), (0.5, 2))
    ),
    *((command, "hflip", wrong) for command in TRAININGS for wrong in (-0.1, 1.1, "nan")),
    *((command, "max_bad_images", wrong) for command in (*TRAININGS, "check") for wrong in (-1, 3)),
    *((command, "seed", bad) for command in TRAININGS for bad in (-1, 2**63)),
    *((command, name, "inf") for command in TRAININGS for name in ("lr", "min_lr", "warmup_epochs")),
    *((command, "crop_ratio", wrong) for command in TRAININGS[1:] for wrong in (0, 1.5)),
    *((command, "drop_path", wrong) for command in TRAININGS[1:] for wrong in (-0.1, 1)),
    ("pretrain", "betas", (0.9, 1)),
    ("pretrain", "betas", (-0.5, 0.99)),
    ("pretrain", "color_jitter", -0.4),
    ("pretrain", "init_values", -0.1),
    ("pretrain", "probe_layers", (9, 0)),
    ("finetune", "val_share", 1),
    ("finetune", "label_smoothing", 1),
    ("finetune", "layer_decay", 0),
    ("finetune", "layer_decay", 1.1),
    ("finetune", "rand_augment", 11),
    ("finetune", "reprob", 1.1),
    ("finetune", "ema_decay", 1),
]


@pytest.mark.parametrize(("command", "name", "wrong"), BEYOND)
def test_what_is_beyond_its_bounds_is_refused_from_flag_and_recipe(
    cli: Cli, tmp_path: Path, command: str, name: str, wrong: object
) -> None:
    needed = {"out": tmp_path / "run", "tokenizer": "t"}
    given = {"pretrain": needed, "check": {}}.get(command, {"out": tmp_path / "run"})
    option = name.replace("_", "-")
    code, _, err = cli(command, "nowhere", **given, **{name: wrong})
    assert code == 2
    assert f"for --{option}. Must be " in err
    recipe = tmp_path / "mine.toml"
    value = list(wrong) if isinstance(wrong, tuple) else wrong
    recipe.write_text(f"[settings]\n{name} = {value}\n")
    code, _, err = cli(command, "nowhere", **given, recipe=recipe)
    assert code == 2
    assert f"for [{option}] provided by" in err
    assert "Must be " in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("layer_decay", 1), ("crop_scale", (1, 1)), ("rand_augment", 10), ("reprob", 0)]
)
def test_the_bounds_themselves_are_taken(cli: Cli, name: str, value: object) -> None:
    code, _, err = cli("finetune", "nowhere", **{name: value})
    assert (code, "nowhere does not exist" in err) == (2, True)


def test_numbers_stand_apart_or_with_commas_between(cli: Cli) -> None:
    for several in ((9, 12), "9,12"):
        code, _, err = cli("pretrain", "nowhere", out="run", tokenizer="t", probe_layers=several)
        assert (code, "nowhere does not exist" in err) == (2, True)
    code, _, err = cli("pretrain", "nowhere", out="run", tokenizer="t", probe_layers="9;12")
    assert code == 2
    assert "--probe-layers: 9;12 are not numbers from 1 on, such as 9 12 or 9,12" in err
