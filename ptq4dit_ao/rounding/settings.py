"""How weights are rounded, and ranges chosen."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from ptq4dit_ao.choices import RANGES, ROUNDING_METHODS, STARTS, Ranges, RoundingMethod, Start
from ptq4dit_ao.errors import ArgumentError, check_choice, check_type


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """What happens to a linear's weight and to the range of its input after balancing.

    ``rounding`` is ``nearest``; ``gptq``, which also corrects the bias; or ``adaround``, by which the weights of a
    block learn together which way to round, and its inputs' ranges how wide to be. ``ranges`` is ``minmax``;
    ``output``, which cuts the tails where the layer's output gains; or a search of the papers', ``percentile`` or
    ``lp`` (:mod:`ptq4dit_ao.core.range_search`). ``damping`` is what GPTQ adds to the diagonal of the inputs' second
    moment, as a part of its mean.

    Learning starts (``start``) at the float weight, or near what GPTQ has found. ``steps`` is how often a block is
    updated, with one batch each time, and ``minutes`` what all blocks may take together; what ends sooner counts, so
    that with a time limit results depend on the machine.
    """

    rounding: RoundingMethod = "nearest"
    ranges: Ranges = "minmax"
    damping: float = 0.01
    start: Start = "nearest"
    steps: int = 20_000
    minutes: float | None = None

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, ROUNDING_METHODS)
        check_choice("ranges", self.ranges, RANGES)
        check_choice("start", self.start, STARTS)
        if not 0 < self.damping <= 1:
            raise ArgumentError(f"damping is {self.damping}; it must lie in (0, 1] (0.01 is GPTQ's)")
        _check_budget(self.steps, self.minutes, "the paper's is 20000")

    @property
    def learned(self) -> bool:
        """Do weights learn how to round?"""
        return self.rounding == "adaround"

    @property
    def closed_form(self) -> str:
        """How weights are rounded before they learn."""
        return self.start if self.rounding == "adaround" else self.rounding

    @property
    def plain(self) -> bool:
        """Is every weight rounded to nearest in the range of its minimum and maximum?"""
        return self.rounding == "nearest" and self.ranges == "minmax"


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """How long the whole quantized network learns from the float one, after its weights have been rounded.

    ``steps`` is how often all of it is updated, with one batch each time, and ``minutes`` what that may take; what ends
    sooner counts, so that with a time limit results depend on the machine.
    """

    steps: int = 1000
    minutes: float | None = None

    def __post_init__(self) -> None:
        _check_budget(self.steps, self.minutes, "some hundreds gain most")


def _check_budget(steps: int, minutes: float | None, usual: str) -> None:
    check_type("steps", steps, Integral, "a whole number")
    if steps < 1:
        raise ArgumentError(f"steps is {steps}; it must be at least 1 ({usual})")
    if minutes is not None and not minutes > 0:
        raise ArgumentError(f"minutes is {minutes}; it must be above 0, or None for no limit")
