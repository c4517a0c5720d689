"""`beit classify`: what it prints and writes, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, LOCK_LEFT_HELD, Cli, held_by_another_process

import beit.folder_lock
from beit.checkpoints import load_model, save
from beit.commands.classify import write_table
from beit.embeddings import model_sha256
from beit.engine import Engine, Prediction
from beit.progress import Progress

from .conftest import Done


@pytest.fixture
def photos(shapes: Path, tmp_path: Path) -> Path:
    """Five pictures, the third of them broken; a folder inside a folder, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name, shape in (
        ("1.png", "disc"),
        ("2.png", "square"),
        ("deep/4.png", "disc"),
        ("5.png", "triangle"),
    ):
        (folder / name).write_bytes((shapes / "val" / shape / "00.png").read_bytes())
    (folder / "3.png").write_bytes((folder / "1.png").read_bytes()[:70])
    (folder / "notes.md").write_text("not looked at")
    return folder


ORDER = ["1.png", "2.png", "3.png", "5.png", "deep/4.png"]


def expected(finetuned: Done, photos: Path) -> list[Prediction]:
    return list(Engine(finetuned.folder).classify([photos / name for name in ORDER]))


def test_good_pictures_are_answered_and_end_with_0(cli: Cli, finetuned: Done, shapes: Path) -> None:
    files = [shapes / "val" / "square" / "01.png", shapes / "val" / "disc" / "02.png"]
    code, out, err = cli("classify", *files, model=finetuned.folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for line, file, answer in zip(lines, files, Engine(finetuned.folder).classify(files), strict=True):
        assert line.startswith(f"{file}  {answer.label} {answer.score:.1%}")
        for name, score in answer.top:
            assert f"{name} {score:.1%}" in line


def test_one_broken_picture_ends_with_3_and_the_others_are_answered(
    cli: Cli, finetuned: Done, photos: Path
) -> None:
    code, out, err = cli("classify", photos, model=finetuned.folder)
    assert code == 3
    assert "1 of 5 pictures could not be read" in err
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [str(photos / name) for name in ORDER]
    assert "not a readable picture" in lines[2]
    for line, answer in zip(lines, expected(finetuned, photos), strict=True):
        assert answer.label is None or f"  {answer.label} " in line


def test_json_is_one_object_a_line_and_nothing_else(cli: Cli, finetuned: Done, photos: Path) -> None:
    code, out, _ = cli("classify", photos, model=finetuned.folder, json=True, top=2)
    assert code == 3
    ours = [json.loads(line) for line in out.splitlines()]
    for content, answer in zip(ours, expected(finetuned, photos), strict=True):
        assert content.keys() == {"path", "label", "score", "top", "error"}
        assert content["path"] == answer.path
        assert content["label"] == answer.label
        assert content["score"] == pytest.approx(answer.score)
        assert len(content["top"]) == (2 if answer.label else 0)


def test_a_file_tells_how_far_it_is(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def update(progress: Progress, done: int, text: str = "") -> None:
        told.append((done, progress.total, progress.quiet))

    monkeypatch.setattr(Progress, "update", update)
    cli("classify", photos, model=finetuned.folder, out=tmp_path / "answers.jsonl")
    assert told == [(done, 5, False) for done in range(1, 6)]


def test_csv_has_a_row_a_picture_in_their_order(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    code, out, err = cli("classify", photos, model=finetuned.folder, out=tmp_path / "answers.csv")
    assert (code, out) == (3, "")
    assert f"5 pictures classified into {tmp_path / 'answers.csv'}" in err
    with (tmp_path / "answers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    others = ["label_2", "score_2", "label_3", "score_3"]  # of three classes
    assert list(rows[0]) == ["path", "label", "score", "error", *others]
    for row, answer in zip(rows, expected(finetuned, photos), strict=True):
        assert row["path"] == answer.path
        assert row["label"] == (answer.label or "")
        assert row["error"] == (answer.error or "")
        assert (float(row["score"]) if row["score"] else None) == pytest.approx(answer.score)
        rest = [row[column] for column in others]
        assert rest[::2] == ([name for name, _ in answer.top[1:]] or ["", ""])
        scores = [float(score) if score else None for score in rest[1::2]]
        assert scores == pytest.approx([score for _, score in answer.top[1:]] or [None, None])


def test_csv_names_as_many_classes_as_top_says(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    """Of a model whose pictures may have several labels too, each class with its own probability."""
    model = load_model(finetuned.folder)
    model.config = replace(model.config, several_labels=True)
    save(model, tmp_path / "several")
    for place in (finetuned.folder, tmp_path / "several"):
        words = {"model": place, "out": tmp_path / "a.csv"}
        assert cli("classify", photos / "1.png", **words, top=1)[0] == 0
        assert (tmp_path / "a.csv").read_text().splitlines()[0] == "path,label,score,error"
        assert cli("classify", photos / "1.png", **words, top=2)[0] == 0
        with (tmp_path / "a.csv").open(newline="") as stream:
            (row,) = csv.DictReader(stream)
        ((_, first), (name, second)) = next(Engine(place).classify(photos / "1.png", 2)).top
        assert (float(row["score"]), row["label_2"]) == (pytest.approx(first), name)
        assert float(row["score_2"]) == pytest.approx(second)


def test_jsonl_file_has_the_lines_that_json_prints(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    cli("classify", photos, model=finetuned.folder, out=tmp_path / "answers.jsonl")
    _, printed, _ = cli("classify", photos, model=finetuned.folder, json=True)
    assert (tmp_path / "answers.jsonl").read_text() == printed


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_changes_no_answer(cli: Cli, finetuned: Done, photos: Path, batch_size: int) -> None:
    _, out, _ = cli("classify", photos, model=finetuned.folder, json=True, batch_size=batch_size)
    labels = [json.loads(line)["label"] for line in out.splitlines()]
    assert labels == [answer.label for answer in expected(finetuned, photos)]


def test_lists_name_pictures_too(cli: Cli, finetuned: Done, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("photos/5.png\nphotos/1.png\n")
    (tmp_path / "list.csv").write_text("path,label\nphotos/2.png,cat\n")
    words = ("classify", tmp_path / "list.txt", tmp_path / "list.csv", photos / "1.png")
    code, out, _ = cli(*words, model=finetuned.folder)
    assert code == 0
    names = [Path(line.split("  ")[0]).name for line in out.splitlines()]
    assert names == ["5.png", "1.png", "2.png", "1.png"]


def test_a_data_folder_is_classified_whole(cli: Cli, finetuned: Done, shapes: Path) -> None:
    code, out, _ = cli("classify", shapes, model=finetuned.folder)
    assert code == 0
    assert len(out.splitlines()) == 36 + 15


def test_pictures_may_stand_behind_the_options(cli: Cli, finetuned: Done, photos: Path) -> None:
    code, out, _ = cli(
        "classify", "-m", finetuned.folder, "--top", "1", photos / "1.png", photos / "2.png"
    )
    assert code == 0
    assert len(out.splitlines()) == 2


def test_a_pipe_that_closes_early_is_no_error(finetuned: Done, shapes: Path, tmp_path: Path) -> None:
    """`beit classify ... | head -1` ends quietly."""
    words = [sys.executable, "-m", "beit", "classify", str(shapes), "-m", str(finetuned.folder),
             "--batch-size", "1"]  # fmt: skip
    with subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().count("%") >= 3
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(60), said) == (0, "")


@pytest.mark.parametrize(
    ("wrong", "code", "cause"),
    [
        ({"out": "answers.xlsx"}, 2, "--out answers.xlsx must end in .csv, .jsonl or .parquet"),
        ({"top": 0}, 2, "top"),
        ({"batch_size": 0}, 2, "batch"),
        ({"model": "nowhere.run"}, 5, "nowhere.run does not exist"),
        ({"precision": "fp8"}, 2, "fp8"),
        ({"max_bad_images": 2}, 2, '"2.0" for --max-bad-images. Must be <= 1.'),
        ({"tpo": 3}, 2, "--tpo is no setting of classify"),
        ({"out": "no/such/folder/answers.csv"}, 6, "no/such/folder"),
    ],
)
def test_wrong_settings_are_named(
    cli: Cli, finetuned: Done, photos: Path, wrong: dict[str, object], code: int, cause: str
) -> None:
    ours, out, err = cli("classify", photos / "1.png", **{"model": finetuned.folder, **wrong})
    assert (ours, out) == (code, "")
    assert cause in err
    assert "Traceback" not in err


def test_parquet_has_the_same_answers(cli: Cli, finetuned: Done, photos: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    code, out, _ = cli("classify", photos, model=finetuned.folder, out=tmp_path / "a.parquet")
    assert (code, out) == (3, "")
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for row, answer in zip(rows, expected(finetuned, photos), strict=True):
        assert (row["path"], row["label"], row["error"]) == (answer.path, answer.label, answer.error)
        assert row["top_labels"] == [name for name, _ in answer.top]
        np.testing.assert_allclose(row["top_scores"], [score for _, score in answer.top], rtol=1e-6)


def test_one_missing_file_is_a_row_and_the_others_are_answered(
    cli: Cli, finetuned: Done, photos: Path
) -> None:
    words = (photos / "1.png", photos / "gone.png", photos / "2.png")
    code, out, err = cli("classify", *words, model=finetuned.folder, json=True)
    assert code == 3
    assert "1 of 3 pictures could not be read" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == [str(word) for word in words]
    assert [row["label"] is None for row in rows] == [False, True, False]
    assert rows[1]["error"] == "no such file"


def test_patterns_tar_shards_and_a_list_on_stdin_name_pictures(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "some.tar", "w") as shard:
        shard.add(photos / "5.png", "a/5.png")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/2.png\n\n{photos}/deep/4.png\n"))
    words = (f"{photos}/[12].png", tmp_path / "some.tar", "-")
    code, out, _ = cli("classify", *words, model=finetuned.folder)
    assert code == 0
    names = [line.split("  ")[0] for line in out.splitlines()]
    tarred = f"{tmp_path}/some.tar/a/5.png"
    assert names == [*(f"{photos}/{n}.png" for n in (1, 2)), tarred, f"{photos}/2.png",
                     f"{photos}/deep/4.png"]  # fmt: skip


def test_a_relative_path_is_told_as_it_was_given(
    cli: Cli, finetuned: Done, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    _, out, _ = cli("classify", "photos/deep/4.png", "photos", model=finetuned.folder)
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names == ["photos/deep/4.png", *(f"photos/{name}" for name in ORDER)]


def test_on_a_terminal_it_is_a_table(
    finetuned: Done, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done, failed = write_table(iter(expected(finetuned, photos)))
    assert (done, failed) == (5, 1)
    out = capsys.readouterr().out
    for answer in expected(finetuned, photos):
        assert Path(answer.path).name in out
        assert answer.error is not None or f"{answer.score:.1%}" in out
    assert "not a readable picture" in out


def test_verbose_says_on_stderr_what_computes_and_why(cli: Cli, finetuned: Done, photos: Path) -> None:
    code, out, err = cli("classify", photos / "1.png", model=finetuned.folder, verbose=True)
    assert code == 0
    assert len(out.splitlines()) == 1
    assert "torch" in err
    assert "so small a model is not measured" in err


def test_an_exported_file_answers_as_its_model_and_without_torch(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    code, out, _ = cli("export", finetuned.folder, to="openvino", out=tmp_path / "s.xml")
    assert code == 0
    assert f"{tmp_path / 's.xml'}: " in out
    pictures = [photos / "1.png", photos / "2.png", photos / "5.png"]
    code, out, _ = cli("classify", *pictures, model=finetuned.folder, json=True, precision="fp32")
    words = ["classify", *map(str, pictures), "-m", str(tmp_path / "s.xml"), "--json"]
    barred = "import sys\nsys.modules['torch'] = None\n"
    barred += f"sys.argv[1:] = {[*words, '--precision', 'fp32']!r}\nfrom beit.cli import main\nmain()"
    alone = subprocess.run(
        [sys.executable, "-c", barred], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert (alone.returncode, alone.stderr) == (0, "")
    for ours, theirs in zip(alone.stdout.splitlines(), out.splitlines(), strict=True):
        one, other = json.loads(ours), json.loads(theirs)
        assert (one["path"], one["label"]) == (other["path"], other["label"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_missing_and_empty_places_are_named(
    cli: Cli, finetuned: Done, tmp_path: Path, pretrained: Done
) -> None:
    code, out, err = cli("classify", tmp_path / "cat.jpg", model=finetuned.folder)
    assert (code, out) == (2, "")
    assert "cat.jpg does not exist" in err
    code, out, err = cli("classify", tmp_path, model=finetuned.folder)
    assert (code, out) == (2, "")
    assert "holds no pictures" in err


def test_a_model_without_classifier_ends_with_5(cli: Cli, photos: Path, pretrained: Done) -> None:
    code, out, err = cli("classify", photos, model=pretrained.folder)
    assert (code, out) == (5, "")
    assert "beit finetune DATA -m MODEL" in err


def test_an_output_file_is_not_touched_by_a_command_that_fails(
    cli: Cli, photos: Path, pretrained: Done, tmp_path: Path
) -> None:
    (tmp_path / "answers.csv").write_text("from before")
    cli("classify", photos, model=pretrained.folder, out=tmp_path / "answers.csv")
    assert (tmp_path / "answers.csv").read_text() == "from before"


def test_too_many_bad_pictures_end_with_4_and_their_answers_are_written(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    """One of five is bad: more than a tenth; and one of one, all of them, whatever may be."""
    model = finetuned.folder
    code, out, err = cli("classify", photos, model=model, max_bad_images=0.1, out=tmp_path / "a.csv")
    assert (code, out) == (4, "")
    assert "1 of 5 pictures could not be read" in err
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 6
    bad = next(answer.path for answer in expected(finetuned, photos) if answer.error)
    code, out, err = cli("classify", bad, model=model, json=True)
    assert (code, len(out.splitlines())) == (4, 1)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_only_its_own_file_is_replaced_unasked(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"out{ending}"
    words = ["classify", photos / "1.png", "-m", finetuned.folder, "-o", out]
    out.write_bytes(b"")  # nothing to lose
    for more in ((), (), ("--top", 2)):
        assert cli(*words, *more)[0] == 0
    for content in (
        "path,label\n1.png,disc\n",
        '{"path": "1.png", "label": "disc"}\n',
        "[1]\n",
        "\n",
        "\0",
    ):
        out.write_text(content)
        code, _, said = cli(*words)
        assert (code, out.read_text()) == (6, content)
        told = f"{out} is there already, and classify did not write it; --overwrite replaces it"
        assert said == f"beit: {told}, or choose another place"
    assert cli(*words, "--overwrite")[0] == 0
    assert out.read_bytes() != content.encode()


def test_what_it_reads_is_not_written_over_whatever_is_said(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    names = tmp_path / "names.csv"
    names.write_text(f"path,label\n{photos / '1.png'},disc\n")
    shard = tmp_path / "shards" / "photos.parquet"
    shard.parent.mkdir()
    parquet.write_table(pa.table({"image": [(photos / "1.png").read_bytes()]}), shard)
    (tmp_path / "link.csv").symlink_to(names)
    for given, out in (
        (names, names), (tmp_path / "link.csv", names), (names, tmp_path / "link.csv"),
        (tmp_path / "n*.csv", names), (shard.parent, shard), ("-", names),
    ):  # fmt: skip
        before = out.read_bytes()
        with names.open("rb") as stdin:
            kept = os.dup(0)
            os.dup2(stdin.fileno(), 0)
            code, _, said = cli("classify", given, "-m", finetuned.folder, "-o", out, "--overwrite")
            os.dup2(kept, 0)
            os.close(kept)
        assert (code, out.read_bytes()) == (6, before)
        assert said == f"beit: cannot write {out}: it is what the command reads; name another file"


# --- Stopped, and gone on with -------------------------------------------------------------------


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each run is stopped after so many answers of its engine; how many each gave."""
    honest, given = Engine.classify, []

    def classify(self: Engine, images: Any, top: int = 5) -> Iterator[Prediction]:
        given.append(0)
        for answer in honest(self, images, top):
            if given[-1] == count:
                raise KeyboardInterrupt
            given[-1] += 1
            yield answer

    monkeypatch.setattr(Engine, "classify", classify)
    return given


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_stopped_run_goes_on_and_its_file_is_that_of_an_unbroken_one(
    cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"model": finetuned.folder, "batch_size": 4}
    unbroken, out = tmp_path / f"unbroken{ending}", tmp_path / f"out{ending}"
    assert cli("classify", shapes, out=unbroken, **how)[0] == 0
    pictures = len(list(shapes.rglob("*.png")))
    with monkeypatch.context() as patch:
        given = stop_after(10, patch)
        codes = []
        while not out.exists():
            code, _, said = cli("classify", shapes, out=out, **how)
            codes.append(code)
            assert ("give the same command to go on" in said) == (code == 130)
            if len(codes) == 2:
                assert f"going on after 8 answers in {tmp_path / f'.out{ending}.so-far'}" in said
    # Ten answers a run, the two of a batch that was not whole once more.
    assert given == [10] * (len(given) - 1) + [pictures - 8 * (len(given) - 1)]
    assert codes == [130] * (len(codes) - 1) + [0]
    assert out.read_bytes() == unbroken.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {unbroken.name, out.name}


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_names_that_are_no_utf8_are_kept_as_they_are(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path, ending: str
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    name = os.fsencode(folder) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((photos / "1.png").read_bytes())
    out = tmp_path / f"out{ending}"
    assert cli("classify", folder, model=finetuned.folder, out=out)[0] == 0
    if ending == ".parquet":  # whose texts must be UTF-8
        pa = pytest.importorskip("pyarrow.parquet")
        assert pa.read_table(out)["path"].to_pylist() == [f"{folder}/caf?.png"]
    elif ending == ".jsonl":  # whose lines must be UTF-8 too, and read back to the same name
        (line,) = out.read_text(encoding="utf-8").splitlines()
        assert os.fsencode(json.loads(line)["path"]) == name
        assert cli("classify", folder, "--json", model=finetuned.folder)[1].strip() == line
    else:
        assert name in out.read_bytes()


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_list_on_stdin_that_names_nothing_is_said(
    cli: Cli, finetuned: Done, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ([], ["-o", tmp_path / "out.csv"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(content))
        code, out, err = cli("classify", "-", "-m", finetuned.folder, *more)
        told = "the list on stdin names no pictures; give it a path a line"
        assert (code, out, err) == (2, "", f"beit: {told}")
    assert list(tmp_path.iterdir()) == []


def test_a_name_gives_no_orders_to_a_terminal_and_breaks_no_line(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"a\x1b[2J\n.png", b"b\xe9\xc3\xa9.png"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write((photos / "1.png").read_bytes())
    code, out, _ = cli("classify", folder, model=finetuned.folder)
    assert code == 0
    names = [line.split("  ")[0] for line in out.splitlines()]
    shown = [rf"{folder}/a\x1b[2J\n.png", rf"{folder}/b\xe9é.png"]
    assert names == shown
    write_table(iter([Prediction("a\x1b[2J\n.png", "\x07", 1.0, (("\x07", 1.0),))]))
    table = capfd.readouterr().out
    assert r"a\x1b[2J\n.png" in table
    assert "\x1b" not in table
    assert "\x07" not in table


def test_a_list_on_stdin_may_name_what_is_no_utf8(finetuned: Done, photos: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((photos / "1.png").read_bytes())
    words = [sys.executable, "-m", "beit", "classify", "-", "-m", str(finetuned.folder), "--json"]
    utf8 = {**ENVIRONMENT, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(words, env=utf8, input=name + b"\n", capture_output=True, check=True)
    answer = json.loads(done.stdout)
    assert (os.fsencode(answer["path"]), answer["error"]) == (name, None)


def test_a_name_that_the_terminal_has_no_letters_for_is_told(
    finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "写真.png").write_bytes((photos / "1.png").read_bytes())
    words = [
        sys.executable,
        "-m",
        "beit",
        "classify",
        str(tmp_path / "写真.png"),
        "-m",
        str(finetuned.folder),
    ]
    for more, name in ((["--json"], '写真.png"'), ([], "\\u5199\\u771f.png")):
        done = subprocess.run(
            [*words, *more],
            env={**ENVIRONMENT, "PYTHONIOENCODING": "cp1252"},
            capture_output=True,
            check=True,
        )
        said = done.stdout.decode("cp1252")
        assert name in (json.dumps(json.loads(said), ensure_ascii=False) if more else said)


def test_an_answer_file_that_another_process_writes_is_refused(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "out.csv", tmp_path / ".out.csv.so-far"
    kept.touch()
    monkeypatch.setattr(beit.folder_lock, "WAIT_S", 0)
    with held_by_another_process(kept):
        code, _, err = cli("classify", photos / "1.png", model=finetuned.folder, out=out)
    assert code == 2
    assert f"another process is at work on {kept}" in err
    assert not out.exists()
    assert cli("classify", photos / "1.png", model=finetuned.folder, out=out)[0] == 0


def test_a_line_of_zeros_that_a_power_cut_left_is_answered_again(
    cli: Cli, finetuned: Done, shapes: Path, tmp_path: Path
) -> None:
    out, kept = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.so-far"
    wanted = tmp_path / "wanted.jsonl"
    for file, first in ((wanted, False), (out, True)):
        if first:
            about = {
                "model_sha256": model_sha256(finetuned.folder), "img_size": None, "top": 5,
                "batch_size": 2, "runtime": "torch", "precision": "fp32",
            }  # fmt: skip
            lines = wanted.read_bytes().splitlines(keepends=True)
            kept.write_bytes(
                json.dumps(about).encode() + b"\n" + b"".join(lines[:2]) + bytes(50) + b"\n"
            )
        code, _, said = cli(
            "classify", shapes / "val", model=finetuned.folder, out=file, batch_size=2, runtime="torch",
            precision="fp32",
        )  # fmt: skip
        assert code == 0
    assert "going on after 2 answers" in said
    assert out.read_bytes() == wanted.read_bytes()


def test_a_killed_run_goes_on_past_a_torn_line(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path
) -> None:
    """Killed while it waits for the third picture's name."""
    out, kept = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.so-far"
    words = [sys.executable, "-m", "beit", "classify", "-", "-m", str(finetuned.folder), "-o", str(out),
             "--batch-size", "1"]  # fmt: skip
    with subprocess.Popen(words, env=ENVIRONMENT, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        names = iter([photos / name for name in ORDER])
        while not kept.exists() or kept.read_bytes().count(b"\n") < 3:
            if (name := next(names, None)) is not None:
                print(name, file=process.stdin, flush=True)
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.jsonl.*"))) == 2  # what was kept, and what was being written
    with kept.open("a") as file:
        file.write('{"path": "tor')
    (tmp_path / "list.txt").write_text("".join(f"{photos / name}\n" for name in ORDER))
    code, _, said = cli("classify", tmp_path / "list.txt", model=finetuned.folder, out=out, batch_size=1)
    assert code == 3
    assert "going on after" in said
    assert not list(tmp_path.glob(".*"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(photos / name) for name in ORDER]
    assert [line["label"] for line in lines] == [answer.label for answer in expected(finetuned, photos)]


def test_ctrl_c_that_leaves_a_lock_held_ends_the_process(
    finetuned: Done, shapes: Path, tmp_path: Path
) -> None:
    words = ["classify", str(shapes), "-m", str(finetuned.folder), "-o", str(tmp_path / "out.csv")]
    done = subprocess.run(
        [sys.executable, "-c", f"{LOCK_LEFT_HELD}\nfrom beit.cli import main\nmain()", *words],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "give the same command to go on" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top": 2}, "top was 5, now 2"),
        ({"batch_size": 3}, "batch_size was 2, now 3"),
        ({"img_size": 48}, "img_size was None, now 48"),
        ({"model": "other"}, "model_sha256 was"),
        ({"pictures": ["5.png", "1.png"]}, "holds answers for other pictures, "),
    ],
)
def test_answers_of_another_run_are_not_gone_on_with(
    cli: Cli,
    finetuned: Done,
    photos: Path,
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, kept = tmp_path / "out.csv", tmp_path / ".out.csv.so-far"
    how: dict[str, Any] = {"model": finetuned.folder, "out": out, "batch_size": 2}
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert cli("classify", photos, **how)[0] == 130
    before = kept.read_bytes()
    if change.get("model") == "other":
        model = load_model(finetuned.folder)
        with torch.no_grad():
            model.cls_token += 1
        save(model, tmp_path / "other")
        change = {"model": tmp_path / "other"}
    pictures = [photos / name for name in change.pop("pictures", ["."])]
    code, _, err = cli("classify", *pictures, **{**how, **change})
    assert code == 2
    assert said in err
    assert "or remove it to begin again" in err
    assert before.startswith(kept.read_bytes()), "what is whole stays"
    assert kept.read_bytes().count(b"\n") >= 3
    first = before.splitlines(keepends=True)[0]
    for nothing_kept in (first, first[:-5], b""):
        kept.write_bytes(nothing_kept)
        assert cli("classify", *pictures, **{**how, **change})[0] in (0, 3)


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")


@POSIX
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_full_disk_ends_with_6_and_keeps_what_was_there(
    cli: Cli, finetuned: Done, photos: Path, tmp_path: Path, ending: str
) -> None:
    """No file may grow beyond 100 bytes."""
    place = tmp_path / "place"
    place.mkdir()
    file = place / f"answers{ending}"
    file.write_text("from before")
    words = ["classify", str(photos), "-m", str(finetuned.folder), "-o", str(file), "--overwrite"]
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        f"sys.argv[1:] = {[*words, '--runtime', 'torch']!r}\n"
        "from beit.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (6, ""), done.stderr
    assert (
        done.stderr == f"beit: cannot write {file}: File too large; make room or choose another place\n"
    )
    assert file.read_text() == "from before"
    assert set(place.iterdir()) <= {file, place / f".answers{ending}.so-far"}
    assert cli(*words)[0] == 3, "with room the same command goes on"
    assert list(place.iterdir()) == [file]
    assert file.read_bytes() != b"from before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_ends_with_6(finetuned: Done, photos: Path) -> None:
    words = [sys.executable, "-m", "beit", "classify", str(photos), "-m", str(finetuned.folder)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*words, "--runtime", "torch"],
            env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
