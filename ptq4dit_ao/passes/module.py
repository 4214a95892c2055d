"""Balance once, quantize anywhere: write the folds into a module's own parameters.

The architecture stays what it was, so the module saves as an ordinary checkpoint and any tool quantizes it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.capture.export import call_like, uncompiled
from ptq4dit_ao.capture.float_model import check_float_module
from ptq4dit_ao.errors import ArgumentError, BalanceError, check_type
from ptq4dit_ao.graph import Site, SitePolicy, first_refusals
from ptq4dit_ao.graph.constants import folded_sources
from ptq4dit_ao.graph.names import WRAPPED, get_attribute
from ptq4dit_ao.observers import SalienceStatistics
from ptq4dit_ao.passes.bias_form import bias_shift
from ptq4dit_ao.passes.graph import balance_sites_of
from ptq4dit_ao.passes.settings import BalanceSettings
from ptq4dit_ao.passes.twins import find_twins
from ptq4dit_ao.passes.vectors import SiteOutcome, balance_sites
from ptq4dit_ao.passes.verify import SelfCheck, floating_outputs, relative_error

logger = logging.getLogger(__name__)

NATIVE = 2
"""The module runs in its own dtype, and rounds on the way as well: so much more is tolerated than in the graph."""


@dataclass(frozen=True, kw_only=True)
class ModuleBalance:
    """What :func:`balance_module` did."""

    outcomes: dict[str, SiteOutcome]
    """Site name -> what was folded into the module."""
    left: dict[str, str]
    """Site name -> why it was left as it is."""
    output_change: float
    """``|y - y0| / |y0|`` of the module's output on two rows of the example, in its own dtype: rounding."""
    unread: tuple[str, ...] = ()
    """Parameters that the captured call does not read, and that were left. Sites beside them are left, too."""


@own_modes()
def balance_module(
    model: nn.Module,
    exported: GraphModule,
    statistics: SalienceStatistics,
    settings: BalanceSettings | None = None,
    *,
    exclude: Sequence[str] = (),
    policy: SitePolicy | None = None,
) -> ModuleBalance:
    """Balance a module in place, using nothing but the parameters it has.

    Folded are the sites that need only rows and columns of linears, affine norms, and the bias behind ``1 + scale``
    (the paper's form, ``(1 + bias)/b - 1``). Others are left, with the reason. Of weights that diffusers has fused,
    as q, k and v, those that were fused are balanced, too: they are what is saved, and what unfusing brings back.

    Args:
        model: changed: parameters are replaced, tied ones by one new parameter.
        exported: its graph, from :func:`~ptq4dit_ao.export_transformer`; not changed.
        statistics: from :func:`~ptq4dit_ao.collect_salience` on ``exported``.
        settings: defaults to the paper's. ``fold_form`` does not matter here.
        exclude: as given to :func:`~ptq4dit_ao.collect_salience`.
        policy: as given to :func:`~ptq4dit_ao.collect_salience`, which should have ``vector_multiply=False``, as that
            cannot be stored.

    Raises:
        ArgumentError: the graph is not this module's.
        BalanceError: nothing can be folded into the parameters, or the module computed something else afterwards,
            and was put back.
        ExportError: the graph does not come from ``export_transformer``, or the module is no float one any more.
        CalibrationError: the statistics belong to another model, or have too few timesteps.
    """
    check_type("model", model, nn.Module, "the module that was exported")
    check_type("exported", exported, GraphModule, "a graph of export_transformer")
    check_type("statistics", statistics, SalienceStatistics, "what collect_salience returned")
    check_type("settings", settings, (BalanceSettings, type(None)), "BalanceSettings")
    settings = replace(settings or BalanceSettings(), fold_form="bias")
    policy = replace(policy or SitePolicy(), vector_multiply=False)
    model = uncompiled(model)
    check_float_module(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    graph = GraphModule(exported, copy.deepcopy(exported.graph))
    nodes = {node.name: node for node in graph.graph.nodes}
    unread = _unread(exported, parameters)
    twins = find_twins(parameters, unread)
    unread = [path for path in unread if path not in twins]
    if unread:
        logger.info("the captured call does not read %d parameters (%s, ...)", len(unread), unread[0])
    sites = [
        _expressible(site, nodes, parameters, folded_sources(exported), unread)
        for site in balance_sites_of(exported, exclude, policy)
    ]
    if all(site.refusal is not None for site in sites):
        why = first_refusals(sites)
        raise BalanceError(f"nothing can be folded into the parameters of {type(model).__name__} ({why})")
    shared = _shared(exported, parameters)
    check = SelfCheck(graph, statistics.example)
    before = floating_outputs(call_like(exported, model, check.inputs))
    outcomes = balance_sites(graph, sites, statistics, settings)
    settled, outcomes = check.settle(graph, sites, outcomes, settings.fold_form)
    replaced = {path: new for path, old in shared.items() if (new := get_attribute(graph, path)) is not old}
    replaced |= {path: rows for path, twin in twins.items() if (rows := twin.rows_of(replaced)) is not None}
    for path, tensor in replaced.items():
        old = parameters[path]
        _replace(model, old, nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad))
    change = relative_error(before, floating_outputs(call_like(exported, model, check.inputs)))
    if not change <= NATIVE * check.tolerance:
        for path in replaced:
            _replace(model, model.get_parameter(path), parameters[path])
        raise BalanceError(
            f"balancing {type(model).__name__} in its parameters changed its output by {change:.2g} of its size; it is "
            "as it was. Please report this model"
        )
    left = {site.name: site.refusal for site in settled if site.refusal is not None}
    return ModuleBalance(outcomes=outcomes, left=left, output_change=change, unread=tuple(unread))


