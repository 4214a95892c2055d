"""Inputs quantized per token, by an exact rewrite that every backend computes; inputs that stay float; refusals."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule, Interpreter
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import ArgumentError, OverrideError
from ptq4dit_ao.graph.names import get_attribute
from ptq4dit_ao.lowering import float_linears, lower, quantized_linears
from ptq4dit_ao.lowering.backend import BACKENDS as BACKENDS_BY_NAME
from ptq4dit_ao.lowering.match import is_quantizer, quantized_products, weight_only_linears
from ptq4dit_ao.lowering.tests.batches import batch_of
from ptq4dit_ao.metrics import leave_one_out, weight_errors
from ptq4dit_ao.metrics.layers import layer_errors
from ptq4dit_ao.passes import balance_result, balanced_as
from ptq4dit_ao.quantizer import Override, PTQ4DiTQuantizer, distill, round_sequentially
from ptq4dit_ao.quantizer.tests.test_quantizer import x86
from ptq4dit_ao.rounding.layers import find_groups

LINEARS = 14


def dynamic_layers(converted: GraphModule) -> list[bool]:
    return [linear.per_token is not None for linear in quantized_linears(converted)]


class Unrounded(Interpreter):
    """A converted graph in float64 whose activations are not rounded."""

    def fetch_attr(self, target: str) -> object:
        value = super().fetch_attr(target)
        return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    def call_function(self, target, args, kwargs):
        if str(target).startswith("quantized_decomposed.dequantize_per_channel"):
            return args[0].double() * args[1].unsqueeze(1)
        if "quantize_per_tensor" in str(target):
            return args[0]
        if str(target).startswith(("aten.to.", "aten._assert_tensor")):
            return args[0].double()
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}, {"layers": (), "activation_bits": 5}])
def test_all_but_the_rounding_is_exact(options, quantized, tiny_exported):
    """The rewrite equals linears of the dequantized weights in float64."""
    converted = quantized(dynamic="token", **options)
    assert all(dynamic_layers(converted)) and len(dynamic_layers(converted)) >= LINEARS
    converted, plain = copy.deepcopy(converted), copy.deepcopy(converted)
    for linear in quantized_linears(converted):
        exact = (linear.weight.double() * linear.weight_scale.double().unsqueeze(1)).sum(1)
        assert torch.allclose(getattr(converted, linear.per_token.sums.target).double(), exact, atol=1e-6)
        setattr(converted, linear.per_token.sums.target, exact)
    for linear in quantized_linears(plain):  # the same linears without the rewrite
        around = linear.per_token
        with plain.graph.inserting_before(around.output):
            args = (around.x, linear.dequantize_weight, *([around.bias] if around.bias is not None else []))
            node = plain.graph.call_function(torch.ops.aten.linear.default, args)
        around.output.replace_all_uses_with(node)
    plain.graph.eliminate_dead_code()
    assert not any(is_quantizer(n) and "per_tensor" in str(n.target) for n in plain.graph.nodes)
    x, t, y = batch_of(5)
    expected, found = (Unrounded(model).run(x.double(), t, y) for model in (plain, converted))
    assert found.dtype == torch.float64
    assert (expected - found).norm() <= 1e-12 * expected.norm()


def test_tokens_are_closer_and_rows_do_not_matter(quantized, tiny_exported, tiny_samples):
    static, dynamic = quantized(rounding="gptq"), quantized(rounding="gptq", dynamic="token")
    expected = torch.cat([tiny_exported(*s) for s in tiny_samples])
    static_db, dynamic_db = (sqnr_db(expected, torch.cat([m(*s) for s in tiny_samples])) for m in (static, dynamic))
    assert dynamic_db > static_db + 2
    x, t, y = batch_of(4)
    whole = dynamic(x, t, y)
    assert torch.allclose(dynamic(x[:1], t[:1], y[:1]), whole[:1], atol=1e-5)  # a row's range is its own


def test_zero_and_padding_rows_are_finite(quantized):
    x, t, y = batch_of(2)
    assert quantized(dynamic="token")(torch.zeros_like(x), t, y).isfinite().all()


@pytest.mark.parametrize("bits", [8, 6])
def test_a_lowered_graph_has_the_same_integers(bits, quantized):
    converted = quantized(dynamic="token", activation_bits=bits)
    lowered = lower(converted, "fbgemm")
    assert lowered.proof.integer_gemms == lowered.proof.promised == LINEARS
    for rows in (4, 1, 7):
        assert sqnr_db(converted(*batch_of(rows)), lowered(*batch_of(rows))) > 40


def test_a_bfloat16_graph_is_shifted_in_float32(tiny_dit, tiny_samples, convert):
    batches = [(x.bfloat16(), t, y) for x, t, y in tiny_samples]
    exported = export_transformer(copy.deepcopy(tiny_dit).bfloat16(), batches[0])
    converted = convert(exported, PTQ4DiTQuantizer(dynamic="token", balance="max"), batches)
    assert all(dynamic_layers(converted))
    linear = quantized_linears(converted)[0]
    assert linear.x.meta["val"].dtype == linear.dtype == torch.bfloat16
    output, expected = converted(*batches[0]), exported(*batches[0])
    assert output.dtype == torch.bfloat16 and sqnr_db(expected.float(), output.float()) > 25
    lowered = lower(converted, "cuda") if torch.cuda.is_available() else None
    assert lowered is None or sqnr_db(output.float(), lowered(*batches[0]).cpu().float()) > 30


def test_overrides_choose_layers_and_mixed_readers_are_quantized_apart(quantized):
    overrides = (Override(pattern="*ff.net*", dynamic="token"), Override(pattern="*to_k", dynamic="token"))
    converted = quantized(overrides=overrides)
    layers = balance_result(converted).layers
    for linear in quantized_linears(converted):
        name = layers[linear.name]
        assert (linear.per_token is not None) == ("ff.net" in name or name.endswith("to_k"))
    back = quantized(dynamic="token", overrides=(Override(pattern="*attn*", dynamic=False),))
    assert sum(dynamic_layers(back)) == 6  # adaLN, FC1, FC2


@pytest.mark.parametrize("options", [{"attention_bits": 8}, {"base": x86()}, {"activation_bits": 7}])
def test_attention_stays_static_and_any_base_is_wrapped(options, quantized, tiny_exported, tiny_samples):
    converted = quantized(dynamic="token", **options)
    assert dynamic_layers(converted) == [True] * LINEARS
    assert len(quantized_products(converted)) == (4 if "attention_bits" in options else 0)
    expected = torch.cat([tiny_exported(*s) for s in tiny_samples])
    assert sqnr_db(expected, torch.cat([converted(*s) for s in tiny_samples])) > 30


def test_a_single_dynamic_layer_is_what_is_left_out(quantized, tiny_exported, tiny_samples):
    """Restoring the only quantized layer gives the float model, so the restored shift is right."""
    only = (Override(pattern="*", skip=True), Override(pattern="transformer_blocks.0.ff.net.2", dynamic="token"))
    converted = quantized(overrides=only, balance="none", weight_bits=4)
    assert dynamic_layers(converted) == [True]
    balanced = balanced_as(tiny_exported, balance_result(converted))
    found = leave_one_out(balanced, converted, tiny_samples)
    (without,) = found.without.values()
    assert without.sqnr_db > 110 > found.quantized.sqnr_db
    (alone,) = weight_errors(balanced, converted, tiny_samples).values()
    assert 20 < alone.sqnr_db < 60
    (name,) = (linear.name for linear in quantized_linears(converted))
    first = [tuple(part[:1] for part in sample) for sample in tiny_samples]
    assert 20 < layer_errors(balanced, converted, first)[name].sqnr_db < 60


def test_what_learns_leaves_dynamic_ranges_alone(duplicate, tiny_exported, tiny_samples, tmp_path):
    def rounded(resume):
        quantizer = PTQ4DiTQuantizer(weight_bits=4, dynamic="token", rounding="gptq", sequential=True)
        prepared = prepare_pt2e(duplicate(tiny_exported), quantizer)
        for sample in tiny_samples:
            prepared(*sample)
        round_sequentially(prepared, tiny_samples, resume=resume)
        return prepared

    one, resumed = rounded(tmp_path / "rounding"), rounded(tmp_path / "rounding")
    assert all(group.observer.chosen_range is None for group in find_groups(one))
    expected = torch.cat([tiny_exported(*s) for s in tiny_samples])
    distilled = copy.deepcopy(one)
    distill(distilled, tiny_samples, steps=40)
    one, resumed, distilled = convert_pt2e(one), convert_pt2e(resumed), convert_pt2e(distilled)
    before, again, after = (
        sqnr_db(expected, torch.cat([m(*s) for s in tiny_samples])) for m in (one, resumed, distilled)
    )
    assert before == again and after > before + 0.5
    assert balance_result(one).clipping == {}


def test_what_needs_static_ranges_is_refused(tiny_exported, duplicate):
    for options in ({"dynamic": "token"}, {"overrides": (Override(pattern="*to_q", dynamic="token"),)}):
        with pytest.raises(
            ArgumentError, match=r"'transformer_blocks.0.* is to have dynamic inputs, and balance='repq'"
        ):
            prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(balance="repq", **options))
    with pytest.raises(ArgumentError, match="dynamic is 'row'; give 'token'"):
        PTQ4DiTQuantizer(dynamic="row")
    with pytest.raises(ArgumentError, match="dynamic is True; give 'token'"):
        Override(pattern="*", dynamic=True)
    with pytest.raises(OverrideError, match="skips a layer and sets its bits, dynamic or balance"):
        Override(pattern="*", skip=True, dynamic="token")


# -- weights alone -------------------------------------------------------------------------------------------------


def test_weights_alone_are_integers_and_inputs_stay(quantized, tiny_exported, tiny_samples):
    converted = quantized(activation_bits=16, rounding="gptq")
    assert len(weight_only_linears(converted)) == LINEARS and not quantized_linears(converted)
    assert not any("per_tensor" in str(node.target) for node in converted.graph.nodes)
    expected = torch.cat([tiny_exported(*s) for s in tiny_samples])
    weights, both = (
        sqnr_db(expected, torch.cat([m(*s) for s in tiny_samples])) for m in (converted, quantized(rounding="gptq"))
    )
    assert weights > both + 3
    four = quantized(activation_bits=16, rounding="gptq", weight_bits=4)
    nearest = quantized(activation_bits=16, weight_bits=4)
    four, nearest = (sqnr_db(expected, torch.cat([m(*s) for s in tiny_samples])) for m in (four, nearest))
    assert four > nearest + 1  # rounded with the moments of inputs that are not quantized


def test_one_layer_of_integer_weights_among_others(quantized, tiny_exported, tiny_samples):
    converted = quantized(overrides=(Override(pattern="*norm1.linear", activation_bits=16),), weight_bits=4)
    names = balance_result(converted).layers
    assert [names[linear.name] for linear in weight_only_linears(converted)] == [
        f"transformer_blocks.{i}.norm1.linear" for i in range(2)
    ]
    assert len(quantized_linears(converted)) == LINEARS - 2
    balanced = balanced_as(tiny_exported, balance_result(converted))
    found = leave_one_out(balanced, converted, tiny_samples)
    assert len(found.without) == 10 and len(weight_errors(balanced, converted, tiny_samples)) == 10
    only = (Override(pattern="*", skip=True), Override(pattern="transformer_blocks.0.norm1.linear", activation_bits=16))
    alone = quantized(overrides=only, balance="none", weight_bits=4)
    (without,) = leave_one_out(balanced_as(tiny_exported, balance_result(alone)), alone, tiny_samples).without.values()
    assert without.sqnr_db > 110


def test_weights_alone_are_learned_layer_by_layer(duplicate, tiny_exported, tiny_samples, tmp_path):
    quantizer = PTQ4DiTQuantizer(weight_bits=3, activation_bits=16, rounding="gptq", sequential=True)
    prepared = prepare_pt2e(duplicate(tiny_exported), quantizer)
    for sample in tiny_samples:
        prepared(*sample)
    round_sequentially(prepared, tiny_samples, resume=tmp_path / "rounding")
    rounded = convert_pt2e(copy.deepcopy(prepared))
    distill(prepared, tiny_samples, steps=40)
    expected = torch.cat([tiny_exported(*s) for s in tiny_samples])
    before, after = (
        sqnr_db(expected, torch.cat([m(*s) for s in tiny_samples])) for m in (rounded, convert_pt2e(prepared))
    )
    assert after > before


MARKED = {"openvino": pytest.mark.openvino, "onnx": pytest.mark.onnx, "x86_inductor": pytest.mark.x86}
BACKENDS = ["reference", "fbgemm", *(pytest.param(name, marks=mark) for name, mark in MARKED.items())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_backends_keep_integers_of_float_inputs(backend, whole, quantized):
    if BACKENDS_BY_NAME[backend].unavailable():
        pytest.skip(f"{backend}: {BACKENDS_BY_NAME[backend].unavailable()}")
    overrides = () if whole else (Override(pattern="*norm1.linear", activation_bits=16),)
    converted = quantized(activation_bits=16 if whole else 8, overrides=overrides)
    lowered = lower(converted, backend)
    count = LINEARS if whole else 2
    assert lowered.proof.weight_only == count
    assert lowered.proof.promised == (0 if backend == "reference" else LINEARS - count)
    assert f"; {count} linears of integer weights and float inputs" in str(lowered.proof)
    for rows in (4, 1, 7):
        db = sqnr_db(converted(*batch_of(rows)), lowered(*batch_of(rows)))
        assert db > (90 if whole else 45)


def _openvino_weights(lowered) -> list[str]:
    """Types of the weights of all linears in OpenVINO's runtime."""
    nodes = lowered.run.request.get_compiled_model().get_runtime_model().get_ordered_ops()
    linears = [n for n in nodes if str(n.get_rt_info()["layerType"].value) == "FullyConnected"]
    return [node.input(1).get_element_type().get_type_name() for node in linears]


