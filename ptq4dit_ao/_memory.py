"""Release of freed memory that the C library still holds."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Return freed memory to the system.

    glibc keeps freed blocks of up to 32 MiB, and a transformer's tensors are often smaller. Without glibc, nothing is
    done.
    """
    if (release := _malloc_trim()) is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
