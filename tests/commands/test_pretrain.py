"""`beit pretrain` on a few pictures of shapes."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image
from safetensors.torch import load_file, save_file

import beit.commands.pretrain
import beit.model
import beit.watch
from beit.checkpoints import load
from beit.image import HALF, IMAGENET_MEAN
from beit.model import VARIANTS, BeitForMaskedImageModeling
from beit.tokenizer import DalleConfig, DalleTokenizer, DiscreteVAE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .conftest import PRETRAIN, TOKENIZER, Broken, Done, Stopping, run, same_weights


def test_the_loss_falls_below_guessing(pretrained: Done) -> None:
    """Below the entropy of the tokens: the best guess of one who does not look at the picture."""
    first, last = pretrained.metrics[0], pretrained.metrics[-1]
    assert last["loss"] < first["loss"] - 0.3
    assert last["loss"] < math.log(last["target_perplexity"])
    assert last["token_accuracy"] > last["commonest_token"] >= 1 / last["target_perplexity"]
    assert f"{last['commonest_token']:.1%} by always saying the commonest" in pretrained.said


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


def test_looks_tell_whether_it_works_and_change_no_weight(
    shapes: Path, tmp_path: Path, pretrained: Done, tokenizer: Done
) -> None:
    """Probes of the layers asked for, from before the first step to after the last."""
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 60, "probe_data": shapes}
    done = run(
        tmp_path / "run", "pretrain", shapes / "train", **options, look_epochs=6, probe_layers=(2, 4)
    )
    same_weights(done, pretrained)
    count = len(list(shapes.rglob("*.png")))
    assert f"run: probing it at step 0 on {count} pictures" in done.said
    looks = json.loads((done.folder / "looks.json").read_text())
    epoch = len(list((shapes / "train").rglob("*.png"))) // 12
    assert [look["step"] for look in looks] == [*range(0, 60, 6 * epoch), 60]
    names = {f"{kind}_{layer}" for kind in ("linear", "knn", "effective_rank") for layer in (2, 4)}
    for look in looks:
        assert look.keys() == {"step", "pictures", "read"} | names
        assert all(0 <= look[name] <= 1 for name in names if not name.startswith("effective"))
        assert 1 <= look["effective_rank_4"] <= 96
    page = (done.folder / "report.html").read_text()
    for told in ("hidden tokens guessed", "linear", "step 60", "tokenizer = ", "effective rank"):
        assert told in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(page) < 5e6


def test_a_run_that_goes_on_with_other_probes_shows_only_looks_that_compare(
    shapes: Path, tmp_path: Path, tokenizer: Done, stopped_run: Stopping
) -> None:
    """Of other layers the page found no first rank and was not made any more; of others' pictures it
    drew one curve."""
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 9, "look_epochs": 1, "log_every": 1}
    stopped_run(tmp_path / "run", 4, 4, "pretrain", shapes / "train", **options)
    options |= {"probe_layers": (1,), "probe_data": shapes}
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    assert "failed" not in done.said
    looks = json.loads((done.folder / "looks.json").read_text())
    assert [look["step"] for look in looks if "linear_1" in look] == [6, 9]
    assert [look["step"] for look in looks if "effective_rank_3" in look] == [0, 3]
    page = (done.folder / "report.html").read_text()
    assert page.count("2 looks at other pictures or layers: in looks.json.") == 2
    assert f"{looks[2]['effective_rank_1']:.0f} at step 6" in page


def test_looks_leave_what_a_step_draws_as_it_is(shapes: Path, tmp_path: Path, tokenizer: Done) -> None:
    """Stochastic depth draws from torch's generator, which a look must not touch."""
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 6, "drop_path": 0.3}
    often, rarely = (
        run(tmp_path / str(epochs), "pretrain", shapes / "train", **options, look_epochs=epochs)
        for epochs in (1, 2)
    )
    assert len(list((often.folder / "pictures").iterdir())) == 3
    same_weights(often, rarely)


