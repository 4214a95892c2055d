"""Checks that recorded calls differ in the values and sizes of their tensors only."""

from __future__ import annotations

import reprlib

from torch import Tensor

from ptq4dit_ao.capture.signature import CallSignature
from ptq4dit_ao.errors import CalibrationError


def check_structure(first: CallSignature, other: CallSignature) -> None:
    """Check that two calls are equal except for their tensors, including types (1 is not True here).

    Raises:
        CalibrationError: they differ.
    """
    for name in {**first.arguments, **other.arguments}:
        values = [reprlib.repr(c.arguments[name]) if name in c.arguments else "missing" for c in (first, other)]
        if repr(first.arguments.get(name)) != repr(other.arguments.get(name)) or values.count("missing") == 1:
            raise CalibrationError(
                f"argument {name!r} is {values[0]} in one call and {values[1]} in another; only tensors may differ: "
                "record calls that agree in it, and leave the others out (skip=, which is given their arguments)"
            )


def check_kind(name: str, first: Tensor, other: Tensor) -> None:
    """Check that two recorded tensors of an input differ in the sizes of their axes at most.

    Raises:
        CalibrationError: they differ in dtype or in the number of axes.
    """
    if (first.dtype, first.ndim) != (other.dtype, other.ndim):
        shapes = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (first, other)]
        raise CalibrationError(
            f"input {name!r} is {shapes[0]} in one call and {shapes[1]} in another; rows need one dtype and number "
            "of axes: record calls that agree in them, and leave the others out (skip=)"
        )
