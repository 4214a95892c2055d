"""OpenVINO computes what the graph says, with integers, in this process and from the IR alone."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import MinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import ArgumentError, LoweringError
from ptq4dit_ao.lowering import available_backends, export_to, lower, missing_backends, quantized_linears
from ptq4dit_ao.lowering.openvino import count_attention
from ptq4dit_ao.lowering.tests.batches import batch_of
from ptq4dit_ao.quantizer import LinearQuantizer, PTQ4DiTQuantizer, attention

ov = pytest.importorskip("openvino")

BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W6A6": (6, 6)}
EACH = ["W4A8", *(pytest.param(bits, marks=pytest.mark.slow) for bits in ("W8A8", "W6A6"))]
LINEARS = 14
"""Quantized linears of the tiny DiT."""


@pytest.fixture(params=EACH)
def converted(request, quantized) -> GraphModule:
    weight_bits, activation_bits = BITS[request.param]
    return quantized(weight_bits=weight_bits, activation_bits=activation_bits)


class Head(nn.Module):
    """Two outputs, an input that nothing reads, linears on two, three and four axes, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.flat = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        h = nn.functional.gelu(self.first(x)).transpose(1, 2)  # (N, 3, 5, 8)
        return self.last(h), self.flat(x[:, 0, 0])


@pytest.fixture(scope="module")
def head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 5, 8), torch.arange(4), torch.randn(4, 2)


@pytest.fixture
def head(convert, head_inputs) -> GraphModule:
    return head_of(8, convert, head_inputs)


@pytest.fixture
def head_w4(convert, head_inputs) -> GraphModule:
    return head_of(4, convert, head_inputs)


def head_of(bits: int, convert: Callable[..., GraphModule], inputs: tuple[Tensor, ...]) -> GraphModule:
    torch.manual_seed(1)
    exported = export_transformer(Head().eval(), inputs)
    return convert(exported, PTQ4DiTQuantizer(weight_bits=bits, balance="none"), [inputs])


# -- in this process -------------------------------------------------------------------------------------------------


def test_it_computes_what_the_graph_says_on_integer_kernels(converted):
    lowered = lower(converted, "openvino")
    for rows in (4, 1, 7):  # exported at 4
        expected, actual = converted(*batch_of(rows)), lowered(*batch_of(rows))
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        assert sqnr_db(expected, actual) > 60
    assert lowered.proof.integer_gemms == lowered.proof.promised == LINEARS
    assert all(re.search("[iu]8$", kernel, re.IGNORECASE) for kernel in lowered.proof.kernels)


def test_any_structure_and_layout_of_tensors(head, head_inputs):
    lowered = lower(head, "openvino")
    x, t, unused = head_inputs
    across = (x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), t, unused)
    for inputs in (head_inputs, across):
        for expected, actual in zip(head(*inputs), lowered(*inputs), strict=True):
            assert expected.shape == actual.shape and sqnr_db(expected, actual) > 60


def test_a_result_outlives_the_next_call(head, head_inputs):
    lowered = lower(head, "openvino")
    first, _ = lowered(*head_inputs)
    kept = first.clone()
    lowered(head_inputs[0] + 1, *head_inputs[1:])
    assert torch.equal(first, kept)


def test_only_free_sizes_may_change(head, head_inputs):
    x, t, unused = head_inputs
    with pytest.raises(ArgumentError, match=r"input 0 is torch.float32 \(4, 5, 3, 8\); .* \(4, 3, 's\d+', 8\)"):
        lower(head, "openvino")(x.transpose(1, 2), t, unused)


@pytest.mark.parametrize("bits", [8, 6])
def test_signed_activations(convert, head_inputs, bits):
    half = 2 ** (bits - 1)
    spec = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-half,
        quant_max=half - 1,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12),
    )

    class Signed(LinearQuantizer):
        def annotate(self, model: GraphModule) -> GraphModule:
            for node in super().annotate(model).graph.nodes:
                if (annotation := node.meta.get(Q_ANNOTATION_KEY)) is not None:
                    annotation.input_qspec_map[node.args[0]] = spec
            return model

    converted = convert(export_transformer(Head().eval(), head_inputs), Signed(), [head_inputs])
    lowered = lower(converted, "openvino")
    assert quantized_linears(converted)[0].x_range == (-half, half - 1) and lowered.proof.integer_gemms == 3
    assert sqnr_db(converted(*head_inputs)[0], lowered(*head_inputs)[0]) > 60


def test_what_it_refuses_runs_in_float_on_demand(head, head_inputs):
    changed = copy.deepcopy(head)
    linear = quantized_linears(changed)[0]
    linear.weight_zero_point.fill_(1)
    with pytest.raises(LoweringError, match=rf"cannot carry 1 of 3 .*\({linear.name}: needs symmetric weights\)"):
        lower(changed, "openvino")
    lowered = lower(changed, "openvino", allow_float_fallback=True)
    assert lowered.proof.float_layers == ((linear.name, "needs symmetric weights"),)
    assert sqnr_db(changed(*head_inputs)[0], lowered(*head_inputs)[0]) > 60


def test_bfloat16_only_where_the_processor_has_it(head, head_inputs):
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        lowered = lower(head, "openvino", float_dtype=torch.bfloat16)
        assert sqnr_db(head(*head_inputs)[0], lowered(*head_inputs)[0]) > 20
    else:
        with pytest.raises(LoweringError, match="this processor has no bfloat16, .* leave float_dtype out"):
            lower(head, "openvino", float_dtype=torch.bfloat16)


