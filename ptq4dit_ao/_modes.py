"""Isolation from the caller's torch modes, such as autocast, which must not affect this package's computations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST = ("cpu", "cuda", "xpu", "mps")
"""Kinds of devices on which a graph may run."""


def autocasts() -> bool:
    """Whether autocast is on for any kind of device."""
    return any(map(torch.is_autocast_enabled, AUTOCAST))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off, because a graph defines the dtype of each of its operators."""
    with ExitStack() as stack:
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def own_modes() -> Iterator[None]:
    """Switch off gradients, autocast and inference mode, and create new tensors as float32 on the CPU.

    Learning is not possible in inference mode. Do not use this where many threads call: the default dtype is shared by
    all.
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
