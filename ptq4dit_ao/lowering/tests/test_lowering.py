"""One set of tests for every backend: it computes what the graph says, and its proof tells the truth."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch.fx import Graph, GraphModule, Interpreter, Node

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.interface import free_sizes
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import ArgumentError, LoweringError
from ptq4dit_ao.graph.names import LINEAR
from ptq4dit_ao.lowering import (
    KernelProof,
    LoweredModel,
    QuantizedLinear,
    available_backends,
    fbgemm,
    float_linears,
    lower,
    machine,
    missing_backends,
    quantized_linears,
    x86_inductor,
)
from ptq4dit_ao.lowering.mixed import PRODUCTS, compute_in
from ptq4dit_ao.lowering.tests.batches import batch_of
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

lowering = importlib.import_module("ptq4dit_ao.lowering.backend")  # the name is also that of a function

BACKENDS = ["reference", "fbgemm", pytest.param("x86_inductor", marks=pytest.mark.x86)]
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W6A6": (6, 6)}
LINEARS = 14
"""Quantized linears of the tiny DiT: seven a block."""

ONEDNN = "onednn::qlinear_pointwise"
FBGEMM = "quantized::linear_with_input_q_dq_qweight_dq_output_fp32"

needs_onednn = pytest.mark.skipif(not fbgemm.has_onednn(), reason="this torch has no oneDNN")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=BITS)
def converted(request, quantized) -> GraphModule:
    weight_bits, activation_bits = BITS[request.param]
    return quantized(weight_bits=weight_bits, activation_bits=activation_bits)


@pytest.fixture
def changed(quantized) -> GraphModule:
    """A W8A8 graph that a test may change."""
    return copy.deepcopy(quantized())


# -- every backend -------------------------------------------------------------------------------------------------


def test_a_backend_computes_what_the_graph_says(backend, converted):
    lowered = lower(converted, backend)
    coarse = quantized_linears(converted)[0].x_range[1] < 255
    for rows in (4, 1, 7):  # exported at 4
        expected, actual = converted(*batch_of(rows)), lowered(*batch_of(rows))
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        # A value that falls between two steps may be rounded the other way, hence not infinite.
        assert sqnr_db(expected, actual) > (40 if coarse else 60)


def test_the_proof_counts_every_quantized_linear(backend, converted):
    proof = lower(converted, backend, example_inputs=batch_of(2)).proof
    assert proof.backend == backend and proof.float_layers == ()
    assert len(quantized_linears(converted)) == LINEARS
    assert proof.promised == proof.integer_gemms == (0 if backend == "reference" else LINEARS)
    text = "no integer kernels" if backend == "reference" else f"{LINEARS}/{LINEARS} quantized linears on integer GEMMs"
    assert text in str(proof) and str(proof).startswith(f"{backend}: ")


def test_lowering_leaves_the_graph_as_it_was(backend, changed):
    code, tensors = changed.code, {name: tensor.clone() for name, tensor in changed.state_dict().items()}
    lower(changed, backend)
    assert changed.code == code
    assert changed.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in changed.state_dict().items())


def test_a_lowered_model_needs_no_gradient(backend, quantized):
    x, t, y = batch_of(2)
    output = lower(quantized(), backend)(x.requires_grad_(), t, y)
    assert not output.requires_grad and output.grad_fn is None


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "another default dtype": lambda: default_dtype(torch.float64),
}


def test_a_lowered_model_has_its_own_dtypes_wherever_it_is_called(backend, quantized):
    lowered, inputs = lower(quantized(), backend), batch_of(3)
    expected = lowered(*inputs)
    for name, surroundings in SURROUNDINGS.items():
        with surroundings():
            assert torch.equal(lowered(*inputs), expected), name


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_and_wherever_it_was_lowered(quantized, name):
    inputs = batch_of(3)
    expected = lower(quantized(), "fbgemm")(*inputs)
    with SURROUNDINGS[name]():
        lowered = lower(quantized(), "fbgemm")
    assert torch.equal(lowered(*inputs), expected)


class Odd(nn.Module):
    """Linears with and without bias on tensors of two and three axes, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.last = nn.Linear(8, 6), nn.Linear(6, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.columns(nn.functional.gelu(self.rows(x)).transpose(1, 2))  # (N, 6, 6) read across
        return self.last(nn.functional.gelu(h[:, 0]))


def test_odd_shapes(backend, convert):
    torch.manual_seed(0)
    samples = [(torch.randn(4, 6, 8), torch.arange(4)) for _ in range(2)]
    exported = export_transformer(Odd().eval(), samples[0])
    converted = convert(exported, PTQ4DiTQuantizer(balance="none"), samples)
    lowered = lower(converted, backend)
    assert lowered.proof.integer_gemms in (0, 3)
    assert sqnr_db(converted(*samples[0]), lowered(*samples[0])) > 60


def test_made_up_example_inputs_need_shapes(backend, changed):
    for node in changed.graph.nodes:
        node.meta.clear()
    with pytest.raises(LoweringError, match=r"does not say what input 'hidden_states' looks like; pass example_inputs"):
        lower(changed, backend)
    assert isinstance(lower(changed, backend, example_inputs=batch_of(2)), LoweredModel)


# -- the registry ----------------------------------------------------------------------------------------------------


def test_backends_are_listed_with_what_they_are():
    assert {"fbgemm", "reference"} <= available_backends().keys()
    assert not available_backends().keys() & missing_backends().keys()
    assert available_backends().keys() | missing_backends().keys() == lowering.BACKENDS.keys()
    assert all(len(text) > 15 for text in (*available_backends().values(), *missing_backends().values()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fbgem", "backend 'fbgem' is unknown; there are .*'fbgemm', .*; did you mean 'fbgemm'"),
        ("tpu", r"backend 'tpu' is unknown; there are .*'reference'[^;]*$"),
    ],
)
def test_an_unknown_backend(quantized, name, message):
    with pytest.raises(LoweringError, match=message):
        lower(quantized(), name)


def test_backends_of_other_packages_are_loaded_once_at_the_first_look(monkeypatch):
    looks: list[list[str]] = []
    backends, known = lowering.Backends(), lowering.BACKENDS["fbgemm"]
    monkeypatch.setattr(lowering, "load_plugins", lambda: looks.append(list(backends)))  # a plugin looks, too
    backends.add(known)
    assert looks == []
    assert "fbgemm" in backends and "tpu" not in backends and len(backends) == 1
    assert looks == [["fbgemm"]]


# -- odd machines ----------------------------------------------------------------------------------------------------


def lacks(monkeypatch, name: str, why: str) -> None:
    unable = dataclasses.replace(lowering.BACKENDS[name], lacks=lambda: why)
    monkeypatch.setitem(lowering.BACKENDS, name, unable)


def test_a_backend_that_cannot_run_here_is_refused_with_the_reason(quantized, monkeypatch):
    lacks(monkeypatch, "x86_inductor", "there is no C++ compiler; install g++")
    assert missing_backends()["x86_inductor"] == "there is no C++ compiler; install g++"
    with pytest.raises(
        LoweringError, match="'x86_inductor' cannot run here: there is no C[+][+] compiler; install g[+]"
    ):
        lower(quantized(), "x86_inductor")


def test_auto_takes_the_next_best_and_says_why(quantized, monkeypatch, caplog):
    lacks(monkeypatch, "cuda", "torch sees no CUDA GPU")
    lacks(monkeypatch, "x86_inductor", "there is no C++ compiler")
    assert lower(quantized(), "auto").proof.backend == "fbgemm"
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert lines == ["backend 'x86_inductor' cannot run here: there is no C++ compiler; taking 'fbgemm'"]
    lacks(monkeypatch, "fbgemm", "this processor is aarch64, not x86-64")
    assert lower(quantized(), "auto").proof.backend == "reference"


def test_a_compiler_that_is_missing_is_found_missing(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    machine.no_compiler.cache_clear()
    assert machine.no_compiler() == "there is no C++ compiler; install g++ or clang, or point CXX to one"
    monkeypatch.undo()
    machine.no_compiler.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "avx2", "line"), [("arm64", None, "arm64, not x86-64"), ("x86_64", 0, "AVX2")]
)
def test_another_processor_is_recognised(monkeypatch, architecture, avx2, line):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": architecture, "avx2": avx2})
    machine.no_x86.cache_clear()
    assert line in (machine.no_x86() or "")
    monkeypatch.undo()
    machine.no_x86.cache_clear()


