"""Attention spelt out computes what it did, folds as it did, and is found; what is not attention is not."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph import find_sites
from ptq4dit_ao.graph.attention import FUSED, decompose_attention, find_attention
from ptq4dit_ao.graph.shapes import symbolic_axes
from ptq4dit_ao.testing.zoo import FAMILIES

H, L, S, E = 4, 5, 7, 6


class Attend(nn.Module):
    """q (N, H, L, E), k and v (N, heads, S, E), mask (N, 1, L, S)."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.proj, self.out, self.attend = nn.Linear(E, E), nn.Linear(E, E), attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.attend(self.proj(q), k, v, mask))


def inputs(rows: int, heads: int = H, *, boolean: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(rows, *s, E, generator=generator).double() for s in ((H, L), (heads, S), (heads, S)))
    mask = torch.rand(rows, 1, L, S, generator=generator) > 0.5
    mask[0, 0, 2] = False  # a query that sees no key
    bias = torch.randn(rows, 1, L, S, generator=generator).double()
    return q, k, v, mask if boolean else torch.where(mask, bias, -math.inf)


def exported(attend: Any, example: tuple[Tensor, ...]) -> GraphModule:
    torch.manual_seed(0)
    return export_transformer(Attend(attend).double().eval(), example, dynamic=("batch",))


def decomposed(graph: GraphModule) -> GraphModule:
    model = GraphModule(graph, copy.deepcopy(graph.graph))
    assert decompose_attention(model) == len(graph.graph.find_nodes(op="call_function", target=FUSED)) > 0
    assert not model.graph.find_nodes(op="call_function", target=FUSED)
    model.graph.lint()
    return model


def sdpa(**options: Any) -> Any:
    return lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, **options) + 0 * mask.any()


def masked(**options: Any) -> Any:
    return lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


@pytest.mark.parametrize(
    ("attend", "heads", "boolean"),
    [
        (sdpa(), H, True),
        (sdpa(scale=0.3), H, True),
        (sdpa(is_causal=True), H, True),
        (sdpa(enable_gqa=True), 1, True),
        (masked(), H, True),
        (masked(), H, False),
        (masked(enable_gqa=True, scale=2.0), 2, False),
    ],
    ids=["plain", "scale", "causal", "grouped", "boolean mask", "float mask", "all at once"],
)
@torch.no_grad()
def test_it_computes_what_the_fused_operation_does_at_any_batch(attend, heads, boolean):
    fused = exported(attend, inputs(2, heads, boolean=boolean))
    model = decomposed(fused)
    for rows in (2, 5):
        expected = fused(*inputs(rows, heads, boolean=boolean))
        assert expected.isfinite().all()
        assert (model(*inputs(rows, heads, boolean=boolean)) - expected).abs().max() <= 1e-14
    (attention,) = find_attention(model)
    for node in (attention.scores, attention.softmax, attention.mixed):
        assert symbolic_axes(node) == [0]
        assert node.meta["val"].shape[1:3] == (H, L)


def test_dropout_is_refused():
    graph = exported(sdpa(), inputs(2))
    (node,) = graph.graph.find_nodes(op="call_function", target=FUSED)
    node.kwargs = {"dropout_p": 0.5}
    with pytest.raises(ArgumentError, match=r"has dropout 0.5.*call model.eval\(\) before it is exported"):
        decompose_attention(graph)


def plain(value: Any) -> Any:
    """A site as numbers and names, to be compared; without the activations, of which there are more now."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "activations"}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    "name",
    ["facebook_dit", "pixart_sigma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd3", "flux", "lumina2"))],
)
def test_the_same_sites_fold_into_the_same_parameters(name):
    fused = export_transformer(FAMILIES[name].model(), FAMILIES[name].inputs(2))
    before, after = find_sites(fused), find_sites(decomposed(fused))
    assert any(site.refusal is None for site in before)
    assert plain(tuple(before)) == plain(tuple(after))


def test_a_site_knows_by_what_v_is_divided(tiny_exported):
    model = decomposed(tiny_exported)
    sites = {site.name: site for site in find_sites(model)}
    for block, attention in enumerate(find_attention(model)):
        site = sites[f"transformer_blocks.{block}.attn1.to_out.0"]
        assert {x.name: x.name in site.activations for x, _ in attention.operands.values()} == {
            x.name: name == "v" for name, (x, _) in attention.operands.items()
        }
        variables = site.activations[attention.operands["v"][0].name]
        assert variables.shape == (1, 2, 1, 16) and variables.ravel().tolist() == list(range(1, 33))


def unfused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~mask, -1e4)
    return F.dropout(scores.float().softmax(-1).to(v.dtype), 0.1, False).reshape(-1, L, S).bmm(v.reshape(-1, S, E))


def test_matmul_softmax_matmul_is_found():
    graph = exported(lambda *args: unfused(*args).view(-1, H, L, E), inputs(2))
    (attention,) = find_attention(graph)
    shapes = {name: x.meta["val"].shape[-2:] for name, (x, _) in attention.operands.items()}
    assert shapes == {"q": (L, E), "k": (E, S), "probabilities": (L, S), "v": (S, E)}


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v, mask: (q.softmax(-1) @ k.transpose(-2, -1)) @ v,
        lambda q, k, v, mask: (q @ k.transpose(-2, -1)).softmax(-2) @ v,
        lambda q, k, v, mask: (q @ k.transpose(-2, -1)).sigmoid() @ v,
    ],
    ids=["of queries alone", "over queries", "sigmoid"],
)
def test_what_is_not_attention_is_not_found(attend):
    assert find_attention(exported(attend, inputs(2))) == []


def test_it_is_called_as_its_module(tiny_exported):
    names = [attention.name for attention in find_attention(decomposed(tiny_exported))]
    assert names == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
