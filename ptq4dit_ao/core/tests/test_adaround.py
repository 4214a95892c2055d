"""AdaRound's formulas against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq4dit_ao.core.adaround import exponent, inverse_rectified_sigmoid, rectified_sigmoid, undecided


def test_h_is_the_papers():
    v = np.linspace(-6, 6, 101)
    expected = np.clip(1 / (1 + np.exp(-v)) * (1.1 - -0.1) + -0.1, 0, 1)
    np.testing.assert_allclose(rectified_sigmoid(torch.tensor(v)), expected, atol=1e-12)
    assert expected.min() == 0 and expected.max() == 1


def test_v_starts_where_the_weight_lies():
    h = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)


@pytest.mark.parametrize("beta", [20.0, 2.0])
def test_the_regularizer_is_the_papers(beta):
    h = np.linspace(0, 1, 21)
    np.testing.assert_allclose(undecided(torch.tensor(h), beta), 1 - np.abs(2 * h - 1) ** beta, atol=1e-12)


def test_beta_falls_from_20_to_2_after_the_warm_up():
    assert exponent(0) is exponent(0.19) is None
    assert [exponent(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])
