"""Numbers within bounds, as types of settings: what is beyond them is refused before any work."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

Share = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]  # [0, 1]
BelowOne = Annotated[float, Parameter(validator=Number(gte=0, lt=1))]  # [0, 1)
AboveZero = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]  # (0, 1]
Magnitude = Annotated[float, Parameter(validator=Number(gte=0, lte=10))]  # RandAugment's


def _in_order(_: Any, scale: tuple[float, float] | None) -> None:
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:  # None: not given
        raise ValueError("Must be LOW HIGH with 0 < LOW <= HIGH <= 1, such as 0.08 1.")


CropScale = Annotated[tuple[float, float], Parameter(validator=_in_order)]
