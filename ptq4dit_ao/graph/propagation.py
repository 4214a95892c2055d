"""Scale propagation: which tensors may carry 1/b so that a linear's input is divided by b and nothing else changes.

Every tensor's abstract value is an array of scale-variable ids, the variables its elements are *divided* by. Rules,
one per aten op (``rules/``), state which ids of an op's inputs and output must be equal for the op to commute
with the scaling; they only ever join variables. Starting from free variables on one linear's input channels, the
fixpoint visits the producer and every user of each tensor that takes part. What is still free at the end can be
folded: exactly, whatever the model around it looks like. The fixpoint knows no op, and no model.

A *slot* is where ids live:

* a node's name: an activation, or a parameter (all ``get_attr`` nodes of one tensor share a slot),
* :class:`Columns`: the input channels of a linear's weight, which are *multiplied*,
* :class:`Scalar`: a Python number among an op's arguments, such as the 1 of ``1 + scale``,
* :class:`NewWeight`: the weight that a norm without one may be given,
* :class:`Cut`: a small operand at one place where it is read, to be multiplied there; only where cutting is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph.names import get_attribute
from ptq4dit_ao.graph.shapes import broadcast_ids, hint, shape_of, symbolic_axes, tensor_of
from ptq4dit_ao.graph.variables import PINNED, Ids, ScaleVariables


@dataclass(frozen=True)
class Columns:
    """Input channels of the linear weight held by slot ``weight``."""

    weight: str


@dataclass(frozen=True)
class Scalar:
    """Positional argument ``index`` of node ``node``."""

    node: str
    index: int


@dataclass(frozen=True)
class NewWeight:
    """The missing weight of norm ``node``."""

    node: str


@dataclass(frozen=True)
class Cut:
    """Positional argument ``index`` of node ``node``, multiplied just before ``node`` reads it."""

    node: str
    index: int


Slot = str | Columns | Scalar | NewWeight | Cut
Rule = Callable[["Propagation", Node], None]


@dataclass
class GraphIndex:
    """What is looked up again and again while analysing one graph; built once."""

    graph_module: GraphModule
    nodes: dict[str, Node] = field(init=False)
    slot: dict[str, str] = field(init=False)
    aliases: dict[str, list[Node]] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = {node.name: node for node in self.graph_module.graph.nodes}
        self.slot, self.aliases = {}, {}
        owner: dict[tuple[object, ...], str] = {}
        for node in self.nodes.values():
            slot = node.name
            if node.op == "get_attr":
                value = get_attribute(self.graph_module, str(node.target))
                if isinstance(value, torch.Tensor):
                    # The storage, not data_ptr(): on the meta device that is 0 for every tensor.
                    key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
                    slot = owner.setdefault(key, node.name)
            self.slot[node.name] = slot
            self.aliases.setdefault(slot, []).append(node)

    def users(self, slot: str) -> Iterable[Node]:
        return (user for node in self.aliases[slot] for user in node.users)


class Propagation:
    """One fixpoint, over the region that the seeds reach."""

    def __init__(
        self, index: GraphIndex, rules: dict[object, Rule], ignored: frozenset[object], *, cut: bool = False
    ) -> None:
        self.index = index
        self.cut = cut
        """May small operands be multiplied at run time where they meet a larger tensor?"""
        self.variables = ScaleVariables()
        self.values: dict[Slot, Ids] = {}
        self.pins: list[tuple[str, str]] = []
        """(node, why) in the order in which free variables were pinned."""
        self.choices: dict[str, int] = {}
        """For a product, which factor carries the scale; undecided ones take their first candidate."""
        self.candidates: dict[str, list[int]] = {}
        self._rules, self._ignored = rules, ignored
        self._dormant: list[Slot] = []
        self._seeded = 0

    # -- what the rules use ------------------------------------------------------------------------------------

    def value(self, slot: Slot | Node) -> Ids | None:
        return self.values.get(self._key(slot))

    def known(self, slot: Slot | Node) -> bool:
        return self._key(slot) in self.values

    def merge(self, slot: Slot | Node, ids: Ids) -> None:
        """Join ``ids`` into a slot. Axes along which a node's tensor has size 1 or no fixed size become uniform."""
        key = self._key(slot)
        node = self._tensor_node(key)
        ids = self._fit(node, ids) if node is not None else ids
        present = self.values.get(key)
        if present is None:
            self.values[key] = ids
            self._dormant.append(key)
        else:
            self.variables.union(present, ids)

    def equate(self, *slots: Slot | Node) -> None:
        """All slots hold the same ids (broadcast from the last axis), as soon as one of them is known."""
        for source in slots:
            ids = self.value(source)
            if ids is not None:
                for slot in slots:
                    if slot is not source:
                        self.merge(slot, ids)
                return

    def link(self, source: Node, target: Node, forward: Callable[[Ids], Ids], backward: Callable[[Ids], Ids]) -> None:
        """``target``'s ids are a rearrangement of ``source``'s."""
        ids = self.value(source)
        if ids is not None:
            self.merge(target, forward(ids))
        elif (ids := self.value(target)) is not None:
            self.merge(source, backward(ids))

    def pin(self, slot: Slot | Node, node: Node, why: str) -> None:
        """The slot, if known, must keep its scale; ``why`` ends up in the report."""
        ids = self.value(slot)
        if ids is not None and self.variables.is_free(ids):
            self.variables.pin(ids)
            self.pins.append((node.name, why))

    def uniform(self, ids: Ids, axes: Iterable[int]) -> Ids:
        """Join all variables along ``axes``, which shrink to length 1."""
        for axis in axes:
            if ids.shape[axis] > 1:
                first = ids.take([0], axis=axis)
                self.variables.union(ids, first)
                ids = first
        return ids

    def choose(self, node: Node, candidates: list[int]) -> int:
        """Which of several arguments carries the scale of ``node``."""
        self.candidates.setdefault(node.name, candidates)
        return self.choices.setdefault(node.name, candidates[0])

    # -- the fixpoint ------------------------------------------------------------------------------------------

    def seed(self, node: Node, channels: int) -> None:
        """Free variables on the last axis of a tensor; they must be the first ones made."""
        self.merge(node, self.variables.fresh((1,) * (len(shape_of(node)) - 1) + (channels,)))
        self._seeded = channels

    def live(self, slot: Slot | Node) -> bool:
        """Does the slot carry a free variable of the seed? Only those spread: all others may as well be 1."""
        ids = self.value(slot)
        return ids is not None and bool(self.seeded(ids).any())

    def seeded(self, ids: Ids) -> Ids:
        """The representatives of ``ids`` that belong to the seed, 0 for all others.

        Seed variables have the smallest ids, and the smallest id represents its class.
        """
        roots = self.variables.find(ids)
        return np.where(roots <= self._seeded, roots, PINNED)

    def run(self) -> None:
        """Apply rules around every slot that carries a seed variable, until no new slot does."""
        while awake := [slot for slot in self._dormant if self.live(slot)]:
            self._dormant = [slot for slot in self._dormant if not self.live(slot)]
            for slot in awake:
                for node in self._around(slot):
                    self._apply(node)

    def _around(self, slot: Slot) -> list[Node]:
        if isinstance(slot, Columns):
            return list(self.index.users(slot.weight))
        if isinstance(slot, str):
            return [*self.index.aliases[slot], *self.index.users(slot)]
        return []

    def _apply(self, node: Node) -> None:
        if node.op == "get_attr" or node.target in self._ignored:
            return
        rule = self._rules.get(node.target)
        if rule is not None:
            rule(self, node)
        else:
            self.refuse(node)

    def refuse(self, node: Node, why: str | None = None) -> None:
        """No rule: everything around the node keeps its scale."""
        why = why or f"{op_name(node)} does not commute with a scale per channel"
        for slot in [node, *node.all_input_nodes]:
            self.pin(slot, node, why)
            self.pin(Columns(self.index.slot[slot.name]), node, why)

    # -- helpers -----------------------------------------------------------------------------------------------

    def _key(self, slot: Slot | Node) -> Slot:
        return self.index.slot[slot.name] if isinstance(slot, Node) else slot

    def _tensor_node(self, key: Slot) -> Node | None:
        """The node whose tensor a slot's ids must fit, if the slot stands for a tensor of the graph."""
        if isinstance(key, str):
            return self.index.nodes[key]
        if isinstance(key, Cut):
            operand = self.index.nodes[key.node].args[key.index]
            assert isinstance(operand, Node)
            return operand
        return None

    def _fit(self, node: Node, ids: Ids) -> Ids:
        value = tensor_of(node)
        assert value is not None, f"{node.name} has no tensor value"
        ndim = value.dim()
        if ids.ndim > ndim:
            ids = self.uniform(ids, range(ids.ndim - ndim)).reshape(ids.shape[ids.ndim - ndim :])
        ids = broadcast_ids(ids, ndim)
        single = [axis for axis, size in enumerate(value.shape) if hint(size) == 1]
        ids = self.uniform(ids, {*single, *symbolic_axes(node)})
        assert all(i in (1, s) for i, s in zip(ids.shape, shape_of(node), strict=True)), (node.name, ids.shape)
        if not value.dtype.is_floating_point and self.variables.is_free(ids):
            self.variables.pin(ids)
            self.pins.append((node.name, f"a tensor of {value.dtype} cannot be scaled"))
        return ids.copy()  # np.ascontiguousarray would give a tensor without axes one


def op_name(node: Node) -> str:
    """What to call a node's operation in a report."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return {"placeholder": "a model input", "output": "a model output"}.get(node.op, str(node.target))
