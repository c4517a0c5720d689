"""`beit doctor`: it says what is true of this machine, with and without the extras."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import ENVIRONMENT, Cli

import beit.commands.doctor as command
from beit.commands.doctor import EXTRAS, advice
from beit.workers import available_processors


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A smaller model for the speed test, and caches of known size."""
    monkeypatch.setattr(command, "SECONDS", 0.01)
    monkeypatch.setattr(command, "SMALL", command.BeitConfig(img_size=32, patch_size=16, embed_dim=32,
                                                             depth=2, num_heads=2))  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "beit" / "graphs").mkdir(parents=True)
    (tmp_path / "beit" / "graphs" / "a.xml").write_bytes(bytes(3 << 20))
    return tmp_path


def test_json_tells_what_is_so(cli: Cli, quick: Path) -> None:
    code, out, err = cli("doctor", json=True)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["numpy"] == numpy.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["machine"]["processors"] == available_processors()
    assert facts["machine"]["torch_threads"] == torch.get_num_threads()
    assert facts["extras"].keys() == EXTRAS.keys()
    graphs = facts["caches"]["graphs of models"]
    assert (graphs["path"], graphs["mib"]) == (str(quick / "beit" / "graphs"), 3.0)
    assert set(facts["speed"]["gflops"]) == {"fp32", "bf16"}
    assert min(*facts["speed"]["gflops"].values(), *facts["speed"]["small_beit_ms"].values()) > 0


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells the flags")
def test_flags_are_the_processors_own(cli: Cli, quick: Path) -> None:
    told = json.loads(cli("doctor", json=True)[1])["machine"]["flags"]
    words = Path("/proc/cpuinfo").read_text().split()
    assert told == [flag for flag in command.FLAGS if flag in words]


def test_words_fit_on_one_screen(cli: Cli, quick: Path) -> None:
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 30
    titles = [line.split("  ")[0] for line in lines if line[0] != " "]
    assert titles == ["versions", "extras", "processor", "GPU", "caches", "speed", "for speed"]


def test_it_works_without_any_extra_and_says_what_to_install(quick: Path) -> None:
    modules = [module for module, _, _ in EXTRAS.values()]
    code = (
        "import importlib.util, sys\n"
        f"gone = {modules!r}\n"
        "for name in gone: sys.modules[name] = None\n"
        "whole = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in gone else whole(name, *rest)\n"
        "import beit.commands.doctor as command\n"
        "command.SECONDS = 0.01\n"
        "sys.argv = ['beit', 'doctor']\n"
        "from beit.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for extra in EXTRAS:
        assert f'pip install "beit[{extra}]"' in done.stdout
    if not torch.cuda.is_available():
        assert 'for speed  pip install "beit[openvino]"' in done.stdout


FACTS: dict[str, Any] = {
    "extras": dict.fromkeys(EXTRAS, "1.0"),
    "machine": {"torch_threads": 8, "processors": 8, "memory_gib": 32.0},
    "caches": {"downloads": {"path": "/d", "mib": 1.0, "free_gib": 99.0}},
    "speed": {"device": "cpu", "gflops": {"fp32": 100, "bf16": 200}},
}


@pytest.mark.parametrize(
    ("where", "change", "says"),
    [
        ("extras", {"openvino": None}, 'pip install "beit[openvino]"'),
        ("machine", {"torch_threads": 1}, "torch uses 1 of 8 processors"),
        ("machine", {"memory_gib": 2.0}, "2.0 GiB of memory"),
        ("speed", {"gflops": {"fp32": 100, "bf16": 50}}, "bf16 is slower than fp32"),
        ("caches", {"downloads": {"path": "/d", "mib": 1.0, "free_gib": 0.2}}, "has 0.2 GiB left: /d"),
    ],
)
def test_advice_is_given_where_it_helps(
    monkeypatch: pytest.MonkeyPatch, where: str, change: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(command, "_has_driver", lambda: False)
    monkeypatch.setattr(command.features, "check_feature", lambda name: True)
    assert advice(FACTS) == []
    (line,) = advice({**FACTS, where: {**FACTS[where], **change}})
    assert says in line


def test_a_gpu_that_torch_does_not_see_and_a_slow_pillow_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "_has_driver", lambda: True)
    monkeypatch.setattr(command.features, "check_feature", lambda name: False)
    gpu, pillow = advice(FACTS)
    assert f"torch {torch.__version__} sees none" in gpu
    assert "libjpeg-turbo" in pillow
