"""RepQ-ViT's formulas against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq4dit_ao.core import fake_quantize
from ptq4dit_ao.core.repq import Reparameterisation, reparameterise
from ptq4dit_ao.core.tests import reference

INTEGERS = [(0, 255), (-128, 127), (0, 15)]


def tokens(channels: int, seed: int, n: int = 300) -> Tensor:
    """(n, C) whose channels differ in size by six decades, and in mean; some do not come near 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, generator=g, dtype=torch.float64) + torch.randn(channels, generator=g) * 4
    return x * 10 ** (6 * torch.rand(channels, generator=g, dtype=torch.float64) - 3)


def of(x: Tensor, integers: tuple[int, int]) -> Reparameterisation:
    return reparameterise(x.amin(0), x.amax(0), *integers)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 99), st.sampled_from(INTEGERS))
def test_one_quantizer_for_all_is_each_channels_own(channels, seed, integers):
    x = tokens(channels, seed)
    delta, z = reference.per_channel_quantizer(x.amin(0), x.amax(0), *integers)
    own = reference.fake_quantize(x, delta, z, *integers)
    found = of(x, integers)
    offset = found.offset(found.ratio)
    shared = fake_quantize(x / found.ratio - offset, found.scale, found.zero_point, *integers)
    undone = (shared + offset) * found.ratio
    np.testing.assert_allclose(undone, own, rtol=1e-9, atol=1e-9 * float(x.abs().max()))


@pytest.mark.parametrize("integers", INTEGERS)
def test_repq_is_the_papers(integers):
    x = tokens(24, 3)
    r, o, delta, z = reference.repq(*reference.per_channel_quantizer(x.amin(0), x.amax(0), *integers), *integers)
    found = of(x, integers)
    np.testing.assert_allclose(found.ratio, r)
    np.testing.assert_allclose(found.offset(found.ratio), o)
    assert (found.scale, found.zero_point) == (pytest.approx(delta), z)


def test_the_next_linear_undoes_it():
    x, found = tokens(24, 3), of(tokens(24, 3), (0, 255))
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    offset = found.offset(found.ratio)
    scaled = weight * found.ratio
    y = (x / found.ratio - offset) @ scaled.T + scaled @ offset
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-9, atol=1e-9)


def test_a_bounded_ratio_still_starts_where_the_others_do():
    x, found = tokens(24, 3), of(tokens(24, 3), (0, 255))
    ratio = found.ratio.clamp(0.1, 10)
    lowest = (x.amin(0) / ratio - found.offset(ratio))[ratio <= found.ratio]
    step = found.scale * (found.ratio / ratio)[ratio <= found.ratio]
    assert ((lowest + found.zero_point * found.scale).abs() <= step / 2 * (1 + 1e-9)).all()


def test_a_channel_that_never_varies_becomes_zero():
    x = tokens(6, 0)
    x[:, 2], x[:, 4] = 5.0, 0.0
    found, others = of(x, (0, 255)), of(x[:, [0, 1, 3, 5]], (0, 255))
    offset = found.offset(found.ratio)
    assert (found.scale, found.zero_point) == (others.scale, others.zero_point)
    assert found.ratio[[2, 4]].tolist() == [1.0, 1.0]
    torch.testing.assert_close((x / found.ratio - offset)[:, [2, 4]], torch.zeros(300, 2).double(), atol=1e-9, rtol=0)
    still = of(torch.full((5, 3), 2.0), (0, 255))
    assert still.offset(still.ratio).tolist() == [2.0] * 3 and 0 <= still.zero_point <= 255


def test_a_channel_far_from_zero_does_not_drive_the_zero_point_out_of_range():
    x = tokens(4, 0)
    x[:, 0] = 1e6 + torch.rand(300)
    assert of(x, (0, 255)).zero_point == 0 and of(-x, (0, 255)).zero_point == 255
