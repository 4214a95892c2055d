"""DDPM as the DiT authors sample, against the textbook: Ho et al. 2020 (eq. 6, 7), Nichol 2021 (eq. 15)."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from ptq4dit_ao.calibration import Sampling, SamplingPipeline, sample
from ptq4dit_ao.errors import ArgumentError, ArtifactError

LATENTS = Sampling(channels=4, size=4, null_label=3, clip=False, learned_variance=True, sampler="ddpm")
STEPS, GUIDANCE = 5, 1.5
RESPACED = [999, 749, 500, 250, 0]
"""np.linspace(0, 999, 5), rounded to even."""


def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Noise and variance that depend on everything."""
    shift = (y.float() / 10 + t.float() / 1000).view(-1, 1, 1, 1)
    return torch.cat([0.9 * x + 0.1 * shift, torch.tanh(x.flip(1) - shift)], dim=1)


def textbook(labels: Tensor, generator: torch.Generator, *, learned: bool) -> Tensor:
    """Every quantity in float64, from the betas of the steps that are left."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    x = torch.randn(len(labels), 4, 4, 4, generator=generator)
    for t, before in zip(RESPACED, [*RESPACED[1:], None], strict=True):
        a, a_before = float(abar[t]), 1.0 if before is None else float(abar[before])
        beta = 1 - a / a_before
        with_label = denoiser(x, torch.full_like(labels, t), labels)
        without = denoiser(x, torch.full_like(labels, t), torch.full_like(labels, 3))[:, :3]
        eps = torch.cat([without + GUIDANCE * (with_label[:, :3] - without), with_label[:, 3:4]], dim=1)
        mean = (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(1 - beta)
        if before is None:
            return mean
        least = math.log(beta * (1 - a_before) / (1 - a))
        part = (with_label[:, 4:] + 1) / 2 if learned else 0.0
        z = torch.randn(x.shape, generator=generator)
        x = mean + torch.exp(torch.as_tensor(0.5 * (part * math.log(beta) + (1 - part) * least))) * z
    raise AssertionError


@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_is_the_textbooks(learned):
    sampling, labels = dataclasses.replace(LATENTS, learned_variance=learned), torch.tensor([0, 1, 2])
    assert sampling.scheduler(STEPS).timesteps.tolist() == RESPACED
    generator = torch.Generator().manual_seed(5)
    drawn = sample(denoiser, sampling, labels, steps=STEPS, guidance=GUIDANCE, generator=generator)
    expected = textbook(labels, torch.Generator().manual_seed(5), learned=learned)
    torch.testing.assert_close(drawn, expected.float(), rtol=1e-4, atol=1e-5)


def test_ddim_takes_no_notice_of_a_learned_variance():
    def drawn(sampling: Sampling) -> Tensor:
        return sample(denoiser, sampling, torch.tensor([0, 1]), steps=3, generator=torch.Generator().manual_seed(5))

    learned = LATENTS.by("ddim")
    plain = dataclasses.replace(learned, learned_variance=False)
    assert torch.equal(drawn(learned), drawn(plain)) and learned.guided_channels == 4
    assert plain.scheduler(3).timesteps.tolist() == [666, 333, 0]


def test_it_travels_as_json():
    assert Sampling.from_dict(json.loads(json.dumps(LATENTS.to_dict()))) == LATENTS


@pytest.mark.parametrize("change", [{"size": "8"}, {"sampler": "dpm"}, {"clip": 1}, {"eta": 0.5}])
def test_what_travelled_is_checked(change):
    with pytest.raises(ArtifactError, match=f"the way to sample is .*{next(iter(change))}.*; quantize again"):
        Sampling.from_dict(LATENTS.to_dict() | change)


def test_a_sampler_that_is_not_there():
    with pytest.raises(ArgumentError, match="sampler is 'dpm'; choose one of ddim, ddpm"):
        LATENTS.by("dpm")


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_that_no_sampler_takes(steps):
    with pytest.raises(ArgumentError, match=f"steps is {steps}; it must lie between 1 and the model's 1000 timesteps"):
        sample(denoiser, LATENTS, torch.tensor([0]), steps=steps)


@torch.no_grad()
def test_a_transformer_in_16_bits_is_sampled_in_32(tiny_dit):
    sampling = Sampling(channels=4, size=8, null_label=10, clip=False)
    wide, narrow = (SamplingPipeline(model, sampling) for model in (tiny_dit, copy.deepcopy(tiny_dit).bfloat16()))
    expected, found = (
        pipeline([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        for pipeline in (wide, narrow)
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
