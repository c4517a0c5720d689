"""`beit search`: the nearest pictures by brute force, in words, as JSON and on a sheet."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, write_shapes
from PIL import Image

from beit.checkpoints import save
from beit.commands.search import Found, print_lines, print_tables
from beit.embeddings import Embeddings, unit
from beit.engine import Engine
from beit.model import BeitConfig, BeitForImageClassification

TINY = BeitConfig(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(BeitForImageClassification(TINY), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures; disc/00 once more as square/99. To be read only."""
    folder = write_shapes(tmp_path_factory.mktemp("data") / "photos", 10, seed=0)
    shutil.copy(folder / "disc" / "00.png", folder / "square" / "99.png")
    return folder


@pytest.fixture(scope="module")
def vectors(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from beit.cli import app

    out = tmp_path_factory.mktemp("vectors") / "v"
    app(["embed", str(photos), "-m", str(model), "-o", str(out), "--shard-size", "7"])
    return out


def brute_force(
    vectors: Path, query: Path, model: Path, img_size: int | None = None, **options: Any
) -> list[tuple[str, float]]:
    """Every picture of the folder, the nearest first."""
    folder = Embeddings(vectors)
    shards = range(folder.manifest.shards)
    rows = np.concatenate([folder.vectors(shard) for shard in shards]).astype(np.float64)
    paths = [path for shard in shards for _, path in folder.ids(shard)]
    engine = Engine(model, "torch", folder.manifest.precision, img_size=img_size)  # type: ignore[arg-type]
    (answer,) = engine.embed(query, **options)
    assert answer.vector is not None
    cosines = unit(rows) @ unit(answer.vector.astype(np.float64))
    return [(paths[i], float(cosines[i])) for i in np.argsort(-cosines, kind="stable")]


def test_neighbours_are_those_of_brute_force(cli: Cli, model: Path, photos: Path, vectors: Path) -> None:
    queries = [photos / "disc" / "00.png", photos / "triangle" / "04.png"]
    code, out, err = cli("search", vectors, *queries, top=5, json=True)
    assert (code, err) == (0, "")
    for line, query in zip(out.splitlines(), queries, strict=True):
        found = json.loads(line)
        assert found["path"] == str(query)
        expected = brute_force(vectors, query, model)[:5]
        assert [near["path"] for near in found["neighbours"]] == [path for path, _ in expected]
        for near, (_, cosine) in zip(found["neighbours"], expected, strict=True):
            assert near["cosine"] == pytest.approx(cosine, abs=1e-4)  # batches of 1 and of 2 round apart
    first = json.loads(out.splitlines()[0])["neighbours"]
    assert [near["path"] for near in first[:2]] == [str(queries[0]), str(photos / "square" / "99.png")]
    assert first[0]["cosine"] == first[1]["cosine"] == pytest.approx(1, abs=1e-5)


def test_approximate_search_gives_the_same_lines(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    query = photos / "disc" / "00.png"
    exact = cli("search", vectors, query, top=5, json=True)
    code, out, err = cli("search", vectors, query, top=5, json=True, approximate=True)
    assert (code, out) == (0, exact[1])  # 31 pictures are one list
    assert "faiss: making an index of 31 vectors, once" in err


def test_queries_are_embedded_as_the_folder_was(
    cli: Cli, model: Path, photos: Path, tmp_path: Path
) -> None:
    options = {"pooling": "cls", "layer": 1, "precision": "fp32", "dtype": "fp32", "normalise": True}
    assert cli("embed", photos, model=model, out=tmp_path / "v", img_size=48, **options)[0] == 0
    code, _, err = cli("embed", photos, model=model, out=tmp_path / "v", **options)
    assert (code, "img_size was 48, now None" in err) == (2, True)
    query = photos / "square" / "03.png"
    _, out, _ = cli("search", tmp_path / "v", query, top=31, json=True)
    found = [(near["path"], near["cosine"]) for near in json.loads(out)["neighbours"]]
    expected = brute_force(tmp_path / "v", query, model, img_size=48, pooling="cls", layer=1)
    np.testing.assert_allclose([c for _, c in found], [c for _, c in expected], atol=1e-5)
    assert found[0][0] == expected[0][0] == str(query)


def test_words_are_a_line_a_neighbour(cli: Cli, photos: Path, vectors: Path) -> None:
    query = photos / "disc" / "00.png"
    code, out, err = cli("search", vectors, query, top=3)
    assert (code, err) == (0, "")
    lines = [line.split("\t") for line in out.splitlines()]
    assert [len(line) for line in lines] == [3, 3, 3]
    assert lines[0] == [str(query), "1.0000", str(query)]
    assert [float(line[1]) for line in lines] == sorted((float(line[1]) for line in lines), reverse=True)


def test_a_terminal_gets_a_table_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables([Found("a.png", (("b.png", 0.98765), ("c.png", 0.5))), Found("d.png", (), "broken")])
    out = capsys.readouterr().out
    assert re.search(r"1 .*0\.9877 .*b\.png", out)
    assert re.search(r"2 .*0\.5000 .*c\.png", out)
    assert "d.png: broken" in out


def test_a_name_gives_no_orders_to_a_terminal_and_breaks_no_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [Found("a\x1b[2J\n.png", (("b\r\udce9.png", 1.0),)), Found("c\t.png", (), "no\x07")]
    for show in (print_lines, print_tables):
        show(found)
        told = capsys.readouterr().out
        for name in (r"a\x1b[2J\n.png", r"b\r\xe9.png", r"c\t.png", r"no\x07"):
            assert name in told
        assert not set("\x1b\r\x07") & set(told)


def test_json_of_a_name_that_is_no_utf8_is_valid_and_reads_back(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path
) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((photos / "disc" / "00.png").read_bytes())
    code, out, _ = cli("search", vectors, tmp_path / "*.png", json=True)
    assert code == 0
    assert os.fsencode(json.loads(out)["path"]) == name


def test_a_query_that_cannot_be_read_ends_with_3_and_the_others_are_answered(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    query = photos / "square" / "01.png"
    words = {"top": 2, "json": True, "sheet": tmp_path / "s.png"}
    code, out, err = cli("search", vectors, tmp_path / "bad.png", query, **words)
    assert code == 3
    assert "1 of 2 pictures could not be read" in err
    bad, good = map(json.loads, out.splitlines())
    assert bad["neighbours"] == []
    assert "not a readable picture" in bad["error"]
    assert good["neighbours"][0]["path"] == str(query)
    code, _, err = cli("search", vectors, tmp_path / "bad.png", json=True)  # alone, too
    assert code == 3
    assert f"1 of 1 picture could not be read: {tmp_path / 'bad.png'} (not a readable picture" in err


def test_a_list_on_stdin_that_names_nothing_is_said(
    cli: Cli, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    told = "the list on stdin names no pictures; give it a path a line"
    assert cli("search", vectors, "-") == (2, "", f"beit: {told}")


def near_to(tile: np.ndarray, picture: Path) -> bool:
    """Whether a tile of a sheet shows a picture; the corner with the cosine is not looked at."""
    with Image.open(picture) as opened:
        side = tile.shape[0]
        expected = np.asarray(opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
    return bool(np.abs(tile[: side - 20].astype(float) - expected[: side - 20]).mean() < 8)


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_sheet_shows_the_picture_and_its_neighbours(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path, ending: str
) -> None:
    queries = [photos / "disc" / "00.png", photos / "triangle" / "02.png"]
    file = tmp_path / f"sheet.{ending}"
    code, out, err = cli("search", vectors, *queries, top=3, json=True, sheet=file)
    assert code == 0
    assert f"{file}: 2 rows" in err
    with Image.open(file) as sheet:
        assert sheet.format == {"jpg": "JPEG", "png": "PNG"}[ending]
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape == (2 * 164 + 4, 4 * 164 + 4, 3)
    for y, (line, query) in enumerate(zip(out.splitlines(), queries, strict=True)):
        shown = [query, *(Path(near["path"]) for near in json.loads(line)["neighbours"])]
        for x, picture in enumerate(shown):
            tile = pixels[4 + y * 164 : 164 + y * 164, 4 + x * 164 : 164 + x * 164]
            assert near_to(tile, picture), picture
    assert not near_to(pixels[4:164, 4:164], queries[1])  # that would tell nothing


def test_an_html_sheet_carries_its_pictures(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sheet.html"
    assert cli("search", vectors, photos / "disc" / "00.png", top=4, sheet=file)[0] == 0
    page = file.read_text()
    assert page.count("data:image/png;base64,") == 5
    assert page.count("square/99.png") == 2  # below the picture, and for who cannot see it
    assert not re.search(r"https?://", page)


def test_pictures_in_a_tar_are_drawn_and_lost_ones_are_grey(
    cli: Cli, model: Path, photos: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(photos / "disc" / "01.png", "disc/01.png")
        tar.add(photos / "square" / "01.png", "square/01.png")
    lost = tmp_path / "lost.png"
    shutil.copy(photos / "triangle" / "01.png", lost)
    assert cli("embed", tmp_path / "a.tar", lost, model=model, out=tmp_path / "v")[0] == 0
    lost.unlink()
    query = photos / "disc" / "01.png"
    code, out, _ = cli("search", tmp_path / "v", query, sheet=tmp_path / "s.png", json=True)
    assert code == 0
    found = [near["path"] for near in json.loads(out)["neighbours"]]
    assert found[0] == f"{tmp_path / 'a.tar'}/disc/01.png"
    pixels = np.asarray(Image.open(tmp_path / "s.png"))
    tiles = {path: pixels[4:164, 164 * x + 4 : 164 * x + 164] for x, path in enumerate(found, 1)}
    for path, tile in tiles.items():
        if path == str(lost):
            assert (tile[:140] == 200).all()
        else:
            assert near_to(tile, photos / path.removeprefix(f"{tmp_path / 'a.tar'}/"))


# --- What is refused -----------------------------------------------------------------------------


def test_a_model_that_moved_is_named_by_m_and_another_is_refused(
    cli: Cli, model: Path, photos: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(model, home)
    assert cli("embed", photos / "disc", model=home, out=tmp_path / "v")[0] == 0
    home.rename(tmp_path / "moved")
    query = photos / "disc" / "00.png"
    code, _, err = cli("search", tmp_path / "v", query)
    assert code == 2
    assert f"{home} does not exist; " in err
    assert f"; {tmp_path / 'v'} was made by it, -m says where it is now" in err
    assert cli("search", tmp_path / "v", query, model=tmp_path / "moved")[0] == 0
    torch.manual_seed(1)
    save(BeitForImageClassification(TINY), tmp_path / "other")
    code, _, err = cli("search", tmp_path / "v", query, model=tmp_path / "other")
    assert code == 2
    assert "vectors of two models cannot be compared" in err


def test_an_unfinished_folder_is_refused(cli: Cli, photos: Path, vectors: Path, tmp_path: Path) -> None:
    shutil.copytree(vectors, tmp_path / "v")
    (tmp_path / "v" / "00002.npy").unlink()
    code, _, err = cli("search", tmp_path / "v", photos / "disc" / "00.png")
    assert code == 2
    assert "has 4 of 5 shards; give the same `beit embed` again to end it" in err


def test_tokens_cannot_be_searched(cli: Cli, model: Path, photos: Path, tmp_path: Path) -> None:
    assert cli("embed", photos / "disc", model=model, out=tmp_path / "v", pooling="tokens")[0] == 0
    code, _, err = cli("search", tmp_path / "v", photos / "disc" / "00.png")
    assert code == 2
    assert "holds the tokens of each picture" in err


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"sheet": "sheet.gif"}, 2, "--sheet sheet.gif must end in .jpg, .jpeg, .png or .html"),
        ({"sheet": "nowhere/sheet.jpg"}, 6, "cannot write nowhere/sheet.jpg: nowhere is not a folder"),
    ],
)
def test_a_sheet_that_cannot_be_is_said_first(
    cli: Cli, photos: Path, vectors: Path, options: Any, code: int, says: str
) -> None:
    found, out, err = cli("search", vectors, photos / "disc" / "00.png", **options)
    assert (found, out) == (code, "")
    assert says in err


def test_a_sheet_too_tall_for_a_jpeg_is_said_before_any_work(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path
) -> None:
    picture = str(photos / "disc" / "00.png")
    (tmp_path / "list.txt").write_text(f"{picture}\n" * 400)
    words = ("search", vectors, tmp_path / "list.txt")
    code, out, err = cli(*words, sheet=tmp_path / "s.jpg")
    assert (code, out) == (2, "")
    assert "400 rows are 65,604 pixels, and a JPEG has 65,500 at most; name s.html" in err


def test_a_name_too_long_for_a_file_is_grey_on_a_sheet(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path
) -> None:
    names = photos / "disc" / "00.png", tmp_path / ("x" * 300 + ".png")
    code, _, err = cli("search", vectors, *names, sheet=tmp_path / "s.png")
    assert code == 3
    assert "1 of 2 pictures could not be read" in err
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.getpixel((84, 248)) == (200, 200, 200)


def test_a_sheet_is_not_drawn_over_the_picture_looked_for(
    cli: Cli, photos: Path, vectors: Path, tmp_path: Path
) -> None:
    query = tmp_path / "query.png"
    query.write_bytes((photos / "disc" / "00.png").read_bytes())
    code, _, err = cli("search", vectors, query, sheet=query)
    assert (code, err) == (
        6, f"beit: cannot write {query}: it is what the command reads; name another file"
    )  # fmt: skip
    assert query.read_bytes() == (photos / "disc" / "00.png").read_bytes()


def test_a_folder_without_embeddings_and_a_missing_picture_are_said(
    cli: Cli, photos: Path, vectors: Path
) -> None:
    code, _, err = cli("search", photos, photos / "disc" / "00.png")
    assert code == 2
    assert "holds no embeddings; make some: beit embed" in err
    code, _, err = cli("search", vectors, "missing.png")
    assert code == 2
    assert "missing.png does not exist" in err
