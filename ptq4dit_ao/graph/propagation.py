"""Scale propagation: find tensors to divide so that a linear's input is divided by b and the output stays the same.

Every tensor has an array of scale-variable ids, the variables that its elements are *divided* by. Rules, one per aten
op (``rules/``), state which ids of an op's inputs and output must be equal for the op to commute with the scaling. They
can only join variables. Propagation starts from free variables on one linear's input channels, and visits the producer
and every user of each tensor that has them, until nothing changes (the fixpoint). Variables that are still free then
can be folded exactly, in any model. The fixpoint itself depends on neither ops nor models.

A *slot* holds ids. It is one of these:

* a node's name, for an activation or a parameter (all ``get_attr`` nodes of one tensor share a slot),
* :class:`Columns`, for the input channels of a linear's weight, which are *multiplied*,
* :class:`Scalar`, for a Python number among an op's arguments, such as the 1 of ``1 + scale``,
* :class:`NewWeight`, for the weight that a norm without one may get,
* :class:`Cut`, for a small operand that is multiplied where one node reads it, if cuts are allowed.
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
    """Slot of the input channels of the linear weight in slot ``weight``."""

    weight: str


@dataclass(frozen=True)
class Scalar:
    """Slot of a Python number, the positional argument ``index`` of node ``node``."""

    node: str
    index: int


@dataclass(frozen=True)
class NewWeight:
    """Slot of the missing weight of norm ``node``."""

    node: str


@dataclass(frozen=True)
class Cut:
    """Slot of a positional argument ``index`` of node ``node`` that is multiplied just before ``node`` reads it."""

    node: str
    index: int


Slot = str | Columns | Scalar | NewWeight | Cut
Rule = Callable[["Propagation", Node], None]


@dataclass
class GraphIndex:
    """Tables of one graph for repeated lookups: nodes by name, slots by node name, and the nodes of each slot."""

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
                    # data_ptr() would be 0 for every tensor on the meta device.
                    key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
                    slot = owner.setdefault(key, node.name)
            self.slot[node.name] = slot
            self.aliases.setdefault(slot, []).append(node)

    def users(self, slot: str) -> Iterable[Node]:
        """The nodes that read a slot under any of its aliases."""
        return (user for node in self.aliases[slot] for user in node.users)


class Propagation:
    """The fixpoint computation over the region of a graph that the seed reaches."""

    def __init__(
        self, index: GraphIndex, rules: dict[object, Rule], ignored: frozenset[object], *, cut: bool = False
    ) -> None:
        self.index = index
        self.cut = cut
        """Whether small operands may be multiplied at run time where an op combines them with a larger tensor."""
        self.variables = ScaleVariables()
        self.values: dict[Slot, Ids] = {}
        self.pins: list[tuple[str, str]] = []
        """Pairs of a node and a reason, in the order in which free variables were pinned."""
        self.choices: dict[str, int] = {}
        """Index of the factor that carries the scale, by product node; by default the first candidate."""
        self.candidates: dict[str, list[int]] = {}
        self._rules, self._ignored = rules, ignored
        self._dormant: list[Slot] = []
        self._seeded = 0

    # -- methods that rules call -------------------------------------------------------------------------------

    def value(self, slot: Slot | Node) -> Ids | None:
        """The ids of a slot; None if they are not known."""
        return self.values.get(self._key(slot))

    def known(self, slot: Slot | Node) -> bool:
        """Whether the ids of a slot are known."""
        return self._key(slot) in self.values

    def merge(self, slot: Slot | Node, ids: Ids) -> None:
        """Join ``ids`` into a slot; axes of size 1 or without a fixed size become uniform."""
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
        """Join the ids of all slots, broadcast from the last axis, if one of the slots is known."""
        for source in slots:
            ids = self.value(source)
            if ids is not None:
                for slot in slots:
                    if slot is not source:
                        self.merge(slot, ids)
                return

    def link(self, source: Node, target: Node, forward: Callable[[Ids], Ids], backward: Callable[[Ids], Ids]) -> None:
        """Link two nodes of which ``target``'s ids are a rearrangement of ``source``'s, from the one that is known."""
        ids = self.value(source)
        if ids is not None:
            self.merge(target, forward(ids))
        elif (ids := self.value(target)) is not None:
            self.merge(source, backward(ids))

    def pin(self, slot: Slot | Node, node: Node, why: str) -> None:
        """Pin the variables of a slot, if it is known, to scale 1; the report shows ``why``."""
        ids = self.value(slot)
        if ids is not None and self.variables.is_free(ids):
            self.variables.pin(ids)
            self.pins.append((node.name, why))

    def uniform(self, ids: Ids, axes: Iterable[int]) -> Ids:
        """Join all variables along ``axes``; return ids in which these axes have length 1."""
        for axis in axes:
            if ids.shape[axis] > 1:
                first = ids.take([0], axis=axis)
                self.variables.union(ids, first)
                ids = first
        return ids

    def choose(self, node: Node, candidates: list[int]) -> int:
        """The index of the argument that carries the scale of ``node``, among several candidates."""
        self.candidates.setdefault(node.name, candidates)
        return self.choices.setdefault(node.name, candidates[0])

    # -- the fixpoint ------------------------------------------------------------------------------------------

    def seed(self, node: Node, channels: int) -> None:
        """Put free variables on the last axis of a tensor; no other variables may exist yet."""
        self.merge(node, self.variables.fresh((1,) * (len(shape_of(node)) - 1) + (channels,)))
        self._seeded = channels

    def live(self, slot: Slot | Node) -> bool:
        """Whether the slot has a free variable of the seed; only these propagate, as all others may stay 1."""
        ids = self.value(slot)
        return ids is not None and bool(self.seeded(ids).any())

    def seeded(self, ids: Ids) -> Ids:
        """The representatives of ``ids`` that belong to the seed, and 0 for all others.

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
        """Pin all inputs and the output of a node that does not commute with a scale."""
        why = why or f"{op_name(node)} does not commute with a scale per channel"
        for slot in [node, *node.all_input_nodes]:
            self.pin(slot, node, why)
            self.pin(Columns(self.index.slot[slot.name]), node, why)

    # -- helpers -----------------------------------------------------------------------------------------------

    def _key(self, slot: Slot | Node) -> Slot:
        return self.index.slot[slot.name] if isinstance(slot, Node) else slot

    def _tensor_node(self, key: Slot) -> Node | None:
        """The node whose tensor a slot's ids must fit; None for slots without a tensor of the graph."""
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
        return ids.copy()  # np.ascontiguousarray would add an axis to 0-d arrays


def op_name(node: Node) -> str:
    """Name of a node's operation for reports."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return {"placeholder": "a model input", "output": "a model output"}.get(node.op, str(node.target))
