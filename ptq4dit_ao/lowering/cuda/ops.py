"""Quantized linears as operators, each with a fake, a CPU and a CUDA implementation.

    y = (x @ W^T - correction) * scale + bias

``x`` (..., K) is int8, ``W`` (N, K) int8 or int4, and sums are exact in int32. ``correction``, the zero point of ``x``
times the row sums of ``W``, takes the zero point out of the sum; ``scale`` is that of ``x`` times those of ``W``. Both
are (N,), made once.

On a CPU they are the reference, slow and exact; on a GPU a Triton kernel, or ``torch._int_mm`` where there is no
Triton. ``torch.compile`` does not look inside.
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
    """int8 (..., K), int8 (N, K), float32 (N,), int32 (N,), float32 (N,) -> ``out_dtype`` (..., N)."""
    return _scaled(_exact_mm(x, weight), scale, correction, bias, out_dtype)


@custom_op("ptq4dit_ao::int4_linear", mutates_args=(), device_types="cpu")
def int4_linear(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As ``int8_linear``, with the weight as ``pack_halves`` makes it: int8 (N, ceil(K / 2))."""
    return _scaled(_exact_mm(x, unpack_halves(weight, x.shape[-1])), scale, correction, bias, out_dtype)


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
    """int8 (N, K), each in [-8, 7] -> int8 (N, ceil(K / 2)).

    Byte j of a row holds column j in its low nibble and column j + ceil(K / 2) in its high one, so shifts alone turn a
    tile of bytes into two tiles of weights, each of neighbouring columns. An odd K gets a column of zeros.
    """
    low, high = pad(weight, (0, weight.shape[1] % 2)).chunk(2, dim=1)
    return (low & 0xF) | (high << 4)


def unpack_halves(packed: Tensor, columns: int) -> Tensor:
    """int8 (N, ceil(K / 2)) -> int8 (N, K), the inverse of ``pack_halves``."""
    return torch.cat([(packed << 4) >> 4, packed >> 4], dim=1)[:, :columns]


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """int8 (M, K), int8 (N, K) -> int32 (M, N) by ``torch._int_mm``.

    On CUDA it wants more than 16 rows, and multiples of 8 for K and N; zeros fill up what lacks.
    """
    (m, k), n = x.shape, len(weight)
    whole_k, whole_n = k + -k % 8, n + -n % 8
    return torch._int_mm(_filled(x, max(m, 32), whole_k), _filled(weight, whole_n, whole_k).T)[:m, :n]


@functools.cache
def has_triton() -> bool:
    """Is Triton installed? It comes with torch's CUDA wheels for Linux."""
    return importlib.util.find_spec("triton") is not None


def _exact_mm(x: Tensor, weight: Tensor) -> Tensor:
    """int8 (..., K), int8 (N, K) -> int32 (..., N); floats are exact below 2**53, and quick on a CPU."""
    return (x.double() @ weight.double().T).to(torch.int32)


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    lacking = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return pad(matrix, lacking) if any(lacking) else matrix


def _scaled(sums: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    y = (sums - correction).to(torch.float32) * scale
    return (y if bias is None else y + bias).to(out_dtype)
