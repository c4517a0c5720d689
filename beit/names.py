"""Names of files as they are told: a name may hold any byte but / and NUL, orders to a terminal among them.

Python keeps a byte that is no UTF-8 as a lone surrogate, U+DC80 to U+DCFF (`os.fsdecode`).
"""

from __future__ import annotations

import json
from typing import Any


def is_utf8(name: str) -> bool:
    """Whether all bytes of a name are UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def printable(text: str) -> str:
    """A line of text for a terminal: what would break it, move in it or hide is written as in Python."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def json_line(content: Any) -> str:
    """One line of JSON that is UTF-8; a byte of a name that is not stands as \\udcXX, which reads back."""
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace").decode()