def test_attention_quantizes_its_own_result(quantized):
    """Not a pass of its own over memory behind the transpose."""
    lowered = lower(quantized(), "openvino")
    ran = [node for node in lowered.run.request.get_profiling_info() if node.status == node.Status.EXECUTED]
    attention = [node for node in ran if node.node_type == "Subgraph" and "FakeQuantize" in node.node_name]
    moved = [
        node for node in ran if node.node_type == "Transpose" and re.search("[iu]8$", node.exec_type, re.IGNORECASE)
    ]
    assert len(attention) >= 2 and len(moved) == 2  # two blocks


def test_without_the_package_a_line_says_how_to_get_it(head, monkeypatch):
    monkeypatch.setattr("ptq4dit_ao._optional.find_spec", lambda name: None)
    assert "openvino" not in available_backends()
    assert missing_backends()["openvino"].endswith("python -m pip install 'ptq4dit-ao[openvino]'")
    with pytest.raises(LoweringError, match="'openvino' cannot run here: 'openvino' is not installed"):
        lower(head, "openvino")


# -- the IR ------------------------------------------------------------------------------------------------------------


def run_ir(path: Path, inputs: tuple[Tensor, ...], **settings: object) -> tuple[Tensor, list[str]]:
    """What OpenVINO alone makes of a file, and the kinds of its linears' kernels."""
    compiled = ov.Core().compile_model(path, "CPU", {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32", **settings})
    request = compiled.create_infer_request()
    output = torch.from_numpy(request.infer({i: x.numpy() for i, x in enumerate(inputs)})[0])
    nodes = request.get_profiling_info()
    return output, [node.exec_type for node in nodes if node.node_type.startswith("FullyConnected")]


def test_the_ir_needs_openvino_alone(converted, tmp_path):
    path = export_to(converted, "openvino", tmp_path / "new" / "model")
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.xml"]
    for rows in (4, 3):
        output, kernels = run_ir(path, batch_of(rows))
        assert sqnr_db(converted(*batch_of(rows)), output) > 60
    assert sum(kernel.lower().endswith(("i8", "u8")) for kernel in kernels) == LINEARS


def test_four_bit_weights_are_four_bits_in_the_file(head, head_w4, tmp_path):
    def stored(graph: GraphModule) -> Counter[str]:
        """Type -> matrices stored in it."""
        nodes = ov.Core().read_model(export_to(graph, "openvino", tmp_path / "model")).get_ops()
        constants = [node for node in nodes if node.get_type_name() == "Constant"]
        return Counter(
            node.get_element_type().get_type_name() for node in constants if len(node.get_output_shape(0)) == 2
        )

    eight, four = stored(head), stored(head_w4)
    assert (eight["i8"], eight["i4"]) == (four["i4"], four["i8"]) == (3, 0)


def test_an_odd_number_of_four_bit_weights(convert, tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.linear(x)

    torch.manual_seed(0)
    inputs = (torch.randn(4, 6, 5), torch.arange(4))
    exported = export_transformer(Odd().eval(), inputs)
    converted = convert(exported, PTQ4DiTQuantizer(weight_bits=4, balance="none"), [inputs])
    output, _ = run_ir(export_to(converted, "openvino", tmp_path / "odd"), inputs)
    assert sqnr_db(converted(*inputs), output) > 60


def test_an_ir_that_computes_in_float_is_not_written(head_w4, tmp_path, monkeypatch):
    """As OpenVINO does with weights that are int4 when it compiles."""
    monkeypatch.setattr(ov.opset13, "convert", lambda constant, kind: constant)
    with pytest.raises(LoweringError, match="'openvino' ran 0 of 3 quantized linears on integer kernels"):
        export_to(head_w4, "openvino", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_ir_has_no_float_dtype(head, tmp_path):
    with pytest.raises(LoweringError, match=r"cannot say that .* torch\.bfloat16: .* leave float_dtype out"):
        export_to(head, "openvino", tmp_path / "model", float_dtype=torch.bfloat16)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 6])
def test_quantized_attention_is_multiplied_with_integers(quantized, bits, caplog):
    converted = quantized(attention_bits=bits)
    lowered = lower(converted, "openvino")
    assert lowered.proof.integer_gemms == LINEARS
    assert sum(lowered.proof.attention_kernels.values()) == lowered.proof.attention == 4
    assert "attention: 4/4 matmuls with integers (" in str(lowered.proof)
    assert "attention" not in caplog.text
    expected, actual = (torch.cat([run(*batch_of(rows)) for rows in (4, 7)]) for run in (converted, lowered))
    assert sqnr_db(expected, actual) > 40  # a value on the edge between two steps may fall to the other side


def test_a_factor_with_a_zero_point_stays_float_and_is_counted_so(convert, tiny_exported, tiny_samples, monkeypatch):
    monkeypatch.setitem(attention.SPECS, "v", attention.PROBABILITIES)
    converted = convert(tiny_exported, PTQ4DiTQuantizer(attention_bits=8), tiny_samples)
    proof = lower(converted, "openvino").proof
    assert 0 < sum(proof.attention_kernels.values()) + proof.simulated == 4
    assert proof.simulated >= 1


def test_float_attention_counts_no_products(quantized):
    lowered = lower(quantized(), "openvino")
    assert count_attention(lowered.run, batch_of(4)) == {}
