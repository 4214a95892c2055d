"""Distillation of a tiny DiT: what learns, what does not, and how a killed run goes on."""

from __future__ import annotations

import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import ptq4dit_ao.rounding.distillation as module
from ptq4dit_ao import _formats, distill, export_transformer, lower
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer, round_sequentially
from ptq4dit_ao.rounding import DistillationSettings
from ptq4dit_ao.rounding.distillation import LearnedLinear
from ptq4dit_ao.rounding.layers import find_groups
from ptq4dit_ao.rounding.learning import LearnedRange, Run


@pytest.fixture
def rounded(tiny_exported, tiny_samples, duplicate):
    """``rounded(**options of the quantizer)``: prepared, calibrated, rounded layer by layer."""

    def run(samples=tiny_samples, exported=tiny_exported, **options):
        quantizer = PTQ4DiTQuantizer(**{"weight_bits": 4, "rounding": "gptq", "sequential": True, **options})
        prepared = prepare_pt2e(duplicate(exported), quantizer)
        for sample in samples:
            prepared(*sample)
        round_sequentially(prepared, samples)
        return prepared

    return run


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers_of(prepared):
    return [layer for group in find_groups(prepared) for layer in group.layers]


def learned(prepared):
    """Everything that may have changed."""
    return [tensor for tensors in by_kind(prepared).values() for tensor in tensors]


def by_kind(prepared):
    parts = [layer.observer.rounded for layer in layers_of(prepared)]
    return {
        "ranges": [torch.tensor(group.observer.chosen_range) for group in find_groups(prepared)],
        "integers": [part.integers for part in parts],
        "scales": [part.scale for part in parts],
        "biases": [part.bias for part in parts],
    }


def equal(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def test_the_network_comes_closer_to_the_float_one(rounded, tiny_samples, error_db):
    plain, closer = rounded(), rounded()
    distill(closer, tiny_samples, steps=150)
    closer = convert_pt2e(closer)
    assert error_db(closer) > error_db(convert_pt2e(plain)) + 2
    assert lower(closer, "fbgemm").proof.integer_gemms == 14


def test_a_hundred_steps_reach_other_integers(rounded, tiny_samples):
    prepared = rounded()
    before = by_kind(prepared)["integers"]
    distill(prepared, tiny_samples, steps=100)
    assert not all(equal(by_kind(prepared)["integers"], before))


def test_all_that_was_quantized_learns_and_nothing_else(rounded, tiny_samples):
    prepared = rounded(balance="none")
    state, before = copy.deepcopy(prepared.state_dict()), by_kind(prepared)
    distill(prepared, tiny_samples, steps=250)
    for kind, tensors in by_kind(prepared).items():
        same = equal(tensors, before[kind])
        assert sum(same) < len(same) / 2, kind  # rows that nothing depends on may stay
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
    assert all(parameter.grad is None for parameter in prepared.parameters())


@pytest.mark.parametrize("channel_axis", [0, None])
def test_what_learns_is_what_will_be_computed(rounded, channel_axis):
    prepared, x = rounded(), normal(6, 32)
    layer = layers_of(prepared)[0]
    layer.observer.spec = dataclasses.replace(layer.observer.spec, channel_axis=channel_axis)
    if channel_axis is None:
        layer.observer.rounded.scale = layer.observer.rounded.scale.mean().expand(len(layer.observer.rounded.scale))
    linear = LearnedLinear(prepared, layer)

    def expected():
        r = layer.observer.rounded
        return x @ r.weight().T + r.bias

    torch.testing.assert_close(linear(x), expected())
    with torch.no_grad():
        linear.position += normal(*linear.position.shape)
        linear.log_ratio += 0.1
        linear.bias += 0.1
    linear.harden()
    torch.testing.assert_close(linear(x), expected())
    assert layer.observer.rounded.integers.abs().max() <= 8
    assert channel_axis == 0 or len(layer.observer.rounded.scale.unique()) == 1


def test_gradients_pass_the_rounding_and_reach_the_scale(rounded):
    """Of ``y = s round(p) x + bias``, by hand: dp = s x dy, ds = round(p) x dy, and d log s = s ds."""
    prepared = rounded()
    linear, x = LearnedLinear(prepared, layers_of(prepared)[0]), normal(5, 32)
    with torch.no_grad():
        linear.position += 0.3
    dy = normal(5, len(linear.start), seed=1)
    (linear(x) * dy).sum().backward()
    weight_gradient = dy.double().numpy().T @ x.double().numpy()
    scale, integers = linear.start.double().numpy()[:, None], linear.integers().detach().double().numpy()
    for found, by_hand in (
        (linear.position.grad, scale * weight_gradient),
        (linear.log_ratio.grad, (scale * integers * weight_gradient).sum(1)),
        (linear.bias.grad, dy.double().numpy().sum(0)),
    ):
        np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-4, atol=1e-5 * np.abs(by_hand).max())


