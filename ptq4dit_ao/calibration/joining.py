"""Samples from the recorded calls of a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ptq4dit_ao.calibration.samples import CalibrationSamples
from ptq4dit_ao.capture.signature import CallSignature
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph.names import TIMESTEP_NAMES

Role = Literal["rows", "one for all", "shared"]


class RecordedCall(NamedTuple):
    """A call of a module, with its tensors by name."""

    timestep: float
    size: int
    """Index of the size that the pipeline was asked for."""
    signature: CallSignature
    tensors: dict[str, Tensor]

    @property
    def batch(self) -> int:
        """Number of rows: the first axis of the first tensor."""
        return len(next(iter(self.tensors.values())))


def join_calls(calls: Sequence[RecordedCall]) -> CalibrationSamples:
    """Samples from recorded calls of one structure.

    The first axis of the first tensor is the batch. Tensors that have it in every call become rows. The timestep, and
    tensors that differ between calls of one size, become rows, too, if they have one value for the whole batch. The
    others are shared by all rows of a size, and so are those that stand for numbers. Calls have one size if the
    pipeline was asked for one size and their tensors have the same shapes, up to the batch.

    Raises:
        CalibrationError: a tensor differs between calls of one size, but does not have a row for each sample.
    """
    numbers = calls[0].signature.numbers
    roles: dict[str, Role] = {name: "shared" if name in numbers else _role(name, calls) for name in calls[0].tensors}
    sizes: dict[object, list[RecordedCall]] = {}
    for call in calls:
        shapes = [x.shape[int(roles[name] != "shared") :] for name, x in call.tensors.items()]
        sizes.setdefault((call.size, *shapes), []).append(call)
    for name in [name for name, role in roles.items() if role == "one for all" and name not in TIMESTEP_NAMES]:
        if all(_equal(_column(name, found)) for found in sizes.values()):
            roles[name] = "shared"
    return CalibrationSamples.joined([_samples(found, roles) for found in sizes.values()])


def _role(name: str, calls: Sequence[RecordedCall]) -> Role:
    column = _column(name, calls)
    if all(x.shape[:1] == (call.batch,) for x, call in zip(column, calls, strict=True)):
        return "rows"
    return "one for all" if all(x.ndim == 0 or len(x) == 1 for x in column) else "shared"


def _column(name: str, calls: Sequence[RecordedCall]) -> list[Tensor]:
    return [call.tensors[name] for call in calls]


def _equal(column: Sequence[Tensor]) -> bool:
    return all(x is column[0] or torch.equal(x, column[0]) for x in column)


def _samples(calls: Sequence[RecordedCall], roles: dict[str, Role]) -> CalibrationSamples:
    """Samples of calls of one size."""
    inputs, shared = {}, {}
    for name, role in roles.items():
        column = _column(name, calls)
        if role == "rows":
            inputs[name] = torch.cat(column)
        elif role == "one for all":  # () or (1, ...) -> (batch, ...)
            inputs[name] = torch.cat(
                [x.expand(call.batch, *x.shape[1:]) for x, call in zip(column, calls, strict=True)]
            )
        elif _equal(column):
            shared[name] = column[0]
        else:
            batches = sorted({call.batch for call in calls})
            raise CalibrationError(
                f"input {name!r} differs from call to call, but its first axis is not the batch: shapes "
                f"{sorted({tuple(x.shape) for x in column})}, batches of {batches}; record calls that agree in it"
            )
    return CalibrationSamples(inputs, shared, calls[0].signature)