def test_a_look_that_fails_later_ends_no_training(
    shapes: Path, tmp_path: Path, tokenizer: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 6, "look_epochs": 1, "drop_path": 0.3}
    whole = run(tmp_path / "whole", "pretrain", shapes / "train", **options)
    probes, calls = beit.watch.Watch.probes, list[int]()

    def failing(watch: Any, model: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no pictures")
        return probes(watch, model)

    monkeypatch.setattr(beit.watch.Watch, "probes", failing)
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    assert "the look at step 3 failed, and the training goes on: no pictures" in done.said
    same_weights(done, whole)
    calls.append(1)
    with pytest.raises(RuntimeError, match="no pictures"):
        run(tmp_path / "first", "pretrain", shapes / "train", **options)


def test_another_start_or_size_is_refused(
    shapes: Path, tmp_path: Path, pretrained: Done, tokenizer: Done
) -> None:
    start = shutil.copytree(pretrained.folder, tmp_path / "start")
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "model": start, "steps": 1}
    run(tmp_path / "run", "pretrain", shapes / "train", **options)
    weights = load_file(start / "model.safetensors")
    name = next(name for name in weights if name.endswith("cls_token"))
    save_file({**weights, name: weights[name] + 1}, start / "model.safetensors")
    for model in (start, "beit_mini_patch8_32"):
        with pytest.raises(ValueError, match=f"{model} is another model now"):
            run(tmp_path / "run", "pretrain", shapes / "train", **{**options, "model": model})


def test_a_page_is_made_where_the_last_loss_is_not_finite(
    shapes: Path, tmp_path: Path, tokenizer: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "log_every": 1, "steps": 3}
    true_loss, steps = beit.commands.pretrain.masked_loss, list[int]()

    def poisoned(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return true_loss(logits, targets) * (math.inf if len(steps) == 3 else 1)

    monkeypatch.setattr(beit.commands.pretrain, "masked_loss", poisoned)
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    assert done.metrics[-1]["loss"] is None
    assert "look at step 3 failed" not in done.said
    assert "not finite</td>" in (done.folder / "report.html").read_text()


def test_a_finished_run_whose_metrics_are_gone_says_so(
    shapes: Path, tmp_path: Path, tokenizer: Done
) -> None:
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 1}
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    (done.folder / "metrics.jsonl").unlink()
    again = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    assert "1 step, its metrics are gone" in again.said


def test_tokens_are_counted_from_line_to_line_a_stop_between_or_not(
    shapes: Path, tmp_path: Path, tokenizer: Done
) -> None:
    """A line of four steps, or four lines of one: the same tokens, whose perplexity is of all together."""
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "batch_size": 3, "steps": 4, "lr": 0}
    each = run(tmp_path / "each", "pretrain", shapes / "train", **{**options, "log_every": 1})
    whole = run(tmp_path / "run", "pretrain", shapes / "train", **{**options, "save_every": 2})
    (line,) = whole.metrics
    entropies = [math.log(metric["target_perplexity"]) for metric in each.metrics]
    assert math.log(line["target_perplexity"]) > np.mean(entropies) + 0.01  # Jensen
    shutil.rmtree(whole.folder / "checkpoints" / "step-00000004")
    (whole.folder / "config.json").unlink()
    again = run(tmp_path / "run", "pretrain", shapes / "train", **{**options, "save_every": 2})
    assert "going on from step 2" in again.said
    for key in ("target_perplexity", "commonest_token"):
        assert again.metrics[-1][key] == line[key]


