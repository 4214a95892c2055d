"""Scheduler that corrects a quantized model's noise before each step, and reduces its own noise after it.

The error that the correction cannot remove is noise of known variance, so the sampler's own noise is reduced by that
variance (He et al. 2023, "variance schedule calibration"). One step uses the predicted noise with the coefficient c,
thus

    sigma'^2 = max(0, sigma^2 - c^2 sigma_q^2 / (1 + k)^2)

    DDPM  c^2 = beta_t^2 / (alpha_t (1 - abar_t))
    DDIM  c   = |sqrt(1 - abar_prev - sigma^2) - sqrt(abar_prev (1 - abar_t) / abar_t)|
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao._optional import require
from ptq4dit_ao.errors import ArgumentError, check_choice
from ptq4dit_ao.ptqd.table import NoiseCorrection

_AS_VARIANCE = {
    "fixed_small": lambda value: value,
    "fixed_small_log": torch.square,
    "fixed_large": lambda value: value,
    "learned": lambda value: value,
    "learned_range": torch.exp,
}
"""DDPM's ``variance_type`` -> function from the result of its ``_get_variance`` to sigma^2."""


class PTQDScheduler:
    """A scheduler with noise correction, for ``pipe.scheduler = PTQDScheduler(pipe.scheduler, table)``.

    All attributes except ``step`` are those of the wrapped scheduler. With classifier-free guidance, pipelines pass the
    guided noise to ``step``, and that is what is corrected.

    Args:
        scheduler: a ``DDIMScheduler`` or ``DDPMScheduler`` of diffusers with ``prediction_type`` epsilon.
        table: correction for the model, guidance scale and timesteps that it will be used with.

    Raises:
        ArgumentError: it is another scheduler.
        MissingDependencyError: diffusers is not installed.
    """

    def __init__(self, scheduler: Any, table: NoiseCorrection) -> None:
        diffusers = require("diffusers", extra="diffusers")
        if not isinstance(scheduler, diffusers.DDIMScheduler | diffusers.DDPMScheduler):
            raise ArgumentError(
                f"PTQD corrects DDIMScheduler and DDPMScheduler, not {type(scheduler).__name__}; make one of these "
                "with from_config(pipe.scheduler.config)"
            )
        check_choice("the scheduler's prediction_type", scheduler.config.prediction_type, ("epsilon",))
        self._is_ddim = isinstance(scheduler, diffusers.DDIMScheduler)
        if not self._is_ddim:
            check_choice("the scheduler's variance_type", scheduler.config.variance_type, tuple(_AS_VARIANCE))
        if not isinstance(table, NoiseCorrection):
            raise ArgumentError(f"the table is a {type(table).__name__}; give a NoiseCorrection (fit_noise_correction)")
        self._scheduler = scheduler
        self.table = table

    @property
    def fitted_guidance(self) -> float:
        """Guidance scale of the table, which samplers compare with their own."""
        return self.table.guidance

    def __getattr__(self, name: str) -> Any:
        if name == "_scheduler":  # copy and pickle ask for it before it is set
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the wrapped scheduler's step with the corrected noise.

        Args:
            model_output: noise (N, C, ...), or (N, 2C, ...) with a learned variance, which stays unchanged.
            timestep: one of the table's timesteps.
            sample: the current sample, (N, C, ...).
            eta: DDIM's eta. DDPM ignores it, as diffusers' pipelines expect.
            use_clipped_model_output: as for DDIM. DDPM ignores it.
            generator: generator of the noise that the wrapped scheduler adds.
            return_dict: return diffusers' output class instead of a tuple.

        Raises:
            ArgumentError: the table has no such timestep, or other channels.
        """
        channels = sample.shape[1]
        eps = self.table.correct(model_output[:, :channels], timestep)
        corrected = torch.cat([eps, model_output[:, channels:]], dim=1)
        timestep = int(timestep) if isinstance(timestep, float) else timestep  # the table has it, so it is whole
        if self._is_ddim:
            out = self._ddim_step(corrected, timestep, sample, eta, use_clipped_model_output, generator)
        else:
            out = self._ddpm_step(corrected, timestep, sample, generator)
        return out if return_dict else (out.prev_sample, out.pred_original_sample)

    def _ddim_step(
        self, corrected: Tensor, timestep: int | Tensor, sample: Tensor, eta: float, clipped: bool, generator: Any
    ) -> Any:
        inner = self._scheduler
        noise = None
        if eta > 0:
            previous = timestep - inner.config.num_train_timesteps // inner.num_inference_steps
            abar = inner.alphas_cumprod[timestep]
            abar_previous = inner.alphas_cumprod[previous] if previous >= 0 else inner.final_alpha_cumprod
            variance = eta**2 * inner._get_variance(timestep, previous)
            c = (1 - abar_previous - variance).sqrt() - (abar_previous * (1 - abar) / abar).sqrt()
            draw = require("diffusers.utils.torch_utils", extra="diffusers").randn_tensor
            noise = draw(sample.shape, generator=generator, device=corrected.device, dtype=corrected.dtype)
            noise = noise * _left(variance, c**2 * self.table.remaining_variance(timestep))
        return inner.step(corrected, timestep, sample, eta=eta, use_clipped_model_output=clipped, variance_noise=noise)

    def _ddpm_step(self, corrected: Tensor, timestep: int | Tensor, sample: Tensor, generator: Any) -> Any:
        inner = self._scheduler
        out = inner.step(corrected, timestep, sample, generator=generator)
        previous = inner.previous_timestep(timestep)
        abar = inner.alphas_cumprod[timestep]
        abar_previous = inner.alphas_cumprod[previous] if previous >= 0 else inner.one
        alpha = abar / abar_previous
        beta = 1 - alpha
        mean = abar_previous.sqrt() * beta / (1 - abar) * out.pred_original_sample
        mean = mean + alpha.sqrt() * (1 - abar_previous) / (1 - abar) * sample
        learned = corrected[:, sample.shape[1] :] if corrected.shape != sample.shape else None
        variance = _AS_VARIANCE[inner.config.variance_type](inner._get_variance(timestep, learned).float())
        squared_c = beta**2 / (alpha * (1 - abar))
        left = _left(variance, squared_c * self.table.remaining_variance(timestep))
        out.prev_sample = mean + left.to(mean.dtype) * (out.prev_sample - mean)
        return out


def _left(variance: Tensor, added: Tensor) -> Tensor:
    """The factor ``sigma' / sigma`` for the sampler's noise; 0 where quantization adds more, or sigma is 0."""
    return ((variance - added).clamp(min=0) / variance.clamp(min=torch.finfo(variance.dtype).tiny)).sqrt()
