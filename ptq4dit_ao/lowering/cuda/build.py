"""``cuda`` backend: build a converted graph with integer kernels on a GPU."""

from __future__ import annotations

import logging
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map_only

from ptq4dit_ao.core.expansion import expanded_integers
from ptq4dit_ao.graph.names import get_attribute, set_tensor
from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, Runnable, register
from ptq4dit_ao.lowering.cuda.ops import expanded_linear, has_triton, int4_linear, int8_linear, pack_halves
from ptq4dit_ao.lowering.match import QuantizedLinear
from ptq4dit_ao.lowering.mixed import compute_in
from ptq4dit_ao.lowering.weight_only import replace_weight_only

logger = logging.getLogger(__name__)

RECORDED_BY_ALL = "2.13"
"""First version of torch in which every thread can record CUDA graphs. Before it, only the first thread can."""

OLDEST = (8, 0)
"""Least compute capability: Ampere, the oldest GPU that Triton's integer kernels support."""


class Quantize(nn.Module):
    """Quantization of float to int8: ``clamp(round(x / scale) + zero_point)``, unsigned values shifted down by 128.

    It consists of plain ops, so that a compiler fuses them into the computation of ``x``.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.inverse_scale = 1.0 / linear.x_scale
        self.zero_point = linear.x_zero_point - _shift(linear)
        self.low, self.high = (bound - _shift(linear) for bound in linear.x_range)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize (..., C) floats to int8 of the same shape."""
        q = (x.to(torch.float32) * self.inverse_scale).round() + self.zero_point
        return q.clamp(self.low, self.high).to(torch.int8)


