"""Settings of rounding and distillation."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from ptq4dit_ao.choices import RANGES, ROUNDING_METHODS, STARTS, Ranges, RoundingMethod, Start
from ptq4dit_ao.errors import ArgumentError, check_choice, check_type

SEVEN_BITS = 128
"""Number of levels of 7 bits; some quantizers use 255 of the 256 of 8 bits."""

CUTTING = {"8 bits, and 8 of the weights": 16.0, "8 bits": 1.0, "fewer bits": 4.0}
"""Weight of the error of cutting by the bits of an activation (docs/results.md, Fidelity)."""


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """Settings by which a linear's weight is rounded and the range of its input is chosen, after balancing.

    Args:
        rounding: ``nearest``; ``gptq``, which also corrects the bias; or ``adaround``, which learns the rounding of a
            block's weights together with its inputs' ranges.
        ranges: ``minmax``; ``output``, which clips if that reduces the error of the layer's output; or a search of the
            papers, ``percentile`` or ``lp`` (:mod:`ptq4dit_ao.core.range_search`).
        cutting: weight of the square error of values that ``output`` cuts, 1 or more; that of rounding counts once.
            ``auto`` takes :data:`CUTTING` by the widths of each layer.
        damping: term that GPTQ adds to the diagonal of the inputs' second moment, as a fraction of its mean.
        start: start of learning: the float weight (``nearest``), or close to GPTQ's solution (``gptq``).
        steps: number of updates of each block, with one batch each.
        minutes: a time limit for all blocks together. Learning ends after ``steps`` or ``minutes``, whichever comes
            first, so results depend on the machine's speed if there is a limit.

    Raises:
        ArgumentError: a value is out of range.
    """

    rounding: RoundingMethod = "nearest"
    ranges: Ranges = "minmax"
    cutting: float | Literal["auto"] = 1.0
    damping: float = 0.01
    start: Start = "nearest"
    steps: int = 20_000
    minutes: float | None = None

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, ROUNDING_METHODS)
        check_choice("ranges", self.ranges, RANGES)
        check_choice("start", self.start, STARTS)
        if isinstance(self.cutting, str):
            check_choice("cutting", self.cutting, ("auto",))
        elif not self.cutting >= 1:
            raise ArgumentError(f"cutting is {self.cutting}; it must be at least 1, where cutting counts as rounding")
        if not 0 < self.damping <= 1:
            raise ArgumentError(f"damping is {self.damping}; it must lie in (0, 1] (0.01 is GPTQ's)")
        _check_budget(self.steps, self.minutes, "the paper's is 20000")

    def cutting_of(self, levels: int, weight_levels: int) -> float:
        """Weight of the error of cutting an activation of so many levels, whose weights have so many."""
        if not isinstance(self.cutting, str):
            return self.cutting
        if levels <= SEVEN_BITS:
            return CUTTING["fewer bits"]
        return CUTTING["8 bits, and 8 of the weights" if weight_levels > SEVEN_BITS else "8 bits"]

    @property
    def learned(self) -> bool:
        """Whether the rounding of weights is learned."""
        return self.rounding == "adaround"

    @property
    def closed_form(self) -> str:
        """Rounding method before any learning: ``nearest`` or ``gptq``."""
        return self.start if self.rounding == "adaround" else self.rounding

    @property
    def plain(self) -> bool:
        """Whether every weight is rounded to nearest in the range of its minimum and maximum."""
        return self.rounding == "nearest" and self.ranges == "minmax"


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """Settings by which the whole quantized network is distilled from the float one, after its weights are rounded.

    Args:
        steps: number of updates, with one batch each.
        minutes: a time limit. Learning ends after ``steps`` or ``minutes``, whichever comes first, so results depend on
            the machine's speed if there is a limit.

    Raises:
        ArgumentError: a value is out of range.
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
