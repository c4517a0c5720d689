"""`beit evaluate` against counting the answers of `beit classify`, and against a loop of ten lines."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, write_shapes
from PIL import Image

import beit.commands.evaluate
from beit.checkpoints import load, load_model, save
from beit.cli import app
from beit.commands.evaluate import Evaluate, evaluate
from beit.data import open_source
from beit.engine import Engine
from beit.hub import class_names
from beit.image import HALF, IMAGENET_MEAN, ImageSpec, preset_spec
from beit.model import BeitConfig, BeitForImageClassification

from .conftest import FINETUNE, Done, run


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
    assert one["trained_on"] == 0
    _, out, err = cli("evaluate", shapes, model=finetuned.folder, split="train", json=True)
    assert json.loads(out)["pictures"] == json.loads(out)["trained_on"] == 36
    assert f"36 of 36 pictures are those that {finetuned.folder} was trained on" in err
    assert f"others: beit evaluate {shapes} -m {finetuned.folder}" in err


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


def test_brackets_in_the_name_of_a_class_are_shown(
    cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path
) -> None:
    model = load(finetuned.folder)
    model.id2label = {0: "disc", 1: "squ[i]re [/b]", 2: "triangle"}
    save(model, tmp_path / "m")
    shutil.copytree(shapes / "val", tmp_path / "data")
    (tmp_path / "data" / "square").rename(tmp_path / "data" / "squ[i]re [")
    rows = ["path,label"]
    for number, name in enumerate(("disc", "squ[i]re [", "triangle")):
        rows += [f"{file},{model.id2label[number]}" for file in (tmp_path / "data" / name).iterdir()]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    code, out, _ = cli("evaluate", tmp_path / "list.csv", model=tmp_path / "m")
    assert code == 0
    assert "squ[i]re [/b]" in out


def test_numbers_are_shown_before_a_file_is_written(
    cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = cli("evaluate", shapes, model=finetuned.folder, out=tmp_path)
    assert (code, out) == (6, "")
    assert f"cannot write {tmp_path}: it is a folder; name a file" in err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beit.commands.evaluate, "write_atomically", full)
    code, out, _ = cli("evaluate", shapes, model=finetuned.folder, out=tmp_path / "e.json")
    assert code == 6
    assert "top-1" in out


def test_the_preparation_is_named_as_it_was(cli: Cli, finetuned: Done, shapes: Path) -> None:
    result = json.loads(cli("evaluate", shapes, model=finetuned.folder, json=True)[1])
    spec = load(finetuned.folder).image_spec
    assert result["preset"] == "the model's own"
    assert result["preprocessing"] == json.loads(json.dumps(asdict(spec)))
    _, out, _ = cli("evaluate", shapes, model=finetuned.folder, preset="transformers")
    assert "prepared as transformers: squashed to 32 x 32, bilinear, mean 0.5/0.5/0.5" in out


@torch.no_grad()
def loop(folder: Path, data: Path, preset: str) -> tuple[np.ndarray, np.ndarray]:
    """Ten lines that owe nothing to the engine: Pillow, NumPy and the model."""
    model, logits, labels = load(folder).eval(), [], []
    ratio = {"unilm": 0.875, "timm": 0.9, "transformers": None}[preset]
    for label, name in enumerate(["disc", "square", "triangle"]):
        for file in sorted((data / name).iterdir()):
            image = Image.open(file).convert("RGB")
            if ratio is None:
                image = image.resize((32, 32), Image.Resampling.BILINEAR)
            else:
                short, scale = int(32 / ratio), int(32 / ratio) / min(image.size)
                width, height = (short if s == min(image.size) else int(s * scale) for s in image.size)
                left, top = round((width - 32) / 2), round((height - 32) / 2)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
                image = image.crop((left, top, left + 32, top + 32))
            pixels = (np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5
            logits.append(model(torch.from_numpy(pixels.transpose(2, 0, 1)[None])).numpy()[0])
            labels.append(label)
    return np.stack(logits), np.array(labels)


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four shapes stretched to different sizes, some in a wrong folder."""
    rng = np.random.default_rng(0)
    folder = write_shapes(tmp_path_factory.mktemp("oblong"), 8, seed=9)
    for file in sorted(folder.rglob("*.png")):
        with Image.open(file) as image:
            stretched = image.resize((int(rng.integers(34, 90)), int(rng.integers(34, 90))))
        stretched.save(file)
    (folder / "disc/00.png").rename(folder / "square/moved.png")
    return folder


