"""Which of a sampler's steps to calibrate on, told by the timestep that the transformer receives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from ptq4dit_ao.errors import ArgumentError, CalibrationError, check_type

RELATIVE_TOLERANCE = 1e-4
"""How near a visited timestep must be to one asked for: float32 arithmetic, and decimals as people write them."""


@dataclass(frozen=True, kw_only=True)
class NormalTimesteps:
    """PTQ4DM's draw (Shang et al. 2022, arXiv 2211.15736): ``t_i = clamp(floor(N(mean, std) T), 0, T - 1)``.

    T counts the sampler's steps, and t = 0 is its last one, which sees the least noise. The draws are dealt out to the
    samples in turn: with as many as samples, each sample is kept at one step of its own, as in the paper; a step that
    is drawn twice for a sample is kept twice. (The paper has std = 0.5 and mean at most that, the authors' code 0.4
    for both.)

    Raises:
        ArgumentError: a value is not finite, std is negative, or nothing is drawn.
    """

    mean: float = 0.4
    """Fraction of the schedule."""
    std: float = 0.4
    """Fraction of the schedule."""
    count: int = 1024
    """Draws in all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std >= 0 and self.count >= 1):
            raise ArgumentError(f"{self} needs a finite mean, a finite std of at least 0, and a count of at least 1")

    def deal(self, samples: int, steps: int, seed: int) -> list[list[int]]:
        """For each sample, positions in the sampler's order, of ``range(steps)``.

        Raises:
            CalibrationError: there are fewer draws than samples.
        """
        if self.count < samples:
            raise CalibrationError(f"{self.count} timesteps are drawn for {samples} samples; give count={samples}")
        drawn = np.random.default_rng(seed).normal(self.mean, self.std, self.count) * steps
        t = np.clip(np.floor(drawn), 0, steps - 1).astype(int)
        positions = (steps - 1 - t).tolist()
        return [positions[i::samples] for i in range(samples)]


def choose_timesteps(available: Sequence[float], wanted: int | Sequence[float]) -> list[float]:
    """A count takes evenly spaced ones from first to last; a list is checked, and takes the nearest.

    Raises:
        CalibrationError: more are wanted than there are, or one does not occur.
    """
    if isinstance(wanted, int):
        return [available[i] for i in spaced_positions(wanted, len(available))]
    found = {nearest_timestep(available, t) for t in _not_empty(wanted)}
    return [t for t in available if t in found]


def spaced_positions(count: int, steps: int) -> list[int]:
    """``count`` of ``range(steps)``, evenly spaced from first to last.

    Raises:
        CalibrationError: there are not as many.
    """
    if count < 1:
        raise CalibrationError(f"{count} calibration timesteps asked for; ask for at least 1")
    if count > steps:
        raise CalibrationError(
            f"{count} calibration timesteps asked for, the sampler has {steps} steps; ask for fewer "
            "(calibration.timesteps, evaluation.timesteps), or for more steps (calibration.steps)"
        )
    return [int(i) for i in np.linspace(0, steps - 1, count).round()]


def nearest_timestep(available: Iterable[float], t: float) -> float:
    """The one of ``available`` that is ``t``, up to rounding.

    Raises:
        CalibrationError: none is.
    """
    nearest = min(available, key=lambda a: abs(a - t))
    if not _is_close(nearest, t):
        raise CalibrationError(f"the sampler never visits timestep {t:g}; the nearest it visits is {nearest:g}")
    return nearest


class StepSelection:
    """Tells the wanted steps of a sampler, in one run after another, by the timesteps of its calls.

    Calls at one timestep are one step: guidance in two passes, or a solver that evaluates twice (Heun).

    Args:
        wanted: how many, evenly spaced over ``steps``; or which timesteps; of a draw, all steps.
        steps: how many the sampler is asked to take.

    Raises:
        CalibrationError: more are wanted than there are, or none.
    """

    def __init__(self, wanted: int | Sequence[float] | NormalTimesteps, steps: int) -> None:
        self.steps = steps
        self.positions: list[int] | None = None
        self.wanted: list[float] = []
        if isinstance(wanted, NormalTimesteps):
            self.positions = list(range(steps))
        elif isinstance(wanted, int) and not isinstance(wanted, bool):
            self.positions = spaced_positions(wanted, steps)
        else:
            self.wanted = _not_empty(wanted)
        self.visited: dict[float, int] = {}
        """Position of every timestep of this run."""

    @property
    def last(self) -> int | None:
        """Position of the last wanted step, if it is known before the run."""
        return None if self.positions is None else self.positions[-1]

    def start(self) -> None:
        """Begin a run."""
        self.visited = {}

    def is_over(self, t: float) -> bool:
        """Has this run passed all wanted steps when it arrives at ``t``?"""
        if t in self.visited:
            return False
        if self.positions is not None:
            return len(self.visited) > self.positions[-1]
        seen = all(any(_is_close(v, w) for v in self.visited) for w in self.wanted)
        return seen and not any(_is_close(t, w) for w in self.wanted)

    def visit(self, t: float) -> bool:
        """Is a call at ``t`` to be recorded? Of a list, whatever is close is; :meth:`chosen` says what to keep."""
        position = self.visited.setdefault(t, len(self.visited))
        if self.positions is not None:
            return position in self.positions
        return any(_is_close(t, w) for w in self.wanted)

    def chosen(self) -> set[float]:
        """The wanted ones among the timesteps of a run that has ended.

        Raises:
            CalibrationError: one did not occur.
        """
        if self.positions is None:
            return {nearest_timestep(self.visited, t) for t in self.wanted}
        taken = len(self.visited)
        if taken <= self.positions[-1]:
            missing = next(p for p in self.positions if p >= taken)
            raise CalibrationError(
                f"{len(self.positions)} calibration timesteps spread over {self.steps} steps include step "
                f"{missing + 1}, but the sampler took {taken}; give steps={taken} (and, if the pipeline is to be asked "
                f"for {self.steps}, call={{'num_inference_steps': {self.steps}}})"
            )
        return {t for t, position in self.visited.items() if position in self.positions}


def _not_empty(wanted: object) -> list[float]:
    if isinstance(wanted, (str, bool)) or not isinstance(wanted, Iterable):
        raise ArgumentError(f"timesteps is {wanted!r}; give how many, a list of numbers, or NormalTimesteps")
    timesteps = list(wanted)
    for t in timesteps:
        check_type("a timestep", t, Real, "a number")
    if not timesteps:
        raise CalibrationError("the list of calibration timesteps is empty; name at least one, or give a count")
    return timesteps


def _is_close(t: float, wanted: float) -> bool:
    return math.isclose(t, wanted, rel_tol=RELATIVE_TOLERANCE)
