"""`beit train-tokenizer` on a few pictures of shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT, Cli
from PIL import Image

import beit.commands.train_tokenizer
from beit.augment import normalise, to_unit
from beit.checkpoints import load_model
from beit.commands.train_tokenizer import NOT_OF, model_features, open_teacher
from beit.data import open_source
from beit.image import BadImage, ImageSpec, resize_and_crop
from beit.metrics import psnr
from beit.optim import cosine_schedule, param_groups
from beit.tokenizer import DiscreteVAE
from beit.tokenizer_files import load_tokenizer
from beit.visualize import to_bytes
from beit.vqkd import VQKD, VQKDConfig, patch_pixels

from .conftest import PRETRAIN, TOKENIZER, Broken, Done, Options, run, same_weights

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
        "report.html", "resolved.toml", "run.toml",
    ]  # fmt: skip
    settings = tomllib.loads((tokenizer.folder / "run.toml").read_text())
    assert settings["command"] == "TrainTokenizer"
    assert settings["data"] == str(shapes / "train")
    assert (settings["vocab_size"], settings["steps"], settings["lr"]) == (32, 80, 3e-3)
    assert [line["step"] for line in tokenizer.metrics] == list(range(10, 81, 10))
    with Image.open(tokenizer.folder / "reconstructions.png") as sheet:
        assert sheet.size == (10 * 100 + 4, 2 * 100 + 4)  # ten pictures, above what is drawn
    page = (tokenizer.folder / "report.html").read_text()
    for told in ("codes alive", "perplexity", "psnr db", "vocab_size = 32", "data:image/png"):
        assert told in page


def test_the_page_is_made_while_it_trains(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times, of pictures seen without augmentation; the last is the finished tokenizer's."""
    looks: list[int] = []
    write_page = beit.commands.train_tokenizer.write_page

    def noted(out: Path, result: dict[str, float], *rest: Any) -> None:
        write_page(out, result, *rest)
        looks.append(int(result["steps"]))
        assert f"36 pictures after step {result['steps']}" in (out / "report.html").read_text()
        assert (out / "reconstructions.png").is_file()
        assert not (out / "config.json").exists()

    monkeypatch.setattr(beit.commands.train_tokenizer, "write_page", noted)
    run(tmp_path / "run", NAME, shapes / "train", **{**SHORT, "steps": 20})
    assert looks == list(range(2, 21, 2))


def test_a_look_that_fails_later_ends_no_training(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SHORT, "steps": 20}
    whole = run(tmp_path / "whole", NAME, shapes / "train", **options)
    judge, failing = beit.commands.train_tokenizer.judge, iter([0, 1])

    def judged(*values: Any) -> Any:
        if next(failing, 0):
            raise BadImage("unreadable", "a.png", "no file")
        return judge(*values)

    monkeypatch.setattr(beit.commands.train_tokenizer, "judge", judged)
    done = run(tmp_path / "run", NAME, shapes / "train", **options)
    assert "the look at step 4 failed, and the training goes on: a.png: no file" in done.said
    same_weights(done, whole)
    failing = iter([1])
    with pytest.raises(BadImage):
        run(tmp_path / "first", NAME, shapes / "train", **options)


def test_a_short_training_is_not_judged_for_hours(tmp_path: Path) -> None:
    """On as many pictures as it saw, or 256."""
    (tmp_path / "data").mkdir()
    for number in range(270):
        Image.new("RGB", (32, 32), (number % 256, 0, 0)).save(tmp_path / "data" / f"{number}.png")
    for steps, judged in ((1, 256), (30, 270)):
        out = tmp_path / f"{steps}"
        run(out, "train-tokenizer", tmp_path / "data", steps=steps, **TOKENIZER)
        assert f"What came over {judged} pictures" in (out / "report.html").read_text()


def test_info_tells_of_its_health(tokenizer: Done, cli: Cli) -> None:
    facts = json.loads(cli("info", tokenizer.folder, json=True)[1])
    live, perplexity, quality = facts["health"]
    assert live.startswith(f"{tokenizer.result['live_codes']:.1%} of the codes alive")
    assert perplexity.startswith(f"{tokenizer.result['perplexity']:.0f} perplexity")
    assert quality.startswith(f"{tokenizer.result['psnr_db']:.3g} dB PSNR")
    assert Path(facts["reconstructions"]).is_file()
    assert Path(facts["report"]).is_file()
    assert "17 to 23" in cli("info", tokenizer.folder)[1]


