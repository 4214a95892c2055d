"""Errors by layer, and by what is left out: against graphs whose errors are known, and whole graphs run again."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx import GraphModule

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.names import get_attribute, placeholders
from ptq4dit_ao.lowering import quantized_linears
from ptq4dit_ao.metrics import layer_errors, leave_one_out, paired_error, weight_errors
from ptq4dit_ao.metrics.walk import Walk
from ptq4dit_ao.passes import balance_result, balanced_as


@pytest.fixture(scope="module")
def by_timestep(tiny_samples):
    """Two batches, of one timestep each."""
    return [(x, torch.full_like(t, value), y) for (x, t, y), value in zip(tiny_samples, (900, 100), strict=False)]


def balanced_of(exported: GraphModule, converted: GraphModule) -> GraphModule:
    return balanced_as(exported, balance_result(converted))


def test_a_graph_against_itself(tiny_exported, by_timestep):
    errors = layer_errors(tiny_exported, tiny_exported, by_timestep)
    assert len(errors) == 22 and {error.sqnr_db for error in errors.values()} == {math.inf}
    assert all(list(error.per_timestep) == [100, 900] for error in errors.values())


def test_layers_are_compared_with_the_balanced_graph(quantized, tiny_exported, by_timestep):
    coarse, fine = quantized(weight_bits=4), quantized(weight_bits=8)
    balanced, layers = balanced_of(tiny_exported, fine), balance_result(fine).layers
    by_bits = {bits: layer_errors(balanced, model, by_timestep) for bits, model in ((4, coarse), (8, fine))}
    for name, error in by_bits[8].items():
        for t, db in error.per_timestep.items():
            other = by_bits[4][name].per_timestep[t]
            if "timestep_embedder" in layers[name] or layers[name] == "proj_out_1":
                assert db == other == math.inf  # float, and nothing before them is quantized
            else:
                assert 25 < db < 80 and other < db - 3, name
    # Against the graph before balancing, V is another tensor: it is off by its balancing vector.
    unbalanced = layer_errors(tiny_exported, fine, by_timestep)
    values = [name for name in by_bits[8] if layers[name].endswith("to_v")]
    assert len(values) == 2 and all(unbalanced[name].sqnr_db < 20 for name in values)


def test_every_timestep_has_its_own_error(quantized, tiny_exported, by_timestep):
    converted = quantized(weight_bits=4)
    balanced = balanced_of(tiny_exported, converted)
    both = layer_errors(balanced, converted, by_timestep)
    for batch, t in zip(by_timestep, (900, 100), strict=True):
        for name, error in layer_errors(balanced, converted, [batch]).items():
            assert error.per_timestep == {t: both[name].per_timestep[t]}


def test_a_batch_of_several_timesteps_is_refused(tiny_exported, tiny_samples):
    with pytest.raises(ArgumentError, match="a batch holds 4 timesteps; give batches of one timestep each"):
        layer_errors(tiny_exported, tiny_exported, [(*tiny_samples[0][:1], torch.arange(4), tiny_samples[0][2])])


def test_a_linear_that_the_float_graph_lacks(tiny_exported, by_timestep, duplicate):
    other = duplicate(tiny_exported)
    next(node for node in other.graph.nodes if node.name == "linear_5")._rename("renamed")
    with pytest.raises(
        ArgumentError, match="float graph has no linear 'linear_5' where the quantized graph has it; give"
    ):
        layer_errors(other, tiny_exported, by_timestep)


# -- leaving one out -------------------------------------------------------------------------------------------------


def without(balanced: GraphModule, converted: GraphModule, names: tuple[str, ...], duplicate):
    """The converted graph edited: these linears read what was quantized, with the balanced graph's weights."""
    edited = duplicate(converted)
    float_nodes = {node.name: node for node in balanced.graph.nodes}
    for node in [node for node in edited.graph.nodes if node.name in names]:
        for i, source in enumerate(float_nodes[node.name].args[1:], start=1):
            path = f"float_{node.name}_{i}"
            edited.register_buffer(path, get_attribute(balanced, source.target))
            with edited.graph.inserting_before(node):
                node.update_arg(i, edited.graph.get_attr(path))
        node.update_arg(0, node.args[0].args[0].args[0])
    edited.recompile()
    return edited


