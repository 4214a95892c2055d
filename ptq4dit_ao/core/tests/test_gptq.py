"""GPTQ, refit, bias and ranges against plain NumPy, written from the papers' equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4dit_ao.core.clipping import clipped_activation_range, clipped_weight_range
from ptq4dit_ao.core.gptq import cholesky, gptq, gptq_and_scale, nearest
from ptq4dit_ao.core.qparams import affine_qparams, fake_quantize
from ptq4dit_ao.core.refit import corrected_bias, refit
from ptq4dit_ao.errors import CalibrationError

DAMPING = 0.01


def correlated(n: int, channels: int, seed: int = 0) -> Tensor:
    """Tokens whose channels are far from independent, and of very different size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels // 2, generator=g, dtype=torch.float64)
    mix = torch.randn(channels // 2, channels, generator=g, dtype=torch.float64)
    return (x @ mix + 0.3 * torch.randn(n, channels, generator=g, dtype=torch.float64)) * torch.logspace(
        -1, 1, channels
    )


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def optimal_brain_quantizer(w: np.ndarray, scale: np.ndarray, h: np.ndarray, low: int, high: int) -> np.ndarray:
    """GPTQ as its paper derives it (eq. 2 and 3): one column after another, H^-1 shrinking by Gaussian elimination."""
    h = h + DAMPING * np.diag(h).mean() * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable")
    w, h, result = w[:, order].copy(), h[np.ix_(order, order)], np.zeros_like(w)
    inverse = np.linalg.inv(h)
    for j in range(w.shape[1]):
        result[:, j] = np.clip(np.rint(w[:, j] / scale), low, high)
        error = (w[:, j] - result[:, j] * scale) / inverse[0, 0]
        w[:, j + 1 :] -= np.outer(error, inverse[0, 1:])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return result[:, np.argsort(order)]


def output_error(weight: Tensor, integers: Tensor, scale: Tensor, h: Tensor) -> float:
    change = integers.double() * scale.double().unsqueeze(1) - weight.double()
    return float(((change @ h) * change).sum())


@pytest.mark.parametrize("channels", [16, 200])  # more than one block of columns, too
@pytest.mark.parametrize("bounds", [(-8, 7), (-128, 127)])
def test_gptq_is_the_optimal_brain_quantizer(channels, bounds):
    h = second_moment(correlated(4 * channels, channels))
    weight = torch.randn(12, channels, generator=torch.Generator().manual_seed(1))
    scale = weight.abs().amax(1) / bounds[1]
    integers = gptq(weight, scale, h, *bounds, damping=DAMPING)
    expected = optimal_brain_quantizer(weight.double().numpy(), scale.double().numpy(), h.numpy(), *bounds)
    # float32 beside float64: what lies on a boundary may fall on either side, and then others do.
    assert (integers.numpy() == expected).mean() > 0.98
    assert integers.min() >= bounds[0] and integers.max() <= bounds[1] and integers.dtype == torch.int8


def test_gptq_keeps_the_output_where_channels_are_correlated():
    h = second_moment(correlated(500, 64))
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    scale = weight.abs().amax(1) / 7
    rounded, plain = gptq(weight, scale, h, -8, 7), nearest(weight, scale, -8, 7)
    assert output_error(weight, rounded, scale, h) < output_error(weight, plain, scale, h) / 4


@pytest.mark.parametrize("channels", [16, 200])
def test_each_channel_takes_the_scale_that_leaves_its_output_the_least_error(channels):
    h = second_moment(correlated(4 * channels, channels))
    weight = torch.randn(12, channels, generator=torch.Generator().manual_seed(1)) ** 3
    scales = torch.stack([weight.abs().amax(1) / 7.5 * ratio for ratio in (1.0, 0.9, 0.8, 0.7)])
    integers, scale = gptq_and_scale(weight, scales, h, -8, 7, damping=DAMPING)
    alone = [gptq(weight, s, h, -8, 7, damping=DAMPING) for s in scales]
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(channels)

    def error(q: Tensor, s: Tensor, row: int) -> float:
        return output_error(weight[row : row + 1], q[row : row + 1], s[row : row + 1], damped)

    best = [int(np.argmin([error(q, s, row) for q, s in zip(alone, scales, strict=True)])) for row in range(12)]
    assert torch.equal(scale, torch.stack([scales[k, row] for row, k in enumerate(best)]))
    assert torch.equal(integers, torch.stack([alone[k][row] for row, k in enumerate(best)]))
    assert len(set(best)) > 1


def test_gptq_with_independent_inputs_rounds_to_nearest():
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    scale = weight.abs().amax(1) / 7
    assert torch.equal(gptq(weight, scale, torch.eye(24), -8, 7), nearest(weight, scale, -8, 7))


def test_a_channel_that_is_never_used_is_rounded_to_nearest():
    x = correlated(200, 16)
    x[:, 5] = 0
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    scale = weight.abs().amax(1) / 7
    integers = gptq(weight, scale, second_moment(x), -8, 7)
    assert torch.equal(integers[:, 5], nearest(weight, scale, -8, 7)[:, 5])


@pytest.mark.parametrize("inverse", [False, True])
def test_an_indefinite_moment_gets_more_damping(inverse):
    h = torch.eye(4, dtype=torch.float64)
    h[0, 1] = h[1, 0] = 1.5  # 1 % and 10 % are not enough
    damped = h + torch.eye(4, dtype=torch.float64)
    found = cholesky(h.clone, 0.01, inverse=inverse)
    expected = torch.linalg.cholesky(damped.inverse(), upper=True) if inverse else torch.linalg.cholesky(damped)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(value):
    h = torch.eye(3)
    h[1, 1] = value
    with pytest.raises(CalibrationError, match="second moment of a layer's input is not finite"):
        gptq(torch.ones(2, 3), torch.ones(2), h, -8, 7)


def test_refit_is_the_regression_of_the_float_output_on_the_quantized_input():
    x = correlated(300, 12)
    q = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fitted = refit(weight, second_moment(q), q.T @ (x - q) / len(q), damping=1e-12)
    expected, *_ = np.linalg.lstsq(q.numpy(), (x @ weight.T).numpy(), rcond=None)
    np.testing.assert_allclose(fitted.numpy(), expected.T, rtol=1e-6, atol=1e-9)


def test_refit_leaves_a_weight_alone_where_nothing_was_quantized():
    x = correlated(300, 12)
    weight = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(refit(weight, second_moment(x), torch.zeros(12, 12)), weight)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_corrected_bias_restores_the_mean(with_bias):
    x, weight = correlated(300, 12) + 3, torch.randn(5, 12, dtype=torch.float64)
    q, rounded = x + 0.1, weight + 0.05
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    new = corrected_bias(bias, weight, x.mean(0), rounded, q.mean(0))
    expected = x @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close((q @ rounded.T + new).mean(0), expected.mean(0))


def qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return affine_qparams(low, high, 0, 15)


def clipped_error(x: Tensor, low: float, high: float, weight: Tensor) -> float:
    scale, zero_point = qparams(torch.tensor(low), torch.tensor(high))
    return float(((fake_quantize(x, scale, zero_point, 0, 15) - x) @ weight.T).square().sum())


@pytest.mark.parametrize("rows", [3, 40])  # fewer output channels than input channels, and more
def test_a_tail_is_cut_where_the_output_gains(rows):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 16, generator=g), torch.randn(rows, 16, generator=g)
    x[0, 3] = 40.0
    low, high = clipped_activation_range(x, float(x.min()), float(x.max()), weight, qparams, 0, 15)
    assert high < 20
    assert clipped_error(x, low, high, weight) < clipped_error(x, float(x.min()), 40.0, weight) / 2


