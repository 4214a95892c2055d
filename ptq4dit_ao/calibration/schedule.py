"""Timesteps at which a pipeline calls one of its modules, from its scheduler: before a run, and at its beginning."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao.calibration.timesteps import (
    RELATIVE_TOLERANCE,
    NormalTimesteps,
    check_wanted,
    choose_timesteps,
    spaced_positions,
)
from ptq4dit_ao.errors import CalibrationError

_FORMS: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda t, _: t,
    lambda t, trained: t / trained,
    lambda t, trained: 1 - t / trained,
)
"""Forms in which transformers receive a scheduler's time, which counts up to ``trained``."""


def check_timesteps(
    pipeline: Any,
    timesteps: int | Sequence[float] | NormalTimesteps,
    steps: int,
    *,
    component: str = "transformer",
    call: Mapping[str, object] | None = None,
    what: str = "calibration",
) -> None:
    """Check, without a run, that a pipeline can be recorded at these timesteps.

    A list can be checked where the schedule is known before a run: for class-conditional pipelines, and for those with
    two transformers (``boundary_ratio``). For other pipelines only a count is checked.

    Args:
        pipeline: as for :func:`collect_from_pipeline`.
        timesteps: as for :func:`collect_from_pipeline`.
        steps: as for :func:`collect_from_pipeline`.
        component: as for :func:`collect_from_pipeline`.
        call: as for :func:`collect_from_pipeline`.
        what: name of the recipe's section in messages, ``calibration`` or ``evaluation``.

    Raises:
        CalibrationError: there are fewer steps than timesteps, or one of the timesteps does not occur.
        ArgumentError: ``timesteps`` or ``steps`` is invalid.
    """
    check_wanted(timesteps, steps, what)
    call = call or {}
    known = known_times(pipeline, component, steps, call)
    if isinstance(timesteps, int):
        taken_by = f"the pipeline calls its {component} at" if _shares(pipeline, component) else "the sampler has"
        spaced_positions(timesteps, steps_asked(steps, call) if known is None else len(known), what, taken_by)
    elif not isinstance(timesteps, NormalTimesteps):
        choose_timesteps(timesteps if known is None else known, timesteps, what)


def steps_asked(steps: int, call: Mapping[str, object]) -> int:
    """Number of steps that a pipeline is asked for. A schedule in ``call`` takes precedence over ``steps``."""
    own = next((call[name] for name in ("timesteps", "sigmas") if isinstance(call.get(name), Sized)), None)
    return steps if own is None else len(own)  # type: ignore[arg-type]


def known_times(pipeline: Any, component: str, steps: int, call: Mapping[str, object]) -> list[float] | None:
    """Times at which a module will be called, as it receives them; None where the pipeline does not reveal them.

    Two kinds of pipelines pass on their scheduler's times: class-conditional ones, if these are integers, and those
    with two transformers. Others scale them, or set the scheduler with arguments of their own.

    Raises:
        CalibrationError: the scheduler cannot take this number of steps, or the pipeline never calls that module.
    """
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "set_timesteps"):
        return None
    by_class = "class_labels" in inspect.signature(pipeline.__call__).parameters and not call
    if not by_class and not _shares(pipeline, component):
        return None
    asked = call.get("num_inference_steps", steps)
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(asked)
    except (ValueError, TypeError, IndexError) as error:
        raise CalibrationError(
            f"{type(scheduler).__name__} cannot take {asked} steps: {error}; give other steps (calibration.steps)"
        ) from error
    if by_class and scheduler.timesteps.is_floating_point():
        return None
    return _own_part(pipeline, component, _different(scheduler.timesteps))


class FirstCalls:
    """A reader of a pipeline's scheduler at the first calls of a module in a run, when the steps have been set."""

    def __init__(self, pipeline: Any, component: str) -> None:
        self.pipeline, self.component = pipeline, component
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self._before = self._timesteps()

    def all_times(self, first: Sequence[float], t: Tensor | float) -> list[float] | None:
        """All times of this run as the module receives them, derived from the ``first`` ones and the next one, ``t``.

        A single time is enough only if it is the schedule's first, and in full precision: a later one may match another
        schedule by chance. The result is None if the times cannot be derived (yet): the pipeline has not set its
        scheduler in this run, or the module does not receive the scheduler's time.
        """
        timesteps = self._timesteps()
        if timesteps is None or timesteps is self._before or len(timesteps) == 0:
            return None
        t = torch.as_tensor(t)
        seen, dtype, tolerance = [*first, float(t.max())], t.dtype, rounding_of(t)
        trained = getattr(getattr(self.pipeline.scheduler, "config", None), "num_train_timesteps", 1000)
        times = torch.tensor(_own_part(self.pipeline, self.component, _different(timesteps)), dtype=torch.float64)
        found = []
        for form in _FORMS:
            received = _different(form(times, trained).to(dtype if dtype.is_floating_point else torch.float64))
            at = min(range(len(received)), key=lambda i: abs(received[i] - seen[0]))
            ahead = received[at : at + len(seen)]
            near = [math.isclose(*pair, rel_tol=tolerance) for pair in zip(ahead, seen, strict=False)]
            if len(near) == len(seen) and all(near):
                found.append((at, received[at:]))
        if len(found) != 1 or (len(seen) == 1 and (found[0][0] > 0 or tolerance > RELATIVE_TOLERANCE)):
            return None
        return found[0][1]

    def _timesteps(self) -> Tensor | None:
        timesteps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        return timesteps if isinstance(timesteps, Tensor) else None


def rounding_of(t: Tensor | float) -> float:
    """Relative error that casting to the dtype of ``t`` may have caused."""
    low = isinstance(t, Tensor) and t.is_floating_point()
    return max(RELATIVE_TOLERANCE, torch.finfo(t.dtype).eps if low else 0.0)  # type: ignore[union-attr]


def _shares(pipeline: Any, component: str) -> bool:
    """Whether it is one of two transformers that share a schedule: the first runs down to ``boundary_ratio`` of it."""
    config = getattr(pipeline, "config", None) or {}
    return "boundary_ratio" in config and component in ("transformer", "transformer_2")


def _own_part(pipeline: Any, component: str, times: list[float]) -> list[float]:
    """Times of a schedule at which a module is called.

    Raises:
        CalibrationError: there are none.
    """
    if not _shares(pipeline, component):
        return times
    ratio, is_first = pipeline.config["boundary_ratio"], component == "transformer"
    boundary = -math.inf if ratio is None else ratio * pipeline.scheduler.config.num_train_timesteps
    own = [t for t in times if (t >= boundary) == is_first]
    if not own:
        raise CalibrationError(
            f"{type(pipeline).__name__} never calls its {component} in these {len(times)} steps: its boundary_ratio is "
            f"{ratio}; record the other one, or take more steps"
        )
    return own


def _different(timesteps: Tensor) -> list[float]:
    """The timesteps in order, without those that a solver evaluates a second time."""
    return list(dict.fromkeys(map(float, timesteps.tolist())))
