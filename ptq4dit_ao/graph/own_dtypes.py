"""``own_dtypes``: a graph says itself what each of its operators computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def own_dtypes() -> Iterator[None]:
    """Switch autocast off: it would cast the operands of some operators of a graph, which others then refuse."""
    with contextlib.ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
