"""Quantization per token against its formula in NumPy, and rows whose range is empty."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq4dit_ao.core.per_token import fake_quantize_tokens, middle_and_scale


def reference(x: np.ndarray, low: int, high: int) -> np.ndarray:
    least = x.min(-1, keepdims=True)
    scale = (x.max(-1, keepdims=True) - least) / (high - low)
    return least + np.clip(np.round((x - least) / scale), 0, high - low) * scale


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (-127, 127), (0, 63), (0, 3)])
def test_tokens_are_quantized_in_their_own_ranges(low, high):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.logspace(-6, 6, 15, dtype=torch.float64).view(3, 5, 1) + 1
    found = fake_quantize_tokens(x, low, high)
    assert np.allclose(found, reference(x.numpy(), low, high), rtol=1e-7, atol=0)
    assert torch.allclose(found.amin(-1), x.amin(-1)) and torch.allclose(found.amax(-1), x.amax(-1))
    step = (x.amax(-1) - x.amin(-1)) / (high - low)
    assert ((found - x).abs().amax(-1) <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e-7])
def test_a_row_of_equal_values_is_exact(value, dtype):
    x = torch.full((2, 8), value, dtype=dtype)
    found = fake_quantize_tokens(x, 0, 255)
    assert found.dtype == dtype and torch.equal(found, x)


def test_half_precision_does_not_overflow():
    x = torch.tensor([[-6e4, 6e4, 0.0]], dtype=torch.float16)
    assert fake_quantize_tokens(x, 0, 255).isfinite().all()
    assert middle_and_scale(x, 255)[1].dtype == torch.float32
