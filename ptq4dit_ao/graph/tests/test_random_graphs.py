"""Folding random scales at every site of random networks changes nothing, whatever the policy and the form."""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Collection, Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.interface import free_sizes, input_specs, shape_at
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.choices import AxisKind
from ptq4dit_ao.errors import BalanceError, ExportError
from ptq4dit_ao.graph import Site, SitePolicy, find_sites
from ptq4dit_ao.graph.tests.random_graphs import RandomNet, Step, inputs, programs
from ptq4dit_ao.passes import fold_balance, insert_balance

logger = logging.getLogger(__name__)

TOLERANCE = 1e-11
FOLDABLE, EXPORTED = 0.3, 0.9
"""Least shares of graphs with a site that folds, and of programs that make a graph."""
SIZED = 0.1
"""Least share of graphs with two free sizes or three; a quarter of the programs may have them."""

POLICIES = {
    "default": SitePolicy(),
    "any": SitePolicy(min_variables=1),
    "coupled": SitePolicy(min_variables=1, couple_blocks=True),
    "coupled, offline": SitePolicy(min_variables=1, couple_blocks=True, vector_multiply=False),
}

Scales = dict[str, Tensor]
"""First consumer -> b, (num_variables,)."""

Dynamic = Collection[AxisKind] | None
DYNAMIC: tuple[Dynamic, ...] = ((), (), ("batch",), None)
"""Sizes that the export leaves free, as often as each is tried; None for batch, tokens and text."""

DRAWN, TRIED = 20, 3
"""Sizes drawn at random, and those of them that a graph is tried at."""


def random_scales(sites: list[Site]) -> Scales:
    """b = exp(N(0, 1))."""
    generator = torch.Generator().manual_seed(1)
    return {
        site.consumers[0].node: torch.randn(site.num_variables, generator=generator, dtype=torch.float64).exp()
        for site in sites
        if site.refusal is None
    }


def fold(model: GraphModule, sites: list[Site], scales: Scales, form: str) -> None:
    """Fold every site; in the constant form where the other one says that it cannot."""
    for site in sites:
        if site.refusal is None:
            b = scales[site.consumers[0].node]
            insert_balance(model, site, b)
            try:
                fold_balance(model, site, b, form)
            except BalanceError:
                assert form == "bias"
                fold_balance(model, site, b)
    model.graph.lint()
    model.recompile()


def error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference relative to the largest value, over the outputs."""
    return max(
        float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
        for one, other in zip(got, expected, strict=True)
        if one.numel() or one.shape != other.shape
    )


def check(graph: GraphModule, sites: list[Site], form: str, samples: list[tuple[Tensor, ...]]) -> None:
    """Fold, compare, undo, compare the parameters."""
    expected = [graph(*sample) for sample in samples]
    model, scales = copy.deepcopy(graph), random_scales(sites)
    fold(model, sites, scales, form)
    assert max(error(model(*sample), one) for sample, one in zip(samples, expected, strict=True)) <= TOLERANCE
    if form == "constant":  # the other one subtracts, and undoes to the digits that are left
        fold(model, sites, {name: 1 / b for name, b in scales.items()}, form)
        assert max(error(model(*sample), one) for sample, one in zip(samples, expected, strict=True)) <= TOLERANCE
        tensors = dict(model.named_parameters())
        for name, value in graph.named_parameters():
            assert tensors[name].shape == value.shape
            torch.testing.assert_close(tensors[name], value, rtol=1e-13, atol=0)


def other_sizes(sizes: FreeSizes, seed: int) -> list[dict[str, int]]:
    """Some sizes that the graph takes, drawn from small ones; those of the example if none is free."""
    draw = random.Random(seed)
    drawn = [{name: draw.randint(1, 9) for name in sizes.names} for _ in range(DRAWN)]
    return [values for values in drawn if sizes.problem(values) is None][:TRIED] or [sizes.example]


def inputs_at(graph: GraphModule, values: Mapping[str, int]) -> tuple[Tensor, ...]:
    """The inputs at some sizes; a size that is not free may depend on them."""
    (batch, tokens, _), _, (_, text, _) = (shape_at(spec, values) for spec in input_specs(graph) or ())
    return inputs(batch, seed=1, tokens=tokens, text=text)


def run(program: list[Step], dynamic: Dynamic, counts: Counter[str]) -> None:
    """Check one program under all policies and forms, at sizes that it was not exported at; count what happened."""
    counts["programs"] += 1
    net = RandomNet(program)
    try:
        # The check fixes sizes that a layer depends on without a guard, such as indices into tokens.
        graph = export_transformer(net, inputs(2), check=dynamic is None, dynamic=dynamic)
    except ExportError:
        counts["not exported"] += 1
        return
    sizes = free_sizes(graph)
    counts[f"free sizes: {len(sizes.names)}"] += 1
    counts["sizes with conditions"] += bool(sizes.conditions)
    tried = other_sizes(sizes, counts["programs"])
    samples = [inputs_at(graph, values) for values in tried]
    for values, sample in zip(tried, samples, strict=True):
        assert error(tree_leaves(graph(*sample)), net(*sample)) <= TOLERANCE
        counts["other sizes"] += values != sizes.example
    seen: set[str] = set()
    for name, policy in POLICIES.items():
        sites = find_sites(graph, policy=policy)
        if (text := repr(sites)) not in seen:  # policies often agree
            seen.add(text)
            for form in ("constant", "bias") if any(site.scalars for site in sites) else ("constant",):
                check(graph, sites, form, samples)
        kinds = {site.kind for site in sites}
        counts[f"{name}: any site folds"] += bool(kinds - {"refused"})
        counts.update(f"{name}: {kind}" for kind in kinds)


def search(max_examples: int) -> Counter[str]:
    """Many random programs; shares are asserted so that it cannot prove nothing.

    An export with free sizes takes three times as long: most of this test.
    """
    counts: Counter[str] = Counter()

    @settings(max_examples=max_examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(programs(), st.sampled_from(DYNAMIC))
    def every_fold_is_exact(program: list[Step], dynamic: Dynamic) -> None:
        run(program, dynamic, counts)

    every_fold_is_exact()
    logger.info("%s", counts)
    assert counts["programs"] >= max_examples
    assert counts["not exported"] <= (1 - EXPORTED) * max_examples
    assert counts["free sizes: 2"] + counts["free sizes: 3"] >= SIZED * max_examples, counts
    assert counts["free sizes: 3"] > 0 and counts["other sizes"] >= max_examples, counts
    for name in POLICIES:
        assert counts[f"{name}: any site folds"] >= FOLDABLE * max_examples, counts
    return counts


def test_random_graphs_keep_their_function():
    search(30)


@pytest.mark.slow
def test_thousands_of_random_graphs_keep_their_function():
    counts = search(2000)
    for kind in ("offline", "partial", "vector multiply", "refused"):
        assert counts[f"any: {kind}"] > 20, counts
