"""What stands inside ``no_grad`` and switched-off autocast is part of the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.regions import higher_order
from ptq4dit_ao.graph import find_sites
from ptq4dit_ao.graph.names import linears

REGIONS = (higher_order.wrap_with_autocast, higher_order.wrap_with_set_grad_enabled)


class Guarded(nn.Module):
    """A norm, and two linears inside regions, one in the other; the inner one knows a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(x)
        with torch.no_grad():
            h = self.first(h)
            with torch.autocast("cpu", enabled=False):
                low, high = (self.last(nn.functional.relu(h)) * torch.tensor(2.0)).chunk(2, -1)
        return torch.cat([high, low], -1) + t[:, None]


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.first(x).float() + t[:, None]


def calls(graph) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def test_regions_are_written_out():
    torch.manual_seed(0)
    model, x, t = Guarded().eval(), torch.randn(3, 8), torch.rand(3)
    graph = export_transformer(model, (x, t))
    assert not set(calls(graph)) & set(REGIONS)
    assert torch.equal(graph(x[:2], t[:2]), model(x[:2], t[:2]))
    assert len(linears(graph)) == 2
    assert [site.refusal for site in find_sites(graph)] == [None, None]


def test_autocast_that_is_on_stays():
    model, x, t = Narrow().eval(), torch.randn(3, 8), torch.rand(3)
    graph = export_transformer(model, (x, t))
    assert calls(graph).count(higher_order.wrap_with_autocast) == 1
    assert torch.equal(graph(x, t), model(x, t))
