"""Reference sets that generated images are compared with: their sources, and their statistics stored in a file."""

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
    """A reference set of images (N, C, H, W) in [-1, 1]."""

    name: str
    images: Tensor
    fits: tuple[Gaussian, Gaussian] | None = None
    """Fits of pooled and spatial Inception features, which ADM's files contain.

    They are of more images than ``images``.
    """


@dataclass(frozen=True, kw_only=True)
class ReferenceFeatures:
    """Features of a reference set, measured by one network."""

    name: str
    network: FeatureNetwork
    statistics: ReferenceStatistics

    def distances(self, images: Tensor, on_progress: OnProgress = ignore) -> Distances:
        """Distances of (N, C, H, W) images from the reference set."""
        return self.statistics.distances(extract(self.network, images, on_progress=on_progress))


def read_reference(path: str | Path) -> ReferenceSet | ReferenceStatistics:
    """Read a reference set: a folder of PNG files, an ``.npz`` like ADM's, or stored statistics (``.safetensors``).

    An ``.npz`` has 8-bit images (N, H, W, C) as ``arr_0``.

    Raises:
        ArgumentError: it is none of these, or the images differ in size.
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
    """Measure a reference set, or read its statistics from the file ``cache`` if that exists.

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
        raise ArgumentError(f"{path} has no array 'arr_0' of images; write it with numpy.savez(path, images)")
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
    """Convert 8-bit levels, (N, H, W) or (N, H, W, C), to images (N, C, H, W) in [-1, 1]."""
    if levels.dtype != np.uint8 or levels.ndim not in (3, 4):
        raise ArgumentError(f"{path} holds {levels.dtype} of shape {levels.shape}; expected uint8 and (N, H, W, C)")
    pixels = torch.from_numpy(levels.reshape(*levels.shape[:3], -1)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1
