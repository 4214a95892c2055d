"""Balance sites: groups of linears that share a balancing vector, and the edits that fold it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.fx import GraphModule, Node

from ptq4dit_ao.choices import SiteKind
from ptq4dit_ao.errors import ArgumentError, check_type
from ptq4dit_ao.graph.names import data_input, joint_name, layer_name, linears, weight_path
from ptq4dit_ao.graph.propagation import Columns, Cut, GraphIndex, NewWeight, Propagation, Scalar
from ptq4dit_ao.graph.rules import IGNORED, RULES
from ptq4dit_ao.graph.shapes import shape_of
from ptq4dit_ao.graph.variables import PINNED, Ids

MAX_ATTEMPTS = 16
"""Maximum number of combinations of carrying factors, for the products in a site's region, that are tried."""


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """Policy by which folds are accepted; all folds are exact.

    Attributes:
        couple_blocks: whether linears of several blocks, or linears that depend on one another, may share one vector,
            such as where every block's cross-attention reads one caption projection.
        vector_multiply: whether a fold may add one multiply per call on a modulation vector (N, C), where one layer
            makes it for all blocks (adaLN-single). All other folds cost nothing at run time.
        min_variables: smallest number of free scales of a site; sites with fewer are refused.
        premultiply: whether linears that no fold reaches are balanced by a multiply of their input, (N, ..., C) numbers
            per call. In a quantized module, it is part of quantizing the input.

    Raises:
        ArgumentError: an attribute has another type, or ``min_variables`` is below 1.
    """

    couple_blocks: bool = False
    vector_multiply: bool = True
    min_variables: int = 4
    premultiply: bool = False

    def __post_init__(self) -> None:
        check_type("couple_blocks", self.couple_blocks, bool, "True or False")
        check_type("premultiply", self.premultiply, bool, "True or False")
        check_type("vector_multiply", self.vector_multiply, bool, "True or False")
        check_type("min_variables", self.min_variables, int, "a whole number")
        if self.min_variables < 1:
            raise ArgumentError(f"min_variables is {self.min_variables}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A linear whose input is divided by b and whose weight columns are multiplied by it."""

    node: str
    layer: str
    weight: str
    input: str
    """Name of the node whose output the linear reads."""
    variables: Ids
    """Index of each input channel's variable, (C_in,), 1-based; 0 where the channel cannot be scaled."""


@dataclass(frozen=True, kw_only=True)
class ParameterEdit:
    """Edit that divides the parameter at these attribute paths (aliases of one tensor) by b[variables]."""

    paths: tuple[str, ...]
    variables: Ids


@dataclass(frozen=True, kw_only=True)
class ScalarEdit:
    """Edit that replaces the Python number at ``node.args[index]`` by the tensor number / b[variables]."""

    node: str
    index: int
    variables: Ids


@dataclass(frozen=True, kw_only=True)
class NormEdit:
    """Edit that gives the norm ``node``, which has no weight, the weight 1 / b[variables]."""

    node: str
    variables: Ids


@dataclass(frozen=True, kw_only=True)
class CutEdit:
    """Edit that multiplies ``node.args[index]`` by 1 / b[variables] where ``node`` reads it."""

    node: str
    index: int
    variables: Ids


@dataclass(frozen=True, kw_only=True)
class ShiftEdit:
    """Edit that subtracts from elements of the parameter at these attribute paths (aliases of one tensor)."""

    paths: tuple[str, ...]
    elements: Ids
    """Position of each channel of the site's input in the flattened parameter, (C,)."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The place of one balancing vector: its consumers, and the edits that divide their inputs by it.

    ``num_variables`` is the number of free entries of the vector; indices into it are 1-based, and 0 means "pinned to
    1". A site with a ``refusal`` cannot be folded; the refusal names the node and the reason.
    """

    name: str
    consumers: tuple[Consumer, ...]
    num_variables: int
    parameters: tuple[ParameterEdit, ...] = ()
    scalars: tuple[ScalarEdit, ...] = ()
    norms: tuple[NormEdit, ...] = ()
    cuts: tuple[CutEdit, ...] = ()
    activations: Mapping[str, Ids] = field(default_factory=dict)
    """Variable indices of the activations that are divided, by node name, broadcastable to the node's output."""
    shift: ShiftEdit | None = None
    """Edit that can shift the input; set only by :func:`ptq4dit_ao.passes.offset.find_shifts`."""
    premultiply: bool = False
    """Whether the input is multiplied by 1/b when the model runs, because no fold reaches it."""
    couples_blocks: bool = False
    """Whether the consumers belong to several blocks, or one of them depends on another one's output."""
    refusal: str | None = None

    @property
    def kind(self) -> SiteKind:
        """Kind of the fold for reports, by its cost and by whether it covers all channels."""
        if self.refusal is not None:
            return "refused"
        if self.premultiply:
            return "premultiply"
        if self.cuts:
            return "vector multiply"
        return "offline" if all(consumer.variables.all() for consumer in self.consumers) else "partial"

    @property
    def channels(self) -> int:
        """Number of channels of the site's input."""
        return len(self.consumers[0].variables)

    @property
    def inputs(self) -> dict[str, Consumer]:
        """The first consumer of each distinct tensor that the consumers read, by a stable key."""
        first: dict[str, Consumer] = {}
        for consumer in self.consumers:
            if all(consumer.input != other.input for other in first.values()):
                calls = sum(consumer.layer == other.layer for other in first.values())
                first[consumer.layer + (f"#{calls + 1}" if calls else "")] = consumer
        return first


def find_sites(
    graph_module: GraphModule, only: Collection[str] | None = None, policy: SitePolicy | None = None
) -> list[Site]:
    """Group the linears of an exported graph into balance sites, in execution order.

    Args:
        graph_module: a graph from ``torch.export.export(..., strict=False).module(check_guards=False)``.
        only: names of the linear nodes to start from; a site may include other linears that share its scale.
        policy: which folds to take; the default adds at most a multiply of a vector.

    Raises:
        ArgumentError: an argument has another type, or a name in ``only`` is no linear node.
    """
    check_type("graph_module", graph_module, GraphModule, "a graph of export_transformer")
    check_type("policy", policy, (SitePolicy, type(None)), "a SitePolicy")
    if unknown := set(only or ()) - {node.name for node in linears(graph_module)}:
        raise ArgumentError(
            f"only has {sorted(unknown)[0]!r}, which is no linear node of the graph; give names of linear nodes"
        )
    search = _Search(GraphIndex(graph_module), policy or SitePolicy())
    sites: list[Site] = []
    covered: set[str] = set()
    for node in search.linears:
        if node.name in covered or (only is not None and node.name not in only):
            continue
        site = search.site(node)
        covered.update(consumer.node for consumer in site.consumers)
        if site.refusal is None:
            search.take(site)
        sites.append(site)
    return sites


def refuse_sites(sites: Sequence[Site], nodes: Collection[str], why: str) -> list[Site]:
    """The sites; those with one of ``nodes`` among their consumers are refused, as it would be balanced as well."""
    refused = []
    for site in sites:
        odd = [consumer.node for consumer in site.consumers if consumer.node in nodes]
        refused.append(replace(site, refusal=f"{odd[0]}: {why}") if odd and site.refusal is None else site)
    return refused


def first_refusals(sites: Sequence[Site]) -> str:
    """The refusals of the first three sites as one text for messages; empty without sites."""
    return "; ".join(f"{site.name}: {site.refusal}" for site in sites[:3])


@dataclass(frozen=True)
class _Plan:
    """A fixpoint, with its number of free variables and the linears that take part."""

    p: Propagation
    free: int
    members: dict[Node, Ids]
    """Ids of the input channels of the linears that take part."""
    couples: bool


class _Search:
    """Search for the best plan of each site."""

    def __init__(self, index: GraphIndex, policy: SitePolicy) -> None:
        self.index, self.policy = index, policy
        self.linears = linears(index.graph_module)
        self.position = {node: i for i, node in enumerate(index.nodes.values())}
        self.columns = {node: Columns(index.slot[_weight(node).name]) for node in self.linears}
        self.readers: dict[Columns, list[Node]] = {}
        self.siblings: dict[Node, list[Node]] = {}
        for node, columns in self.columns.items():
            self.readers.setdefault(columns, []).append(node)
            self.siblings.setdefault(data_input(node), []).append(node)
        self.coupled: set[str] = set()
        """Linears whose scale, without cuts, is shared across blocks."""
        self.taken: dict[Columns, Node] = {}
        """Linears of the sites so far; a later site might reach them again by another factor of a product."""

    def take(self, site: Site) -> None:
        for consumer in site.consumers:
            node = self.index.nodes[consumer.node]
            self.taken[self.columns[node]] = node

    def site(self, linear: Node) -> Site:
        """The site of the plan with the most free channels, preferably one that couples no blocks and has no cuts."""
        channels = shape_of(data_input(linear))[-1]
        plans = []
        if linear.name not in self.coupled or self.policy.couple_blocks:
            plans.append(self._plan(linear, cut=False))
            if plans[0].couples:
                self.coupled.update(node.name for node in plans[0].members)
        if self.policy.vector_multiply and not (plans and plans[0].free == channels and not plans[0].couples):
            plans.append(self._plan(linear, cut=True))
        if not plans:
            plans.append(self._plan(linear, cut=False))
        allowed = [plan for plan in plans if not plan.couples or self.policy.couple_blocks]
        if any(plan.free for plan in allowed):
            return self._site(max(allowed, key=lambda plan: (plan.free, not plan.couples, not plan.p.cut)))
        return self._site(plans[0])

    def _plan(self, linear: Node, *, cut: bool) -> _Plan:
        """The fixpoint with the most free channels over the choices of the products' carrying factors.

        The search is breadth first, so that a single other choice near the seed is tried before several far from it. It
        ends when all channels are free, or after :data:`MAX_ATTEMPTS`.
        """
        source = data_input(linear)
        channels = shape_of(source)[-1]
        best: tuple[int, Propagation] | None = None
        queue: deque[dict[str, int]] = deque([{}])
        attempts = 0
        while queue and attempts < MAX_ATTEMPTS and (best is None or best[0] < channels):
            attempts += 1
            given = queue.popleft()
            p = Propagation(self.index, RULES, IGNORED, cut=cut)
            p.choices = dict(given)
            p.seed(source, channels)
            p.run()
            for columns, node in self.taken.items():
                p.pin(columns, node, f"{layer_name(node)} is balanced by another site")
            roots = p.seeded(p.values[self.index.slot[source.name]])
            free = len(np.unique(roots[roots != PINNED]))  # distinct scales; a single scale for all balances nothing
            if best is None or free > best[0]:
                best = (free, p)
            queue.extend(_alternatives(p, len(given)))
        assert best is not None
        free, p = best
        members = self._members(p, source)
        return _Plan(p=p, free=free, members=members, couples=free > 0 and self._couples(list(members)))

    def _members(self, p: Propagation, source: Node) -> dict[Node, Ids]:
        live = [node for slot, nodes in self.readers.items() if slot in p.values and p.live(slot) for node in nodes]
        members = sorted({*live, *self.siblings[source]}, key=self.position.__getitem__)
        pinned = np.full(1, PINNED)
        return {
            node: np.broadcast_to(p.values.get(self.columns[node], pinned), shape_of(_weight(node))[-1:])
            for node in members
        }

    def _couples(self, members: list[Node]) -> bool:
        """Whether these linears (in execution order) belong to several blocks, or one depends on another's output."""
        if len({block for node in members if (block := block_name(layer_name(node)))}) > 1:
            return True
        last = self.position[members[-1]]
        wanted, seen, queue = set(members), set(members), list(members)
        while queue:
            for user in queue.pop().users:
                if user in wanted:
                    return True
                if user not in seen and self.position[user] < last:
                    seen.add(user)
                    queue.append(user)
        return False

    def _site(self, plan: _Plan) -> Site:
        p = plan.p
        free = np.unique(np.concatenate([p.seeded(ids) for ids in plan.members.values()]))
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
            for node, ids in plan.members.items()
        )
        site = Site(
            name=joint_name(consumer.layer for consumer in consumers),
            consumers=consumers,
            num_variables=len(free),
            couples_blocks=plan.couples,
        )
        refusal = self._refusal(plan, site)
        return replace(site, refusal=refusal) if refusal else replace(site, **_edits(self.index, p, renumber))

    def _refusal(self, plan: _Plan, site: Site) -> str | None:
        if plan.free == 0:
            node, why = plan.p.pins[0] if plan.p.pins else ("its input", "no channel is free to carry a scale")
            return f"{node}: {why}"
        if plan.couples and not self.policy.couple_blocks:
            return (
                f"{site.consumers[0].node}: {len(site.consumers)} linears, up to {site.consumers[-1].layer}, would "
                "share one scale; couple_blocks allows that"
            )
        if site.num_variables < self.policy.min_variables:
            return (
                f"{site.consumers[0].node}: only {site.num_variables} of {site.channels} channels could differ in "
                f"scale; min_variables is {self.policy.min_variables}"
            )
        return None


