"""Balancing of a float graph before quantization: record its salience and balance it, for any quantizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.capture.float_model import check_float_graph
from ptq4dit_ao.capture.interface import cannot_run, check_batch
from ptq4dit_ao.errors import ArgumentError, BalanceError, CalibrationError, check_type
from ptq4dit_ao.graph import Site, SitePolicy, find_sites, first_refusals, premultiplied_sites, refuse_sites
from ptq4dit_ao.graph.names import adapters, layer_name, linears, timestep_placeholder, weight_path
from ptq4dit_ao.graph.shapes import batch_axis
from ptq4dit_ao.observers import ChannelStatistics, SalienceStatistics, TimestepClock
from ptq4dit_ao.observers.hooks import record_range
from ptq4dit_ao.passes.offset import find_shifts
from ptq4dit_ao.passes.result import BalanceResult, attach_result
from ptq4dit_ao.passes.settings import BalanceSettings
from ptq4dit_ao.passes.vectors import apply_outcome, balance_sites
from ptq4dit_ao.passes.verify import SelfCheck


@own_modes()
def collect_salience(
    exported: GraphModule,
    samples: Iterable[Sequence[Tensor]],
    *,
    exclude: Sequence[str] = (),
    timestep_input: str | None = None,
    policy: SitePolicy | None = None,
) -> SalienceStatistics:
    """Run a float graph on calibration samples and record every balance site's input.

    Args:
        exported: a graph from :func:`~ptq4dit_ao.export_transformer`; not changed.
        samples: input tuples.
        exclude: patterns (``fnmatch``) of the names of layers that are not balanced.
        timestep_input: name of the graph input that holds the timestep; not needed if it is called
            ``timestep``, ``timesteps`` or ``t``.
        policy: which folds to take.

    Raises:
        BalanceError: nothing can be balanced.
        CalibrationError: there are no samples, or one does not fit the graph or makes a site's input NaN or infinite.
    """
    recorder = _SalienceRecorder(exported, balance_sites_of(exported, exclude, policy), timestep_input)
    example = None
    for number, batch in enumerate(samples, start=1):
        what = f"calibration batch {number}"
        inputs = check_batch(exported, batch, what)
        example = inputs if example is None else example
        try:
            recorder.run(*inputs)
        except (RuntimeError, IndexError) as error:
            raise cannot_run(what, error) from error
    if example is None:
        raise CalibrationError("there are no calibration samples; pass at least one tuple of inputs")
    return SalienceStatistics(recorder.tables, example)


@own_modes()
def balance(
    exported: GraphModule,
    statistics: SalienceStatistics,
    settings: BalanceSettings | None = None,
    *,
    exclude: Sequence[str] = (),
    policy: SitePolicy | None = None,
    sites: Sequence[Site] | None = None,
    verify: bool = True,
) -> GraphModule:
    """Balance and fold a float graph; the result computes the same and is ready for any quantizer.

    Args:
        exported: not changed; the result shares the tensors that balancing does not edit.
        statistics: from :func:`collect_salience` on this graph.
        settings: settings of balancing; the paper's by default.
        exclude: the same as for :func:`collect_salience`.
        policy: the same as for :func:`collect_salience`.
        sites: the sites of this graph, if they are known already.
        verify: whether to run the graph before and after balancing, and undo any site that changes its output.

    Raises:
        BalanceError: nothing can be balanced.
        CalibrationError: the statistics belong to another model, or have too few timesteps.
    """
    check_type("statistics", statistics, SalienceStatistics, "what collect_salience returned")
    check_type("settings", settings, (BalanceSettings, type(None)), "BalanceSettings")
    settings = settings or BalanceSettings()
    sites = balance_sites_of(exported, exclude, policy) if sites is None else sites
    model = GraphModule(exported, copy.deepcopy(exported.graph))
    if settings.center:
        sites = find_shifts(model, sites, needed=False)
    check = SelfCheck(model, statistics.example) if verify else None
    outcomes = balance_sites(model, sites, statistics, settings)
    if check is not None:
        sites, outcomes = check.settle(model, sites, outcomes, settings.fold_form)
    result = BalanceResult(
        sites=tuple(sites),
        outcomes=outcomes,
        statistics=statistics,
        settings=settings,
        layers={node.name: layer_name(node) for node in linears(exported)},
        weights={node.name: weight_path(node) for node in linears(exported)},
    )
    attach_result(model, result)
    return model


def balanced_as(exported: GraphModule, result: BalanceResult) -> GraphModule:
    """The float graph with the vectors of a result folded; it shares the tensors that balancing does not edit."""
    model = GraphModule(exported, copy.deepcopy(exported.graph))
    if result.settings is not None:
        for outcome in reversed(result.outcomes.values()):
            apply_outcome(model, outcome, result.settings.fold_form)
        model.recompile()
    return model


def balance_sites_of(exported: GraphModule, exclude: Sequence[str], policy: SitePolicy | None) -> list[Site]:
    """The sites of a graph; those that touch excluded layers are refused.

    Raises:
        BalanceError: every site is refused, or there is none.
    """
    check_type("exported", exported, GraphModule, "a graph of export_transformer")
    check_float_graph(exported)
    if isinstance(exclude, str):
        raise ArgumentError(f"exclude is the string {exclude!r}; give a list of patterns")
    nodes = {node.name: layer_name(node) for node in linears(exported)}
    excluded = {name for name, layer in nodes.items() if any(fnmatchcase(layer, pattern) for pattern in exclude)}
    seeds = nodes.keys() - excluded - {node.name for node in adapters(exported)}
    sites = refuse_sites(find_sites(exported, seeds, policy), excluded, "it is excluded")
    if policy is not None and policy.premultiply:
        sites = premultiplied_sites(sites, seeds)
    if all(site.refusal is not None for site in sites):
        none = "all its linear layers are excluded" if nodes else "it has no linear layer"
        raise BalanceError(f"nothing in this graph can be balanced ({first_refusals(sites) or none})")
    return sites


class _SalienceRecorder(Interpreter):
    """Run a graph node by node and record the ranges of the sites' inputs."""

    def __init__(self, exported: GraphModule, sites: Sequence[Site], timestep_input: str | None) -> None:
        super().__init__(exported)
        self.extra_traceback = False  # torch.fx would add the current node to error messages
        self.clock = TimestepClock()
        self.timestep = timestep_placeholder(exported, timestep_input)
        self.tables: dict[str, ChannelStatistics] = {}
        self.keys: dict[str, list[str]] = {}
        for site in sites:
            if site.refusal is None:
                for key, consumer in site.inputs.items():
                    self.tables[key] = ChannelStatistics(len(consumer.variables))
                    self.keys.setdefault(consumer.input, []).append(key)
        self.batch_axis = {node.name: batch_axis(node) for node in exported.graph.nodes if node.name in self.keys}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n is self.timestep:
            assert isinstance(value, Tensor)
            self.clock.current = value
        for key in self.keys.get(n.name, ()):
            assert isinstance(value, Tensor)
            record_range(value, self.tables[key], self.clock, key, self.batch_axis[n.name])
        return value
