"""How long work reports its progress: one convention for all of the package."""

from __future__ import annotations

import functools
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with ``(done, in all)``, in units of the function's own."""

OnStage = Callable[[str, int, int], None]
"""Called with ``(stage, done, in all)`` by work of several stages; ``in all`` is 0 where it is not known."""


def ignore(*_: object) -> None:
    """A callback that reports nothing."""


def of_stage(on_stage: OnStage, stage: str) -> OnProgress:
    """The progress of one stage."""
    return functools.partial(on_stage, stage)
