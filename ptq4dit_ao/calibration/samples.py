"""Recorded inputs of a denoiser, as tensors by input name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao.calibration.alike import check_structure
from ptq4dit_ao.calibration.group import SampleGroup, apportioned, merged
from ptq4dit_ao.capture.signature import CallSignature, name_numbers
from ptq4dit_ao.errors import ArgumentError, CalibrationError, check_type

FORMAT = TensorFormat(
    name="calibration samples", version=3, reads=(2,), error=CalibrationError, remedy="record them again"
)


class CalibrationSamples:
    """Inputs of a denoiser, one tensor (N, ...) per input, in the order of its ``forward``.

    Samples of several sizes are groups of samples of one size each; :meth:`joined` makes one object of them. Every
    batch has one size.

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
        numbers = set() if signature is None else set(signature.numbers)
        shared = {**(shared or {}), **{name: x for name, x in inputs.items() if name in numbers}}
        inputs = {name: x for name, x in inputs.items() if name not in numbers}
        self._set((SampleGroup(inputs, shared),), signature, None)

    @classmethod
    def joined(cls, parts: Sequence[CalibrationSamples]) -> CalibrationSamples:
        """All rows of several samples, whose sizes may differ.

        Raises:
            CalibrationError: there are none, or they were recorded from different calls: an argument that is no tensor,
                or a tensor's dtype or number of axes, differs.
        """
        parts = list(parts)
        for part in parts:
            check_type("a part", part, CalibrationSamples, "what collect_from_pipeline recorded")
        if not parts:
            raise CalibrationError("there are no calibration samples to join; give at least one part")
        for part in parts[1:]:
            _check_signature(parts[0].signature, part.signature)
        groups = merged([group for part in parts for group in part._groups])
        return cls._of(groups, parts[0].signature, parts[0]._device)

    @classmethod
    def _of(
        cls, groups: Sequence[SampleGroup], signature: CallSignature | None, device: torch.device | None = None
    ) -> CalibrationSamples:
        samples = cls.__new__(cls)
        samples._set(tuple(groups), signature, device)
        return samples

    def _set(
        self, groups: tuple[SampleGroup, ...], signature: CallSignature | None, device: torch.device | None
    ) -> None:
        self._groups, self.signature, self._device = groups, signature, device
        names = [*groups[0].inputs, *groups[0].shared]
        if signature is not None and sorted(signature.names) != sorted(names):
            raise CalibrationError(
                f"the signature takes {signature.names}, but there are tensors for {names}; give one for each name"
            )

    @property
    def groups(self) -> tuple[CalibrationSamples, ...]:
        """The samples of each size."""
        return tuple(self._some([group]) for group in self._groups)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Tensors that differ from row to row, by input name.

        Raises:
            CalibrationError: the samples have several sizes.
        """
        return dict(self._only_group("inputs").inputs)

    @property
    def shared(self) -> dict[str, Tensor]:
        """Tensors that every batch uses unchanged, by input name.

        Raises:
            CalibrationError: the samples have several sizes.
        """
        return dict(self._only_group("shared").shared)

    def _only_group(self, name: str) -> SampleGroup:
        if len(self._groups) > 1:
            raise CalibrationError(
                f"these samples have {len(self._groups)} sizes, and {name} is of samples of one size; take it from "
                "each of their groups"
            )
        return self._groups[0]

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def on(self, device: torch.device) -> CalibrationSamples:
        """The same samples, with batches on a device. The recorded tensors stay where they are."""
        return self._of(self._groups, self.signature, device)

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Tuples of inputs, ``size`` rows each; the last one of each size may be smaller.

        Batches of different sizes alternate, in proportion to their numbers. Shared tensors need a signature.

        Raises:
            ArgumentError: ``size`` is less than 1.
        """
        _check_rows("size", size)
        return (self._batch(group.rows(slice(start, start + size))) for group, start in self._starts(size))

    def num_batches(self, size: int) -> int:
        """The number of tuples that :meth:`batches` gives.

        Raises:
            ArgumentError: ``size`` is less than 1.
        """
        _check_rows("size", size)
        return sum(-(-len(group) // size) for group in self._groups)

    def _starts(self, size: int) -> list[tuple[SampleGroup, int]]:
        """Group and first row of each batch. The batches of every group are spread evenly over all."""
        found = []
        for index, group in enumerate(self._groups):
            starts = range(0, len(group), size)
            found += [((i + 0.5) / len(starts), index, start) for i, start in enumerate(starts)]
        return [(self._groups[index], start) for _, index, start in sorted(found)]

    def _batch(self, group: SampleGroup) -> tuple[Tensor, ...]:
        """All rows of a group as one batch."""
        names = list(group.inputs) if self.signature is None else self.signature.names
        batch = (group.inputs[name] if name in group.inputs else group.shared[name] for name in names)
        return tuple(batch if self._device is None else (tensor.to(self._device) for tensor in batch))

    @property
    def timesteps(self) -> Tensor:
        """Timestep of every row, (N,) float64: the largest of a row's tokens; zeros if no input is a timestep.

        The rows of one size follow those of another, in the order of :attr:`groups`.
        """
        return torch.cat([group.timesteps for group in self._groups])

    def by_timestep(self) -> Iterator[tuple[Tensor, ...]]:
        """One batch for each timestep and size, ascending in the timestep."""
        for t in self.timesteps.unique():
            for group in self._groups:
                which = torch.nonzero(group.timesteps == t).flatten()
                if len(which):
                    yield self._batch(group.rows(which))

    def spread(self, rows: int) -> CalibrationSamples:
        """A selection of ``rows`` rows, spread evenly over the timesteps; all rows if there are no more.

        Every size has rows in proportion to those that there are, and at least one if ``rows`` suffices.

        Raises:
            ArgumentError: ``rows`` is less than 1.
        """
        _check_rows("rows", rows)
        shares = apportioned(rows, [len(group) for group in self._groups])
        some = [(group, share) for group, share in zip(self._groups, shares, strict=True) if share]
        return self._some([group.spread(share, part, len(some)) for part, (group, share) in enumerate(some)])

    def example(self, size: int) -> dict[str, Any] | tuple[Tensor, ...]:
        """The first ``size`` rows for ``export_transformer``: keyword arguments, or a tuple without a signature.

        Of several sizes, it is the first that has so many rows.

        Raises:
            CalibrationError: a shared tensor has a first axis of that size, which an export would take for the batch.
            ArgumentError: ``size`` is less than 1.
        """
        _check_rows("size", size)
        enough = [group for group in self._groups if len(group) >= size] or [max(self._groups, key=len)]
        if self.signature is None:
            return self._batch(enough[0].rows(slice(size)))
        taken = ""
        for group in enough:
            rows = min(size, len(group))
            numbers = self.signature.numbers
            names = [name for name, x in group.shared.items() if x.shape[:1] == (rows,) and name not in numbers]
            if not names:
                return self.signature.bind(self._batch(group.rows(slice(size))))
            taken = taken or f"the shared input {names[0]!r} has {rows} rows, too"
        raise CalibrationError(f"{taken}; give an example of another size")

    def shuffled(self, seed: int) -> CalibrationSamples:
        """The same rows in a seeded random order, so that batches mix timesteps."""
        generator = torch.Generator().manual_seed(seed)
        return self._some([group.rows(torch.randperm(len(group), generator=generator)) for group in self._groups])

    def _some(self, groups: Sequence[SampleGroup]) -> CalibrationSamples:
        return self._of(groups, self.signature, self._device)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Raises:
            CalibrationError: it cannot be written.
        """
        names = list(self._groups[0].inputs)
        about = {"inputs": ",".join(names)}
        try:
            if any("," in name for name in names):
                raise ValueError(f"a name of {names} has a comma; rename it in forward")
            if self.signature is not None:
                about["signature"] = json.dumps(self.signature.to_json())
        except ValueError as error:
            raise CalibrationError(f"cannot write calibration samples to {path}: {error}") from error
        tables = [{**group.inputs, **group.shared} for group in self._groups]
        if len(tables) == 1:
            FORMAT.write(path, tables[0], about)
            return
        tensors = {f"{index}/{name}": x for index, table in enumerate(tables) for name, x in table.items()}
        FORMAT.write(path, tensors, about | {"sizes": str(len(tables))})

    @classmethod
    def load(cls, path: str | Path) -> CalibrationSamples:
        """Read a file that :meth:`save` wrote, now or before samples could have several sizes.

        Raises:
            CalibrationError: the file is missing, is something else, or is damaged.
        """
        metadata, tensors = FORMAT.read(path)
        try:
            tables = [tensors]
            if "sizes" in metadata:
                tables = [{} for _ in range(int(metadata["sizes"]))]
                for key, tensor in tensors.items():
                    index, _, name = key.partition("/")
                    tables[int(index)][name] = tensor
            inputs = [{name: table.pop(name) for name in metadata["inputs"].split(",")} for table in tables]
            text = metadata.get("signature")
            signature = None if text is None else CallSignature.from_json(json.loads(text))
            if signature is not None:
                signature, numbers = name_numbers(signature)  # files of earlier versions hold numbers as such
                for table in tables:
                    table |= numbers
        except (KeyError, IndexError, ValueError, RecursionError) as error:
            raise CalibrationError(
                f"the calibration samples in {path} are damaged ({error}); record them again"
            ) from error
        return cls._of(merged(list(map(SampleGroup, inputs, tables))), signature)


def _check_rows(name: str, value: object) -> None:
    """Check that a number of rows is a whole number of at least 1.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}; give a whole number of rows, at least 1")


def _check_signature(first: CallSignature | None, other: CallSignature | None) -> None:
    if (first is None) != (other is None):
        raise CalibrationError("some of the samples have a signature, and others have none; join those of one kind")
    if first is not None and other is not None:
        check_structure(first, other)
