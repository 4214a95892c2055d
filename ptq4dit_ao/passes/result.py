"""What balancing did, carried in the ``meta`` of the graph it was done to."""

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
    """Every site that was looked at, in execution order, and the outcome of those that were folded.

    ``settings`` is None where balancing was switched off.
    """

    sites: tuple[Site, ...]
    outcomes: dict[str, SiteOutcome]
    statistics: SalienceStatistics
    settings: BalanceSettings | None
    layers: dict[str, str]
    """Node name of every linear -> its layer's name, which the converted graph no longer knows."""
    clipping: dict[str, float] = field(default_factory=dict)
    """Node name of a linear -> the range of its input, as a part of the range from minimum to maximum."""


def attach_result(model: GraphModule, result: BalanceResult) -> None:
    """``convert_pt2e`` hands a prepared model's ``meta`` on to the converted one."""
    model.meta[_META] = result


def balance_result(model: GraphModule) -> BalanceResult:
    """What balancing did to a model from ``convert_pt2e`` or :func:`~ptq4dit_ao.balance`.

    Raises:
        BalanceError: the model was made some other way.
    """
    check_type("model", model, GraphModule, "a graph that was converted or balanced")
    result = model.meta.get(_META)
    if not isinstance(result, BalanceResult):
        raise BalanceError("this graph was neither converted with PTQ4DiTQuantizer nor balanced with balance()")
    return result