def test_what_gains_nothing_is_left(rounded, tiny_samples, monkeypatch, caplog):
    monkeypatch.setattr(module, "RATE", 30.0)
    prepared = rounded()
    before = learned(prepared)
    with caplog.at_level(logging.WARNING):
        distill(prepared, tiny_samples, steps=3)
    assert all(equal(learned(prepared), before))
    assert "3 steps of distillation did not reduce the error; the rounded model is kept" in caplog.text


def test_16_bit_models_learn(tiny_dit, tiny_samples, rounded):
    samples = [(x.bfloat16(), t, y) for x, t, y in tiny_samples]
    prepared = rounded(samples, export_transformer(copy.deepcopy(tiny_dit).bfloat16(), samples[0]))
    distill(prepared, samples, steps=3)
    assert convert_pt2e(prepared)(*samples[0]).dtype == torch.bfloat16


def test_layers_learn_around_quantized_attention_and_behind_shifts(rounded, tiny_samples, error_db):
    options = {"attention_bits": 8, "balance": "repq"}
    plain, closer = rounded(**options), rounded(**options)
    distill(closer, tiny_samples, steps=100)
    assert error_db(convert_pt2e(closer)) > error_db(convert_pt2e(plain)) + 1


def test_a_range_learns_wherever_its_observer_stands(rounded):
    prepared = rounded()
    first, second = find_groups(prepared)[2:4]
    with prepared.graph.inserting_after(second.node):  # a reader of the same values, in nobody's group
        other = prepared.graph.call_module(first.node.target, (second.node.args[0],))
    prepared.graph.lint()
    ranges = {first.observer: LearnedRange(first.observer)}
    nodes = [node for node in prepared.graph.nodes if node.op not in ("placeholder", "output")]
    run = Run(prepared, nodes, [other], {}, ranges)
    assert run._instead[other] is run._instead[first.node] is ranges[first.observer]
    assert run._instead[second.node] is not ranges[first.observer]


def test_a_range_learns_no_scale_that_the_observer_would_not_have(rounded):
    observer, x = find_groups(rounded())[0].observer, normal(64, 32) / 100
    observer.chosen_range = (-0.01, 0.03)
    learning = LearnedRange(observer)
    with torch.no_grad():
        learning.log_scale -= 1
        before = learning(x)
        learning.harden()
    torch.testing.assert_close(observer.fake_quantize(x), before)


def test_outputs_that_are_written_in_place_are_learned_for(rounded, tiny_samples):
    prepared = rounded()
    (output,) = (node for node in prepared.graph.nodes if node.op == "output")
    (result,) = output.all_input_nodes
    with prepared.graph.inserting_before(output):
        empty = prepared.graph.call_function(torch.ops.aten.zeros_like.default, (result,))
        prepared.graph.call_function(torch.ops.aten.copy_.default, (empty, result))
    output.replace_input_with(result, empty)
    prepared.recompile()
    before = learned(prepared)
    distill(prepared, tiny_samples, steps=60)
    assert not all(equal(learned(prepared), before))


def test_places_stay_beside_integers(rounded):
    prepared = rounded()
    linear = LearnedLinear(prepared, layers_of(prepared)[0])
    with torch.no_grad():
        linear.position += 100
        expected = linear.integers()
    linear.clamp_()
    assert linear.position.max() < 7.5 and torch.equal(linear.integers(), expected)


def test_every_batch_has_its_turn():
    first, second = ([module._batch(step, 5) for step in range(start, start + 5)] for start in (0, 5))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4] and first != second


