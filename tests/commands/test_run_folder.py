"""docs/runs.md names every file that a training leaves, and every number that it logs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import Done

DOCUMENT = Path(__file__).parents[2] / "docs" / "runs.md"


@pytest.mark.parametrize("command", ["tokenizer", "pretrained", "finetuned"])
def test_what_a_run_leaves_and_logs_is_documented(request: pytest.FixtureRequest, command: str) -> None:
    done: Done = request.getfixturevalue(command)
    named = set(re.findall(r"`([^`]+)`", DOCUMENT.read_text(encoding="utf-8")))
    files = {path.name for path in done.folder.iterdir()}
    keys = {key for line in done.metrics for key in line}
    assert len(files) > 6
    assert len(keys) > 6
    assert files | keys <= named