def test_settings_are_told_as_they_are_saved(tokenizer: Done) -> None:
    told = " ".join(tokenizer.said.split())
    assert told.startswith("train-tokenizer: data ")
    for line in (tokenizer.folder / "run.toml").read_text().splitlines():
        if line.split(" = ")[0] in ("command", *NOT_OF["dvae"]):
            continue
        assert " ".join(line.split(" = ", 1)) in told


def test_settings_of_the_other_kind_are_not_told(tokenizer: Done, vqkd: Done) -> None:
    for done, ours, theirs in (
        (tokenizer, "hidden_dim", "decoder_depth"),
        (vqkd, "decoder_depth", "hidden_dim"),
    ):
        assert f", {ours} " in " ".join(done.said.split())
        assert theirs not in done.said.replace(f"not used: {theirs};", "")


def test_the_settings_are_the_tokenizers(tokenizer: Done) -> None:
    model = load_tokenizer(tokenizer.folder)
    assert isinstance(model, DiscreteVAE)
    assert (model.vocab_size, model.stride, model.view_size) == (32, 8, (32, 32))
    assert (model.config.code_dim, model.config.hidden_dim) == (8, 32)


SHORT = {**TOKENIZER, "steps": 8, "hidden_dim": 16}
NAME = "train-tokenizer"
VQKD_OPTIONS: Options = {"kind": "vqkd", "model": "beit_mini_patch8_32", "decoder_depth": 1}


def test_same_seed_gives_bit_equal_weights_with_any_number_of_threads(
    shapes: Path, tmp_path: Path
) -> None:
    one = run(tmp_path / "1", NAME, shapes / "train", **SHORT, workers=0)
    two = run(tmp_path / "2", NAME, shapes / "train", **SHORT, workers=3)
    same_weights(one, two)
    other = run(tmp_path / "3", NAME, shapes / "train", **SHORT, seed=1)
    assert not torch.equal(one.weights["codebook.weight"], other.weights["codebook.weight"])


@pytest.mark.parametrize(
    "options", [{}, {"quantizer": "gumbel"}, VQKD_OPTIONS], ids=["vq", "gumbel", "vqkd"]
)
def test_a_stopped_run_goes_on_to_bit_equal_weights_and_the_same_metrics(
    shapes: Path, tmp_path: Path, broken_run: Broken, options: Options
) -> None:
    options = {**SHORT, "revive_after_steps": 2, **options, "log_every": 4}  # a line of steps 5 to 8
    broken = broken_run(6, NAME, shapes / "train", **options)
    unbroken = run(tmp_path / "unbroken", NAME, shapes / "train", **options)
    same_weights(broken, unbroken)
    assert "going on from step 6 of 8" in broken.said
    timed = ("images_per_second", "data_wait_percent", "memory_mib")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in done.metrics]
        for done in (broken, unbroken)
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [4, 8]


@pytest.mark.parametrize("options", [{}, VQKD_OPTIONS], ids=["vq", "vqkd"])
def test_a_step_in_parts_is_the_step_of_all_of_it(
    shapes: Path, tmp_path: Path, options: Options
) -> None:
    # One step from the same weights, the codebook begun (vqkd) and moved by all that the parts took.
    settings = {**TOKENIZER, **options, "lr": 1e-4, "steps": 1, "log_every": 1}
    words = ("train-tokenizer", shapes / "train")
    whole = run(tmp_path / "whole", *words, **settings)
    parts = run(tmp_path / "parts", *words, **settings, device_batch_size=5)
    # A dVAE's parts are drawn with the codes of before the step, a whole one with those it moved.
    for key in ("live_codes", "perplexity", *(["cosine"] if options else [])):
        assert parts.metrics[0][key] == pytest.approx(whole.metrics[0][key], rel=1e-4), key
    (codebook,) = {"codebook.weight", "quantize.embedding.weight"} & whole.weights.keys()
    torch.testing.assert_close(parts.weights[codebook], whole.weights[codebook], rtol=0, atol=1e-5)
    if options:  # the first step of AdamW is about lr times the sign of each gradient
        ours, theirs = (done.weights["encoder.patch_embed.proj.weight"] for done in (parts, whole))
        assert (ours - theirs).abs().lt(1e-6).float().mean() > 0.99


def test_dead_codes_are_warned_of_below_a_half(shapes: Path, tmp_path: Path, tokenizer: Done) -> None:
    done = run(tmp_path / "many", NAME, shapes / "train", **{**SHORT, "vocab_size": 2048, "steps": 2})
    assert done.result["live_codes"] < 0.5
    assert "warning: " in done.said
    assert "--vocab-size 512" in done.said
    assert tokenizer.result["live_codes"] >= 0.5
    assert "warning" not in tokenizer.said


