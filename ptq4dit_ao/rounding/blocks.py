"""Blocks: parts of a prepared graph whose weights are rounded together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from ptq4dit_ao.graph import sites
from ptq4dit_ao.graph.names import get_attribute, layer_name, weight_path
from ptq4dit_ao.rounding.layers import Group, Layer


@dataclass(frozen=True)
class Block:
    """Consecutive layers, and all nodes from the first of them to the next block."""

    groups: tuple[Group, ...]
    """Groups whose input is observed in this block; their layers may lie in later blocks (a caption's k and v)."""
    layers: tuple[Layer, ...]
    """Layers of this block, whose input may be observed in an earlier block."""
    nodes: tuple[Node, ...]
    """Nodes of this block, without placeholders, which may lie between them."""
    start: Node
    end: Node
    """Node after the last one of this block."""

    def weights(self, prepared: GraphModule) -> int:
        """Number of weight elements that are rounded."""
        return sum(get_attribute(prepared, weight_path(layer.node)).numel() for layer in self.layers)

    def outputs(self) -> list[Node]:
        """Nodes that later nodes read and that depend on the block's weights."""
        inside, changed = set(self.nodes), {layer.node for layer in self.layers}
        for node in self.nodes:
            if not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
        return [node for node in self.nodes if node in changed and not inside.issuperset(node.users)]

    def parts(self, groups: Sequence[Group]) -> list[Group]:
        """Groups that this block determines: those observed here, and the layers here of groups observed earlier."""
        own = set(self.layers)
        others = (group for group in groups if group not in self.groups and not own.isdisjoint(group.layers))
        return [
            *self.groups,
            *(replace(group, layers=tuple(layer for layer in group.layers if layer in own)) for group in others),
        ]


def find_blocks(prepared: GraphModule, groups: Sequence[Group], *, together: bool) -> Iterator[Block]:
    """Blocks in execution order: one per group, or (``together``) one per run of layers in a transformer block."""
    nodes = list(prepared.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    if together:
        layers = sorted((layer for group in groups for layer in group.layers), key=lambda layer: place[layer.node])
        runs = itertools.groupby(layers, lambda layer: block_name(layer_name(layer.node)))
        parts = [tuple(run) for _, run in runs]
        starts = _starts([[place[layer.node] for layer in part] for part in parts], [place[g.node] for g in groups])
    else:
        parts, starts = [group.layers for group in groups], [place[group.node] for group in groups]
    for part, start, end in zip(parts, starts, [*starts[1:], len(nodes) - 1], strict=True):
        inside = tuple(node for node in nodes[start:end] if node.op != "placeholder")
        observed = tuple(group for group in groups if start <= place[group.node] < end)
        yield Block(observed, part, inside, nodes[start], nodes[end])


def _starts(parts: Iterable[Sequence[int]], observed: Sequence[int]) -> list[int]:
    """Start positions of blocks: the first input observed after the previous block, or the block's first layer."""
    starts, done = [], -1
    for part in parts:
        starts.append(min((place for place in observed if done < place < part[0]), default=part[0]))
        done = part[-1]
    return starts


def block_name(layer: str) -> str:
    """Name of the block that a layer belongs to, such as ``transformer_blocks.3``; the layer itself without one."""
    return sites.block_name(layer) or layer
