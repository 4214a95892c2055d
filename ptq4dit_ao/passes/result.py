"""The result of balancing, which the ``meta`` of the balanced graph carries."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule

from ptq4dit_ao.errors import BalanceError, check_type
from ptq4dit_ao.graph import Site
from ptq4dit_ao.observers import SalienceStatistics
from ptq4dit_ao.passes.settings import BalanceSettings
from ptq4dit_ao.passes.vectors import SiteOutcome

_META = "ptq4dit_balance_result"


@dataclass(frozen=True, kw_only=True)
class BalanceResult:
    """Result of balancing: every site in execution order, and the outcomes of those that were folded.

    ``settings`` is None if balancing was switched off.
    """

    sites: tuple[Site, ...]
    outcomes: dict[str, SiteOutcome]
    statistics: SalienceStatistics
    settings: BalanceSettings | None
    layers: dict[str, str]
    """Layer name of every linear, by its node name; the converted graph itself no longer has layer names."""
    weights: dict[str, str]
    """Path of every linear's weight, by its node name."""
    clipping: dict[str, float] = field(default_factory=dict)
    """Width of the quantization range of a linear's input, by node name, as a fraction of maximum minus minimum."""


def attach_result(model: GraphModule, result: BalanceResult) -> None:
    """Store a result in a graph's ``meta``, which ``convert_pt2e`` copies to the converted graph."""
    model.meta[_META] = result


def balance_result(model: GraphModule) -> BalanceResult:
    """The result of balancing a model from ``convert_pt2e`` or :func:`~ptq4dit_ao.balance`.

    Raises:
        BalanceError: the model was made in another way.
    """
    check_type("model", model, GraphModule, "a graph that was converted or balanced")
    result = model.meta.get(_META)
    if not isinstance(result, BalanceResult):
        raise BalanceError(
            "this graph was neither converted with PTQ4DiTQuantizer nor balanced with balance(); give one that was"
        )
    return result
