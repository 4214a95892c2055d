"""The lowered graph: on the CPU reference everywhere, on a GPU where there is one."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core.expansion import Expansion
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.lowering import Request, lower, quantized_linears
from ptq4dit_ao.lowering.cuda import replace_linears
from ptq4dit_ao.lowering.cuda.build import by_thread
from ptq4dit_ao.lowering.tests.batches import batch_of
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

backends = importlib.import_module("ptq4dit_ao.lowering.backend").BACKENDS

BITS = {"W8A8": (8, 8, None), "W4A8": (4, 8, None), "W6A6": (6, 6, None), "expanded": (4, 8, Expansion(group=16))}
LINEARS = 14
"""Quantized linears of the tiny DiT: seven a block."""
CPU = torch.device("cpu")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def request_for(converted: GraphModule, float_dtype: torch.dtype | None = None) -> Request:
    graph = GraphModule(converted, copy.deepcopy(converted.graph))
    return Request(graph=graph, linears=quantized_linears(graph), example_inputs=batch_of(4), float_dtype=float_dtype)


@pytest.fixture(params=BITS)
def converted(request, quantized) -> GraphModule:
    weight_bits, activation_bits, expansion = BITS[request.param]
    return quantized(weight_bits=weight_bits, activation_bits=activation_bits, expansion=expansion)


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """Lets ``lower`` take the backend where there is no GPU: what runs is the CPU reference."""
    monkeypatch.setitem(backends, "cuda", dataclasses.replace(backends["cuda"], lacks=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# -- without a GPU ---------------------------------------------------------------------------------------------------


def test_a_lowered_graph_computes_what_the_converted_one_says(on_cpu, converted):
    lowered = lower(converted, "cuda")
    linear = quantized_linears(converted)[0]
    name = "expanded" if linear.expansion else "int4" if linear.weight_bits == 4 else "int8"
    assert lowered.proof.kernels == {f"ptq4dit_ao::{name}_linear": LINEARS}
    for rows in (4, 1, 7):
        expected, actual = converted(*batch_of(rows)), lowered(*batch_of(rows))
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        assert sqnr_db(expected, actual.cpu()) > 100  # the same integers, so only rounding differs


@pytest.mark.parametrize("float_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("options", "linears"), [({"dynamic": "token"}, LINEARS), ({"activation_bits": 16}, 0)])
def test_inputs_of_tokens_with_ranges_of_their_own_and_float_ones(on_cpu, quantized, options, linears, float_dtype):
    converted = quantized(**options)
    lowered = lower(converted, "cuda", float_dtype=float_dtype)
    assert lowered.proof.integer_gemms == linears and lowered.proof.weight_only == LINEARS - linears
    for rows in (4, 1, 7):
        db = sqnr_db(converted(*batch_of(rows)), lowered(*batch_of(rows)).cpu())
        assert db > (90 if float_dtype is None else 30)


@pytest.mark.x86
def test_what_compiles_is_what_runs_eagerly(quantized):
    graph = replace_linears(request_for(quantized(weight_bits=4, activation_bits=8)), CPU)
    compiled = torch.compile(graph, fullgraph=True)
    with torch.no_grad():
        for rows in (4, 3):
            assert sqnr_db(graph(*batch_of(rows)), compiled(*batch_of(rows)).cpu()) > 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linears_write_16_bits_where_the_float_part_computes_in_them(on_cpu, quantized, dtype):
    converted = quantized()
    lowered = lower(converted, "cuda", float_dtype=dtype)
    linears = [module for name, module in lowered.run.named_children() if name.startswith("_integer_linear")]
    assert len(linears) == LINEARS and all(module.out_dtype == dtype for module in linears)
    assert all(module.scale.dtype == torch.float32 for module in linears)
    actual = lowered(*batch_of(4))
    assert actual.dtype == torch.float32 and sqnr_db(converted(*batch_of(4)), actual.cpu()) > 30


class Plain(nn.Module):
    """Two linears, one without bias, which read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(9, 6), nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = nn.functional.gelu(x + torch.arange(9, device=x.device))
        return self.one(x) * self.other(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_stays_so(on_cpu, convert, dtype):
    torch.manual_seed(0)
    samples = [(torch.randn(4, 5, 9, dtype=dtype), torch.arange(4)) for _ in range(2)]
    exported = export_transformer(Plain().eval().to(dtype), samples[0])
    converted = convert(exported, PTQ4DiTQuantizer(balance="none"), samples)
    lowered = lower(converted, "cuda")
    assert lowered.proof.kernels == {"ptq4dit_ao::int8_linear": 2}
    actual = lowered(*samples[0])
    assert actual.dtype == dtype and sqnr_db(converted(*samples[0]), actual.cpu()) > 35


def test_a_tensor_is_quantized_once(quantized):
    graph = replace_linears(request_for(quantized()), CPU)
    names = [name for name, _ in graph.named_children()]
    assert sum(name.startswith("_quantize") for name in names) == LINEARS - 2 * 2  # q, k and v read one tensor
    assert not [node for node in graph.graph.nodes if "quantized_decomposed" in str(node.target)]


def test_four_bits_take_half_a_byte(quantized):
    def weight_bytes(bits: int) -> int:
        graph = replace_linears(request_for(quantized(weight_bits=bits, activation_bits=8)), CPU)
        return sum(tensor.nbytes for tensor in graph.state_dict().values() if tensor.dtype == torch.int8)

    assert weight_bytes(8) == 2 * weight_bytes(4) > 0


def test_every_tensor_and_device_moves(convert):
    """To ``meta``, a device that any machine has."""
    torch.manual_seed(0)
    samples = [(torch.randn(4, 5, 9), torch.arange(4)) for _ in range(2)]
    exported = export_transformer(Plain().eval(), samples[0])
    converted = convert(exported, PTQ4DiTQuantizer(balance="none"), samples)
    graph = replace_linears(request_for(converted), torch.device("meta"))
    assert graph(*(x.to("meta") for x in samples[0])).device.type == "meta"
    assert {tensor.device.type for tensor in graph.state_dict().values()} == {"meta"}


def test_sums_that_overflow_32_bits_are_refused(quantized):
    linear = quantized_linears(quantized())[0]
    assert backends["cuda"].why_not(linear) is None
    terms = linear.weight.shape[1]
    wide = dataclasses.replace(linear, x_range=(0, 2**31 // (128 * terms) + 1))
    assert backends["cuda"].why_not(wide) == f"sums of {terms} products may overflow 32 bits"


@pytest.mark.parametrize(
    ("built_for", "sees", "capability", "why"),
    [
        (None, False, (0, 0), r"was built without CUDA; install a CUDA build from pytorch.org"),
        ("13.0", False, (0, 0), r"torch sees no CUDA GPU"),
        ("13.0", True, (7, 5), r"Some GPU is older than Ampere \(compute capability 8.0\)"),
    ],
)
def test_a_machine_that_cannot_run_it_says_why(quantized, monkeypatch, built_for, sees, capability, why):
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    with pytest.raises(LoweringError, match=f"backend 'cuda' cannot run here: .*{why}"):
        lower(quantized(), "cuda")


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_the_first_thread_alone_replays():
    run = by_thread(lambda x: (x, "replayed"), lambda x: (x, "launched"))
    assert run(1) == (1, "replayed")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, 2).result() == (2, "launched")
    assert run(3) == (3, "replayed")


@needs_gpu
@pytest.mark.parametrize("float_dtype", [None, torch.bfloat16])
def test_a_gpu_computes_what_the_graph_says(converted, float_dtype):
    lowered = lower(converted, "cuda", float_dtype=float_dtype)
    assert lowered.proof.integer_gemms == LINEARS
    for rows in (4, 1, 7):
        expected = converted(*batch_of(rows))  # still on the CPU
        outputs = [lowered(*batch_of(rows)) for _ in range(4)]  # compiled, recorded, replayed twice
        assert outputs[0].is_cuda
        assert all(torch.equal(output, outputs[-1]) for output in outputs[1:])
        assert sqnr_db(expected, outputs[-1].cpu()) > (30 if float_dtype else 40)


@pytest.mark.cuda
@needs_gpu
def test_without_triton_a_gpu_runs_eagerly(quantized, monkeypatch):
    monkeypatch.setattr("ptq4dit_ao.lowering.cuda.build.has_triton", lambda: False)
    monkeypatch.setattr("ptq4dit_ao.lowering.cuda.ops.has_triton", lambda: False)
    converted = quantized(weight_bits=4, activation_bits=8)
    lowered = lower(converted, "cuda")
    assert lowered.proof.integer_gemms == LINEARS
    assert sqnr_db(converted(*batch_of(4)), lowered(*batch_of(4)).cpu()) > 40
