"""What the tests of rounding share."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer


@pytest.fixture
def error_db(tiny_exported, tiny_samples):
    expected = torch.cat([tiny_exported(*sample) for sample in tiny_samples])
    return lambda converted: sqnr_db(expected, torch.cat([converted(*sample) for sample in tiny_samples]))


@pytest.fixture
def prepare(tiny_exported, tiny_samples, duplicate):
    """``prepare(**options)``: the tiny DiT, calibrated."""

    def run(**options):
        prepared = prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(**options))
        for sample in tiny_samples:
            prepared(*sample)
        return prepared

    return run
