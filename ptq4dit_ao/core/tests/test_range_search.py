"""The papers' range searches against plain NumPy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq4dit_ao.core.qparams import affine_qparams
from ptq4dit_ao.core.range_search import search_range
from ptq4dit_ao.core.tests import reference

NORM = {"percentile": 2.0, "lp": 2.4}
CANDIDATES = {
    "percentile": reference.percentile_ranges,
    "lp": lambda row: reference.shrunk_ranges(row.min(), row.max()),
}


def heavy_tailed(rows: int, n: int, seed: int) -> Tensor:
    """Values of which some are far out, and more of them above than below."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    return x**3 + 0.5 * x.abs()


def integers(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def searched(x: Tensor, how: str, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    quant_min, quant_max = integers(bits, symmetric)
    qparams = partial(affine_qparams, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric)
    return search_range(x, *torch.aminmax(x, dim=1), how, qparams, quant_min, quant_max)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NORM)), st.integers(3, 8), st.booleans(), st.integers(0, 99), st.integers(1, 3000))
def test_each_row_gets_the_candidate_of_least_error(how, bits, symmetric, seed, n):
    x = heavy_tailed(3, n, seed)
    found = torch.stack(searched(x, how, bits, symmetric), dim=1)
    for ends, row in zip(found.double().numpy(), x.double().numpy(), strict=True):
        candidates = CANDIDATES[how](row)
        qmin, qmax = integers(bits, symmetric)
        error = partial(reference.range_error, row, p=NORM[how], qmin=qmin, qmax=qmax, symmetric=symmetric)
        assert np.isclose(ends, candidates, rtol=1e-5, atol=1e-6).all(1).any()
        assert error(*ends) == pytest.approx(min(error(*c) for c in candidates), rel=1e-4, abs=1e-12)


def test_few_bits_cut_more():
    x = heavy_tailed(1, 5000, 0)
    for how in NORM:
        _, wide = searched(x, how, 8, symmetric=False)
        _, narrow = searched(x, how, 3, symmetric=False)
        assert narrow < wide <= x.max()


def test_the_largest_value_itself_is_no_percentile():
    x = heavy_tailed(1, 5000, 0)
    low, high = searched(x, "percentile", 8, symmetric=False)
    assert low > x.min() and high < x.max()


def test_the_search_shrinks_what_it_is_given_not_what_it_sees():
    x = heavy_tailed(1, 5000, 0)
    qparams = partial(affine_qparams, quant_min=0, quant_max=15)
    low, high = search_range(x, 10 * x.amin(1), 10 * x.amax(1), "lp", qparams, 0, 15)
    assert high / x.amax(1) == pytest.approx(2.1, rel=1e-5) and low / x.amin(1) == pytest.approx(2.1, rel=1e-5)
