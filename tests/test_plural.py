"""Numbers and their nouns."""

from __future__ import annotations

import pytest

from beit.plural import counted


@pytest.mark.parametrize(
    ("number", "noun", "told"),
    [
        (1, "picture", "1 picture"),
        (0, "picture", "0 pictures"),
        (2000, "picture", "2,000 pictures"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
    ],
)
def test_one_is_singular_and_all_else_plural(number: int, noun: str, told: str) -> None:
    assert counted(number, noun) == told
