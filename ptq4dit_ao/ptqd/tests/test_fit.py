"""The regression is the textbook's, and what it measures on a known quantizer is what was put in."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4dit_ao.calibration import Sampling, sample
from ptq4dit_ao.calibration.sampling import trajectory
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler, fit_noise_correction
from ptq4dit_ao.ptqd.fit import solve, sums_of_moments

SAMPLING = Sampling(channels=3, size=8, null_label=5, clip=False)
LABELS = torch.arange(40) % 5
STEPS = 6
K = torch.linspace(0, 0.3, 1000)
MU = torch.tensor([0.2, -0.1, 0.05])
SIGMA = 0.04


def float_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Of data of mean y / 10 and variance 1/4, the noise that a perfect model predicts; a learned variance follows."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(-1, 1, 1, 1)
    eps = (1 - abar).sqrt() * (x - abar.sqrt() * y.view(-1, 1, 1, 1) / 10) / (1 - 0.75 * abar)
    return torch.cat([eps, torch.full_like(eps, torch.nan)], dim=1)


def quantized_model(seed: int):
    """``eps_q = (1 + k) eps + mu + noise`` before guidance, which multiplies mu by 1 and the noise by 1 here."""
    generator = torch.Generator().manual_seed(seed)

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        eps = float_model(x, t, y)[:, :3]
        noise = SIGMA * torch.randn(eps.shape, generator=generator)
        return (1 + K[t].view(-1, 1, 1, 1)) * eps + MU.view(-1, 1, 1) + noise

    return denoiser


def fit(quantized=None, **options) -> NoiseCorrection:
    return fit_noise_correction(
        float_model, quantized or quantized_model(0), SAMPLING, LABELS,
        **{"steps": STEPS, "guidance": 1.0, "generator": torch.Generator().manual_seed(1), **options},
    )  # fmt: skip


@pytest.mark.parametrize("slope", [0.2, -0.2])
def test_the_regression_is_numpys(slope):
    rng = np.random.default_rng(0)
    eps = rng.normal(0.5, 1, (3, 7, 2, 4, 4))  # (T, N, C, H, W)
    mean = np.array([0.3, -1]).reshape(2, 1, 1)
    eps_q = (1 + slope) * eps + mean + 0.1 * rng.normal(size=eps.shape)
    sums = [sums_of_moments(torch.from_numpy(e), torch.from_numpy(q)) for e, q in zip(eps, eps_q, strict=True)]
    found = solve(torch.stack(sums) / (7 * 4 * 4))
    for t in range(3):
        channel = np.broadcast_to(np.eye(2)[:, None, None], (7, 2, 4, 4, 2)).reshape(-1, 2)
        design = np.column_stack([eps[t].ravel(), channel])
        k = max(0, np.linalg.lstsq(design, (eps_q[t] - eps[t]).ravel())[0][0])
        rest = eps_q[t] - (1 + k) * eps[t]
        mu = rest.mean((0, 2, 3))
        sigma_q = (rest - mu.reshape(2, 1, 1)).std()
        for value, expected in zip(found, (k, mu, sigma_q), strict=True):
            np.testing.assert_allclose(value[t].numpy(), expected, rtol=1e-9)


def test_what_was_put_in_is_found():
    table = fit()
    torch.testing.assert_close(table.k.float(), K[table.timesteps], rtol=0, atol=2e-3)
    torch.testing.assert_close(table.mu.float(), MU.expand(STEPS, 3), rtol=0, atol=4e-3)
    torch.testing.assert_close(table.sigma_q.float(), torch.full((STEPS,), SIGMA), rtol=0.03, atol=0)
    assert table.timesteps.tolist() == SAMPLING.scheduler(STEPS).timesteps.tolist()
    assert (table.steps, table.guidance) == (STEPS, 1.0)


def test_the_noise_is_compared_after_guidance():
    """Guidance g adds g conditional and 1 - g unconditional noises."""
    table = fit(guidance=3.0)
    expected = SIGMA * (3**2 + 2**2) ** 0.5
    torch.testing.assert_close(table.sigma_q.float(), torch.full((STEPS,), expected), rtol=0.03, atol=0)
    torch.testing.assert_close(table.mu.float(), MU.expand(STEPS, 3), rtol=0, atol=2e-2)


def test_a_model_that_shrinks_its_noise_is_not_stretched():
    table = fit(lambda x, t, y: 0.9 * float_model(x, t, y))
    assert table.k.eq(0).all() and table.sigma_q.gt(0).all()


def test_batches_add_up():
    """The float trajectories differ by their noise, which is drawn batch by batch, and nothing else does."""
    seen = []
    table = fit(
        lambda x, t, y: 1.25 * float_model(x, t, y) + 0.5, batch_size=16, on_progress=lambda *at: seen.append(at)
    )
    torch.testing.assert_close(table.k, torch.full((STEPS,), 0.25).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(table.mu, torch.full((STEPS, 3), 0.5).double(), rtol=1e-4, atol=0)
    assert seen == [(i, 3 * STEPS) for i in range(1, 3 * STEPS + 1)]


def test_the_float_trajectory_is_followed():
    received = []

    def quantized(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        received.append(x[: len(LABELS)])
        return quantized_model(0)(x, t, y)

    fit(quantized)
    path = trajectory(
        float_model, SAMPLING, LABELS, steps=STEPS, guidance=1.0, generator=torch.Generator().manual_seed(1)
    )
    for x, step in zip(received, path, strict=True):
        assert torch.equal(x, step.x)


def test_corrected_samples_are_nearer_to_the_float_models():
    def draw(denoiser, table=None) -> Tensor:
        scheduler = None if table is None else PTQDScheduler(SAMPLING.scheduler(STEPS), table)
        return sample(
            denoiser, SAMPLING, LABELS, steps=STEPS, guidance=1.0, generator=torch.Generator().manual_seed(7),
            scheduler=scheduler,
        )  # fmt: skip

    expected = draw(float_model)
    plain, corrected = ((draw(quantized_model(3), table) - expected).square().mean().item() for table in (None, fit()))
    assert corrected < plain / 20


def test_a_schedulers_own_timesteps_are_fitted():
    from diffusers import DDPMScheduler

    table = fit(scheduler=DDPMScheduler(clip_sample=False, steps_offset=1))
    assert table.timesteps.tolist()[-1] == 1 and table.steps == STEPS


def test_what_cannot_be_fitted():
    message = r"the noise predicted at timestep 830 is not finite, or one constant"
    with pytest.raises(CalibrationError, match=message):
        fit(lambda x, t, y: float_model(x, t, y) * torch.nan)
    with pytest.raises(CalibrationError, match="there are no labels to sample"):
        fit_noise_correction(float_model, float_model, SAMPLING, LABELS[:0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; give a whole number of at least 1"),
        ({"labels": torch.tensor([6])}, "labels holds 6; the model knows 0 to 5"),
        (
            {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()},
            "prediction_type of FlowMatchEulerDiscreteScheduler",
        ),
    ],
)
def test_arguments_that_no_correction_can_be_fitted_with(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        fit_noise_correction(float_model, float_model, SAMPLING, **{"labels": LABELS, "steps": 2, **arguments})
