"""What a backend has built is compared with the graph, and refused where it computes something else."""

from __future__ import annotations

import dataclasses
import importlib
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.lowering import export_to, lower, parity
from ptq4dit_ao.lowering.backend import BACKENDS, Request, Runnable
from ptq4dit_ao.lowering.tests.batches import batch_of
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

fbgemm = importlib.import_module("ptq4dit_ao.lowering.fbgemm")
aten = torch.ops.aten

pytestmark = pytest.mark.skipif(BACKENDS["fbgemm"].unavailable() is not None, reason="fbgemm cannot run here")


def register(monkeypatch, build) -> None:
    """A backend ``other`` with the kernels of ``fbgemm``."""
    monkeypatch.setitem(BACKENDS, "other", dataclasses.replace(BACKENDS["fbgemm"], name="other", build=build))


def without(name: str):
    """Builds as fbgemm, but drops an addition on the way."""

    def build(request: Request) -> Runnable:
        for node in request.graph.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if node.name == name:
                node.replace_all_uses_with(node.args[0])
        return fbgemm.build(request)

    return build


@pytest.fixture
def converted(quantized) -> GraphModule:
    return quantized()


def test_a_backend_says_by_how_much_it_differs(converted):
    proof = lower(converted, "fbgemm").proof
    assert 0 <= proof.difference < 1e-3 and "differs from the simulated graph by" in proof.parity
    assert lower(converted, "fbgemm", verify=False).proof.parity == "not compared with the simulated graph"


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_dropped_addition_is_refused_with_its_node(converted, monkeypatch, place):
    name = converted.graph.find_nodes(op="call_function", target=aten.add.Tensor)[place].name
    register(monkeypatch, without(name))
    message = (
        rf"'other' has built differs .* by \S+ of the output's size at batch 4, .*, first at {name} \(aten\.add\.T"
    )
    with pytest.raises(LoweringError, match=message):
        lower(converted, "other")
    assert lower(converted, "other", verify=False).proof.integer_gemms == 14


def test_what_is_consumed_is_compared_all_the_same(quantized, monkeypatch, duplicate):
    name = quantized().graph.find_nodes(op="call_function", target=aten.add.Tensor)[0].name
    register(monkeypatch, without(name))
    with pytest.raises(LoweringError, match=r"'other' has built differs from the quantized graph by"):
        lower(duplicate(quantized()), "other", consume=True)
    assert lower(duplicate(quantized()), "fbgemm", consume=True).proof.difference < 1e-3


def test_another_batch_is_compared_too(converted, monkeypatch):
    def build(request: Request) -> Runnable:
        right = fbgemm.build(request)
        return lambda *inputs: right(*inputs) if len(inputs[0]) == 4 else right(*inputs).roll(1, 0)

    register(monkeypatch, build)
    with pytest.raises(LoweringError, match=r"'other' has built differs .* at batch 3,"):
        lower(converted, "other")


def test_a_batch_that_only_the_backend_cannot_run(converted, monkeypatch):
    def build(request: Request) -> Runnable:
        right = fbgemm.build(request)
        return lambda *inputs: right(*inputs) if len(inputs[0]) == 4 else 1 / 0

    register(monkeypatch, build)
    with pytest.raises(LoweringError, match="fails at batch 3, at which the graph runs: division by zero; use another"):
        lower(converted, "other")


def test_a_fixed_batch_is_the_only_one_compared(tiny_dit, tiny_samples, convert):
    graph = export_transformer(tiny_dit, tiny_samples[0], dynamic=())
    fixed = convert(graph, PTQ4DiTQuantizer(balance="none"), tiny_samples)
    assert lower(fixed, "fbgemm").proof.difference < 1e-3


