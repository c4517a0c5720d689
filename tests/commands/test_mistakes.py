"""Mistakes that users make: the exit code of each, the cause by name, and what to do."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Cli, write_shapes

from .conftest import Done


@dataclass(frozen=True)
class Place:
    """What a user may have: data, models, and a folder of their own."""

    mine: Path  # data/, one folder a class; a copy that may be spoilt
    shapes: Path  # train/ and val/
    encoder: Path  # a pre-trained model
    classifier: Path
    tokenizer: Path

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.mine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def folder(self, name: str) -> Path:
        (self.mine / name).mkdir(parents=True)
        return self.mine / name

    @property
    def data(self) -> Path:
        return self.mine / "data"

    @property
    def out(self) -> Path:
        return self.mine / "run"


@pytest.fixture
def place(tmp_path: Path, shapes: Path, pretrained: Done, finetuned: Done, tokenizer: Done) -> Place:
    write_shapes(tmp_path / "data", 4, seed=5)
    return Place(tmp_path, shapes, pretrained.folder, finetuned.folder, tokenizer.folder)


class Mistake(NamedTuple):
    words: Callable[[Place], list[Any]]
    code: int
    told: tuple[str, ...]  # the cause, and what to do


def finetune(data: Callable[[Place], Any], *more: Any) -> Callable[[Place], list[Any]]:
    """A quick run from nothing, given some data; `more` are words, or made of the place."""

    def words(place: Place) -> list[Any]:
        given = [word(place) if callable(word) else word for word in more]
        line = ["finetune", data(place), *given]
        for option, value in (("-m", "beit_mini_patch8_32"), ("-o", place.out), ("--steps", 1)):
            line += [] if option in given else [option, value]
        return (
            [*line, "--workers", 0, "--no-report", "--device", "cpu"]
            if "--device" not in given
            else line
        )

    return words


def good(place: Place) -> Path:
    return place.data


def spoilt(count: int) -> Callable[[Place], Path]:
    def data(place: Place) -> Path:
        for number in range(count):
            place.file(f"data/disc/{number:02d}.png", "no picture")
        return place.data

    return data


def only_class(place: Place) -> Path:
    shutil.rmtree(place.data / "disc")
    shutil.rmtree(place.data / "square")
    return place.data


def class_in_val_only(place: Place) -> Path:
    shutil.copytree(place.shapes, place.mine / "both")
    (place.mine / "both" / "val" / "disc").rename(place.mine / "both" / "val" / "hexagon")
    return place.mine / "both"


def listed(*rows: str, header: str = "path,label") -> Callable[[Place], Path]:
    return lambda place: place.file("list.csv", "\n".join([header, *rows]) + "\n")


ROWS = [f"data/{shape}/{n:02d}.png,{shape}" for shape in ("disc", "square") for n in range(4)]


def other_family(place: Place) -> Path:
    folder = place.folder("resnet")
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    return folder


def resnet_file(place: Place) -> Path:
    torch.save(
        {"conv1.weight": torch.zeros(4, 3, 7, 7), "fc.bias": torch.zeros(9)}, place.mine / "r.pth"
    )
    return place.mine / "r.pth"


def truncated(place: Place) -> Path:
    shutil.copytree(place.classifier, place.mine / "half")
    whole = (place.mine / "half" / "model.safetensors").read_bytes()
    (place.mine / "half" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return place.mine / "half"


def unfinished(place: Place) -> Path:
    place.file("stopped/run.toml", 'command = "Pretrain"\n')
    return place.mine / "stopped"


def thesis(place: Place) -> Path:
    return place.file("papers/thesis.txt", "years of work").parent


def other_run(place: Place) -> Path:
    return place.file("run/run.toml", 'command = "Finetune"\nlr = 7.0\n').parent


EMPTY = lambda place: place.folder("nothing")  # noqa: E731

MISTAKES: dict[str, Mistake] = {
    "finetune: no such folder": Mistake(
        finetune(lambda p: p.mine / "flower"), 2, ("flower does not exist", "check the path")),
    "finetune: empty folder": Mistake(finetune(EMPTY), 2, ("holds no pictures",)),
    "finetune: no pictures in it": Mistake(
        finetune(lambda p: p.file("texts/a.txt", "hello").parent), 2, ("holds no pictures", ".png")
    ),
    "finetune: no classes": Mistake(
        finetune(lambda p: p.data / "disc"), 2, ("has no classes", "in a folder of its name")
    ),
    "finetune: one class": Mistake(finetune(only_class), 2, ("has one class (triangle)", "two or more")),
    "finetune: a class in val only": Mistake(
        finetune(class_in_val_only), 2, ("does not know: hexagon", "disc, square")
    ),
    "finetune: nothing can be read": Mistake(
        finetune(spoilt(4)), 4, ("cannot be read", "00.png", "--max-bad-images")
    ),
    "finetune: a zip": Mistake(finetune(lambda p: p.file("a.zip", "PK")), 2, ("a.zip", "unpack")),
    "finetune: a compressed tar": Mistake(finetune(lambda p: p.file("a.tar.gz", "")), 2, ("unpack",)),
    "finetune: a tar that is none": Mistake(
        finetune(lambda p: p.file("a.tar", "no tar")), 2, ("a.tar is not a whole, uncompressed tar",)
    ),
    "finetune: csv without names of columns": Mistake(
        finetune(listed(*ROWS[1:], header=ROWS[0])), 2, ("list.csv", "path,label")
    ),
    "finetune: csv with semicolons between columns": Mistake(
        finetune(listed("a.png;disc", header="path;label")), 2, ("list.csv", "path,label")
    ),
    "finetune: csv with a typo in a path": Mistake(
        finetune(listed(*ROWS, "data/disc/9.png,disc", "data/disc/8.png,disc")),
        4,
        ("data/disc/9.png (no such file)", "--max-bad-images"),
    ),
    "finetune: csv with a row without label": Mistake(
        finetune(listed(*ROWS, "data/disc/01.png,")), 2, ("line 10 of", "has no label")
    ),
    "finetune: csv with a typo in a label": Mistake(
        finetune(listed(*ROWS[:3], ROWS[3].replace(",disc", ",dics"), *ROWS[4:])),
        0,
        ("class dics has 1 picture; is it a misspelt disc?",),
    ),
    "finetune: csv in another encoding": Mistake(
        finetune(lambda p: p.file("list.csv", "path,label\nä.png,ä\n".encode("latin-1"))), 2, ("UTF-8",)
    ),
    "finetune: csv with nothing in it": Mistake(finetune(listed()), 2, ("list.csv holds no pictures",)),
    "finetune: a size that is no multiple of the patch": Mistake(
        finetune(good, "--img-size", 30), 2, ("30 is not a multiple of patch_size 8", "use 24 or 32")
    ),
    "finetune: a size by a wrong name": Mistake(
        finetune(good, "-m", "beit_min_patch8_32"), 2, ("did you mean beit_mini_patch8_32",)
    ),
    "finetune: a model that is not there": Mistake(
        finetune(good, "-m", lambda p: p.mine / "models" / "best"), 5,
        ("best does not exist", "check the path", "`beit models`"),
    ),
    "finetune: pictures as the model": Mistake(finetune(good, "-m", good), 5, ("has no config.json",)),
    "finetune: a tokenizer as the model": Mistake(
        finetune(good, "-m", lambda p: p.tokenizer), 5, ("not a BEiT encoder", "--tokenizer")
    ),
    "finetune: a run that has not finished as the model": Mistake(
        finetune(good, "-m", unfinished), 5, ("has not finished", "give its command again")
    ),
    "finetune: another family's folder": Mistake(finetune(good, "-m", other_family), 5, ("resnet",)),
    "finetune: another family's file": Mistake(finetune(good, "-m", resnet_file), 5, ("r.pth",)),
    "finetune: a page saved as a model": Mistake(
        finetune(good, "-m", lambda p: p.file("beit.pth", "<!doctype html><html>")),
        5,
        ("is a web page, not weights", "get a new link"),
    ),
    "finetune: half a model": Mistake(finetune(good, "-m", truncated), 5, ("model.safetensors",)),
    "finetune: a file where the run should go": Mistake(
        finetune(good, "-o", lambda p: p.file("taken", "")), 6, ("cannot write the run folder", "taken")
    ),
    "finetune: a folder of other things for the run": Mistake(
        finetune(good, "-o", thesis), 2, ("holds no run", "choose another --out")
    ),
    "finetune: a run of other settings there": Mistake(
        finetune(good, "-o", other_run), 2, ("lr was 7.0", "--overwrite")
    ),
    "finetune: a folder of other things, before the model is read": Mistake(
        finetune(good, "-m", "no/model", "-o", thesis), 2, ("holds no run",)
    ),
    "finetune: a run of other settings, before the model is read": Mistake(
        finetune(good, "-m", "no/model", "--lr", 1, "-o", other_run), 2, ("lr was 7.0, now 1.0",)
    ),
    "pretrain: a run of another command, before the tokenizer is read": Mistake(
        lambda p: ["pretrain", p.data, "--tokenizer", p.mine / "t", "-o", other_run(p)], 2,
        ("holds a run of beit finetune, and this is beit pretrain",),
    ),
    "train-tokenizer: a run of another command, before the teacher is read": Mistake(
        lambda p: ["train-tokenizer", p.data, "--teacher", p.mine / "t", "-o", other_run(p)], 2,
        ("holds a run of beit finetune, and this is beit train-tokenizer",),
    ),
    "finetune: hardly any validation pictures": Mistake(
        finetune(good), 0, ("validation pictures: 3, so their accuracy says little", "--val-share")
    ),
    "finetune: a file system that cannot be written": Mistake(
        finetune(good, "-o", "/proc/run"), 6, ("cannot write the run folder /proc/run",)
    ),
    "finetune: a batch of nothing": Mistake(finetune(good, "--batch-size", 0), 2, ("--batch-size",)),
    "finetune: a negative rate": Mistake(finetune(good, "--lr", "-1"), 2, ("--lr",)),
    "finetune: words for a number": Mistake(finetune(good, "--epochs", "many"), 2, ("--epochs", "many")),
    "finetune: no such option": Mistake(finetune(good, "--epoch", 3), 2, ("--epoch", "--epochs")),
    "finetune: no such validation pictures": Mistake(
        finetune(good, "--val", lambda p: p.mine / "vl"), 2, ("vl does not exist", "check the path")
    ),
    "finetune: more than all for validation": Mistake(
        finetune(good, "--val-share", 20), 2, ('"20.0" for --val-share. Must be < 1.',)
    ),
    "finetune: the best of nothing": Mistake(
        finetune(good, "--method", "best", "--val-share", 0), 2, ("validation pictures", "--val")
    ),
    "finetune: no such method": Mistake(finetune(good, "--method", "magic"), 2, ("--method", "head")),
    "finetune: more than the whole picture": Mistake(
        finetune(good, "--crop-ratio", 1.5), 2, ('"1.5" for --crop-ratio. Must be <= 1.',)
    ),
    "finetune: no such device": Mistake(finetune(good, "--device", "gpu"), 2, ("'gpu'", "cuda")),
    "finetune: no such precision": Mistake(finetune(good, "--precision", "fp8"), 2, ("--precision",)),
    "finetune: an average that never forgets": Mistake(
        finetune(good, "--ema-decay", 2), 2, ('"2.0" for --ema-decay. Must be < 1.',)
    ),
    "finetune: all may be bad and more": Mistake(
        finetune(good, "--max-bad-images", 3), 2, ('"3.0" for --max-bad-images. Must be <= 1.',)
    ),
    "finetune: no such recipe": Mistake(
        finetune(good, "--recipe", "beit_bas_1k"), 2, ("beit_bas_1k", "did you mean beit_base_1k")
    ),
    "finetune: no such config": Mistake(finetune(good, "--config", "nowhere.toml"), 2, ("nowhere.toml",)),
    "probe: no such split": Mistake(
        lambda p: ["probe", p.data, "-m", p.encoder, "--split", "test"], 2, ("train and a test folder",)
    ),
    "probe: a layer that is not there": Mistake(
        lambda p: ["probe", p.shapes, "-m", p.encoder, "--layers", 9], 2, ("layer 9", "0 to 4")
    ),
    "probe: a picture that is none": Mistake(
        lambda p: ["probe", spoilt(1)(p), "-m", p.encoder], 3, ("00.png", "1 of 12", "left out")
    ),
    "probe: no such kind": Mistake(
        lambda p: ["probe", p.shapes, "-m", p.encoder, "--kinds", "liner"], 2, ("liner", "linear")
    ),
    "probe: several labels a picture": Mistake(
        lambda p: ["probe", listed("data/disc/00.png,disc;square", *ROWS[1:])(p), "-m", p.encoder], 2,
        ("several labels", "'disc;square'", "beit finetune"),
    ),
    "probe: no such folder": Mistake(
        lambda p: ["probe", p.mine / "x", "-m", p.encoder], 2, ("x does not exist", "check the path")
    ),
    "probe: no such model": Mistake(
        lambda p: ["probe", p.shapes, "-m", p.mine / "m"], 5, ("m does not exist", "check the path")
    ),
    "probe: nowhere to write": Mistake(
        lambda p: ["probe", p.shapes, "-m", p.encoder, "-o", p.mine / "no" / "a.json"], 6,
        ("not a folder", "make it"),
    ),
    "evaluate: a pre-trained model": Mistake(
        lambda p: ["evaluate", p.shapes, "-m", p.encoder], 5, ("no classifier", "beit finetune")
    ),
    "evaluate: other classes": Mistake(
        lambda p: ["evaluate", class_in_val_only(p), "-m", p.classifier], 2, ("does not know: hexagon",)
    ),
    "evaluate: no labels": Mistake(
        lambda p: ["evaluate", p.data / "disc", "-m", p.classifier], 2, ("has no classes",)
    ),
    "evaluate: an empty folder": Mistake(
        lambda p: ["evaluate", EMPTY(p), "-m", p.classifier], 2, ("holds no pictures",)
    ),
    "evaluate: a picture that is none": Mistake(
        lambda p: ["evaluate", spoilt(1)(p), "-m", p.classifier], 3, ("00.png", "1 of 12", "left out")
    ),
    "evaluate: more such than may be": Mistake(
        lambda p: ["evaluate", spoilt(2)(p), "-m", p.classifier], 4, ("2 of 12", "--max-bad-images")
    ),
    "evaluate: no such preset": Mistake(
        lambda p: ["evaluate", p.shapes, "-m", p.classifier, "--preset", "keras"], 2, ("--preset", "timm")
    ),
    "evaluate: no real labels there": Mistake(
        lambda p: ["evaluate", p.shapes, "-m", p.classifier, "--real-labels", "real.json"],
        2,
        ("real.json does not exist", "check the path"),
    ),
    "evaluate: real labels that are none": Mistake(
        lambda p: ["evaluate", p.shapes, "-m", p.classifier, "--real-labels", p.file("real.json", "{}")],
        2,
        ("real.json is not the reassessed labels", "[[65], [970, 795], ...]"),
    ),
    "evaluate: real labels that are a picture": Mistake(
        lambda p: [
            "evaluate", p.shapes, "-m", p.classifier, "--real-labels", p.data / "disc" / "00.png",
        ],
        2,
        ("00.png is not the reassessed labels", "[[65], [970, 795], ...]"),
    ),
    "evaluate: numbers in a text": Mistake(
        lambda p: ["evaluate", p.shapes, "-m", p.classifier, "-o", p.mine / "a.txt"], 2,
        ("a.txt must end in .json", "name a.json"),
    ),
    "evaluate: a page in a text": Mistake(
        lambda p: ["evaluate", p.shapes, "-m", p.classifier, "--report", p.mine / "a.txt"], 2,
        ("a.txt must end in .html", "name a.html"),
    ),
    "probe: numbers in a text": Mistake(
        lambda p: ["probe", p.shapes, "-m", p.encoder, "-o", p.mine / "a.txt"], 2,
        ("a.txt must end in .json", "name a.json"),
    ),
    "check: a list in a text": Mistake(
        lambda p: ["check", p.data, "-o", p.mine / "a.txt"], 2, ("a.txt must end in .csv", "name a.csv")
    ),
    "classify: more bad pictures than may be": Mistake(
        lambda p: ["classify", spoilt(2)(p), "-m", p.classifier, "--max-bad-images", "0.1"], 4,
        ("2 of 12 pictures could not be read, where 1 may; mend them, or raise --max-bad-images",),
    ),
    "classify: nothing can be read": Mistake(
        lambda p: ["classify", spoilt(4)(p) / "disc", "-m", p.classifier], 4,
        ("4 of 4 pictures could not be read, which is all",),
    ),
    "evaluate: nowhere for the page": Mistake(
        lambda p: ["evaluate", p.shapes, "-m", p.classifier, "--report", p.mine / "no" / "a.html"],
        6,
        ("a.html", "not a folder"),
    ),
    "classify: a pre-trained model": Mistake(
        lambda p: ["classify", p.data, "-m", p.encoder], 5, ("no classifier", "beit finetune")
    ),
    "classify: no such picture": Mistake(
        lambda p: ["classify", p.mine / "cat.jpg", "-m", p.classifier], 2,
        ("cat.jpg does not exist", "check the path"),
    ),
    "classify: no pictures there": Mistake(
        lambda p: ["classify", EMPTY(p), "-m", p.classifier], 2, ("holds no pictures",)
    ),
    "classify: a picture that is none": Mistake(
        lambda p: ["classify", spoilt(1)(p), "-m", p.classifier], 3, ("1 of 12",)
    ),
    "classify: no model named": Mistake(lambda p: ["classify", p.data], 2, ("--model",)),
    "classify: nowhere to write": Mistake(
        lambda p: ["classify", p.data, "-m", p.classifier, "-o", p.mine / "no" / "a.csv"],
        6,
        ("not a folder", "make it"),
    ),
    "pretrain: no tokenizer there": Mistake(
        lambda p: ["pretrain", p.data, "--tokenizer", p.mine / "t", "-o", p.out], 5,
        ("t does not exist", "check the path"),
    ),
    "pretrain: a misspelt word for pixels": Mistake(
        lambda p: ["pretrain", p.data, "--tokenizer", "pixel", "-o", p.out], 5, ("the word pixels?",)
    ),
    "finetune: a misspelt released model": Mistake(
        finetune(good, "-m", "beit_base_patch16_224_pt22k_ft2k"), 2, ("_pt22k_ft22k or",)
    ),
    "finetune: an exported graph as the model": Mistake(
        finetune(good, "-m", lambda p: p.file("flowers.xml", "<?xml")), 5,
        ("is an exported graph", "the run's folder"),
    ),
    "classify: a size": Mistake(
        lambda p: ["classify", p.data, "-m", "beit_mini_patch8_32"], 5, ("is a size", "no weights")
    ),
    "pretrain: a classifier as the tokenizer": Mistake(
        lambda p: ["pretrain", p.data, "--tokenizer", p.classifier, "-o", p.out], 5, ("tokenizer",)
    ),
    "pretrain: an empty folder": Mistake(
        lambda p: ["pretrain", EMPTY(p), "--tokenizer", p.tokenizer, "-o", p.out], 2, ("holds no pictures",)
    ),
    "pretrain: a size that is no multiple of the patch": Mistake(
        lambda p: [
            "pretrain", p.data, "--tokenizer", p.tokenizer, "-o", p.out, "-m", "beit_mini_patch8_32",
            "--img-size", 33,
        ],
        2,
        ("33 is not a multiple", "use 32 or 40"),
    ),
    "a command that is none": Mistake(lambda p: ["fine-tune", p.data], 2, ("fine-tune", "finetune")),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_has_its_code_its_cause_and_its_cure(name: str, place: Place, cli: Cli) -> None:
    mistake = MISTAKES[name]
    code, _, err = cli(*mistake.words(place))
    assert code == mistake.code, err
    for words in mistake.told:
        assert words in err
    assert "Traceback" not in err


def test_there_are_sixty() -> None:
    assert len(MISTAKES) >= 60


def test_a_full_disk_says_what_to_do_and_keeps_what_was_saved(
    place: Place, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, saved = shutil.disk_usage(place.mine), place.out / "checkpoints" / "step-00000002"

    def left(_: object) -> object:
        return usage._replace(free=1000) if saved.exists() else usage

    command = finetune(good, "--steps", 6, "--save-every", 2)(place)
    monkeypatch.setattr(shutil, "disk_usage", left)
    code, _, err = cli(*command)
    assert code == 6
    assert "cannot write" in err
    assert "Make room there, then give the same command, without --overwrite, to go on" in err
    monkeypatch.undo()
    code, _, err = cli(*command)
    assert code == 0
    assert "going on from step 2 of 6" in err


def test_a_name_beside_a_wrong_one_is_offered(place: Place, cli: Cli) -> None:
    for words, meant in (
        (("check", place.mine / "date"), place.data),
        (("info", place.encoder.with_name(place.encoder.name[:-1])), place.encoder),
    ):
        code, _, err = cli(*words)
        assert code in (2, 5)
        assert f"did you mean {meant}?" in err


@pytest.mark.skipif(sys.platform == "win32", reason="torch looks for cl there")
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_compiling_without_a_compiler_is_refused_before_any_work(
    cli: Cli, place: Place, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    needed = {"tokenizer": place.tokenizer} if command == "pretrain" else {}
    code, _, said = cli(command, place.data, out=place.out, compile=True, **needed)
    assert code == 2
    assert "no-such-compiler is not there: install it" in " ".join(said.split())
    assert not place.out.exists()