class IntegerLinear(nn.Module):
    """Integer linear, int8 (..., C_in) -> ``out_dtype`` (..., C_out).

    Weights of at most 4 bits are packed two per byte, as are the codes of weights that expand from 4 bits.
    """

    weight: Tensor
    steps: Tensor | None
    table: Tensor | None
    scale: Tensor
    correction: Tensor
    bias: Tensor | None

    def __init__(self, linear: QuantizedLinear, out_dtype: torch.dtype) -> None:
        super().__init__()
        low, high = linear.weight_range
        packs = low >= -8 and high <= 7
        weight, bias = linear.weight, linear.bias
        row_sums = weight.sum(dim=1, dtype=torch.int32)
        self.op = int4_linear if packs else int8_linear
        self.out_dtype, self.group = out_dtype, weight.shape[1]
        steps, table = None, None
        if linear.expansion is not None:
            codes, steps = linear.expansion.codes(weight)
            weight, steps, table = codes.to(torch.int8), steps.to(torch.uint8), expanded_integers(weight.device)
            self.group, packs = linear.expansion.group or self.group, True
        self.register_buffer("weight", pack_halves(weight) if packs else weight.contiguous())
        self.register_buffer("steps", steps)
        self.register_buffer("table", table)
        self.register_buffer("scale", linear.weight_scale.to(torch.float32) * linear.x_scale)
        self.register_buffer("correction", row_sums * (linear.x_zero_point - _shift(linear)))
        self.register_buffer("bias", None if bias is None else bias.to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply int8 (..., C_in) activations by the weight."""
        rest = (self.scale, self.correction, self.bias, self.out_dtype)
        if self.steps is None or self.table is None:
            return self.op(x, self.weight, *rest)
        return expanded_linear(x, self.weight, self.steps, self.table, self.group, *rest)


def no_gpu() -> str | None:
    """The reason why this machine cannot run the kernels; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build from pytorch.org"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.cuda.get_device_capability() < OLDEST:
        return f"{torch.cuda.get_device_name()} is older than Ampere (compute capability 8.0)"
    return None


def overflows(linear: QuantizedLinear) -> str | None:
    """The reason why sums of a linear may not fit 32 bits; None if they do."""
    (low, high), terms = linear.x_range, linear.weight.shape[1]
    if terms * (high - low) * max(abs(bound) for bound in linear.weight_range) < 2**31:
        return None
    return f"sums of {terms} products may overflow 32 bits"


def build(request: Request) -> Runnable:
    """Compile for the current GPU. Inputs are moved there, and outputs stay there.

    At small batches, launching some 500 kernels takes longer than running them, so they are replayed as a CUDA graph.
    The first call with a new shape compiles and tunes, and the second one records. Each thread records its own graph;
    with an older torch only the first thread can. Without a GPU the graph runs eagerly on the CPU reference of the
    operators.
    """
    if not torch.cuda.is_available():
        return replace_linears(request, torch.device("cpu"))
    device = torch.device("cuda", torch.cuda.current_device())
    graph = replace_linears(request, device)
    call: Runnable = graph
    if has_triton():
        call = torch.compile(graph, mode="reduce-overhead")
        if torch.__version__ < RECORDED_BY_ALL:
            call = by_thread(call, torch.compile(graph))

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = call(*(x.to(device) for x in inputs))
        return tree_map_only(Tensor, torch.clone, outputs)  # the next replay overwrites the memory of these outputs

    return run


def by_thread(first: Runnable, others: Runnable) -> Runnable:
    """A function that runs ``first`` in the thread that calls it first, and ``others`` in every other thread."""
    owner: list[int] = []
    lock = Lock()

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        me = get_ident()
        with lock:
            if not owner:
                owner.append(me)
        if owner == [me]:
            return first(*inputs)
        logger.info(
            "with torch %s only the first thread replays CUDA graphs; this one launches kernels one by one",
            torch.__version__,
        )
        return others(*inputs)

    return run


def replace_linears(request: Request, device: torch.device) -> GraphModule:
    """The request's graph on ``device``, with one of this package's operators in place of every quantized linear."""
    graph = request.graph
    if request.float_dtype is not None:
        compute_in(graph, request.float_dtype, request.example_inputs)
    quantizers: dict[Node, Node] = {}
    for i, linear in enumerate(request.linears):
        source = linear.quantize.args[0]  # linear.x may be a linear that has been replaced by now
        assert isinstance(source, Node)
        if linear.quantize not in quantizers:
            quantizers[linear.quantize] = _call(graph, f"_quantize_{i}", Quantize(linear), source, linear.quantize)
        narrowed = request.float_dtype if linear.dtype == torch.float32 else None
        module = IntegerLinear(linear, narrowed or linear.dtype).to(device)
        node = _call(graph, f"_integer_linear_{i}", module, quantizers[linear.quantize], linear.node)
        linear.replace_by(node)
    replace_weight_only(request, device)
    _move(graph, device)
    graph.graph.lint()
    graph.recompile()
    return graph


def _shift(linear: QuantizedLinear) -> int:
    """Offset from the stored activation dtype to int8."""
    return 128 if linear.x_dtype == torch.uint8 else 0


def _call(graph: GraphModule, name: str, module: nn.Module, source: Node, before: Node) -> Node:
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(before):
        return graph.graph.call_module(name, (source,))


def _move(graph: GraphModule, device: torch.device) -> None:
    """Move the graph's tensors, and the devices that export wrote into ops such as ``arange``.

    ``graph.to`` would also move the tensors of the graph that this one was copied from.
    """
    for path in {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
        set_tensor(graph, path, get_attribute(graph, path).to(device))

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)


register(
    Backend(
        name="cuda",
        summary="int8 and packed int4 kernels for NVIDIA GPUs (Triton), compiled, replayed as CUDA graphs",
        integer=True,
        carries=Capabilities(
            activation_dtypes=(torch.uint8, torch.int8),
            model_dtypes=(torch.float32, torch.bfloat16, torch.float16),
            float_dtypes=(torch.bfloat16, torch.float16),
        ),
        refuse=overflows,
        rank=0,
        rare=True,
        kernels=("ptq4dit_ao::int8_linear", "ptq4dit_ao::int4_linear", "ptq4dit_ao::expanded_linear"),
        lacks=no_gpu,
        build=build,
        compiles=True,
    )
)
