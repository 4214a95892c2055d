"""Feature networks, in whose feature space distances between sets of images are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.errors import ArgumentError

SPATIAL_CHANNELS = 7
"""Channels of the spatial features: ADM's sFID takes the first 7 of a map, about as many values as pooled ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features of N images."""

    pooled: Tensor
    """Pooled features before the classifier's head, (N, D)."""
    spatial: Tensor
    """A feature map from the middle of the network, (N, C, H, W)."""
    probabilities: Tensor
    """Class probabilities, (N, classes)."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A feature network with a name, which is reported with every metric that it measures.

    Wrap any module: ``read`` takes images (N, C, H, W) in [-1, 1] with 256 levels, resizes them if necessary, and
    returns :class:`Features`.
    """

    name: str
    read: Callable[[Tensor], Features]

    @property
    def is_inception(self) -> bool:
        """Whether its name begins with "inception". Only then is its distance called FID."""
        return self.name.lower().startswith("inception")


@torch.no_grad()
def extract(
    network: FeatureNetwork,
    images: Tensor,
    *,
    batch_size: int = 64,
    on_progress: OnProgress = ignore,
) -> Features:
    """Features of (N, C, H, W) images in [-1, 1], with ``spatial`` as (N, H * W * 7): ADM's channels and order.

    Images are rounded to 256 levels first, as they are on disk. ``on_progress`` is called with (images done, total
    images).

    Raises:
        ArgumentError: the network returns something else.
    """
    parts = []
    for batch in to_levels(images).split(batch_size):
        parts.append(_checked(network, network.read(batch.float() / 127.5 - 1), len(batch)))
        on_progress(sum(len(part.pooled) for part in parts), len(images))
    return Features(
        pooled=torch.cat([part.pooled for part in parts]),
        spatial=torch.cat([_first_channels(part.spatial) for part in parts]),
        probabilities=torch.cat([part.probabilities for part in parts]),
    )


def to_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit levels, uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _first_channels(spatial: Tensor) -> Tensor:
    return spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _checked(network: FeatureNetwork, features: Features, rows: int) -> Features:
    for name, axes in (("pooled", 2), ("spatial", 4), ("probabilities", 2)):
        tensor = getattr(features, name, None)
        if not isinstance(tensor, Tensor) or tensor.ndim != axes or len(tensor) != rows:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(
                f"feature network {network.name!r} returned {name} {got} for {rows} images; expected a tensor of "
                f"{axes} axes, the first of them {rows}"
            )
    return features
