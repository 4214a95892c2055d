"""Tests of integer inference at DiT-XL/2 layer sizes, compiled: proven, and not slowed down by balancing."""

from __future__ import annotations

import pytest
import torch
from x86_kernels import build_model, convert_base_only, samples

from ptq4dit_ao import export_transformer, lower
from ptq4dit_ao.metrics import measure_latency
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow import apply_recipe

pytestmark = pytest.mark.x86


@pytest.mark.parametrize("backend", ["fbgemm", "x86_inductor"])
def test_integer_kernels_are_proven_and_faster_than_float(backend):
    model, inputs = build_model(blocks=1), samples(2, batch=2)
    quantized = apply_recipe(model, Recipe(), inputs)
    lowered = quantized.lower(backend)
    base = lower(convert_base_only(export_transformer(model, inputs[0]), inputs), backend, example_inputs=inputs[0])
    assert lowered.proof.integer_gemms == lowered.proof.promised == base.proof.integer_gemms == 7
    exported = export_transformer(model, inputs[0])
    latency = measure_latency({"float": exported, "ours": lowered, "base": base}, inputs[0], rounds=15)
    # Loose bounds for busy machines; measure/x86_kernels.py has the figures.
    assert latency["ours"].median_ms < 0.7 * latency["float"].median_ms
    assert latency["ours"].median_ms < 1.25 * latency["base"].median_ms
    larger = tuple(torch.cat([x, x[:1]]) for x in inputs[0])
    assert lowered(*larger).shape[0] == 3
