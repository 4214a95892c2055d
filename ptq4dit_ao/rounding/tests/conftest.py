"""What the tests of rounding share."""

from __future__ import annotations

import pytest
import torch

from ptq4dit_ao.core import sqnr_db


@pytest.fixture
def error_db(tiny_exported, tiny_samples):
    expected = torch.cat([tiny_exported(*sample) for sample in tiny_samples])
    return lambda converted: sqnr_db(expected, torch.cat([converted(*sample) for sample in tiny_samples]))
