"""Offsets of a site's input: the function stays, the input is shifted, and where no shift is added they are refused."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.graph import Site, find_sites
from ptq4dit_ao.passes import fold_balance, insert_balance
from ptq4dit_ao.passes.offset import find_shifts, subtract_offset
from ptq4dit_ao.testing.facebook_dit import DiT
from ptq4dit_ao.testing.float64 import in_float64, wide
from ptq4dit_ao.testing.zoo import FAMILIES

WIDTH = 8
Inputs = tuple[Tensor, ...]


class Block(nn.Module):
    """A norm of some kind, and two linears, of which the second has no bias."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.tokens = nn.Parameter(torch.zeros(5, WIDTH))
        self.plain = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.body = body

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.body(self, x, c)


def read(m: Any, z: Tensor) -> Tensor:
    return m.to_q(z) * m.to_k(z)


def modulated(m: Any, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = m.modulation(c)[:, None].chunk(2, dim=-1)
    return m.plain(x) * (1 + scale) + shift


BODIES = {
    "affine norm": lambda m, x, c: read(m, m.norm(x)),
    "shift last": lambda m, x, c: read(m, modulated(m, x, c)),
    "shift first": lambda m, x, c: read(m, m.modulation(c)[:, None, :WIDTH].clone() + m.plain(x)),
    "cast and turned": lambda m, x, c: read(m, modulated(m, x, c).to(c.dtype).transpose(1, 2).contiguous().mT),
}
REFUSED = {
    "scale only": (
        lambda m, x, c: read(m, m.plain(x) * m.modulation(c)[:, None, :WIDTH]),
        "no shift is added here (mul)",
    ),
    "two inputs": (
        lambda m, x, c: m.to_q(z := modulated(m, x, c)) * m.to_k(z.relu()),
        "2 tensors share one scale, and need offsets of their own",
    ),
    "shift for each token": (
        lambda m, x, c: read(m, m.plain(x) + m.modulation(x)[..., :WIDTH].flip(1) + m.tokens),
        "tokens: it is not one shift for each channel",
    ),
    "shift used twice": (
        lambda m, x, c: read(m, modulated(m, x, c)) + m.modulation(c)[:, None, :WIDTH] * c[:, None],
        "reads it, too",
    ),
}
"""Body, and why it has no offset; what cannot be scaled either is no site."""


def diffusers_dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, attention_bias=True,
        sample_size=8, num_embeds_ada_norm=1000,
    )  # fmt: skip


def facebook_dit() -> nn.Module:
    return DiT(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=10, bias=False)


DITS = {"diffusers": diffusers_dit, "facebook, no bias": facebook_dit}


@cache
def exported(name: str) -> tuple[GraphModule, Inputs]:
    """A graph in float64, not to be changed, and inputs."""
    g = torch.Generator().manual_seed(0)
    if name in FAMILIES:
        family = FAMILIES[name]
        inputs = tuple(wide(x) for x in flatten_call(family.model(), family.inputs(3, seed=1))[1].values())
        return in_float64(export_transformer(family.model(), family.inputs(2))), inputs
    if name in DITS:
        model = randomize_(DITS[name]().double(), seed=0).eval()
        inputs = (
            torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64),
            torch.arange(3) * 300,
            torch.arange(3),
        )
    else:
        body = BODIES[name] if name in BODIES else REFUSED[name][0]
        model = randomize_(Block(body).double(), seed=0).eval()
        inputs = tuple(torch.randn(3, *s, generator=g, dtype=torch.float64) for s in ((5, WIDTH), (WIDTH,)))
    return export_transformer(model, inputs), inputs


def shifted_sites(name: str) -> tuple[GraphModule, list[Site], list[Site]]:
    """A graph of one's own; its sites with a shift, and those without."""
    graph, _ = exported(name)
    sites = find_shifts(graph, [site for site in find_sites(graph) if site.refusal is None])
    return copy.deepcopy(graph), [s for s in sites if s.refusal is None], [s for s in sites if s.refusal is not None]


