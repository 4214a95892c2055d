"""The self-check: exact folds pass, a wrong one is found among right ones, named and undone."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import BalanceError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.graph import Site, find_sites
from ptq4dit_ao.passes import SelfCheck, balance, balance_result, collect_salience, example_inputs
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer, plan

BLOCKS, WIDTH = 5, 16


class Net(nn.Module):
    """Blocks of an affine norm and a linear: one site each, named after the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(BLOCKS))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + t[:, None].to(x.dtype) / 1000
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


def sample(seed: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, WIDTH, generator=generator), torch.arange(batch) * 100


def make(dtype: torch.dtype = torch.float32) -> Net:
    """Every norm makes a salient channel, so that leaving it out of a fold shows."""
    with torch.no_grad():
        model = randomize_(Net(), 0)
        for norm in model.norms:
            norm.weight.add_(1)
            norm.weight[1] *= 30
    return model.to(dtype).eval()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def exported(request) -> GraphModule:
    x, t = sample(0)
    return export_transformer(make(request.param), (x.to(request.param), t))


def samples_for(exported: GraphModule) -> list[tuple[Tensor, Tensor]]:
    dtype = next(exported.parameters()).dtype
    return [(x.to(dtype), t) for x, t in (sample(1), sample(2))]


def spoiled(site: Site) -> Site:
    """A site whose edits forget half of the channels."""
    edits = []
    for edit in site.parameters:
        variables = edit.variables.copy()
        variables.reshape(-1)[: WIDTH // 2] = 0
        edits.append(dataclasses.replace(edit, variables=variables))
    return dataclasses.replace(site, parameters=tuple(edits))


@pytest.mark.parametrize("wrong", [(), (0,), (4,), (1, 3), (0, 1, 2, 3)])
def test_wrong_sites_are_named_and_undone_and_right_ones_stay(exported, wrong, caplog):
    samples = samples_for(exported)
    statistics = collect_salience(exported, samples)
    sites = [spoiled(site) if i in wrong else site for i, site in enumerate(find_sites(exported))]
    with caplog.at_level(logging.WARNING):
        balanced = balance(exported, statistics, sites=sites)

    result = balance_result(balanced)
    assert list(result.outcomes) == [f"linears.{i}" for i in range(BLOCKS) if i not in wrong]
    for i, site in enumerate(result.sites):
        assert (site.refusal is not None) == (i in wrong)
        assert i not in wrong or "self-check" in str(site.refusal)
    assert sorted({record.message.partition(":")[0] for record in caplog.records}) == [f"linears.{i}" for i in wrong]
    check = SelfCheck(exported, samples[0])
    assert check.error(balanced) <= check.tolerance


def test_without_the_check_a_wrong_site_stays(exported):
    samples = samples_for(exported)
    statistics = collect_salience(exported, samples)
    sites = [spoiled(site) for site in find_sites(exported)]
    balanced = balance(exported, statistics, sites=sites, verify=False)
    check = SelfCheck(exported, samples[0])
    assert check.error(balanced) > 10 * check.tolerance


def test_statistics_from_a_file_are_checked_on_made_up_inputs(exported, tmp_path):
    collect_salience(exported, samples_for(exported)).save(tmp_path / "s.safetensors")
    statistics = type(collect_salience(exported, samples_for(exported))).load(tmp_path / "s.safetensors")
    assert statistics.example is None
    sites = [spoiled(site) if i == 2 else site for i, site in enumerate(find_sites(exported))]
    assert "linears.2" not in balance_result(balance(exported, statistics, sites=sites)).outcomes


@pytest.mark.parametrize("verify", [True, False])
def test_convert_checks_too(monkeypatch, verify):
    exported = export_transformer(make(), sample(0))
    real = plan.balance_sites

    def sabotage(model, *args):
        outcomes = real(model, *args)
        weight = model.get_parameter("linears.1.weight")
        model.linears.get_submodule("1")._parameters["weight"] = nn.Parameter(weight * 2, requires_grad=False)
        return outcomes

    monkeypatch.setattr(plan, "balance_sites", sabotage)
    prepared = prepare_pt2e(exported, PTQ4DiTQuantizer(layers=(), verify=verify))
    for inputs in (sample(1), sample(2)):
        prepared(*inputs)
    result = balance_result(convert_pt2e(prepared))
    refused = [str(site.refusal) for site in result.sites if site.refusal is not None]
    assert len(refused) == (1 if verify else 0)
    assert all("the self-check found" in why for why in refused)
    assert len(result.outcomes) == BLOCKS - len(refused)


def test_a_model_that_is_not_the_same_twice_cannot_be_checked():
    class Random(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) * torch.rand_like(x)

    exported = export_transformer(Random().eval(), sample(0), check=False)
    statistics = collect_salience(exported, [sample(1), sample(2)])
    with pytest.raises(BalanceError, match="although no site is balanced; if it draws random"):
        balance(exported, statistics)


def test_what_is_undone_is_as_it_was(exported):
    samples = samples_for(exported)
    statistics = collect_salience(exported, samples)
    sites = [spoiled(site) if i != 2 else site for i, site in enumerate(find_sites(exported))]
    balanced = balance(exported, statistics, sites=sites)
    assert len(balanced.graph.nodes) == len(exported.graph.nodes)
    touched = {"norms.2.weight", "norms.2.bias", "linears.2.weight"}
    for name, parameter in exported.named_parameters():
        assert (balanced.get_parameter(name) is parameter) == (name not in touched)


def test_a_deep_copied_prepared_model_converts():
    prepared = prepare_pt2e(export_transformer(make(), sample(0)), PTQ4DiTQuantizer(layers=()))
    for inputs in (sample(1), sample(2)):
        prepared(*inputs)
    one, other = convert_pt2e(copy.deepcopy(prepared)), convert_pt2e(prepared)
    assert torch.equal(one(*sample(3)), other(*sample(3)))


def test_an_output_that_is_not_finite_cannot_be_checked(caplog):
    model = make()
    exported = export_transformer(model, sample(0))
    statistics = collect_salience(exported, [sample(1), sample(2)])
    statistics.example = (torch.full((4, WIDTH), torch.inf), sample(1)[1])
    with caplog.at_level(logging.WARNING):
        balanced = balance(exported, statistics)
    assert "was not checked" in caplog.text
    assert len(balance_result(balanced).outcomes) == BLOCKS


def test_made_up_inputs_have_the_graphs_shapes(exported):
    x, t = example_inputs(exported)
    assert x.shape == (2, WIDTH) and x.dtype == next(exported.parameters()).dtype
    assert t.dtype == torch.int64 and t.tolist() == [1, 1]
    assert exported(x, t).isfinite().all()


def test_an_output_that_turns_nan_counts_as_wrong():
    class Two(Net):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x, t)
            return y, y * 2

    exported = export_transformer(Two().eval(), sample(0))
    check = SelfCheck(exported, sample(0))
    assert check.error(exported) == 0
    check.expected[1][0, 0] = torch.nan
    assert check.error(exported) == torch.inf


def test_16_bits_with_a_region_without_autocast_are_checked():
    class Region(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                angle = (t[:, None].float() / 1000).to(x.dtype).sin()
            return super().forward(x + angle, t)

    x, t = sample(0)
    exported = export_transformer(Region().to(torch.bfloat16).eval(), (x.bfloat16(), t))
    samples = [(x.bfloat16(), t) for x, t in (sample(1), sample(2))]
    balanced = balance(exported, collect_salience(exported, samples))
    assert len(balance_result(balanced).outcomes) == BLOCKS
