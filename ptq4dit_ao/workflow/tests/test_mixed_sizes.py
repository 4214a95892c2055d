"""Quantization on samples of several sizes at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from ptq4dit_ao import apply_recipe
from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.capture import export_transformer, free_sizes
from ptq4dit_ao.capture.interface import batches_by_size
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.quantizer import round_sequentially
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.rounding import distillation
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow import weight_bits
from ptq4dit_ao.workflow.apply import enough
from ptq4dit_ao.workflow.diagnostics import diagnose
from ptq4dit_ao.workflow.exported import export_for
from ptq4dit_ao.workflow.from_recipe import quantizer_from_recipe

SMALL, LARGE = (6, 10), (8, 12)


def samples(size: tuple[int, int], rows: int, *, seed: int = 0, family: str = "sd3") -> CalibrationSamples:
    model, arguments = FAMILIES[family].model(), FAMILIES[family].inputs(rows, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    channels = arguments["hidden_states"].shape[1]
    arguments["hidden_states"] = torch.randn(rows, channels, *size, generator=generator)
    signature, tensors = flatten_call(model, arguments)
    return CalibrationSamples(tensors, {}, signature)


@pytest.fixture(scope="module")
def both() -> CalibrationSamples:
    return CalibrationSamples.joined([samples(SMALL, 8), samples(LARGE, 16, seed=1)])


@pytest.fixture(scope="module")
def exported(both) -> GraphModule:
    return export_for(FAMILIES["sd3"].model(), both)


GPTQ = {"method": "gptq", "sequential": True}
LEARNED = {"method": "adaround", "sequential": True, "start": "gptq", "steps": 8}
RECIPES = {
    "nearest": {"weights": {"bits": 8}},
    "gptq": {"weights": {"bits": 4}, "rounding": GPTQ},
    "learned": {"weights": {"bits": 4}, "rounding": LEARNED},
    "distilled": {"weights": {"bits": 4}, "rounding": GPTQ, "distillation": {"steps": 8}},
    "auto": {"weights": {"bits": "auto", "average_bits": 6}, "rounding": GPTQ},
}


def recipe_of(name: str) -> Recipe:
    return Recipe.from_dict({"version": 1, "calibration": {"batch_size": 2}, **RECIPES[name]})


def sqnr_db(exported: GraphModule, quantized: GraphModule, one_size: CalibrationSamples) -> float:
    return paired_error(exported, quantized, one_size.batches(8), timestep_index=None).sqnr_db


@pytest.fixture(scope="module")
def pixart() -> tuple[GraphModule, CalibrationSamples, list[CalibrationSamples]]:
    """A graph, samples of two sizes, and others of each size."""
    sizes = ((12, 20), (10, 14))
    both = CalibrationSamples.joined([samples(size, 24, seed=i, family="pixart_sigma") for i, size in enumerate(sizes)])
    others = [samples(size, 48, seed=2 + i, family="pixart_sigma") for i, size in enumerate(sizes)]
    return export_for(FAMILIES["pixart_sigma"].model(), both), both, others


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_is_as_good_at_each_size_as_for_that_size_alone(name, pixart):
    exported, both, others = pixart
    found = apply_recipe(exported, recipe_of(name), both).graph
    for group, other in zip(both.groups, others, strict=True):
        alone = apply_recipe(exported, recipe_of(name), group).graph
        assert sqnr_db(exported, found, other) > sqnr_db(exported, alone, other) - 0.5


class KilledError(Exception):
    pass


@pytest.mark.parametrize("name", ["learned", "distilled"])
def test_what_was_learned_from_both_sizes_resumes(name, exported, both, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "PAUSE", 0.0)
    monkeypatch.setattr(distillation, "SHARE", 1e9)
    recipe, batch = recipe_of(name), next(both.batches(4))
    whole = apply_recipe(exported, recipe, both).graph

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done > total / 2) == ("round" if name == "learned" else "distill", True):
            raise KilledError

    with pytest.raises(KilledError):
        apply_recipe(exported, recipe, both, resume=tmp_path / "notes", on_progress=kill)
    again = apply_recipe(exported, recipe, both, resume=tmp_path / "notes").graph
    assert torch.equal(again(*batch)[0], whole(*batch)[0])
    with pytest.raises(CalibrationError, match="another model, recipe or calibration set"):
        apply_recipe(exported, recipe, both.groups[0], resume=tmp_path / "notes")


def test_a_part_of_the_batches_is_a_part_of_each_size(exported, both):
    batches = list(both.batches(2))
    assert sorted(map(len, batches_by_size(exported, batches))) == [4, 8]
    for tokens, counts in ((1, [1, 1]), (50, [2, 4]), (100, [4, 8])):
        some = enough(exported, batches, tokens, 100)
        assert sorted(map(len, batches_by_size(exported, some))) == counts
    rounded, measured = weight_bits.held_out(exported, batches)
    assert len(rounded) == 10 and [len(found) for found in batches_by_size(exported, measured)] == [1, 1]
    single = list(both.batches(16))
    assert [len(part) for part in weight_bits.held_out(exported, single)] == [2, 2]


def test_distillation_compares_on_both_sizes(exported, both, monkeypatch):
    """A stride over alternating batches would compare on one size only."""
    monkeypatch.setattr(distillation, "COMPARED", 2)
    seen: list[list[int]] = []
    error = distillation._error

    def spy(run: Any, inputs: Any, targets: Any, some: list[int]) -> float:
        seen.append([next(iter(inputs[i].values())).shape[-1] for i in some])
        return error(run, inputs, targets, some)

    monkeypatch.setattr(distillation, "_error", spy)
    apply_recipe(exported, recipe_of("distilled"), both)
    assert [sorted(set(widths)) for widths in seen] == [[SMALL[1], LARGE[1]]] * 2


def test_layers_are_compared_at_each_timestep_of_both_sizes(exported, both):
    quantized = apply_recipe(exported, recipe_of("nearest"), both).graph
    found = diagnose(exported, quantized, both, rows=4, without_one=False)
    errors = next(iter(found.layer_errors.values()))
    assert set(errors.timesteps) == set(both.timesteps.tolist())


def test_a_graph_of_one_size_refuses_the_other_before_the_work(both):
    fixed = export_transformer(FAMILIES["dit"].model(), FAMILIES["dit"].inputs(2))
    first, second = (samples(size, 4, family="dit") for size in ((8, 8), (8, 12)))
    seen: list[Any] = []
    message = (
        r"hidden_states of calibration size 2 of 2 has shape \(2, 4, 8, 12\), and the graph was captured for \(N, 4,"
    )
    joined = CalibrationSamples.joined([first, second])
    with pytest.raises(CalibrationError, match=message):
        apply_recipe(fixed, recipe_of("nearest"), joined, on_progress=lambda *at: seen.append(at))
    with pytest.raises(CalibrationError, match=r"of calibration batch 1 has shape \(4, 4, 8, 12\), and the graph was"):
        apply_recipe(fixed, recipe_of("nearest"), second)
    assert not seen


class Square(nn.Module):
    """It takes square images another way than others, so that no graph takes both."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 2 if hidden_states.shape[2] == hidden_states.shape[3] else hidden_states * 3


