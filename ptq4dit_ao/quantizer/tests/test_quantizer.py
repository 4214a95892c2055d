"""The quantizer inside torchao's own flow (prepare, loop, convert): ranges, cost, accuracy, statistics, refusals."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import ArgumentError, BalanceError, CalibrationError, OverrideError, PTQ4DiTError
from ptq4dit_ao.lowering import QuantizedLinear, lower, quantized_linears
from ptq4dit_ao.observers import SalienceStatistics
from ptq4dit_ao.passes import balance_result, collect_salience
from ptq4dit_ao.quantizer import (
    PAPER_LAYERS,
    LinearQuantizer,
    Override,
    PTQ4DiTQuantizer,
    round_sequentially,
    salience_statistics,
)
from ptq4dit_ao.testing.outliers import inject_outliers

aten, quantized_ops = torch.ops.aten, torch.ops.quantized_decomposed

BLOCK_LINEARS = 7
"""adaLN, q, k, v, attention output, FC1, FC2."""


def x86(*, is_dynamic: bool = False) -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic))


def calls(model: GraphModule, target: object) -> list[Node]:
    return model.graph.find_nodes(op="call_function", target=target)


def targets(model: GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_function")


def ops(model: GraphModule) -> Counter[str]:
    return Counter(node.op for node in model.graph.nodes)


def by_layer(converted: GraphModule) -> dict[str, QuantizedLinear]:
    """Quantized linears by module name; a layer that is called twice counts once."""
    layers = balance_result(converted).layers
    return {layers[linear.name]: linear for linear in quantized_linears(converted)}


def weight_ranges(converted: GraphModule) -> dict[str, tuple[int, int]]:
    return {layer: linear.weight_range for layer, linear in by_layer(converted).items()}


def pooled_sqnr_db(model: GraphModule, converted: GraphModule, samples) -> float:
    return sqnr_db(torch.cat([model(*s) for s in samples]), torch.cat([converted(*s) for s in samples]))


def assert_same_statistics(actual: SalienceStatistics, expected: SalienceStatistics, **tolerance: float) -> None:
    for name in actual:
        assert torch.equal(actual[name].timesteps, expected[name].timesteps), name
        torch.testing.assert_close(actual[name].minimum, expected[name].minimum, **tolerance)
        torch.testing.assert_close(actual[name].maximum, expected[name].maximum, **tolerance)


@pytest.fixture
def prepare(tiny_exported, duplicate):
    """``prepare(**options)``: the tiny DiT, prepared but not calibrated."""
    return lambda **options: prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(**options))


# -- what is quantized to what -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "weights", "activations"),
    [(8, 8, (-128, 127), (0, 255)), (4, 8, (-8, 7), (0, 255)), (6, 6, (-32, 31), (0, 63)), (2, 3, (-2, 1), (0, 7))],
)
def test_bits_are_ranges_of_one_dtype(quantized, weight_bits, activation_bits, weights, activations):
    converted = quantized(weight_bits=weight_bits, activation_bits=activation_bits)
    weight_nodes = calls(converted, quantized_ops.dequantize_per_channel.default)
    assert len(weight_nodes) == 2 * BLOCK_LINEARS
    for node in weight_nodes:
        stored, scale, zero_point, axis, low, high, dtype = node.args
        assert (axis, (low, high), dtype) == (0, weights, torch.int8)
        weight = getattr(converted, stored.target)
        assert weight.dtype == torch.int8 and weight.min() >= low and weight.max() <= high
        scale, zero_point = (getattr(converted, node.target) for node in (scale, zero_point))
        assert len(scale) == len(zero_point) == len(weight) and not zero_point.any()
        assert (weight.int().abs().amax(1) >= high).all()  # every row spends its whole range
    for op in (quantized_ops.quantize_per_tensor.default, quantized_ops.dequantize_per_tensor.default):
        nodes = calls(converted, op)
        assert nodes and all(node.args[3:] == (*activations, torch.uint8) for node in nodes)


def test_q_k_and_v_read_one_quantized_tensor(quantized):
    converted = quantized()
    layers = by_layer(converted)
    for block in range(2):
        shared = {layers[f"transformer_blocks.{block}.attn1.{name}"].quantize for name in ("to_q", "to_k", "to_v")}
        assert len(shared) == 1
    assert len({linear.quantize for linear in layers.values()}) == 2 * (BLOCK_LINEARS - 2)


def test_more_bits_are_more_accurate(quantized, tiny_exported, tiny_samples):
    db = [
        pooled_sqnr_db(tiny_exported, quantized(weight_bits=w, activation_bits=a), tiny_samples)
        for w, a in ((8, 8), (6, 6), (4, 8), (2, 3))
    ]
    assert db[0] > 30
    assert db[0] > db[1] + 6 and db[0] > db[2] + 6 and min(db[1:3]) > db[3] + 6


@pytest.mark.parametrize("method", ["none", "max", "mean", "ssc"])
def test_every_aggregation_converts(quantized, tiny_exported, tiny_samples, method):
    converted = quantized(balance=method)
    result = balance_result(converted)
    assert pooled_sqnr_db(tiny_exported, converted, tiny_samples) > 30
    assert len(result.outcomes) == (0 if method == "none" else 6)
    assert (result.settings is None) == (method == "none")
    for outcome in result.outcomes.values():
        assert (outcome.b != 1).all() and outcome.b.isfinite().all()


def test_the_float_graph_and_its_module_stay_as_they_were(tiny_dit, tiny_exported, tiny_samples, convert):
    code = tiny_exported.code
    module, graph = (copy.deepcopy(m.state_dict()) for m in (tiny_dit, tiny_exported))
    before = tiny_exported(*tiny_samples[0])
    lower(convert(tiny_exported, PTQ4DiTQuantizer(weight_bits=4), tiny_samples), "fbgemm")
    assert tiny_exported.code == code
    assert "ptq4dit_balance_result" not in tiny_exported.meta
    for model, old in ((tiny_dit, module), (tiny_exported, graph)):
        assert model.state_dict().keys() == old.keys()
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    assert torch.equal(tiny_exported(*tiny_samples[0]), before)


# -- no run-time cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [x86, LinearQuantizer])
@pytest.mark.parametrize("fold_form", ["constant", "bias"])
def test_the_converted_graph_has_the_ops_of_the_base_alone(base, fold_form, tiny_exported, tiny_samples, convert):
    alone = convert(tiny_exported, base(), tiny_samples[:1])
    wrapped = convert(tiny_exported, PTQ4DiTQuantizer(base(), fold_form=fold_form, layers=()), tiny_samples)
    modulations = [node for node in calls(tiny_exported, aten.add.Tensor) if 1 in node.args]
    constants = len(modulations) if fold_form == "constant" else 0
    assert len(modulations) == 5 and len(balance_result(wrapped).outcomes) == 7  # the final layer is a site too
    assert targets(wrapped) == targets(alone)
    assert ops(wrapped) == ops(alone) + Counter(get_attr=constants)
    assert sum("_ptq4dit_" in name for name, _ in wrapped.named_buffers()) == constants


def test_what_else_the_base_quantizes_stays_quantized(quantized):
    converted = quantized(base=x86())
    (conv,) = calls(converted, aten.conv2d.default)
    assert conv.args[0].target is quantized_ops.dequantize_per_tensor.default
    assert conv.args[1].target is quantized_ops.dequantize_per_channel.default
    assert len(quantized_linears(converted)) == 2 * BLOCK_LINEARS  # the embedders and the final layer are skipped


# -- accuracy with salient channels ----------------------------------------------------------------------------------


@torch.no_grad()
def test_injected_outliers_keep_the_function(tiny_dit, tiny_samples):
    x, t, y = tiny_samples[0]
    plain = copy.deepcopy(tiny_dit).double()
    salient = inject_outliers(plain, channels=4, low=10, high=30)
    before, after = (model(x.double(), timestep=t, class_labels=y).sample for model in (plain, salient))
    assert (before - after).norm() < 1e-12 * before.norm()
    for block, changed in zip(plain.transformer_blocks, salient.transformer_blocks, strict=True):
        growth = (changed.norm1.linear.weight.norm(dim=1) / block.norm1.linear.weight.norm(dim=1)).view(6, 32)
        salient_rows = growth > 5
        assert salient_rows.sum(1).tolist() == [4, 4, 0, 4, 4, 0]  # shift, scale, gate of attention and of the MLP
        assert growth[salient_rows].min() > 9.99 and growth[salient_rows].max() < 30.01
        assert torch.equal(salient_rows[0], salient_rows[1]) and torch.equal(salient_rows[3], salient_rows[4])


@pytest.fixture(scope="module")
def salient_exported(tiny_dit, tiny_samples):
    return export_transformer(inject_outliers(tiny_dit), tiny_samples[0])


@pytest.mark.parametrize("method", ["ssc", "max"])
def test_balancing_undoes_outliers(method, salient_exported, quantized, tiny_exported, tiny_samples, convert):
    balanced = convert(salient_exported, PTQ4DiTQuantizer(balance=method), tiny_samples)
    plain = convert(salient_exported, PTQ4DiTQuantizer(balance="none"), tiny_samples)
    balanced_db = pooled_sqnr_db(tiny_exported, balanced, tiny_samples)
    assert balanced_db > pooled_sqnr_db(tiny_exported, plain, tiny_samples) + 10
    without_db = pooled_sqnr_db(tiny_exported, quantized(balance=method), tiny_samples)
    assert balanced_db == pytest.approx(without_db, abs=0.5)


# -- statistics ------------------------------------------------------------------------------------------------------


def test_the_prepared_model_records_what_collect_salience_does(prepare, tiny_exported, tiny_samples):
    prepared = prepare()
    for sample in tiny_samples:
        prepared(*sample)
    recorded, collected = salience_statistics(prepared), collect_salience(tiny_exported, tiny_samples)
    assert set(collected) - set(recorded) == {"proj_out_2"}  # quantized by no default, but a site
    assert set(recorded) < set(collected) and len(recorded) == 6
    assert_same_statistics(recorded, collected, rtol=1e-5, atol=1e-6)
    wanted = torch.cat([t for _, t, _ in tiny_samples]).double().unique()
    assert torch.equal(next(iter(recorded.values())).timesteps, wanted)


def test_the_order_of_samples_does_not_matter(quantized, tiny_exported, tiny_samples, convert):
    rows = [row for sample in tiny_samples for row in zip(*sample, strict=True)]
    other = [tuple(torch.stack(column) for column in zip(*rows[i::3], strict=True)) for i in reversed(range(3))]
    reordered = convert(tiny_exported, PTQ4DiTQuantizer(), other)
    first, second = (balance_result(model) for model in (quantized(), reordered))
    assert_same_statistics(second.statistics, first.statistics, rtol=1e-4, atol=1e-5)  # other batch sizes
    for name, outcome in first.outcomes.items():
        torch.testing.assert_close(second.outcomes[name].b, outcome.b, rtol=1e-4, atol=0)


def test_a_deep_copy_of_a_prepared_model_works_by_itself(prepare, quantized, tiny_samples):
    prepared = prepare()
    twin = copy.deepcopy(prepared)
    for sample in tiny_samples:
        twin(*sample)
    assert all(len(table.timesteps) == 0 for table in salience_statistics(prepared).values())
    assert torch.equal(convert_pt2e(twin)(*tiny_samples[0]), quantized()(*tiny_samples[0]))
    with pytest.raises(CalibrationError, match="was never run"):
        convert_pt2e(prepared)


@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}, {"rounding": "gptq", "sequential": True}], ids=str)
def test_a_converted_model_holds_no_pending_factors(prepare, tiny_samples, options):
    prepared = prepare(**options)
    for sample in tiny_samples:
        prepared(*sample)
    if "sequential" in options:
        round_sequentially(prepared, tiny_samples)
        assert prepared.meta["ptq4dit_pending"]
    assert "ptq4dit_pending" not in convert_pt2e(prepared).meta


def test_calibration_in_two_processes(prepare, quantized, tiny_samples, tmp_path):
    for share in (0, 1):
        prepared = prepare()
        for sample in tiny_samples[share::2]:
            prepared(*sample)
        salience_statistics(prepared).save(tmp_path / f"{share}.safetensors")
    merged, other = (SalienceStatistics.load(tmp_path / f"{share}.safetensors") for share in (0, 1))
    merged.merge(other)
    expected = balance_result(quantized()).statistics
    assert merged.keys() == expected.keys()
    assert_same_statistics(merged, expected, rtol=0, atol=0)


def test_a_float_model_has_no_statistics(tiny_exported):
    with pytest.raises(CalibrationError, match="not prepared with PTQ4DiTQuantizer"):
        salience_statistics(tiny_exported)


# -- overrides -------------------------------------------------------------------------------------------------------


def test_skipped_layers_stay_float(quantized):
    converted = quantized(overrides=(Override(pattern="transformer_blocks.0.*", skip=True),))
    assert len(by_layer(converted)) == BLOCK_LINEARS
    assert all(layer.startswith("transformer_blocks.1.") for layer in by_layer(converted))
    assert all("transformer_blocks.1." in name for name in balance_result(converted).outcomes)


def test_bits_of_single_layers(quantized):
    overrides = (
        Override(pattern="*.ff.*", weight_bits=4),
        Override(pattern="transformer_blocks.1.ff.net.2", weight_bits=6, activation_bits=5),
    )
    layers = by_layer(quantized(overrides=overrides))
    assert layers["transformer_blocks.0.ff.net.2"].weight_range == (-8, 7)
    assert layers["transformer_blocks.0.ff.net.2"].x_range == (0, 255)
    assert layers["transformer_blocks.1.ff.net.2"].weight_range == (-32, 31)  # the later one wins
    assert layers["transformer_blocks.1.ff.net.2"].x_range == (0, 31)
    assert layers["transformer_blocks.1.attn1.to_q"].weight_range == (-128, 127)


def test_bits_bring_a_skipped_layer_back(quantized):
    ranges = weight_ranges(quantized(overrides=(Override(pattern="proj_out_2", weight_bits=4),)))
    assert ranges["proj_out_2"] == (-8, 7) and "proj_out_1" not in ranges


def test_one_reader_of_a_shared_input_with_other_bits(quantized):
    overrides = (Override(pattern="*.to_q", activation_bits=6),)
    converted = quantized(overrides=overrides)
    layers = by_layer(converted)
    q, k = (layers[f"transformer_blocks.0.attn1.{name}"] for name in ("to_q", "to_k"))
    assert (q.x_range, k.x_range) == ((0, 63), (0, 255))
    # Both see the balanced tensor, so their ranges cover the same numbers.
    assert q.x_scale * 63 == pytest.approx(k.x_scale * 255, rel=1e-5)


def test_a_layer_without_balancing(quantized):
    plain = quantized(overrides=(Override(pattern="transformer_blocks.0.ff.net.0.proj", balance=False),))
    assert "transformer_blocks.0.ff.net.0.proj" in by_layer(plain)
    outcomes = balance_result(plain).outcomes
    assert len(outcomes) == 5 and "transformer_blocks.0.ff.net.0.proj" not in outcomes
    untouched = quantized(balance="none")
    weights = (by_layer(model)["transformer_blocks.0.ff.net.0.proj"].weight for model in (plain, untouched))
    assert torch.equal(*weights)


def test_a_shared_input_is_not_balanced_if_one_reader_must_not_be(quantized):
    converted = quantized(overrides=(Override(pattern="transformer_blocks.0.attn1.to_q", balance=False),))
    result = balance_result(converted)
    (site,) = (site for site in result.sites if "0.attn1.{to_q,to_k,to_v}" in site.name)
    assert site.name not in result.outcomes and len(result.outcomes) == 5
    assert site.refusal.endswith(": an override switches its balancing off")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("transformer_blocks.0.attn1.to_p", "matches none of the model's 22 linear layers; the nearest layer is "
         "'transformer_blocks.0.attn1.to_[kqv]'"),
        ("unet.*", "override 'unet.*' matches none of the model's 22 linear layers"),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_nothing(prepare, pattern, message):
    with pytest.raises(OverrideError, match=message):
        prepare(overrides=[Override(pattern=pattern, skip=True)])


def test_paper_layers_quantize_embedders_and_keep_eight_bits_at_the_end(quantized):
    ranges = weight_ranges(quantized(weight_bits=4, layers=PAPER_LAYERS))
    last = {"proj_out_1", "proj_out_2"}
    assert {layer for layer, bounds in ranges.items() if bounds == (-128, 127)} == last
    assert {bounds for layer, bounds in ranges.items() if layer not in last} == {(-8, 7)}
    assert sum("timestep_embedder" in layer for layer in ranges) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "changes nothing; set skip, bits, dynamic or balance"),
        ({"skip": True, "weight_bits": 4}, "skips a layer and sets its bits, dynamic or balance"),
        ({"activation_bits": 9}, "activation_bits is 9; it must be an integer from 2 to 8, or 16"),
    ],
)
def test_overrides_that_make_no_sense(options, message):
    with pytest.raises(PTQ4DiTError, match=message):
        Override(pattern="*", **options)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1; it must be an integer from 2 to 8"),
        ({"activation_bits": 9}, "activation_bits is 9; it must be an integer from 2 to 8"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"weight_bits": "4"}, "weight_bits is '4'"),
        ({"alpha": 2}, r"alpha is 2; it must lie in \[0, 1\]"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"max_scale": 0.5}, "max_scale is 0.5; it must be at least 1"),
        ({"balance": "foo"}, "balance is 'foo'; choose one of ssc, max, mean"),
        ({"fold_form": "foo"}, "fold_form is 'foo'; choose one of constant, bias"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ArgumentError, match=message):
        PTQ4DiTQuantizer(**options)


@pytest.mark.parametrize("method", ["ssc", "none"])
def test_converting_without_calibration(prepare, method):
    prepared = prepare(balance=method)
    with pytest.raises(CalibrationError, match=r"'transformer_blocks.* was never run: call the prepared model on"):
        convert_pt2e(prepared)


def test_one_timestep_is_too_few_and_one_more_is_enough(prepare, quantized, tiny_samples):
    prepared = prepare()
    x, t, y = tiny_samples[0]
    prepared(x, torch.full_like(t, 7), y)
    with pytest.raises(CalibrationError, match=r"at 1 timestep\(s\); method 'ssc' needs at least 2"):
        convert_pt2e(prepared)
    prepared(x, torch.full_like(t, 8), y)
    # The refusal left nothing half done: the second attempt balances.
    assert len(balance_result(convert_pt2e(prepared)).outcomes) == len(balance_result(quantized()).outcomes)
    assert convert_pt2e(_calibrated(prepare(balance="max"), (x, torch.full_like(t, 7), y)))


def _calibrated(prepared: GraphModule, *samples: tuple[Tensor, ...]) -> GraphModule:
    for sample in samples:
        prepared(*sample)
    return prepared


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite(prepare, tiny_samples, value):
    x, t, y = (tensor.clone() for tensor in tiny_samples[0])
    x[2, 1, 3, 3] = value
    t[2] = 321
    message = r"the input of 'transformer_blocks.0.attn1.to_q' has NaN or infinite values at timestep 321, in 1 of 4"
    with pytest.raises(CalibrationError, match=message):
        prepare()(x, t, y)


class Small(nn.Module):
    """A body between a timestep-modulated norm and the output: (N, T, 8), (N,) -> (N, T, 8)."""

    def __init__(self, body) -> None:
        super().__init__()
        self.modulation = nn.Linear(1, 16)
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.body = body

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = self.modulation(t.float().unsqueeze(1) / 1000).unsqueeze(1).chunk(2, -1)
        return self.body(self, nn.functional.layer_norm(x, (8,)) * (1 + scale) + shift)


class Renamed(Small):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().forward(x, sigma)


def small(body, kind: type[Small] = Small) -> tuple[GraphModule, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    samples = [(torch.randn(4, 5, 8), torch.arange(4) * 10 + i) for i in range(3)]
    return export_transformer(kind(body).eval().requires_grad_(False), samples[0]), samples


def gelu_body(m: Small, h: Tensor) -> Tensor:
    return m.b(nn.functional.gelu(h))


def two_inputs_body(m: Small, h: Tensor) -> Tensor:
    """``a`` and ``b`` read different tensors that share one balancing vector."""
    return nn.functional.gelu(m.a(h)) + nn.functional.gelu(m.b(-h))


def test_a_weight_that_is_not_finite(convert):
    exported, samples = small(two_inputs_body)
    exported.b.weight[0, 0] = math.nan
    with pytest.raises(CalibrationError, match="weight 'b.weight' has NaN or infinite values; look at the checkpoint"):
        convert(exported, PTQ4DiTQuantizer(), samples)


def test_a_model_with_nothing_to_balance(convert):
    exported, samples = small(gelu_body)
    with pytest.raises(BalanceError, match=r"none of the 2 .*gelu does not commute.*use balance='none'"):
        convert(exported, PTQ4DiTQuantizer(), samples)
    converted = convert(exported, PTQ4DiTQuantizer(balance="none"), samples)
    assert len(quantized_linears(converted)) == 2


def test_a_model_with_nothing_to_quantize(prepare):
    with pytest.raises(BalanceError, match="no linear layer is left to quantize; check 'layers', the overrides"):
        prepare(overrides=[Override(pattern="*", skip=True)])
    with pytest.raises(BalanceError, match="every layer is excluded"):
        prepare(overrides=[Override(pattern="*", balance=False)])


def test_a_layer_that_shares_a_vector_but_not_an_input_may_stay_float(convert):
    exported, samples = small(two_inputs_body)
    both = convert(exported, PTQ4DiTQuantizer(), samples)
    one = convert(exported, PTQ4DiTQuantizer(overrides=[Override(pattern="b", skip=True)]), samples)
    assert list(balance_result(one).outcomes) == list(balance_result(both).outcomes) == ["{a,b}"]
    assert weight_ranges(one).keys() == {"modulation", "a"}
    assert pooled_sqnr_db(exported, one, samples) > 30


def test_a_timestep_of_another_name(convert):
    exported, samples = small(two_inputs_body, Renamed)
    with pytest.raises(ArgumentError, match=r"no input called 'timestep' or .* its inputs are 'x', 'sigma'.*'max'"):
        convert(exported, PTQ4DiTQuantizer(), samples)
    named = convert(exported, PTQ4DiTQuantizer(timestep_input="sigma"), samples)
    (outcome,) = balance_result(named).outcomes.values()
    assert len(outcome.timesteps) == 12
    without = convert(exported, PTQ4DiTQuantizer(balance="max"), samples)
    (outcome,) = balance_result(without).outcomes.values()
    assert len(outcome.timesteps) == 1


def test_a_timestep_input_that_does_not_exist(prepare):
    message = "timestep_input is 'sigma', but the graph's inputs are 'hidden_states', 'timestep', 'class_labels'"
    with pytest.raises(ArgumentError, match=message):
        prepare(timestep_input="sigma")


def test_a_base_with_dynamic_activations(prepare):
    with pytest.raises(ArgumentError, match=r"asks for dynamic activations.*balance first \(collect_salience, balance"):
        prepare(base=x86(is_dynamic=True))


def test_prepare_says_what_will_be_balanced(prepare, caplog):
    with caplog.at_level(logging.INFO, logger="ptq4dit_ao.quantizer"):
        prepare()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"\d+ of \d+ quantized linears in 6 of \d+ sites will be balanced; refused: \S+: ", line)
