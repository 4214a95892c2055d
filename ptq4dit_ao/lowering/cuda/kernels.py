"""Triton kernels of ``ops``. Import this module only on a GPU machine, because torch's CPU wheels have no Triton.

Each program computes one (BLOCK_M, BLOCK_N) tile of the output. Both operands are contiguous along K, as integer tensor
cores need them. Sums stay in int32. Zero point, scales and bias are applied once, before the tile is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages): large tiles for many tokens, small ones for few rows or channels.
# Triton's autotuner skips those that need more shared memory than the GPU has.
TILES = (
    (128, 256, 128, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 128, 64, 4, 4),
    (64, 128, 128, 4, 4),
    (64, 64, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (16, 64, 256, 4, 3),
)
CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in TILES
]


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Quantized linear with an int8 weight: int8 (M, K), int8 (N, K), both contiguous -> ``out_dtype`` (M, N)."""
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    int8_linear_kernel[_grid(m, n)](
        x, weight, scale, correction, scale if bias is None else bias, out,
        m, n, k, m.bit_length(), HAS_BIAS=bias is not None,
    )  # fmt: skip
    return out


def int4_linear(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Quantized linear with a packed weight: int8 (M, K), int8 (N, ceil(K / 2)), contiguous -> ``out_dtype`` (M, N)."""
    (m, k), (n, half) = x.shape, weight.shape
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    int4_linear_kernel[_grid(m, n)](
        x, weight, scale, correction, scale if bias is None else bias, out,
        m, n, k, half, m.bit_length(), HAS_BIAS=bias is not None,
    )  # fmt: skip
    return out


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
    """Quantized linear with a weight of codes: int8 (M, K), int8 (N, ceil(K / 2)) -> ``out_dtype`` (M, N).

    steps is uint8 (N, ceil(K / group)), and table int8 (16, 16), by step and code; all are contiguous.
    """
    (m, k), (n, half) = x.shape, codes.shape
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    expanded_linear_kernel[_grid(m, n)](
        x, codes, steps, table, scale, correction, scale if bias is None else bias, out,
        m, n, k, half, group, steps.shape[1], m.bit_length(), HAS_BIAS=bias is not None,
    )  # fmt: skip
    return out


def _grid(m: int, n: int) -> Callable[[dict[str, int]], tuple[int]]:
    return lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)


@triton.autotune(configs=CONFIGS, key=["m_bits", "N", "K"])
@triton.jit(do_not_specialize=["m_bits"])
def int8_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    correction_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    m_bits,  # tunes again when M doubles, instead of whenever it changes
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of :func:`int8_linear`."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * K + inner[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * K + inner[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(rows[:, None] < M) & (inner[None, :] < K - k), other=0)
        weight = tl.load(weight_ptrs, mask=(columns[None, :] < N) & (inner[:, None] < K - k), other=0)
        sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    _finish(sums, rows, columns, scale_ptr, correction_ptr, bias_ptr, out_ptr, M, N, HAS_BIAS)


@triton.autotune(configs=CONFIGS, key=["m_bits", "N", "K"])
@triton.jit(do_not_specialize=["m_bits"])
def int4_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    correction_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    half,  # ceil(K / 2), an argument so that Triton sees its divisibility
    m_bits,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of :func:`int4_linear`."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    low_ptrs = x_ptr + rows[:, None].to(tl.int64) * K + inner[None, :]
    high_ptrs = low_ptrs + half
    weight_ptrs = weight_ptr + columns[None, :] * half + inner[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, half, BLOCK_K):
        packed = tl.load(weight_ptrs, mask=(columns[None, :] < N) & (inner[:, None] < half - k), other=0)
        x_low = tl.load(low_ptrs, mask=(rows[:, None] < M) & (inner[None, :] < half - k), other=0)
        x_high = tl.load(high_ptrs, mask=(rows[:, None] < M) & (inner[None, :] < K - half - k), other=0)
        # Right shifts extend the sign. The casts are needed where Triton widens int8 beside a literal.
        low = ((packed << 4).to(tl.int8) >> 4).to(tl.int8)
        high = (packed >> 4).to(tl.int8)
        sums = tl.dot(x_low, low, sums, out_dtype=tl.int32)
        sums = tl.dot(x_high, high, sums, out_dtype=tl.int32)
        low_ptrs += BLOCK_K
        high_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    _finish(sums, rows, columns, scale_ptr, correction_ptr, bias_ptr, out_ptr, M, N, HAS_BIAS)


@triton.autotune(configs=CONFIGS, key=["m_bits", "N", "K"])
@triton.jit(do_not_specialize=["m_bits"])
def expanded_linear_kernel(
    x_ptr,
    weight_ptr,
    steps_ptr,
    table_ptr,
    scale_ptr,
    correction_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    half,
    group,
    groups,
    m_bits,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of :func:`expanded_linear`."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    low_ptrs = x_ptr + rows[:, None].to(tl.int64) * K + inner[None, :]
    high_ptrs = low_ptrs + half
    weight_ptrs = weight_ptr + columns[None, :] * half + inner[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, half, BLOCK_K):
        inside = (columns[None, :] < N) & (inner[:, None] < half - k)
        packed = tl.load(weight_ptrs, mask=inside, other=0).to(tl.int32)
        x_low = tl.load(low_ptrs, mask=(rows[:, None] < M) & (inner[None, :] < half - k), other=0)
        x_high = tl.load(high_ptrs, mask=(rows[:, None] < M) & (inner[None, :] < K - half - k), other=0)
        low = _expanded(packed & 0xF, k + inner, columns, inside, steps_ptr, table_ptr, group, groups)
        behind = inside & (inner[:, None] < K - half - k)
        high = _expanded((packed >> 4) & 0xF, half + k + inner, columns, behind, steps_ptr, table_ptr, group, groups)
        sums = tl.dot(x_low, low, sums, out_dtype=tl.int32)
        sums = tl.dot(x_high, high, sums, out_dtype=tl.int32)
        low_ptrs += BLOCK_K
        high_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    _finish(sums, rows, columns, scale_ptr, correction_ptr, bias_ptr, out_ptr, M, N, HAS_BIAS)


@triton.jit
def _expanded(codes, inner, columns, inside, steps_ptr, table_ptr, group, groups):
    """Integers (BLOCK_K, BLOCK_N) of codes; 0 outside the weight. Steps and table stay in the L1 cache."""
    step = tl.load(steps_ptr + columns[None, :] * groups + inner[:, None] // group, mask=inside, other=0).to(tl.int32)
    return tl.load(table_ptr + step * 16 + codes, mask=inside, other=0)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program's tile.

    Eight tiles in a column run together and share weights in the L2 cache.
    """
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = program // (8 * tiles_n) * 8
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    place = program % (8 * tiles_n)
    rows = (first + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, columns


@triton.jit
def _finish(sums, rows, columns, scale_ptr, correction_ptr, bias_ptr, out_ptr, M, N, HAS_BIAS: tl.constexpr):
    """Subtract the correction, apply scales and bias, and store the tile."""
    inside = columns < N
    correction = tl.load(correction_ptr + columns, mask=inside, other=0)
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    y = (sums - correction[None, :]).to(tl.float32) * scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        y += bias[None, :]
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & inside[None, :])
