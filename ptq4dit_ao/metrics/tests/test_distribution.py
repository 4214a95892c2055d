"""Distances between sets: by hand, and against numpy and scipy written from the papers and ADM's evaluator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.spatial.distance import cdist
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.metrics import Gaussian, distribution, frechet_distance, inception_score, precision_recall


def features(n: int, d: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + shift


def gaussian(mean: list[float], variances: list[float]) -> Gaussian:
    covariance = torch.diag(torch.tensor(variances, dtype=torch.float64))
    return Gaussian(mean=torch.tensor(mean, dtype=torch.float64), covariance=covariance)


# -- Frechet distance ------------------------------------------------------------------------------------------------


def adm_frechet_distance(a: np.ndarray, b: np.ndarray, offset: float = 0.0) -> float:
    """ADM's evaluator: mean, ``np.cov``, and the root of the product."""
    mu = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.cov(x, rowvar=False) + offset * np.eye(x.shape[1]) for x in (a, b))
    return float(mu @ mu + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(linalg.sqrtm(cov_a @ cov_b)).real)


def test_two_gaussians_by_hand():
    # Independent axes: (m - m')^2 + (s - s')^2 each, s the standard deviation.
    assert frechet_distance(gaussian([1, 5], [4, 9]), gaussian([4, 5], [1, 25])) == pytest.approx(9 + 1 + 0 + 4)
    # One axis has no variance in one of them: the product is singular, the distance is not.
    assert frechet_distance(gaussian([0, 0], [4, 0]), gaussian([0, 0], [9, 16])) == pytest.approx(1 + 16)


def test_gaussians_that_do_not_commute_by_hand():
    a = Gaussian(mean=torch.zeros(2).double(), covariance=torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
    # For 2 x 2, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)); M = [[2, 4], [1, 8]].
    expected = 4 + 5 - 2 * (10 + 2 * 12**0.5) ** 0.5
    assert frechet_distance(a, gaussian([0, 0], [1, 4])) == pytest.approx(expected)


def test_fitted_gaussians_are_those_of_adm():
    a, b = features(300, 20), features(250, 20, seed=1, shift=0.3)
    expected = adm_frechet_distance(a.double().numpy(), b.double().numpy())
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(Gaussian.of(a), Gaussian.of(a)) == pytest.approx(0, abs=1e-6)


def test_fewer_images_than_features_need_no_offset():
    a, b = features(8, 20), features(9, 20, seed=1)
    distance = frechet_distance(Gaussian.of(a), Gaussian.of(b))
    with_offset = [adm_frechet_distance(a.double().numpy(), b.double().numpy(), 10.0**-n) for n in (4, 6, 8)]
    gaps = [abs(value - distance) for value in with_offset]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[1] < 1e-3 * distance


def test_features_of_one_number():
    a, b = features(50, 1), features(50, 1, seed=1)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected.item(), rel=1e-4)


def test_gaussians_that_cannot_be_compared():
    with pytest.raises(ArgumentError, match="one set has 2 features, the other 3; use one feature network"):
        frechet_distance(Gaussian.of(features(5, 2)), Gaussian.of(features(5, 3)))
    with pytest.raises(ArgumentError, match="1 images have no covariance; give at least 2"):
        Gaussian.of(features(1, 3))


# -- Inception score -------------------------------------------------------------------------------------------------


def adm_inception_score(probabilities: np.ndarray, split: int) -> float:
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    return float(np.mean(scores))


def test_certain_and_even_predictions_score_the_number_of_classes():
    assert inception_score(torch.eye(10).repeat(3, 1)) == pytest.approx(10)  # 0 log 0 = 0
    assert inception_score(torch.full((7, 10), 0.1)) == pytest.approx(1)


@pytest.mark.parametrize("split", [30, 100, 5000])
def test_the_score_is_that_of_adm(split):
    probabilities = features(100, 6).softmax(1)
    expected = adm_inception_score(probabilities.double().numpy(), split)
    assert inception_score(probabilities, split=split) == pytest.approx(expected, rel=1e-9)


# -- precision and recall --------------------------------------------------------------------------------------------


def paper_precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019, equations 1 and 2."""

    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        own = np.sort(cdist(manifold, manifold), axis=1)[:, k]  # position 0 is the point itself
        return float(np.mean([(cdist(point[None], manifold)[0] <= own).any() for point in points]))

    return share(generated, real), share(real, generated)


def test_points_on_a_line_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [50.0]])
    # Radii for k = 3: 3, 2, 2, 3, 49. So [-3, 6] and [1, 99] are real.
    generated = torch.tensor([[-3.5], [-3.0], [6.5], [0.5], [100.0]])
    # Radii: 10, 9.5, 10, 6, 103. All real ones are within those of 6.5 and 100.
    assert precision_recall(real, generated) == (3 / 5, 1.0)
    assert precision_recall(generated, real) == (1.0, 3 / 5)


@pytest.mark.parametrize("block", [7, 1000])
def test_precision_and_recall_are_those_of_the_paper(block, monkeypatch):
    monkeypatch.setattr(distribution, "BLOCK", block)
    real, generated = features(60, 5), 0.6 * features(50, 5, seed=1)
    for k in (1, 3):
        expected = paper_precision_recall(real.double().numpy(), generated.double().numpy(), k)
        assert max(expected) < 1 and min(expected) > 0 and expected[0] != expected[1]
        assert precision_recall(real, generated, neighbours=k) == pytest.approx(expected)


def test_a_set_is_on_its_own_manifold():
    assert precision_recall(features(40, 5), features(40, 5)) == (1.0, 1.0)


def test_sets_without_precision():
    with pytest.raises(ArgumentError, match="need more than 3 images, got 3 and 9"):
        precision_recall(features(3, 2), features(9, 2))
    with pytest.raises(ArgumentError, match="one set has 2 features, the other 4; use one network"):
        precision_recall(features(9, 2), features(9, 4))
