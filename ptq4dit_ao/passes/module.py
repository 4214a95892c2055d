"""Balance a module in its own parameters.

The architecture stays the same, so the module can be saved as an ordinary checkpoint and quantized by any tool.
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
"""Factor on the self-check's tolerance, because the module runs in its own dtype and also rounds activations."""


@dataclass(frozen=True, kw_only=True)
class ModuleBalance:
    """Result of :func:`balance_module`."""

    outcomes: dict[str, SiteOutcome]
    """Outcome of every site that was folded into the module, by site name."""
    left: dict[str, str]
    """Reason why a site was not balanced, by site name."""
    output_change: float
    """Relative change ``|y - y0| / |y0|`` of the module's output on two rows of the example, in its own dtype."""
    unread: tuple[str, ...] = ()
    """Parameters that the captured call does not read. They and the sites next to them were not changed."""


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
    """Balance a module in place, using only the parameters that it has.

    A site is folded if it needs only rows and columns of linears, affine norms, and the bias behind ``1 + scale``
    (the paper's form, ``(1 + bias)/b - 1``). Other sites are not changed; the result has the reasons. If diffusers has
    fused weights, such as q, k and v, the original weights are balanced along with the fused one, because checkpoints
    hold them and unfusing restores them.

    Args:
        model: the module. Its parameters are replaced, tied ones by one new parameter.
        exported: its graph, from :func:`~ptq4dit_ao.export_transformer`; not changed.
        statistics: from :func:`~ptq4dit_ao.collect_salience` on ``exported``.
        settings: settings of balancing; the paper's by default. ``fold_form`` and ``center`` are ignored.
        exclude: the same as for :func:`~ptq4dit_ao.collect_salience`.
        policy: the same as for :func:`~ptq4dit_ao.collect_salience`. Its ``vector_multiply`` and ``premultiply`` are
            ignored, because parameters cannot hold those multiplies.

    Raises:
        ArgumentError: the graph is not this module's.
        BalanceError: nothing can be folded into the parameters; or balancing changed the module's output, and was
            undone.
        ExportError: the graph does not come from ``export_transformer``, or the module is no longer a float model.
        CalibrationError: the statistics belong to another model, or have too few timesteps.
    """
    check_type("model", model, nn.Module, "the module that was exported")
    check_type("exported", exported, GraphModule, "a graph of export_transformer")
    check_type("statistics", statistics, SalienceStatistics, "what collect_salience returned")
    check_type("settings", settings, (BalanceSettings, type(None)), "BalanceSettings")
    settings = replace(settings or BalanceSettings(), fold_form="bias", center=False)
    policy = replace(policy or SitePolicy(), vector_multiply=False, premultiply=False)
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
        raise BalanceError(
            f"nothing can be folded into the parameters of {type(model).__name__} ({why}); balance its graph instead "
            "(balance, PTQ4DiTQuantizer)"
        )
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
            f"balancing {type(model).__name__} in its parameters changed its output by {change:.2g} of its size; its "
            "parameters were restored. Please report this model"
        )
    left = {site.name: site.refusal for site in settled if site.refusal is not None}
    return ModuleBalance(outcomes=outcomes, left=left, output_change=change, unread=tuple(unread))


def _unread(exported: GraphModule, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Paths of the module's parameters that the graph does not read, under this or another name."""
    read = {str(node.target) for node in exported.graph.find_nodes(op="get_attr") if node.users}
    read |= folded_sources(exported)
    known = {id(parameters[path]) for path in read & parameters.keys()}
    return [path for path, parameter in parameters.items() if id(parameter) not in known]


def _shared(exported: GraphModule, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The graph's tensors of the module's parameters that it reads, by path.

    Raises:
        ArgumentError: a tensor of the graph is not the module's parameter.
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
    """The site, refused if the module's parameters cannot hold one of its edits, or hold it only in part."""
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
                f"{beside} is not read by the captured call, and a call that reads it would give wrong results; "
                "capture such a call, or remove the parameter"
            )
    try:
        for scalar in site.scalars if why is None else ():
            bias_shift(nodes[scalar.node], scalar.index, torch.ones(scalar.variables.shape, dtype=torch.float64))
    except BalanceError as error:
        why = str(error).partition("; use fold_form")[0]
    return site if why is None else replace(site, refusal=why)


def _beside(path: str, unread: Sequence[str]) -> str | None:
    """An unread parameter whose module is a sibling of, or an adapter for, the module of ``path``."""
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
    """Replace a parameter wherever the module uses it."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[name] = new
