"""The parts of a prepared graph whose weights are rounded together."""

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
    """Layers that follow each other, and all that is computed from the first of them to the next block."""

    groups: tuple[Group, ...]
    """Whose input is observed here. Their layers may lie in later blocks, as keys and values of one caption do."""
    layers: tuple[Layer, ...]
    """Whose input may have been observed in an earlier block."""
    nodes: tuple[Node, ...]
    """Without placeholders, which may lie between the others."""
    start: Node
    end: Node
    """The node after the last."""

    def weights(self, prepared: GraphModule) -> int:
        """How many numbers are rounded."""
        return sum(get_attribute(prepared, weight_path(layer.node)).numel() for layer in self.layers)

    def outputs(self) -> list[Node]:
        """What later nodes read and the weights decide."""
        inside, changed = set(self.nodes), {layer.node for layer in self.layers}
        for node in self.nodes:
            if not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
        return [node for node in self.nodes if node in changed and not inside.issuperset(node.users)]

    def parts(self, groups: Sequence[Group]) -> list[Group]:
        """All that is decided here: of the groups observed here everything, of others the layers that lie here."""
        own = set(self.layers)
        others = (group for group in groups if group not in self.groups and not own.isdisjoint(group.layers))
        return [
            *self.groups,
            *(replace(group, layers=tuple(layer for layer in group.layers if layer in own)) for group in others),
        ]


def find_blocks(prepared: GraphModule, groups: Sequence[Group], *, together: bool) -> Iterator[Block]:
    """Every group by itself; or the layers that follow each other in the same transformer block."""
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
    """Where blocks start: at the first input observed since the block before ended, at the latest at a layer."""
    starts, done = [], -1
    for part in parts:
        starts.append(min((place for place in observed if done < place < part[0]), default=part[0]))
        done = part[-1]
    return starts


def block_name(layer: str) -> str:
    """The member of a list of modules that a layer belongs to, such as ``transformer_blocks.3``; else the layer."""
    return sites.block_name(layer) or layer
