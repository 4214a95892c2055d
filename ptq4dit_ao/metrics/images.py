"""Errors between paired images: sampled from the same noise with the float and the quantized model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4dit_ao.choices import LpipsNetwork
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.metrics import perceptual
from ptq4dit_ao.metrics.intervals import Estimate, bootstrap, bootstrap_mean

DATA_RANGE = 2.0
"""Range of images in [-1, 1]."""
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


@dataclass(frozen=True, kw_only=True)
class ImageErrors:
    """Errors over images, with bootstrap intervals over images.

    The mean square error is large in the one or two images that become another object, and its mean is theirs. The
    geometric mean and the median are of all images.
    """

    mse: Estimate
    """Mean of the images' mean square errors."""
    mse_geometric: Estimate
    """Geometric mean of them; 0 if an image is equal to its reference."""
    mse_median: Estimate
    psnr_db: Estimate
    """Mean of the images' PSNR; infinite if an image is equal to its reference."""
    ssim: Estimate
    lpips: Estimate | None = None
    """LPIPS, if it was asked for."""
    images: int
    data_range: float
    """Range of the images, which PSNR and SSIM use."""


def image_errors(
    reference: Tensor,
    images: Tensor,
    *,
    data_range: float = DATA_RANGE,
    lpips: LpipsNetwork | None = None,
    seed: int = 0,
) -> ImageErrors:
    """Compare images with their references, one by one.

    Args:
        reference: the reference images, (N, C, H, W).
        images: the images to compare, of the same shape.
        data_range: largest possible value minus smallest.
        lpips: a network to measure LPIPS with, too, for images in [-1, 1]; see :func:`lpips`.
        seed: seed of the intervals.

    Raises:
        ArgumentError: the shapes differ, or are not those of images; or see :func:`lpips`.
        MissingDependencyError: see :func:`lpips`.
    """
    mse = (_images(reference, images) - images.double()).square().flatten(1).mean(1)
    values = {"mse": mse, "psnr_db": 10 * torch.log10(data_range**2 / mse), "ssim": ssim(reference, images, data_range)}
    if lpips is not None:
        values["lpips"] = perceptual.lpips(reference, images, lpips)
    means = {name: bootstrap_mean(value.numpy(), seed=seed) for name, value in values.items()}
    return ImageErrors(
        **means,
        mse_geometric=_estimate(mse, lambda drawn: drawn.log().mean().exp(), seed),
        mse_median=_estimate(mse, lambda drawn: drawn.quantile(0.5), seed),
        images=len(images),
        data_range=data_range,
    )


def _estimate(values: Tensor, statistic: Callable[[Tensor], Tensor], seed: int) -> Estimate:
    """Estimate of a statistic of (N,) values."""
    return bootstrap(len(values), lambda rows: float(statistic(values[torch.from_numpy(rows)])), seed=seed)


def ssim(reference: Tensor, images: Tensor, data_range: float = DATA_RANGE) -> Tensor:
    """Structural similarity (Wang et al. 2004): (N, C, H, W) twice -> (N,) float64, mean over channels and positions.

    Local moments are weighted by a Gaussian window of 11 x 11 pixels with sigma 1.5, at the positions where it fits
    into the image. In images of fewer than 11 pixels the window has the largest odd size that fits: 7 x 7 for 8 x 8.
    Such values are comparable only among images of one size.

    Raises:
        ArgumentError: the shapes differ, or are not those of images.
    """
    x, y = _images(reference, images), images.double()
    window = _window(min(WINDOW, *((size - 1) // 2 * 2 + 1 for size in x.shape[2:])))
    mean_x, mean_y, xx, yy, xy = (_local_mean(z, window) for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _images(reference: Tensor, images: Tensor) -> Tensor:
    """The reference in float64, once both shapes are checked."""
    if reference.shape != images.shape or images.ndim != 4 or 0 in images.shape:
        raise ArgumentError(
            f"images have shape {tuple(images.shape)} and their references {tuple(reference.shape)}; expected one "
            "(N, C, H, W) of both"
        )
    return reference.double()


def _window(size: int) -> Tensor:
    """Gaussian window of size x size pixels that sums to 1."""
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * SIGMA**2))
    return torch.outer(line, line) / line.sum() ** 2


def _local_mean(x: Tensor, window: Tensor) -> Tensor:
    return F.conv2d(x.flatten(0, 1)[:, None], window[None, None]).unflatten(0, x.shape[:2])[:, :, 0]
