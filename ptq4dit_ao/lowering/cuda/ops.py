"""Quantized linears as custom operators, each with a fake, a CPU and a CUDA implementation.

    y = (x @ W^T - correction) * scale + bias

``x`` (..., K) is int8, ``W`` (N, K) is int8, int4 or codes of 4 bits, and sums are exact in int32. ``correction`` is
the zero point of ``x`` times the row sums of ``W``, which removes the zero point from the sum. ``scale`` is the scale
of ``x`` times those of ``W``. Both are (N,) and computed once.

On a CPU the operators are the slow, exact reference. On a GPU they run a Triton kernel, or ``torch._int_mm`` without
Triton. ``torch.compile`` treats them as opaque.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad


@custom_op("ptq4dit_ao::int8_linear", mutates_args=(), device_types="cpu")
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Quantized linear with an int8 weight.

    x int8 (..., K), weight int8 (N, K), scale float32 (N,), correction int32 (N,), bias float32 (N,) -> ``out_dtype``
    (..., N).
    """
    return _scaled(_exact_mm(x, weight), scale, correction, bias, out_dtype)


@custom_op("ptq4dit_ao::int4_linear", mutates_args=(), device_types="cpu")
def int4_linear(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Quantized linear with a weight packed by :func:`pack_halves`, int8 (N, ceil(K / 2)).

    The rest is as for ``int8_linear``.
    """
    return _scaled(_exact_mm(x, unpack_halves(weight, x.shape[-1])), scale, correction, bias, out_dtype)


@custom_op("ptq4dit_ao::expanded_linear", mutates_args=(), device_types="cpu")
def expanded_linear(
    x: Tensor,
    codes: Tensor,
    steps: Tensor,
    table: Tensor,
    group: int,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Quantized linear whose weight expands from codes of 4 bits, packed by :func:`pack_halves`, int8 (N, ceil(K / 2)).

    steps uint8 (N, ceil(K / group)) has the step of each group of columns, and table int8 (16, 16) the integer of each
    step and code (:func:`~ptq4dit_ao.core.expansion.expanded_integers`). The rest is as for ``int8_linear``.
    """
    weight = expand(codes, steps, table, group, x.shape[-1])
    return _scaled(_exact_mm(x, weight), scale, correction, bias, out_dtype)


@expanded_linear.register_fake
def _expanded_fake(
    x: Tensor,
    codes: Tensor,
    steps: Tensor,
    table: Tensor,
    group: int,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=out_dtype)


@expanded_linear.register_kernel("cuda")
def _expanded_cuda(
    x: Tensor,
    codes: Tensor,
    steps: Tensor,
    table: Tensor,
    group: int,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        if has_triton():
            from ptq4dit_ao.lowering.cuda import kernels

            y = kernels.expanded_linear(rows, codes, steps, table, group, scale, correction, bias, out_dtype)
        else:
            weight = expand(codes, steps, table, group, x.shape[-1])
            y = _scaled(int_mm(rows, weight), scale, correction, bias, out_dtype)
    return y.reshape(*x.shape[:-1], len(codes))


@int8_linear.register_fake
@int4_linear.register_fake
def _fake(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


@int8_linear.register_kernel("cuda")
def _int8_cuda(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        if has_triton():
            from ptq4dit_ao.lowering.cuda import kernels

            y = kernels.int8_linear(rows, weight, scale, correction, bias, out_dtype)
        else:
            y = _scaled(int_mm(rows, weight), scale, correction, bias, out_dtype)
    return y.reshape(*x.shape[:-1], len(weight))


@int4_linear.register_kernel("cuda")
def _int4_cuda(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        if has_triton():
            from ptq4dit_ao.lowering.cuda import kernels

            y = kernels.int4_linear(rows, weight, scale, correction, bias, out_dtype)
        else:
            y = _scaled(int_mm(rows, unpack_halves(weight, x.shape[-1])), scale, correction, bias, out_dtype)
    return y.reshape(*x.shape[:-1], len(weight))


def pack_halves(weight: Tensor) -> Tensor:
    """Pack 4-bit weights: int8 (N, K), each in [-8, 7] -> int8 (N, ceil(K / 2)).

    Byte j of a row holds column j in its low nibble and column j + ceil(K / 2) in its high one. Shifts alone thus turn
    a tile of bytes into two tiles of weights, each of neighbouring columns. An odd K is padded with a column of zeros.
    """
    low, high = pad(weight, (0, weight.shape[1] % 2)).chunk(2, dim=1)
    return (low & 0xF) | (high << 4)


def unpack_halves(packed: Tensor, columns: int) -> Tensor:
    """Unpack 4-bit weights: int8 (N, ceil(K / 2)) -> int8 (N, K), the inverse of ``pack_halves``."""
    return torch.cat([(packed << 4) >> 4, packed >> 4], dim=1)[:, :columns]


def expand(codes: Tensor, steps: Tensor, table: Tensor, group: int, columns: int) -> Tensor:
    """The weight of packed codes, int8 (N, columns); the arguments are those of ``expanded_linear``."""
    by_column = steps.long().repeat_interleave(group, 1)[:, :columns]
    return table[by_column, unpack_halves(codes, columns).long() & 0xF]


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Integer matrix product by ``torch._int_mm``: int8 (M, K), int8 (N, K) -> int32 (M, N).

    On CUDA it requires more than 16 rows and multiples of 8 for K and N, so the operands are padded with zeros.
    """
    (m, k), n = x.shape, len(weight)
    whole_k, whole_n = k + -k % 8, n + -n % 8
    return torch._int_mm(_filled(x, max(m, 32), whole_k), _filled(weight, whole_n, whole_k).T)[:m, :n]


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. It comes with torch's CUDA wheels for Linux."""
    return importlib.util.find_spec("triton") is not None


def _exact_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Matrix product int8 (..., K), int8 (N, K) -> int32 (..., N), in float64: exact below 2**53, and fast on a CPU."""
    return (x.double() @ weight.double().T).to(torch.int32)


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    lacking = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return pad(matrix, lacking) if any(lacking) else matrix


def _scaled(sums: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    y = (sums - correction).to(torch.float32) * scale
    return (y if bias is None else y + bias).to(out_dtype)
