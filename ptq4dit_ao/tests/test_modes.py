"""What a caller has set for his own model does not change what is computed here."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao import (
    PTQ4DiTQuantizer,
    apply_recipe,
    balance,
    balance_module,
    collect_salience,
    distill,
    export_transformer,
    round_sequentially,
)
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.recipe import Distillation, Recipe, Rounding
from ptq4dit_ao.rounding import RoundingSettings

LEARNS = Recipe(
    rounding=Rounding(method="adaround", start="gptq", sequential=True, ranges="output", steps=2),
    distillation=Distillation(steps=1),
)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "deterministic": deterministic,
}


def applied(model, samples):
    return apply_recipe(model, LEARNS, samples).graph


def by_hand(model, samples):
    rounding = RoundingSettings(rounding="adaround", steps=2)
    prepared = prepare_pt2e(export_transformer(model, samples[0]), PTQ4DiTQuantizer(rounding=rounding, sequential=True))
    for sample in samples:
        prepared(*sample)
    round_sequentially(prepared, samples)
    distill(prepared, samples, steps=1)
    return convert_pt2e(prepared)


def in_one_pass(model, samples):
    prepared = prepare_pt2e(export_transformer(model, samples[0]), PTQ4DiTQuantizer(rounding="gptq", weight_bits=4))
    for sample in samples:
        prepared(*sample)
    return convert_pt2e(prepared)


def balanced(model, samples):
    exported = export_transformer(model, samples[0])
    return balance(exported, collect_salience(exported, samples))


def balanced_in_place(model, samples):
    model = copy.deepcopy(model)
    exported = export_transformer(model, samples[0])
    balance_module(model, exported, collect_salience(exported, samples))
    return export_transformer(model, samples[0])


@pytest.fixture(scope="module")
def expected(tiny_dit, tiny_samples):
    """What each way gives with nothing set, made when it is first asked for."""
    found = {}

    def run(way):
        if way not in found:
            found[way] = way(tiny_dit, tiny_samples[:2])(*tiny_samples[0])
        return found[way]

    return run


HAND_MODES = ("inference", "bfloat16", "float64")
"""In which somebody may call a prepared graph himself."""
FLOAT_MODES = ("inference", "autocast", "bfloat16")


@pytest.mark.parametrize(
    ("way", "mode"),
    [
        *((applied, mode) for mode in MODES),
        *((way, mode) for way in (balanced, balanced_in_place) for mode in FLOAT_MODES),
        *((way, mode) for way in (by_hand, in_one_pass) for mode in HAND_MODES),
    ],
)
def test_a_mode_of_the_caller_changes_nothing(way, mode, tiny_dit, tiny_samples, expected):
    plain = expected(way)
    with MODES[mode]():
        graph = way(tiny_dit, tiny_samples[:2])
    assert torch.equal(graph(*tiny_samples[0]), plain)


@pytest.mark.parametrize("way", [applied, by_hand, in_one_pass, balanced_in_place])
def test_what_inference_mode_has_made_can_learn(way, tiny_dit, tiny_samples, expected):
    with torch.inference_mode():
        model = copy.deepcopy(tiny_dit)
        samples = [tuple(x.clone() for x in sample) for sample in tiny_samples[:2]]
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
        assert next(model.parameters()).is_inference()
        graph = way(model, samples)
    assert torch.equal(graph(*tiny_samples[0]), expected(way))


def test_parameters_that_learn_are_left_alone(tiny_dit, tiny_samples, expected):
    model = copy.deepcopy(tiny_dit).requires_grad_(True)
    graph = applied(model, tiny_samples[:2])
    assert torch.equal(graph(*tiny_samples[0]), expected(applied))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_prepared_graph_refuses_autocast(tiny_dit, tiny_samples):
    prepared = prepare_pt2e(export_transformer(tiny_dit, tiny_samples[0]), PTQ4DiTQuantizer())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(CalibrationError, match=r"called under torch\.autocast, .* calibrate outside of it"),
    ):
        prepared(*tiny_samples[0])


def test_the_callers_modes_come_back():
    with default_dtype(torch.float64), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        with own_modes():
            assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
            assert torch.get_default_dtype() is torch.float32
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() is torch.float64