def offset_of(site: Site, seed: int = 0) -> Tensor:
    return 10 * torch.randn(site.channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(graph: GraphModule, inputs: Inputs, *watched: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and what some nodes compute."""
    seen: dict[str, Tensor] = {}

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n.name in watched:
                seen[n.name] = value
            return value

    with torch.no_grad():
        output = Watch(graph).run(*inputs)
    return output if isinstance(output, Tensor) else output[0], seen


def assert_close(one: Tensor, other: Tensor) -> None:
    assert float((one - other).abs().max() / other.abs().max()) < 1e-12


@pytest.mark.parametrize("name", [*BODIES, *DITS, "pixart_sigma"])
def test_the_function_stays_and_the_input_is_shifted(name):
    graph, sites, _ = shifted_sites(name)
    inputs = exported(name)[1]
    read = [site.consumers[0].input for site in sites]
    expected, before = run(graph, inputs, *read)
    for site in sites:
        subtract_offset(graph, site, offset_of(site))
    graph.graph.lint()
    graph.recompile()
    output, after = run(graph, inputs, *read)
    assert_close(output, expected)
    for site, node in zip(sites, read, strict=True):
        torch.testing.assert_close(after[node] + offset_of(site), before[node], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["constant", "bias"])
@pytest.mark.parametrize("name", ["affine norm", "shift last", "diffusers"])
def test_offset_and_balance_make_repqs_input(name, form):
    graph, sites, _ = shifted_sites(name)
    inputs = exported(name)[1]
    read = [site.consumers[0].input for site in sites]
    expected, before = run(graph, inputs, *read)
    b = {s.name: torch.logspace(-2, 2, s.num_variables, dtype=torch.float64) for s in sites}
    for site in reversed(sites):
        subtract_offset(graph, site, offset_of(site) * b[site.name])
        insert_balance(graph, site, b[site.name])
        fold_balance(graph, site, b[site.name], form)
    graph.recompile()
    output, after = run(graph, inputs, *read)
    assert_close(output, expected)
    for site, node in zip(sites, read, strict=True):
        x = before[node] / b[site.name] - offset_of(site)
        torch.testing.assert_close(after[node], x, rtol=1e-9, atol=1e-9)


def test_a_dits_shifts_are_the_rows_of_its_modulation():
    _, sites, left = shifted_sites("diffusers")
    found = {site.name: (site.shift.paths, site.shift.elements.tolist()) for site in sites if site.shift is not None}
    for i in range(2):
        block, path = f"transformer_blocks.{i}", (f"transformer_blocks.{i}.norm1.linear.bias",)
        assert found.pop(f"{block}.attn1.{{to_q,to_k,to_v}}") == (path, list(range(16)))  # shift_msa
        assert found.pop(f"{block}.ff.net.0.proj") == (path, list(range(48, 64)))  # shift_mlp
    assert list(found) == ["proj_out_2"]
    assert [(s.name, s.refusal) for s in left] == [
        (
            f"transformer_blocks.{i}.attn1.to_out.0",
            f"scaled_dot_product_attention{f'_{i}' * (i > 0)}: no shift is added here (scaled_dot_product_attention)",
        )
        for i in range(2)
    ]


def test_a_table_is_a_shift_too():
    _, sites, _ = shifted_sites("pixart_sigma")
    paths = {path for site in sites if site.shift is not None for path in site.shift.paths}
    assert {"scale_shift_table", *(f"transformer_blocks.{i}.scale_shift_table" for i in range(2))} == paths


def test_neighbours_are_untouched():
    graph, (site, *_), _ = shifted_sites("diffusers")
    before = dict(graph.named_parameters())
    subtract_offset(graph, site, offset_of(site))
    changed = {path for path, tensor in graph.named_parameters() if not torch.equal(tensor, before[path])}
    assert changed == {
        "transformer_blocks.0.norm1.linear.bias",
        *(f"transformer_blocks.0.attn1.to_{x}.bias" for x in "qkv"),
    }
    same = (
        graph.get_parameter("transformer_blocks.0.norm1.linear.bias")
        == before["transformer_blocks.0.norm1.linear.bias"]
    )
    assert same[16:].all() and not same[:16].any()


@pytest.mark.parametrize("name", REFUSED)
def test_where_no_shift_is_added_there_is_no_offset(name):
    _, sites, left = shifted_sites(name)
    assert not sites
    (site,) = left
    assert site.refusal is not None and site.refusal.endswith(REFUSED[name][1])


def test_a_reader_that_would_not_undo_it_refuses():
    graph, _ = exported("shift last")
    graph = copy.deepcopy(graph)
    (site,) = [site for site in find_sites(graph) if site.refusal is None]
    source = next(node for node in graph.graph.nodes if node.name == site.consumers[0].input)
    with graph.graph.inserting_after(source):
        graph.graph.call_function(torch.ops.aten.gelu.default, (source,))
    (site,) = find_shifts(graph, [site])
    assert site.refusal == "gelu_default: it reads the input, too, and would have to undo the offset"