def _unread(exported: GraphModule, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The module's parameters that the graph reads under no name."""
    read = {str(node.target) for node in exported.graph.find_nodes(op="get_attr") if node.users}
    read |= folded_sources(exported)
    known = {id(parameters[path]) for path in read & parameters.keys()}
    return [path for path, parameter in parameters.items() if id(parameter) not in known]


def _shared(exported: GraphModule, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The module's parameters that the graph reads, by path, as the graph has them.

    Raises:
        ArgumentError: the graph's are not the module's.
    """
    read = {path: tensor for path in parameters if (tensor := _tensor(exported, path)) is not None}
    for path, tensor in read.items():
        if tensor.data_ptr() != parameters[path].data_ptr():
            raise ArgumentError(f"parameter {path!r} of the graph is not the module's; export this module again")
    return read


def _expressible(
    site: Site,
    nodes: Mapping[str, Node],
    parameters: Mapping[str, nn.Parameter],
    computed_from: frozenset[str],
    unread: Sequence[str],
) -> Site:
    """The site, refused if one of its edits is not of a parameter that the module has, or reaches only part of it."""
    if site.refusal is not None:
        return site
    why = None
    if site.norms:
        why = f"{site.norms[0].node}: the norm has no weight"
    else:
        paths = [path for edit in site.parameters for path in edit.paths] + [c.weight for c in site.consumers]
        missing = [path for path in paths if path not in parameters]
        folded = [path for path in paths if path in computed_from]
        if missing:
            why = f"{missing[0]} is not a parameter of the module"
        elif folded:
            why = f"{folded[0]} is also part of a weight that is computed from it"
        elif (beside := next(filter(None, (_beside(path, unread) for path in paths)), None)) is not None:
            why = (
                f"{beside} is not read by the captured call, and one that reads it would go wrong; capture a call that "
                "does, or take it away"
            )
    try:
        for scalar in site.scalars if why is None else ():
            bias_shift(nodes[scalar.node], scalar.index, torch.ones(scalar.variables.shape, dtype=torch.float64))
    except BalanceError as error:
        why = str(error).partition("; use fold_form")[0]
    return site if why is None else replace(site, refusal=why)


def _beside(path: str, unread: Sequence[str]) -> str | None:
    """An unread parameter whose module works together with that of ``path``: a sibling, or another adapter of it."""
    owner = path.rpartition(".")[0]
    parent, _, name = owner.rpartition(".")
    for other in unread:
        its = other.rpartition(".")[0]
        if its == owner or its.rpartition(".")[0] == parent or (name == WRAPPED and other.startswith(f"{parent}.")):
            return other
    return None


def _tensor(graph: GraphModule, path: str) -> torch.Tensor | None:
    try:
        return get_attribute(graph, path)
    except AttributeError:  # the graph does not read it
        return None


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter wherever another one is."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[name] = new
