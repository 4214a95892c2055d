"""Closed-form corrections of a linear's float parameters, before and after its weight is rounded.

A layer's input is ``x`` in the float network and ``q`` in the quantized one. A regression of x on q gives the weight
and bias that bring ``q W'^T + bias'`` closest to ``x W^T + bias``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4dit_ao.core.gptq import cholesky, factored


def refit(weight: Tensor, moment: Tensor, cross: Tensor, *, damping: float = 0.01) -> Tensor:
    """The weight fitted to the float network's output by least squares.

    ``W' = W + W D^T`` with ``D = (Q + damping)^-1 E[q (x - q)^T]`` and ``Q = E[q q^T]``, as the best prediction of the
    float input is ``q + q D``. GPTAQ (arXiv 2504.02692) and QEP (arXiv 2504.09629) correct by the same term.

    Args:
        weight: (C_out, C_in).
        moment: Q, (C_in, C_in).
        cross: ``E[q (x - q)^T]``, (C_in, C_in).
        damping: term that is added to the diagonal of Q, as a fraction of its mean.
    """
    gain = cross.to(weight.dtype) @ weight.T  # before solving: C_out right-hand sides, often fewer than C_in
    factor = cholesky(factored(moment).clone, damping)
    return weight + torch.cholesky_solve(gain.to(factor.dtype), factor).T.to(weight.dtype)


def corrected_bias(bias: Tensor | None, weight: Tensor, mean: Tensor, rounded: Tensor, rounded_mean: Tensor) -> Tensor:
    """The bias that restores the output's mean: ``bias + W E[x] - W_q E[q]``, (C_out,).

    Args:
        bias: (C_out,) of the float layer, or None.
        weight: (C_out, C_in) of the float layer.
        mean: E[x], (C_in,) of the float layer's input.
        rounded: W_q, (C_out, C_in), of the quantized layer.
        rounded_mean: E[q], (C_in,) of the quantized layer's input.
    """
    change = weight.to(torch.float64) @ mean.to(torch.float64) - rounded.to(torch.float64) @ rounded_mean.to(
        torch.float64
    )
    return change if bias is None else bias.to(torch.float64) + change
