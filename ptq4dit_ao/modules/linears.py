"""Linears of a quantized graph as parts of a module: the place of each, and its balancing vectors.

In a graph, balancing is folded into parameters before the linears. A module keeps the float model's activations, and
divides by b where a linear quantizes its input. Its integers are those of the graph: folds scale whole rows of a
weight, which a module undoes in the scale of the row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
    refusal: str | None = None
    """The reason why a module cannot hold it; None if it can."""


def module_linears(graph: GraphModule, result: BalanceResult, folded: Collection[str] = ()) -> tuple[ModuleLinear, ...]:
    """The linears of integer weights of a converted graph, in execution order.

    Args:
        graph: a graph that ``convert_pt2e`` has just made.
        result: its result of balancing.
        folded: paths of the parameters that weights in the graph were computed from.
    """
    columns, rows, refusals = _vectors(result)
    refusals |= dict.fromkeys(folded, "another weight is computed from its weight")
    return tuple(
        ModuleLinear(
            node=linear.name,
            weight=(path := result.weights[linear.name]),
            ndim=linear.x.meta["val"].ndim,
            columns=columns.get(path),
            rows=rows.get(path),
            refusal=refusals.get(path),
        )
        for linear in integer_linears(graph)
    )


def _vectors(result: BalanceResult) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Columns and rows by which weights were scaled, and why a weight's cannot be undone, each by path."""
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    refusals: dict[str, str] = {}
    for outcome in result.outcomes.values():
        weights = [consumer.weight for consumer in outcome.site.consumers]
        if outcome.offset is not None:
            refusals |= dict.fromkeys(weights, "its input is shifted (method 'repq')")
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
    return columns, rows, refusals


def _by_row(variables: np.ndarray) -> np.ndarray | None:
    """Variables of the rows of a weight (C_out, C_in) or the elements of a bias (C_out,); None if they differ in it."""
    table = variables.reshape(len(variables), -1)
    return table[:, 0] if (table == table[:, :1]).all() else None


def to_tensors(linears: Sequence[ModuleLinear]) -> dict[str, Tensor]:
    """The vectors by name, to be stored."""
    named = {f"{linear.node}.columns": linear.columns for linear in linears}
    named |= {f"{linear.node}.rows": linear.rows for linear in linears}
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
                columns, rows = (tensors.get(f"{node}.{part}") for part in ("columns", "rows"))
                return ModuleLinear(node=node, weight=weight, ndim=ndim, columns=columns, rows=rows, refusal=refusal)
    raise ArtifactError(f"{entry!r} describes no linear of a saved model; save it again")
