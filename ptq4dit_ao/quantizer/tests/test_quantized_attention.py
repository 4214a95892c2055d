"""Attention in 8 bits: which ranges it gets, that v's follows the fold, that rounding sees it, and refusals."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.graph.attention import FUSED, Attention, decompose_attention, find_attention
from ptq4dit_ao.lowering import lower
from ptq4dit_ao.lowering.match import quantized_products
from ptq4dit_ao.observers import AttentionObserver, TimestepClock
from ptq4dit_ao.observers.qdq import QuantSpec
from ptq4dit_ao.passes import balance_result
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer, round_sequentially, tokens_seen
from ptq4dit_ao.quantizer.attention import PROBABILITIES
from ptq4dit_ao.rounding.layers import find_groups
from ptq4dit_ao.rounding.resume import fingerprint
from ptq4dit_ao.rounding.settings import RoundingSettings
from ptq4dit_ao.rounding.streams import Streams

BLOCKS, HEADS, CHANNELS = 2, 2, 16
OPERANDS = [(-128, 127, torch.int8), (-128, 127, torch.int8), (0, 255, torch.uint8), (-128, 127, torch.int8)]
"""q, k, probabilities, v."""


def factors(converted: GraphModule) -> list[list[tuple]]:
    """Of every attention, scale, zero point, range and dtype of q, k, probabilities and v."""
    products = quantized_products(converted)
    return [
        [node.args[1:] for product in pair for node in product.args]
        for pair in zip(products[::2], products[1::2], strict=True)
    ]


@pytest.fixture
def prepare(tiny_exported, tiny_samples, duplicate):
    """``prepare(**options)``: the tiny DiT, calibrated."""

    def run(**options) -> GraphModule:
        prepared = prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(**options))
        for sample in tiny_samples:
            prepared(*sample)
        return prepared

    return run


@pytest.fixture(scope="session")
def values(tiny_exported, tiny_samples, duplicate) -> list[dict[str, Tensor]]:
    """Of every attention of the float model, all that q, k, the probabilities and v ever are."""
    graph = duplicate(tiny_exported)
    decompose_attention(graph)
    found = find_attention(graph)
    seen = [Recorder(graph, found).read(sample) for sample in tiny_samples]
    return [{name: torch.cat([one[i][name] for one in seen]) for name in seen[0][i]} for i in range(len(found))]


class Recorder(Interpreter):
    def __init__(self, graph: GraphModule, found: list[Attention]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.found = found

    def read(self, sample: tuple[Tensor, ...]) -> list[dict[str, Tensor]]:
        self.run(*sample)
        return [{name: self.env[x] for name, (x, _) in one.operands.items()} for one in self.found]


def test_it_is_off_by_default(quantized):
    converted = quantized()
    assert len(converted.graph.find_nodes(op="call_function", target=FUSED)) == BLOCKS
    assert quantized_products(converted) == []


def test_ranges_without_balancing_are_those_of_the_float_model(quantized, values):
    quantized = factors(quantized(attention_bits=8, balance="none"))
    assert len(quantized) == BLOCKS
    for found, seen in zip(quantized, values, strict=True):
        assert [one[2:] for one in found] == OPERANDS
        assert all(zero_point == 0 for _, zero_point, *_ in found)
        largest = [float(seen[name].abs().max()) for name in seen]
        steps = [127.5, 127.5, 255, 127.5]
        for (scale, *_), top, step in zip(found, largest, steps, strict=True):
            assert scale == pytest.approx(top / step, rel=1e-6)


def test_the_range_of_v_follows_the_fold(quantized, values):
    converted = quantized(attention_bits=8)
    outcomes = balance_result(converted).outcomes
    plain = factors(quantized(attention_bits=8, balance="none"))
    for block, (found, seen) in enumerate(zip(factors(converted), values, strict=True)):
        outcome = outcomes[f"transformer_blocks.{block}.attn1.to_out.0"]
        variables = outcome.site.consumers[0].variables
        b = torch.tensor([float(outcome.b[i - 1]) if i else 1.0 for i in variables]).view(HEADS, 1, CHANNELS)
        assert b.max() > 1.2 * b.min()
        q, k, probabilities, v = (scale for scale, *_ in found)
        assert v == pytest.approx(float((seen["v"] / b).abs().max()) / 127.5, rel=1e-5)
        assert v != pytest.approx(plain[block][3][0], rel=1e-3)
        assert [q, k, probabilities] == pytest.approx([scale for scale, *_ in plain[block][:3]], rel=1e-6)


@pytest.mark.parametrize(("bits", "signed", "unsigned"), [(6, (-32, 31), (0, 63)), (4, (-8, 7), (0, 15))])
def test_bits_are_ranges_of_one_dtype(quantized, bits, signed, unsigned):
    for found in factors(quantized(attention_bits=bits)):
        assert [one[2:4] for one in found] == [signed, signed, unsigned, signed]


def test_it_costs_little_and_more_bits_cost_less(quantized, tiny_exported, tiny_samples):
    expected = torch.cat([tiny_exported(*sample) for sample in tiny_samples])

    def db(bits: int | None) -> float:
        converted = quantized(attention_bits=bits)
        return sqnr_db(expected, torch.cat([converted(*sample) for sample in tiny_samples]))

    assert db(8) > db(None) - 2
    assert db(8) > db(6) + 2 and db(6) > db(4) + 6


def test_any_batch_runs(quantized, tiny_exported):
    converted = quantized(attention_bits=8)
    for rows in (2, 7):
        sample = torch.ones(rows, 4, 8, 8), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        assert converted(*sample).shape == tiny_exported(*sample).shape


def test_small_probabilities_keep_their_steps():
    spec = QuantSpec.of(PROBABILITIES, eps=PROBABILITIES.observer_or_fake_quant_ctr().eps)
    observer = AttentionObserver(spec, None, "attn (probabilities)", TimestepClock())  # type: ignore[arg-type]
    observer(torch.full((2, 4, 8192), 1 / 8192))
    scale, zero_point = observer.qparams()
    assert float(scale) == pytest.approx(1 / 8192 / 255) and int(zero_point) == 0


def test_two_folds_divide_twice():
    spec = QuantSpec.of(PROBABILITIES)
    observer = AttentionObserver(spec, None, "attn (v)", TimestepClock(), {1, 3})  # type: ignore[arg-type]
    x = torch.ones(2, 2, 3, 2) * torch.tensor([[[1.0, 2.0]], [[4.0, -8.0]]])
    observer(x)
    assert [float(bound) for bound in observer.range()] == [-8, 4]
    observer.divide(torch.tensor([[[[1.0, 2.0]], [[8.0, 2.0]]]]).double())
    observer.divide(torch.tensor([[[[0.25, 1.0]], [[1.0, 2.0]]]]).double())
    assert [float(bound) for bound in observer.range()] == [-2, 4]


def test_what_was_never_run_or_is_not_finite_is_named(tiny_exported, duplicate):
    bare = prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(balance="none", attention_bits=8))
    first = next(module for module in bare.modules() if isinstance(module, AttentionObserver))
    with pytest.raises(CalibrationError, match=r"'transformer_blocks.0.attn1 \(\w+\)' was never run"):
        first.qparams()
    spec = QuantSpec.of(PROBABILITIES)
    observer = AttentionObserver(spec, None, "attn (q)", TimestepClock())  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"the input of 'attn \(q\)' has NaN or infinite values"):
        observer(torch.full((2, 3), torch.nan))


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_attention_counts_no_tokens_and_rounds_no_weights(prepare):
    with_it, without = prepare(attention_bits=8), prepare()
    assert tokens_seen(with_it) == tokens_seen(without)
    assert [group.name for group in find_groups(with_it)] == [group.name for group in find_groups(without)]


def test_weights_are_rounded_for_quantized_attention(prepare, tiny_samples):
    """The quantized stream that the last layer was rounded for is what the converted model computes."""
    prepared = prepare(attention_bits=3, sequential=True, rounding="gptq")
    round_sequentially(prepared, tiny_samples)
    last = find_groups(prepared)[-1]
    streams = Streams(prepared, tiny_samples)
    streams.advance(last.node)
    _, stream = next(streams.inputs(last.node))
    converted = convert_pt2e(copy.deepcopy(prepared))
    (node,) = [n for n in converted.graph.nodes if n.name == last.node.args[0].name]
    runner = Interpreter(converted, garbage_collect_values=False)
    runner.run(*tiny_samples[0])
    assert sqnr_db(runner.env[node], stream) > 60


def test_layers_rounded_without_attention_are_not_taken_for_it(prepare, tiny_samples):
    settings = RoundingSettings(rounding="gptq")

    def digest(**options) -> str:
        prepared = prepare(**options)
        return fingerprint(prepared, find_groups(prepared), tiny_samples, settings)

    assert len({digest(), digest(attention_bits=8), digest(attention_bits=6)}) == 3


# -- refusals ----------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """No attention; a softmax chooses between two layers."""

    def __init__(self, *, attends: bool) -> None:
        super().__init__()
        self.norm, self.first, self.second, self.router = nn.LayerNorm(8), *(nn.Linear(8, 8) for _ in range(3))
        self.attends = attends

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(x)
        chosen = self.router(h).softmax(-1)
        mixed = chosen * self.first(h)
        return nn.functional.scaled_dot_product_attention(h, h, self.second(mixed)) if self.attends else mixed


def mixer(*, attends: bool) -> GraphModule:
    return export_transformer(Mixer(attends=attends).eval(), (torch.randn(2, 4, 8), torch.zeros(2)))


def test_a_graph_without_attention_is_refused():
    with pytest.raises(
        ArgumentError,
        match=r"the graph has no scaled_dot_product_attention, .* leave attention_bits out \(in a recipe: attention.",
    ):
        prepare_pt2e(mixer(attends=False), PTQ4DiTQuantizer(balance="max", attention_bits=8))


def test_a_softmax_that_is_not_attention_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        prepared = prepare_pt2e(mixer(attends=True), PTQ4DiTQuantizer(balance="max", attention_bits=8))
    assert "1 of 2 softmaxes are not between two matrix products that can be read" in caplog.text
    assert sum(isinstance(module, AttentionObserver) for module in prepared.modules()) == 4


@pytest.mark.parametrize("bits", [1, 9, True, "8"])
def test_wrong_bits_are_named(bits):
    with pytest.raises(ArgumentError, match=f"attention_bits is {bits!r}; it must be an integer from 2 to 8"):
        PTQ4DiTQuantizer(attention_bits=bits)


# -- backends ----------------------------------------------------------------------------------------------------------


def test_a_backend_without_such_kernels_simulates_it_and_says_so(quantized, tiny_samples, caplog):
    converted = quantized(attention_bits=8)
    with caplog.at_level(logging.WARNING):
        lowered = lower(converted, "fbgemm")
    assert sqnr_db(converted(*tiny_samples[0]), lowered(*tiny_samples[0])) > 60
    assert (lowered.proof.attention, lowered.proof.attention_kernels) == (2 * BLOCKS, {})
    assert str(lowered.proof).endswith("; attention: 4 matmuls simulated in float")
    assert "'fbgemm' has no integer kernels for 4 of 4 quantized matmuls of attention" in caplog.text


def test_nothing_is_said_of_float_attention(quantized, caplog):
    with caplog.at_level(logging.WARNING):
        assert "attention" not in str(lower(quantized(), "fbgemm").proof)
        lower(quantized(attention_bits=8), "reference")
    assert "attention" not in caplog.text
