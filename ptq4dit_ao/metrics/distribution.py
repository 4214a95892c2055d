"""Distances between sets of images in a network's feature space, as in ADM's evaluator.

ADM: Dhariwal and Nichol 2021 (arXiv 2105.05233). Everything is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError

NEIGHBOURS = 3
"""Number of nearest neighbours that define a manifold for precision and recall."""
SPLIT = 5000
"""Images per split of the inception score."""
BLOCK = 1000
"""Number of rows of a distance matrix that are in memory at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """Gaussian of features: mean (D,) and unbiased covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Fit a Gaussian to (N, D) features.

        Raises:
            ArgumentError: there are fewer than two images.
        """
        if len(features) < 2:
            raise ArgumentError(f"{len(features)} images have no covariance; give at least 2")
        features = features.double()
        return cls(mean=features.mean(0), covariance=torch.cov(features.T).reshape(features.shape[1], -1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` (Heusel et al. 2017, arXiv 1706.08500).

    The trace of the root equals that of ``(R^T S_b R)^(1/2)`` with ``R R^T = S_a``, which is symmetric. Unlike the root
    of ``S_a S_b``, it exists for singular covariances, too, and needs no offset on their diagonals. If fewer images
    than features were fitted, it is the limit of ADM's ``sqrtm`` as its offset of 1e-6 goes to zero.

    Raises:
        ArgumentError: the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ArgumentError(f"one set has {len(a.mean)} features, the other {len(b.mean)}; use one feature network")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt()
    shared = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * shared).item()


def inception_score(probabilities: Tensor, *, split: int = SPLIT) -> float:
    """Inception score ``exp(E_x KL(p(y|x) || p(y)))``, the mean over splits of (N, classes) probabilities.

    Source: Salimans et al. 2016 (arXiv 1606.03498). Splits are consecutive, and the last may be smaller. Up to
    ``split`` images are one split.
    """
    scores = []
    for part in probabilities.double().split(split):
        kl = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))  # 0 log 0 = 0
        scores.append(kl.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of (N, D) and (M, D) features.

    The manifold of a set is the union of the balls around its features, each of which reaches to the k-th nearest
    neighbour in the set. Precision is the fraction of generated features on the real manifold, and recall that of real
    features on the generated one.

    Raises:
        ArgumentError: a set has too few features, or their numbers of dimensions differ.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ArgumentError(
            f"precision and recall need more than {neighbours} images, got {len(real)} and {len(generated)}"
        )
    if real.shape[1] != generated.shape[1]:
        raise ArgumentError(f"one set has {real.shape[1]} features, the other {generated.shape[1]}; use one network")
    real, generated = real.double(), generated.double()
    return _share_on_manifold(generated, real, neighbours), _share_on_manifold(real, generated, neighbours)


def _share_on_manifold(features: Tensor, manifold: Tensor, neighbours: int) -> float:
    within = (_squared_distances(part, manifold) for part in manifold.split(BLOCK))
    radii = torch.cat([distances.kthvalue(1 + neighbours)[0] for distances in within])  # 1: the feature itself
    inside = [(_squared_distances(part, manifold) <= radii).any(1) for part in features.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of two sets of features: (N, D) and (M, D) -> (N, M)."""
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp_min(0)
