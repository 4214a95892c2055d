"""Weights that a module holds twice, such as a fused q, k and v weight next to the originals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Twin:
    """A parameter that equals rows of another one."""

    source: str
    """Path of the other parameter."""
    rows: slice

    def rows_of(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The parameter's new value, if its source is replaced by one of ``tensors``; else None."""
        return tensors[self.source][self.rows] if self.source in tensors else None


def find_twins(parameters: Mapping[str, nn.Parameter], unread: Sequence[str]) -> dict[str, Twin]:
    """Twins by path: unread parameters that equal rows of a sibling's parameters, which the call reads.

    A module is a twin if its weight occurs exactly once among the rows of the sibling's weight, and each of its
    parameters equals the same rows of the sibling's.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    siblings: dict[str, list[str]] = defaultdict(list)
    for path in parameters:
        owner, _, leaf = path.rpartition(".")
        modules[owner].append(leaf)
        if leaf == "weight" and path not in unread:
            siblings[owner.rpartition(".")[0]].append(owner)
    twins: dict[str, Twin] = {}
    for owner in dict.fromkeys(path.rpartition(".")[0] for path in unread):
        for sibling in siblings[owner.rpartition(".")[0]] if f"{owner}.weight" in unread else ():
            rows = _rows(parameters[f"{sibling}.weight"], parameters[f"{owner}.weight"])
            found = {f"{owner}.{leaf}": Twin(f"{sibling}.{leaf}", slice(*rows)) for leaf in modules[owner] if rows}
            if found and all(
                path in unread
                and twin.source in parameters
                and torch.equal(parameters[twin.source][twin.rows], parameters[path])
                for path, twin in found.items()
            ):
                twins |= found
                break
    return twins


def _rows(whole: Tensor, part: Tensor) -> tuple[int, int] | None:
    """Start and end of ``part`` among the rows of ``whole``; None unless it occurs exactly once."""
    if whole.ndim != part.ndim or whole.shape[1:] != part.shape[1:] or whole.dtype != part.dtype or not len(part):
        return None
    starts = (whole == part[0]).reshape(len(whole), -1).all(1).nonzero().flatten().tolist()
    places = [i for i in starts if i + len(part) <= len(whole) and torch.equal(whole[i : i + len(part)], part)]
    return (places[0], places[0] + len(part)) if len(places) == 1 else None
