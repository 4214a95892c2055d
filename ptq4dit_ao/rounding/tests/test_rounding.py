"""Rounding on a tiny DiT: what it gains, that it costs nothing at run time, that it resumes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.fx import Interpreter
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import ptq4dit_ao.rounding.sequential as sequential
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.lowering import lower, quantized_linears
from ptq4dit_ao.observers import Moments
from ptq4dit_ao.observers.qdq import QuantSpec
from ptq4dit_ao.passes import BalanceSettings, balance, balance_result, collect_salience
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer, round_sequentially, tokens_seen
from ptq4dit_ao.rounding import RoundingSettings
from ptq4dit_ao.rounding.layers import find_groups
from ptq4dit_ao.rounding.one_pass import balanced_moments
from ptq4dit_ao.rounding.solve import FLOOR, Inputs, solve
from ptq4dit_ao.rounding.streams import Streams

W4 = {"weight_bits": 4}


@pytest.fixture
def layer_by_layer(prepare, tiny_samples):
    def run(**options):
        prepared = prepare(sequential=True, **options)
        round_sequentially(prepared, tiny_samples)
        return convert_pt2e(prepared)

    return run


def test_each_step_gains(quantized, layer_by_layer, error_db):
    plain = error_db(quantized(**W4))
    one_pass = error_db(quantized(**W4, rounding="gptq"))
    sequentially = error_db(layer_by_layer(**W4, rounding="gptq"))
    assert one_pass > plain + 1
    assert sequentially > one_pass + 1


@pytest.mark.parametrize("sequentially", [False, True])
def test_rounding_costs_nothing_at_run_time(quantized, layer_by_layer, sequentially):
    rounded = layer_by_layer(rounding="gptq") if sequentially else quantized(rounding="gptq")

    def calls(model):
        return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_function")

    assert calls(rounded) == calls(quantized())
    assert lower(rounded, "fbgemm").proof.integer_gemms == 14


def test_streams_are_the_float_and_the_quantized_network(prepare, tiny_exported, tiny_samples):
    prepared = prepare(**W4, sequential=True, rounding="gptq")
    seen = []

    def look(streams, node, observer):
        seen[:] = [observer.fake_quantize(q) for _, q in streams.inputs(node)], [x for x, _ in streams.inputs(node)]
        return original(streams, node, observer)

    original, sequential._inputs = sequential._inputs, look
    try:
        round_sequentially(prepared, tiny_samples)
    finally:
        sequential._inputs = original
    read = find_groups(prepared)[-1].node.args[0].name
    layer = find_groups(prepared)[-1].layers[0].node.name

    class Watch(Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name == read:
                self.exact = value
            if n.name == layer:
                self.quantized = self.env[n.args[0]]
            return value

    exact = Watch(tiny_exported, garbage_collect_values=False)
    exact.run(*tiny_samples[0])
    torch.testing.assert_close(seen[1][0], exact.exact, rtol=1e-4, atol=1e-5)  # no balancing reaches FC2's input
    converted = convert_pt2e(prepared)
    quantized = Watch(converted, garbage_collect_values=False)
    quantized.run(*tiny_samples[0])
    assert sqnr_db(quantized.quantized, seen[0][0]) > 50  # a value on a boundary may fall on either side


def test_a_search_takes_the_least_error(quantized):
    result = balance_result(quantized(**W4, rounding="gptq", alpha="auto", balance="auto"))
    assert result.outcomes
    for outcome in result.outcomes.values():
        assert len(outcome.scores) == 13
        chosen = "none" if outcome.method == "none" else f"{outcome.method} {outcome.alpha:g}"
        assert outcome.scores[chosen] == min(outcome.scores.values())
        if chosen == "none":
            assert (outcome.b == 1).all()


def test_a_search_tries_each_candidate_with_and_without_centring(quantized):
    result = balance_result(quantized(**W4, rounding="gptq", alpha="auto", balance="auto", center=True))
    centred = 0
    for outcome in result.outcomes.values():
        assert len(outcome.scores) == (25 if outcome.site.shift is not None else 13)
        name = "none" if outcome.method == "none" else f"{outcome.method} {outcome.alpha:g}"
        name += "" if outcome.offset is None else " centred"
        assert outcome.scores[name] == min(outcome.scores.values())
        centred += outcome.offset is not None
    assert centred > 0


def test_centred_inputs_reach_as_far_down_as_up(quantized, error_db):
    converted = quantized(center=True)
    shifted = [o for o in balance_result(converted).outcomes.values() if o.site.shift is not None]
    assert len(shifted) == 4 and all(outcome.offset is not None for outcome in shifted)
    inputs = {consumer.node for outcome in shifted for consumer in outcome.site.consumers}
    for linear in quantized_linears(converted):
        if linear.name in inputs:
            assert linear.x_zero_point in (127, 128)
    assert error_db(converted) > error_db(quantized()) - 0.5


@pytest.mark.parametrize(
    ("levels", "weight_levels", "cutting"), [(256, 256, 16), (256, 16, 1), (64, 64, 4), (16, 256, 4)]
)
def test_the_weight_of_cutting_follows_the_bits(levels, weight_levels, cutting):
    assert RoundingSettings(cutting="auto").cutting_of(levels, weight_levels) == cutting
    assert RoundingSettings(cutting=3.0).cutting_of(levels, weight_levels) == 3


def test_a_search_is_as_good_as_the_fixed_choices(quantized, error_db):
    found = error_db(quantized(weight_bits=4, activation_bits=4, rounding="gptq", alpha="auto", balance="auto"))
    fixed = [error_db(quantized(weight_bits=4, activation_bits=4, rounding="gptq", alpha=a)) for a in (0.3, 0.5, 0.9)]
    assert found > max(fixed) - 0.5
    assert found > min(fixed) + 0.5


@pytest.mark.parametrize("ranges", ["percentile", "lp", "output"])
def test_nearest_moves_ranges_and_nothing_else(quantized, tiny_exported, ranges):
    converted = quantized(**W4, balance="none", rounding=RoundingSettings(ranges=ranges))
    names = balance_result(converted).layers
    for linear in quantized_linears(converted):
        layer = tiny_exported.get_submodule(names[linear.name])
        scale = linear.weight_scale.unsqueeze(1)
        assert torch.equal(linear.weight, (layer.weight / scale).round().clamp(-8, 7).to(torch.int8))
        assert torch.equal(linear.bias, layer.bias)
        assert (scale.squeeze() <= layer.weight.abs().amax(1) / 7.5 * 1.001).all()


def test_nearest_leaves_biases_alone_layer_by_layer_and_when_resumed(prepare, tiny_samples, tiny_exported, tmp_path):
    options = {**W4, "balance": "none", "rounding": RoundingSettings(ranges="lp"), "sequential": True}
    for prepared in (prepare(**options), prepare(**options)):
        round_sequentially(prepared, tiny_samples, resume=tmp_path)
        converted = convert_pt2e(prepared)
        names = balance_result(converted).layers
        for linear in quantized_linears(converted):
            assert torch.equal(linear.bias, tiny_exported.get_submodule(names[linear.name]).bias)


def test_papers_ranges_cut_tails_of_weights_and_activations(quantized):
    plain = quantized_linears(quantized(**W4, balance="none"))
    lp = quantized_linears(quantized(**W4, balance="none", rounding=RoundingSettings(ranges="lp")))
    for before, after in zip(plain, lp, strict=True):
        assert after.x_scale <= before.x_scale * (1 + 1e-6)
        assert (after.weight_scale < before.weight_scale).any()
    assert any(after.x_scale < before.x_scale for before, after in zip(plain, lp, strict=True))


def test_moments_are_taken_about_the_mean_of_what_they_are_of():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double() * 0.1 + torch.tensor(
        [50.0, -3.0, 0.0]
    )
    q = (x / 0.4).round() * 0.4 + 0.1
    floor = FLOOR * torch.diag(x.square().mean(0))
    one_pass = Inputs.from_moments(x.mean(0), q.mean(0), x.T @ x / len(x))
    torch.testing.assert_close(one_pass.covariance, x.T.cov(correction=0) + floor, atol=2e-3, rtol=0)
    both = Inputs.from_moments(x.mean(0), q.mean(0), q.T @ q / len(q), q.T @ (x - q) / len(q))
    joint = torch.cat([q, x - q], dim=1).T.cov(correction=0)
    torch.testing.assert_close(both.covariance, joint[:3, :3] + floor, atol=2e-3, rtol=0)
    torch.testing.assert_close(both.cross, joint[:3, 3:], atol=2e-3, rtol=0)


def test_moments_follow_shift_and_balance():
    generator = torch.Generator().manual_seed(0)
    x, scale, shift = torch.randn(500, 6, generator=generator), torch.logspace(-1, 1, 6), 3 * torch.randn(6)
    seen, expected = Moments(6), Moments(6)
    seen.update(x)
    expected.update((x - shift) / scale)
    for one, other in zip(balanced_moments(seen, scale, shift), balanced_moments(expected, None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_weight_without_a_bias_gets_one(tiny_dit, tiny_samples, duplicate):
    import copy

    from ptq4dit_ao.capture import export_transformer

    model = copy.deepcopy(tiny_dit)
    model.transformer_blocks[0].attn1.to_q.bias = None
    prepared = prepare_pt2e(export_transformer(model, tiny_samples[0]), PTQ4DiTQuantizer(**W4, rounding="gptq"))
    for sample in tiny_samples:
        prepared(*sample)
    layers = balance_result(converted := convert_pt2e(prepared)).layers
    (query,) = [q for q in quantized_linears(converted) if layers[q.name] == "transformer_blocks.0.attn1.to_q"]
    assert query.bias is not None and query.bias.shape == (32,)


def test_other_quantizers_of_torchao_are_rounded_too(tiny_exported, tiny_samples, convert, error_db):
    def base():
        return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())

    plain = convert(tiny_exported, PTQ4DiTQuantizer(base(), **W4), tiny_samples)
    rounded = convert(tiny_exported, PTQ4DiTQuantizer(base(), **W4, rounding="gptq"), tiny_samples)
    assert error_db(rounded) > error_db(plain) + 1


def test_a_killed_run_goes_on(prepare, tiny_samples, tmp_path, monkeypatch):
    def interrupt(done, total):
        if done == 6:
            raise KeyboardInterrupt

    options = {**W4, "sequential": True, "rounding": "gptq"}
    with pytest.raises(KeyboardInterrupt):
        round_sequentially(prepare(**options), tiny_samples, on_progress=interrupt, resume=tmp_path / "rounded")
    solved = []
    original = sequential._round
    monkeypatch.setattr(sequential, "_round", lambda *args: solved.append(args) or original(*args))
    resumed, whole = prepare(**options), prepare(**options)
    round_sequentially(resumed, tiny_samples, resume=tmp_path / "rounded")
    groups = len(find_groups(resumed))
    assert len(solved) == groups - 6
    round_sequentially(whole, tiny_samples)
    for sample in tiny_samples[:1]:
        assert torch.equal(convert_pt2e(resumed)(*sample), convert_pt2e(whole)(*sample))


def test_a_rounding_that_failed_half_way_leaves_nothing_behind(prepare, tiny_samples, monkeypatch):
    options = {**W4, "sequential": True, "rounding": "gptq"}
    prepared, whole = prepare(**options), prepare(**options)
    groups = find_groups(prepared)
    original = sequential.solve_group

    def fail(model, group, *args):
        original(model, group, *args)
        if group.name == groups[4].name:
            raise KeyboardInterrupt

    monkeypatch.setattr(sequential, "solve_group", fail)
    with pytest.raises(KeyboardInterrupt):
        round_sequentially(prepared, [tuple(2 * x for x in tiny_samples[0][:1]) + tiny_samples[0][1:]])
    assert all(group.observer.chosen_range is None for group in groups)
    assert all(layer.observer.rounded is None for group in groups for layer in group.layers)
    monkeypatch.undo()
    for model in (prepared, whole):
        round_sequentially(model, tiny_samples)
    assert [g.observer.chosen_range for g in find_groups(prepared)] == [
        g.observer.chosen_range for g in find_groups(whole)
    ]


def test_resumed_layers_hold_their_own_memory_only(prepare, tiny_samples, tmp_path):
    options = {**W4, "sequential": True, "rounding": "gptq"}
    round_sequentially(prepare(**options), tiny_samples, resume=tmp_path)
    resumed = prepare(**options)
    round_sequentially(resumed, tiny_samples, resume=tmp_path)
    for layer in (layer for group in find_groups(resumed) for layer in group.layers):
        for tensor in (x for x in vars(layer.observer.rounded).values() if isinstance(x, torch.Tensor)):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_folder_of_another_run_is_refused(prepare, tiny_samples, tmp_path):
    options = {"sequential": True, "rounding": "gptq"}
    round_sequentially(prepare(**options), tiny_samples, resume=tmp_path)
    with pytest.raises(CalibrationError, match="rounded for another model, recipe or calibration set"):
        round_sequentially(prepare(**options, **W4), tiny_samples, resume=tmp_path)
    biased = prepare(**options)  # one that is not rounded differs, too
    owner = biased.get_submodule("pos_embed.proj")
    owner.bias = torch.nn.Parameter(owner.bias + 1)
    with pytest.raises(CalibrationError, match="rounded for another model"):
        round_sequentially(biased, tiny_samples, resume=tmp_path)
    (tmp_path / "0003.safetensors").write_bytes(b"x")
    with pytest.raises(CalibrationError, match=r"cannot read rounded layers from .*0003.safetensors: .*remove it, and"):
        round_sequentially(prepare(**options), tiny_samples, resume=tmp_path)


def test_a_folder_that_a_kill_left_at_its_first_write_is_taken(prepare, tiny_samples, tmp_path):
    (tmp_path / ".about.json.tmp-0123").touch()
    round_sequentially(prepare(sequential=True, rounding="gptq"), tiny_samples, resume=tmp_path)
    assert (tmp_path / "about.json").exists()


def test_a_folder_with_something_else_is_refused(prepare, tiny_samples, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CalibrationError, match="holds something else than rounded layers"):
        round_sequentially(prepare(sequential=True, rounding="gptq"), tiny_samples, resume=tmp_path)


def test_order_of_calls(prepare, tiny_samples):
    prepared = prepare(sequential=True, rounding="gptq")
    with pytest.raises(CalibrationError, match=r"call ptq4dit_ao.round_sequentially\(prepared, batches\) between"):
        convert_pt2e(prepared)
    prepared = prepare(sequential=True, rounding="gptq")
    with pytest.raises(CalibrationError, match="there are no calibration samples"):
        round_sequentially(prepared, [])
    prepared = prepare(sequential=True, rounding="gptq")
    round_sequentially(prepared, tiny_samples)
    with pytest.raises(CalibrationError, match="has been rounded already"):
        round_sequentially(prepared, tiny_samples)


def test_a_failed_rounding_can_be_tried_again(prepare, tiny_samples, tmp_path):
    options = {**W4, "sequential": True, "rounding": "gptq", "alpha": "auto"}
    prepared, whole = prepare(**options), prepare(**options)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CalibrationError, match="cannot keep rounded layers in .*file"):
        round_sequentially(prepared, tiny_samples, resume=tmp_path / "file")
    round_sequentially(prepared, tiny_samples)  # not balanced twice
    round_sequentially(whole, tiny_samples)
    assert torch.equal(convert_pt2e(prepared)(*tiny_samples[0]), convert_pt2e(whole)(*tiny_samples[0]))


def test_an_input_that_was_never_seen_is_named(tiny_exported, duplicate):
    prepared = prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(balance="none", rounding="gptq"))
    with pytest.raises(CalibrationError, match=r"'transformer_blocks.0.* was never run: call the prepared model"):
        convert_pt2e(prepared)


def test_wrong_settings_are_named():
    with pytest.raises(ArgumentError, match="rounding is 'gptx'; choose one of nearest, gptq"):
        RoundingSettings(rounding="gptx")
    with pytest.raises(ArgumentError, match="ranges is 'max'; choose one of minmax, output, percentile, lp"):
        RoundingSettings(ranges="max")
    with pytest.raises(ArgumentError, match=r"damping is 0; it must lie in \(0, 1\]"):
        RoundingSettings(damping=0)
    with pytest.raises(ArgumentError, match="cutting is 0.5; it must be at least 1"):
        RoundingSettings(cutting=0.5)
    with pytest.raises(ArgumentError, match="cutting is 'much'"):
        RoundingSettings(cutting="much")
    with pytest.raises(ArgumentError, match="alpha is 'best'; choose one of auto"):
        BalanceSettings(alpha="best")


def test_a_float_graph_has_no_error_to_choose_by(tiny_exported, tiny_samples):
    statistics = collect_salience(tiny_exported, tiny_samples)
    with pytest.raises(ArgumentError, match="chosen by the error after quantization, which only PTQ4DiTQuantizer"):
        balance(tiny_exported, statistics, BalanceSettings(alpha="auto"))


def test_tokens_are_counted(prepare, tiny_samples):
    assert tokens_seen(prepare()) == 16 * sum(len(x) for x, _, _ in tiny_samples)


def test_a_graph_that_writes_in_place_shares_nothing(prepare, tiny_samples):
    prepared = prepare(sequential=True, rounding="gptq")
    graph = prepared.graph
    (first, *_) = find_groups(prepared)
    with graph.inserting_before(first.node):
        graph.call_function(torch.ops.aten.mul_.Tensor, (first.node.args[0], 1.0))
    prepared.recompile()
    streams = Streams(prepared, tiny_samples)
    streams.advance(find_groups(prepared)[0].node)
    exact, quantized = next(streams.inputs(find_groups(prepared)[0].node))
    assert exact is not quantized and torch.equal(exact, quantized)


@pytest.mark.parametrize("channel_axis", [0, None])
def test_layers_that_read_one_input_have_scales_of_their_own(channel_axis):
    spec = QuantSpec(dtype=torch.int8, quant_min=-8, quant_max=7, symmetric=True, channel_axis=channel_axis, eps=2**-12)
    inputs = Inputs.from_moments(torch.zeros(4), torch.zeros(4), torch.eye(4))
    small = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    alone, beside = (
        solve(weights, [None] * len(weights), spec, inputs, RoundingSettings(rounding="gptq"))[0]
        for weights in ([small], [small, 10 * small])
    )
    assert torch.equal(alone.scale, beside.scale) and torch.equal(alone.integers, beside.integers)
