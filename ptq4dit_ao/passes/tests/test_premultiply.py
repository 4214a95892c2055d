"""Sites that a multiply of their input balances: the function stays, and only refused linears get one."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.graph import Site, SitePolicy, find_sites, premultiplied_sites
from ptq4dit_ao.graph.names import linears
from ptq4dit_ao.passes import BalanceSettings, balance, balance_result, collect_salience
from ptq4dit_ao.passes.edit import scale_of
from ptq4dit_ao.passes.insert import MARK
from ptq4dit_ao.passes.verify import relative_error
from ptq4dit_ao.testing.float64 import in_float64, wide
from ptq4dit_ao.testing.zoo import FAMILIES

C = 12


class Small(nn.Module):
    """A GELU, which no scale passes, before a linear; and a weight that two linears of different inputs share."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.tied, self.out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.nn.functional.gelu(self.fc1(x))
        h = torch.sigmoid(self.fc2(h))
        return (
            self.out(torch.tanh(self.tied(torch.sin(h))))
            + torch.tanh(self.tied(torch.sin(self.fc1(x))))
            + 0 * t[:, None]
        )


def small(dtype: torch.dtype = torch.float64) -> GraphModule:
    torch.manual_seed(0)
    model = Small().to(dtype).eval().requires_grad_(False)
    return export_transformer(model, (torch.randn(4, C, dtype=dtype), torch.arange(4).to(dtype)))


def samples(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1, 1, C, dtype=torch.float64)
    return [(torch.randn(4, C, generator=g, dtype=torch.float64) * spread, torch.arange(4).double()) for _ in range(3)]


ALL = SitePolicy(premultiply=True)


def names(sites: list[Site]) -> dict[str, list[str]]:
    return {site.name: [consumer.node for consumer in site.consumers] for site in sites}


def test_refused_linears_get_a_site_by_tensor_and_by_weight():
    graph = small()
    nodes = {node.name for node in linears(graph)}
    sites = premultiplied_sites(find_sites(graph), nodes)
    assert all(site.refusal is None for site in sites)
    assert {name: len(nodes) for name, nodes in names(sites).items()} == {"fc1": 2, "fc2": 1, "tied": 2, "out": 1}
    assert {site.kind for site in sites if site.name in ("fc2", "tied", "out")} == {"premultiply"}


def test_a_linear_that_may_not_be_balanced_keeps_others_of_its_weight_from_it():
    graph = small()
    tied = next(site for site in find_sites(graph) if site.name == "tied")
    allowed = {node.name for node in linears(graph)} - {tied.consumers[0].node}
    kinds = {site.name: site.kind for site in premultiplied_sites(find_sites(graph), allowed)}
    assert kinds["tied"] == "refused" and kinds["fc2"] == "premultiply"


def test_the_function_stays_in_float64_and_the_balanced_input_is_what_the_multiply_gives():
    graph = small()
    balanced = balance(graph, collect_salience(graph, samples(), policy=ALL), policy=ALL)
    x = samples(1)[0]
    assert relative_error([graph(*x)], [balanced(*x)]) < 1e-13
    outcomes = balance_result(balanced).outcomes
    multiplies = [node for node in balanced.graph.nodes if node.meta.get(MARK)]
    assert sorted(node.meta[MARK] for node in multiplies) == ["fc1", "fc2", "out", "tied", "tied"]
    for node in multiplies:
        b = scale_of(outcomes[node.meta[MARK]].b, outcomes[node.meta[MARK]].site.consumers[0].variables)
        assert float(b.max() / b.min()) > 1.1
        torch.testing.assert_close(getattr(balanced, node.args[1].target), 1 / b)


def test_without_the_policy_nothing_is_multiplied():
    graph = small()
    with pytest.raises(Exception, match="nothing in this graph can be balanced"):
        collect_salience(graph, samples())


@functools.cache
def family(name: str) -> tuple[GraphModule, list[tuple[Tensor, ...]]]:
    from ptq4dit_ao.capture.signature import flatten_call

    model = FAMILIES[name].model(dtype=torch.float64)
    batches = [
        tuple(flatten_call(model, FAMILIES[name].inputs(2, seed=s, dtype=torch.float64))[1].values()) for s in range(2)
    ]
    graph = export_transformer(model, FAMILIES[name].inputs(2, dtype=torch.float64))
    return in_float64(graph), [tuple(map(wide, batch)) for batch in batches]


@pytest.mark.parametrize("name", ["sd3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux", "wan", "sana"))])
def test_whole_families_stay_in_float64(name):
    graph, batches = family(name)
    settings = BalanceSettings(method="max")
    balanced = balance(graph, collect_salience(graph, batches, policy=ALL), settings, policy=ALL)
    kinds = [site.kind for site in balance_result(balanced).sites]
    assert "refused" not in kinds and kinds.count("premultiply") >= 3
    assert relative_error([graph(*batches[1])], [balanced(*batches[1])]) < 1e-12