def test_a_tail_stays_where_the_weights_listen_to_it():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 16, generator=g), torch.randn(8, 16, generator=g)
    x[::5, 3] = 40.0
    weight[:, 3] *= 30
    low, high = clipped_activation_range(x, float(x.min()), float(x.max()), weight, qparams, 0, 15)
    assert high > 35
    assert low >= float(x.min())


def test_cutting_that_counts_more_cuts_less():
    x, weight = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), torch.eye(16)
    ends = float(x.min()), float(x.max())
    widths = []
    for cutting in (1.0, 4.0, 64.0):
        low, high = clipped_activation_range(x, *ends, weight, qparams, 0, 15, cutting=cutting)
        widths.append(high - low)
    assert widths[0] < widths[1] < widths[2] <= ends[1] - ends[0]

    def noise(low: float, high: float) -> Tensor:
        """The noise that is to be small, with 4 times the square error for what is cut."""
        scale, zero_point = qparams(torch.tensor(low), torch.tensor(high))
        inside = x.clamp(float((0 - zero_point) * scale), float((15 - zero_point) * scale))
        return fake_quantize(x, scale, zero_point, 0, 15) - x + (inside - x)

    chosen = clipped_activation_range(x, *ends, weight, qparams, 0, 15, cutting=4.0)
    tried = [noise(*ends), noise(0.9 * ends[0], 0.9 * ends[1]), noise(0.7 * ends[0], 0.7 * ends[1])]
    assert noise(*chosen).square().sum() <= min(float(each.square().sum()) for each in tried)


def test_a_weight_is_cut_where_the_large_ones_do_not_matter():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    weight[2, 0] = 8.0
    importance = torch.ones(32)
    importance[0] = 1e-6

    def symmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_qparams(low, high, -8, 7, symmetric=True)

    low, high = clipped_weight_range(weight, importance, symmetric, -8, 7)
    assert high[2] < 6 and (low >= weight.amin(1)).all() and (high <= weight.amax(1)).all()
    low, high = clipped_weight_range(weight, torch.ones(32) * torch.tensor([1e6] + [1.0] * 31), symmetric, -8, 7)
    assert high[2] == 8.0


def test_single_precision_is_as_good(monkeypatch):
    x = torch.randn(400, 48) @ torch.randn(48, 48)
    weight, moment = torch.randn(16, 48), x.T @ x / len(x)
    scale = weight.abs().amax(1) / 7.5

    def error() -> float:
        noise = gptq(weight, scale, moment, -8, 7) * scale.unsqueeze(1) - weight
        return float((noise @ moment * noise).sum())

    double = error()
    monkeypatch.setattr("ptq4dit_ao.core.gptq.DOUBLE", 0)
    assert error() == pytest.approx(double, rel=0.02)
