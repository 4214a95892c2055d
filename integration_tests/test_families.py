"""What balancing is for, on more architectures than DiT: salient channels, 16-bit parameters, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao import PTQ4DiTQuantizer, export_transformer
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph import Site, find_sites
from ptq4dit_ao.graph.names import get_attribute, is_linear, layer_name
from ptq4dit_ao.graph.signature import flatten_call
from ptq4dit_ao.passes import fold_balance, insert_balance
from ptq4dit_ao.passes.edit import scale_of
from ptq4dit_ao.testing.float64 import in_float64, wide
from ptq4dit_ao.testing.outliers import inject_outliers
from ptq4dit_ao.testing.zoo import FAMILIES

CALIBRATION, EVALUATION = range(6), range(100, 103)
"""Seeds of batches."""

Inputs = tuple[Tensor, ...]


@cache
def exported(name: str, *, outliers: bool = False, dtype: torch.dtype = torch.float32) -> GraphModule:
    """A family's float graph. Not to be changed."""
    model = FAMILIES[name].model(dtype=dtype)
    return export_transformer(inject_outliers(model) if outliers else model, FAMILIES[name].inputs(2, dtype=dtype))


@cache
def graph_inputs(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """A batch of four, by position."""
    inputs = FAMILIES[name].inputs(4, seed=seed, dtype=dtype)
    return tuple(flatten_call(FAMILIES[name].model(), inputs)[1].values())


def widened(inputs: Inputs) -> Inputs:
    return tuple(wide(x) for x in inputs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def foldable(graph: GraphModule) -> list[Site]:
    return [site for site in find_sites(graph) if site.refusal is None]


def random_b(site: Site, limit: float, seed: int) -> Tensor:
    """Log-uniform in [1/limit, limit]."""
    generator = torch.Generator().manual_seed(seed)
    return limit ** (2 * torch.rand(site.num_variables, generator=generator, dtype=torch.float64) - 1)


def fold_all(graph: GraphModule, sites: Iterable[Site], b: Callable[[Site], Tensor]) -> GraphModule:
    """In place, in the default form."""
    for site in sites:
        insert_balance(graph, site, b(site))
        fold_balance(graph, site, b(site))
    graph.recompile()
    return graph


# -- salient channels -------------------------------------------------------------------------------------------------

INJECTED = {"pixart_sigma": 2 * 4, "sd3": 2 * 8 + 7, "sd35": 3 * 8 + 7 + 2 * 3, "flux": 2 * 8 + 2 * 4}
"""Linears that read a modulated input: q, k, v and FC1, in two streams; the last block of SD3 has no text FC1."""


class _ChannelMaxima(Interpreter):
    """Largest absolute input of each channel of each linear."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.maxima: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if is_linear(n):
            x = self.env[n.args[0]]
            self.maxima[layer_name(n)] = x.abs().reshape(-1, x.shape[-1]).amax(0)
        return super().run_node(n)


@pytest.mark.parametrize("name", INJECTED)
@torch.no_grad()
def test_injected_outliers_keep_the_function(name):
    plain, salient = (
        _ChannelMaxima(in_float64(exported(name, outliers=outliers, dtype=torch.float64)))
        for outliers in (False, True)
    )
    inputs = graph_inputs(name, 0, torch.float64)
    assert relative_error(salient.run(*inputs), plain.run(*inputs)) <= 1e-9
    growth = {layer: after / plain.maxima[layer] for layer, after in salient.maxima.items()}
    grown = {layer: g[(g - 1).abs() > 1e-6] for layer, g in growth.items()}
    counts = [len(g) for g in grown.values() if len(g)]
    assert counts == [4] * INJECTED[name]
    assert all(((g > 9.99) & (g < 30.01)).all() for g in grown.values())


def test_injection_refuses_what_it_does_not_know():
    with pytest.raises(ArgumentError, match=r"inject_outliers knows DiT.*Flux.*, not SanaTransformer2DModel"):
        inject_outliers(FAMILIES["sana"].model())


def w8a8_sqnr_db(name: str, *, outliers: bool, aggregation: str) -> float:
    """Of the simulated graph against the float model without outliers.

    ``layers`` is the default: embedders and the last layer, which no outlier reaches, stay float.
    """
    graph = exported(name, outliers=outliers)
    prepared = prepare_pt2e(
        GraphModule(graph, copy.deepcopy(graph.graph)), PTQ4DiTQuantizer(aggregation=aggregation)
    )
    for seed in CALIBRATION:
        prepared(*graph_inputs(name, seed))
    converted = convert_pt2e(prepared)
    batches = [graph_inputs(name, seed) for seed in EVALUATION]
    expected, actual = (torch.cat([run(*batch) for batch in batches]) for run in (exported(name), converted))
    return sqnr_db(expected, actual)


@pytest.mark.parametrize("name", ["pixart_sigma", "sd3", "flux"])
@torch.no_grad()
def test_balancing_undoes_outliers(name, record_property):
    figures = {
        f"{aggregation}, {'salient' if outliers else 'plain'}": w8a8_sqnr_db(
            name, outliers=outliers, aggregation=aggregation
        )
        for outliers, aggregation in ((True, "ssc"), (True, "none"), (False, "ssc"), (False, "none"))
    }
    print(name, figures)
    assert figures["ssc, salient"] >= figures["none, salient"] + 10