@pytest.mark.parametrize(
    ("live", "share", "told"),
    [
        (0.49, 0.5, "49% of the codes"),
        (0.5, 0.125, ""),
        (0.9, 0.12, "90% of the codes are alive, and used"),
    ],
)
def test_half_of_the_codes_or_an_eighth_evenly_is_where_the_warning_begins(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: float, share: float, told: str
) -> None:
    judge = beit.commands.train_tokenizer.judge

    def judged(*values: Any) -> tuple[Any, ...]:
        use, *others = judge(*values)
        return use._replace(live=live, perplexity=share * SHORT["vocab_size"]), *others

    monkeypatch.setattr(beit.commands.train_tokenizer, "judge", judged)
    done = run(tmp_path / "run", NAME, shapes / "train", **{**SHORT, "steps": 1})
    assert ("warning" in done.said) == bool(told)
    assert told in done.said
    assert f"next: beit pretrain {shapes / 'train'} --tokenizer {tmp_path / 'run'}" in done.said


def test_settings_of_the_other_kind_are_told(shapes: Path, tmp_path: Path) -> None:
    options = {**SHORT, **VQKD_OPTIONS, "steps": 1, "num_layers": 4, "quantizer": "gumbel"}
    said = run(tmp_path / "run", NAME, shapes / "train", **options).said
    assert "not used: hidden_dim, num_layers, quantizer; that is for the other kind" in said


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
        ({"kind": "vqgan"}, "vqgan"),
        ({"teacher": "clip.pt2"}, "--teacher clip.pt2 is for --kind vqkd; a dvae has no teacher"),
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


