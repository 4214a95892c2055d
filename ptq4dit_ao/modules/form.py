"""Module form of a quantized model: the float module with integer weights in its linears."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule
from torch.profiler import ProfilerActivity, profile
from torchao.quantization import Int8Tensor

from ptq4dit_ao.capture.export import uncompiled
from ptq4dit_ao.capture.float_model import check_float_module
from ptq4dit_ao.core.qparams import FLOAT_BITS
from ptq4dit_ao.errors import ArgumentError, ArtifactError, LoweringError, check_type
from ptq4dit_ao.graph.names import WRAPPED
from ptq4dit_ao.lowering.machine import saturates
from ptq4dit_ao.lowering.match import IntegerLinear, QuantizedLinear, integer_linears, quantized_products
from ptq4dit_ao.lowering.proof import KernelProof, check_proof
from ptq4dit_ao.modules.kernels import KERNELS, OP
from ptq4dit_ao.modules.linears import ModuleLinear
from ptq4dit_ao.modules.weight import StaticInt8Weight

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

ADDED_BIAS = "ptq4dit_added_bias"
"""Attribute of a linear that the float module has without a bias, and to which rounding has added one."""


def quantized_module(
    model: nn.Module, graph: GraphModule, linears: Sequence[ModuleLinear], *, allow_float_fallback: bool = False
) -> nn.Module:
    """A copy of a float module whose linears have the integers, scales and ranges of a graph.

    The copy shares the memory of all other parameters with the module.

    Args:
        model: the float module that the graph was captured from, or another copy of it. Its other layers keep their
            dtype, which may differ from the graph's.
        graph: the converted graph.
        linears: its linears as parts of the module.
        allow_float_fallback: leave a linear that the module cannot hold in float, and log why.

    Raises:
        ArgumentError: the module is another one, or the graph quantizes what a module cannot hold.
    """
    model = uncompiled(check_module(model))
    if quantized_products(graph):
        raise ArgumentError(
            "this model's attention is quantized, which a module cannot hold, as its processors compute it in float; "
            "quantize without attention.quantize for a module, or lower the graph"
        )
    found = integer_linears(graph)
    if [linear.name for linear in found] != [about.node for about in linears]:
        raise ArtifactError("the balancing vectors of this quantized model belong to another graph; quantize it again")
    tied = _tied(model)
    groups: dict[str, list[tuple[IntegerLinear, ModuleLinear]]] = {}
    for linear, about in zip(found, linears, strict=True):
        path = tied.get(about.weight, [about.weight])[0]
        groups.setdefault(path, []).append((linear, about))
    # New parameters of the same memory: what is done to those of one module is not done to those of the other.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    module = copy.deepcopy(model, memo | {id(buffer): buffer for buffer in model.buffers()})
    left = {}
    for path, calls in groups.items():
        names = tied.get(path, [path])
        reasons = [about.refusal or _misfit(module, name, linear) for linear, about in calls for name in names]
        reason = (
            next(filter(None, reasons), None) or _odd_bias(module, names) or _odd_calls([call for call, _ in calls])
        )
        if reason is None:
            first, *others = (_linear_of(module, name) for name in names)
            _quantize(first, calls)
            for other in others:
                other.weight, other.bias = first.weight, first.bias
        else:
            left[path.removesuffix(".weight")] = reason
    if left and not allow_float_fallback:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise ArgumentError(
            f"{type(model).__name__} cannot hold {len(left)} of {len(groups)} quantized linears ({why}); give the "
            "float module that was quantized, or pass allow_float_fallback=True to leave these linears in float"
        )
    for name, reason in left.items():
        logger.warning("%s stays float: %s", name, reason)
    return module.eval().requires_grad_(False)


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the weights of linears that share one parameter, by each of these paths."""
    paths: dict[int, list[str]] = {}
    for name, child in model.named_modules(remove_duplicate=False):
        if isinstance(child, nn.Linear):
            paths.setdefault(id(child.weight), []).append(f"{name}.weight")
    return {path: group for group in paths.values() if len(group) > 1 for path in group}


def _odd_calls(calls: Sequence[IntegerLinear]) -> str | None:
    """The reason why calls of one weight cannot have one form; None if they can."""
    kinds = {(call.per_token is not None, isinstance(call, QuantizedLinear), call.weight_range) for call in calls}
    return "its calls are quantized in different ways" if len(kinds) > 1 else None