def test_example_inputs_are_what_is_compared_on(converted, monkeypatch):
    seen: list[Tensor] = []

    def build(request: Request) -> Runnable:
        right = fbgemm.build(request)

        def run(*inputs: Tensor) -> Tensor:
            seen.append(inputs[0])
            return right(*inputs)

        return run

    register(monkeypatch, build)
    x, t, y = batch_of(2)
    lower(converted, "other", example_inputs=(x, t, y))
    assert {tuple(rows.shape) for rows in seen} == {(2, 4, 8, 8), (3, 4, 4, 4)}
    assert all(
        torch.equal(row, x[i % 2, :, : row.shape[1], : row.shape[2]]) for rows in seen for i, row in enumerate(rows)
    )


class Sensitive(nn.Module):
    """Its output depends on the last digits of a linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3e6 * self.last(nn.functional.gelu(self.first(x)))) + t[:, None]


def test_what_rounding_explains_is_not_refused(convert, monkeypatch):
    torch.manual_seed(0)
    samples = [(torch.randn(4, 8), torch.rand(4)) for _ in range(2)]
    graph = convert(export_transformer(Sensitive().eval(), samples[0]), PTQ4DiTQuantizer(balance="none"), samples)
    found = lower(graph, "fbgemm", example_inputs=samples[0]).proof.difference
    assert found > parity.TOLERANCE[torch.float32]
    monkeypatch.setattr(parity, "RESPONSE", 0)
    with pytest.raises(LoweringError, match="rounding explains 0.01"):
        lower(graph, "fbgemm", example_inputs=samples[0])


def test_an_output_that_is_not_finite_cannot_be_compared(converted, caplog):
    x, t, y = batch_of(2)
    with caplog.at_level(logging.WARNING):
        proof = lower(converted, "fbgemm", example_inputs=(x * torch.nan, t, y)).proof
    assert proof.difference is None and "is not finite, so that what backend 'fbgemm' computes was not" in caplog.text


def test_a_converters_error_names_backend_and_operator(converted, monkeypatch):
    def build(request: Request) -> Runnable:
        raise RuntimeError("Check 'ok' failed at src/core.cpp\nNo conversion rule found for aten.frob.Tensor, sorry")

    register(monkeypatch, build)
    with pytest.raises(LoweringError, match=r"'other' cannot build this model: RuntimeError: Check .* \(aten\.frob\.T"):
        lower(converted, "other")


class CutOff(nn.Module):
    """Two streams, of which the last block's text is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.text, self.image = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = nn.functional.gelu(self.both(x)) + t[:, None, None]
        joined = torch.cat([self.text(tokens[:, :2]), self.image(tokens[:, 2:])], 1)
        return joined.split([2, x.shape[1] - 2], 1)[1]


def test_linears_that_no_output_depends_on_are_found(convert):
    torch.manual_seed(0)
    samples = [(torch.randn(4, 6, 8), torch.rand(4)) for _ in range(2)]
    graph = convert(export_transformer(CutOff().eval(), samples[0]), PTQ4DiTQuantizer(balance="none"), samples)
    _, text, _ = graph.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert parity.idle_linears(graph, samples[0]) == (text.name,)
    assert lower(graph, "fbgemm").proof.promised == 3  # runs what is there


MARKS = {
    "onnx": (pytest.mark.onnx,),
    "openvino": (pytest.mark.openvino,),
    "x86_inductor": (pytest.mark.x86,),
    "aoti": (pytest.mark.x86, pytest.mark.aoti),
}


@pytest.mark.parametrize("backend", [pytest.param(name, marks=marks) for name, marks in MARKS.items()])
def test_a_backend_may_leave_them_out(convert, backend, tmp_path):
    if (why := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(why)
    torch.manual_seed(0)
    samples = [(torch.randn(4, 6, 8), torch.rand(4)) for _ in range(2)]
    graph = convert(export_transformer(CutOff().eval(), samples[0]), PTQ4DiTQuantizer(balance="none"), samples)
    proof = lower(graph, backend).proof
    if proof.idle:  # else it did not see it, and ran all three
        assert proof.promised == proof.integer_gemms == 2 and "; 1 that no output depends on left out" in str(proof)
    assert proof.difference < 1e-3
    if BACKENDS[backend].write is not None:
        assert export_to(graph, backend, tmp_path / "model").exists()