def test_time_ends_it(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = module._Clock(DistillationSettings(steps=1000, minutes=1))
    clock.earlier = 30.0
    now[0] += 15
    assert clock.spent() == 0.75
    clock.steps = 900
    assert clock.spent() == 0.9
    now[0] += 100
    assert clock.spent() == 1


def never_pause(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "SHARE", float("inf"))


def kill_at(step):
    def on_progress(done, total):
        if done == step:
            raise KeyboardInterrupt

    return on_progress


def test_a_killed_run_goes_on_where_it_was(rounded, tiny_samples, tmp_path, monkeypatch):
    never_pause(monkeypatch)
    whole, killed, resumed = rounded(), rounded(), rounded()
    distill(whole, tiny_samples, steps=12)
    before = learned(killed)
    with pytest.raises(KeyboardInterrupt):
        distill(killed, tiny_samples, steps=12, on_progress=kill_at(8), resume=tmp_path)
    assert all(equal(learned(killed), before))
    steps = []
    distill(
        resumed, tiny_samples, steps=12, on_progress=lambda done, total: steps.append((done, total)), resume=tmp_path
    )
    assert steps == [(step, 12) for step in range(8, 13)]  # the eighth is in no checkpoint
    assert all(equal(learned(resumed), learned(whole)))


@pytest.fixture
def checkpoint(rounded, tiny_samples, tmp_path, monkeypatch):
    """A folder with what a killed run has left."""
    never_pause(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(rounded(), tiny_samples, steps=4, on_progress=kill_at(3), resume=tmp_path)
    return tmp_path


def test_a_checkpoint_of_another_run_is_refused(rounded, tiny_samples, checkpoint):
    for prepared, batches, steps in (
        (rounded(weight_bits=5), tiny_samples, 4),
        (rounded(), tiny_samples[1:], 4),
        (rounded(), tiny_samples, 5),
    ):
        with pytest.raises(
            CalibrationError, match=r"distillation.safetensors was learned by another model, recipe or "
        ):
            distill(prepared, batches, steps=steps, resume=checkpoint)


def test_a_damaged_checkpoint_is_named(rounded, tiny_samples, checkpoint):
    path = checkpoint / "distillation.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CalibrationError, match="cannot read distillation from .*distillation.safetensors"):
        distill(rounded(), tiny_samples, steps=4, resume=checkpoint)


def test_a_checkpoint_that_cannot_be_written_is_named(rounded, tiny_samples, tmp_path, monkeypatch):
    never_pause(monkeypatch)
    monkeypatch.setattr(
        _formats, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(
        CalibrationError, match=r"cannot write distillation to .*distillation.safetensors: No space left on device"
    ):
        distill(rounded(), tiny_samples, steps=2, resume=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_holds_what_learns_and_the_optimizers_state(rounded, checkpoint):
    parts = load_file(checkpoint / "distillation.safetensors")
    linears, groups = len(layers_of(rounded())), len(find_groups(rounded()))
    learning = 3 * linears + groups
    assert sum(name.startswith("adam.") for name in parts) == 3 * learning and len(parts) == 4 * learning


def test_wrong_use_is_named(tiny_exported, tiny_samples, rounded, duplicate):
    with pytest.raises(ArgumentError, match="steps is 0; it must be at least 1"):
        distill(rounded(), tiny_samples, steps=0)
    with pytest.raises(ArgumentError, match="minutes is 0; it must be above 0, or None"):
        distill(rounded(), tiny_samples, minutes=0)
    with pytest.raises(CalibrationError, match="there are no samples to learn from"):
        distill(rounded(), [])
    prepared = prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(sequential=True))
    with pytest.raises(CalibrationError, match=r"call ptq4dit_ao.round_sequentially\(prepared, batches\) first"):
        distill(prepared, tiny_samples)


def test_weights_that_are_none_to_round_are_named(rounded, tiny_samples, monkeypatch):
    prepared = rounded()
    monkeypatch.setattr(module, "find_groups", lambda _: [])
    with pytest.raises(CalibrationError, match="no layer was rounded, so that none can learn; leave distillation out"):
        distill(prepared, tiny_samples)