def _odd_bias(module: nn.Module, names: Sequence[str]) -> str | None:
    """The reason why linears of one weight cannot be told apart in a graph; None if they need not."""
    biases = {id(_linear_of(module, name).bias) for name in names}
    return None if len(biases) == 1 else f"its weight is tied to that of {names[1]}, whose bias is another one"


def joint_ranges(graph: GraphModule, linears: Sequence[ModuleLinear]) -> list[str]:
    """Names of the linears whose calls have different ranges in a graph, and have one for all in a module."""
    ranges: dict[str, set[tuple[float, int]]] = {}
    for linear, about in zip(integer_linears(graph), linears, strict=True):
        if isinstance(linear, QuantizedLinear):
            ranges.setdefault(about.weight, set()).add((linear.x_scale, linear.x_zero_point))
    return [path.removesuffix(".weight") for path, found in ranges.items() if len(found) > 1]


def check_module(model: object) -> nn.Module:
    """Check that ``model`` is a float module.

    Raises:
        ArgumentError: it is something else, such as a graph.
        ExportError: it is quantized already.
    """
    check_type("model", model, nn.Module, "the float module that was quantized")
    if isinstance(model, GraphModule):
        raise ArgumentError("model is a graph; give the float module that it was captured from")
    assert isinstance(model, nn.Module)
    check_float_module(model)
    return model


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's layers; a model of diffusers may keep some of them in float32 beside it."""
    own = getattr(module, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def integer_weights(module: nn.Module) -> dict[str, StaticInt8Weight]:
    """The integer weights of a module, by the name of their linear."""
    return {
        name: weight
        for name, child in module.named_modules()
        if isinstance(weight := child._parameters.get("weight"), StaticInt8Weight)
    }


def as_fast_module(module: M) -> M:
    """Give a module that diffusers has loaded with torchao's ``Int8Tensor`` this package's kernels, in place.

    Its weights must have static input ranges, as those that :func:`~ptq4dit_ao.to_module` makes. It computes the same,
    up to the order of sums, and is saved in the format it came in.

    Raises:
        ArgumentError: no weight is such a tensor.
    """
    check_type("module", module, nn.Module, "a module of diffusers that was quantized by this package")
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    held = [
        (linear, weight) for linear in linears if isinstance(weight := linear._parameters.get("weight"), Int8Tensor)
    ]
    if not any(_is_static(weight) for _, weight in held):
        raise ArgumentError(
            f"no linear of {type(module).__name__} has an Int8Tensor with a static range; give a module that to_module "
            "made and diffusers has loaded"
        )
    for linear, weight in held:
        if _is_static(weight) or _is_alone(weight):
            linear.weight = nn.Parameter(StaticInt8Weight.of_int8_tensor(weight), requires_grad=False)
    if isinstance(metadata := getattr(getattr(module, "hf_quantizer", None), "metadata", None), dict):
        from ptq4dit_ao.modules.diffusers_quantizer import Record, attach

        attach(module, Record.of_metadata(metadata) or Record.of({}, {}), "torchao")
    return module.requires_grad_(False)


def prove_kernels(
    module: nn.Module, call: Callable[[], object], *, allow_float_fallback: bool = False, compiled: bool = False
) -> KernelProof:
    """Count the integer matrix products of one call of a quantized module.

    Args:
        module: the module.
        call: calls it, or something that contains it; it is called twice.
        allow_float_fallback: accept that fewer products than calls of quantized linears were integer.
        compiled: whether the module was compiled, so that no hook may be set on its linears. Each of them must then run
            at least once.

    Raises:
        LoweringError: a quantized linear computed in float.
    """
    check_type("module", module, nn.Module, "a quantized module")
    check_type("call", call, Callable, "a function that calls the module")  # type: ignore[arg-type]
    linears = {name: weight for name, weight in integer_weights(module).items() if weight.x_bits != FLOAT_BITS}
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [] if compiled else [module.get_submodule(name).register_forward_hook(count) for name in linears]
    try:
        with torch.no_grad():
            call()
            ran = calls
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                call()
    finally:
        for hook in hooks:
            hook.remove()
    events = {event.key: event.count for event in profiler.key_averages()}
    # Other modules, such as text encoders by torchao, have integer products, too.
    products = events.get(OP, 0)
    kernels = {name: min(events[name], products) for name in KERNELS if name in events and products}
    promised = max(len(linears), products) if compiled else ran
    proof = KernelProof(backend="module", promised=promised, kernels=kernels)
    check_proof(proof, allow_float_fallback=allow_float_fallback)
    if not proof.promised and (linears or not integer_weights(module)):  # weights alone promise no integer product
        raise LoweringError("no quantized linear was called; call the quantized module")
    return proof


def _is_static(weight: Int8Tensor) -> bool:
    """Whether a tensor of torchao is one with a static range that :meth:`StaticInt8Weight.as_int8_tensor` makes."""
    scale = weight.act_quant_scale
    return scale is not None and scale.numel() == 1 and not weight.reduce_range and _is_symmetric(weight)


def _is_alone(weight: Int8Tensor) -> bool:
    """Whether a tensor of torchao is one for float inputs that :meth:`StaticInt8Weight.as_int8_tensor` makes."""
    return weight.act_quant_kwargs is None and _is_symmetric(weight)


def _is_symmetric(weight: Int8Tensor) -> bool:
    """Whether a tensor of torchao has one scale for each output channel, and no zero points."""
    zeros = weight.zero_point
    return weight.scale.numel() == len(weight.qdata) and (zeros is None or not zeros.any())


def _linear_of(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path.removesuffix(".weight"))
    assert isinstance(linear, nn.Linear)
    return linear


def _misfit(module: nn.Module, path: str, quantized: IntegerLinear) -> str | None:
    """The reason why a module cannot hold a linear's weight; None if it can."""
    name = path.removesuffix(".weight")
    if not path.endswith(".weight"):
        return "its weight is computed from several parameters"
    try:
        linear = module.get_submodule(name)
    except AttributeError:
        hint = ", as an adapter was loaded when it was quantized" if WRAPPED in name else ""
        return f"the module has no {name}{hint}"
    if not isinstance(linear, nn.Linear):
        return f"{name} is a {type(linear).__name__}, which is no nn.Linear"
    if quantized.weight.dtype != torch.int8 or quantized.weight_zero_point.any():
        return "its weight is not of int8 with zero points of 0"
    if isinstance(quantized, QuantizedLinear) and (why := saturates(quantized)) is not None:
        return why
    shape = tuple(quantized.weight.shape)
    if tuple(linear.weight.shape) != shape:
        return f"its weight is {shape} and the module's {tuple(linear.weight.shape)}"
    return None


def _quantize(linear: nn.Linear, calls: Sequence[tuple[IntegerLinear, ModuleLinear]]) -> None:
    """Give a linear the integers of its calls in a graph, which share a weight."""
    quantized, about = calls[0]
    integers = quantized.weight
    rows = torch.ones(len(integers), dtype=torch.float64) if about.rows is None else about.rows
    device, dtype = linear.weight.device, linear.weight.dtype
    scale, zero_point, x_bits = _input([call for call, _ in calls])
    ranks = {call.ndim for _, call in calls}
    weight = StaticInt8Weight.of(
        integers.to(device),
        quantized.weight_scale.to("cpu", torch.float64) * rows,
        scale,
        zero_point,
        bits=(quantized.weight_range[1] - quantized.weight_range[0]).bit_length(),
        x_bits=x_bits,
        dynamic=quantized.per_token is not None,
        x_ndim=ranks.pop() if len(ranks) == 1 else None,
        dtype=dtype,
        expansion=None if quantized.expansion is None else quantized.expansion.to_text(),
        pre_scale=None if about.columns is None else 1 / about.columns,
        pre_offset=about.offset,
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    bias = quantized.layer_bias
    if bias is not None:
        if linear.bias is None:
            setattr(linear, ADDED_BIAS, True)
        bias = bias.to("cpu", torch.float64) * rows
        if about.shift is not None:
            bias = bias + about.shift
        linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)


def _input(calls: Sequence[IntegerLinear]) -> tuple[float, int, int]:
    """Scale, zero point as an unsigned number, and bits of the input of a linear's calls."""
    quantized = [call for call in calls if isinstance(call, QuantizedLinear)]
    if not quantized:
        return 1.0, 0, FLOAT_BITS
    (low, high), (scale, zero_point) = quantized[0].x_range, _joint_range(quantized)
    return scale, zero_point - low, (high - low).bit_length()


def _joint_range(calls: Sequence[QuantizedLinear]) -> tuple[float, int]:
    """Scale and zero point that cover the ranges of all calls of a linear."""
    first = calls[0]
    if all((call.x_scale, call.x_zero_point) == (first.x_scale, first.x_zero_point) for call in calls):
        return first.x_scale, first.x_zero_point
    low, high = first.x_range
    least = min((low - call.x_zero_point) * call.x_scale for call in calls)
    most = max((high - call.x_zero_point) * call.x_scale for call in calls)
    scale = (most - least) / (high - low)
    return scale, round(low - least / scale)
