"""Sampling of comparable images with a float model and its quantized models: equal labels, noise and decoder."""

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
"""Seed of the noise of compared images. It differs from the seeds of calibration, evaluation and noise correction."""
BATCH = 100
"""Number of images sampled at once."""
DECODED = 8
"""Number of latents decoded at once. A VAE takes far more memory per image than a transformer."""


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """Settings that, together with the model, determine the sampled images."""

    sampling: Sampling
    samples: int
    steps: int
    guidance: float
    seed: int
    """Seed of the starting noise."""
    decode: Callable[[Tensor], Tensor] | None = None
    """Decoder of latents to images in [-1, 1]; None if the model samples pixels."""

    @property
    def pixels(self) -> int | None:
        """Height and width of the images; None if they are decoded from latents."""
        return self.sampling.size if self.decode is None else None

    @property
    def units(self) -> int:
        """Total number of progress units, as the last call of ``on_progress`` reports it."""
        return -(-self.samples // BATCH) * (self.steps + (self.decode is not None))

    @torch.no_grad()
    def draw(
        self, denoiser: Denoiser, on_progress: OnProgress = ignore, correction: NoiseCorrection | None = None
    ) -> Tensor:
        """Sample images of all classes in turn: (samples, C, H, W) in [-1, 1]."""
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
    """Sample one image for each label, :data:`BATCH` at a time: (N,) -> (N, C, H, W) in [-1, 1].

    ``decode`` turns latents into images. Without it, the model has to sample pixels.
    """
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
    """Decoder of the model's latents to images, by its pipeline's VAE; None if the model samples pixels.

    Raises:
        ArgumentError: the model samples latents and has no VAE, or one for another number of channels.
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
    """VAE of the model's pipeline; None if there is none."""
    return getattr(model.pipeline, "vae", None)