def test_leaving_out_is_a_run_of_the_edited_graph(quantized, tiny_exported, tiny_samples, duplicate):
    converted, seen = quantized(weight_bits=3), []
    balanced = balanced_of(tiny_exported, converted)
    found = leave_one_out(balanced, converted, tiny_samples[:2], on_progress=lambda *run: seen.append(run))
    assert found.quantized.sqnr_db == pytest.approx(paired_error(balanced, converted, tiny_samples[:2]).sqnr_db)
    assert len(found.without) == 10 and max(map(len, found.without)) == 3  # norm, q k v, out, up, down of two blocks
    for names in list(found.without)[::3]:
        edited = without(balanced, converted, names, duplicate)
        expected = paired_error(balanced, edited, tiny_samples[:2])
        assert found.without[names].sqnr_db == pytest.approx(expected.sqnr_db, abs=1e-6)
        assert found.gains_db[names] == pytest.approx(expected.sqnr_db - found.quantized.sqnr_db, abs=1e-6)
    assert seen == [(done, 20) for done in range(1, 21)]


def test_weights_alone_are_a_run_of_the_edited_graph(quantized, tiny_exported, tiny_samples, duplicate):
    converted = quantized(weight_bits=3, rounding="gptq")
    balanced = balanced_of(tiny_exported, converted)
    found = weight_errors(balanced, converted, tiny_samples[:2])
    assert len(found) == 10
    linears = {linear.name: linear for linear in quantized_linears(converted)}
    for names in list(found)[::3]:
        edited = duplicate(balanced)
        for node in [node for node in edited.graph.nodes if node.name in names]:
            linear = linears[node.name]
            for i, value in ((1, linear.weight * linear.weight_scale.unsqueeze(1)), (2, linear.bias)):
                edited.register_buffer(f"rounded_{node.name}_{i}", value)
                with edited.graph.inserting_before(node):
                    node.update_arg(i, edited.graph.get_attr(f"rounded_{node.name}_{i}"))
        edited.recompile()
        expected = paired_error(balanced, edited, tiny_samples[:2])
        assert found[names].sqnr_db == pytest.approx(expected.sqnr_db, abs=1e-3)


def test_a_graph_that_writes_in_place_is_left_out_of_alike(quantized, tiny_exported, tiny_samples, duplicate):
    converted = quantized(weight_bits=4)
    balanced = balanced_of(tiny_exported, converted)
    writing = duplicate(converted)
    add = torch.ops.aten.add.Tensor
    sums = [node for node in writing.graph.nodes if node.target is add]
    residual = next(node for node in reversed(sums) if node.args[1] in sums)
    residual.target, residual.args = torch.ops.aten.add_.Tensor, residual.args[::-1]  # x += what the block gives
    expected, found = (leave_one_out(balanced, graph, tiny_samples[:1]) for graph in (converted, writing))
    assert list(found.gains_db.values()) == pytest.approx(list(expected.gains_db.values()), abs=1e-6)


def test_a_float_graph_has_nothing_to_leave_out(tiny_exported, tiny_samples):
    with pytest.raises(ArgumentError, match="no linear with a quantized input; give one from convert_pt2e"):
        leave_one_out(tiny_exported, tiny_exported, tiny_samples)


def test_a_walk_can_be_gone_on_with_in_two_ways(tiny_exported, tiny_samples):
    walk = Walk(tiny_exported, tiny_samples[0])
    last = list(tiny_exported.graph.nodes)[-2]
    walk.advance(last)
    doubled = walk.fork({last: lambda x, *rest: 2 * x})
    assert isinstance(doubled.finish(), torch.Tensor)
    assert torch.equal(walk.finish(), tiny_exported(*tiny_samples[0]))


def test_a_walk_that_stops_among_the_inputs_goes_on_with_those_that_are_left(tiny_exported, tiny_samples):
    walk = Walk(tiny_exported, tiny_samples[0])
    walk.advance(placeholders(tiny_exported)[1])
    assert torch.equal(walk.finish(), tiny_exported(*tiny_samples[0]))
