"""Images to measure generated ones against: where they come from, and their statistics kept in a file."""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path, because
from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.metrics import Distances, FeatureNetwork, Gaussian, ReferenceStatistics, extract

_ADM_FITS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceSet:
    """Images (N, C, H, W) in [-1, 1]."""

    name: str
    images: Tensor
    fits: tuple[Gaussian, Gaussian] | None = None
    """Of pooled and spatial Inception features of more images than these, which ADM's files have."""


@dataclass(frozen=True, kw_only=True)
class ReferenceFeatures:
    """A reference set as a network sees it."""

    name: str
    network: FeatureNetwork
    statistics: ReferenceStatistics

    def distances(self, images: Tensor, on_progress: OnProgress = ignore) -> Distances:
        """How far (N, C, H, W) images are from it."""
        return self.statistics.distances(extract(self.network, images, on_progress=on_progress))


def read_reference(path: str | Path) -> ReferenceSet | ReferenceStatistics:
    """A folder of PNG; an ``.npz`` like ADM's, 8-bit images (N, H, W, C) as ``arr_0``; or kept statistics.

    Raises:
        ArgumentError: it is none of these, or the images are not of one size.
        MissingDependencyError: it is a folder, and Pillow is not installed.
    """
    path = as_path(path, "reference")
    if path.is_dir():
        return ReferenceSet(name=path.name, images=_in_unit_range(path, _folder_levels(path)))
    if path.suffix == ".npz":
        return _from_npz(path)
    if path.suffix == ".safetensors":
        return ReferenceStatistics.load(path)
    raise ArgumentError(f"reference {path} is neither a folder of PNG, nor .npz, nor .safetensors; check its name")


def reference_features(
    reference: ReferenceSet,
    network: FeatureNetwork,
    cache: str | Path | None = None,
    on_progress: OnProgress = ignore,
) -> ReferenceFeatures:
    """Measure a reference set, or read from ``cache`` what was measured of it before.

    Raises:
        ArgumentError: the file is of other images or another network.
    """
    cache = None if cache is None else as_path(cache, "cache")
    if cache is not None and cache.exists():
        statistics = ReferenceStatistics.load(cache).check(str(cache), network.name, reference.images)
        return ReferenceFeatures(name=reference.name, network=network, statistics=statistics)
    features = extract(network, reference.images, on_progress=on_progress)
    statistics = ReferenceStatistics.of(network.name, reference.images, features)
    if reference.fits is not None and network.is_inception:
        pooled, spatial = reference.fits
        statistics = dataclasses.replace(statistics, pooled_fit=pooled, spatial_fit=spatial)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(cache)
    return ReferenceFeatures(name=reference.name, network=network, statistics=statistics)


def _from_npz(path: Path) -> ReferenceSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", *_ADM_FITS) if name in file}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = because(error) if isinstance(error, OSError) else str(error)
        raise ArgumentError(f"cannot read reference images from {path}: {reason}; check the path") from error
    if "arr_0" not in arrays:
        raise ArgumentError(f"{path} has no array 'arr_0' of images")
    images = _in_unit_range(path, arrays.pop("arr_0"))
    if len(arrays) < len(_ADM_FITS):
        return ReferenceSet(name=path.name, images=images)
    mean, covariance, spatial_mean, spatial_covariance = (torch.from_numpy(arrays[name]).double() for name in _ADM_FITS)
    pooled = Gaussian(mean=mean, covariance=covariance)
    spatial = Gaussian(mean=spatial_mean, covariance=spatial_covariance)
    return ReferenceSet(name=path.name, images=images, fits=(pooled, spatial))


def _folder_levels(path: Path) -> np.ndarray:
    pillow: Any = require("PIL.Image", extra="diffusers")
    images = []
    for file in sorted(path.glob("*.png")):
        with pillow.open(file) as image:
            images.append(np.asarray(image if image.mode == "L" else image.convert("RGB")))
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1:
        raise ArgumentError(f"folder {path} holds {len(images)} PNG of sizes {shapes}; expected images of one size")
    return np.stack(images)


def _in_unit_range(path: Path, levels: np.ndarray) -> Tensor:
    """(N, H, W) or (N, H, W, C) 8-bit levels -> (N, C, H, W) in [-1, 1]."""
    if levels.dtype != np.uint8 or levels.ndim not in (3, 4):
        raise ArgumentError(f"{path} holds {levels.dtype} of shape {levels.shape}; expected uint8 and (N, H, W, C)")
    pixels = torch.from_numpy(levels.reshape(*levels.shape[:3], -1)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1
