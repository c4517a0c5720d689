"""`beit demo --fast`, run once as a process; its page, its numbers and the commands it shows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from beit.checkpoints import load
from beit.cli import app
from beit.settings import describe_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("sklearn")

Process = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def demo(beit_process: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Process]:
    """The folder `demo` of a fast demo, and what its process said."""
    place = tmp_path_factory.mktemp("a demo")  # with a space, as folders have
    return place / "demo", beit_process("demo", "--fast", cwd=place)


def test_it_ends_well_and_its_last_line_is_json(demo: tuple[Path, Process]) -> None:
    _, process = demo
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["fast"] is True
    assert result["test_pictures"] == 359  # a fifth of 1,797
    assert [row["labels"] for row in result["test_accuracy"]] == [50, 200, 1169]
    shares = [result[key] for key in ("live_codes", "token_accuracy", "probe", "probe_untrained")]
    shares += [
        row[key] for row in result["test_accuracy"] for key in ("pretrained", "scratch", "raw_pixels")
    ]
    assert all(0 <= share <= 1 for share in shares)
    assert result["live_codes"] > 0.5
    assert result["probe"] > 0.3  # a guess is right in 1 of 10
    assert result["test_accuracy"][-1]["raw_pixels"] > 0.9


def test_warnings_and_tracebacks_are_none(demo: tuple[Path, Process]) -> None:
    for word in ("Warning", "warning", "Traceback"):
        assert word not in demo[1].stderr


def test_the_page_is_there_and_needs_nothing_else(demo: tuple[Path, Process]) -> None:
    folder, process = demo
    assert "The page: demo/report.html" in process.stdout
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert not set(re.findall(r"https?://[^\s\"']+", page)) - {"http://www.w3.org/2000/svg"}
    assert "nan" not in re.findall(r"points=\"([^\"]*)\"", page)


def test_the_numbers_of_the_page_are_those_of_the_last_line(demo: tuple[Path, Process]) -> None:
    folder, process = demo
    result = json.loads(process.stdout.splitlines()[-1])
    page = (folder / "report.html").read_text()
    for row in result["test_accuracy"]:
        cells = "".join(f"<td>{row[key]:.1%}</td>" for key in ("pretrained", "scratch", "raw_pixels"))
        assert f"<tr><td>{row['labels']}</td>{cells}</tr>" in page


def test_the_commands_it_shows_are_those_it_ran(demo: tuple[Path, Process]) -> None:
    folder, process = demo
    shown = re.findall(r"^ {5}(beit .*)$", process.stderr, re.MULTILINE)
    assert len(shown) == 3 + 6
    for line in shown:
        function, bound, _ = app.parse_args(
            shlex.split(line)[1:], print_error=False, exit_on_error=False
        )
        settings = describe_settings(bound.arguments["settings"])
        assert function.__name__ == line.split()[1].replace("-", "_")
        if "out" in settings:
            ran = tomllib.loads((folder.parent / settings["out"] / "run.toml").read_text())
            assert json.loads(json.dumps(settings)) == ran, line


def test_the_last_classifier_knows_the_digits(demo: tuple[Path, Process]) -> None:
    model = load(demo[0] / "pretrained-all")
    assert list(model.id2label.values()) == list("0123456789")


def test_its_pictures_are_split_without_overlap(demo: tuple[Path, Process]) -> None:
    splits = [{p.name for p in (demo[0] / "data" / s).rglob("*.png")} for s in ("train", "val", "test")]
    assert [len(split) for split in splits] == [1169, 269, 359]
    assert len(set.union(*splits)) == 1797
    for labels in (50, 200):
        lines = (demo[0] / "data" / f"train-{labels}.csv").read_text().splitlines()[1:]
        assert len(set(lines)) == labels
        assert {Path(line.split(",")[0]).name for line in lines} <= splits[0]


def test_without_scikit_learn_the_extra_is_named(cli: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, err = cli("demo", out=tmp_path / "demo")
    assert code == 2
    assert 'pip install "beit[demo]"' in err
