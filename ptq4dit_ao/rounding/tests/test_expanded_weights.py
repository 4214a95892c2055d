"""Weights that expand from 4 bits, in every way of rounding: what they gain, and that all of them obey their rule."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from ptq4dit_ao import distill
from ptq4dit_ao.artifact import read_artifact, write_artifact
from ptq4dit_ao.core.expansion import Expansion
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.expansions import expansions
from ptq4dit_ao.lowering import lower, quantized_linears
from ptq4dit_ao.quantizer import LinearQuantizer, Override, PTQ4DiTQuantizer, round_sequentially
from ptq4dit_ao.rounding import RoundingSettings
from ptq4dit_ao.rounding.layers import find_groups
from ptq4dit_ao.rounding.reconstruct import SoftLinear

PLAIN, GROUPS = Expansion(), Expansion(group=16)
GPTQ = {"weight_bits": 4, "rounding": "gptq", "sequential": True}


@pytest.fixture
def prepare(prepare, tiny_samples):
    """``prepare(**options)``: the tiny DiT, calibrated and, if the options ask for it, rounded layer by layer."""

    def run(**options):
        prepared = prepare(**options)
        if options.get("sequential"):
            round_sequentially(prepared, tiny_samples)
        return prepared

    return run


def obey(converted, rule) -> bool:
    """Whether all weights are as the rule allows."""
    for linear in quantized_linears(converted):
        assert linear.expansion == rule and linear.weight_bits == 4
        shape = tuple(linear.weight.shape)
        assert torch.equal(rule.unpack(rule.pack(linear.weight), shape), linear.weight)
    return True


def test_expanded_weights_are_closer_and_cost_no_operation(prepare, error_db):
    plain, expanded = (convert_pt2e(prepare(**GPTQ, expansion=rule)) for rule in (None, GROUPS))
    assert error_db(expanded) > error_db(plain) + 0.3  # though these weights are drawn from a uniform distribution
    assert obey(expanded, GROUPS)

    def calls(model):
        return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_function")

    assert calls(expanded) == calls(plain)
    assert lower(expanded, "fbgemm").proof.integer_gemms == 14


@pytest.mark.parametrize("rule", [PLAIN, GROUPS], ids=Expansion.to_text)
def test_expanded_weights_are_rounded_to_nearest_without_statistics(prepare, rule):
    prepared = prepare(weight_bits=4, expansion=rule)
    groups = find_groups(prepared)
    for layer in groups[0].layers:
        assert not torch.equal(layer.observer.fake_quantize("w", layer.weight(prepared)), layer.weight(prepared))
    assert obey(convert_pt2e(prepared), rule)


@pytest.mark.parametrize("rule", [PLAIN, GROUPS], ids=Expansion.to_text)
def test_distillation_keeps_to_the_codebooks(prepare, tiny_samples, error_db, rule):
    plain, learned = prepare(**GPTQ, expansion=rule), prepare(**GPTQ, expansion=rule)
    before = [layer.observer.rounded.integers for group in find_groups(learned) for layer in group.layers]
    distill(learned, tiny_samples, steps=100)
    after = [layer.observer.rounded.integers for group in find_groups(learned) for layer in group.layers]
    assert not all(map(torch.equal, before, after))
    learned = convert_pt2e(learned)
    assert obey(learned, rule)
    assert error_db(learned) > error_db(convert_pt2e(plain)) + 1


@pytest.mark.parametrize("rule", [PLAIN, GROUPS], ids=Expansion.to_text)
def test_adaround_chooses_between_the_two_neighbours(prepare, tiny_samples, rule):
    settings = RoundingSettings(rounding="adaround", steps=20, ranges="output", start="gptq")
    prepared = prepare(weight_bits=4, rounding=settings, sequential=True, expansion=rule)
    layer = find_groups(prepared)[0].layers[0]
    soft = SoftLinear(prepared, layer, settings)
    assert (soft.gap > 0).all()
    for h in (torch.zeros(()), torch.ones(())):
        rule.pack(soft._integers(h).to(torch.int8))  # raises an error if an integer is not allowed
    assert obey(convert_pt2e(prepared), rule)


def test_only_weights_of_four_bits_expand(prepare, tiny_samples):
    eight = Override(pattern="*.attn1.to_q", weight_bits=8)
    converted = convert_pt2e(prepare(**GPTQ, expansion=GROUPS, overrides=(eight,)))
    bits = Counter((linear.weight_bits, linear.expansion) for linear in quantized_linears(converted))
    assert bits.keys() == {(8, None), (4, GROUPS)}


def test_rounding_resumes_with_its_codebooks(prepare, tiny_exported, tiny_samples, duplicate, tmp_path):
    def run():
        prepared = prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(**GPTQ, expansion=GROUPS))
        for sample in tiny_samples:
            prepared(*sample)
        round_sequentially(prepared, tiny_samples, resume=tmp_path)
        return [layer.observer.rounded for group in find_groups(prepared) for layer in group.layers]

    for first, again in zip(run(), run(), strict=True):
        assert torch.equal(first.integers, again.integers)
        assert torch.equal(first.codebook.step, again.codebook.step)


def test_an_artifact_stores_four_bits_and_gives_back_eight(prepare, tiny_samples, tmp_path):
    converted = convert_pt2e(prepare(**GPTQ, expansion=GROUPS))
    sizes = write_artifact(tmp_path / "m", converted, {}, [])
    plain = write_artifact(tmp_path / "p", convert_pt2e(prepare(**{**GPTQ, "weight_bits": 8})), {}, [])
    count = sum(linear.weight.numel() for linear in quantized_linears(converted))
    assert plain.weights_bytes - sizes.weights_bytes == pytest.approx(count * (8 - 4.25) / 8, rel=0.02)
    loaded = read_artifact(tmp_path / "m").graph_module
    assert obey(loaded, GROUPS)
    assert set(expansions(loaded).values()) == {GROUPS}
    for a, b in zip(quantized_linears(converted), quantized_linears(loaded), strict=True):
        assert torch.equal(a.weight, b.weight) and a.bits_per_weight == b.bits_per_weight
    with torch.no_grad():
        assert torch.equal(loaded(*tiny_samples[0]), converted(*tiny_samples[0]))


def test_a_base_without_scales_for_rows_cannot_expand(tiny_exported, duplicate):
    base = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(base, weight_bits=4, expansion=GROUPS))

    class PerTensor(LinearQuantizer):
        def annotate(self, model):
            super().annotate(model)
            for node in model.graph.nodes:
                for annotation in [a for a in node.meta.values() if hasattr(a, "input_qspec_map")]:
                    weight = node.args[1]
                    spec = annotation.input_qspec_map[weight]
                    annotation.input_qspec_map[weight] = dataclasses.replace(
                        spec, qscheme=torch.per_tensor_symmetric, ch_axis=None
                    )
            return model

    with pytest.raises(ArgumentError, match=r"the base quantizer gives its weight torch.int8 and .*an expansion needs"):
        prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer(PerTensor(), weight_bits=4, expansion=GROUPS))
