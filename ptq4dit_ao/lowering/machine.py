"""Capabilities of this machine's processor and compiler. Each missing one is described in one line."""

from __future__ import annotations

import functools

import torch

from ptq4dit_ao.lowering.match import QuantizedLinear

X86 = ("x86_64", "AMD64")
"""Names of the x86-64 architecture in torch."""

OVERFLOWS = (
    "this processor has neither VNNI nor AMX, so 8-bit products overflow 16 bits; quantize activations to 7 bits"
)
"""The reason why a processor would silently compute 8-bit products wrongly."""


@functools.cache
def no_x86() -> str | None:
    """The reason why integer kernels for x86 cannot run; None if they can."""
    architecture = torch.cpu.get_capabilities().get("architecture")
    if architecture not in X86:
        return f"this processor is {architecture}, not x86-64"
    if not torch.cpu.get_capabilities().get("avx2"):
        return "this processor has no AVX2"
    return None


@functools.cache
def no_compiler() -> str | None:
    """The reason why Inductor cannot compile C++; None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler; install g++ or clang, or point CXX to one"
    return None


def has_onednn() -> bool:
    """Whether torch was built with oneDNN's integer linear."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def no_onednn() -> str | None:
    """The reason why oneDNN's fused kernels cannot run; None if they can."""
    return None if has_onednn() else f"torch {torch.__version__} was built without oneDNN's integer linear"


@functools.cache
def has_dot_product() -> bool:
    """Whether the processor accumulates products of 8-bit integers in 32 bits (VNNI, AMX).

    Without it, kernels add pairs of products in 16 bits first, and large sums saturate.
    """
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def saturates(linear: QuantizedLinear) -> str | None:
    """The reason why this processor would silently compute a linear wrongly; None if it would not."""
    largest = 2 * linear.x_range[1] * max(abs(bound) for bound in linear.weight_range)
    if has_dot_product() or largest < 2**15:
        return None
    return OVERFLOWS