def test_eight_bits_are_refused_where_their_products_would_saturate(quantized, monkeypatch, caplog):
    monkeypatch.setattr(machine, "has_dot_product", lambda: False)
    with pytest.raises(
        LoweringError, match="has neither VNNI nor AMX, so 8-bit products overflow 16 bits; quantize act"
    ):
        lower(quantized(), "fbgemm")
    for weight_bits, activation_bits in ((8, 7), (4, 8)):  # the ways out
        lowered = lower(quantized(weight_bits=weight_bits, activation_bits=activation_bits), "fbgemm")
        assert lowered.proof.integer_gemms == LINEARS
    lacks(monkeypatch, "x86_inductor", "there is no C++ compiler")
    assert lower(quantized(), "auto").proof.backend == "reference"
    assert "neither VNNI nor AMX" in caplog.text


# -- the float part in 16 bits ---------------------------------------------------------------------------------------


def test_matrix_products_compute_in_bfloat16_and_nothing_else_changes(changed):
    expected = changed(*batch_of(4))
    dtypes = {node.name: dtype for node, dtype in result_dtypes(changed)}
    for node in changed.graph.nodes:
        node.meta.clear()  # as a loaded graph
    compute_in(changed, torch.bfloat16, batch_of(2))
    after = {node.name: (node, dtype) for node, dtype in result_dtypes(changed)}
    products = {name for name, (node, _) in after.items() if node.target in PRODUCTS}
    assert len(products) > LINEARS
    assert {after[name][1] for name in products} == {torch.bfloat16}
    assert all(after[name][1] == dtype for name, dtype in dtypes.items() if name not in products)
    assert 25 < sqnr_db(expected, changed(*batch_of(4))) < 60
    assert changed(*batch_of(4)).dtype == torch.float32