def test_pictures_tokenizer_and_start_may_move_and_others_are_refused(
    shapes: Path, tmp_path: Path, pretrained: Done, tokenizer: Done, broken_run: Broken
) -> None:
    places = {"pictures": shapes / "train", "tokens": tokenizer.folder, "start": pretrained.folder}
    for name, place in places.items():
        shutil.copytree(place, tmp_path / name)
    options = {**PRETRAIN, "tokenizer": tmp_path / "tokens", "model": tmp_path / "start", "steps": 3}
    first = run(tmp_path / "run", "pretrain", tmp_path / "pictures", **options)
    for name in places:
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    options |= {"tokenizer": tmp_path / "moved-tokens", "model": tmp_path / "moved-start"}
    again = run(tmp_path / "run", "pretrain", tmp_path / "moved-pictures", **options)
    assert f"run: data was '{tmp_path}/pictures', now '{tmp_path}/moved-pictures'" in again.said
    same_weights(again, first)
    next((tmp_path / "moved-pictures").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="moved-pictures holds other pictures now"):
        run(tmp_path / "run", "pretrain", tmp_path / "moved-pictures", **options)


def test_a_run_without_a_finite_update_leaves_no_model(
    cli: Cli, shapes: Path, tmp_path: Path, tokenizer: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = beit.commands.pretrain.masked_loss
    monkeypatch.setattr(beit.commands.pretrain, "masked_loss", lambda *given: loss(*given) * math.nan)
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 2}
    code, _, err = cli("pretrain", shapes / "train", out=tmp_path / "run", **options)
    assert code == 1
    assert "none of 2 updates was finite, so nothing was learned" in err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    code, _, err = cli("pretrain", shapes / "train", out=tmp_path / "b", **{**options, "drop_path": 1.0})
    assert (code, '"1.0" for --drop-path. Must be < 1' in err) == (2, True)


def test_a_trained_model_brings_its_own_layer_scale(
    cli: Cli, shapes: Path, tmp_path: Path, pretrained: Done, tokenizer: Done
) -> None:
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "model": pretrained.folder, "steps": 1}
    for value in (0.0, 0.5):
        code, _, said = cli("pretrain", shapes, out=tmp_path / "run", init_values=value, **options)
        assert code == 2
        assert f"--init-values {value} is for a fresh encoder" in said
    assert cli("pretrain", shapes, out=tmp_path / "new", init_values=0.1, **options)[0] == 0  # its own


@pytest.mark.parametrize("heads", [1, 2])
def test_the_page_judges_the_loss_of_each_head(pretrained: Done, heads: int) -> None:
    class Ran:
        def read_metrics(self) -> list[dict[str, Any]]:
            return [{"step": 1, "loss": 3.0, "token_accuracy": 0.1, "target_perplexity": 20.0}]

    looks = [{"step": 0, "effective_rank_2": 5.0}]
    rows = beit.commands.pretrain.expected_ranges(Ran(), looks, 32, 96, heads)  # type: ignore[arg-type]
    assert (
        "loss",
        "3.000",
        f"below {heads * math.log(20):.3f}, which is guessing without looking",
    ) in rows


def test_the_model_is_the_named_size_as_it_is_pretrained(pretrained: Done) -> None:
    model = load(pretrained.folder)
    assert isinstance(model, BeitForMaskedImageModeling)
    assert model.config == VARIANTS["beit_mini_patch8_32"].for_pretraining(32)
    assert model.image_spec.size == (32, 32)
    assert model.image_spec.crop_ratio == 1.0


