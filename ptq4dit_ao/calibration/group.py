"""Recorded inputs of one size: a table of rows, and the tensors that all rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4dit_ao.calibration.alike import check_kind
from ptq4dit_ao.errors import CalibrationError, check_type
from ptq4dit_ao.graph.names import TIMESTEP_NAMES


@dataclass(frozen=True, eq=False)
class SampleGroup:
    """Samples whose tensors have one shape each.

    Raises:
        CalibrationError: the numbers of rows differ, or a name is given twice.
        ArgumentError: ``inputs`` is not a dict of tensors.
    """

    inputs: Mapping[str, Tensor]
    """Tensors that differ from row to row, (N, ...) each."""
    shared: Mapping[str, Tensor]
    """Tensors that every batch uses unchanged, such as position ids."""

    def __post_init__(self) -> None:
        check_type("inputs", self.inputs, Mapping, "a dict of tensors by input name")
        for name, tensor in self.inputs.items():
            check_type(f"input {name!r}", tensor, Tensor, "a tensor whose first axis is the batch")
        twice = [name for name, x in self.shared.items() if not isinstance(x, Tensor) or name in self.inputs]
        if twice:
            raise CalibrationError(
                f"the calibration input {twice[0]!r} is shared, and has rows, too, or is no tensor; give each input "
                "once, as a tensor"
            )
        rows = {name: len(tensor) if tensor.ndim else 0 for name, tensor in self.inputs.items()}
        if not rows or len(set(rows.values())) != 1 or 0 in rows.values():
            raise CalibrationError(f"calibration inputs need one common, non-zero number of rows, got {rows}")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def timesteps(self) -> Tensor:
        """Timestep of every row, (N,) float64: the largest of a row's tokens; zeros if no input is a timestep."""
        found = next((self.inputs[name] for name in TIMESTEP_NAMES if name in self.inputs), torch.zeros(len(self)))
        t = found.double()
        return t.flatten(1).amax(1) if t.ndim > 1 else t

    def rows(self, which: Tensor | slice) -> SampleGroup:
        """Some of the rows."""
        return SampleGroup({name: tensor[which] for name, tensor in self.inputs.items()}, self.shared)

    def spread(self, rows: int, part: int = 0, parts: int = 1) -> SampleGroup:
        """A selection of ``rows`` different rows, spread evenly over the timesteps.

        Args:
            rows: number of rows, at most those that there are.
            part: index of this group among several from which rows are selected, so that they take different timesteps.
            parts: number of these groups.
        """
        order = self.timesteps.argsort(stable=True)
        at = [(2 * parts * i + 2 * part + 1) * len(self) // (2 * parts * rows) for i in range(rows)]
        return self.rows(order[at])

    def is_like(self, other: SampleGroup) -> bool:
        """Whether both have one size: rows of the same shapes, and equal shared tensors."""
        return all(x.shape[1:] == other.inputs[name].shape[1:] for name, x in self.inputs.items()) and all(
            x is other.shared[name] or torch.equal(x, other.shared[name]) for name, x in self.shared.items()
        )


def merged(groups: Sequence[SampleGroup]) -> tuple[SampleGroup, ...]:
    """The groups, with those of one size joined in the order in which they come.

    Raises:
        CalibrationError: an input has rows in one group and is shared in another, or they differ in a dtype or in a
            number of axes.
    """
    sizes: list[list[SampleGroup]] = []
    for group in groups:
        _check_alike(groups[0], group)
        same = next((found for found in sizes if found[0].is_like(group)), None)
        if same is None:
            sizes.append([group])
        else:
            same.append(group)
    return tuple(_joined(groups[0], found) for found in sizes)


def _joined(first: SampleGroup, groups: Sequence[SampleGroup]) -> SampleGroup:
    """One group of the rows of several, with inputs in the order of the ``first`` group of all."""
    if len(groups) == 1 and list(groups[0].inputs) == list(first.inputs):
        return groups[0]
    return SampleGroup(
        {name: torch.cat([group.inputs[name] for group in groups]) for name in first.inputs}, groups[0].shared
    )


def _check_alike(first: SampleGroup, other: SampleGroup) -> None:
    """Check that two groups have the same inputs, up to sizes."""
    for role, found, wanted in (("has rows", other.inputs, first.inputs), ("is shared", other.shared, first.shared)):
        odd = next(iter(found.keys() ^ wanted.keys()), None)
        if odd is not None:
            raise CalibrationError(
                f"input {odd!r} {role} in some of the samples only; record all of them with one call of "
                "collect_from_pipeline (sizes=)"
            )
        for name, x in found.items():
            check_kind(name, wanted[name], x)


def apportioned(total: int, counts: Sequence[int]) -> list[int]:
    """A share of ``total`` for each count, in proportion and at most the count; at least 1 where ``total`` suffices."""
    total, everything = min(total, sum(counts)), sum(counts)
    exact = [count * total / everything for count in counts]
    shares = [min(1, count) for count in counts]
    if total < sum(shares):  # too few for all: the largest ones
        largest = sorted(range(len(counts)), key=lambda k: -counts[k])[:total]
        return [int(k in largest) for k in range(len(counts))]
    while sum(shares) < total:
        k = max((k for k in range(len(counts)) if shares[k] < counts[k]), key=lambda k: exact[k] - shares[k])
        shares[k] += 1
    return shares
