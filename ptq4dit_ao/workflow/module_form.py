"""``to_module``: a quantized model as the float module that it was captured from, with integer weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.capture.call import Call
from ptq4dit_ao.capture.float_model import device_of
from ptq4dit_ao.choices import ModuleFormat
from ptq4dit_ao.errors import ArgumentError, check_type
from ptq4dit_ao.lowering.build import example_batches
from ptq4dit_ao.lowering.parity import TOLERANCE, Parity
from ptq4dit_ao.modules.form import dtype_of, integer_weights, joint_ranges, prove_kernels, quantized_module
from ptq4dit_ao.report import summary
from ptq4dit_ao.workflow.quantized_model import QuantizedModel

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


@own_modes()
def to_module(
    quantized: QuantizedModel,
    model: M,
    *,
    example_inputs: Sequence[Tensor] | None = None,
    allow_float_fallback: bool = False,
    method: ModuleFormat | None = None,
    verify: bool = True,
) -> M:
    """Make a module of the class of the float model, whose linears compute with integers.

    The integers, scales and ranges are those of the graph. Balancing does not change activations between layers: each
    linear divides its input by b when it quantizes it. The module therefore does what the float module does: it takes
    any size, adapters, caches and hooks, and can be compiled, moved and saved (``save_pretrained``).
    A linear that is called with inputs of different ranges has one range for all of them here, so that such a module is
    not compared with its graph.

    Args:
        quantized: what :func:`~ptq4dit_ao.apply_recipe` or :func:`~ptq4dit_ao.load_quantized` returned.
        model: the float module that was quantized, or another copy of it. It is not changed, and the result shares
            the memory of its other parameters. Its dtype is that of the layers that stay float.
        example_inputs: inputs of the graph to compare on; random ones by default.
        allow_float_fallback: leave linears in float that the module cannot hold, and accept linears that no integer
            kernel computes.
        method: format in which a module of diffusers is saved. ``torchao`` is read by diffusers without this package;
            ``ptq4dit`` packs weights of 4 bits. None takes ``ptq4dit`` if a weight has 4 bits or torchao's format
            cannot hold the module.
        verify: run the module and the graph on the example and on inputs of another size, compare them, and count the
            integer kernels.

    Raises:
        ArgumentError: the model is another one, or was quantized in a way that a module cannot hold.
        LoweringError: the module computes something else, or a quantized linear in float.
    """
    check_type("quantized", quantized, QuantizedModel, "what apply_recipe or load_quantized returned")
    if quantized.linears is None:
        raise ArgumentError(
            "this quantized model was saved by a version without balancing vectors, which its module form needs; "
            "quantize it again"
        )
    module = quantized_module(model, quantized.graph, quantized.linears, allow_float_fallback=allow_float_fallback)
    if verify:
        _verify(quantized, module, example_inputs, allow_float_fallback)
    if _is_diffusers(module):
        from ptq4dit_ao.modules.diffusers_quantizer import Record, attach

        attach(module, Record.of(quantized.recipe.to_dict(), summary(quantized.report)), method)
    elif method is not None:
        raise ArgumentError(
            f"method is {method!r}, a format of diffusers, and {type(model).__name__} is no model of diffusers; leave "
            "it out, and save the quantized model with save_quantized"
        )
    return module  # type: ignore[return-value]  # a copy of model


def _verify(
    quantized: QuantizedModel, module: nn.Module, example_inputs: Sequence[Tensor] | None, allow_float_fallback: bool
) -> None:
    call = Call(module, None if quantized.captured is None else quantized.captured.call)
    dtype, device = dtype_of(module), device_of(module)
    if dtype not in TOLERANCE:
        raise ArgumentError(f"model is of {dtype}; give one of {', '.join(map(str, TOLERANCE))}")

    def run(*inputs: Tensor) -> object:
        return call([x.to(device, dtype if x.is_floating_point() else None) for x in inputs])

    batches = example_batches(quantized.graph, example_inputs)
    difference, differs = None, _differs(quantized, module)
    if differs is not None:
        logger.warning("the module was not compared with the graph: %s", differs)
    else:
        with torch.no_grad():
            difference = Parity(quantized.graph, batches, dtype, consumed=False).check(run, "module", None)
    proof = prove_kernels(module, lambda: run(*batches[0]), allow_float_fallback=allow_float_fallback)
    proof = replace(proof, difference=difference)
    logger.info("%s; %s", proof, proof.parity)


def _differs(quantized: QuantizedModel, module: nn.Module) -> str | None:
    """The reason why a module computes something else than its graph; None if it does not."""
    assert quantized.linears is not None
    if joint := joint_ranges(quantized.graph, quantized.linears):
        return f"{joint[0]} (of {len(joint)}) is called with inputs of different ranges, and has one range for all"
    left = {linear.weight.removesuffix(".weight") for linear in quantized.linears} - integer_weights(module).keys()
    return f"{min(left)} (of {len(left)}) stays float" if left else None


def _is_diffusers(module: nn.Module) -> bool:
    return any(kind.__module__ == "diffusers.models.modeling_utils" for kind in type(module).__mro__)
