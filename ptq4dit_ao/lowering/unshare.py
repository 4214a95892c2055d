"""One weight for each linear, as Inductor's int8 patterns need it.

Inductor merges equal dequantizations, those of a weight that several linears read, and its patterns then match none of
them, for the dequantized weight has other readers.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptq4dit_ao.lowering.match import QuantizedLinear


def unshare_weights(linears: Sequence[QuantizedLinear]) -> None:
    """Let every linear after the first that reads a weight read a view of it, by another name, in place."""
    read: set[object] = set()
    for linear in linears:
        shared, graph = linear.dequantize_weight, linear.node.graph
        weight = shared.args[0]
        if weight in read:
            name = f"_weight_of_{linear.name}"
            linear.graph.register_buffer(name, linear.weight.view_as(linear.weight))
            with graph.inserting_before(linear.node):
                own = graph.node_copy(shared)
                with graph.inserting_before(own):
                    own.update_arg(0, graph.get_attr(name))
            linear.node.replace_input_with(shared, own)
        read.add(weight)
