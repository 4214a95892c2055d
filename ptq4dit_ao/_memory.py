"""Memory that was freed, but is still held by the C library."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Give freed memory back to the system.

    glibc keeps freed blocks of up to 32 MiB, and a transformer's tensors are often smaller. A no-op without glibc.
    """
    if (release := _malloc_trim()) is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