def result_dtypes(graph: GraphModule) -> list[tuple[Node, torch.dtype]]:
    found = []

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found.append((n, value.dtype))
            return value

    Recorder(graph).run(*batch_of(2))
    return found


def test_a_backend_that_knows_one_float_dtype_says_so(quantized):
    with pytest.raises(
        LoweringError, match=r"'fbgemm' cannot compute its float part in torch.bfloat16 \(only as the model"
    ):
        lower(quantized(), "fbgemm", float_dtype=torch.bfloat16)


@pytest.mark.x86
def test_integers_and_a_bfloat16_rest(quantized):
    converted = quantized()
    lowered = lower(converted, "x86_inductor", float_dtype=torch.bfloat16)
    assert lowered.proof.integer_gemms == LINEARS
    assert 25 < sqnr_db(converted(*batch_of(4)), lowered(*batch_of(4))) < 60


# -- any size ----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two linears with GELU between them, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


@pytest.fixture
def any_size(convert) -> GraphModule:
    torch.manual_seed(0)
    samples = [(torch.randn(2, 6, 32),) for _ in range(2)]
    graph = export_transformer(Mlp().eval(), samples[0])
    assert free_sizes(graph).names == ("batch", "tokens")
    return convert(graph, PTQ4DiTQuantizer(balance="none"), samples)


def test_a_backend_computes_any_size(backend, any_size):
    lowered = lower(any_size, backend)
    metrics.reset()
    for shape in ((2, 6, 32), (1, 6, 32), (1, 1, 32), (5, 17, 32)):
        x = torch.randn(shape)
        assert sqnr_db(any_size(x), lowered(x)) > 40
    assert metrics.generated_kernel_count == 0  # no size needs another compilation


