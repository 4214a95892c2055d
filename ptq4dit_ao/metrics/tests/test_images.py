"""Image errors against loops written from the definitions, and bootstrap intervals against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.metrics import bootstrap, image_errors, ssim
from ptq4dit_ao.metrics.intervals import bootstrap_mean


def pictures(n: int = 3, channels: int = 2, height: int = 14, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(n, channels, height, width, generator=generator) * 2 - 1
    return reference, reference + 0.2 * torch.randn(reference.shape, generator=generator)


def ssim_by_loops(x: np.ndarray, y: np.ndarray, size: int, data_range: float) -> float:
    """Wang et al. 2004, equations 13 and 14 to 16, one channel: (H, W) twice."""
    offsets = np.arange(size) - (size - 1) / 2
    w = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for i in range(x.shape[0] - size + 1):
        for j in range(x.shape[1] - size + 1):
            a, b = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
            mu_a, mu_b = (w * a).sum(), (w * b).sum()
            var_a, var_b = (w * (a - mu_a) ** 2).sum(), (w * (b - mu_b) ** 2).sum()
            cov = (w * (a - mu_a) * (b - mu_b)).sum()
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            values.append((2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width", "window"), [(14, 12, 11), (11, 11, 11), (10, 30, 9), (8, 8, 7), (1, 5, 1)])
def test_ssim_is_that_of_the_paper_with_a_window_that_fits(height, width, window):
    x, y = pictures(height=height, width=width)
    expected = [
        np.mean([ssim_by_loops(a, b, window, 2.0) for a, b in zip(xs, ys, strict=True)])
        for xs, ys in zip(x.double().numpy(), y.double().numpy(), strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_equal_images_is_one():
    x, _ = pictures()
    assert ssim(x, x).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_psnr_is_the_mean_of_the_images_own():
    reference = torch.zeros(2, 1, 8, 8)
    images = torch.stack([torch.full((1, 8, 8), 0.2), torch.full((1, 8, 8), 0.02)])
    errors = image_errors(reference, images)
    assert errors.mse.value == pytest.approx((0.04 + 0.0004) / 2)
    assert errors.psnr_db.value == pytest.approx((20 + 40) / 2)  # 20 log10(2 / 0.2), 20 log10(2 / 0.02)
    assert (errors.images, errors.data_range) == (2, 2.0)
    assert image_errors(reference, images, data_range=1.0).psnr_db.value == pytest.approx(30 - 20 * math.log10(2))


def test_one_odd_image_makes_the_mean_and_not_the_geometric_mean_or_the_median():
    reference = torch.zeros(3, 1, 8, 8)
    images = torch.stack([torch.full((1, 8, 8), value) for value in (0.01, 0.1, 1.0)])
    errors = image_errors(reference, images)
    assert errors.mse.value == pytest.approx((1e-4 + 1e-2 + 1) / 3)
    assert errors.mse_geometric.value == pytest.approx(1e-2) and errors.mse_median.value == pytest.approx(1e-2)
    assert errors.psnr_db.value == pytest.approx(10 * math.log10(4 / errors.mse_geometric.value))


def test_equal_images_have_no_error():
    x, _ = pictures()
    errors = image_errors(x, x)
    assert errors.mse_geometric.high == 0 == errors.mse_median.high
    assert errors.mse.high == 0 and errors.psnr_db.low == errors.psnr_db.high == math.inf


def test_intervals_hold_the_mean():
    errors = image_errors(*pictures(n=20))
    for estimate in (errors.mse, errors.mse_geometric, errors.mse_median, errors.psnr_db, errors.ssim):
        assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize(("shape", "other"), [((2, 1, 8, 8), (2, 1, 8, 9)), ((8, 8), (8, 8)), ((0, 1, 8, 8),) * 2])
def test_what_are_not_pairs_of_images(shape, other):
    with pytest.raises(ArgumentError, match=r"images have shape \(.*\) and their references \(.*\); expected one"):
        image_errors(torch.zeros(shape), torch.zeros(other))


# -- bootstrap -------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(5).normal(3, 2, 400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert estimate.value == values.mean()
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_seed_decides_which_rows_are_drawn():
    def draws(seed: int) -> list[list[int]]:
        seen: list[list[int]] = []
        bootstrap(5, lambda rows: seen.append(rows.tolist()) or 0.0, seed=seed)
        return seen

    assert draws(1) == draws(1) != draws(2)
    assert draws(1)[-1] == [0, 1, 2, 3, 4] and len(draws(1)) == 1001


def test_infinite_values_do_not_spoil_an_interval():
    estimate = bootstrap(2, lambda rows: math.inf if rows[0] else 1.0)
    assert (estimate.low, estimate.high) == (1.0, math.inf)
