"""Balance sites: which linears share a balancing vector, and where it folds to."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph.names import data_input, layer_name, linears, weight_path
from ptq4dit_ao.graph.propagation import Columns, GraphIndex, Propagation, Scalar
from ptq4dit_ao.graph.rules import IGNORED, RULES
from ptq4dit_ao.graph.shapes import shape_of
from ptq4dit_ao.graph.variables import PINNED, Ids

MAX_ATTEMPTS = 16
"""Ways of sending the scale through the products of one site's region that are tried before it is given up."""


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A linear whose input is divided by b and whose weight columns are multiplied by it."""

    node: str
    layer: str
    weight: str
    input: str
    """Name of the node whose output it reads."""
    variables: Ids
    """(C_in,): index into the site's variables, 0 where the channel cannot be scaled."""


@dataclass(frozen=True, kw_only=True)
class ParameterEdit:
    """Divide the parameter at these attribute paths (aliases of one tensor) by b[variables]."""

    paths: tuple[str, ...]
    variables: Ids


@dataclass(frozen=True, kw_only=True)
class ScalarEdit:
    """Replace the Python number at ``node.args[index]`` by the tensor number / b[variables]."""

    node: str
    index: int
    variables: Ids


@dataclass(frozen=True, kw_only=True)
class Site:
    """One balancing vector: its consumers, and the edits that make their inputs arrive divided by it.

    ``num_variables`` counts the free entries of the vector (1-based; 0 means "pinned to 1"). A site with a
    ``refusal`` cannot be folded: it says at which node and why.
    """

    name: str
    consumers: tuple[Consumer, ...]
    num_variables: int
    parameters: tuple[ParameterEdit, ...] = ()
    scalars: tuple[ScalarEdit, ...] = ()
    refusal: str | None = None

    @property
    def channels(self) -> int:
        return len(self.consumers[0].variables)

    @property
    def inputs(self) -> dict[str, Consumer]:
        """The distinct tensors that the consumers read: a stable key -> the first consumer that reads it."""
        first: dict[str, Consumer] = {}
        for consumer in self.consumers:
            if all(consumer.input != other.input for other in first.values()):
                calls = sum(consumer.layer == other.layer for other in first.values())
                first[consumer.layer + (f"#{calls + 1}" if calls else "")] = consumer
        return first


def find_sites(graph_module: GraphModule, only: Collection[str] | None = None) -> list[Site]:
    """Group the linears of an exported graph into balance sites, in execution order.

    Args:
        graph_module: as ``torch.export.export(..., strict=False).module(check_guards=False)`` gives it.
        only: names of the linear nodes to start from; a site may draw in others that share its scale.
    """
    index = GraphIndex(graph_module)
    sites: list[Site] = []
    covered: set[str] = set()
    for node in linears(graph_module):
        if node.name in covered or (only is not None and node.name not in only):
            continue
        site = _site(index, node, _propagate(index, node))
        covered.update(consumer.node for consumer in site.consumers)
        sites.append(site)
    return sites


def refuse_sites(sites: Sequence[Site], nodes: Collection[str], why: str) -> list[Site]:
    """The sites, refused where one of ``nodes`` is a consumer: it would be balanced along with the others."""
    refused = []
    for site in sites:
        odd = [consumer.node for consumer in site.consumers if consumer.node in nodes]
        refused.append(replace(site, refusal=f"{odd[0]}: {why}") if odd and site.refusal is None else site)
    return refused


def _propagate(index: GraphIndex, linear: Node) -> Propagation:
    """The fixpoint with the most free channels over the ways to pass products; the first full one wins."""
    source = data_input(linear)
    channels = shape_of(source)[-1]
    best: tuple[int, Propagation] | None = None
    choices: dict[str, int] | None = {}
    for _ in range(MAX_ATTEMPTS):
        assert choices is not None
        p = Propagation(index, RULES, IGNORED)
        p.choices = dict(choices)
        p.seed(source, channels)
        p.run()
        free = int((p.seeded(p.values[index.slot[source.name]]) != PINNED).sum())
        if best is None or free > best[0]:
            best = (free, p)
        if free == channels or (choices := _next_choices(p)) is None:
            break
    assert best is not None
    return best[1]


def _next_choices(p: Propagation) -> dict[str, int] | None:
    """Change the latest product that still has another factor to try (depth-first)."""
    names = list(p.candidates)
    for i in reversed(range(len(names))):
        candidates = p.candidates[names[i]]
        position = candidates.index(p.choices[names[i]]) + 1
        if position < len(candidates):
            return {**{name: p.choices[name] for name in names[:i]}, names[i]: candidates[position]}
    return None


def _site(index: GraphIndex, seed: Node, p: Propagation) -> Site:
    slots = {node: Columns(index.slot[_weight(node).name]) for node in linears(index.graph_module)}
    siblings = {slots[node] for node in slots if data_input(node) is data_input(seed)}
    members = {
        node: p.values.get(slot, np.zeros(shape_of(_weight(node))[1], dtype=np.int64))
        for node, slot in slots.items()
        if p.live(slot) or slot in siblings
    }
    free = np.unique(np.concatenate([p.seeded(ids) for ids in members.values()]))
    free = free[free != PINNED]

    def renumber(ids: Ids) -> Ids:
        roots = p.seeded(ids)
        return np.where(roots != PINNED, np.searchsorted(free, roots) + 1, PINNED)

    consumers = tuple(
        Consumer(
            node=node.name,
            layer=layer_name(node),
            weight=weight_path(node),
            input=data_input(node).name,
            variables=renumber(ids),
        )
        for node, ids in members.items()
    )
    name = site_name(consumers)
    if len(free) == 0:
        return Site(name=name, consumers=consumers, num_variables=0, refusal=_refusal(p))
    parameters, scalars = _edits(index, p, renumber)
    return Site(name=name, consumers=consumers, num_variables=len(free), parameters=parameters, scalars=scalars)


def _edits(index: GraphIndex, p: Propagation, renumber) -> tuple[tuple[ParameterEdit, ...], tuple[ScalarEdit, ...]]:
    parameters, scalars = [], []
    for slot, ids in p.values.items():
        variables = renumber(ids)
        if not variables.any():
            continue
        if isinstance(slot, Scalar):
            scalars.append(ScalarEdit(node=slot.node, index=slot.index, variables=variables))
        elif isinstance(slot, str) and index.nodes[slot].op == "get_attr":
            paths = tuple(dict.fromkeys(str(node.target) for node in index.aliases[slot]))
            parameters.append(ParameterEdit(paths=paths, variables=variables))
    return tuple(parameters), tuple(scalars)


def _weight(linear: Node) -> Node:
    weight = linear.args[1]
    assert isinstance(weight, Node)
    return weight


def _refusal(p: Propagation) -> str:
    node, why = p.pins[0] if p.pins else ("its input", "no channel is free to carry a scale")
    return f"{node}: {why}"


def site_name(consumers: tuple[Consumer, ...]) -> str:
    """``blocks.0.attn.{to_q,to_k,to_v}``: the common module path and what differs."""
    layers = list(dict.fromkeys(consumer.layer for consumer in consumers))
    if len(layers) == 1:
        return layers[0]
    parts = [layer.split(".") for layer in layers]
    shared = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False)))
    rest = ",".join(".".join(names[shared:]) for names in parts)
    return ".".join([*parts[0][:shared], f"{{{rest}}}"])
