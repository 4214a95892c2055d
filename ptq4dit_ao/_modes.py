"""Modes of torch that the caller may be in, and that must not reach what is computed here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST = ("cpu", "cuda", "xpu", "mps")
"""Kinds of devices on which a graph may run."""


def autocasts() -> bool:
    """Is autocast on, for any kind of device?"""
    return any(map(torch.is_autocast_enabled, AUTOCAST))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off: a graph says itself what each of its operators computes in."""
    with ExitStack() as stack:
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def own_modes() -> Iterator[None]:
    """Neither gradients, autocast nor inference mode, in which nothing can learn; new tensors are float32, on the CPU.

    Not for what many threads call: the default dtype is one for all of them.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_autocast())
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
