"""Recorded inputs of a denoiser, as tensors by input name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao.capture.signature import CallSignature, name_numbers
from ptq4dit_ao.errors import ArgumentError, CalibrationError, check_type
from ptq4dit_ao.graph.names import TIMESTEP_NAMES

FORMAT = TensorFormat(name="calibration samples", version=2, error=CalibrationError, remedy="record them again")


class CalibrationSamples:
    """Inputs of a denoiser, one tensor (N, ...) per input, in the order of its ``forward``.

    Args:
        inputs: tensors that differ from row to row. Those that stand for numbers of the call become shared.
        shared: tensors that every batch uses unchanged, such as position ids.
        signature: how ``forward`` takes both. Without it, the inputs are passed by position.

    Raises:
        CalibrationError: the numbers of rows differ, a name is given twice, or the signature is of other tensors.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        shared: Mapping[str, Tensor] | None = None,
        signature: CallSignature | None = None,
    ) -> None:
        check_type("inputs", inputs, Mapping, "a dict of tensors by input name")
        for name, tensor in inputs.items():
            check_type(f"input {name!r}", tensor, Tensor, "a tensor whose first axis is the batch")
        twice = [name for name, x in (shared or {}).items() if not isinstance(x, Tensor) or name in inputs]
        if twice:
            raise CalibrationError(
                f"the calibration input {twice[0]!r} is shared, and has rows, too, or is no tensor; give each input "
                "once, as a tensor"
            )
        numbers = set() if signature is None else set(signature.numbers)
        shared = {**(shared or {}), **{name: x for name, x in inputs.items() if name in numbers}}
        inputs = {name: x for name, x in inputs.items() if name not in numbers}
        sizes = {name: len(tensor) if tensor.ndim else 0 for name, tensor in inputs.items()}
        if not sizes or len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise CalibrationError(f"calibration inputs need one common, non-zero number of rows, got {sizes}")
        self.inputs, self.shared, self.signature = dict(inputs), dict(shared or {}), signature
        self._device: torch.device | None = None
        names = [*self.inputs, *self.shared]
        if signature is not None and sorted(signature.names) != sorted(names):
            raise CalibrationError(f"the signature takes {signature.names}, but there are tensors for {names}")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def on(self, device: torch.device) -> CalibrationSamples:
        """The same samples, with batches on a device. The recorded tensors stay where they are."""
        other = CalibrationSamples(self.inputs, self.shared, self.signature)
        other._device = device
        return other

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Tuples of inputs, ``size`` rows each; the last one may be smaller. Shared tensors need a signature.

        Raises:
            ArgumentError: ``size`` is less than 1.
        """
        _check_rows("size", size)
        return self._batches(size)

    def _batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        names = list(self.inputs) if self.signature is None else self.signature.names
        for start in range(0, len(self), size):
            rows = {name: tensor[start : start + size] for name, tensor in self.inputs.items()}
            batch = (rows[name] if name in rows else self.shared[name] for name in names)
            yield tuple(batch if self._device is None else (tensor.to(self._device) for tensor in batch))

    @property
    def timesteps(self) -> Tensor:
        """Timestep of every row, (N,) float64: the largest of a row's tokens; zeros if no input is a timestep."""
        found = next((self.inputs[name] for name in TIMESTEP_NAMES if name in self.inputs), torch.zeros(len(self)))
        t = found.double()
        return t.flatten(1).amax(1) if t.ndim > 1 else t

    def by_timestep(self) -> Iterator[tuple[Tensor, ...]]:
        """One batch for each timestep, ascending."""
        for t in self.timesteps.unique():
            rows = self._rows(torch.nonzero(self.timesteps == t).flatten())
            yield from rows.batches(len(rows))

    def spread(self, rows: int) -> CalibrationSamples:
        """A selection of ``rows`` rows, spread evenly over the timesteps; all rows if there are no more.

        Raises:
            ArgumentError: ``rows`` is less than 1.
        """
        _check_rows("rows", rows)
        order = self.timesteps.argsort(stable=True)
        rows = min(rows, len(self))
        return self._rows(order[[(2 * i + 1) * len(self) // (2 * rows) for i in range(rows)]])

    def example(self, size: int) -> dict[str, Any] | tuple[Tensor, ...]:
        """The first ``size`` rows for ``export_transformer``: keyword arguments, or a tuple without a signature.

        Raises:
            CalibrationError: a shared tensor has a first axis of that size, which an export would take for the batch.
            ArgumentError: ``size`` is less than 1.
        """
        batch = next(self.batches(size))
        if self.signature is None:
            return batch
        rows = min(size, len(self))
        numbers = self.signature.numbers
        taken = [name for name, x in self.shared.items() if x.shape[:1] == (rows,) and name not in numbers]
        if taken:
            raise CalibrationError(
                f"the shared input {taken[0]!r} has {rows} rows, too; give an example of another size"
            )
        return self.signature.bind(batch)

    def shuffled(self, seed: int) -> CalibrationSamples:
        """The same rows in a seeded random order, so that batches mix timesteps."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._rows(order)

    def _rows(self, which: Tensor) -> CalibrationSamples:
        rows = {name: tensor[which] for name, tensor in self.inputs.items()}
        some = CalibrationSamples(rows, self.shared, self.signature)
        some._device = self._device
        return some

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Raises:
            CalibrationError: it cannot be written.
        """
        about = {"inputs": ",".join(self.inputs)}
        try:
            if any("," in name for name in self.inputs):
                raise ValueError(f"a name of {list(self.inputs)} has a comma")
            if self.signature is not None:
                about["signature"] = json.dumps(self.signature.to_json())
        except ValueError as error:
            raise CalibrationError(f"cannot write calibration samples to {path}: {error}") from error
        FORMAT.write(path, {**self.inputs, **self.shared}, about)

    @classmethod
    def load(cls, path: str | Path) -> CalibrationSamples:
        """Read a file that :meth:`save` wrote.

        Raises:
            CalibrationError: the file is missing, is something else, or is damaged.
        """
        metadata, tensors = FORMAT.read(path)
        try:
            inputs = {name: tensors.pop(name) for name in metadata["inputs"].split(",")}
            text = metadata.get("signature")
            signature = None if text is None else CallSignature.from_json(json.loads(text))
            if signature is not None:
                signature, numbers = name_numbers(signature)  # files of earlier versions hold numbers as such
                tensors |= numbers
        except (KeyError, ValueError, RecursionError) as error:
            raise CalibrationError(
                f"the calibration samples in {path} are damaged ({error}); record them again"
            ) from error
        return cls(inputs, tensors, signature)


def _check_rows(name: str, value: object) -> None:
    """Check that a number of rows is a whole number of at least 1.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}; give a whole number of rows, at least 1")


def join_calls(calls: Sequence[tuple[CallSignature, Mapping[str, Tensor]]]) -> CalibrationSamples:
    """Samples from recorded calls of one structure, whose tensors differ at most in their first axis.

    The first axis of the first tensor is the batch. Tensors that have it in every call become rows. The timestep, and
    tensors that differ from call to call, become rows, too, if they have one value for the whole batch. The others are
    shared, and so are those that stand for numbers, whatever their length.

    Raises:
        CalibrationError: a tensor differs from call to call, but does not have a row for each sample.
    """
    signature, first = calls[0]
    batches = [len(next(iter(tensors.values()))) for _, tensors in calls]
    inputs: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    numbers = signature.numbers
    for name in first:
        column = [tensors[name] for _, tensors in calls]
        equal = all(tensor is column[0] or torch.equal(tensor, column[0]) for tensor in column)
        single = all(tensor.ndim == 0 or len(tensor) == 1 for tensor in column)
        if name in numbers and equal:
            shared[name] = column[0]
        elif name in numbers:
            lengths = sorted({len(tensor) for tensor in column})
            raise CalibrationError(f"the size {name!r} is {lengths} in different calls; record calls that agree in it")
        elif all(tensor.shape[:1] == (batch,) for tensor, batch in zip(column, batches, strict=True)):
            inputs[name] = torch.cat(column)
        elif single and (not equal or name in TIMESTEP_NAMES):  # () or (1, ...) -> (batch, ...)
            inputs[name] = torch.cat([x.expand(n, *x.shape[1:]) for x, n in zip(column, batches, strict=True)])
        elif equal:
            shared[name] = column[0]
        else:
            shapes = sorted({tuple(tensor.shape) for tensor in column})
            raise CalibrationError(
                f"input {name!r} differs from call to call, but its first axis is not the batch: shapes {shapes}, "
                f"batches of {sorted(set(batches))}; record calls that agree in it"
            )
    return CalibrationSamples(inputs, shared, signature)
