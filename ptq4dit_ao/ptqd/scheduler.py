"""A diffusers scheduler that corrects a quantized model's noise before each step, and adds less of its own after it.

What the correction cannot remove is noise of known size, so the sampler's own noise is made smaller by as much
(He et al. 2023, "variance schedule calibration"). One step takes the predicted noise with the coefficient c, thus

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
"""By DDPM's ``variance_type``: sigma^2 from what its ``_get_variance`` returns."""


class PTQDScheduler:
    """``pipe.scheduler = PTQDScheduler(pipe.scheduler, table)``; all but ``step`` is the wrapped scheduler's.

    With classifier-free guidance, pipelines hand the guided noise to ``step``, and that is what is corrected.

    Args:
        scheduler: a ``DDIMScheduler`` or ``DDPMScheduler`` of diffusers that is told the noise (``epsilon``).
        table: of the model, the guidance scale and the timesteps that it will be used with.

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
        """The guidance scale that the table is of, for samplers to compare."""
        return self.table.guidance

    def __getattr__(self, name: str) -> Any:
        if name == "_scheduler":  # not there yet while copy or pickle make one
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
        """The wrapped scheduler's step from corrected noise.

        Args:
            model_output: (N, C, ...) noise, or (N, 2C, ...) with a learned variance, which stays as it is.
            timestep: one of the table's.
            sample: (N, C, ...).
            eta: DDIM's; ignored by DDPM, as diffusers' pipelines expect.
            use_clipped_model_output: DDIM's, too.
            generator: draws what the wrapped scheduler would draw.
            return_dict: else a tuple.

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
    """``sigma' / sigma``; 0 where quantization adds more than there is to be, or nothing is."""
    return ((variance - added).clamp(min=0) / variance.clamp(min=torch.finfo(variance.dtype).tiny)).sqrt()