@pytest.mark.parametrize("preset", ["unilm", "timm", "transformers"])
def test_each_preset_equals_a_loop_of_ten_lines(
    finetuned: Done, oblong: Path, preset: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, labels = loop(finetuned.folder, oblong, preset)
    result = evaluate(Evaluate(oblong, model=str(finetuned.folder), preset=preset, json=True))
    right = logits.argmax(axis=1) == labels
    assert result["top1"] == right.mean() < 1
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert result["nll"] == pytest.approx(-np.log(p[np.arange(24), labels]).mean(), abs=1e-5)
    for number, name in enumerate(["disc", "square", "triangle"]):
        assert result["per_class"][name] == right[labels == number].mean()
    engine = Engine(finetuned.folder, "torch", "fp32")
    engine.model.image_spec = preset_spec(engine.model.image_spec, preset, 96)
    np.testing.assert_allclose(engine.logits_of(open_source(oblong)), logits, atol=1e-5)


def test_presets_are_different_preparations(finetuned: Done, oblong: Path) -> None:
    every = [loop(finetuned.folder, oblong, preset)[0] for preset in ("unilm", "timm", "transformers")]
    for one in range(3):
        assert not np.allclose(every[one], every[one - 1], atol=1e-2)


@pytest.mark.parametrize(
    ("embed_dim", "mean", "ratio"),
    [(768, IMAGENET_MEAN, 0.9), (1024, IMAGENET_MEAN, 0.95), (1024, HALF, 0.9)],
)
def test_timms_preset_knows_its_large_v2(embed_dim: int, mean: Any, ratio: float) -> None:
    """timm's published crop_pct: 0.9, and 0.95 for beitv2_large; v1's large have other means."""
    spec = preset_spec(ImageSpec((16, 16), mean=mean), "timm", embed_dim)
    assert (spec.crop_ratio, spec.mean, spec.size) == (ratio, mean, (16, 16))


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
    assert result["top1_among_all"] == pytest.approx(top1)
    assert top1 > 0.5
    logits = Engine(finetuned.folder, "torch", "fp32").logits_of(open_source(tmp_path))
    labels = np.array([0] * 5 + [1] * 5)
    assert result["top1"] == (logits[:, 1:].argmax(axis=1) == labels).mean()
    assert (result["classes"], result["model_classes"]) == (2, 3)
    assert result["classes_without_pictures"] == ["disc"]
    _, out, err = cli("evaluate", tmp_path, model=finetuned.folder)
    assert "among the 2 classes that the data has; among all 3 of the model top-1 is " in out
    assert "no picture of 1 of 3 classes: disc" in err


def test_one_class_alone_is_scored_among_all(cli: Cli, finetuned: Done, tmp_path: Path) -> None:
    """Among itself everything would be right."""
    folder = write_shapes(tmp_path, 4, seed=3)
    shutil.move(folder / "disc", folder / "triangle/more")  # read as triangles, which they are not
    shutil.rmtree(folder / "square")
    result = json.loads(cli("evaluate", folder, model=finetuned.folder, json=True)[1])
    assert result["classes"] == 3
    assert result["top1"] < 1


# --- ImageNet ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with a head of ImageNet's 1,000 classes, named as the released ones are."""
    torch.manual_seed(0)
    config = BeitConfig(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=1000)
    model = BeitForImageClassification(config)
    torch.nn.init.normal_(model.head.weight)
    names = class_names(1000)
    assert names is not None
    model.id2label = dict(enumerate(names))
    folder = tmp_path_factory.mktemp("imagenet")
    save(model, folder, {})
    return folder


CHOSEN = (0, 217, 571)  # tench, English springer, gas pump


def imagenet_folder(root: Path, names: list[str]) -> Path:
    """Three pictures for each of the chosen classes, in folders of these names."""
    rng = np.random.default_rng(2)
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(3):
            file = root / name / f"ILSVRC2012_val_{10 * place + number + 1:08d}.png"
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    return root


@pytest.mark.parametrize(
    ("matched_by", "names"),
    [
        ("synset", ["n01440764", "n02102040", "n03425413"]),
        ("number", ["0", "217", "571"]),
        ("synonym", ["tench", "english_springer", "petrol pump"]),
    ],
)
def test_imagenet_folders_are_matched_by_synset_number_or_synonym(
    imagenet: Path, tmp_path: Path, matched_by: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = imagenet_folder(tmp_path, names)
    result = evaluate(Evaluate(folder, model=str(imagenet), json=True))
    logits = Engine(imagenet, "torch", "fp32").logits_of(open_source(folder))
    truth = np.repeat([CHOSEN[names.index(n)] for n in open_source(folder).classes], 3)
    assert result["matched_by"] == matched_by
    assert result["top1_among_all"] == (logits.argmax(axis=1) == truth).mean()
    among = np.array(CHOSEN)[logits[:, CHOSEN].argmax(axis=1)]
    assert result["top1"] == (among == truth).mean()
    assert result["classes"] == 3
    assert len(result["classes_without_pictures"]) == 997
    assert {n.split(",")[0] for n in result["per_class"]} == {"tench", "English springer", "gas pump"}


def test_a_folder_that_several_classes_are_named_like_is_refused(
    imagenet: Path, tmp_path: Path, cli: Cli
) -> None:
    """Crane is a bird and a machine."""
    model = load(imagenet)
    twice = [i for i, name in model.id2label.items() if name.startswith("crane")]
    assert len(twice) == 2
    model.id2label |= dict.fromkeys(twice, "crane")
    save(model, tmp_path / "model", {})
    folder = imagenet_folder(tmp_path / "data", ["crane", "tench, Tinca tinca"])
    code, _, err = cli("evaluate", folder, model=tmp_path / "model")
    assert code == 2
    assert "the model has 2 classes named crane; name that folder by its number" in err


def test_the_real_labels_accept_several_classes_by_the_number_of_the_picture(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = imagenet_folder(tmp_path / "val", ["n01440764", "n02102040", "n03425413"])
    answers = Engine(imagenet, "torch", "fp32").logits_of(open_source(folder)).argmax(axis=1).tolist()
    lists: list[list[int]] = [[] for _ in range(30)]
    lists[0] = [7, answers[0]]  # the first picture of the first class
    lists[1] = [answers[1] ^ 1]
    lists[21] = [answers[7]]  # the second of the third
    (tmp_path / "real.json").write_text(json.dumps(lists))
    settings = Evaluate(folder, model=str(imagenet), real_labels=tmp_path / "real.json", json=True)
    assert evaluate(settings)["real_top1"] == pytest.approx(2 / 3)  # six pictures have none


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "real.json does not exist"),
        ([[1]] * 20, "ILSVRC2012_val_00000021.png is none of them"),
        ([[1000]] * 30, "numbers more classes than the model's 1000"),
    ],
)
def test_real_labels_that_do_not_fit_are_named(
    cli: Cli, imagenet: Path, tmp_path: Path, content: Any, cause: str
) -> None:
    folder = imagenet_folder(tmp_path / "val", ["n01440764", "n02102040", "n03425413"])
    if content is not None:
        (tmp_path / "real.json").write_text(json.dumps(content))
    code, _, err = cli("evaluate", folder, model=imagenet, real_labels=tmp_path / "real.json")
    assert code == 2
    assert cause in err