def test_sizes_that_no_graph_takes_together_are_refused():
    square, wide = (CalibrationSamples({"hidden_states": torch.randn(4, 3, *size)}) for size in ((8, 8), (8, 12)))
    with pytest.raises(CalibrationError, match=r"of calibration size 2 of 2 has shape \(2, 3, 8, 12\)"):
        export_for(Square().eval(), CalibrationSamples.joined([square, wide]))
    for alone in (square, wide):
        assert "height" in free_sizes(export_for(Square().eval(), alone)).names


def test_pixart_takes_its_own_size_and_others():
    model = FAMILIES["pixart_sigma"].model()
    joined = CalibrationSamples.joined(
        [samples(size, 4, family="pixart_sigma") for size in ((8, 8), (12, 16), (16, 16))]
    )
    graph = export_for(model, joined)
    for batch in joined.batches(2):
        expected = model(**joined.signature.bind(batch)).sample
        torch.testing.assert_close(graph(*batch), expected, rtol=1e-4, atol=1e-4)


def test_a_prepared_graph_is_rounded_on_batches_of_both_sizes(exported, both):
    recipe = recipe_of("gptq")
    graph = GraphModule(exported, copy.deepcopy(exported.graph))
    prepared = prepare_pt2e(graph, quantizer_from_recipe(recipe))
    batches = list(both.batches(4))
    for batch in batches:
        prepared(*batch)
    round_sequentially(prepared, batches)
