"""The parts of a prepared graph whose weights are rounded together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ptq4dit_ao.graph import sites
from ptq4dit_ao.graph.names import get_attribute, weight_path
from ptq4dit_ao.rounding.layers import Group


@dataclass(frozen=True)
class Block:
    """Groups that follow each other, and all that is computed from the first of them to the next block."""

    groups: tuple[Group, ...]
    nodes: tuple[Node, ...]
    end: Node
    """The node after the last."""

    @property
    def start(self) -> Node:
        return self.groups[0].node

    def weights(self, prepared: GraphModule) -> int:
        """How many numbers are rounded."""
        layers = (layer for group in self.groups for layer in group.layers)
        return sum(get_attribute(prepared, weight_path(layer.node)).numel() for layer in layers)

    def outputs(self) -> list[Node]:
        """What later nodes read and the weights decide."""
        inside, changed = set(self.nodes), {layer.node for group in self.groups for layer in group.layers}
        for node in self.nodes:
            if not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
        return [node for node in self.nodes if node in changed and not inside.issuperset(node.users)]


def find_blocks(prepared: GraphModule, groups: Sequence[Group], *, together: bool) -> Iterator[Block]:
    """Every group by itself; or together with its neighbours in the same transformer block."""
    nodes = list(prepared.graph.nodes)
    key = (lambda group: block_name(group.name)) if together else id
    parts = [tuple(part) for _, part in itertools.groupby(groups, key)]
    starts = [nodes.index(part[0].node) for part in parts] + [len(nodes) - 1]
    for part, start, end in zip(parts, starts, starts[1:], strict=False):
        yield Block(part, tuple(nodes[start:end]), nodes[end])


def block_name(layer: str) -> str:
    """The member of a list of modules that a layer belongs to, such as ``transformer_blocks.3``; else the layer."""
    return sites.block_name(layer) or layer
