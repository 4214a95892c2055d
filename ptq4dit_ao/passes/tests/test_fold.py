"""Folding on whole DiTs: the function stays, the graph stays, the neighbours stay, and refusals leave no trace."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.choices import FOLD_FORMS
from ptq4dit_ao.core.tests import reference
from ptq4dit_ao.errors import ArgumentError, BalanceError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.graph import Site, find_sites
from ptq4dit_ao.graph.names import get_attribute
from ptq4dit_ao.passes import fold_balance, insert_balance
from ptq4dit_ao.passes.insert import MARK
from ptq4dit_ao.testing.facebook_dit import DiT

WIDTH, HEADS, TOKENS = 16, 2, 16


def facebook(depth: int, *, fused: bool = True, bias: bool = True) -> nn.Module:
    return DiT(
        input_size=8,
        hidden_size=WIDTH,
        depth=depth,
        num_heads=HEADS,
        num_classes=10,
        fused_attention=fused,
        bias=bias,
    )


def diffusers(depth: int, *, fused: bool = True, bias: bool = True) -> nn.Module:
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        attention_bias=bias,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    if not fused:
        for block in model.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())
    return model


MODELS = {
    "facebook": lambda: facebook(1),
    "facebook, unfused, no bias": lambda: facebook(1, fused=False, bias=False),
    "facebook, unfused, 4 blocks": lambda: facebook(4, fused=False),
    "diffusers": lambda: diffusers(1),
    "diffusers, unfused, no bias": lambda: diffusers(1, fused=False, bias=False),
    "diffusers, 4 blocks": lambda: diffusers(4),
}
MODULATION_WITHOUT_BIAS = {name for name in MODELS if name.startswith("facebook") and "no bias" in name}


def sample(batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(0, 1000, (batch,), generator=generator),
        torch.randint(0, 10, (batch,), generator=generator),
    )


@cache
def model_of(name: str) -> nn.Module:
    return randomize_(MODELS[name]().double(), seed=0).eval()


@cache
def _exported(name: str) -> tuple[GraphModule, tuple[Site, ...]]:
    graph_module = export_transformer(model_of(name), sample(2))
    return graph_module, tuple(find_sites(graph_module))


def exported(name: str) -> tuple[GraphModule, list[Site]]:
    """A graph of one's own, and the sites that can be folded."""
    graph_module, sites = _exported(name)
    return copy.deepcopy(graph_module), foldable(sites)


def foldable(sites: tuple[Site, ...]) -> list[Site]:
    return [site for site in sites if site.refusal is None]