def test_a_broken_picture_is_passed_over_and_listed_and_too_many_end_the_run(
    cli: Cli, shapes: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for number, file in enumerate(sorted((shapes / "train" / "disc").iterdir())[:4]):
        content = file.read_bytes()[: 50 if number == 2 else None]
        (tmp_path / "photos" / f"{number}.png").write_bytes(content)
    code, _, err = cli(NAME, tmp_path / "photos", **SHORT, out=tmp_path / "run")
    assert code == 0
    assert "1 picture could not be read" in err
    assert "2.png" in (tmp_path / "run" / "bad_images.csv").read_text()
    strict = {**SHORT, "out": tmp_path / "strict", "max_bad_images": 0}
    code, _, err = cli(NAME, tmp_path / "photos", **strict)
    assert code == 4
    assert "2.png" in err
    assert not (tmp_path / "strict" / "config.json").exists()


def test_a_folder_without_pictures_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = cli(NAME, tmp_path / "empty", **SHORT, out=tmp_path / "run")
    assert code == 2
    assert "holds no pictures" in err
    assert not (tmp_path / "run").exists()


# --- VQ-KD ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqkd(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("runs") / "vqkd"
    return run(out, NAME, shapes / "train", **{**TOKENIZER, **VQKD_OPTIONS, "steps": 60, "lr": 1e-3})


def test_vqkd_comes_nearer_to_its_teacher(vqkd: Done) -> None:
    assert vqkd.metrics[-1]["cosine"] > vqkd.metrics[0]["cosine"] + 0.1
    assert vqkd.metrics[-1]["live_codes"] > 0.5


def test_what_is_reported_of_vqkd_is_what_the_saved_one_does(vqkd: Done, shapes: Path) -> None:
    images, model = pictures(shapes), load_tokenizer(vqkd.folder)
    assert isinstance(model, VQKD)
    assert (model.config.decoder_depth, model.config.embed_dim, model.config.code_dim) == (1, 96, 8)
    token_ids = model.encode(images)
    counts = np.bincount(token_ids.flatten(), minlength=32)
    assert vqkd.result["live_codes"] == (counts > 0).mean()
    said, target = model.decode_features(token_ids).numpy(), patch_pixels(images, 8).numpy()
    lengths = np.linalg.norm(said, axis=-1) * np.linalg.norm(target, axis=-1)
    cosine = ((said * target).sum(axis=-1) / lengths).mean()
    assert vqkd.result["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert f"cosine to the teacher {vqkd.result['cosine']:.3f}" in vqkd.said


def test_vqkd_is_shown_by_the_mean_patch_of_each_token(vqkd: Done, shapes: Path) -> None:
    images, model = pictures(shapes), load_tokenizer(vqkd.folder)
    token_ids = model.encode(images)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)  # (B, h, w, 3, 8, 8)
    means = {int(i): patches[token_ids == i].mean(dim=0) for i in token_ids.unique()}
    shown = torch.stack([means[int(i)] for i in token_ids[0].flatten()]).unflatten(0, (4, 4))
    drawn = shown.permute(2, 0, 3, 1, 4).reshape(3, 32, 32)
    with Image.open(vqkd.folder / "reconstructions.png") as sheet:
        tile = np.asarray(sheet)[104:200, 4:100]  # the first, below its original, 3 x 3 for a pixel
    expected = (drawn * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(tile[1::3, 1::3].astype(float) - expected).max() <= 1


def test_pretraining_takes_a_vqkd_tokenizer_and_draws_its_mean_patches(
    vqkd: Done, shapes: Path, tmp_path: Path
) -> None:
    model = load_tokenizer(vqkd.folder)
    assert model.can_draw
    (tile,) = to_bytes(model.decode(model.encode(pictures(shapes)[:1])))
    with Image.open(vqkd.folder / "reconstructions.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet)[104:200, 4:100][1::3, 1::3], tile)
    options = {**PRETRAIN, "steps": 2}
    done = run(tmp_path / "run", "pretrain", shapes / "train", tokenizer=vqkd.folder, **options)
    assert done.weights["lm_head.weight"].shape[0] == 32
    with Image.open(done.folder / "pictures" / "step-00000002.jpg") as sheet:
        assert sheet.size == (5 * 100 + 4, 8 * 100 + 4)  # picture, masked, tokens, guesses, right


def test_a_trained_model_may_be_the_teacher(shapes: Path, pretrained: Done, tmp_path: Path) -> None:
    options = {**SHORT, **VQKD_OPTIONS, "teacher": pretrained.folder, "steps": 2}
    done = run(tmp_path / "run", NAME, shapes / "train", **options)
    tokenizer = load_tokenizer(done.folder)
    assert isinstance(tokenizer, VQKD)
    assert tokenizer.config.teacher_dim == 96
    said = tokenizer.decode_features(tokenizer.encode(pictures(shapes)))
    target = model_features(load_model(pretrained.folder), (4, 4), pictures(shapes))
    cosine = F.cosine_similarity(said, target, dim=-1).mean().item()
    assert done.result["cosine"] == pytest.approx(cosine, abs=1e-4)
    options["teacher"] = pretrained.folder / ".." / pretrained.folder.name
    assert run(tmp_path / "run", NAME, shapes / "train", **options).result == done.result


def test_a_teachers_features_are_those_of_its_own_size_and_statistics(pretrained: Done) -> None:
    model = load_model(pretrained.folder)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model.image_spec = replace(model.image_spec, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    told = model_features(model, (4, 4), images)  # tokens of 16 pixels; its patches have 8
    smaller = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    state = model.layers((smaller - mean) / std, [3])[0][:, 1:]  # three quarters of 4 blocks
    expected = (state - state.mean(-1, keepdim=True)) / (
        state.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=0)


def test_a_classifier_teaches_its_normed_last_patches(finetuned: Done) -> None:
    model = load_model(finetuned.folder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    told = model_features(model, (4, 4), images)
    prepared = normalise(images, model.image_spec)
    torch.testing.assert_close(
        told, model.fc_norm(model.layers(prepared, [4])[0][:, 1:]), atol=1e-5, rtol=0
    )


def test_the_rate_rises_and_ends_as_asked(shapes: Path, tmp_path: Path) -> None:
    given = {"steps": 6, "batch_size": 18, "log_every": 1, "lr": 1e-3}
    asked = {"warmup_epochs": 1, "min_lr": 4e-4}  # 36 pictures: 2 steps
    for name, more, warmup, least in (("own", {}, 0, 1e-5), ("asked", asked, 2, 4e-4)):
        done = run(tmp_path / name, NAME, shapes / "train", **{**SHORT, **given, **more})
        expected = [cosine_schedule(step, 6, warmup, 1e-3, least) for step in range(6)]
        assert [line["lr"] for line in done.metrics] == pytest.approx(expected, rel=1e-5)


def plain_vit() -> Any:
    """One of transformers', random, 4 x 4 patches of 8 pixels."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32,
        patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


@pytest.mark.usefixtures("trusted")
def test_a_plain_vit_may_be_the_teacher_by_its_folder_or_exported_as_the_manual_shows(
    shapes: Path, tmp_path: Path
) -> None:
    vit = plain_vit()
    vit.save_pretrained(tmp_path / "vit")
    example = (ROOT / "docs" / "formats.md").read_text().split("```python\n")[1].split("```")[0]
    file = tmp_path / "teacher.pt2"
    exec(example.replace("224", "32").replace("teacher.pt2", str(file)), {"vit": vit})
    images = pictures(shapes)
    with torch.no_grad():
        expected = vit((images - 0.5) / 0.5).last_hidden_state[:, 1:]
    for name in (str(tmp_path / "vit"), str(file)):
        teacher, width = open_teacher(name, 32, 8, torch.device("cpu"))
        assert width == 24
        torch.testing.assert_close(teacher(images), expected, atol=1e-5, rtol=1e-5)
    options = {**SHORT, **VQKD_OPTIONS, "teacher": tmp_path / "vit", "steps": 2}
    tokenizer = load_tokenizer(run(tmp_path / "run", NAME, shapes / "train", **options).folder)
    assert isinstance(tokenizer, VQKD)
    assert tokenizer.config.teacher_dim == 24


class MeanColours(torch.nn.Module):
    """A teacher that says of each patch its three mean colours."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)


def exported(file: Path, patch_size: int = 8, any_batch: bool = True) -> Path:
    shapes = {"images": {0: torch.export.Dim("batch")}} if any_batch else None
    program = torch.export.export(
        MeanColours(patch_size), (torch.zeros(4, 3, 32, 32),), dynamic_shapes=shapes
    )
    torch.export.save(program, file)
    return file


@pytest.mark.usefixtures("trusted")
def test_an_exported_program_may_be_the_teacher(shapes: Path, tmp_path: Path) -> None:
    options = {**SHORT, **VQKD_OPTIONS, "teacher": exported(tmp_path / "colours.pt2")}
    done = run(tmp_path / "run", NAME, shapes / "train", **options)
    tokenizer = load_tokenizer(done.folder)
    said = tokenizer.decode_features(tokenizer.encode(pictures(shapes)))  # type: ignore[union-attr]
    colours = pictures(shapes).unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean(dim=(3, 5))
    cosine = F.cosine_similarity(said, colours.flatten(2).mT, dim=-1).mean().item()
    assert done.result["cosine"] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize(
    ("teacher", "cause"),
    [
        (
            {"patch_size": 16},
            "gives (2, 4, 3) for two pictures; these tokens need (2, 16, width), one row",
        ),
        ({"any_batch": False}, "cannot take two pictures of 32 x 32"),
    ],
)
@pytest.mark.usefixtures("trusted")
def test_a_teacher_that_does_not_fit_the_grid_is_refused_before_anything_starts(
    cli: Cli, shapes: Path, tmp_path: Path, teacher: dict[str, Any], cause: str
) -> None:
    file = exported(tmp_path / "wrong.pt2", **teacher)
    options = {**SHORT, **VQKD_OPTIONS, "out": tmp_path / "run", "teacher": file}
    code, _, err = cli(NAME, shapes / "train", **options)
    assert code == 2
    assert f"the teacher {file}" in err
    assert cause in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"img_size": 36}, "img_size 36 is not a multiple of patch_size 8; use 32 or 40"),
        ({"model": "beit_huge"}, "beit_huge"),
        ({"teacher": "no/such/model"}, "no/such/model"),
    ],
)
def test_wrong_settings_of_vqkd_leave_no_folder(
    cli: Cli, shapes: Path, tmp_path: Path, wrong: dict[str, object], cause: str
) -> None:
    options = {**SHORT, **VQKD_OPTIONS, "out": tmp_path / "run", **wrong}
    code, _, err = cli(NAME, shapes / "train", **options)
    assert code != 0
    assert cause in err
    assert not (tmp_path / "run").exists()


def test_a_reader_that_goes_away_ends_no_training(shapes: Path, tmp_path: Path) -> None:
    """`beit train-tokenizer ... 2>&1 | tee log`, and the tee is killed."""
    words = [sys.executable, "-m", "beit", "train-tokenizer", shapes, "-o", tmp_path / "run"]
    words += ["--img-size", "16", "--vocab-size", "8", "--hidden-dim", "8", "--steps", "3"]
    words += ["--batch-size", "4", "--workers", "0"]
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=-1, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_vqkd_begins_and_decays_as_published() -> None:
    model = VQKD(VQKDConfig(img_size=32, embed_dim=192, num_heads=3, encoder_depth=1, teacher_dim=192))
    for layers in (model.encode_task_layer, model.decode_task_layer):
        assert 0.019 < float(layers[0].weight.detach().std()) < 0.021
        assert not layers[0].bias.detach().any()
    decayed, left = param_groups(model, 1e-4)
    if not decayed["weight_decay"]:
        decayed, left = left, decayed
    assert {"encoder.cls_token", "encoder.pos_embed", "decoder.cls_token", "decoder.pos_embed"} <= {
        *left["names"]
    }
    assert all(name.endswith(".weight") for name in decayed["names"])
    assert {"encode_task_layer.0.weight", "decoder.blocks.0.attn.qkv.weight"} <= {*decayed["names"]}
