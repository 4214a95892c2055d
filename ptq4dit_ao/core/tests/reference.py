"""The method's mathematics in NumPy float64, written from the papers' equations and from nothing else.

It imports neither torch nor any module of this library, so that an error cannot be shared by the code and
its check. Slow and plain on purpose. Equations: PTQ4DiT (arXiv 2405.16005); uniform quantizers: the
conventions of torch's min-max observers.

Notation: ``C`` input channels, ``T`` timesteps; a linear layer is ``Y = X W^T + bias`` with ``W`` (C_out, C_in),
so input channel ``j`` is column ``j`` of both ``X`` and ``W``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


# Salience, and its calibration over timesteps


def salience(x: ArrayLike, axis: int = -1) -> Array:
    """``s_j = max |x[..., j]|``: the largest magnitude of each channel on ``axis``, (C,)."""
    channels = np.moveaxis(np.abs(np.asarray(x, dtype=np.float64)), axis, -1)
    return channels.reshape(-1, channels.shape[-1]).max(axis=0)


def average_ranks(v: ArrayLike) -> Array:
    """Ranks 1..n of a vector; equal values share the mean of the ranks they span."""
    v = np.asarray(v, dtype=np.float64)
    smaller = (v[None, :] < v[:, None]).sum(axis=1)
    equal = (v[None, :] == v[:, None]).sum(axis=1)
    return smaller + (equal + 1) / 2


def spearman(u: ArrayLike, v: ArrayLike) -> float:
    """Spearman's rho: the Pearson correlation of the average ranks; 0 where a vector is constant."""
    ranks_u, ranks_v = average_ranks(u), average_ranks(v)
    centred_u, centred_v = ranks_u - ranks_u.mean(), ranks_v - ranks_v.mean()
    norm = np.sqrt((centred_u**2).sum() * (centred_v**2).sum())
    return float((centred_u * centred_v).sum() / norm) if norm > 0 else 0.0


def ssc_weights(sx_t: ArrayLike, sw: ArrayLike) -> tuple[Array, Array]:
    """``eta_t = exp(-rho_t) / sum_tau exp(-rho_tau)`` with ``rho_t = spearman(s(X^(t)), s(W))``.

    ``sx_t`` (T, C) and ``sw`` (C,) give ``eta`` (T,) and ``rho`` (T,).
    """
    rho = np.array([spearman(sx, sw) for sx in np.asarray(sx_t, dtype=np.float64)])
    weights = np.exp(-rho)
    return weights / weights.sum(), rho


def aggregate(sx_t: ArrayLike, sw: ArrayLike, how: Literal["ssc", "max", "mean"]) -> Array:
    """One salience vector (C,) for all timesteps of ``sx_t`` (T, C): ``sum_t eta_t s(X^(t))``, maximum or mean."""
    sx_t = np.asarray(sx_t, dtype=np.float64)
    if how == "ssc":
        eta, _ = ssc_weights(sx_t, sw)
        return (eta[:, None] * sx_t).sum(axis=0)
    if how == "max":
        return sx_t.max(axis=0)
    if how == "mean":
        return sx_t.mean(axis=0)
    raise ValueError(f"how={how!r} is none of 'ssc', 'max', 'mean'")


def balance_vector(sx: ArrayLike, sw: ArrayLike, alpha: float = 0.5, max_scale: float | None = None) -> Array:
    """``b = s(X)^alpha / s(W)^(1-alpha)``, (C,): the activation is divided by ``b``, the weight multiplied.

    ``alpha=0.5`` is CSB: with ``s~ = sqrt(s(X) s(W))``, ``s(X)/b = s(W) b = s~``. A dead channel (a salience, or
    the ``b`` they give, is 0 or not finite) keeps ``b = 1``; the rest is clipped to ``[1/max_scale, max_scale]``.
    """
    sx, sw = np.asarray(sx, dtype=np.float64), np.asarray(sw, dtype=np.float64)
    alive = (sx > 0) & (sw > 0) & np.isfinite(sx) & np.isfinite(sw)
    with np.errstate(over="ignore", under="ignore"):
        b = np.where(alive, sx, 1.0) ** alpha / np.where(alive, sw, 1.0) ** (1 - alpha)
    b = np.where((b > 0) & np.isfinite(b), b, 1.0)
    return b if max_scale is None else np.clip(b, 1 / max_scale, max_scale)


# Uniform quantizers


