"""A separate weight for each linear, as Inductor's int8 patterns need it.

Inductor merges equal dequantizations, which includes those of a weight that several linears read. Its patterns then
match none of these linears, because they require a dequantized weight to have a single reader.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from ptq4dit_ao.lowering.match import QuantizedLinear


def unshare_weights(model: GraphModule, linears: Sequence[QuantizedLinear]) -> None:
    """Give every linear after the first that reads a weight a view of it under another name, in place."""
    graph, read = model.graph, set()
    for linear in linears:
        dequantize = linear.dequantize_weight
        weight = dequantize.args[0]
        if weight in read:
            name = f"_weight_of_{linear.name}"
            model.register_buffer(name, linear.weight.view_as(linear.weight))
            with graph.inserting_before(linear.node):
                view, own = graph.get_attr(name), graph.node_copy(dequantize)
            own.update_arg(0, view)
            linear.node.replace_input_with(dequantize, own)
        read.add(weight)
    model.recompile()
