"""Names of files as they are told: what a terminal may show, and JSON that reads back."""

from __future__ import annotations

import json
import os

import pytest

from beit.names import json_line, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"photo 1.png", "photo 1.png"),
        ("Ärger 写真 🐈.png".encode(), "Ärger 写真 🐈.png"),
        (b"\x1b[2J.png", r"\x1b[2J.png"),
        (b"a\nb\tc\r.png", r"a\nb\tc\r.png"),
        (b"caf\xe9.png", r"caf\xe9.png"),
        ("gnp\u202e.exe".encode(), r"gnp\u202e.exe"),  # would be shown backwards
    ],
)
def test_a_name_is_shown_without_orders_and_read_back_from_json(name: bytes, shown: str) -> None:
    text = os.fsdecode(name)
    assert printable(text) == shown
    line = json_line({"path": text}).encode("utf-8")
    assert b"\n" not in line
    assert os.fsencode(json.loads(line)["path"]) == name
