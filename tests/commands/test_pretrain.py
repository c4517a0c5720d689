"""`beit pretrain` on a few pictures of shapes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image

import beit.commands.pretrain
from beit.checkpoints import load
from beit.model import VARIANTS, BeitForMaskedImageModeling
from beit.tokenizer import DiscreteVAE

from .conftest import PRETRAIN, TOKENIZER, Broken, Done, run, same_weights


def test_the_loss_falls_below_guessing(pretrained: Done, tokenizer: Done) -> None:
    """Below the entropy of the tokens: the best guess of one who does not look at the picture."""
    first, last = pretrained.metrics[0], pretrained.metrics[-1]
    assert last["loss"] < first["loss"] - 0.3
    assert last["loss"] < math.log(last["target_perplexity"])
    assert last["token_accuracy"] > 2 / tokenizer.result["perplexity"]


def test_metrics_say_what_happened(pretrained: Done) -> None:
    metrics = pretrained.metrics
    assert [line["step"] for line in metrics] == [10, 20, 30, 40, 50, 60]
    for line in metrics:
        assert 4 / 16 <= line["masked_ratio"] <= 6 / 16  # 6 of 16: the paper's share of 75 in 196
        assert 1 <= line["target_perplexity"] <= 32
        assert line["grad_norm"] > 0
    rates = [line["lr"] for line in metrics]
    assert rates == sorted(rates, reverse=True)  # two epochs of three steps of warm-up are over
    assert pretrained.result["loss"] == metrics[-1]["loss"]


def test_the_model_is_the_named_size_as_it_is_pretrained(pretrained: Done) -> None:
    model = load(pretrained.folder)
    assert isinstance(model, BeitForMaskedImageModeling)
    assert model.config == VARIANTS["beit_mini_patch8_32"].for_pretraining(32)
    assert model.image_spec.size == (32, 32)
    assert model.image_spec.crop_ratio == 1.0


def test_the_folder_is_as_documented(pretrained: Done) -> None:
    assert sorted(p.name for p in pretrained.folder.iterdir()) == [
        "README.md", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors",
        "predictions.png", "preprocessor_config.json", "run.toml",
    ]  # fmt: skip
    with Image.open(pretrained.folder / "predictions.png") as sheet:
        assert sheet.size == (4 * 100 + 4, 8 * 100 + 4)  # picture, masked, tokens, guesses


def test_saved_weights_are_those_of_the_last_checkpoint(pretrained: Done) -> None:
    from safetensors.torch import load_file

    last = load_file(pretrained.folder / "checkpoints" / "step-00000060" / "model.safetensors")
    for name, tensor in load(pretrained.folder).state_dict().items():
        assert torch.equal(tensor, last[name]), name


@pytest.mark.parametrize(("layers", "img_size"), [(3, 32), (2, 32), (2, 48), (4, 48)])
def test_the_token_view_follows_the_patch_grid(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, img_size: int
) -> None:
    """Each patch has its token, whatever the stride of the tokenizer and the size of the picture."""
    options = {**TOKENIZER, "num_layers": layers, "steps": 1}
    tokens = run(tmp_path / "tokenizer", "train-tokenizer", shapes / "train", **options)
    seen = []
    encode = DiscreteVAE.encode

    def watch(self: DiscreteVAE, images: torch.Tensor) -> torch.Tensor:
        token_ids = encode(self, images)
        seen.append((tuple(images.shape[1:]), tuple(token_ids.shape[1:])))
        return token_ids

    monkeypatch.setattr(DiscreteVAE, "encode", watch)
    options = {**PRETRAIN, "tokenizer": tokens.folder, "steps": 1, "img_size": img_size}
    run(tmp_path / "pretrained", "pretrain", shapes / "train", **options)
    side, pixels = img_size // 8, img_size // 8 * 2**layers
    assert set(seen) == {((3, pixels, pixels), (side, side))}


def test_patches_and_tokens_of_a_sample_belong_together(
    shapes: Path, tmp_path: Path, tokenizer: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views that reach the model and the tokenizer show the same crops in the same order."""
    batches = []
    to_unit = beit.commands.pretrain.to_unit

    def watch(images: list[np.ndarray], device: torch.device) -> torch.Tensor:
        batches.append(to_unit(images, device))
        return batches[-1]

    monkeypatch.setattr(beit.commands.pretrain, "to_unit", watch)
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 3}
    run(tmp_path / "run", "pretrain", shapes / "train", **options)
    for patches, tokens in zip(batches[0:6:2], batches[1:6:2], strict=True):
        assert patches.shape == tokens.shape == (12, 3, 32, 32)
        assert float((patches - tokens).abs().mean()) < 0.02  # bicubic beside Lanczos
        others = (patches - tokens.roll(1, 0)).abs().mean(dim=(1, 2, 3))
        assert float(others.median()) > 0.05


