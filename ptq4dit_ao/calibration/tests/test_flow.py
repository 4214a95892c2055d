"""Flow matching: a Flux transformer's inputs from images and classes, and its sampler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from ptq4dit_ao import collect_from_pipeline
from ptq4dit_ao.calibration import Sampling, SamplingPipeline, as_denoiser, as_function, sample
from ptq4dit_ao.calibration.flow import TEXT_CLASSES, class_text, flow_inputs, to_images, to_tokens
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.reference import DIGITS, FLOW

FLOWING = dataclasses.replace(FLOW.sampling, size=8)
LABELS = torch.tensor([3, 0, 9])


@pytest.fixture(scope="module")
def tiny_flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**FLOW.config, "num_layers": 1, "num_single_layers": 1}).eval()


def test_tokens_are_patches_in_the_order_of_reading():
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    tokens = to_tokens(images, 4)
    assert torch.equal(tokens[1, 4], images[1, :, 4:8, 4:8].flatten())
    assert torch.equal(to_images(tokens, 4, images.shape), images)


def test_codes_of_classes_are_orthogonal_and_of_one_length():
    tokens, pooled = class_text(torch.arange(TEXT_CLASSES))
    codes = torch.cat([tokens.flatten(0, 1), pooled]).double()
    torch.testing.assert_close(codes @ codes.T / codes.shape[1], torch.eye(len(codes)).double(), rtol=0, atol=1e-5)


def test_places_are_those_of_the_patches():
    places = flow_inputs(torch.zeros(1, 1, 8, 12), torch.tensor([500.0]), LABELS[:1], 4)[4]
    assert places.tolist() == [[0, row, column] for row in range(2) for column in range(3)]


def test_the_exact_velocity_leads_to_the_image():
    target = torch.rand(3, 1, 8, 8) - 0.5

    def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (x - target.repeat(2, 1, 1, 1)) / (t / 1000).view(-1, 1, 1, 1)

    drawn = sample(exact, FLOWING, LABELS, steps=7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, target, rtol=0, atol=1e-5)


def test_a_graphs_function_samples_as_the_transformer(tiny_flux):
    run = as_function(tiny_flux, FLOWING)
    drawn = [
        sample(denoiser, FLOWING, LABELS, steps=3, generator=torch.Generator().manual_seed(0))
        for denoiser in (as_denoiser(tiny_flux, FLOWING), FLOWING.denoiser(run))
    ]
    assert torch.equal(*drawn) and drawn[0].shape == (3, 1, 8, 8)


@pytest.mark.parametrize("timesteps", [3, [1.0, 0.5005, 0.001]])
def test_timesteps_are_recorded_as_the_transformer_receives_them(tiny_flux, timesteps):
    samples = collect_from_pipeline(SamplingPipeline(tiny_flux, FLOWING), [1, 2, 3], timesteps=timesteps, steps=5)
    assert samples.timesteps.unique().tolist() == pytest.approx([0.001, 0.5005, 1.0])
    assert samples.inputs["hidden_states"].shape == (18, 4, 16) and samples.shared["img_ids"].shape == (4, 3)


def test_a_run_ends_with_the_last_timestep_that_is_recorded(tiny_flux, monkeypatch):
    calls = []
    monkeypatch.setattr(tiny_flux, "proj_out", torch.nn.Sequential(tiny_flux.proj_out))
    tiny_flux.proj_out.register_forward_hook(lambda *_: calls.append(1))
    collect_from_pipeline(SamplingPipeline(tiny_flux, FLOWING), [1], timesteps=[1.0, 0.75025], steps=5)
    assert len(calls) < 3


def test_it_travels_as_json_and_others_as_before():
    assert Sampling.from_dict(FLOW.sampling.to_dict()) == FLOW.sampling
    assert FLOW.sampling.to_dict()["patch"] == 4 and "patch" not in DIGITS.sampling.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": None}, "sampler is 'flow' and patch is None"),
        ({"sampler": "ddim"}, "sampler is 'ddim' and patch is 4"),
        ({"patch": 3}, "patch is 3; give a whole number that divides the size 28"),
        ({"patch": True}, "patch is True"),
        ({"null_label": 11}, "null_label is 11; models that read classes as text have one below 11"),
    ],
)
def test_a_flow_of_no_model(changes, message):
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(FLOW.sampling, **changes)


def test_samplers_that_do_not_fit():
    with pytest.raises(ArgumentError, match="'ddpm' does not fit a model that predicts velocity; choose 'flow'"):
        FLOW.sampling.by("ddpm")
    with pytest.raises(ArgumentError, match="'flow' does not fit a model that predicts noise; choose 'ddim' or 'ddpm'"):
        DIGITS.sampling.by("flow")
    assert FLOW.sampling.by("flow") == FLOW.sampling == FLOW.sampling.by(None)


def test_schedulers_that_do_not_fit():
    def zero(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)

    scheduler = DIGITS.sampling.scheduler(5)
    with pytest.raises(ArgumentError, match="a scheduler for velocity is 'DDIMScheduler'"):
        sample(zero, FLOWING, LABELS, steps=2, scheduler=scheduler)
    with pytest.raises(ArgumentError, match="prediction_type of FlowMatchEulerDiscreteScheduler is None"):
        sample(zero, DIGITS.sampling, LABELS, steps=2, scheduler=FlowMatchEulerDiscreteScheduler())
