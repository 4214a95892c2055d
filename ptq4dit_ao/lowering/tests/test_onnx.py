"""ONNX files, and what onnxruntime makes of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.lowering import BACKENDS, export_to, lower, onnx
from ptq4dit_ao.lowering.tests.batches import batch_of
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

LINEARS = 14

needs_onnx = pytest.mark.skipif(BACKENDS["onnx"].unavailable() is not None, reason=str(BACKENDS["onnx"].unavailable()))


@needs_onnx
def test_every_quantized_linear_runs_on_integers_in_onnxruntime(quantized):
    converted = quantized(weight_bits=4)
    lowered = lower(converted, "onnx")
    assert lowered.proof.kernels == {"MatMulIntegerToFloat": LINEARS}
    for rows in (4, 1, 7):
        assert sqnr_db(converted(*batch_of(rows)), lowered(*batch_of(rows))) > 60


@needs_onnx
@pytest.mark.parametrize("bits", [8, 6])
def test_attention_is_counted_apart_from_linears(quantized, bits, tmp_path):
    converted = quantized(attention_bits=bits)
    lowered = lower(converted, "onnx")
    assert lowered.proof.kernels == {"MatMulIntegerToFloat": LINEARS}
    assert sum(lowered.proof.attention_kernels.values()) == lowered.proof.attention == 4
    expected, actual = (torch.cat([run(*batch_of(rows)) for rows in (4, 7)]) for run in (converted, lowered))
    assert sqnr_db(expected, actual) > 40  # a value on the edge between two steps may fall to the other side
    assert export_to(converted, "onnx", tmp_path / "model").exists()


class TwoAxes(nn.Module):
    """Linears with and without bias on (N, C), of which onnxruntime makes a Gemm if it can; several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return h, self.second(nn.functional.gelu(h)) + t[:, None]


def two_axes(convert, **options):
    """Converted, and an input."""
    torch.manual_seed(0)
    samples = [(torch.randn(4, 8), torch.arange(4)) for _ in range(2)]
    exported = export_transformer(TwoAxes().eval(), samples[0], **options)
    return convert(exported, PTQ4DiTQuantizer(balance="none"), samples), samples[0]


@needs_onnx
@pytest.mark.parametrize("dynamic", [None, ()])
def test_linears_of_two_axes_and_several_outputs(convert, dynamic):
    converted, inputs = two_axes(convert, dynamic=dynamic)
    lowered = lower(converted, "onnx")
    assert lowered.proof.integer_gemms == 2
    for expected, actual in zip(converted(*inputs), lowered(*inputs), strict=True):
        assert sqnr_db(expected, actual) > 60


@needs_onnx
def test_a_file_holds_integer_weights_and_a_free_batch(convert, tmp_path):
    import onnx as package

    path = export_to(two_axes(convert)[0], "onnx", tmp_path / "model")
    assert list(tmp_path.iterdir()) == [path] and path.name == "model.onnx"
    graph = package.load(path).graph
    assert [node.op_type for node in graph.node].count("DequantizeLinear") == 4
    assert sum(t.data_type == package.TensorProto.INT8 and len(t.dims) == 2 for t in graph.initializer) == 2
    x, t = graph.input
    assert (x.name, t.name) == ("x", "t")
    x_rows, t_rows = (value.type.tensor_type.shape.dim[0].dim_param for value in (x, t))
    assert x_rows == t_rows != ""


@needs_onnx
def test_float_in_onnxruntime_is_caught(convert, monkeypatch, tmp_path):
    """Left as it is, a linear of two axes with a bias becomes a float Gemm."""
    monkeypatch.setattr(onnx, "_spell_out", lambda linear: None)
    converted, _ = two_axes(convert)
    message = "'onnx' ran 1 of 2 quantized linears on integer kernels"
    with pytest.raises(LoweringError, match=message):
        lower(converted, "onnx")
    with pytest.raises(LoweringError, match=message):
        export_to(converted, "onnx", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_fewer_than_eight_bits_of_activations_have_no_form_in_onnx(quantized):
    with pytest.raises(LoweringError, match=r"QuantizeLinear saturates at \(0, 255\), the graph at \(0, 63\)"):
        lower(quantized(weight_bits=6, activation_bits=6), "onnx")


def test_without_its_packages_the_backend_says_what_to_install(quantized, monkeypatch):
    absent = dataclasses.replace(BACKENDS["onnx"], packages=("onnxruntime_of_nobody",))
    monkeypatch.setitem(BACKENDS, "onnx", absent)
    with pytest.raises(
        LoweringError, match=r"'onnxruntime_of_nobody' is not installed; .*pip install 'ptq4dit-ao\[onnx\]"
    ):
        lower(quantized(), "onnx")


@needs_onnx
def test_a_float_graph_is_not_written(tiny_exported, tmp_path):
    with pytest.raises(
        LoweringError, match="the graph has no quantized layer that backend 'onnx' could run on integers"
    ):
        export_to(tiny_exported, "onnx", tmp_path / "model")
    assert not list(tmp_path.iterdir())
