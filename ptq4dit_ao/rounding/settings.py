"""How weights are rounded, and ranges chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ptq4dit_ao.errors import ArgumentError, check_choice

Rounding = Literal["nearest", "gptq"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
Ranges = Literal["minmax", "output", "percentile", "lp"]
RANGES: tuple[str, ...] = get_args(Ranges)


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """What happens to a linear's weight and to the range of its input after balancing.

    ``rounding`` is ``nearest``, or ``gptq``, which also corrects the bias. ``ranges`` is ``minmax``; ``output``,
    which cuts the tails where the layer's output gains; or a search of the papers', ``percentile`` or ``lp``
    (:mod:`ptq4dit_ao.core.range_search`). ``damping`` is what GPTQ adds to the diagonal of the inputs' second moment,
    as a part of its mean.
    """

    rounding: Rounding = "nearest"
    ranges: Ranges = "minmax"
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("ranges", self.ranges, RANGES)
        if not 0 < self.damping <= 1:
            raise ArgumentError(f"damping is {self.damping}; it must lie in (0, 1] (0.01 is GPTQ's)")

    @property
    def plain(self) -> bool:
        """Is every weight rounded to nearest in the range of its minimum and maximum?"""
        return self.rounding == "nearest" and self.ranges == "minmax"
