"""NNCF quantizes a balanced model as the recipe says, or is not asked to."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4dit_ao import PTQ4DiTQuantizer, load_recipe, lower
from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import ArgumentError, CalibrationError, LoweringError, MissingDependencyError
from ptq4dit_ao.lowering import quantized_linears
from ptq4dit_ao.lowering.openvino import compile_model
from ptq4dit_ao.lowering.program import as_program
from ptq4dit_ao.nncf import BalancedForNNCF, balance_for_nncf
from ptq4dit_ao.recipe import Balance, Override, Recipe, Weights

nncf = pytest.importorskip("nncf")
quantize_pt2e = pytest.importorskip("nncf.experimental.torch.fx").quantize_pt2e

LINEARS = 14
"""Of the tiny DiT's 22 those that the preset quantizes."""


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    logging.getLogger("nncf").setLevel(logging.ERROR)  # set_log_level would also set that of pytest's handlers


@pytest.fixture(scope="module")
def ready(tiny_exported, tiny_samples) -> BalancedForNNCF:
    return balance_for_nncf(tiny_exported, load_recipe("dit_w8a8"), tiny_samples)


@pytest.fixture(scope="module")
def mixed(tiny_exported, tiny_samples) -> BalancedForNNCF:
    """The two adaLN linears in 8 bits, the other twelve in 4."""
    adaln = Override(pattern="*.norm1.linear", weight_bits=8)
    return balance_for_nncf(tiny_exported, Recipe(weights=Weights(bits=4), overrides=(adaln,)), tiny_samples)


def run(ready: BalancedForNNCF, model: Any) -> tuple[Tensor, list[Any]]:
    """The output for the first batch, and the nodes that were executed."""
    compiled = compile_model(model, as_program(ready.graph, ready.batches[0]))
    output = compiled(*ready.batches[0])
    return output, [node for node in compiled.request.get_profiling_info() if node.status == node.Status.EXECUTED]


def integer(nodes: list[Any], kind: str) -> int:
    return sum(node.node_type.startswith(kind) and node.exec_type.lower().endswith(("i8", "u8")) for node in nodes)


def stored(model: Any) -> Counter[str]:
    """Type -> matrices stored in it."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return Counter(node.get_element_type().get_type_name() for node in constants if len(node.get_output_shape(0)) == 2)


def test_a_balanced_model_computes_the_same_with_other_weights(ready, tiny_exported):
    batch, weight = ready.batches[0], "transformer_blocks.0.attn1.to_q.weight"
    assert sqnr_db(tiny_exported(*batch), ready.graph(*batch)) > 80
    assert not torch.equal(tiny_exported.get_parameter(weight), ready.graph.get_parameter(weight))


def test_quantize_runs_the_layers_of_the_recipe_on_integers_and_smooths_nothing(ready):
    quantized = nncf.quantize(**ready.quantize())
    output, nodes = run(ready, quantized)
    assert sqnr_db(ready.graph(*ready.batches[0]), output) > 30
    assert integer(nodes, "FullyConnected") == LINEARS and integer(nodes, "Convolution") == 0
    assert not [op for op in quantized.get_ops() if "smooth_quant" in op.get_friendly_name()]


@pytest.mark.slow
def test_quantize_pt2e_gives_a_graph_for_any_backend(ready):
    code = ready.graph.code
    converted = quantize_pt2e(**ready.quantize_pt2e())
    batch = ready.batches[0]
    for backend in ("openvino", "fbgemm"):
        lowered = lower(converted, backend, example_inputs=batch)
        assert lowered.proof.integer_gemms == lowered.proof.promised == LINEARS
        assert sqnr_db(ready.graph(*batch), lowered(*batch)) > 30
    assert ready.graph.code == code


@pytest.mark.slow
def test_weights_are_compressed_to_the_bits_of_their_layer(ready, mixed):
    for source, bits, count in ((mixed, 4, LINEARS - 2), (mixed, 8, 2), (ready, 8, LINEARS)):
        arguments = source.compress_weights(bits=bits)
        before = stored(arguments["model"])
        compressed = nncf.compress_weights(**arguments)
        after = stored(compressed)
        assert after[f"i{bits}"] == count and after["f32"] == before["f32"] - count
        assert sqnr_db(source.graph(*source.batches[0]), run(source, compressed)[0]) > (20 if bits == 4 else 40)


def test_what_nncf_would_do_otherwise_is_refused(ready, mixed):
    with pytest.raises(
        LoweringError, match=r"nncf.quantize quantizes to 8 bits, .* says W4A8 and W8A8\); use compress_"
    ):
        mixed.quantize()
    with pytest.raises(
        LoweringError, match=r"quantize_pt2e quantizes to 8 bits, .* says W4A8 and W8A8\); use apply_rec"
    ):
        mixed.quantize_pt2e()
    with pytest.raises(LoweringError, match=r"no layer is to have weights of 4 bits \(the recipe says W8A8\)"):
        ready.compress_weights(bits=4)
    with pytest.raises(ArgumentError, match="bits is 3; NNCF compresses weights to 4 or 8"):
        ready.compress_weights(bits=3)


def test_nncf_still_makes_eight_bits_of_four_without_a_word(tiny_exported, tiny_samples):
    """If this fails, NNCF has been mended: ``BalancedForNNCF.quantize_pt2e`` need not refuse 4 bits any more."""
    quantizer = PTQ4DiTQuantizer(weight_bits=4, balance="none")
    converted = quantize_pt2e(tiny_exported, quantizer, nncf.Dataset(tiny_samples), do_copy=True)
    for linear in quantized_linears(converted):
        assert linear.weight_range == (-128, 127) and linear.weight.unique().numel() > 16


def test_recorded_samples_are_taken_too(tiny_dit):
    inputs = {"hidden_states": torch.randn(8, 4, 8, 8), "timestep": torch.arange(8) % 4 * 250}
    recorded = CalibrationSamples({**inputs, "class_labels": torch.arange(8)})
    ready = balance_for_nncf(tiny_dit, load_recipe("dit_w8a8"), recorded)
    assert sum(len(batch[0]) for batch in ready.batches) == 8


def test_what_cannot_be_balanced(tiny_exported, tiny_samples):
    with pytest.raises(CalibrationError, match="there are no calibration samples"):
        balance_for_nncf(tiny_exported, Recipe(), [])
    with pytest.raises(ArgumentError, match="none"):
        balance_for_nncf(tiny_exported, Recipe(balance=Balance(method="none")), tiny_samples)


def test_without_nncf_a_line_says_how_to_get_it(ready, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    for method in (ready.quantize, ready.quantize_pt2e):
        with pytest.raises(MissingDependencyError, match=r"'nncf' is not installed; .*ptq4dit-ao\[openvino\]"):
            method()


def test_a_recipe_that_skips_every_layer_leaves_nncf_nothing_to_refuse(tiny_exported, tiny_samples):
    recipe = Recipe(overrides=(Override(pattern="*", skip=True),))
    ready = balance_for_nncf(tiny_exported, recipe, tiny_samples)
    assert all(plan.skip for plan in ready.plans.values())
    _, nodes = run(ready, nncf.quantize(**ready.quantize()))
    assert integer(nodes, "FullyConnected") == 0