@pytest.fixture
def short(tokenizer: Done) -> dict[str, Any]:
    return {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 6}


def test_same_seed_gives_bit_equal_weights_and_a_stopped_run_goes_on_to_them(
    shapes: Path, tmp_path: Path, short: dict[str, Any], broken_run: Broken
) -> None:
    options = {**short, "drop_path": 0.5}
    one = run(tmp_path / "1", "pretrain", shapes / "train", **options, workers=0)
    same_weights(one, broken_run(4, "pretrain", shapes / "train", **options))
    other = run(tmp_path / "2", "pretrain", shapes / "train", **options, seed=1)
    assert not torch.equal(one.weights["lm_head.weight"], other.weights["lm_head.weight"])


def test_gradient_checkpointing_changes_no_weight(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    one = run(tmp_path / "1", "pretrain", shapes / "train", **short)
    two = run(tmp_path / "2", "pretrain", shapes / "train", **short, gradient_checkpointing=True)
    same_weights(one, two)


def test_published_mask_is_75_of_196_in_blocks_of_16(
    shapes: Path, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    sample_mask = beit.commands.pretrain.sample_mask

    def watch(*values: Any) -> np.ndarray:
        asked.append((values[0], values[1], values[3]))
        return sample_mask(*values)

    monkeypatch.setattr(beit.commands.pretrain, "sample_mask", watch)
    large = {**short, "steps": 1, "img_size": 112, "batch_size": 2}
    run(tmp_path / "1", "pretrain", shapes / "train", **large)
    assert set(asked) == {((14, 14), 75, 16)}
    asked.clear()
    chosen = {**short, "steps": 1, "num_mask_patches": 5, "min_block": 2}
    run(tmp_path / "2", "pretrain", shapes / "train", **chosen)
    assert set(asked) == {((4, 4), 5, 2)}


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"model": "beit_mini_patch8_23"}, "did you mean beit_mini_patch8_32"),
        ({"img_size": 36}, "img_size 36 is not a multiple of patch_size 8; use 32 or 40"),
        ({"num_mask_patches": 16}, "cannot mask 16 of the 16 patches of a 4 x 4 grid"),
        ({"num_mask_patches": 3, "min_block": 9}, "min_block"),
        ({"batch_size": 0}, "--batch-size"),
        ({"steps": -5}, "--steps"),
        ({"crop_ratio": 0}, "crop_ratio 0.0 is not in (0, 1]"),
    ],
)
def test_wrong_settings_end_with_2_and_leave_no_folder(
    cli: Cli, shapes: Path, tmp_path: Path, short: dict[str, Any], wrong: dict[str, Any], cause: str
) -> None:
    options = {**short, **wrong, "out": tmp_path / "run"}
    code, out, err = cli("pretrain", shapes / "train", **options)
    assert (code, out) == (2, "")
    assert cause in err
    assert not (tmp_path / "run").exists()


def test_what_is_no_tokenizer_ends_with_5(
    cli: Cli, shapes: Path, tmp_path: Path, short: dict[str, Any], pretrained: Done
) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.toml").write_text('command = "TrainTokenizer"\n')
    for place, cause in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "unfinished", "has not finished"),
        (pretrained.folder, "not a visual tokenizer"),
    ):
        options = {**short, "tokenizer": place, "out": tmp_path / "run"}
        code, _, err = cli("pretrain", shapes / "train", **options)
        assert code == 5
        assert cause in err
    assert not (tmp_path / "run").exists()
