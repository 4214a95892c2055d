"""``fbgemm``: eager integer linears on x86, without a compiler, ready in seconds.

Each quantized linear becomes one integer kernel call on packed weights: oneDNN's if torch was built with it (faster),
else FBGEMM's. oneDNN's kernel also applies the activation function that follows, and quantizes its output for the next
linear, while the values are still in registers. The rest of the graph stays eager.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, register
from ptq4dit_ao.lowering.machine import has_onednn, no_x86, saturates
from ptq4dit_ao.lowering.match import QuantizedLinear
from ptq4dit_ao.lowering.weight_only import replace_weight_only

aten = torch.ops.aten

KERNELS = ("onednn::qlinear_pointwise", "quantized::linear_with_input_q_dq_qweight_dq_output_fp32")
"""Names of its integer kernels in torch's profiler."""


class OneDNNLinear(nn.Module):
    """oneDNN linear, uint8 (N, ..., C_in) -> float (N, ..., C_out), or uint8 with the next quantizer fused in."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.x_scale, self.x_zero_point = linear.x_scale, linear.x_zero_point
        self.weight = torch.ops.onednn.qlinear_prepack(linear.weight.contiguous(), None)
        self.scale = linear.weight_scale.to(torch.float32)
        self.zero_point = torch.zeros(len(linear.weight), dtype=torch.int32)
        self.bias = None if linear.bias is None else linear.bias.to(torch.float32)
        self.function, self.algorithm = "none", ""
        self.quantize: Quantize | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply uint8 activations by the packed weight."""
        q = self.quantize
        scale, zero_point, dtype = (1.0, 0, torch.float32) if q is None else (q.scale, q.zero_point, torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, self.x_scale, self.x_zero_point, self.weight, self.scale, self.zero_point, self.bias,
            scale, zero_point, dtype, self.function, [], self.algorithm,
        )  # fmt: skip
        return y if q is None else q.narrow(y)


class Quantize(nn.Module):
    """Quantization of float to uint8: ``clamp(round(x / scale) + zero_point)``."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.scale, self.zero_point = linear.x_scale, linear.x_zero_point
        self.low, self.high = linear.x_range

    def forward(self, x: Tensor) -> Tensor:
        """Quantize floats to uint8 of the same shape."""
        q = torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8)
        # This is a view of the integers. int_repr would copy them, which takes longer than rounding.
        return self.narrow(x.new_empty(0, dtype=torch.uint8).set_(q.untyped_storage(), 0, q.shape, q.stride()))

    def narrow(self, q: Tensor) -> Tensor:
        """Clamp uint8 values to fewer bits, in place."""
        return q if (self.low, self.high) == (0, 255) else q.clamp_(self.low, self.high)


class FBGEMMLinear(nn.Module):
    """FBGEMM linear, float (N, ..., C_in) -> float (N, ..., C_out). It quantizes its input itself."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.x_scale, self.x_zero_point = linear.x_scale, linear.x_zero_point
        weight = torch._make_per_channel_quantized_tensor(
            linear.weight, linear.weight_scale.double(), linear.weight_zero_point.long(), 0
        )
        bias = None if linear.bias is None else linear.bias.to(torch.float32)
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the activations and multiply them by the packed weight."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, self.x_scale, self.x_zero_point, self.packed
        )


def refuse(linear: QuantizedLinear) -> str | None:
    """The reason why these kernels cannot carry a linear; None if they can."""
    if linear.x_range != (0, 255) and not has_onednn():
        return f"FBGEMM quantizes to the full 8 bits, got {linear.x_range}"
    return saturates(linear)


def build(request: Request) -> GraphModule:
    """Replace every linear by a kernel call, and free its unpacked weight."""
    graph, onednn = request.graph, has_onednn()
    replace_weight_only(request, torch.device("cpu"))
    quantizers: dict[Node, Node] = {}
    for i, linear in enumerate(request.linears):
        source = linear.quantize.args[0]  # linear.x may be a linear that has been replaced by now
        assert isinstance(source, Node)
        if onednn:
            if linear.quantize not in quantizers:
                quantizers[linear.quantize] = _call(graph, f"_quantize_{i}", Quantize(linear), source, linear.quantize)
            source = quantizers[linear.quantize]
        module = OneDNNLinear(linear) if onednn else FBGEMMLinear(linear)
        linear.replace_by(_call(graph, f"_integer_linear_{i}", module, source, linear.node))
    if onednn:
        _fuse(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _fuse(graph: GraphModule) -> None:
    """Fuse each linear with its only reader: an activation function that oneDNN has, then a quantizer."""
    for node in list(graph.graph.nodes):
        linear = _module(graph, node)
        if not isinstance(linear, OneDNNLinear):
            continue
        reader = _only_reader(node)
        if reader is not None and (function := _function(reader)) is not None:
            linear.function, linear.algorithm = function
            _absorb(node, reader)
            reader = _only_reader(node)
        if reader is not None and isinstance(quantize := _module(graph, reader), Quantize):
            linear.quantize = quantize
            _absorb(node, reader)
    graph.delete_all_unused_submodules()


def _function(node: Node) -> tuple[str, str] | None:
    """oneDNN's name and algorithm of a node's activation function; None if oneDNN does not have it."""
    if node.target is aten.gelu.default:
        return "gelu", str(node.kwargs.get("approximate", "none"))
    if node.target is aten.silu.default:
        return "swish", ""
    return ("relu", "") if node.target is aten.relu.default else None


def _module(graph: GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _absorb(node: Node, reader: Node) -> None:
    reader.replace_all_uses_with(node)
    node.graph.erase_node(reader)


def _call(graph: GraphModule, name: str, module: nn.Module, source: Node, before: Node) -> Node:
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(before):
        return graph.graph.call_module(name, (source,))


register(
    Backend(
        name="fbgemm",
        summary="eager int8 kernels for x86 (oneDNN or FBGEMM), no compiler, ready in seconds",
        integer=True,
        carries=Capabilities(),
        rank=2,
        kernels=KERNELS,
        refuse=refuse,
        lacks=no_x86,
        build=build,
    )
)
