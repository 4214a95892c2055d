"""``openvino``: OpenVINO's CPU plugin, in this process or from an IR file in any program; see docs/openvino.md."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from ptq4dit_ao._optional import require
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, Runnable, register
from ptq4dit_ao.lowering.machine import saturates
from ptq4dit_ao.lowering.openvino.model import quantized_model, to_openvino

__all__ = ["OpenVINORunnable", "build", "compile_model", "count", "to_openvino", "write"]

SUFFIX = ".xml"

PRECISIONS = {None: "f32", torch.bfloat16: "bf16"}
"""``float_dtype`` -> what OpenVINO calls it."""


class OpenVINORunnable:
    """A compiled model as a function of tensors, for one thread at a time."""

    def __init__(self, compiled: Any, outputs: TreeSpec) -> None:
        self.request = compiled.create_infer_request()
        self.outputs = outputs

    def __call__(self, *inputs: Tensor) -> Any:
        arrays = {i: x.detach().contiguous().numpy() for i, x in enumerate(inputs)}
        # The request reuses the memory of its results, so these are copies.
        results = self.request.infer(arrays, share_inputs=True, share_outputs=False)
        return tree_unflatten([torch.from_numpy(array) for array in results.to_tuple()], self.outputs)


def unavailable() -> str | None:
    """Why OpenVINO cannot run."""
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed; it comes with: python -m pip install 'ptq4dit-ao[openvino]'"
    return None


def build(request: Request) -> Runnable:
    """Convert and compile.

    Raises:
        LoweringError: the float part is to be bfloat16 on a processor without it.
    """
    return compile_model(*quantized_model(request), float_dtype=request.float_dtype)


def compile_model(model: Any, outputs: TreeSpec, *, float_dtype: torch.dtype | None = None) -> OpenVINORunnable:
    """Compile for one call at a time, on as many threads as torch has.

    Raises:
        LoweringError: the float part is to be bfloat16 on a processor without it.
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
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # activations are integers where the graph says so, and nowhere else
        "PERF_COUNT": True,
    }
    return OpenVINORunnable(core.compile_model(model, "CPU", settings), outputs)


def count(run: Any, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The linears that a call executed as 8-bit integers."""
    run(*inputs)
    nodes = [node for node in run.request.get_profiling_info() if node.status == node.Status.EXECUTED]
    linears = [node.exec_type for node in nodes if node.node_type.startswith("FullyConnected")]
    return dict(Counter(kernel for kernel in linears if re.search("[iu]8$", kernel, re.IGNORECASE)))


def write(request: Request, path: Path) -> None:
    """Write the IR: ``.xml``, and the weights beside it, ``.bin``.

    Raises:
        LoweringError: ``float_dtype`` is given.
    """
    if request.float_dtype is not None:
        raise LoweringError(
            f"an OpenVINO IR cannot say that its float part computes in {request.float_dtype}: who compiles it does, "
            "with INFERENCE_PRECISION_HINT; leave float_dtype out"
        )
    model, _ = quantized_model(request)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        complete = Path(folder) / path.name
        require("openvino", extra="openvino").save_model(model, complete, compress_to_fp16=False)
        for suffix in (".bin", SUFFIX):  # a reader looks for the weights of the .xml that it found
            os.replace(complete.with_suffix(suffix), path.with_suffix(suffix))


register(
    Backend(
        name="openvino",
        summary="OpenVINO on the CPU: int8 linears, attention fused, no compiler; writes an IR",
        integer=True,
        carries=Capabilities(activation_dtypes=(torch.uint8, torch.int8), float_dtypes=(torch.bfloat16,)),
        refuse=saturates,
        unavailable=unavailable,
        build=build,
        count=count,
        write=write,
        suffix=SUFFIX,
    )
)
