"""How a float model and its quantized forms draw images that compare: equal labels, equal noise, one decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.calibration import Sampling, sample
from ptq4dit_ao.calibration.sampling import Denoiser
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler
from ptq4dit_ao.workflow.models import LoadedModel

_log = logging.getLogger(__name__)


NOISE_SEED = 3000
"""Of images that are compared: apart from those that calibrate, are predicted on, or fit a correction."""
BATCH = 100
"""Images that are drawn at once."""
DECODED = 8
"""Latents that are decoded at once: a VAE takes far more memory for an image than a transformer."""


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """What decides an image but for the model."""

    sampling: Sampling
    samples: int
    steps: int
    guidance: float
    seed: int
    """Of the noise."""
    decode: Callable[[Tensor], Tensor] | None = None
    """From latents to images in [-1, 1]; None if the model draws these."""

    @property
    def units(self) -> int:
        """How far the last call of ``on_progress`` counts."""
        return -(-self.samples // BATCH) * (self.steps + (self.decode is not None))

    @torch.no_grad()
    def draw(
        self, denoiser: Denoiser, on_progress: OnProgress = ignore, correction: NoiseCorrection | None = None
    ) -> Tensor:
        """(samples, C, H, W) of all classes in turn."""
        scheduler = self.sampling.scheduler(self.steps)
        return draw_images(
            denoiser,
            self.sampling,
            torch.arange(self.samples) % self.sampling.null_label,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            scheduler=scheduler if correction is None else PTQDScheduler(scheduler, correction),
            decode=self.decode,
            on_progress=on_progress,
        )


@torch.no_grad()
def draw_images(
    denoiser: Denoiser,
    sampling: Sampling,
    labels: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    scheduler: Any = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    on_progress: OnProgress = ignore,
) -> Tensor:
    """One image for each label, some at a time: (N,) -> (N, C, H, W) in [-1, 1], through ``decode`` if it is given."""
    generator, parts = torch.Generator().manual_seed(seed), labels.split(BATCH)
    done, units = 0, len(parts) * (steps + (decode is not None))
    drawn: list[Tensor] = []

    def advance(*_: int) -> None:
        nonlocal done
        done += 1
        on_progress(done, units)

    for part in parts:
        result = sample(
            denoiser,
            sampling,
            part,
            steps=steps,
            guidance=guidance,
            generator=generator,
            scheduler=scheduler,
            on_progress=advance,
        )
        if decode is not None:
            result = torch.cat([decode(latents) for latents in result.split(DECODED)])
            advance()
        drawn.append(result)
    images = torch.cat(drawn)
    broken = int((~images.flatten(1).isfinite().all(1)).sum())
    if broken:
        _log.warning(
            "%d of %d images hold NaN or infinity: the model overflows; try another float dtype, or more bits",
            broken,
            len(images),
        )
    return images


def decoder(model: LoadedModel, sampling: Sampling) -> Callable[[Tensor], Tensor] | None:
    """What turns the model's latents into images: its pipeline's VAE. None if it draws images itself.

    Raises:
        ArgumentError: it draws latents, and has no VAE.
    """
    if sampling.channels in (1, 3):
        return None
    vae = vae_of(model)
    if vae is None:
        raise ArgumentError(
            f"{model.name} denoises {sampling.channels}-channel latents and has no VAE to decode them; give the folder "
            "of its whole pipeline (model=...)"
        )
    if vae.config.latent_channels != sampling.channels:
        raise ArgumentError(
            f"the VAE of {model.name} decodes {vae.config.latent_channels}-channel latents, and these have "
            f"{sampling.channels}; give the pipeline that the quantized model comes from (model=...)"
        )
    vae.eval().requires_grad_(False)
    scale = vae.config.scaling_factor
    return lambda latents: vae.decode(latents.to(vae.device, vae.dtype) / scale).sample.clamp(-1, 1).to(latents)


def vae_of(model: LoadedModel) -> Any:
    """What its pipeline decodes latents with; None if there is none."""
    return getattr(model.pipeline, "vae", None)