def affine_qparams(
    lo: ArrayLike, hi: ArrayLike, qmin: int, qmax: int, symmetric: bool, eps: float
) -> tuple[Array, NDArray[np.int64]]:
    """Scale and zero point of the range ``[lo, hi]``, each of the shape of ``lo``.

    The range is extended to hold 0. Affine: ``scale = (hi - lo) / (qmax - qmin)`` and
    ``zero_point = clip(qmin - round(lo / scale), qmin, qmax)``. Symmetric, for signed integers only:
    ``scale = max(|lo|, |hi|) / ((qmax - qmin) / 2)`` and ``zero_point = 0``. The scale is at least ``eps``.
    """
    lo = np.minimum(np.asarray(lo, dtype=np.float64), 0.0)
    hi = np.maximum(np.asarray(hi, dtype=np.float64), 0.0)
    if symmetric:
        if not qmin < 0 < qmax:
            raise ValueError(f"symmetric needs signed integers, not [{qmin}, {qmax}]")
        scale = np.maximum(np.maximum(-lo, hi) / ((qmax - qmin) / 2), eps)
        return scale, np.zeros(scale.shape, dtype=np.int64)
    scale = np.maximum((hi - lo) / (qmax - qmin), eps)
    return scale, np.clip(qmin - np.rint(lo / scale), qmin, qmax).astype(np.int64)


def fake_quantize(x: ArrayLike, scale: ArrayLike, zp: ArrayLike, qmin: int, qmax: int) -> Array:
    """``(clamp(round(x / scale) + zp, qmin, qmax) - zp) * scale``; a tie rounds to the even integer.

    ``scale`` and ``zp`` broadcast against ``x``: for per-channel parameters of a weight pass them as (C_out, 1).
    """
    scale, zp = np.asarray(scale, dtype=np.float64), np.asarray(zp, dtype=np.float64)
    integers = np.clip(np.rint(np.asarray(x, dtype=np.float64) / scale) + zp, qmin, qmax)
    return (integers - zp) * scale


def range_error(x: ArrayLike, lo: float, hi: float, p: float, qmin: int, qmax: int, symmetric: bool) -> float:
    """``mean |Q(x) - x|^p`` over all elements of ``x``, Q covering ``[lo, hi]``."""
    scale, zp = affine_qparams(lo, hi, qmin, qmax, symmetric, 2**-12)
    return float((np.abs(fake_quantize(x, scale, zp, qmin, qmax) - x) ** p).mean())


def percentile_ranges(x: ArrayLike) -> list[tuple[float, float]]:
    """PTQ4DiT: ``{.999, .9999, .99999}``, as much cut from both tails; between two values, linearly."""
    ordered = np.sort(np.asarray(x, dtype=np.float64).ravel())

    def quantile(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        below = int(np.floor(position))
        above = min(below + 1, len(ordered) - 1)
        return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))

    return [(quantile(1 - f), quantile(f)) for f in (0.999, 0.9999, 0.99999)]


def shrunk_ranges(lo: float, hi: float) -> list[tuple[float, float]]:
    """PTQ4DM and Q-Diffusion: the range of minimum and maximum times 1, 0.99, ... 0.21."""
    return [(lo * (1 - 0.01 * i), hi * (1 - 0.01 * i)) for i in range(80)]


def per_channel_quantizer(lo: ArrayLike, hi: ArrayLike, qmin: int, qmax: int) -> tuple[Array, Array]:
    """RepQ's start: ``delta_j = (hi_j - lo_j) / (qmax - qmin)``, ``z_j = qmin - round(lo_j / delta_j)``, (C,) each."""
    lo, hi = np.asarray(lo, dtype=np.float64), np.asarray(hi, dtype=np.float64)
    delta = (hi - lo) / (qmax - qmin)
    return delta, qmin - np.rint(lo / delta)


def repq(delta: Array, z: Array, qmin: int, qmax: int) -> tuple[Array, Array, float, int]:
    """RepQ: ``(r, o, delta~, z~)`` with ``delta~``, ``z~`` the means (z~ an integer of the quantizer),
    ``r = delta / delta~`` and ``o = (-z delta) / r + z~ delta~``.
    """
    mean_delta, mean_z = float(delta.mean()), int(np.clip(np.rint(z.mean()), qmin, qmax))
    r = delta / mean_delta
    return r, (-z * delta) / r + mean_z * mean_delta, mean_delta, mean_z


def sqnr_db(reference: ArrayLike, approximation: ArrayLike) -> float:
    """``10 log10(sum reference^2 / sum (reference - approximation)^2)``; inf where both are equal."""
    reference = np.asarray(reference, dtype=np.float64)
    noise = ((reference - np.asarray(approximation, dtype=np.float64)) ** 2).sum()
    if noise == 0:
        return float("inf")
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((reference**2).sum() / noise))