@pytest.mark.parametrize("columns", ["40", "60"])
def test_a_narrow_terminal_cuts_names_and_no_numbers(
    cli: Cli,
    finetuned: Done,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
) -> None:
    """Names of the length that ImageNet's have."""
    model = load_model(finetuned.folder)
    model.id2label = {i: f"{name}, {'of many names ' * 3}" for i, name in model.id2label.items()}
    save(model, tmp_path / "long")
    for name in model.id2label.values():
        shutil.copytree(shapes / "val" / name.split(",")[0], tmp_path / "data" / name)
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = cli("evaluate", tmp_path / "data", model=tmp_path / "long")
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 3
    for row in rows:
        assert len(row) <= int(columns)
        assert re.search(r"│ \w.*… │ +5 │ +\d+\.\d% │", row), row


# --- The report ----------------------------------------------------------------------------------


def test_the_report_has_all_numbers_and_how_they_came(
    cli: Cli, finetuned: Done, noisy: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    code, out, _ = cli(
        "evaluate", noisy, model=finetuned.folder, json=True, out=file, preset="unilm", batch_size=5
    )
    assert code == 0
    printed, written = json.loads(out), json.loads(file.read_text())
    assert {key: written[key] for key in printed} == printed
    assert written["settings"]["preset"] == written["preset"] == "unilm"
    confusion = np.array(written["confusion"])
    assert confusion.sum() == 18
    assert np.trace(confusion) / 18 == pytest.approx(printed["top1"])
    for true, answer, often in printed["most_confused"]:
        names = written["class_names"]
        assert confusion[names.index(true), names.index(answer)] == often
    bins = written["calibration"]
    assert sum(bins["counts"]) == 18
    assert len(bins["counts"]) == 15
    gaps = np.abs(np.array(bins["accuracy"]) - bins["confidence"])
    assert printed["ece"] == pytest.approx((gaps * bins["counts"]).sum() / 18)
    low, high = printed["top1_interval"]
    assert low < printed["top1"] < high
    assert printed["top5_interval"] == pytest.approx([18 / (18 + 1.959964**2), 1.0])


def test_beyond_fifty_classes_the_worst_are_shown(cli: Cli, imagenet: Path, tmp_path: Path) -> None:
    model = load(imagenet)
    model.id2label = {i: f"kind {i:03d} of a thing with a very long name indeed" for i in range(1000)}
    save(model, tmp_path / "model", {})
    folder = imagenet_folder(tmp_path / "data", [model.id2label[i] for i in range(60)])
    code, out, _ = cli("evaluate", folder, model=tmp_path / "model", out=tmp_path / "report.json")
    assert code == 0
    assert sum(line.startswith("│ kind") for line in out.splitlines()) == 20
    assert "the 20 worst of 60 classes" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["confusion"] is None
    assert len(written["per_class"]) == 60


def test_a_report_that_cannot_be_written_is_named_before_the_work(
    cli: Cli, finetuned: Done, shapes: Path
) -> None:
    code, out, err = cli("evaluate", shapes, model=finetuned.folder, out="/nowhere/report.json")
    assert (code, out) == (6, "")
    assert "cannot write /nowhere/report.json: /nowhere is not a folder" in err


@pytest.mark.parametrize("command", ["evaluate", "probe"])
def test_numbers_are_not_written_over_the_model(
    cli: Cli, finetuned: Done, shapes: Path, command: str
) -> None:
    config = finetuned.folder / "config.json"
    before = config.read_bytes()
    code, _, err = cli(command, shapes, model=finetuned.folder, out=config)
    assert (code, config.read_bytes()) == (6, before)
    assert f"cannot write {config}: it is what the command reads; name another file" in err


def cases(shapes: Path, pretrained: Done, finetuned: Done, tmp_path: Path) -> dict[str, Any]:
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    other = tmp_path / "other" / "hexagon"
    other.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(other / "1.png")
    good = finetuned.folder
    return {
        "no classifier": (shapes, pretrained.folder, 5, "has no classifier; fine-tune it first"),
        "no model": (shapes, tmp_path / "nothing", 5, "nothing does not exist"),
        "no data": (tmp_path / "nowhere", good, 2, "nowhere does not exist"),
        "no labels": (shapes / "val" / "disc", good, 2, "has no classes"),
        "unknown class": (tmp_path / "other", good, 2, "the model does not know: hexagon"),
    }


@pytest.mark.parametrize("case", ["no classifier", "no model", "no data", "no labels", "unknown class"])
def test_what_cannot_be_scored_is_named(
    cli: Cli, shapes: Path, pretrained: Done, finetuned: Done, tmp_path: Path, case: str
) -> None:
    data, model, expected, cause = cases(shapes, pretrained, finetuned, tmp_path)[case]
    code, out, err = cli("evaluate", data, model=model)
    assert (code, out) == (expected, "")
    assert cause in err


def test_scores_do_not_depend_on_who_asks(finetuned: Done, shapes: Path) -> None:
    result = evaluate(Evaluate(shapes, model=str(finetuned.folder), json=True))
    assert result["top1"] == finetuned.result["val_accuracy"]
    assert Engine(finetuned.folder, "torch", "fp32").labels == ["disc", "square", "triangle"]


def test_the_page_says_what_the_numbers_say(
    cli: Cli, finetuned: Done, noisy: Path, tmp_path: Path
) -> None:
    code, out, err = cli(
        "evaluate", noisy, model=finetuned.folder, json=True, report=tmp_path / "page.html"
    )
    result = json.loads(out)
    assert code == 0
    assert f"the page: {tmp_path / 'page.html'}" in err
    page = (tmp_path / "page.html").read_text()
    assert f"<td>{result['top1']:.1%}</td>" in page
    assert f"The mean distance is {result['ece']:.1%}" in page
    for one, other, often in result["most_confused"]:
        assert f"<title>{one}, answered {other}: {often}</title>" in page
    rows = (tmp_path / "page_label_review.csv").read_text().splitlines()
    assert len(rows) == 1 + result["pictures"]
    code, _, err = cli("evaluate", noisy, model=finetuned.folder, report="/nowhere/page.html")
    assert code == 6
    assert "cannot write /nowhere/page.html" in err


def test_the_command_on_the_page_does_it_again(
    cli: Cli, finetuned: Done, noisy: Path, tmp_path: Path
) -> None:
    options = {"model": finetuned.folder, "img_size": 64, "preset": "timm", "precision": "bf16"}
    assert cli("evaluate", noisy, **options, report=tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    words = shlex.split(html.unescape(re.findall(r"<pre>(beit evaluate .*?)</pre>", page)[0]))
    again = app.parse_args(words[1:], print_error=False, exit_on_error=False)[1].arguments["settings"]
    given = {**options, "model": str(finetuned.folder), "report": tmp_path / "page.html"}
    assert again == Evaluate(noisy, **given)


def test_an_unreadable_picture_is_left_out_named_and_counted(
    cli: Cli, finetuned: Done, noisy: Path, tmp_path: Path
) -> None:
    """The numbers are those of the others; more of them than may be end with another code."""
    (noisy / "disc" / "05.png").write_bytes(b"no picture")
    options = {"model": finetuned.folder, "json": True}
    code, out, err = cli("evaluate", noisy, **options, report=tmp_path / "page.html")
    assert code == 3
    assert "1 of 18 pictures could not be read; they are left out" in err
    result = json.loads(out)
    (bad,) = result.pop("bad_images")
    assert bad["path"] == str(noisy / "disc" / "05.png")
    assert f"{bad['path']}: {bad['reason']}" in err
    (noisy / "disc" / "05.png").unlink()
    code, out, _ = cli("evaluate", noisy, **options)
    assert code == 0
    others = json.loads(out)
    assert others.pop("bad_images") == []
    assert result == others

    for number in range(2):
        (noisy / "disc" / f"{number:02d}.png").write_bytes(b"no picture")
    code, out, err = cli("evaluate", noisy, **options)
    assert code == 4
    assert "2 of 17 pictures could not be read, where 1 may" in err
    assert json.loads(out)["pictures"] == 15
    assert cli("evaluate", noisy, **options, max_bad_images=0.2)[0] == 3
    for file in noisy.glob("*/*.png"):
        file.write_bytes(b"no picture")
    code, out, err = cli("evaluate", noisy, **options, max_bad_images=1)
    assert (code, out) == (4, "")
    assert "17 of 17" in err


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A model of pictures with several labels, beside the lists it was trained and validated on."""
    folder = tmp_path_factory.mktemp("several")
    for part, seed in (("train", 0), ("val", 1)):
        write_shapes(folder / part, 8, seed=seed)
        rows = ["path,label"]
        for shape, other in (("disc", "warm"), ("square", "edges"), ("triangle", "edges")):
            rows += [f"{part}/{shape}/{number:02d}.png,{shape};{other}" for number in range(8)]
        (folder / f"{part}.csv").write_text("\n".join(rows) + "\n")
    options = {**FINETUNE, "model": "beit_mini_patch8_32", "steps": 20, "no_report": True}
    return run(folder / "run", "finetune", folder / "train.csv", **options, val=folder / "val.csv")


def test_of_several_labels_the_score_is_the_one_that_finetune_reported(
    cli: Cli, several: Done, tmp_path: Path
) -> None:
    data, page = several.folder.parent / "val.csv", tmp_path / "page.html"
    code, out, _ = cli("evaluate", data, model=several.folder, json=True, report=page)
    assert code == 0
    result = json.loads(out)
    assert result["mean_average_precision"] == pytest.approx(several.result["val_accuracy"], abs=1e-9)
    assert 0.3 < result["mean_average_precision"] < 1
    assert list(result["per_class"]) == ["disc", "edges", "square", "triangle", "warm"]
    each = list(result["per_class"].values())
    assert sum(each) / 5 == pytest.approx(result["mean_average_precision"])
    assert result["pictures"] == 24

    engine = Engine(several.folder, "torch", "fp32")
    logits = engine.logits_of(open_source(data)).astype(np.float64)
    labels = [line.split(",")[1].split(";") for line in data.read_text().splitlines()[1:]]
    truth = np.array([[name in some for name in engine.labels] for some in labels])
    sure = 1 / (1 + np.exp(-np.abs(logits)))
    assert 0 <= result["ece"] < 0.5
    right = ((logits > 0) == truth).mean()
    assert result["ece"] >= abs(sure.mean() - right) - 1e-9  # bins can only tell more apart
    loss = np.where((logits > 0) == truth, -np.log(sure), -np.log(1 - sure)).mean()
    assert result["binary_cross_entropy"] == pytest.approx(loss, rel=1e-5)

    assert f"<td>{result['mean_average_precision']:.1%}</td>" in page.read_text()
    rows = (tmp_path / "page_label_review.csv").read_text().splitlines()
    assert len(rows) == 25
    _, table, _ = cli("evaluate", data, model=several.folder, out=tmp_path / "all.json")
    assert f"mean average precision {result['mean_average_precision']:.2%} on 24 pictures" in table
    assert json.loads((tmp_path / "all.json").read_text())["per_class"] == result["per_class"]


def test_several_labels_and_one_are_not_mixed_up(
    cli: Cli, several: Done, finetuned: Done, shapes: Path
) -> None:
    lists = several.folder.parent
    code, _, err = cli("evaluate", lists / "val.csv", model=finetuned.folder)
    assert code == 2
    assert "several labels a picture" in err
    code, _, err = cli("evaluate", shapes, model=several.folder)
    assert code == 2
    assert "give a .csv" in err
    (lists / "new.csv").write_text("path,label\nval/disc/00.png,disc;cold\n")
    code, _, err = cli("evaluate", lists / "new.csv", model=several.folder)
    assert code == 2
    assert "cold" in err