def _alternatives(p: Propagation, fixed: int) -> Iterator[dict[str, int]]:
    """Choices that differ from a fixpoint's at one product, nearest to the seed first, and keep those before it."""
    names = list(p.candidates)
    for i in range(fixed, len(names)):
        before = {name: p.choices[name] for name in names[:i]}
        for candidate in p.candidates[names[i]]:
            if candidate != p.choices[names[i]]:
                yield {**before, names[i]: candidate}


def _edits(index: GraphIndex, p: Propagation, renumber: Callable[[Ids], Ids]) -> dict[str, Any]:
    """The edits of a site, by field name of :class:`Site`."""
    parameters, scalars, norms, cuts = [], [], [], []
    activations: dict[str, Ids] = {}
    for slot, ids in p.values.items():
        variables = renumber(ids)
        if not variables.any():
            continue
        if isinstance(slot, Scalar):
            scalars.append(ScalarEdit(node=slot.node, index=slot.index, variables=variables))
        elif isinstance(slot, NewWeight):
            norms.append(NormEdit(node=slot.node, variables=variables))
        elif isinstance(slot, Cut):
            cuts.append(CutEdit(node=slot.node, index=slot.index, variables=variables))
        elif isinstance(slot, str) and index.nodes[slot].op == "get_attr":
            paths = tuple(dict.fromkeys(str(node.target) for node in index.aliases[slot]))
            parameters.append(ParameterEdit(paths=paths, variables=variables))
        elif isinstance(slot, str):
            activations[slot] = variables
    edits: dict[str, list[Any]] = {"parameters": parameters, "scalars": scalars, "norms": norms, "cuts": cuts}
    return {name: tuple(found) for name, found in edits.items()} | {"activations": activations}


def _weight(linear: Node) -> Node:
    weight = linear.args[1]
    assert isinstance(weight, Node)
    return weight


def block_name(layer: str) -> str | None:
    """Name of the block that a layer belongs to: its module path up to the first number, or None without a number."""
    parts = layer.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), None)
