"""Linears of a quantized graph as parts of a module: the place of each, and its balancing vectors.

In a graph, balancing is folded into parameters before the linears. A module keeps the float model's activations, and
divides by b where a linear quantizes its input. Its integers are those of the graph: folds scale whole rows of a
weight, which a module undoes in the scale of the row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.lowering.match import integer_linears
from ptq4dit_ao.passes import BalanceResult
from ptq4dit_ao.passes.edit import scale_of


@dataclass(frozen=True, kw_only=True)
class ModuleLinear:
    """A linear of integer weights of a graph, as a part of the module that the graph was captured from."""

    node: str
    """Name of the linear's node in the graph."""
    weight: str
    """Path of its weight in the module."""
    ndim: int
    """Number of axes of its input."""
    columns: Tensor | None = None
    """Vector b that divides its input, (C_in,) float64; None for ones."""
    rows: Tensor | None = None
    """Factors by which folds have divided its rows, (C_out,) float64; None for ones."""
    offset: Tensor | None = None
    """Vector that is subtracted from its input before b divides it, (C_in,) float64; None for zeros."""
    shift: Tensor | None = None
    """Sum of the offsets that later inputs have subtracted from its output, (C_out,) float64; None for zeros."""
    refusal: str | None = None
    """The reason why a module cannot hold it; None if it can."""


VECTORS = ("columns", "rows", "offset", "shift")
"""Attributes of a :class:`ModuleLinear` that are stored as tensors, if they are not None."""


def module_linears(graph: GraphModule, result: BalanceResult, folded: Collection[str] = ()) -> tuple[ModuleLinear, ...]:
    """The linears of integer weights of a converted graph, in execution order.

    Args:
        graph: a graph that ``convert_pt2e`` has just made.
        result: its result of balancing.
        folded: paths of the parameters that weights in the graph were computed from.
    """
    vectors, shifts, refusals = _vectors(result)
    refusals |= dict.fromkeys(folded, "another weight is computed from its weight")
    return tuple(
        ModuleLinear(
            node=linear.name,
            weight=(path := result.weights[linear.name]),
            ndim=linear.x.meta["val"].ndim,
            shift=_shift(shifts[path], len(linear.weight)) if path in shifts else None,
            **{name: by_path[path] for name, by_path in vectors.items() if path in by_path},
            refusal=refusals.get(path),
        )
        for linear in integer_linears(graph)
    )


def _vectors(
    result: BalanceResult,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[tuple[Tensor, Tensor]]], dict[str, str]]:
    """Vectors that weights were changed by, by name and path; what offsets have subtracted from elements of outputs;
    and why a weight's change cannot be undone, by path.
    """
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    shifts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    refusals: dict[str, str] = {}
    for outcome in reversed(result.outcomes.values()):  # in the order in which the graph was changed
        if outcome.offset is not None:
            offsets |= {consumer.weight: outcome.offset.clone() for consumer in outcome.site.consumers}
            assert outcome.site.shift is not None
            elements = torch.as_tensor(outcome.site.shift.elements)
            for path in outcome.site.shift.paths:
                scaled = outcome.offset if path not in rows else outcome.offset * rows[path].flatten()[elements]
                shifts.setdefault(path.removesuffix("bias") + "weight", []).append((elements, scaled))
        if outcome.method == "none":
            continue
        for consumer in outcome.site.consumers:
            columns[consumer.weight] = scale_of(outcome.b, consumer.variables)
        for edit in outcome.site.parameters:
            for path in edit.paths:
                by_row = _by_row(edit.variables)
                if by_row is None:
                    refusals[path] = "a fold scales parts of its rows"
                else:
                    factor = scale_of(outcome.b, by_row)
                    rows[path] = factor if path not in rows else rows[path] * factor
        if outcome.site.scalars and result.settings is not None and result.settings.fold_form == "bias":
            refusals |= {
                path.removesuffix("bias") + "weight": "its bias holds the 1 of 1 + scale (fold_form 'bias')"
                for edit in outcome.site.parameters
                for path in edit.paths
            }
    return {"columns": columns, "rows": rows, "offset": offsets}, shifts, refusals


def _shift(parts: Sequence[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """Sum of what was subtracted from elements of an output, (C_out,)."""
    total = torch.zeros(rows, dtype=torch.float64)
    for elements, subtracted in parts:
        total.index_add_(0, elements, subtracted)
    return total


def _by_row(variables: np.ndarray) -> np.ndarray | None:
    """Variables of the rows of a weight (C_out, C_in) or the elements of a bias (C_out,); None if they differ in it."""
    table = variables.reshape(len(variables), -1)
    return table[:, 0] if (table == table[:, :1]).all() else None


def to_tensors(linears: Sequence[ModuleLinear]) -> dict[str, Tensor]:
    """The vectors by name, to be stored."""
    named = {f"{linear.node}.{name}": getattr(linear, name) for name in VECTORS for linear in linears}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def to_list(linears: Sequence[ModuleLinear]) -> list[dict[str, object]]:
    """All but the vectors, JSON-safe."""
    return [{"node": x.node, "weight": x.weight, "ndim": x.ndim, "refusal": x.refusal} for x in linears]


def from_stored(entries: object, tensors: Mapping[str, Tensor]) -> tuple[ModuleLinear, ...]:
    """Read what :func:`to_list` and :func:`to_tensors` have written.

    Raises:
        ArtifactError: it has another form.
    """
    if not isinstance(entries, list):
        raise ArtifactError(f"the linears of the saved model are {entries!r}, not a list; save it again")
    return tuple(_from_stored(entry, tensors) for entry in entries)


def _from_stored(entry: object, tensors: Mapping[str, Tensor]) -> ModuleLinear:
    match entry:
        case {"node": str(node), "weight": str(weight), "ndim": int(ndim), "refusal": refusal, **rest} if not rest:
            if refusal is None or isinstance(refusal, str):
                vectors = {part: tensors.get(f"{node}.{part}") for part in VECTORS}
                return ModuleLinear(node=node, weight=weight, ndim=ndim, refusal=refusal, **vectors)
    raise ArtifactError(f"{entry!r} describes no linear of a saved model; save it again")
