"""Steps of the wrapped schedulers against the paper's formulas in NumPy float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)
from torch import Tensor

from ptq4dit_ao.calibration import Sampling, sample
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler

STEPS = 10
TIMESTEPS = [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
K, MU = 0.25, np.array([0.5, -1.0])


def table(sigma_q: float, channels: int = 2, k: float = K) -> NoiseCorrection:
    return NoiseCorrection(
        timesteps=torch.tensor(TIMESTEPS),
        k=torch.full((STEPS,), k, dtype=torch.float64),
        mu=torch.from_numpy(np.resize(MU, (STEPS, channels))),
        sigma_q=torch.full((STEPS,), sigma_q, dtype=torch.float64),
        guidance=1.5,
    )


def wrapped(kind: type, sigma_q: float, **config: object) -> PTQDScheduler:
    scheduler = PTQDScheduler(kind(clip_sample=False, **config), table(sigma_q))
    scheduler.set_timesteps(STEPS)
    return scheduler


def draw(shape: tuple[int, ...] = (2, 2, 3, 3), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(scheduler, t: int, output: Tensor, x: Tensor, **options: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    return scheduler.step(output, torch.tensor(t), x, generator=generator, **options).prev_sample.double().numpy()


def corrected(eps: Tensor) -> np.ndarray:
    return (eps.double().numpy() - MU.reshape(2, 1, 1)) / (1 + K)


def abars(t: int) -> tuple[float, float]:
    return ABAR[t], ABAR[t - 100] if t >= 100 else 1.0


def ddpm(eps: np.ndarray, x: np.ndarray, t: int, variance: np.ndarray, sigma_q: float) -> np.ndarray:
    """``(x - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sigma' z`` of Ho et al. 2020, and PTQD's variance."""
    abar, previous = abars(t)
    alpha = abar / previous
    beta = 1 - alpha
    mean = (x - beta / np.sqrt(1 - abar) * eps) / np.sqrt(alpha)
    left = np.maximum(0, variance - beta**2 / (alpha * (1 - abar)) * sigma_q**2 / (1 + K) ** 2)
    return mean + np.sqrt(left) * draw(seed=5).double().numpy()


def variances(t: int) -> tuple[float, float]:
    """The smallest and the largest that make sense: beta~ and beta."""
    abar, previous = abars(t)
    beta = 1 - abar / previous
    return (1 - previous) / (1 - abar) * beta, beta


@pytest.mark.parametrize("sigma_q", [0.0, 0.3, 1e3])
@pytest.mark.parametrize("t", [900, 500, 100])
@pytest.mark.parametrize(("kind", "which"), [("fixed_small", 0), ("fixed_small_log", 0), ("fixed_large", 1)])
def test_ddpm_adds_what_quantization_has_not_added(kind, which, t, sigma_q):
    eps, x = draw(seed=1), draw(seed=2)
    found = step(wrapped(DDPMScheduler, sigma_q, variance_type=kind), t, eps, x)
    expected = ddpm(corrected(eps), x.double().numpy(), t, np.array(variances(t)[which]), sigma_q)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "t"), [("learned_range", 500), ("learned_range", 100), ("learned", 500)])
def test_a_learned_variance_is_lessened_for_each_element(kind, t):
    eps, x, raw = draw(seed=1), draw(seed=2), draw(seed=3).sigmoid()
    small, large = variances(t)
    fraction = (raw.double().numpy() + 1) / 2
    learned = {"learned": raw.double().numpy(), "learned_range": large**fraction * small ** (1 - fraction)}[kind]
    squared_c = large**2 / ((1 - large) * (1 - ABAR[t]))
    sigma_q = (1 + K) * float(np.sqrt(np.median(learned) / squared_c))  # half of the elements have less
    found = step(wrapped(DDPMScheduler, sigma_q, variance_type=kind), t, torch.cat([eps, raw], dim=1), x)
    expected = ddpm(corrected(eps), x.double().numpy(), t, learned, sigma_q)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # roots of differences that are nearly 0, in float32


def ddim(eps: np.ndarray, x: np.ndarray, t: int, eta: float, sigma_q: float) -> np.ndarray:
    """Equation 12 of Song et al. 2020, and PTQD's variance."""
    abar, previous = abars(t)
    variance = eta**2 * variances(t)[0]
    direction = np.sqrt(1 - previous - variance)
    coefficient = abs(direction - np.sqrt(previous * (1 - abar) / abar))
    x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    left = 0 if eta == 0 else max(0, variance - coefficient**2 * sigma_q**2 / (1 + K) ** 2)
    return np.sqrt(previous) * x0 + direction * eps + np.sqrt(left) * draw(seed=5).double().numpy()


@pytest.mark.parametrize("sigma_q", [0.0, 0.3, 1e3])
@pytest.mark.parametrize("t", [900, 500, 0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_adds_what_quantization_has_not_added(eta, t, sigma_q):
    eps, x = draw(seed=1), draw(seed=2)
    found = step(wrapped(DDIMScheduler, sigma_q), t, eps, x, eta=eta)
    np.testing.assert_allclose(found, ddim(corrected(eps), x.double().numpy(), t, eta, sigma_q), atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [(DDPMScheduler, {}), (DDIMScheduler, {"eta": 0.7})])
def test_a_table_of_zeros_changes_nothing(kind, options):
    plain = kind(clip_sample=True)
    zeros = NoiseCorrection(
        timesteps=torch.tensor(TIMESTEPS), k=torch.zeros(STEPS).double(), mu=torch.zeros(STEPS, 2).double(),
        sigma_q=torch.zeros(STEPS).double(), guidance=1.0,
    )  # fmt: skip
    both = plain, PTQDScheduler(copy.deepcopy(plain), zeros)
    for t in TIMESTEPS:
        results = []
        for scheduler in both:
            scheduler.set_timesteps(STEPS)
            results.append(step(scheduler, t, draw(seed=1), draw(seed=2), **options))
        np.testing.assert_allclose(*results, atol=1e-6)


def test_variance_noise_is_lost_with_quantization():
    """The claim behind the formula: noisy eps and less noise together vary as float eps and sigma do."""
    t, sigma_q, shape = 500, 0.3, (1, 2, 300, 300)
    noise = draw(shape, seed=8) * sigma_q
    for kind, options in ((DDPMScheduler, {}), (DDIMScheduler, {"eta": 1.0})):
        eps_q = (1 + K) * torch.zeros(shape) + torch.from_numpy(MU).float().view(2, 1, 1) + noise
        found = step(wrapped(kind, sigma_q), t, eps_q, torch.zeros(shape), **options)
        assert found.var() == pytest.approx(variances(t)[0], rel=0.02)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_everything_else_is_the_schedulers_own(kind):
    inner = kind(beta_schedule="scaled_linear")
    scheduler = PTQDScheduler(inner, table(0.1))
    scheduler.set_timesteps(STEPS)
    assert inner.num_inference_steps == scheduler.num_inference_steps == STEPS
    assert scheduler.timesteps is inner.timesteps and scheduler.config is inner.config
    assert scheduler.init_noise_sigma == inner.init_noise_sigma and scheduler.order == 1
    x = draw()
    assert torch.equal(scheduler.scale_model_input(x, 900), x)
    out = scheduler.step(x, 900, x, generator=torch.Generator().manual_seed(0))
    tuples = scheduler.step(x, 900, x, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert (
        type(tuples) is tuple
        and torch.equal(tuples[0], out.prev_sample)
        and torch.equal(tuples[1], out.pred_original_sample)
    )
    assert copy.deepcopy(scheduler).num_inference_steps == STEPS
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = scheduler.nonsense


def test_schedulers_that_cannot_be_corrected():
    with pytest.raises(ArgumentError, match="corrects DDIMScheduler and DDPMScheduler, not DPMSolverMultistepSched"):
        PTQDScheduler(DPMSolverMultistepScheduler(), table(0.1))
    with pytest.raises(ArgumentError, match="not PTQDScheduler"):
        PTQDScheduler(wrapped(DDIMScheduler, 0.1), table(0.1))
    with pytest.raises(ArgumentError, match="prediction_type is 'v_prediction'; choose one of epsilon"):
        PTQDScheduler(DDIMScheduler(prediction_type="v_prediction"), table(0.1))
    with pytest.raises(ArgumentError, match="variance_type is 'fixed_large_log'; choose one of fixed_small"):
        PTQDScheduler(DDPMScheduler(variance_type="fixed_large_log"), table(0.1))


def test_a_step_that_was_not_fitted():
    scheduler = wrapped(DDIMScheduler, 0.1)
    scheduler.set_timesteps(7)
    with pytest.raises(ArgumentError, match=r"no timestep 852; it was fitted for 10 steps at 900, 800, 700, \.\.\., 0"):
        scheduler.step(draw(), scheduler.timesteps[0], draw())


def test_a_pipeline_hands_over_guided_noise():
    """DiTPipeline with learned variance: what the wrapped scheduler receives is the guided noise, corrected."""
    transformer = randomize_(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
            patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        ),
        seed=0,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    noise = table(0.1, channels=4)

    def run(seed: int = 3) -> list[np.ndarray]:
        received = []
        inner = getattr(pipe.scheduler, "_scheduler", pipe.scheduler)
        own = inner.step
        inner.step = lambda eps, t, x, **options: (received.append(eps), own(eps, t, x, **options))[1]
        pipe([1, 2], generator=torch.Generator().manual_seed(seed), num_inference_steps=STEPS, output_type="pt")
        inner.step = own
        return received

    plain = run()
    pipe.scheduler = PTQDScheduler(pipe.scheduler, noise)
    torch.testing.assert_close(run()[0], noise.correct(plain[0], 900))


def test_a_table_of_another_guidance_is_refused_where_the_guidance_is_known():
    sampling = Sampling(channels=2, size=3, null_label=5, clip=False)
    scheduler = PTQDScheduler(sampling.scheduler(STEPS), table(0.1))

    def run(guidance: float) -> Tensor:
        return sample(
            lambda x, t, y: x, sampling, torch.tensor([1]), steps=STEPS, guidance=guidance, scheduler=scheduler
        )

    assert run(1.5).isfinite().all()
    with pytest.raises(
        ArgumentError, match=r"guidance is 4, and the correction of the scheduler was fitted at 1\.5; sample"
    ):
        run(4.0)


def test_what_is_no_table_and_no_timestep():
    with pytest.raises(ArgumentError, match="the table is a NoneType; give a NoiseCorrection"):
        PTQDScheduler(DDIMScheduler(), None)
    scheduler, x = wrapped(DDIMScheduler, 0.1), draw()
    whole = scheduler.step(x, 500.0, x).prev_sample
    assert torch.equal(whole, scheduler.step(x, torch.tensor(500), x).prev_sample)
    with pytest.raises(ArgumentError, match=r"has no timestep 500\.4; it was fitted for 10 steps"):
        scheduler.step(x, 500.4, x)
    with pytest.raises(ArgumentError, match=r"the timestep of a noise correction is tensor\(\[500, 400\]\); give one"):
        scheduler.step(x, torch.tensor([500, 400]), x)