def random_b(sites: list[Site], limit: float = 1e3, seed: int = 0) -> dict[str, Tensor]:
    """Log-uniform in [1/limit, limit]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: limit ** (2 * torch.rand(site.num_variables, generator=generator, dtype=torch.float64) - 1)
        for site in sites
    }


def fold_all(model: GraphModule, sites: list[Site], b: dict[str, Tensor], form: str) -> GraphModule:
    for site in sites:
        insert_balance(model, site, b[site.name])
        fold_balance(model, site, b[site.name], form)
    model.graph.lint()
    model.recompile()
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def assert_same_function(model: GraphModule, name: str, limit: float = 1e-12) -> None:
    for inputs in (sample(2), sample(3, seed=1), sample(1, seed=2)):
        assert relative_error(model(*inputs), original_output(name, inputs)) <= limit


def original_output(name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    result = model_of(name)(*inputs)
    return result if isinstance(result, Tensor) else result.sample


# Sites

FACEBOOK_BLOCK = {"attn.qkv": WIDTH, "attn.proj": WIDTH, "mlp.fc1": WIDTH, "mlp.fc2": 0, "adaLN_modulation.1": 0}
DIFFUSERS_BLOCK = {
    "attn1.{to_q,to_k,to_v}": WIDTH,
    "attn1.to_out.0": WIDTH,
    "ff.net.0.proj": WIDTH,
    "ff.net.2": 0,
    "norm1.linear": 0,
    "norm1.emb.timestep_embedder.linear_2": 0,
}


def expected_sites(name: str) -> dict[str, int]:
    """Free variables per site; 0 is a refusal."""
    depth = 4 if "4 blocks" in name else 1
    if name.startswith("facebook"):
        blocks, stem, block = "blocks", {"t_embedder.mlp.0": 0, "t_embedder.mlp.2": 0}, FACEBOOK_BLOCK
        head = {"final_layer.linear": WIDTH, "final_layer.adaLN_modulation.1": 0}
    else:
        blocks, stem, block = "transformer_blocks", {}, dict(DIFFUSERS_BLOCK)
        head = {"proj_out_1": 0, "proj_out_2": WIDTH}
        if "unfused" in name:
            block["attn1.to_out.0"] = WIDTH // HEADS  # this processor puts the heads beside the batch
    inner = {f"{blocks}.{i}.{layer}": free for i in range(depth) for layer, free in block.items()}
    return stem | inner | head


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_qkv_attention_output_fc1_and_the_final_linear(name):
    _, sites = _exported(name)
    found = {site.name: site.num_variables for site in sites}
    expected = expected_sites(name)
    # Each block's timestep embedder reads the same sinusoids of a diffusers DiT.
    assert {k: v for k, v in found.items() if "timestep_embedder.linear_1" not in k} == expected
    assert all((site.refusal is None) == (site.num_variables > 0) for site in sites)


def test_refusals_say_where_and_why():
    why = {site.name: site.refusal for site in _exported("facebook")[1]}
    assert why["blocks.0.mlp.fc2"] == "gelu: gelu does not commute with a scale per channel"
    assert "silu" in why["blocks.0.adaLN_modulation.1"]


# The function


@pytest.mark.parametrize("name", MODELS)
def test_inserted_balancing_is_exact_by_itself(name):
    model, sites = exported(name)
    for site in sites:
        insert_balance(model, site, random_b(sites)[site.name])
    model.graph.lint()
    model.recompile()
    assert sum(MARK in node.meta for node in model.graph.nodes) == len(sites)
    assert_same_function(model, name)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "constant") for name in MODELS]
    + [(name, "bias") for name in MODELS if name not in MODULATION_WITHOUT_BIAS],
)
def test_fold_preserves_the_function(name, form):
    model, sites = exported(name)
    fold_all(model, sites, random_b(sites), form)
    assert_same_function(model, name)


@pytest.mark.parametrize("form", FOLD_FORMS)
def test_sites_fold_in_any_order(form):
    model, sites = exported("diffusers")
    b = random_b(sites)
    for site in sites:
        insert_balance(model, site, b[site.name])
    for site in (*sites[1::2], *sites[0::2]):
        fold_balance(model, site, b[site.name], form)
    model.recompile()
    assert_same_function(model, "diffusers")
    expected, _ = exported("diffusers")
    fold_all(expected, sites, b, form)
    for path, value in expected.named_parameters():
        torch.testing.assert_close(get_attribute(model, path), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FOLD_FORMS)
def test_the_consumers_really_read_divided_inputs(form):
    model, sites = exported("facebook")
    before = captured(model, {c.input for site in sites for c in site.consumers})
    b = random_b(sites)
    fold_all(model, sites, b, form)
    after = captured(model, before)
    for site in sites:
        for consumer in site.consumers:
            torch.testing.assert_close(
                after[consumer.input] * b[site.name], before[consumer.input], rtol=1e-11, atol=1e-13
            )


def captured(model: GraphModule, names, inputs: tuple[Tensor, ...] | None = None) -> dict[str, Tensor]:
    """What the named nodes compute."""
    seen: dict[str, Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node):
            result = super().run_node(n)
            if n.name in names:
                seen[n.name] = result.detach()
            return result

    with torch.no_grad():
        Recorder(model).run(*(sample(2) if inputs is None else inputs))
    return seen


def test_forgetting_the_bias_of_one_plus_scale_would_be_caught():
    (constant, sites), (naive, _) = exported("facebook"), exported("facebook")
    b = random_b(sites, limit=2)
    fold_all(constant, sites, b, "constant")
    fold_all(naive, sites, b, "bias")
    naive.load_state_dict(constant.state_dict(), strict=False)  # bias / b, in a graph that still adds 1
    with torch.no_grad():
        assert relative_error(naive(*sample(2)), original_output("facebook", sample(2))) > 1e-2


@pytest.mark.parametrize("name", ["facebook", "diffusers"])
def test_in_float32_the_fold_costs_no_precision(name):
    """Aggregated over draws: twice the error of the float32 model is allowed."""
    wide_model, _ = _exported(name)
    narrow = copy.deepcopy(model_of(name)).float()
    unfolded = export_transformer(narrow, sample(2, dtype=torch.float32))
    sites = find_sites(unfolded)
    folded_error, own_error = [], []
    for seed in range(8):
        latents, *rest = sample(4, seed=seed)
        folded = fold_all(copy.deepcopy(unfolded), foldable(sites), random_b(foldable(sites), seed=seed), "constant")
        with torch.no_grad():
            expected = wide_model(latents, *rest)
            own, after = unfolded(latents.float(), *rest), folded(latents.float(), *rest)
        assert after.dtype == torch.float32
        own_error.append(float((own - expected).square().mean()))
        folded_error.append(float((after - expected).square().mean()))
    assert np.sqrt(np.mean(folded_error)) <= 2 * np.sqrt(np.mean(own_error))


@pytest.mark.parametrize("form", FOLD_FORMS)
def test_folding_the_inverse_restores_every_parameter(form):
    model, sites = exported("diffusers")
    before = dict(model.named_parameters())
    b = random_b(sites)
    fold_all(model, sites, b, form)
    changed = [path for path, value in before.items() if not torch.equal(get_attribute(model, path), value)]
    assert len(changed) > 10
    fold_all(model, sites, {name: 1 / value for name, value in b.items()}, form)
    for path, value in before.items():
        torch.testing.assert_close(get_attribute(model, path), value, rtol=1e-12, atol=1e-12)
    for path, value in model.named_buffers():
        if path.startswith("_ptq4dit_"):
            torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-12, atol=0)
    assert_same_function(model, "diffusers")


@pytest.mark.parametrize("form", FOLD_FORMS)
def test_two_folds_are_one_fold_of_the_product(form):
    twice, sites = exported("facebook")
    first, second = random_b(sites, limit=30), random_b(sites, limit=30, seed=1)
    fold_all(fold_all(twice, sites, first, form), sites, second, form)
    once, _ = exported("facebook")
    fold_all(once, sites, {name: first[name] * second[name] for name in first}, form)
    for path, value in once.named_parameters():
        torch.testing.assert_close(get_attribute(twice, path), value, rtol=1e-11, atol=1e-11)
    assert_same_function(twice, "facebook")


# The graph


def operations(model: GraphModule) -> Counter:
    return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("form", FOLD_FORMS)
@pytest.mark.parametrize("name", ["facebook, unfused, 4 blocks", "diffusers, 4 blocks"])
def test_the_folded_graph_has_the_operations_it_had(name, form):
    model, sites = exported(name)
    before, nodes = operations(model), len(model.graph.nodes)
    fold_all(model, sites, random_b(sites), form)
    assert operations(model) == before
    assert not any(MARK in node.meta for node in model.graph.nodes)
    added = [node for node in model.graph.nodes if node.op == "get_attr" and "_ptq4dit_" in str(node.target)]
    assert len(model.graph.nodes) == nodes + len(added)
    assert len(added) == (sum(len(site.scalars) for site in sites) if form == "constant" else 0)
    assert {path for path, _ in model.named_buffers() if "_ptq4dit_" in path} == {str(node.target) for node in added}
    assert all("val" in node.meta for node in added)


@pytest.mark.parametrize("form", FOLD_FORMS)
def test_neighbours_are_untouched(form):
    model, sites = exported("facebook, unfused, 4 blocks")
    site = next(site for site in sites if site.name == "blocks.2.mlp.fc1")
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {path: value.clone() for path, value in before.items()}
    fold_all(model, [site], random_b([site]), form)
    changed = {path for path, value in before.items() if get_attribute(model, path) is not value}
    adaln = {"blocks.2.adaLN_modulation.1.weight", "blocks.2.adaLN_modulation.1.bias"}
    assert changed == {"blocks.2.mlp.fc1.weight", *adaln}
    assert all(torch.equal(value, values[path]) for path, value in before.items())  # replaced, never written into
    rows = get_attribute(model, "blocks.2.adaLN_modulation.1.weight").reshape(6, WIDTH, WIDTH)
    same = [
        torch.equal(rows[i], values["blocks.2.adaLN_modulation.1.weight"].reshape(6, WIDTH, WIDTH)[i]) for i in range(6)
    ]
    assert same == [True, True, True, False, False, True]


@pytest.mark.parametrize("form", FOLD_FORMS)
def test_a_fold_by_one_changes_no_number(form):
    model, sites = exported("facebook")
    before = {path: value.clone() for path, value in model.named_parameters()}
    fold_all(model, sites, {site.name: torch.ones(site.num_variables).double() for site in sites}, form)
    assert all(torch.equal(get_attribute(model, path), value) for path, value in before.items())


# The paper's algebra


def block_weights(parameters: dict[str, Tensor]) -> reference.BlockWeights:
    p = {path.removeprefix("blocks.0."): value.detach().numpy() for path, value in parameters.items()}
    (wq, wk, wv), (bq, bk, bv) = (np.split(p[f"attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
    return reference.BlockWeights(
        adaln_weight=p["adaLN_modulation.1.weight"],
        adaln_bias=p["adaLN_modulation.1.bias"],
        q_weight=wq,
        q_bias=bq,
        k_weight=wk,
        k_bias=bk,
        v_weight=wv,
        v_bias=bv,
        proj_weight=p["attn.proj.weight"],
        proj_bias=p["attn.proj.bias"],
        fc1_weight=p["mlp.fc1.weight"],
        fc1_bias=p["mlp.fc1.bias"],
        fc2_weight=p["mlp.fc2.weight"],
        fc2_bias=p["mlp.fc2.bias"],
    )


def test_the_bias_form_is_the_reference_fold_of_a_block():
    model, sites = exported("facebook")
    before = block_weights(dict(model.named_parameters()))
    b = random_b(sites)
    fold_all(model, sites, b, "bias")
    expected = reference.dit_block_fold(
        before,
        b_qkv=b["blocks.0.attn.qkv"].numpy(),
        b_proj=b["blocks.0.attn.proj"].numpy(),
        b_fc1=b["blocks.0.mlp.fc1"].numpy(),
    )
    actual = block_weights(dict(model.named_parameters()))
    for field in vars(expected):
        np.testing.assert_allclose(getattr(actual, field), getattr(expected, field), rtol=1e-12, atol=1e-14)


def test_the_constant_form_differs_from_the_bias_form_in_one_constant_only():
    (constant, sites), (bias, _) = exported("facebook"), exported("facebook")
    b = random_b(sites)
    fold_all(constant, sites, b, "constant")
    fold_all(bias, sites, b, "bias")
    differing = {
        path for path, value in constant.named_parameters() if not torch.equal(value, get_attribute(bias, path))
    }
    assert differing == {"blocks.0.adaLN_modulation.1.bias", "final_layer.adaLN_modulation.1.bias"}
    (name,) = [site.name for site in sites if site.name == "blocks.0.attn.qkv"]
    constants = [value.flatten() for path, value in constant.named_buffers() if "_ptq4dit_" in path]
    assert any(torch.allclose(value, 1 / b[name]) for value in constants)


# 16 bits


class Modulation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64, elementwise_affine=False)
        self.scale, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.out(self.norm(x) * (1 + self.scale(c)).unsqueeze(1))


@cache
def modulation(dtype: torch.dtype) -> tuple[nn.Module, GraphModule]:
    """In float64, and as a graph in ``dtype``."""
    net = randomize_(Modulation().double(), seed=0).eval()
    inputs = torch.zeros(2, 4, 64, dtype=dtype), torch.zeros(2, 64, dtype=dtype)
    return net, export_transformer(copy.deepcopy(net).to(dtype), inputs)


def one_plus_scale_error(dtype: torch.dtype, limit: float, form: str | None) -> float:
    """Largest relative error of ``1 + scale``, times b, over several draws of b; no ``form`` does not fold."""
    net, graph = modulation(dtype)
    (site,) = foldable(find_sites(graph))
    (add,) = [scalar.node for scalar in site.scalars]
    errors = []
    for seed in range(8):
        model = copy.deepcopy(graph)
        b = random_b([site], limit, seed)
        if form is not None:
            fold_all(model, [site], b, form)
        c = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        expected = 1 + net.scale(c.double()).detach()
        actual = captured(model, {add}, (torch.zeros(8, 4, 64, dtype=dtype), c))[add].double()
        if form is not None:
            actual = actual * b[site.name]
        keep = expected.abs() > 0.5  # a sum that cancels by itself says nothing about the fold
        errors.append(float(((actual - expected).abs() / expected.abs())[keep].max()))
    return max(errors)


def test_in_bfloat16_the_constant_form_keeps_the_digits_that_the_bias_form_loses():
    unfolded = one_plus_scale_error(torch.bfloat16, 1.0, None)
    constant, bias = (one_plus_scale_error(torch.bfloat16, 100.0, form) for form in FOLD_FORMS)
    assert constant <= 2.5 * unfolded
    assert bias >= 10 * constant


def test_near_one_both_forms_are_alike_in_bfloat16():
    unfolded = one_plus_scale_error(torch.bfloat16, 1.0, None)
    for form in FOLD_FORMS:
        assert one_plus_scale_error(torch.bfloat16, 1.5, form) <= 2.5 * unfolded


# Refusals


def test_a_refused_site_is_not_folded():
    model, _ = exported("facebook")
    (site,) = [site for site in _exported("facebook")[1] if site.name == "blocks.0.mlp.fc2"]
    with pytest.raises(BalanceError, match=r"blocks\.0\.mlp\.fc2 cannot be folded: gelu"):
        fold_balance(model, site, torch.ones(0))


def test_the_bias_form_needs_a_bias():
    model, sites = exported("facebook, unfused, no bias")
    b = random_b(sites)
    with pytest.raises(
        BalanceError,
        match=r"blocks\.0\.adaLN_modulation\.1\.weight has no bias to fold into; use fold_form 'constant'",
    ):
        fold_all(model, sites, b, "bias")


def test_the_bias_form_does_not_follow_the_constant_form():
    model, sites = exported("facebook")
    b = random_b(sites)
    fold_all(model, sites, b, "constant")
    with pytest.raises(BalanceError, match="use fold_form 'constant'"):
        fold_all(model, sites, b, "bias")


def test_a_bias_form_that_is_refused_leaves_the_model_as_it_was():
    model, sites = exported("facebook, unfused, no bias")
    b = random_b(sites)
    insert_balance(model, sites[0], b[sites[0].name])
    with pytest.raises(BalanceError, match="no bias"):
        fold_balance(model, sites[0], b[sites[0].name], "bias")
    fold_balance(model, sites[0], b[sites[0].name], "constant")
    model.recompile()
    assert_same_function(model, "facebook, unfused, no bias")


# Modulation in other forms


class Any(nn.Module):
    """Two modulation linears and two consumers; ``body`` says how they are used."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.scale, self.other, self.out, self.out2 = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.both = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return self.body(self, x, c, d)


