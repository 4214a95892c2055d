"""oneDNN's own report: what counts, and that standard output is left as it was."""

from __future__ import annotations

import os

import pytest
import torch

from ptq4dit_ao.lowering import lower
from ptq4dit_ao.lowering.machine import has_onednn
from ptq4dit_ao.lowering.onednn_verbose import count_onednn_gemms

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


def linear(x: torch.Tensor) -> torch.Tensor:
    """A float linear on oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, torch.ones(8, 8, dtype=x.dtype), None, "none", [], "")


def test_it_counts_what_the_profiler_counts(quantized, tiny_samples):
    lowered = lower(quantized(), "fbgemm")
    assert count_onednn_gemms(lowered, tiny_samples[0]) == {"onednn::matmul(u8, s8)": lowered.proof.integer_gemms}


def test_a_float_model_counts_nothing(tiny_exported, tiny_samples):
    assert count_onednn_gemms(tiny_exported, tiny_samples[0]) == {}
    assert count_onednn_gemms(linear, [torch.ones(8, 8)]) == {}
    assert count_onednn_gemms(linear, [torch.ones(8, 8, dtype=torch.bfloat16)]) == {}


def test_what_others_print_meanwhile_arrives_and_the_report_does_not(capfd):
    def model(x):
        os.write(1, b"from C\n")
        return linear(x)

    count_onednn_gemms(model, [torch.ones(8, 8)])
    assert capfd.readouterr().out == "from C\nfrom C\n"
    linear(torch.ones(8, 8))
    assert capfd.readouterr().out == ""


def test_a_model_that_fails_leaves_standard_output_as_it_was(capfd):
    calls = []

    def model(x):
        calls.append(x)
        if len(calls) == 2:
            raise ValueError("the second call")

    before = os.fstat(1)
    with pytest.raises(ValueError, match="the second call"):
        count_onednn_gemms(model, [torch.ones(2)])
    assert os.path.samestat(before, os.fstat(1))
    linear(torch.ones(8, 8))
    assert capfd.readouterr().out == ""
