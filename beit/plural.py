"""A number and what it counts, as people write it: 1 picture, 2,000 pictures, 3 classes."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """So many of a noun, which stands in the plural unless there is one."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
