"""``openvino``: OpenVINO's CPU plugin, in this process or from an IR file in any program; see docs/openvino.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from ptq4dit_ao._optional import require
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, Runnable, register
from ptq4dit_ao.lowering.machine import no_x86, saturates
from ptq4dit_ao.lowering.match import QuantizedLinear
from ptq4dit_ao.lowering.openvino.model import quantized_model, to_openvino
from ptq4dit_ao.lowering.program import check_inputs, inputs_of

__all__ = ["OpenVINORunnable", "compile_model", "to_openvino"]

SUFFIX = ".xml"

PRECISIONS = {None: "f32", torch.bfloat16: "bf16"}
"""``float_dtype`` -> OpenVINO's name for it."""


class OpenVINORunnable:
    """An OpenVINO model as a function of tensors. Threads take turns, because they share the memory of one request."""

    def __init__(self, compiled: Any, program: ExportedProgram) -> None:
        self.request = compiled.create_infer_request()
        self.turn = Lock()
        self.inputs, self.result = inputs_of(program), program.call_spec.out_spec

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model on the graph's inputs."""
        check_inputs(inputs, self.inputs)
        arrays = {i: x.detach().contiguous().numpy() for i, x in enumerate(inputs)}
        with self.turn:
            # The request reuses the memory of its results, so these are copies.
            results = self.request.infer(arrays, share_inputs=True, share_outputs=False).to_tuple()
        return tree_unflatten([torch.from_numpy(array) for array in results], self.result)


def compile_model(model: Any, program: ExportedProgram, *, float_dtype: torch.dtype | None = None) -> OpenVINORunnable:
    """Compile a model of :func:`to_openvino`, or the file of an IR, for as many threads as torch uses.

    Raises:
        LoweringError: ``float_dtype`` is bfloat16, and the processor does not have it.
    """
    core = require("openvino", extra="openvino").Core()
    if float_dtype is torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise LoweringError(
            "this processor has no bfloat16, and OpenVINO would imitate it slowly; leave float_dtype out"
        )
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": PRECISIONS[float_dtype],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # activations are quantized only where the graph says so
        "PERF_COUNT": True,
    }
    return OpenVINORunnable(core.compile_model(model, "CPU", settings), program)


def count(run: Runnable, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Linears that one call executed as products of 8-bit integers: kernel -> count."""
    assert isinstance(run, OpenVINORunnable)
    run(*inputs)
    nodes = [node for node in run.request.get_profiling_info() if node.status == node.Status.EXECUTED]
    linears = [node.exec_type for node in nodes if node.node_type.startswith("FullyConnected")]
    return dict(Counter(kernel for kernel in linears if re.search("[iu]8$", kernel, re.IGNORECASE)))


def count_attention(run: Runnable, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Matrix products of attention that are computed as products of 8-bit integers: kernel -> count.

    A product runs alone or in a fused kernel. A fused kernel of n products reads n + 1 factors as 8-bit integers, and
    has no dequantization, which would be an operation of its own.
    """
    assert isinstance(run, OpenVINORunnable)
    found: Counter[str] = Counter()
    for node in run.request.get_compiled_model().get_runtime_model().get_ops():
        about = {key: str(value.value) for key, value in node.get_rt_info().items()}
        if about["layerType"] not in ("MatMul", "Subgraph"):
            continue
        names = about["originalLayersNames"].split(",")
        products = sum(name.endswith("/MatMul") for name in names)
        factors = sum(value.get_element_type().get_type_name() in ("i8", "u8") for value in node.inputs())
        if not any("FakeQuantize" in name and "/Dequantization" in name for name in names):
            found[f"{about['layerType']} {about['primitiveType']}"] += max(0, min(products, factors - 1))
    return {kernel: count for kernel, count in found.items() if count}


def refuse(linear: QuantizedLinear) -> str | None:
    """The reason why the plugin would compute a linear wrongly on this machine; None if it would not."""
    return None if no_x86() else saturates(linear)


def build(request: Request) -> OpenVINORunnable:
    """Convert and compile the graph.

    Raises:
        LoweringError: ``float_dtype`` is bfloat16, and the processor does not have it.
    """
    return compile_model(*quantized_model(request), float_dtype=request.float_dtype)


def write(request: Request, path: Path) -> OpenVINORunnable:
    """Write the IR and compile it from the file. The weights go to a file of the same name that ends in ``.bin``.

    Raises:
        LoweringError: ``float_dtype`` is given.
    """
    if request.float_dtype is not None:
        raise LoweringError(
            f"an OpenVINO IR cannot say that its float part computes in {request.float_dtype}: whoever compiles it "
            "does, with INFERENCE_PRECISION_HINT; leave float_dtype out"
        )
    model, program = quantized_model(request)
    require("openvino", extra="openvino").save_model(model, path, compress_to_fp16=False)
    return compile_model(path, program)


register(
    Backend(
        name="openvino",
        summary="OpenVINO on the CPU: int8 linears, attention fused, no compiler; writes an IR",
        integer=True,
        carries=Capabilities(activation_dtypes=(torch.uint8, torch.int8), float_dtypes=(torch.bfloat16,)),
        refuse=refuse,
        packages=("openvino",),
        extra="openvino",
        build=build,
        count=count,
        count_attention=count_attention,
        write=write,
        prunes=True,
        suffix=SUFFIX,
    )
)
