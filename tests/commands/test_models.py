"""`beit models`: every released model, in 100 columns, with what to type."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import ENVIRONMENT, Cli

from beit.cli import app
from beit.hub import RELEASED, is_remote
from beit.model import VARIANTS


def test_every_model_is_listed_whole_in_100_columns(cli: Cli) -> None:
    code, out, err = cli("models")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    words = out.split()
    for row in RELEASED.values():
        assert row.name in words
        assert row.hub is None or row.hub in words
    assert re.search(
        r"beit_large_patch16_512_pt22k_ft22kto1k +classification +1,000 +512 +88\.6 +306M +MIT", out
    )
    assert re.search(
        r"beitv2_large_patch16_224_pt1k_ft21ktoade20k +segmentation +150 +512 +57\.5 +441M +MIT", out
    )
    assert re.search(r"data2vec-vision-base +features +– +224 +– +– +–", out)
    assert "176,830,615 bytes, sha256 9370c265f91e" in out


@pytest.mark.parametrize(
    ("filter_", "holds"),
    [
        ("beitv2_base", {"beitv2_base_patch16_224_pt1k_ft1k"}),
        ("TOKENIZER", {"vqkd_encoder_base_decoder_1x768x12_dino-663c55d7"}),
        ("in22k_ft_in22k_in1k", {"beit_base_patch16_224_pt22k_ft22kto1k"}),
        ("microsoft/dit-large", {"dit-large", "dit-large-finetuned-rvlcdip"}),
    ],
)
def test_a_filter_looks_at_name_hub_folders_and_task(cli: Cli, filter_: str, holds: set[str]) -> None:
    rows = [json.loads(line) for line in cli("models", filter_, "--json")[1].splitlines()]
    listed = {row["name"] for row in rows}
    assert holds <= listed
    assert len(listed) < len(RELEASED) / 2
    for row in rows:
        assert filter_.lower() in json.dumps(row).lower()


def test_sizes_are_listed_apart_with_what_begins_from_them(cli: Cli) -> None:
    code, out, err = cli("models")
    assert (code, err) == (0, "")
    for name in VARIANTS:
        assert name in out.split("Sizes, without weights")[1]
    code, out, _ = cli("models", "tiny_patch8")
    assert code == 0
    assert "  beit_tiny_patch8_64\n" in out
    assert "licence" not in out


def test_a_filter_that_nothing_passes_is_an_error(cli: Cli) -> None:
    code, out, err = cli("models", "resnet")
    assert (code, out) == (2, "")
    assert "no released model has 'resnet' in its name, hub id or task" in err


def test_json_tells_all_that_is_known(cli: Cli) -> None:
    rows = [json.loads(line) for line in cli("models", json=True)[1].splitlines()]
    assert [row["name"] for row in rows] == list(RELEASED)
    for row in rows:
        known = RELEASED[row["name"]]
        assert row.pop("url") == known.url
        assert row == {**asdict(known), "also": list(known.also)}


@pytest.mark.parametrize("words", [[], ["large"], ["tokenizer"]])
def test_it_shows_a_command_that_uses_one(cli: Cli, words: list[str]) -> None:
    (line,) = re.findall(r"beit classify .*", cli("models", *words)[1])
    app.parse_args(shlex.split(line)[1:], print_error=False, exit_on_error=False)
    name = shlex.split(line)[-1]
    assert is_remote(name)
    assert RELEASED[name].num_classes


def test_it_waits_for_neither_torch_nor_the_network() -> None:
    code = (
        "import socket, sys\n"
        "sys.modules['torch'] = sys.modules['huggingface_hub'] = socket.socket = None\n"
        "sys.argv[1:] = ['models']\nfrom beit.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "beit_base_patch16_224_pt22k" in done.stdout


@pytest.mark.parametrize("words", [["models", "dit", "--offline"], ["--offline", "models", "dit"]])
def test_offline_may_stand_anywhere_and_turns_the_network_off(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEIT_OFFLINE", "0")  # and so put back afterwards
    code, out, err = cli(*words)
    assert (code, err) == (0, "")
    assert "dit-base" in out
    assert os.environ["BEIT_OFFLINE"] == "1"
    assert "--offline" in cli("--help")[1]
