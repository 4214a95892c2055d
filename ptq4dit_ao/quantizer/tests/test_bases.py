"""Quantizers of torchao for other processors as bases: prepared, balanced and converted; not lowered here."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization.pt2e.quantizer.arm_inductor_quantizer import (
    ArmInductorQuantizer,
    get_default_arm_inductor_quantization_config,
)
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.lowering import lower, quantized_linears
from ptq4dit_ao.passes import balance_result
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

quantized_ops = torch.ops.quantized_decomposed


def arm() -> ArmInductorQuantizer:
    """Weights per tensor, linears and convolutions."""
    return ArmInductorQuantizer().set_global(get_default_arm_inductor_quantization_config())


def xnnpack() -> XNNPACKQuantizer:
    """Weights per channel, also element-wise ops, whose inputs and outputs share observers."""
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


@pytest.fixture(params=[arm, xnnpack])
def base(request):
    return request.param


def test_a_base_is_balanced_and_converts_as_well_as_alone(base, convert, tiny_exported, tiny_samples):
    alone = convert(tiny_exported, base(), tiny_samples)
    balanced = convert(tiny_exported, PTQ4DiTQuantizer(base()), tiny_samples)
    assert sum(site.refusal is None for site in balance_result(balanced).sites) == 6  # qkv, out and FC1 of two blocks
    expected = tiny_exported(*tiny_samples[0])
    # XNNPACK's element-wise ops cost so much that balancing linears makes no difference.
    assert sqnr_db(expected, balanced(*tiny_samples[0])) > sqnr_db(expected, alone(*tiny_samples[0])) - 0.5


def test_bits_reach_the_weights_of_a_base(convert, tiny_exported, tiny_samples):
    converted = convert(tiny_exported, PTQ4DiTQuantizer(xnnpack(), weight_bits=4), tiny_samples)
    assert {linear.weight_range for linear in quantized_linears(converted)} == {(-8, 7)}


def test_weights_per_tensor_run_on_no_integer_backend_of_ours_and_say_so(convert, tiny_exported, tiny_samples):
    converted = convert(tiny_exported, PTQ4DiTQuantizer(arm()), tiny_samples)
    assert len(converted.graph.find_nodes(op="call_function", target=quantized_ops.quantize_per_tensor.default)) > 0
    with pytest.raises(LoweringError, match="'fbgemm' cannot carry 14 of 14 quantized linears"):
        lower(converted, "fbgemm")
    assert sqnr_db(tiny_exported(*tiny_samples[0]), lower(converted, "reference")(*tiny_samples[0])) > 20
