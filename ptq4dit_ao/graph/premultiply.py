"""Sites that no fold reaches: their input is multiplied by 1/b when the model runs.

A graph gets a multiply for each tensor that such linears read. A quantized module multiplies where it quantizes the
input, so that there the vector costs nothing of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ptq4dit_ao.graph.names import joint_name
from ptq4dit_ao.graph.sites import Consumer, Site


def premultiplied_sites(sites: Sequence[Site], nodes: Collection[str]) -> list[Site]:
    """The sites; linears of refused ones are balanced by a multiply, where that is possible.

    Linears that read one tensor, or that have one weight, share a vector.

    Args:
        sites: all sites of a graph.
        nodes: names of the linear nodes that may be balanced.
    """
    taken = {consumer.weight for site in sites if site.refusal is None for consumer in site.consumers}
    barred = taken | {c.weight for site in sites for c in site.consumers if c.node not in nodes}
    refused = [consumer for site in sites if site.refusal is not None for consumer in site.consumers]
    able = [consumer for consumer in refused if consumer.weight not in barred]
    groups = {group[0].node: group for group in _groups(able)}
    moved = {consumer.node for consumer in able}
    found: list[Site] = []
    for site in sites:
        if site.refusal is None:
            found.append(site)
            continue
        rest = tuple(consumer for consumer in site.consumers if consumer.node not in moved)
        if rest:
            found.append(replace(site, consumers=rest, name=_name(rest)))
        found += [_site(groups[consumer.node]) for consumer in site.consumers if consumer.node in groups]
    return found


def _groups(consumers: Sequence[Consumer]) -> Iterator[tuple[Consumer, ...]]:
    """The consumers in groups that share tensors or weights, in execution order."""
    left = list(consumers)
    while left:
        group = [left.pop(0)]
        for member in group:
            joined = [c for c in left if c.input == member.input or c.weight == member.weight]
            left = [c for c in left if c not in joined]
            group += joined
        yield tuple(sorted(group, key=consumers.index))


def _site(consumers: tuple[Consumer, ...]) -> Site:
    channels = len(consumers[0].variables)
    every = np.arange(1, channels + 1)
    balanced = tuple(replace(consumer, variables=every) for consumer in consumers)
    return Site(name=_name(consumers), consumers=balanced, num_variables=channels, premultiply=True)


def _name(consumers: Sequence[Consumer]) -> str:
    return joint_name(consumer.layer for consumer in consumers)
