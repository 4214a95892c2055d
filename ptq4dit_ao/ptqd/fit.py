"""Measurement of a quantized denoiser's noise error along the float model's trajectory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.calibration.sampling import Denoiser, Sampling, guided_noise, scheduler_for, trajectory
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.ptqd.table import NoiseCorrection


@torch.no_grad()
def fit_noise_correction(
    float_denoiser: Denoiser,
    quantized_denoiser: Denoiser,
    sampling: Sampling,
    labels: Tensor,
    *,
    steps: int = 50,
    guidance: float = 1.5,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
    batch_size: int = 64,
    on_progress: OnProgress = ignore,
) -> NoiseCorrection:
    """Sample with the float model, and at each step regress the quantized model's error on the float model's noise.

    Args:
        float_denoiser: the float model, whose trajectory is followed.
        quantized_denoiser: the quantized model on any backend. It gets the same x at every step.
        sampling: properties of both models.
        labels: class labels (N,), one for each image.
        steps: steps of the sampler that the correction is for.
        guidance: guidance scale of the sampler that the correction is for. The noise is compared after classifier-free
            guidance.
        generator: generator of the starting noise.
        scheduler: the scheduler of diffusers that will be corrected. The default is that of ``sampling``.
        batch_size: number of labels sampled at a time.
        on_progress: called with (steps done, total steps).

    Raises:
        CalibrationError: there are no labels, or a model predicts values that are not finite.
        ArgumentError: see :func:`~ptq4dit_ao.calibration.sample`.
    """
    if len(labels) == 0:
        raise CalibrationError("there are no labels to sample; give some, best of every class")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size!r}; give a whole number of at least 1")
    batches = labels.split(batch_size)
    timesteps: list[int] = []
    scheduler = scheduler_for(sampling, steps, scheduler)
    taken = len(scheduler.timesteps)  # some schedulers add a step
    sums = torch.zeros(taken, len(_MOMENTS), sampling.channels, dtype=torch.float64)
    for done, batch in enumerate(batches):
        path = trajectory(
            float_denoiser, sampling, batch, steps=steps, guidance=guidance, generator=generator, scheduler=scheduler
        )
        for i, (t, x, eps, _) in enumerate(path):
            eps_q = guided_noise(quantized_denoiser, sampling, x, t, batch, guidance)
            sums[i] += sums_of_moments(eps.double(), eps_q.double())
            if done == 0:
                timesteps.append(int(t))
            on_progress(done * taken + i + 1, len(batches) * taken)
    k, mu, sigma_q = solve(sums / (len(labels) * sampling.size**2))
    bad = ~(k.isfinite() & sigma_q.isfinite())
    if bad.any():
        raise CalibrationError(
            f"the noise predicted at timestep {timesteps[int(bad.nonzero()[0])]} is not finite, or one constant; run "
            "both models on an input of that timestep"
        )
    return NoiseCorrection(timesteps=torch.tensor(timesteps), k=k, mu=mu, sigma_q=sigma_q, guidance=guidance)


_MOMENTS = ("eps", "d", "eps^2", "eps d", "d^2")
"""Moments that :func:`solve` needs, with d = eps_q - eps."""


def sums_of_moments(eps: Tensor, eps_q: Tensor) -> Tensor:
    """Sums of the moments that :func:`solve` needs, over all but the channels: (N, C, ...) twice -> (5, C)."""
    d = eps_q - eps
    columns = torch.stack([eps, d, eps * eps, eps * d, d * d])
    return columns.transpose(1, 2).flatten(2).sum(2)


def solve(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares fit from means of :func:`sums_of_moments`, (T, 5, C) -> k (T,), mu (T, C), sigma_q (T,).

    It fits ``d = k eps + mu_c`` over all elements of a step, with ``k`` not below 0. (The authors' code has one
    intercept for all channels, whose biases then leak into ``k``. It takes the mean of d for ``mu_c``, which differs by
    ``k E[eps]``.)
    """
    eps, d, eps_eps, eps_d, d_d = moments.unbind(1)
    k = ((eps_d - eps * d).mean(1) / (eps_eps - eps * eps).mean(1)).clamp(min=0)
    mu = d - k[:, None] * eps
    residual = (d_d - 2 * k[:, None] * eps_d + k[:, None].square() * eps_eps - mu.square()).mean(1)
    return k, mu, residual.clamp(min=0).sqrt()
