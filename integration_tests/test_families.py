"""Tests of balancing on more architectures than DiT: salient channels, 16-bit parameters, and inverse folds."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao import Override, PTQ4DiTQuantizer, export_transformer
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph import Site, find_sites
from ptq4dit_ao.graph.names import is_linear, layer_name, placeholders
from ptq4dit_ao.passes import fold_balance, insert_balance
from ptq4dit_ao.testing.float64 import in_float64, wide
from ptq4dit_ao.testing.outliers import inject_outliers
from ptq4dit_ao.testing.zoo import FAMILIES

CALIBRATION, EVALUATION = range(6), range(100, 103)
"""Seeds of batches."""

Inputs = tuple[Tensor, ...]


def slow(name: str) -> Any:
    """A family that only the slow tests capture."""
    return pytest.param(name, marks=pytest.mark.slow)


@cache
def exported(name: str, dtype: torch.dtype = torch.float32) -> GraphModule:
    """A family's float graph. Not to be changed."""
    return export_transformer(FAMILIES[name].model(dtype=dtype), FAMILIES[name].inputs(2, dtype=dtype))


def salient(name: str, dtype: torch.dtype = torch.float32) -> GraphModule:
    """The family's graph with the parameters of :func:`inject_outliers`."""
    graph = in_float64(exported(name)) if dtype is torch.float64 else copy.deepcopy(exported(name))
    parameters = inject_outliers(FAMILIES[name].model(dtype=dtype)).state_dict()
    assert not graph.load_state_dict(parameters, strict=False).unexpected_keys
    return graph


@cache
def graph_inputs(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """A batch of four, by position."""
    inputs = FAMILIES[name].inputs(4, seed=seed, dtype=dtype)
    return tuple(flatten_call(FAMILIES[name].model(), inputs)[1].values())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def foldable(graph: GraphModule) -> list[Site]:
    return [site for site in find_sites(graph) if site.refusal is None]


def random_b(sites: Iterable[Site], limit: float, seed: int) -> list[tuple[Site, Tensor]]:
    """Log-uniform in [1/limit, limit]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (site, limit ** (2 * torch.rand(site.num_variables, generator=generator, dtype=torch.float64) - 1))
        for site in sites
    ]


def fold_all(graph: GraphModule, balance: Iterable[tuple[Site, Tensor]]) -> GraphModule:
    """In place, in the default form."""
    for site, b in balance:
        insert_balance(graph, site, b)
        fold_balance(graph, site, b)
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


@pytest.mark.parametrize("name", ["pixart_sigma", "sd3", slow("sd35"), "flux"])
@torch.no_grad()
def test_injected_outliers_keep_the_function(name):
    before, after = (_ChannelMaxima(graph) for graph in (in_float64(exported(name)), salient(name, torch.float64)))
    inputs = graph_inputs(name, 0, torch.float64)
    assert relative_error(after.run(*inputs), before.run(*inputs)) <= 1e-9
    growth = [after.maxima[layer] / maxima for layer, maxima in before.maxima.items()]
    grown = [g for ratios in growth if len(g := ratios[(ratios - 1).abs() > 1e-6])]
    assert [len(g) for g in grown] == [4] * INJECTED[name]
    assert all(((g > 9.99) & (g < 30.01)).all() for g in grown)


def test_injection_refuses_what_it_does_not_know():
    with pytest.raises(ArgumentError, match=r"inject_outliers knows DiT.*Flux.*, not SanaTransformer2DModel"):
        inject_outliers(FAMILIES["sana"].model())


OTHERS_SKIPPED = (
    Override(pattern="*", skip=True),
    *(
        Override(pattern=pattern, weight_bits=8, must_match=False)
        for pattern in ("*.to_[qkv]", "*.add_[qkv]_proj", "*.net.0.proj", "*.proj_mlp")
    ),
)
"""Only q, k, v and FC1 are quantized: the others' errors, which no outlier makes, would hide theirs."""


def w8a8_sqnr_db(name: str, method: str) -> float:
    """Of the simulated graph with salient channels, against the float graph without."""
    prepared = prepare_pt2e(salient(name), PTQ4DiTQuantizer(balance=method, layers=OTHERS_SKIPPED))
    for seed in CALIBRATION:
        prepared(*graph_inputs(name, seed))
    converted = convert_pt2e(prepared)
    batches = [graph_inputs(name, seed) for seed in EVALUATION]
    expected, actual = (torch.cat([run(*batch) for batch in batches]) for run in (exported(name), converted))
    return sqnr_db(expected, actual)


@pytest.mark.parametrize("name", ["pixart_sigma", "sd3", "flux"])
@torch.no_grad()
def test_balancing_undoes_outliers(name):
    assert w8a8_sqnr_db(name, "ssc") >= w8a8_sqnr_db(name, "none") + 10


# -- 16-bit parameters ------------------------------------------------------------------------------------------------


def exact_inputs(name: str, seed: int) -> Inputs:
    """In bfloat16. Flux multiplies its times by 1000: only powers of two survive that, too.

    Else rounding the time would be nearly all of the error, and folding could not show.
    """
    values = graph_inputs(name, seed, torch.bfloat16)
    if name != "flux":
        return values
    names = [node.name for node in placeholders(exported(name, torch.bfloat16))]
    return tuple(
        x.float().log2().floor().exp2().to(x) if key in ("timestep", "guidance") else x
        for key, x in zip(names, values, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "pixart_sigma", "sd3", "flux"])
@torch.no_grad()
def test_folding_costs_little_in_bfloat16(name):
    """Balanced parameters are rounded again, unless b is a power of two: then nothing changes, bit for bit."""
    graph = exported(name, torch.bfloat16)
    sites, batches = foldable(graph), [exact_inputs(name, seed) for seed in range(4)]
    truth = in_float64(graph)
    expected = [truth(*map(wide, batch)) for batch in batches]

    def error(model: GraphModule) -> float:
        return fmean(relative_error(model(*batch), y) for batch, y in zip(batches, expected, strict=True))

    folded = [error(fold_all(copy.deepcopy(graph), random_b(sites, 50, seed))) for seed in range(3)]
    assert error(graph) < 0.02
    assert fmean(folded) <= 1.3 * error(graph)
    powers = [(site, b.log2().round().exp2()) for site, b in random_b(sites, 50, 0)]
    assert torch.equal(fold_all(copy.deepcopy(graph), powers)(*batches[0]), graph(*batches[0]))


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart_sigma", slow("flux2"), slow("sana")])
@torch.no_grad()
def test_a_fold_is_undone_by_its_inverse(name):
    graph = in_float64(exported(name))
    inputs = graph_inputs(name, 0, torch.float64)
    expected, before = graph(*inputs), copy.deepcopy(graph.state_dict())
    balance = random_b(foldable(graph), 50, 0)
    assert any(site.cuts for site, _ in balance) and any(site.norms for site, _ in balance)
    for vectors in (balance, [(site, 1 / b) for site, b in balance]):
        fold_all(graph, vectors)
        assert relative_error(graph(*inputs), expected) <= 1e-12
        changed = [key for key, value in graph.state_dict().items() if far(value, before.get(key))]
        assert bool(changed) == (vectors is balance), changed


def far(value: Tensor, before: Tensor | None) -> bool:
    """Do they differ by more than rounding? What folding adds, weights of norms and the like, must come back to 1."""
    before = torch.ones_like(value) if before is None else before
    return not torch.allclose(value, before, rtol=1e-12, atol=0)
