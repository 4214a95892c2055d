"""Other quantizers of the same float model, each used in a few lines as its documentation says.

Every peer gets the same module, graph and calibration batches, and as many threads as torch uses. Packages are imported
inside the functions, and peers whose packages are not installed do not run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.profiler import ProfilerActivity, profile

from ptq4dit_ao.capture.export import call_like
from ptq4dit_ao.lowering.backend import Runnable
from ptq4dit_ao.lowering.fbgemm import KERNELS
from ptq4dit_ao.lowering.openvino import OpenVINORunnable, to_openvino

TORCH_GEMMS = (*KERNELS, "aten::_int_mm")
"""Names of integer matrix products in torch's profiler."""


@dataclass(frozen=True, kw_only=True)
class FloatModel:
    """A float model in the forms that quantizers take. None of them may be changed."""

    module: nn.Module
    exported: GraphModule
    batches: Sequence[tuple[Tensor, ...]]
    """Inputs of the graph, all of one shape. The first batch is timed."""

    def call(self, module: nn.Module) -> Runnable:
        """A module like ``module`` as a function of the graph's inputs."""
        return lambda *tensors: call_like(self.exported, module, tensors)


@dataclass(frozen=True, kw_only=True)
class Started:
    """A model that is ready to run."""

    run: Runnable
    integer_gemms: int | None = None
    """Number of integer matrix products in one call; None if it cannot be counted."""
    promised: int | None = None
    """Number of linears that should run on integer kernels, if it is known."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model to be measured."""

    name: str
    start: Callable[[FloatModel], Started]
    packages: tuple[str, ...] = ()
    """Distributions that it needs."""


def float_eager(model: FloatModel) -> Started:
    """Float model, run eagerly."""
    return Started(run=model.call(model.module))


def float_compiled(model: FloatModel) -> Started:
    """Float model, compiled with ``torch.compile``."""
    return Started(run=model.call(_compiled(copy.copy(model.module))))


def bfloat16_compiled(model: FloatModel) -> Started:
    """Float model in bfloat16, compiled with ``torch.compile``. Floating-point inputs are cast, too."""
    run = model.call(_compiled(copy.deepcopy(model.module).to(torch.bfloat16)))
    return Started(run=lambda *tensors: run(*(x.bfloat16() if x.is_floating_point() else x for x in tensors)))


def torchao_dynamic(model: FloatModel) -> Started:
    """torchao's ``quantize_`` with int8 weights and int8 activations, quantized per token at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = copy.deepcopy(model.module)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return _counted(_frozen(model.call(_compiled(module))), model)


def torchao_static(model: FloatModel) -> Started:
    """torchao's PT2E with ``X86InductorQuantizer``: static int8 of linears and convolutions."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(GraphModule(model.exported, copy.deepcopy(model.exported.graph)), quantizer)
    for batch in model.batches:
        prepared(*batch)
    return _counted(_frozen(torch.compile(convert_pt2e(prepared))), model)


def torchao_smoothquant(model: FloatModel) -> Started:
    """torchao's ``quantize_`` with SmoothQuant 0.5 over static int8, with activations per tensor."""
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, quantize_
    from torchao.quantization.granularity import PerRow, PerTensor

    module = copy.deepcopy(model.module)
    base = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])
    quantize_(module, SmoothQuantConfig(base, step="prepare"))
    for batch in model.batches:
        model.call(module)(*batch)
    quantize_(module, SmoothQuantConfig(base, step="convert"))
    # Freezing is off. Once the passes of X86InductorQuantizer are registered, Inductor fuses these products wrongly
    # (torchao 0.18: 5.6 dB instead of 37). They are integer either way.
    return _counted(model.call(_compiled(module)), model)


def openvino_float32(model: FloatModel) -> Started:
    """OpenVINO without quantization."""
    return _openvino(*to_openvino(model.exported, model.batches[0]), INFERENCE_PRECISION_HINT="f32")


def nncf_int8(model: FloatModel, **options: Any) -> Started:
    """``nncf.quantize`` of the OpenVINO model. The rest computes in the processor's fastest dtype."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    float_model, program = to_openvino(model.exported, model.batches[0])
    data = nncf.Dataset(model.batches, _numpy)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        quantized = nncf.quantize(float_model, data, model_type=nncf.ModelType.TRANSFORMER, **options)
    return _openvino(quantized, program)


def sdnq_int8(model: FloatModel) -> Started:
    """SDNQ with int8 weights and quantized matrix products. It compiles its own kernels."""
    from sdnq import sdnq_post_load_quant

    module = sdnq_post_load_quant(copy.deepcopy(model.module), weights_dtype="int8", use_quantized_matmul=True)
    return _counted(model.call(module), model)


def quanto_int8(model: FloatModel) -> Started:
    """optimum-quanto with int8 weights. It computes in float."""
    from optimum.quanto import freeze, qint8, quantize

    module = copy.deepcopy(model.module)
    quantize(module, weights=qint8)
    freeze(module)
    return _counted(model.call(module), model)


PEERS = (
    Contender(name="torchao int8 dynamic", start=torchao_dynamic, packages=("torchao",)),
    Contender(name="torchao X86 static int8", start=torchao_static, packages=("torchao",)),
    Contender(name="torchao SmoothQuant static int8", start=torchao_smoothquant, packages=("torchao",)),
    Contender(name="OpenVINO float32", start=openvino_float32, packages=("openvino",)),
    Contender(name="NNCF int8 on OpenVINO", start=nncf_int8, packages=("nncf", "openvino")),
    Contender(name="SDNQ int8", start=sdnq_int8, packages=("sdnq",)),
    Contender(name="quanto int8 weights", start=quanto_int8, packages=("optimum-quanto",)),
)
"""Other quantizers, in the order in which they are measured."""


def _compiled(module: nn.Module) -> nn.Module:
    """Compile a module in place. Only ``forward`` is compiled, because ``call_like`` reads the module's signature."""
    module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
    return module


def _frozen(run: Runnable) -> Runnable:
    """The function with Inductor's freezing on. Otherwise Inductor finds no integer kernels in a quantized graph."""
    from torch._inductor import config

    def frozen(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with config.patch(freezing=True):
            return run(*tensors)

    return frozen


def _counted(run: Runnable, model: FloatModel) -> Started:
    run(*model.batches[0])  # compiles
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(*model.batches[0])
    calls = sum(event.count for event in profiler.key_averages() if event.key in TORCH_GEMMS)
    return Started(run=run, integer_gemms=calls)


def _openvino(model: Any, program: ExportedProgram, **properties: str) -> Started:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", **properties}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    about = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    products = [info for info in about if info["layerType"].astype(str) in ("FullyConnected", "MatMul")]
    integer = [info for info in products if info["runtimePrecision"].astype(str) in ("u8", "i8")]
    return Started(run=OpenVINORunnable(compiled, program), integer_gemms=len(integer))


def _numpy(tensors: Sequence[Tensor]) -> dict[int, Any]:
    return {i: tensor.numpy() for i, tensor in enumerate(tensors)}
