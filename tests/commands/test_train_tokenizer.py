"""`beit train-tokenizer` on a few pictures of shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image

import beit.commands.train_tokenizer
from beit.augment import to_unit
from beit.checkpoints import load_tokenizer
from beit.data import open_source
from beit.image import ImageSpec, resize_and_crop
from beit.metrics import psnr
from beit.tokenizer import DiscreteVAE

from .conftest import TOKENIZER, Broken, Done, run, same_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def pictures(shapes: Path) -> torch.Tensor:
    source = open_source(shapes / "train")
    spec = ImageSpec((32, 32), crop_ratio=1.0)
    images = [resize_and_crop(source.read(i), spec) for i in range(len(source))]
    return to_unit(images, torch.device("cpu"))


def test_reconstructions_become_better(tokenizer: Done) -> None:
    first, last = tokenizer.metrics[0]["psnr_db"], tokenizer.metrics[-1]["psnr_db"]
    assert last > first + 3  # dB


def test_the_tokenizer_draws_better_than_the_mean_picture(tokenizer: Done, shapes: Path) -> None:
    images, model = pictures(shapes), load_tokenizer(tokenizer.folder)
    drawn = model.decode(model.encode(images))
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    assert float((drawn - images).square().mean()) < 0.8 * float((mean - images).square().mean())


def test_what_is_reported_is_what_the_saved_tokenizer_does(tokenizer: Done, shapes: Path) -> None:
    images, model = pictures(shapes), load_tokenizer(tokenizer.folder)
    token_ids = model.encode(images)
    counts = np.bincount(token_ids.flatten(), minlength=32)
    share = counts[counts > 0] / counts.sum()
    assert tokenizer.result["live_codes"] == (counts > 0).mean()
    assert tokenizer.result["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    error = float((model.decode(token_ids) - images).double().square().mean())
    assert tokenizer.result["psnr_db"] == pytest.approx(psnr(error), abs=1e-3)
    assert tokenizer.result["steps"] == 80
    assert f"{tokenizer.result['live_codes']:.1%} of 32 codes alive" in tokenizer.said


def test_the_folder_is_as_documented(tokenizer: Done, shapes: Path) -> None:
    assert sorted(p.name for p in tokenizer.folder.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "reconstructions.png",
        "run.toml",
    ]  # fmt: skip
    settings = tomllib.loads((tokenizer.folder / "run.toml").read_text())
    assert settings["command"] == "TrainTokenizer"
    assert settings["data"] == str(shapes / "train")
    assert (settings["vocab_size"], settings["steps"], settings["lr"]) == (32, 80, 3e-3)
    assert [line["step"] for line in tokenizer.metrics] == list(range(10, 81, 10))
    with Image.open(tokenizer.folder / "reconstructions.png") as sheet:
        assert sheet.size == (10 * 100 + 4, 2 * 100 + 4)  # ten pictures, above what is drawn


def test_the_settings_are_the_tokenizers(tokenizer: Done) -> None:
    model = load_tokenizer(tokenizer.folder)
    assert isinstance(model, DiscreteVAE)
    assert (model.vocab_size, model.stride, model.view_size) == (32, 8, (32, 32))
    assert (model.config.code_dim, model.config.hidden_dim) == (8, 32)


SHORT = {**TOKENIZER, "steps": 8, "hidden_dim": 16}
NAME = "train-tokenizer"


def test_same_seed_gives_bit_equal_weights_with_any_number_of_threads(
    shapes: Path, tmp_path: Path
) -> None:
    one = run(tmp_path / "1", NAME, shapes / "train", **SHORT, workers=0)
    two = run(tmp_path / "2", NAME, shapes / "train", **SHORT, workers=3)
    same_weights(one, two)
    other = run(tmp_path / "3", NAME, shapes / "train", **SHORT, seed=1)
    assert not torch.equal(one.weights["codebook.weight"], other.weights["codebook.weight"])


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_a_stopped_run_goes_on_to_bit_equal_weights(
    shapes: Path, tmp_path: Path, broken_run: Broken, quantizer: str
) -> None:
    options = {**SHORT, "quantizer": quantizer}
    broken = broken_run(5, NAME, shapes / "train", **options)
    same_weights(broken, run(tmp_path / "unbroken", NAME, shapes / "train", **options))
    assert "going on from step 5 of 8" in broken.said


def test_dead_codes_are_warned_of_below_a_half(shapes: Path, tmp_path: Path, tokenizer: Done) -> None:
    done = run(tmp_path / "many", NAME, shapes / "train", **{**SHORT, "vocab_size": 2048, "steps": 2})
    assert done.result["live_codes"] < 0.5
    assert "warning: only" in done.said
    assert "--vocab-size 512" in done.said
    assert tokenizer.result["live_codes"] >= 0.5
    assert "warning" not in tokenizer.said


@pytest.mark.parametrize(("live", "warned"), [(0.49, True), (0.5, False)])
def test_half_of_the_codes_is_where_the_warning_begins(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: float, warned: bool
) -> None:
    judge = beit.commands.train_tokenizer.judge

    def judged(*values: Any) -> tuple[Any, ...]:
        use, *others = judge(*values)
        return use._replace(live=live), *others

    monkeypatch.setattr(beit.commands.train_tokenizer, "judge", judged)
    done = run(tmp_path / "run", NAME, shapes / "train", **{**SHORT, "steps": 1})
    assert ("warning: only 49% of the codes are alive" in done.said) == warned
    assert ("warning" in done.said) == warned


def test_a_finished_run_is_not_trained_again(shapes: Path, tmp_path: Path) -> None:
    first = run(tmp_path / "run", NAME, shapes / "train", **SHORT)
    before, metrics = first.weights, first.metrics
    again = run(tmp_path / "run", NAME, shapes / "train", **SHORT, workers=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.weights.items())
    assert again.metrics == metrics
    assert again.result == first.result


def test_other_settings_are_refused_and_overwrite_begins_again(
    cli: Cli, shapes: Path, tmp_path: Path
) -> None:
    run(tmp_path / "run", NAME, shapes / "train", **SHORT)
    options = {**SHORT, "out": tmp_path / "run", "code_dim": 4}
    code, out, err = cli(NAME, shapes / "train", **options)
    assert (code, out) == (2, "")
    assert "code_dim was 8, now 4" in err
    assert "--overwrite" in err
    assert cli(NAME, shapes / "train", **options, overwrite=True)[0] == 0
    assert load_tokenizer(tmp_path / "run").config.code_dim == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"img_size": 33}, "img_size 33 is not a multiple of the token stride 8"),
        ({"batch_size": 0}, "--batch-size"),
        ({"steps": -1}, "--steps"),
        ({"epochs": 0, "steps": 0}, "--epochs"),
        ({"log_every": 0}, "--log-every"),
        ({"save_every": 0}, "--save-every"),
        ({"workers": -1}, "--workers"),
        ({"vocab_size": 0}, "--vocab-size"),
        ({"quantizer": "rvq"}, "rvq"),
        ({"device": "tpu9"}, "tpu9"),
    ],
)
def test_wrong_settings_end_with_2_and_leave_no_folder(
    cli: Cli, shapes: Path, tmp_path: Path, wrong: dict[str, object], cause: str
) -> None:
    code, out, err = cli(NAME, shapes / "train", **{**SHORT, "out": tmp_path / "run", **wrong})
    assert (code, out) == (2, "")
    assert cause in err
    assert not (tmp_path / "run").exists()


def test_a_broken_picture_is_named_and_ends_the_training(cli: Cli, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number, file in enumerate(sorted((shapes / "train" / "disc").iterdir())[:4]):
        content = file.read_bytes()[: 50 if number == 2 else None]
        (tmp_path / "photos" / f"{number}.png").write_bytes(content)
    code, _, err = cli(NAME, tmp_path / "photos", **SHORT, out=tmp_path / "run")
    assert code == 2
    assert "2.png: not a readable picture" in err


def test_a_folder_without_pictures_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = cli(NAME, tmp_path / "empty", **SHORT, out=tmp_path / "run")
    assert code == 2
    assert "holds no pictures" in err
    assert not (tmp_path / "run").exists()