@pytest.mark.openvino
def test_openvino_multiplies_by_compressed_weights(quantized):
    pytest.importorskip("openvino")
    lowered = lower(quantized(activation_bits=16), "openvino", verify=False)
    assert _openvino_weights(lowered).count("i8") == LINEARS
    plain = lower(quantized(overrides=(Override(pattern="*attn*", skip=True),)), "openvino", verify=False)
    assert _openvino_weights(plain).count("f32") > 4  # what is skipped has float weights, which the count sees


@pytest.mark.onnx
def test_onnxruntime_multiplies_by_compressed_weights(quantized):
    pytest.importorskip("onnxruntime")
    lowered = lower(quantized(activation_bits=16), "onnx", verify=False)
    assert sum(operator in ("MatMulNBits", "DequantizeLinear") for _, operator in lowered.run.ran) == LINEARS


@pytest.mark.x86
def test_inductor_freezes_no_float_copy(quantized):
    whole = quantized(activation_bits=16)
    shapes = {str(tuple(linear.weight.shape)) for linear in weight_only_linears(whole)}
    shapes -= {str(tuple(get_attribute(whole, str(node.args[1].target)).shape)) for node in float_linears(whole)}
    assert len(shapes) >= 3
    _, codes = run_and_get_code(lower, whole, "x86_inductor", verify=False)
    frozen = re.findall(r"_frozen_param\d+ = rand_strided\((\([^)]*\)), .*dtype=(torch\.\w+)\)", "\n".join(codes))
    kinds = {(shape, dtype) for shape, dtype in frozen if shape in shapes}
    assert {dtype for _, dtype in kinds} == {"torch.int8"} and {shape for shape, _ in kinds} == shapes


def test_what_contradicts_weights_alone_is_refused():
    with pytest.raises(
        ArgumentError, match="activation_bits is 9; it must be an integer from 2 to 8, or 16 to quantize"
    ):
        PTQ4DiTQuantizer(activation_bits=9)
    with pytest.raises(ArgumentError, match="activation_bits is 16, which keeps inputs float, and dynamic is 'token'"):
        PTQ4DiTQuantizer(activation_bits=16, dynamic="token")
    with pytest.raises(OverrideError, match="keeps inputs float .activation_bits 16. and makes them dynamic"):
        Override(pattern="*", activation_bits=16, dynamic="token")
    with pytest.raises(ArgumentError, match="weight_bits is 16"):
        PTQ4DiTQuantizer(weight_bits=16)
