"""Selection of a sampler's steps to calibrate on, by the timestep that the transformer receives."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from ptq4dit_ao.errors import ArgumentError, CalibrationError, check_type

RELATIVE_TOLERANCE = 1e-4
"""Relative tolerance between two equal timesteps, for float32 arithmetic and for decimals written by people."""


@dataclass(frozen=True, kw_only=True)
class NormalTimesteps:
    """Random timesteps of PTQ4DM (Shang et al. 2022, arXiv 2211.15736): ``t = clamp(floor(N(mean, std) T), 0, T - 1)``.

    T is the number of the sampler's steps, and t = 0 is its last step, with the least noise. The draws are dealt out to
    the samples in turn. With as many draws as samples, each sample is recorded at one step of its own, as in the paper.
    A step that is drawn twice for a sample is recorded twice. (The paper has std = 0.5 and mean at most that; the
    authors' code has 0.4 for both.)

    Raises:
        ArgumentError: a value is not finite, std is negative, or count is less than 1.
    """

    mean: float = 0.4
    """Mean of the draws, as a fraction of the schedule."""
    std: float = 0.4
    """Standard deviation of the draws, as a fraction of the schedule."""
    count: int = 1024
    """Number of draws in total."""

    def __post_init__(self) -> None:
        numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (self.mean, self.std))
        if not (numbers and self.std >= 0 and isinstance(self.count, int) and self.count >= 1):
            raise ArgumentError(f"{self} needs a finite mean, a finite std of at least 0, and a count of at least 1")

    def deal(self, samples: int, steps: int, seed: int) -> list[list[int]]:
        """Positions of each sample in the sampler's order, within ``range(steps)``.

        Raises:
            CalibrationError: there are fewer draws than samples.
        """
        if self.count < samples:
            raise CalibrationError(f"{self.count} timesteps are drawn for {samples} samples; give count={samples}")
        drawn = np.random.default_rng(seed).normal(self.mean, self.std, self.count) * steps
        t = np.clip(np.floor(drawn), 0, steps - 1).astype(int)
        positions = (steps - 1 - t).tolist()
        return [positions[i::samples] for i in range(samples)]


def choose_timesteps(
    available: Sequence[float], wanted: int | Sequence[float], what: str = "calibration"
) -> list[float]:
    """The wanted timesteps out of the available ones.

    Args:
        available: timesteps of the sampler.
        wanted: a number of timesteps, evenly spaced from first to last; or a list, of which each takes the nearest one.
        what: name of the recipe's section in messages, ``calibration`` or ``evaluation``.

    Raises:
        CalibrationError: more are wanted than there are, or one does not occur.
    """
    if isinstance(wanted, int):
        return [available[i] for i in spaced_positions(wanted, len(available), what)]
    found = {nearest_timestep(available, t, what) for t in _not_empty(wanted, what)}
    return [t for t in available if t in found]


def spaced_positions(count: int, steps: int, what: str = "calibration", taken_by: str = "the sampler has") -> list[int]:
    """Positions within ``range(steps)``, ``count`` of them, evenly spaced from first to last.

    Args:
        count: number of positions.
        steps: number of steps.
        what: name of the recipe's section in messages, ``calibration`` or ``evaluation``.
        taken_by: who takes the steps, in messages.

    Raises:
        CalibrationError: there are fewer steps, or ``count`` is less than 1.
    """
    if count < 1:
        raise CalibrationError(f"{count} calibration timesteps asked for; ask for at least 1")
    if count > steps:
        raise CalibrationError(
            f"{count} {what} timesteps asked for, {taken_by} {steps} steps; ask for fewer "
            f"({what}.timesteps), or for more steps (calibration.steps)"
        )
    return [int(i) for i in np.linspace(0, steps - 1, count).round()]


def nearest_timestep(available: Iterable[float], t: float, what: str = "calibration") -> float:
    """The available timestep that is equal to ``t``, up to rounding.

    Raises:
        CalibrationError: there is none.
    """
    nearest = min(available, key=lambda a: abs(a - t))
    if not is_close(nearest, t):
        section = "" if what == "calibration" else f" ({what}.timesteps)"
        raise CalibrationError(
            f"the sampler never visits timestep {t:g}{section}; the nearest it visits is {nearest:g}"
        )
    return nearest


def check_wanted(wanted: object, steps: object, what: str = "calibration") -> None:
    """Check that timesteps and steps are valid.

    Raises:
        ArgumentError: no sampler could have such values.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps is {steps!r}; give a whole number of at least 1")
    if isinstance(wanted, (int, NormalTimesteps)) and not isinstance(wanted, bool):
        return
    if isinstance(wanted, (str, bytes)) or not isinstance(wanted, Sequence):
        raise ArgumentError(
            f"{what} timesteps is {wanted!r}; give how many, a list of them, or NormalTimesteps(...) to draw them"
        )
    odd = [t for t in wanted if isinstance(t, bool) or not isinstance(t, numbers.Real) or not math.isfinite(t)]
    if odd:
        raise ArgumentError(f"{what} timesteps holds {odd[0]!r}; give finite numbers")


class StepSelection:
    """The wanted steps of a sampler, identified in each run by the timesteps of its calls.

    Calls at one timestep are one step: guidance in two passes, or a solver that evaluates twice (Heun).

    Args:
        wanted: a number of timesteps, evenly spaced over ``steps``; a list of timesteps; or a draw, for which all steps
            are wanted.
        steps: number of steps that the sampler is asked for.
        component: name of the called module, for messages.
        exact: whether the module is called at no more than ``steps`` steps, whatever the schedule says.

    Raises:
        CalibrationError: more timesteps are wanted than there are, or none.
    """

    def __init__(
        self,
        wanted: int | Sequence[float] | NormalTimesteps,
        steps: int,
        component: str = "transformer",
        *,
        exact: bool = False,
    ) -> None:
        self.component, self.exact = component, exact
        self.count = wanted if isinstance(wanted, int) else None
        self.steps = steps
        self.positions: list[int] | None = None
        self.wanted: list[float] = []
        if isinstance(wanted, NormalTimesteps):
            self.positions = list(range(steps))
        elif isinstance(wanted, int) and not isinstance(wanted, bool):
            self.positions = spaced_positions(wanted, steps)
        else:
            self.wanted = _not_empty(wanted, "calibration")
        self.visited: dict[float, int] = {}
        """Timestep -> position, for every timestep of this run."""

    @property
    def last(self) -> int | None:
        """Position of the last wanted step, if it is known before the run."""
        return None if self.positions is None else self.positions[-1]

    def start(self) -> None:
        """Begin a run."""
        self.visited = {}

    def expect(self, times: Sequence[float]) -> None:
        """Set all times of a run at its beginning, as the module receives them.

        Raises:
            CalibrationError: the wanted timesteps are not among them, or they are too few.
        """
        taken = min(self.steps, len(times)) if self.exact else len(times)
        if self.positions is None:
            for t in self.wanted:
                nearest_timestep(times, t)
        elif taken != self.steps and (self.count is None or self.count > taken):
            raise self._other_number(taken)
        elif self.count is not None:
            self.positions = spaced_positions(self.count, taken)

    def is_over(self, t: float) -> bool:
        """Whether this run has passed all wanted steps when it arrives at ``t``."""
        if t in self.visited:
            return False
        if self.positions is not None:
            return len(self.visited) > self.positions[-1]
        seen = all(any(is_close(v, w) for v in self.visited) for w in self.wanted)
        return seen and not any(is_close(t, w) for w in self.wanted)

    def visit(self, t: float) -> bool:
        """Whether to record a call at ``t``.

        Several calls may be close to a listed timestep; :meth:`chosen` selects one.
        """
        position = self.visited.setdefault(t, len(self.visited))
        if self.positions is not None:
            return position in self.positions
        return any(is_close(t, w) for w in self.wanted)

    def chosen(self) -> set[float]:
        """The wanted timesteps among those of a finished run.

        Raises:
            CalibrationError: one did not occur.
        """
        if self.positions is None:
            return {nearest_timestep(self.visited, t) for t in self.wanted}
        if len(self.visited) <= self.positions[-1]:
            raise self._other_number(len(self.visited))
        return {t for t, position in self.visited.items() if position in self.positions}

    def _other_number(self, taken: int) -> CalibrationError:
        drawn = self.count is None
        wanted = (
            "calibration timesteps are drawn from" if drawn else f"{self.count} calibration timesteps are spread over"
        )
        fewer = "" if drawn or self.count <= taken else f"timesteps={taken} and "  # type: ignore[operator]
        return CalibrationError(
            f"{wanted} {self.steps} steps, but the pipeline calls its {self.component} at {taken}; give "
            f"{fewer}steps={taken} (and, if the pipeline is to be asked for {self.steps}, "
            f"call={{'num_inference_steps': {self.steps}}})"
        )


def _not_empty(wanted: object, what: str) -> list[float]:
    if isinstance(wanted, (str, bool)) or not isinstance(wanted, Iterable):
        raise ArgumentError(f"timesteps is {wanted!r}; give how many, a list of numbers, or NormalTimesteps")
    timesteps = list(wanted)
    for t in timesteps:
        check_type("a timestep", t, Real, "a number")
    if not timesteps:
        raise CalibrationError(f"the list of {what} timesteps is empty; name at least one, or give a count")
    return timesteps


def is_close(t: float, wanted: float) -> bool:
    """Whether two times are equal, up to :data:`RELATIVE_TOLERANCE`."""
    return math.isclose(t, wanted, rel_tol=RELATIVE_TOLERANCE)