def test_the_folder_is_as_documented(pretrained: Done) -> None:
    assert sorted(p.name for p in pretrained.folder.iterdir()) == [
        "README.md", "checkpoints", "config.json", "looks.json", "metrics.jsonl", "model.safetensors",
        "pictures", "preprocessor_config.json", "report.html", "resolved.toml", "run.toml",
    ]  # fmt: skip
    sheets = sorted((pretrained.folder / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == [f"step-{step:08d}.jpg" for step in range(0, 61, 3)]
    looks = json.loads((pretrained.folder / "looks.json").read_text())
    assert [look["step"] for look in looks] == list(range(0, 61, 6))  # ten times
    with Image.open(sheets[-1]) as sheet:
        assert sheet.size == (5 * 100 + 4, 8 * 100 + 4)  # picture, masked, tokens, guesses, right


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
        return batches[-1].clone()  # what is given is normalised in place

    monkeypatch.setattr(beit.commands.pretrain, "to_unit", watch)
    options = {**PRETRAIN, "tokenizer": tokenizer.folder, "steps": 3}
    run(tmp_path / "run", "pretrain", shapes / "train", **options)
    trained = [batch for batch in batches if len(batch) == 12]  # looks see 8
    for patches, tokens in zip(trained[0:6:2], trained[1:6:2], strict=True):
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


def test_no_rate_is_above_the_peak(shapes: Path, tmp_path: Path, short: dict[str, Any]) -> None:
    """Nor where that is below the usual rate of the end."""
    options = {**short, "lr": 1e-7, "log_every": 1}
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    assert max(line["lr"] for line in done.metrics) == 1e-7
    assert done.metrics[-1]["lr"] == 1e-7


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

    def watch(grid: Any, count: int, rng: Any, min_block: int, exact: bool) -> np.ndarray:
        asked.append((grid, count, min_block))
        return sample_mask(grid, count, rng, min_block, exact=exact)

    monkeypatch.setattr(beit.commands.pretrain, "sample_mask", watch)
    large = {**short, "steps": 1, "img_size": 112, "batch_size": 2}
    run(tmp_path / "1", "pretrain", shapes / "train", **large)
    assert set(asked) == {((14, 14), 75, 16)}
    asked.clear()
    chosen = {**short, "steps": 1, "num_mask_patches": 5, "min_block": 2}
    run(tmp_path / "2", "pretrain", shapes / "train", **chosen)
    assert set(asked) == {((4, 4), 5, 2)}


def test_a_step_in_parts_is_the_step_of_the_whole_batch(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    """The parts hide different numbers of patches; each patch counts alike all the same."""
    options = {**short, "crop_ratio": 1, "steps": 3}
    whole = run(tmp_path / "1", "pretrain", shapes / "train", **options)
    parts = run(tmp_path / "2", "pretrain", shapes / "train", **options, device_batch_size=5)
    assert whole.metrics[-1]["loss"] == pytest.approx(parts.metrics[-1]["loss"], rel=1e-5)
    assert whole.metrics[-1]["grad_norm"] == pytest.approx(parts.metrics[-1]["grad_norm"], rel=1e-4)
    for name, tensor in whole.weights.items():
        assert torch.allclose(tensor, parts.weights[name], atol=3e-4), name


@pytest.fixture
def v2(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small size with v2's extra blocks."""
    mini = beit.model.VARIANTS["beit_mini_patch8_32"]
    monkeypatch.setitem(beit.model.VARIANTS, "v2", dataclasses.replace(mini, early_layer=3))
    return "v2"


def test_v2_adds_the_loss_of_the_aggregated_class_token(
    shapes: Path, tmp_path: Path, short: dict[str, Any], v2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    cross_entropy = beit.commands.pretrain.masked_loss

    def watch(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(logits, targets)
        asked.append((loss.detach(), len(targets)))
        return loss

    monkeypatch.setattr(beit.commands.pretrain, "masked_loss", watch)
    options = {**short, "model": v2, "steps": 1, "exact_masks": True}
    done = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    (main, count), (extra, _) = asked
    assert count == 12 * 6, "exactly six of sixteen in each of twelve pictures"
    assert done.metrics[-1]["loss"] == pytest.approx(float(main + extra) / count, rel=1e-5)
    fresh = VARIANTS["v2"].for_pretraining(32)
    torch.manual_seed(0)
    start = BeitForMaskedImageModeling(fresh).state_dict()
    moved = load(done.folder).state_dict()
    assert not torch.equal(
        start["cls_pt_layers.0.mlp.fc1.weight"], moved["cls_pt_layers.0.mlp.fc1.weight"]
    )


def test_pixels_are_guessed_where_there_are_no_tokens(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    """Each patch's variance is 1, or 0 where it is of one colour: what one who says its mean gets."""
    options = {**short, "tokenizer": "pixels", "steps": 60, "num_mask_patches": 3, "min_block": 1}
    done = run(tmp_path / "1", "pretrain", shapes / "train", **options)
    assert 0.4 < done.metrics[0]["loss"] < 1.05
    assert done.metrics[-1]["loss"] < 0.9 * done.metrics[0]["loss"]
    assert not {"token_accuracy", "target_perplexity"} & done.metrics[-1].keys()
    assert load(done.folder).config.vocab_size == 192
    assert "1 or less is guessing each patch's mean" in done.said


def test_random_masks_hide_single_patches(
    shapes: Path, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    sample = beit.commands.pretrain.sample_random_mask

    def watch(*words: Any) -> np.ndarray:
        drawn.append(sample(*words))
        return drawn[-1]

    monkeypatch.setattr(beit.commands.pretrain, "sample_random_mask", watch)
    options = {**short, "masks": "random", "steps": 2}
    done = run(tmp_path / "1", "pretrain", shapes / "train", **options)
    assert {int(mask.sum()) for mask in drawn} == {6}
    assert done.metrics[-1]["masked_ratio"] == pytest.approx(6 / 16)


def test_pretraining_goes_on_from_a_trained_model_at_another_size(
    shapes: Path, tmp_path: Path, short: dict[str, Any], pretrained: Done
) -> None:
    options = {**short, "model": pretrained.folder, "lr": 0, "steps": 1}
    same = run(tmp_path / "1", "pretrain", shapes / "train", **options)
    same_weights(same, pretrained)
    larger = run(tmp_path / "2", "pretrain", shapes / "train", **options, img_size=48)
    assert "resized rel_pos_bias.relative_position_bias_table" in larger.said
    assert load(larger.folder).config.img_size == 48
    assert "the tokenizer sees views of 48 x 48 here, though it was trained on 32 x 32" in larger.said


def test_a_run_does_not_go_on_with_other_pictures_or_tokens(
    shapes: Path, tokenizer: Done, tmp_path: Path, short: dict[str, Any], cli: Cli
) -> None:
    shutil.copytree(shapes / "train", tmp_path / "data")
    shutil.copytree(tokenizer.folder, tmp_path / "tokens")
    options = {**short, "tokenizer": tmp_path / "tokens", "precision": "fp32"}
    done = run(tmp_path / "run", "pretrain", tmp_path / "data", **options)
    resolved = tomllib.loads((done.folder / "resolved.toml").read_text())
    expected = {"pictures": 36, "img_size": 32, "num_mask_patches": 6, "min_block": 1, "vocab_size": 32,
                "precision": "fp32", "processes": 1, "torch": torch.__version__}  # fmt: skip
    assert expected.items() <= resolved.items()
    assert resolved["steps"] == done.result["step"]

    def again() -> tuple[int, str, str]:
        return cli("pretrain", tmp_path / "data", out=done.folder, **options)

    assert again()[0] == 0
    extra = tmp_path / "data" / "disc" / "extra.png"
    shutil.copy(next(extra.parent.glob("*.png")), extra)
    code, _, err = again()
    assert code == 2
    assert "pictures was 36, now 37" in err
    assert "--overwrite" in err
    extra.unlink()
    weights = load_file(tmp_path / "tokens" / "model.safetensors")
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    save_file({**weights, name: weights[name] + 1}, tmp_path / "tokens" / "model.safetensors")
    code, _, err = again()
    assert code == 2
    assert f"{tmp_path / 'tokens'} is another tokenizer now" in err


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, whatever the tensor
def test_compiled_blocks_train_the_same_and_are_all_compiled(
    shapes: Path, tmp_path: Path, short: dict[str, Any], v2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def graphs_alone(module: torch.nn.Module) -> None:
        """The default backend's graphs, without its kernels, which take a minute to build."""
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", graphs_alone)
    beit.save_tokenizer(
        DalleTokenizer(DalleConfig(24, n_hid=8, n_init=8, img_size=32)), tmp_path / "dalle"
    )
    options = {**short, "model": v2, "steps": 2, "precision": "fp32", "tokenizer": tmp_path / "dalle"}
    plain = run(tmp_path / "1", "pretrain", shapes / "train", **options)
    assert not compiled
    done = run(tmp_path / "2", "pretrain", shapes / "train", **options, compile=True)
    assert len(compiled) == 1 + 4 + 2  # DALL-E's encoder, blocks, v2's extra blocks
    for name, tensor in plain.weights.items():
        torch.testing.assert_close(done.weights[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_statistics_travel_with_the_model(shapes: Path, tmp_path: Path, short: dict[str, Any]) -> None:
    done = run(
        tmp_path / "1", "pretrain", shapes / "train", **{**short, "steps": 1}, statistics="imagenet"
    )
    assert load(done.folder).image_spec.mean == IMAGENET_MEAN
    options = {**short, "model": done.folder, "steps": 1}
    later = run(tmp_path / "2", "pretrain", shapes / "train", **options)
    assert load(later.folder).image_spec == load(done.folder).image_spec
    other = run(tmp_path / "3", "pretrain", shapes / "train", **options, statistics="half")
    assert load(other.folder).image_spec.mean == HALF


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"model": "beit_mini_patch8_23"}, "did you mean beit_mini_patch8_32"),
        ({"img_size": 36}, "img_size 36 is not a multiple of patch_size 8; use 32 or 40"),
        ({"num_mask_patches": 16}, "cannot mask 16 of the 16 patches of a 4 x 4 grid"),
        ({"num_mask_patches": 3, "min_block": 9}, "min_block"),
        ({"batch_size": 0}, "--batch-size"),
        ({"steps": -5}, "--steps"),
        ({"crop_ratio": 0}, '"0.0" for --crop-ratio. Must be > 0'),
        ({"probe_layers": 5}, "--probe-layers 5: a layer is from 1 to 4"),
        ({"probe_data": "nowhere"}, "nowhere"),
        ({"tokenizer_fp16": True}, "--tokenizer-fp16 is for DALL-E's"),
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
        (tmp_path / "unfinished", "has not finished"),
        (pretrained.folder, "not a visual tokenizer"),
    ):
        options = {**short, "tokenizer": place, "out": tmp_path / "run"}
        code, _, err = cli("pretrain", shapes / "train", **options)
        assert code == 5
        assert cause in err
    assert not (tmp_path / "run").exists()


def test_the_head_of_a_start_stays_for_the_tokens_that_it_learned(
    shapes: Path, tokenizer: Done, pretrained: Done, tmp_path: Path
) -> None:
    """Two tokenizers of as many codes have nothing else in common."""
    options = {**PRETRAIN, "steps": 2, "model": pretrained.folder}
    other = run(
        tmp_path / "t", "train-tokenizer", shapes / "train", **{**TOKENIZER, "steps": 2, "seed": 5}
    )
    same = run(tmp_path / "1", "pretrain", shapes / "train", tokenizer=tokenizer.folder, **options)
    assert "lm_head" not in same.said
    new = run(tmp_path / "2", "pretrain", shapes / "train", tokenizer=other.folder, **options)
    assert "lm_head" in new.said


def test_settings_of_blocks_are_told_where_patches_are_hidden_at_random(
    shapes: Path, tokenizer: Done, tmp_path: Path
) -> None:
    options = {**PRETRAIN, "steps": 2, "masks": "random", "exact_masks": True, "min_block": 2}
    said = run(tmp_path / "1", "pretrain", shapes / "train", tokenizer=tokenizer.folder, **options).said
    assert "not used: min_block, exact_masks; patches hidden at random are no blocks" in said
    assert f"next: beit finetune LABELLED -m {tmp_path / '1'}" in said
