"""AdaRound by blocks on a tiny DiT."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import ptq4dit_ao.rounding.reconstruct as reconstruct
import ptq4dit_ao.rounding.sequential as sequential
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.names import layer_name
from ptq4dit_ao.lowering import lower
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer, round_sequentially
from ptq4dit_ao.rounding import RoundingSettings
from ptq4dit_ao.rounding.blocks import block_name, find_blocks
from ptq4dit_ao.rounding.layers import find_groups
from ptq4dit_ao.rounding.learning import LearnedRange, Run
from ptq4dit_ao.rounding.reconstruct import Budget, SoftLinear
from ptq4dit_ao.rounding.streams import Streams
from ptq4dit_ao.testing.zoo import FAMILIES


def settings(**options):
    return RoundingSettings(rounding="adaround", **{"steps": 60, **options})


@pytest.fixture
def prepare(tiny_exported, tiny_samples, duplicate):
    def run(rounding, **options):
        quantizer = PTQ4DiTQuantizer(weight_bits=4, rounding=rounding, sequential=True, **options)
        prepared = prepare_pt2e(duplicate(tiny_exported), quantizer)
        for sample in tiny_samples:
            prepared(*sample)
        return prepared

    return run


def test_learning_gains(prepare, tiny_samples, error_db):
    plain, learned = prepare(RoundingSettings()), prepare(settings(steps=400))
    for prepared in (plain, learned):
        round_sequentially(prepared, tiny_samples)
    learned = convert_pt2e(learned)
    assert error_db(learned) > error_db(convert_pt2e(plain)) + 2
    assert lower(learned, "fbgemm").proof.integer_gemms == 14


def test_a_weight_is_rounded_up_or_down(prepare, tiny_samples):
    prepared = prepare(settings())
    round_sequentially(prepared, tiny_samples)
    for group in find_groups(prepared):
        for layer in group.layers:
            rounded = layer.observer.rounded
            steps = layer.weight(prepared) / rounded.scale.unsqueeze(1) - rounded.integers
            assert steps.abs().max() < 1 + 1e-4
            assert rounded.bias is None  # AdaRound leaves it


def test_learning_starts_at_the_float_weight(prepare, tiny_samples):
    prepared = prepare(settings(steps=1))
    round_sequentially(prepared, tiny_samples)
    layer = find_groups(prepared)[0].layers[0]
    soft, spec = SoftLinear(prepared, layer, settings()), layer.observer.spec
    weight = layer.weight(prepared).clamp(spec.quant_min * soft.scale, spec.quant_max * soft.scale)
    torch.testing.assert_close(soft(torch.eye(weight.shape[1])) - soft.bias, weight.T, atol=1e-4, rtol=1e-4)


def test_learning_can_start_at_what_gptq_finds(prepare, tiny_samples):
    closed, learned = prepare("gptq"), prepare(settings(start="gptq", steps=1, ranges="output"))
    for prepared in (closed, learned):
        round_sequentially(prepared, tiny_samples)
    (expected,), (found,) = (find_groups(prepared)[0].layers[:1] for prepared in (closed, learned))
    torch.testing.assert_close(found.observer.rounded.bias, expected.observer.rounded.bias)
    assert (found.observer.rounded.integers == expected.observer.rounded.integers).float().mean() > 0.99


def test_a_learned_range_computes_what_the_observer_will(prepare, tiny_samples):
    observer = find_groups(prepare(settings()))[0].observer
    learned, x = LearnedRange(observer), torch.randn(64, 32)
    with torch.no_grad():
        torch.testing.assert_close(learned(x), observer.fake_quantize(x))
        learned.log_scale += 0.3
        learned.harden()
        torch.testing.assert_close(learned(x), observer.fake_quantize(x))


@pytest.mark.parametrize(("least", "most"), [(-128, 127), (-8, 7), (0, 255)])
def test_a_learned_symmetric_range_keeps_its_scale(prepare, least, most):
    observer = find_groups(prepare(settings()))[0].observer
    spec = dataclasses.replace(observer.spec, symmetric=True, quant_min=least, quant_max=most)
    observer.spec, observer.chosen_range = spec, (-0.5, 2.0)
    learned = LearnedRange(observer)
    with torch.no_grad():
        learned.log_scale += 0.3
        learned.harden()
    torch.testing.assert_close(observer.qparams()[0], learned.log_scale.detach().exp())


def test_fewer_steps_in_the_time_given_learn_faster(prepare, tiny_samples, monkeypatch):
    rates = []
    monkeypatch.setattr(reconstruct, "rounding_rate", lambda steps: rates.append(steps) or 1e-3)
    progress = iter([0.0, 0.25, 0.4])  # 4 steps, then 5 are to be expected, of 20,000
    monkeypatch.setattr(Budget, "progress", lambda *_: progress)
    round_sequentially(prepare(settings(steps=20_000)), tiny_samples)
    assert rates[:3] == [20_000, 4.0, 5.0]


def test_a_block_learns_within_its_minutes(prepare, tiny_samples):
    prepared = prepare(settings(steps=3, minutes=5))
    round_sequentially(prepared, tiny_samples)
    assert all(layer.observer.rounded is not None for group in find_groups(prepared) for layer in group.layers)


def test_16_bit_models_learn(tiny_dit, tiny_samples):
    samples = [(x.bfloat16(), t, y) for x, t, y in tiny_samples]
    exported = export_transformer(copy.deepcopy(tiny_dit).bfloat16(), samples[0])
    quantizer = PTQ4DiTQuantizer(weight_bits=4, rounding=settings(steps=3), sequential=True)
    prepared = prepare_pt2e(exported, quantizer)
    for sample in samples:
        prepared(*sample)
    round_sequentially(prepared, samples)
    assert convert_pt2e(prepared)(*samples[0]).dtype == torch.bfloat16


def test_a_block_that_writes_in_place_learns_from_what_was_there(prepare, tiny_samples):
    prepared = prepare(settings(steps=1))
    (first, *_) = find_groups(prepared)
    with prepared.graph.inserting_after(first.node):
        prepared.graph.call_function(torch.ops.aten.add_.Tensor, (first.node.args[0], 1.0))
    prepared.recompile()
    block, *_ = find_blocks(prepared, find_groups(prepared), together=True)
    streams = Streams(prepared, tiny_samples[:1])
    streams.advance(block.start)
    (inputs,) = streams.held(block.nodes)
    streams.advance(block.end)
    (targets,) = streams.exact(block.outputs())
    with torch.no_grad():
        run = Run(prepared, block.nodes, block.outputs(), {}, {})
        assert torch.equal(run.error(inputs, targets), run.error(inputs, targets))


def test_gradients_pass_quantized_attention(prepare, tiny_samples):
    prepared = prepare(settings(steps=1), attention_bits=8)
    round_sequentially(prepared, tiny_samples)
    block, _ = find_blocks(prepared, find_groups(prepared), together=True)
    streams = Streams(prepared, tiny_samples[:1])
    streams.advance(block.start)
    (inputs,) = streams.held(block.nodes)
    streams.advance(block.end)
    (targets,) = streams.exact(block.outputs())
    learning = {layer.node: SoftLinear(prepared, layer, settings()) for layer in block.layers}
    Run(prepared, block.nodes, block.outputs(), learning, {}).error(inputs, targets).backward()
    assert all(linear.v.grad.abs().max() > 0 for linear in learning.values())


def test_blocks_are_what_the_model_lists(prepare):
    prepared = prepare(settings())
    blocks = list(find_blocks(prepared, find_groups(prepared), together=True))
    assert [{block_name(g.name) for g in b.groups} for b in blocks] == [
        {"transformer_blocks.0"},
        {"transformer_blocks.1"},
    ]
    assert all(a.end is b.start for a, b in itertools.pairwise(blocks))
    assert [len(block.outputs()) for block in blocks] == [1, 1]  # the hidden states
    assert block_name("proj_out_1") == "proj_out_1" and block_name("a.blocks.12.ff.net.2") == "a.blocks.12"


def test_a_killed_run_goes_on_at_its_block(prepare, tiny_samples, tmp_path, monkeypatch):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        round_sequentially(prepare(settings()), tiny_samples, on_progress=interrupt, resume=tmp_path / "rounded")
    learned = []
    original = sequential.reconstruct
    monkeypatch.setattr(sequential, "reconstruct", lambda *a, **k: learned.append(a[1]) or original(*a, **k))
    resumed, whole = prepare(settings()), prepare(settings())
    round_sequentially(resumed, tiny_samples, resume=tmp_path / "rounded")
    assert len(learned) == 1
    round_sequentially(whole, tiny_samples)
    assert torch.equal(convert_pt2e(resumed)(*tiny_samples[0]), convert_pt2e(whole)(*tiny_samples[0]))


@pytest.fixture(scope="module")
def prepare_pixart():
    """PixArt: keys and values of all blocks read one caption, and that is observed before the next input is named."""
    family = FAMILIES["pixart_sigma"]
    model = family.model()
    samples = [tuple(flatten_call(model, family.inputs(2, seed=i))[1].values()) for i in range(2)]
    exported = export_transformer(model, family.inputs(2))

    def run():
        graph = GraphModule(exported, copy.deepcopy(exported.graph))
        prepared = prepare_pt2e(graph, PTQ4DiTQuantizer(weight_bits=4, rounding=settings(steps=5), sequential=True))
        for sample in samples:
            prepared(*sample)
        return prepared, samples

    return run


def test_every_layer_learns_in_the_block_that_it_lies_in(prepare_pixart):
    prepared, _ = prepare_pixart()
    groups = find_groups(prepared)
    blocks = list(find_blocks(prepared, groups, together=True))
    layers = [layer for block in blocks for layer in block.layers]
    assert sorted(map(id, layers)) == sorted(id(layer) for group in groups for layer in group.layers)
    assert [group for block in blocks for group in block.groups] == groups
    for block in blocks:
        assert {layer.node for layer in block.layers} <= set(block.nodes)
        assert len({block_name(layer_name(layer.node)) for layer in block.layers}) == 1
        assert block.outputs()
        assert not any(node.op == "placeholder" for node in block.nodes)
    later = {layer_name(layer.node) for block in blocks for layer in block.layers if layer not in own(block)}
    assert later == {"caption_projection.linear_1", *(f"transformer_blocks.1.attn2.to_{x}" for x in "kv")}


def own(block):
    """Layers whose input is observed in the block."""
    return [layer for group in block.groups for layer in group.layers]


def test_layers_that_share_an_input_across_blocks_all_learn(prepare_pixart, monkeypatch):
    prepared, samples = prepare_pixart()
    moved, original = {}, SoftLinear.harden

    def harden(soft):
        first = soft.layer.observer.rounded.integers.clone()
        original(soft)
        moved[layer_name(soft.layer.node)] = bool((soft.layer.observer.rounded.integers != first).any())

    monkeypatch.setattr(SoftLinear, "harden", harden)
    round_sequentially(prepared, samples)
    assert moved.keys() == {layer_name(layer.node) for group in find_groups(prepared) for layer in group.layers}
    assert moved["transformer_blocks.0.attn2.to_k"] and moved["transformer_blocks.1.attn2.to_k"]
    assert convert_pt2e(prepared)(*samples[0]).isfinite().all()


def test_a_killed_run_knows_what_later_blocks_had_of_earlier_inputs(prepare_pixart, tmp_path):
    def interrupt(done, total):
        if done > 0.8 * total:
            raise KeyboardInterrupt

    (killed, samples), (resumed, _), (whole, _) = (prepare_pixart() for _ in range(3))
    with pytest.raises(KeyboardInterrupt):
        round_sequentially(killed, samples, on_progress=interrupt, resume=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4  # of 5 blocks
    round_sequentially(resumed, samples, resume=tmp_path)
    round_sequentially(whole, samples)
    assert torch.equal(convert_pt2e(resumed)(*samples[0]), convert_pt2e(whole)(*samples[0]))


def test_the_float_model_and_the_rest_of_the_graph_do_not_learn(prepare, tiny_samples):
    prepared = prepare(settings(), balance="none")
    before = copy.deepcopy(prepared.state_dict())
    round_sequentially(prepared, tiny_samples)
    for name, value in prepared.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in prepared.parameters())


def test_steps_end_a_block():
    assert list(Budget(settings(steps=4), [1, 1]).progress(0)) == [0, 0.25, 0.5, 0.75]


def test_time_is_shared_out_by_work(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    budget = Budget(settings(steps=1000, minutes=1), [1, 3])

    def run(block):
        spent = []
        for part in budget.progress(block):
            spent.append(part)
            now[0] += 5
        return spent

    assert run(0) == pytest.approx([0, 1 / 3, 2 / 3])
    assert len(run(1)) == 9 and now[0] == 160


def test_wrong_settings_are_named():
    with pytest.raises(ArgumentError, match=r"steps is 0; it must be at least 1 \(the paper's is 20000\)"):
        settings(steps=0)
    with pytest.raises(ArgumentError, match="minutes is -1; it must be above 0, or None"):
        settings(minutes=-1)
    with pytest.raises(ArgumentError, match="learns block by block; pass sequential=True with it"):
        PTQ4DiTQuantizer(rounding="adaround")
