"""Tests of every transformer family with every kind of rounding that a recipe can ask for: none crashes or is worse."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4dit_ao import apply_recipe, export_transformer, load_recipe
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.graph.constants import constants
from ptq4dit_ao.graph.names import timestep_placeholder
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow.from_recipe import quantizer_from_recipe

CALIBRATION = range(10, 13)
"""Seeds of the batches that are learned from, and measured on."""

QUICK = ("pixart_sigma", "sana", "stable_audio", "wan")
"""Keys and values of all blocks from one input; inputs observed before another is named; in-place writes."""

STEPS = 3
"""Of learning: too few to gain much."""

MARGIN_DB = 3.0
"""So much worse than rounding to nearest may be what so few steps and batches find; most are 2 to 12 dB better."""

Batch = tuple[Tensor, ...]
every_family = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)]


@cache
def captured(name: str) -> tuple[GraphModule, list[Batch], Tensor]:
    """The graph, its batches, and what it puts out for them. Not to be changed."""
    family = FAMILIES[name]
    model = family.model()
    graph = export_transformer(model, family.inputs(2))
    batches = [tuple(flatten_call(model, family.inputs(2, seed=seed))[1].values()) for seed in CALIBRATION]
    return graph, batches, outputs(graph, batches)


def outputs(graph: GraphModule, batches: list[Batch]) -> Tensor:
    leaves = [leaf for batch in batches for leaf in tree_leaves(graph(*batch))]
    return torch.cat([leaf.double().flatten() for leaf in leaves if leaf.is_floating_point()])


def live(graph: GraphModule) -> set[str]:
    """Names of the nodes that an output depends on; ``convert_pt2e`` drops the others."""
    copied = copy.deepcopy(graph.graph)
    copied.eliminate_dead_code()
    return {node.name for node in copied.nodes}


def read(graph: GraphModule, linear: str) -> set[str]:
    """Name of what a linear reads, as a set."""
    (node,) = (node for node in graph.graph.nodes if node.name == linear)
    return {node.args[0].name}


def quick(recipe: Recipe, graph: GraphModule) -> Recipe:
    """The recipe with very few steps; where nothing tells the timestep, with a balancing that asks for none."""
    rounding = recipe.rounding.model_copy(update={"steps": STEPS})
    distillation = recipe.distillation.model_copy(update={"steps": min(STEPS, recipe.distillation.steps)})
    balance = recipe.balance
    if timestep_placeholder(graph) is None and balance.method not in ("none", "repq"):
        balance = balance.model_copy(update={"method": "max"})
    return recipe.model_copy(update={"rounding": rounding, "distillation": distillation, "balance": balance})


@cache
def nearest_db(name: str, recipe: str) -> float:
    """SQNR of rounding to nearest, with the recipe's bits and layers."""
    graph, batches, expected = captured(name)
    base = load_recipe(recipe)
    plain = Recipe(
        weights=base.weights,
        activations=base.activations,
        attention=base.attention,
        layers=base.layers,
        balance=Balance(method="none"),
    )
    return sqnr_db(expected, outputs(apply_recipe(graph, plain, batches).graph, batches))


RECIPES = ("auto", "learned", "distilled", "paper_w8a8")
OTHERS = ("fast", "smoothquant", "repq", "q_diffusion", "ptq4dm")
every_recipe = [*RECIPES, *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in OTHERS)]


@pytest.mark.parametrize("recipe", every_recipe)
@pytest.mark.parametrize("name", every_family)
def test_a_recipe_quantizes_a_family(name, recipe):
    graph, batches, expected = captured(name)
    short = quick(load_recipe(recipe), graph)
    plans, fixed = quantizer_from_recipe(short).plan(graph), {node.name for node in constants(graph)}
    quantized = apply_recipe(graph, short, batches)
    integer = {layer["name"] for layer in quantized.report["layers"] if layer["status"] == "integer"}
    planned = [(node, plan.layer) for node, plan in plans.items() if not plan.skip and node in live(graph)]
    assert integer == {layer for node, layer in planned if not read(graph, node) & fixed}
    got = outputs(quantized.graph, batches)
    assert got.isfinite().all()
    assert sqnr_db(expected, got) >= nearest_db(name, recipe) - MARGIN_DB
