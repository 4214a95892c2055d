"""Statistics of a reference set, stored so that a feature network reads its images only once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.metrics.distribution import Gaussian, frechet_distance, inception_score, precision_recall
from ptq4dit_ao.metrics.features import Features, to_levels

FORMAT = TensorFormat(
    name="reference statistics",
    version=2,
    error=ArgumentError,
    remedy="measure them again (evaluate(cache=...) keeps them)",
)


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Distances of generated images from a reference set."""

    frechet: float
    """Frechet distance of pooled features (FID with Inception features)."""
    spatial_frechet: float
    """Frechet distance of spatial features (sFID with Inception features)."""
    inception_score: float
    """Inception score of the generated images alone."""
    precision: float
    """Fraction of generated images on the manifold of the reference set."""
    recall: float
    """Fraction of reference images on the manifold of the generated images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStatistics:
    """Statistics of a reference set, with the names of its feature network and images."""

    network: str
    """Name of the feature network."""
    checksum: str
    """Checksum of the images, :func:`images_checksum`."""
    pooled: Tensor
    """Features of the images, (N, D) float32."""
    pooled_fit: Gaussian
    spatial_fit: Gaussian

    @classmethod
    def of(cls, network: str, images: Tensor, features: Features) -> ReferenceStatistics:
        """Statistics of (N, C, H, W) images in [-1, 1] and the features that :func:`extract` found in them."""
        return cls(
            network=network,
            checksum=images_checksum(images),
            pooled=features.pooled.float(),
            pooled_fit=Gaussian.of(features.pooled),
            spatial_fit=Gaussian.of(features.spatial),
        )

    def distances(self, features: Features) -> Distances:
        """Distances of generated images from the set, by the features that :func:`extract` found with this network."""
        precision, recall = precision_recall(self.pooled, features.pooled)
        return Distances(
            frechet=frechet_distance(self.pooled_fit, Gaussian.of(features.pooled)),
            spatial_frechet=frechet_distance(self.spatial_fit, Gaussian.of(features.spatial)),
            inception_score=inception_score(features.probabilities),
            precision=precision,
            recall=recall,
        )

    def check(self, source: str, network: str, images: Tensor | None = None) -> ReferenceStatistics:
        """The statistics themselves, if they are of this network and, where given, of these images.

        Raises:
            ArgumentError: they are not. ``source`` is their name in the message.
        """
        if network != self.network:
            raise ArgumentError(f"{source} is of the network {self.network!r}, not of {network!r}; use another file")
        if images is not None and images_checksum(images) != self.checksum:
            raise ArgumentError(
                f"{source} is of {len(self.pooled)} other images than the {len(images)} given; use another file"
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically.

        Raises:
            ArgumentError: it cannot be written.
        """
        about = {"network": self.network, "images": str(len(self.pooled)), "checksum": self.checksum}
        tensors = {"pooled": self.pooled, **_fit_tensors("pooled", self.pooled_fit)}
        tensors |= _fit_tensors("spatial", self.spatial_fit)
        FORMAT.write(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics:
        """Read a file that :meth:`save` wrote.

        Raises:
            ArgumentError: the file is missing, is something else, or is damaged.
        """
        about, tensors = FORMAT.read(path)
        try:
            fits = {
                f"{name}_fit": Gaussian(mean=tensors[f"{name}_mean"], covariance=tensors[f"{name}_covariance"])
                for name in ("pooled", "spatial")
            }
            return cls(network=about["network"], checksum=about["checksum"], pooled=tensors["pooled"], **fits)
        except KeyError as error:
            raise ArgumentError(
                f"the reference statistics in {path} lack {error}; remove the file, and they are measured again"
            ) from error


def images_checksum(images: Tensor) -> str:
    """SHA-256 of the shape and the 8-bit levels of (N, C, H, W) images in [-1, 1]."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(to_levels(images).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _fit_tensors(name: str, fit: Gaussian) -> dict[str, Tensor]:
    return {f"{name}_mean": fit.mean, f"{name}_covariance": fit.covariance}