def modulate(m: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return m.norm(x) * scale.unsqueeze(1) + shift.unsqueeze(1)


def halves(f):
    """Modulation by the two halves of ``f(both(c))``."""

    def body(m: Any, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        shift, scale = f(m.both(c + d)).chunk(2, dim=-1)
        return m.out(modulate(m, x, 1 + scale, shift))

    return body


BODIES = {
    "one minus": lambda m, x, c, d: m.out(modulate(m, x, 1 + m.scale(-c), m.other(d))),
    "scale minus a number": lambda m, x, c, d: m.out(modulate(m, x, m.scale(c) - 1, m.other(d))),
    "a number of its own weight": lambda m, x, c, d: m.out(
        modulate(m, x, torch.add(m.scale(c), 1, alpha=3), m.other(d))
    ),
    "another number": lambda m, x, c, d: m.out(modulate(m, x, m.scale(c) + 0.25, m.other(d))),
    "two numbers": lambda m, x, c, d: m.out(modulate(m, x, m.scale(c) + 1 + 2, m.other(d))),
    "one modulation layer called twice": lambda m, x, c, d: m.out(
        modulate(m, x, 1 + m.scale(c), m.other(d)) + modulate(m, x.flip(1), 1 + m.scale(d), m.other(c))
    ),
    "one layer for scale and shift": lambda m, x, c, d: m.out(modulate(m, x, 1 + m.scale(c), m.scale(d))),
    "one scale read twice": lambda m, x, c, d: m.out(modulate(m, x, 1 + (s := m.scale(c)), s + m.other(d))),
    "a cast": halves(lambda h: h.to(torch.float64).clone()),
    "through float32": halves(lambda h: h.to(torch.float32).to(torch.float64)),
    "a cast to another's type": halves(lambda h: h.type_as(h.detach())),
    "a view over the batch": halves(lambda h: h.view(-1, WIDTH).view(-1, 2 * WIDTH)),
    "a permutation": halves(lambda h: h.unflatten(1, (2, WIDTH)).transpose(1, 2).flatten(1)),
    "a slice of a slice": halves(lambda h: h.unsqueeze(1)[:, :, : 2 * WIDTH].squeeze(1)),
}


@cache
def exported_body(name: str) -> tuple[nn.Module, tuple[Tensor, ...], GraphModule]:
    net = randomize_(Any(BODIES[name]).double(), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    inputs = tuple(
        torch.randn(3, *shape, generator=generator).double() for shape in ((TOKENS, WIDTH), (WIDTH,), (WIDTH,))
    )
    return net, inputs, export_transformer(net, inputs)


@pytest.mark.parametrize("form", FOLD_FORMS)
@pytest.mark.parametrize("name", BODIES)
def test_any_modulation_is_folded_exactly_or_refused(name, form):
    """The bias form may decline what it cannot follow, by an error that names the way out."""
    net, inputs, graph = exported_body(name)
    model = copy.deepcopy(graph)
    sites = foldable(find_sites(model))
    assert sites
    try:
        fold_all(model, sites, random_b(sites, limit=100), form)
    except BalanceError as error:
        assert form == "bias"
        assert "use fold_form 'constant'" in str(error)
        return
    assert relative_error(model(*inputs), net(*inputs)) <= (1e-4 if name == "through float32" else 1e-12)


# Names of the constants


class Shared(nn.Module):
    """One MLP on two streams, and a linear of its own on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.first, self.mlp, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        z = [1 + layer(c).unsqueeze(1) for layer in self.modulation]
        x = x + self.first(self.norm(x) * z[0]).tanh()
        x = x + self.mlp(self.norm(x) * z[1]).tanh() + self.mlp(self.norm(x.flip(1)) * z[2]).tanh()
        return self.last(self.norm(x) * z[3])


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_a_site_with_two_inputs_and_its_neighbours_keep_their_constants(order):
    net = randomize_(Shared().double(), seed=0).eval()
    inputs = (torch.randn(2, TOKENS, WIDTH).double(), torch.randn(2, WIDTH).double())
    model = export_transformer(net, inputs)
    sites = foldable(find_sites(model))
    assert [(site.name, len(site.inputs)) for site in sites] == [("first", 1), ("mlp", 2), ("last", 1)]
    fold_all(model, sites[::order], random_b(sites), "constant")
    assert relative_error(model(*inputs), net(*inputs)) <= 1e-12


def test_inserting_after_a_fold_leaves_other_inserted_sites_alone():
    model, sites = exported("facebook")
    b = random_b(sites)
    proj, *others = sorted(sites, key=lambda site: site.name != "blocks.0.attn.proj")
    insert_balance(model, proj, b[proj.name])
    insert_balance(model, others[0], b[others[0].name])
    fold_balance(model, proj, b[proj.name])
    insert_balance(model, others[1], b[others[1].name])
    model.recompile()
    assert_same_function(model, "facebook")
    for site in others[:2]:
        fold_balance(model, site, b[site.name])
    model.recompile()
    assert_same_function(model, "facebook")


def test_an_unknown_form_is_refused_before_anything_is_touched():
    model, sites = exported("facebook")
    with pytest.raises(ArgumentError, match="fold form is 'constants'; choose one of constant, bias"):
        fold_balance(model, sites[0], random_b(sites)[sites[0].name], "constants")
    model.recompile()
    assert_same_function(model, "facebook")
