"""What a user would run instead: other quantizers of the same float model, each in a few lines, as its docs say.

Every peer gets the same module, graph and calibration batches, and as many threads as torch has. Packages are imported
inside; those that are not installed do not run.
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


@dataclass(frozen=True, kw_only=True)
class FloatModel:
    """A float model in the forms in which quantizers take it; none is to be changed."""

    module: nn.Module
    exported: GraphModule
    batches: Sequence[tuple[Tensor, ...]]
    """The graph's inputs, all of one shape; the first is what is timed."""

    def call(self, module: nn.Module) -> Runnable:
        """A module like this one as a function of the graph's inputs."""
        return lambda *tensors: call_like(self.exported, module, tensors)


@dataclass(frozen=True, kw_only=True)
class Started:
    """A model that is ready to run."""

    run: Runnable
    integer_gemms: int | None = None
    """In one call; None if it has none to show."""
    promised: int | None = None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to be measured."""

    name: str
    start: Callable[[FloatModel], Started]
    packages: tuple[str, ...] = ()
    """Distributions that it needs."""


def float_eager(model: FloatModel) -> Started:
    """The module as it is."""
    return Started(run=model.call(model.module))


def float_compiled(model: FloatModel) -> Started:
    """``torch.compile``."""
    return Started(run=model.call(_compiled(copy.copy(model.module))))


def bfloat16_compiled(model: FloatModel) -> Started:
    """``torch.compile`` of the module in bfloat16; floating inputs are cast, too."""
    run = model.call(_compiled(copy.deepcopy(model.module).to(torch.bfloat16)))
    return Started(run=lambda *tensors: run(*(x.bfloat16() if x.is_floating_point() else x for x in tensors)))


def torchao_dynamic(model: FloatModel) -> Started:
    """``quantize_``: int8 weights, activations quantized per token at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = copy.deepcopy(model.module)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return _counted(_frozen(model.call(_compiled(module))), model)


def torchao_static(model: FloatModel) -> Started:
    """PT2E with ``X86InductorQuantizer``: static int8 of linears and convolutions."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(GraphModule(model.exported, copy.deepcopy(model.exported.graph)), quantizer)
    for batch in model.batches:
        prepared(*batch)
    return _counted(_frozen(torch.compile(convert_pt2e(prepared))), model)


def torchao_smoothquant(model: FloatModel) -> Started:
    """``quantize_`` with SmoothQuant 0.5 over static int8, activations per tensor."""
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, quantize_
    from torchao.quantization.granularity import PerRow, PerTensor

    module = copy.deepcopy(model.module)
    base = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])
    quantize_(module, SmoothQuantConfig(base, step="prepare"))
    for batch in model.batches:
        model.call(module)(*batch)
    quantize_(module, SmoothQuantConfig(base, step="convert"))
    # Not frozen: once the passes of X86InductorQuantizer are registered, Inductor fuses these products wrongly (torchao
    # 0.18: 5.6 dB instead of 37). They are integer either way.
    return _counted(model.call(_compiled(module)), model)


def openvino_float32(model: FloatModel) -> Started:
    """OpenVINO without quantization."""
    return _openvino(*to_openvino(model.exported, model.batches[0]), INFERENCE_PRECISION_HINT="f32")


def nncf_int8(model: FloatModel, **options: Any) -> Started:
    """``nncf.quantize`` of the OpenVINO model, which computes the rest in what the processor does best."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    float_model, program = to_openvino(model.exported, model.batches[0])
    data = nncf.Dataset(model.batches, _numpy)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        quantized = nncf.quantize(float_model, data, model_type=nncf.ModelType.TRANSFORMER, **options)
    return _openvino(quantized, program)


def sdnq_int8(model: FloatModel) -> Started:
    """SDNQ's int8 weights with quantized matrix products; it compiles its own kernels."""
    from sdnq import sdnq_post_load_quant

    module = sdnq_post_load_quant(copy.deepcopy(model.module), weights_dtype="int8", use_quantized_matmul=True)
    return _counted(model.call(module), model)


def quanto_int8(model: FloatModel) -> Started:
    """optimum-quanto's int8 weights; it computes in float."""
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


def _compiled(module: nn.Module) -> nn.Module:
    """In place. ``forward``, not the module: ``call_like`` reads the signature of the one that it calls."""
    module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
    return module


def _frozen(run: Runnable) -> Runnable:
    """Without freezing, Inductor finds no integer kernels in a quantized graph."""
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
