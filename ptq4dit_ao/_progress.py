"""Progress callbacks of long work, with one convention for the whole package."""

from __future__ import annotations

import functools
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""A callback called with ``(done, total)``, in units that the function defines."""

OnStage = Callable[[str, int, int], None]
"""A callback called with ``(stage, done, total)`` by work of several stages. ``total`` is 0 where it is not known."""


def ignore(*_: object) -> None:
    """A callback that reports nothing."""


def part_of(on_progress: OnProgress, part: int, parts: int) -> OnProgress:
    """A callback that reports the progress of one of several parts of equal size; parts count from 0."""
    return lambda done, total: on_progress(part * total + done, parts * total)


def of_stage(on_stage: OnStage, stage: str) -> OnProgress:
    """A callback that reports the progress of one stage."""
    return functools.partial(on_stage, stage)
