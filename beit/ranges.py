"""Settings within bounds, as types: what is beyond them is refused before any work."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

Share = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]  # [0, 1]
BelowOne = Annotated[float, Parameter(validator=Number(gte=0, lt=1))]  # [0, 1)
AboveZero = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]  # (0, 1]
NotNegative = Annotated[float, Parameter(validator=Number(gte=0, lt=float("inf")))]  # [0, inf)
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]  # [0, 2^63)
Magnitude = Annotated[float, Parameter(validator=Number(gte=0, lte=10))]  # RandAugment's


def _in_order(_: Any, scale: tuple[float, float] | None) -> None:
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:  # None: not given
        raise ValueError("Must be LOW HIGH with 0 < LOW <= HIGH <= 1, such as 0.08 1.")


CropScale = Annotated[tuple[float, float], Parameter(validator=_in_order)]


def _numbers(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    words = [word for token in tokens for word in token.value.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{' '.join(words)} are not numbers from 1 on, such as 9 12 or 9,12")
    return tuple(map(int, words))


Numbers = Annotated[
    tuple[int, ...], Parameter(consume_multiple=True, converter=_numbers, validator=Number(gt=0))
]


def _has_compiler(_: Any, compile: bool | None) -> None:
    usual = "clang++" if sys.platform == "darwin" else "g++"
    name = os.environ.get("CXX", usual)  # as torch looks for it
    if compile and sys.platform != "win32" and shutil.which(name) is None:
        raise ValueError(
            f"torch.compile needs a compiler of C++, and {name} is not there: install it, name another by "
            "CXX=..., or leave --compile out"
        )


Compile = Annotated[bool, Parameter(validator=_has_compiler)]
