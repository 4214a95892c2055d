"""DDPM as the DiT authors sample, against the textbook: Ho et al. 2020 (eq. 6, 7), Nichol 2021 (eq. 15)."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import diffusers
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1001}, "steps is 1001; it must lie between 1 and the model's 1000 timesteps"),
        ({"steps": 2.0}, "steps is 2.0; it must lie"),
        ({"steps": True}, "steps is True; it must lie"),
        ({"guidance": math.nan}, "guidance is nan; give a finite number"),
        ({"guidance": None}, "guidance is None; give a finite number"),
        ({"labels": torch.tensor([4])}, "labels holds 4; the model knows 0 to 3"),
        ({"labels": torch.tensor([0, -1])}, "labels holds -1; the model knows 0 to 3"),
        (
            {"labels": torch.tensor([], dtype=torch.int64)},
            r"labels is \(0,\) torch.int64; give a tensor \(N,\) of whole",
        ),
        ({"labels": torch.tensor([0.5])}, r"labels is \(1,\) torch.float32; give"),
        ({"labels": torch.tensor(1)}, r"labels is \(\) torch.int64; give"),
        ({"labels": [0, 1]}, r"labels is \[0, 1\]; give a tensor"),
        ({"generator": 3}, "generator is 3; give a torch.Generator on the CPU"),
        ({"scheduler": "ddim"}, "prediction_type of str is None; choose one of epsilon"),
        (
            {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()},
            "prediction_type of FlowMatch.* is None; choose one",
        ),
        (
            {"scheduler": diffusers.DDIMScheduler(prediction_type="v_prediction")},
            "DDIMScheduler is 'v_prediction'; choose",
        ),
        (
            {"scheduler": diffusers.DDIMScheduler(500)},
            "DDIMScheduler counts 500 timesteps, and the model 1000; make it",
        ),
        ({"scheduler": diffusers.EulerDiscreteScheduler()}, "EulerDiscreteScheduler starts from scaled noise, or"),
        ({"scheduler": diffusers.HeunDiscreteScheduler()}, "HeunDiscreteScheduler starts from scaled noise, or"),
    ],
)
def test_arguments_that_cannot_be_sampled_with(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        sample(denoiser, LATENTS, **{"labels": torch.tensor([1]), "steps": 3, **arguments})


@pytest.mark.parametrize("guidance", [0, 1, 1.0])
def test_guidance_of_nothing_and_of_the_label_alone(guidance):
    """0 draws without a label, 1 with it and nothing else; one image is drawn as well as many."""
    sampling, labels = dataclasses.replace(LATENTS, sampler="ddim"), torch.tensor([2])
    drawn = sample(denoiser, sampling, labels, steps=3, guidance=guidance, generator=torch.Generator().manual_seed(1))
    x, scheduler = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), sampling.scheduler(3)
    for t in scheduler.timesteps:
        eps = denoiser(x, t[None], labels if guidance else torch.tensor([3]))[:, :4]
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(drawn, x)


def test_another_scheduler_that_is_told_the_noise():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    assert sample(denoiser, LATENTS, torch.tensor([1]), steps=3, scheduler=scheduler).isfinite().all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"channels": 0}, "channels of a sampling is 0; give a whole number of at least 1"),
        ({"size": 2.5}, "size of a sampling is 2.5; give a whole number"),
        ({"null_label": -1}, "null_label of a sampling is -1"),
        ({"train_timesteps": True}, "train_timesteps of a sampling is True"),
        ({"sampler": "euler"}, "sampler is 'euler'; choose one of ddim, ddpm"),
        (
            {"beta_schedule": "cosine"},
            "beta_schedule is 'cosine'; choose one of linear, scaled_linear, squaredcos_cap_v2",
        ),
    ],
)
def test_a_sampling_of_no_model(value, message):
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(LATENTS, **value)
    with pytest.raises(ArtifactError, match="the way to sample is .* quantize again"):
        Sampling.from_dict({**LATENTS.to_dict(), **value})


def test_a_transformer_that_is_not_drawn_by_class():
    with pytest.raises(
        ArgumentError, match="Linear is not class-conditional: its config has no num_embeds_ada_norm; sample"
    ):
        Sampling.of(torch.nn.Linear(2, 2))


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