# The adaLN-Zero block, and its re-parameterisation


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWeights:
    """The matrices of one adaLN-Zero DiT block of width C and hidden width M.

    The rows of ``adaln`` are six chunks of C: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp.
    """

    adaln_weight: Array  # (6C, C)
    adaln_bias: Array  # (6C,)
    q_weight: Array  # (C, C)
    q_bias: Array  # (C,)
    k_weight: Array
    k_bias: Array
    v_weight: Array
    v_bias: Array
    proj_weight: Array
    proj_bias: Array
    fc1_weight: Array  # (M, C)
    fc1_bias: Array  # (M,)
    fc2_weight: Array  # (C, M)
    fc2_bias: Array  # (C,)


def dit_block_fold(
    block: BlockWeights,
    *,
    b_qkv: ArrayLike | None = None,
    b_proj: ArrayLike | None = None,
    b_fc1: ArrayLike | None = None,
) -> BlockWeights:
    """The block with the inputs of q/k/v, proj and fc1 divided by ``b``, (C,), and its output unchanged.

    * ``LN(x) (1 + gamma) + beta``: rows of beta and its bias ``/= b``; rows of gamma ``/= b`` with
      ``bias = (1 + bias) / b - 1``, since it is ``1 + gamma`` that must become ``(1 + gamma) / b``.
    * ``softmax(Q K^T) V`` is linear in V: rows of V and its bias ``/= b_proj``.
    * Consumers: columns ``*= b``.

    An adaLN linear without bias has ``adaln_bias = 0`` here, and needs one once folded. None leaves a site alone.
    """
    width = block.adaln_weight.shape[1]
    weight = np.array(block.adaln_weight, dtype=np.float64).reshape(6, width, width)
    bias = np.array(block.adaln_bias, dtype=np.float64).reshape(6, width)
    for shift, scale, b in ((0, 1, b_qkv), (3, 4, b_fc1)):
        if b is not None:
            weight[[shift, scale]] /= np.reshape(b, (width, 1))
            bias[shift] = bias[shift] / b
            bias[scale] = (1 + bias[scale]) / b - 1

    b_qkv, b_proj, b_fc1 = (
        np.ones(width) if b is None else np.asarray(b, dtype=np.float64) for b in (b_qkv, b_proj, b_fc1)
    )
    return replace(
        block,
        adaln_weight=weight.reshape(6 * width, width),
        adaln_bias=bias.reshape(6 * width),
        q_weight=block.q_weight * b_qkv,
        k_weight=block.k_weight * b_qkv,
        v_weight=block.v_weight * b_qkv / b_proj[:, None],
        v_bias=block.v_bias / b_proj,
        proj_weight=block.proj_weight * b_proj,
        fc1_weight=block.fc1_weight * b_fc1,
    )


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """LayerNorm over the last axis, without affine parameters."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def multi_head_attention(q: Array, k: Array, v: Array, heads: int) -> Array:
    """``softmax(Q K^T / sqrt(C / heads)) V`` head by head, on (N, T, C)."""
    n, tokens, width = q.shape
    q, k, v = (z.reshape(n, tokens, heads, width // heads).transpose(0, 2, 1, 3) for z in (q, k, v))
    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // heads)
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    return (probabilities @ v).transpose(0, 2, 1, 3).reshape(n, tokens, width)


def dit_block_forward(block: BlockWeights, x: ArrayLike, c: ArrayLike, heads: int) -> Array:
    """One DiT block: tokens ``x`` (N, T, C) under the condition ``c`` (N, C), before its SiLU -> (N, T, C)."""
    x, c = np.asarray(x, dtype=np.float64), np.asarray(c, dtype=np.float64)
    modulation = (c / (1 + np.exp(-c))) @ block.adaln_weight.T + block.adaln_bias
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = np.split(modulation[:, None], 6, axis=-1)

    z = layer_norm(x) * (1 + scale_msa) + shift_msa
    q = z @ block.q_weight.T + block.q_bias
    k = z @ block.k_weight.T + block.k_bias
    v = z @ block.v_weight.T + block.v_bias
    attention = multi_head_attention(q, k, v, heads)
    x = x + gate_msa * (attention @ block.proj_weight.T + block.proj_bias)

    z = layer_norm(x) * (1 + scale_mlp) + shift_mlp
    hidden = gelu_tanh(z @ block.fc1_weight.T + block.fc1_bias)
    return x + gate_mlp * (hidden @ block.fc2_weight.T + block.fc2_bias)
