"""Checks of everything that is known before hours of sampling and calibration."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

import torch
from torch import nn

from ptq4dit_ao.errors import LoweringError, OverrideError
from ptq4dit_ao.graph.names import unwrapped
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.recipe import Recipe


def check_overrides(transformer: nn.Module, recipe: Recipe) -> None:
    """Check that every override of a recipe can match a layer.

    Whether it matches a linear layer of the graph is known only when the graph has been captured.

    Raises:
        OverrideError: an override matches no module that has a matrix as a parameter.
    """
    names = [
        unwrapped(name)
        for name, module in transformer.named_modules()
        if any(parameter.ndim == 2 for parameter in module.parameters(recurse=False))
    ]
    for override in recipe.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in names):
            near = difflib.get_close_matches(override.pattern, names, n=1, cutoff=0.3)
            hint = f"; the nearest layer is {near[0]!r}" if near else ""
            raise OverrideError(f"override {override.pattern!r} matches no layer of the model{hint}")


def check_dtype(transformer: nn.Module, backend: str) -> None:
    """Check that a backend runs models of this model's dtype.

    Raises:
        LoweringError: it does not.
    """
    carries = BACKENDS[backend].carries
    dtype = next((p.dtype for p in transformer.parameters() if p.is_floating_point()), torch.float32)
    if carries is not None and dtype not in carries.model_dtypes:
        taken, found = (
            " or ".join(str(d).removeprefix("torch.") for d in some) for some in (carries.model_dtypes, [dtype])
        )
        raise LoweringError(
            f"backend {backend!r} runs models of {taken}, and this one is {found}; call .float() on it before "
            "quantizing, or use another backend"
        )


def least_bytes(transformer: nn.Module, recipe: Recipe) -> int:
    """Lower bound of the size on disk, in bytes: all parameters quantized to the fewest bits."""
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    return parameters if min(recipe.weight_widths) > 4 else parameters // 2
