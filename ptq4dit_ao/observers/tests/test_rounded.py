"""What waits beside a float weight until it is converted."""

from __future__ import annotations

import pytest
import torch

from ptq4dit_ao.observers import Rounded


@pytest.mark.parametrize(("low", "high", "part"), [(-8, 7, 0.5), (-7, 7, 0.5), (-9, 7, 1), (-8, 8, 1), (-128, 127, 1)])
def test_four_bits_are_kept_as_four(low, high, part):
    integers = torch.randint(low, high + 1, (6, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    integers[0, 0], integers[5, 9] = low, high
    rounded = Rounded(integers=integers, scale=torch.arange(1.0, 7.0))
    assert rounded.integers.dtype == torch.int8 and torch.equal(rounded.integers, integers)
    assert torch.equal(rounded.weight(), integers * rounded.scale.unsqueeze(1)) and rounded.bias is None
    held = sum(x.nbytes for x in vars(rounded).values() if isinstance(x, torch.Tensor) and not x.is_floating_point())
    assert held == part * integers.numel()
