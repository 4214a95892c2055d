"""How a float model and its quantized forms draw images that compare: equal labels, equal noise, one decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4dit_ao.calibration import Sampling, sample
from ptq4dit_ao.calibration.sampling import Denoiser
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler
from ptq4dit_ao.workflow.models import LoadedModel

OnCount = Callable[[int, int], None]
"""``(done, in all)``."""

NOISE_SEED = 3000
"""Of images that are compared: apart from those that calibrate, are predicted on, or fit a correction."""
BATCH = 100
"""Images that are drawn at once."""
DECODED = 8
"""Latents that are decoded at once: a VAE takes far more memory for an image than a transformer."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
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
        """How far the last call of ``on_step`` counts."""
        return -(-self.samples // BATCH) * (self.steps + (self.decode is not None))

    @torch.no_grad()
    def draw(
        self, denoiser: Denoiser, on_step: OnCount = lambda *_: None, correction: NoiseCorrection | None = None
    ) -> Tensor:
        """(samples, C, H, W) of all classes in turn."""
        generator = torch.Generator().manual_seed(self.seed)
        labels = (torch.arange(self.samples) % self.sampling.null_label).split(BATCH)
        scheduler = self.sampling.scheduler(self.steps)
        done, images = 0, []

        def advance(*_: int) -> None:
            nonlocal done
            done += 1
            on_step(done, self.units)

        for batch in labels:
            drawn = sample(
                denoiser,
                self.sampling,
                batch,
                steps=self.steps,
                guidance=self.guidance,
                generator=generator,
                scheduler=scheduler if correction is None else PTQDScheduler(scheduler, correction),
                on_step=advance,
            )
            if self.decode is not None:
                drawn = torch.cat([self.decode(part) for part in drawn.split(DECODED)])
                advance()
            images.append(drawn)
        return torch.cat(images)


def decoder(model: LoadedModel, sampling: Sampling) -> Callable[[Tensor], Tensor] | None:
    """What turns the model's latents into images: its pipeline's VAE. None if it draws images itself.

    Raises:
        ArgumentError: it draws latents, and has no VAE.
    """
    if sampling.channels in (1, 3):
        return None
    vae: Any = getattr(model.pipeline, "vae", None)
    if vae is None:
        raise ArgumentError(
            f"{model.name} denoises {sampling.channels}-channel latents and has no VAE to decode them; give the folder "
            "of its whole pipeline (--model)"
        )
    vae.eval().requires_grad_(False)
    return lambda latents: vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