def test_a_size_beyond_its_bounds_is_refused(backend, convert):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(32, 32), nn.Parameter(torch.randn(9, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.table[: x.shape[1]])

    x = torch.randn(2, 6, 32)
    graph = convert(export_transformer(Positions().eval(), (x,)), PTQ4DiTQuantizer(balance="none"), [(x,)])
    lowered = lower(graph, backend)
    assert lowered(torch.randn(1, 9, 32)).shape == (1, 9, 32)
    with pytest.raises(ArgumentError, match="tokens is 10, more than 9; give it other sizes, or export again"):
        lowered(torch.randn(1, 10, 32))


def test_an_example_of_one_row_fixes_nothing(backend, any_size):
    lowered = lower(any_size, backend, example_inputs=(torch.randn(1, 1, 32),))
    x = torch.randn(5, 17, 32)
    assert sqnr_db(any_size(x), lowered(x)) > 40


def test_one_tensor_for_two_inputs_is_two_inputs(backend, convert):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return self.layer(x) * y + z

    x, y, z = (torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    graph = convert(export_transformer(Sum().eval(), (x, y, z)), PTQ4DiTQuantizer(balance="none"), [(x, y, z)])
    lowered = lower(graph, backend, example_inputs=(x, y, y))
    assert sqnr_db(graph(x, y, z), lowered(x, y, z)) > 40


@pytest.mark.x86
def test_an_activation_is_fused_at_free_sizes(any_size, monkeypatch):
    """Export reads the number of tokens from the first linear's output, which would be one more reader of it."""
    arguments: list[object] = []

    def look(graph: Graph) -> None:
        for node in graph.nodes:
            arguments.extend((*node.args, *node.kwargs.values()) if "qlinear" in str(node.target) else ())

    monkeypatch.setitem(x86_inductor.SETTINGS, "post_grad_custom_post_pass", look)
    assert lower(any_size, "x86_inductor").proof.integer_gemms == 2
    assert "gelu" in arguments


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_graph_that_is_consumed_loses_its_weights(changed):
    expected, before = changed(*batch_of(3)), len(list(changed.buffers()))
    lowered = lower(changed, "fbgemm", consume=True)
    assert not [b for b in changed.buffers() if b.dtype == torch.int8 and b.ndim == 2] and before > LINEARS
    assert sqnr_db(expected, lowered(*batch_of(3))) > 60


# -- an honest proof -------------------------------------------------------------------------------------------------


def register(monkeypatch, build) -> None:
    honest = lowering.BACKENDS["fbgemm"]
    monkeypatch.setitem(lowering.BACKENDS, "other", dataclasses.replace(honest, name="other", build=build))


def test_a_backend_that_does_nothing_is_caught(quantized, monkeypatch):
    register(monkeypatch, lambda request: request.graph)
    with pytest.raises(LoweringError, match=r"'other' ran 0 of 14 quantized linears on integer kernels; pass allow_"):
        lower(quantized(), "other")
    proof = lower(quantized(), "other", allow_float_fallback=True).proof
    assert (proof.integer_gemms, proof.promised, proof.kernels) == (0, LINEARS, {})
    assert str(proof) == "other: 0/14 quantized linears on integer GEMMs (no integer kernels)"


def test_a_backend_that_forgets_one_linear_is_caught(quantized, monkeypatch):
    register(monkeypatch, lambda request: fbgemm.build(dataclasses.replace(request, linears=request.linears[:-1])))
    with pytest.raises(LoweringError, match="ran 13 of 14 quantized linears on integer kernels"):
        lower(quantized(), "other")


def test_what_is_counted_is_what_runs(quantized, monkeypatch):
    honest = lowering.BACKENDS["fbgemm"]
    miscounted = dataclasses.replace(honest, count=lambda run, inputs: {ONEDNN: 13})
    monkeypatch.setitem(lowering.BACKENDS, "fbgemm", miscounted)
    with pytest.raises(LoweringError, match="ran 13 of 14"):
        lower(quantized(), "fbgemm")


def asymmetric(graph: GraphModule) -> str:
    """Shift the zero points of one weight; returns its linear's name."""
    linear = quantized_linears(graph)[3]
    linear.weight_zero_point.fill_(1)
    return linear.name


def test_a_weight_that_is_quantized_at_run_time_is_not_overlooked(changed):
    """As a convert that does not fold constants leaves it: float, unless somebody looks."""
    linear = quantized_linears(changed)[3]
    dequantize = linear.node.args[1]
    scale, zero_point, *rest = dequantize.args[1:]
    with changed.graph.inserting_before(dequantize):
        changed.register_buffer("_float_weight", linear.weight.float())
        weight = changed.graph.get_attr("_float_weight")
        quantize = torch.ops.quantized_decomposed.quantize_per_channel.default
        dequantize.update_arg(0, changed.graph.call_function(quantize, (weight, scale, zero_point, *rest)))
    changed.recompile()
    message = rf"'fbgemm' cannot carry 1 of 14 quantized linears \({linear.name}: its weight is not constant integers"
    with pytest.raises(LoweringError, match=message):
        lower(changed, "fbgemm")
    lowered = lower(changed, "fbgemm", allow_float_fallback=True)
    assert (lowered.proof.integer_gemms, lowered.proof.promised) == (LINEARS - 1, LINEARS)


def test_asymmetric_weights_are_refused_or_run_in_float(changed):
    name = asymmetric(changed)
    message = rf"'fbgemm' cannot carry 1 of 14 quantized linears \({name}: needs symmetric weights\); pass allow_float"
    with pytest.raises(LoweringError, match=message):
        lower(changed, "fbgemm")
    lowered = lower(changed, "fbgemm", allow_float_fallback=True)
    assert lowered.proof.float_layers == ((name, "needs symmetric weights"),)
    assert (lowered.proof.integer_gemms, lowered.proof.promised) == (LINEARS - 1, LINEARS)
    assert sqnr_db(changed(*batch_of(4)), lowered(*batch_of(4))) > 60


def test_a_broken_promise_gives_its_reasons():
    reasons = (("linear_3", "needs symmetric weights"),)
    proof = KernelProof(backend="fbgemm", promised=2, kernels={ONEDNN: 1}, float_layers=reasons)
    importlib.import_module("ptq4dit_ao.lowering.proof").check_proof(proof, allow_float_fallback=True)
    with pytest.raises(LoweringError, match=r"ran 1 of 2 .* kernels \(linear_3: needs symmetric weights\)"):
        importlib.import_module("ptq4dit_ao.lowering.proof").check_proof(proof, allow_float_fallback=False)


# -- fbgemm ----------------------------------------------------------------------------------------------------------


@needs_onednn
def test_onednn_is_used_where_torch_has_it(quantized):
    lowered = lower(quantized(), "fbgemm")
    assert lowered.proof.kernels == {ONEDNN: LINEARS}
    # q, k and v read one tensor, which is quantized once.
    assert sum(isinstance(module, fbgemm.Quantize) for module in lowered.modules()) == LINEARS - 2 * 2


class Functions(nn.Module):
    """Two linears with a function between them, which a third reader may watch."""

    def __init__(self, function: Callable[[Tensor], Tensor], watched: bool) -> None:
        super().__init__()
        self.first, self.second, self.function, self.watched = nn.Linear(8, 32), nn.Linear(32, 8), function, watched

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.function(self.first(x))
        y = self.second(h)
        return y + h[..., :8] if self.watched else y


@needs_onednn
@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    ("function", "left"),
    [
        (nn.functional.gelu, 0),
        (functools.partial(nn.functional.gelu, approximate="tanh"), 0),
        (nn.functional.silu, 0),
        (nn.functional.relu, 0),
        (nn.functional.tanh, 1),
    ],
)
def test_a_linear_computes_what_alone_reads_it(convert, function, left, watched, bits):
    torch.manual_seed(0)
    samples = [(torch.randn(4, 6, 8) * 3, torch.arange(4)) for _ in range(2)]
    exported = export_transformer(Functions(function, watched).eval(), samples[0])
    quantizer = PTQ4DiTQuantizer(balance="none", weight_bits=bits, activation_bits=bits)
    converted = convert(exported, quantizer, samples)
    lowered = lower(converted, "fbgemm")
    assert lowered.proof.integer_gemms == 2
    calls = [node for node in lowered.run.graph.nodes if node.op == "call_function"]
    assert len(calls) == left + 2 * watched  # a slice and an addition
    apart = sum(node.op == "call_module" for node in lowered.run.graph.nodes) - 2
    assert apart == 1 + (left or watched)  # quantizers; the second linear's input is the first's output, or is not
    for batch in (samples[0], (torch.randn(4, 6, 8) * 9, torch.arange(4))):  # within the ranges, and beyond
        assert sqnr_db(converted(*batch), lowered(*batch)) > (50 if bits == 8 else 35)


def test_without_onednn_the_kernels_are_fbgemms(quantized, monkeypatch):
    monkeypatch.setattr(fbgemm, "has_onednn", lambda: False)
    for bits in (8, 4):
        converted = quantized(weight_bits=bits, activation_bits=8)
        lowered = lower(converted, "fbgemm")
        assert lowered.proof.kernels == {FBGEMM: LINEARS}
        assert sqnr_db(converted(*batch_of(7)), lowered(*batch_of(7))) > 50
    with pytest.raises(LoweringError, match=r"FBGEMM quantizes to the full 8 bits, got \(0, 63\)"):
        lower(quantized(weight_bits=6, activation_bits=6), "fbgemm")


def test_packed_weights_replace_the_unpacked_ones(quantized):
    converted = quantized()
    lowered = lower(converted, "fbgemm")
    kept = {name for name, tensor in lowered.run.named_buffers() if tensor.dtype == torch.int8 and tensor.ndim == 2}
    assert not kept & {name for name, _ in converted.named_buffers()}
    assert not [node for node in lowered.run.graph.nodes if "dequantize" in str(node.target)]


def test_a_shared_weight_serves_every_linear_that_reads_it(convert):
    """The same module twice in a graph (pytorch/ao#4478)."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.linear(nn.functional.gelu(self.linear(x)))

    torch.manual_seed(0)
    samples = [(torch.randn(4, 6, 8), torch.arange(4)) for _ in range(2)]
    exported = export_transformer(Twice().eval(), samples[0])
    converted = convert(exported, PTQ4DiTQuantizer(balance="none"), samples)
    lowered = lower(converted, "fbgemm")
    assert lowered.proof.integer_gemms == 2
    assert sqnr_db(converted(*samples[0]), lowered(*samples[0])) > 60


SIXTEEN_BITS = (
    r"cannot carry 3 of 3 .*needs a float32 model, got bfloat16: call \.float\(\) on the model before quantizing, or "
    r"lower for .*'cuda'"
)


def test_sixteen_bit_models_are_refused(convert):
    torch.manual_seed(0)
    samples = [(torch.randn(4, 6, 8, dtype=torch.bfloat16), torch.arange(4)) for _ in range(2)]
    exported = export_transformer(Odd().eval().bfloat16(), samples[0])
    converted = convert(exported, PTQ4DiTQuantizer(balance="none"), samples)
    with pytest.raises(LoweringError, match=SIXTEEN_BITS):
        lower(converted, "fbgemm")
    assert lower(converted, "reference")(*samples[0]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: dataclasses.replace(q, x_dtype=torch.int8), "needs uint8 activations and int8 weights, got int8"),
        (lambda q: with_constant(q, 0, torch.zeros(2, 2, dtype=torch.uint8)), "got uint8 and uint8"),
        (lambda q: with_constant(q, 2, torch.tensor([0, 1])), "needs symmetric weights"),
    ],
)
def test_what_fbgemm_cannot_carry(changed, change, reason):
    linear = quantized_linears(changed)[0]
    backend = lowering.BACKENDS["fbgemm"]
    assert backend.why_not(linear) is None
    assert reason in (backend.why_not(change(linear)) or "")


def with_constant(linear: QuantizedLinear, index: int, value: Tensor) -> QuantizedLinear:
    setattr(linear.graph, linear.dequantize_weight.args[index].target, value)
    return linear


# -- matching ----------------------------------------------------------------------------------------------------------


def test_every_linear_is_quantized_or_float(quantized):
    converted = quantized()
    integer, rest = quantized_linears(converted), float_linears(converted)
    linears = [node for node in converted.graph.nodes if node.target is LINEAR]
    assert [node for node in linears if node in rest] == rest and len(rest) == len(linears) - LINEARS > 0
    assert [linear.node for linear in integer] == [node for node in linears if node not in rest]


def test_a_match_holds_what_the_graph_holds(quantized):
    converted = quantized(weight_bits=4, activation_bits=8)
    for linear in quantized_linears(converted):
        assert isinstance(linear, QuantizedLinear)
        dequantize, dequantize_weight, bias = linear.node.args
        assert dequantize.args[0] is linear.quantize and linear.quantize.args[0] is linear.x
        assert linear.quantize.args[1:] == (
            linear.x_scale, linear.x_zero_point, *linear.x_range, linear.x_dtype,
        )  # fmt: skip
        assert torch.equal(linear.weight, getattr(converted, dequantize_weight.args[0].target))
        assert linear.weight_range == (-8, 7) and linear.weight.shape[0] == len(linear.weight_scale) == len(linear.bias)
        assert linear.dtype == torch.float32 and bias.op == "get_attr"
