"""RepQ through prepare and convert: one quantizer for all channels does what each channel's own would do."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.fx import Interpreter
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.core.tests import reference
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.lowering import lower, quantized_linears
from ptq4dit_ao.passes import BalanceSettings, balance, balance_result, collect_salience
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer, round_sequentially
from ptq4dit_ao.report import build_report
from ptq4dit_ao.rounding import RoundingSettings

REPQ = {"balance": "repq"}
SITES = [f"transformer_blocks.{i}.{layer}" for i in range(2) for layer in ("attn1.{to_q,to_k,to_v}", "ff.net.0.proj")]


class Inputs(Interpreter):
    """What the nodes of these names compute, over several runs."""

    def __init__(self, graph, names, samples):
        super().__init__(graph)
        self.seen = {name: [] for name in names}
        for sample in samples:
            self.run(*sample)
        self.seen = {name: torch.cat(rows).flatten(0, -2).double() for name, rows in self.seen.items()}

    def run_node(self, n):
        value = super().run_node(n)
        if n.name in self.seen:
            self.seen[n.name].append(value)
        return value


def test_the_input_is_quantized_as_each_channel_alone_would_be(quantized, tiny_exported, tiny_samples):
    converted = quantized(**REPQ)
    outcomes = balance_result(converted).outcomes
    assert [name for name, outcome in outcomes.items() if outcome.method == "repq"] == SITES
    linears = {linear.name: linear for linear in quantized_linears(converted)}
    names = {o.site.consumers[0].input: o for o in outcomes.values()}
    float_inputs = Inputs(tiny_exported, names, tiny_samples).seen
    for name, outcome in names.items():
        x, linear = float_inputs[name].numpy(), linears[outcome.site.consumers[0].node]
        delta, z = reference.per_channel_quantizer(x.min(0), x.max(0), 0, 255)
        r, o, scale, zero_point = reference.repq(delta, z, 0, 255)
        assert (linear.x_scale, linear.x_zero_point) == (pytest.approx(scale, rel=1e-5), zero_point)
        torch.testing.assert_close(outcome.b.numpy(), r, rtol=1e-5, atol=0)
        own = reference.fake_quantize(x, delta, z, 0, 255)
        shared = reference.fake_quantize(x / r - o, scale, zero_point, 0, 255)
        assert abs((shared + o) * r - own).max() < 1e-9


def test_it_keeps_more_than_one_range_for_all(quantized, tiny_exported, tiny_samples):
    """Four bits of activations: the seam between channels of different size and mean is where min-max loses."""
    expected = torch.cat([tiny_exported(*sample) for sample in tiny_samples])

    def error_db(**options):
        graph = quantized(activation_bits=4, **options)
        return sqnr_db(expected, torch.cat([graph(*sample) for sample in tiny_samples]))

    assert error_db(**REPQ) > error_db(balance="none") + 0.5


def test_it_costs_no_operation_and_runs_on_integers(quantized):
    def calls(graph):
        return sorted(str(node.target) for node in graph.graph.nodes if node.op == "call_function")

    assert calls(quantized(**REPQ)) == calls(quantized(balance="none"))
    assert lower(quantized(**REPQ), "fbgemm").proof.integer_gemms == 14


@pytest.mark.parametrize("sequentially", [False, True])
def test_it_goes_with_rounding(tiny_exported, tiny_samples, duplicate, quantized, sequentially):
    rounding = RoundingSettings(rounding="gptq", ranges="output")
    quantizer = PTQ4DiTQuantizer(weight_bits=4, rounding=rounding, sequential=sequentially, **REPQ)
    prepared = prepare_pt2e(duplicate(tiny_exported), quantizer)
    for sample in tiny_samples:
        prepared(*sample)
    if sequentially:
        round_sequentially(prepared, tiny_samples)
    converted, plain = convert_pt2e(prepared), quantized(weight_bits=4, **REPQ)
    expected = torch.cat([tiny_exported(*sample) for sample in tiny_samples])
    rounded, nearest = (
        sqnr_db(expected, torch.cat([graph(*sample) for sample in tiny_samples])) for graph in (converted, plain)
    )
    assert rounded > nearest + 1
    for one, other in zip(quantized_linears(converted), quantized_linears(plain), strict=True):
        if balance_result(plain).layers[one.name].endswith(("to_q", "net.0.proj")):
            assert (one.x_scale, one.x_zero_point) == (other.x_scale, other.x_zero_point)


def test_the_self_check_agrees(tiny_exported, tiny_samples, convert, caplog):
    with caplog.at_level(logging.WARNING, logger="ptq4dit_ao"):
        convert(tiny_exported, PTQ4DiTQuantizer(**REPQ), tiny_samples)
    assert not caplog.records


def test_the_report_says_repq_and_why_not(quantized):
    report = build_report(quantized(**REPQ), title="", recipe={}, model={}, seconds={})
    assert (report["settings"]["method"], report["settings"]["alpha"]) == ("repq", None)
    folded = [site for site in report["sites"] if site["status"] == "folded"]
    assert [(s["name"], s["method"], s["alpha"]) for s in folded] == [(name, "repq", None) for name in SITES]
    (attention, *_) = [site for site in report["sites"] if site["name"].endswith("to_out.0")]
    assert attention["reason"].endswith("no shift is added here (scaled_dot_product_attention)")


def test_the_former_names_are_refused_with_the_new_ones():
    with pytest.raises(ArgumentError, match="the argument 'aggregation' is called 'balance' now: balance='repq'"):
        PTQ4DiTQuantizer(aggregation="repq")
    with pytest.raises(ArgumentError, match="the argument 'aggregation' is called 'method' now: method='max'"):
        BalanceSettings(aggregation="max")


def test_an_exponent_means_nothing():
    with pytest.raises(ArgumentError, match="alpha is 0.7, but method 'repq' has no exponent; leave alpha out"):
        PTQ4DiTQuantizer(alpha=0.7, **REPQ)
    with pytest.raises(ArgumentError, match="alpha is 'auto', but method 'repq'"):
        BalanceSettings(alpha="auto", method="repq")


def test_a_float_graph_alone_does_not_know_the_widths(tiny_exported, tiny_samples):
    statistics = collect_salience(tiny_exported, tiny_samples)
    with pytest.raises(ArgumentError, match="'repq' needs to know how the inputs will be quantized, which only PTQ4"):
        balance(tiny_exported, statistics, BalanceSettings(method="repq"))
