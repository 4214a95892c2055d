"""Weights of 4 bits that expand to 8: what is allowed, what is nearest, and that packing loses nothing."""

from __future__ import annotations

import pytest
import torch

from ptq4dit_ao.core.expansion import LARGEST, NORMAL, Codebook, Expansion, Interval, fit_codebooks
from ptq4dit_ao.core.gptq import gptq_and_codebook
from ptq4dit_ao.errors import ArgumentError, ArtifactError

RULES = [Expansion(), Expansion(group=32), Expansion(group=16)]
by_rule = pytest.mark.parametrize("rule", RULES, ids=Expansion.to_text)


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[0, : columns // 2] = 0  # a group without a range
    weight[1] = weight[1].abs()  # one-sided
    return weight


def allowed(codebook: Codebook) -> torch.Tensor:
    """The 16 integers of every group, (C_out, G, 16), written down from the definition."""
    half = torch.tensor(NORMAL)
    return (codebook.step.unsqueeze(2) / 15 * torch.cat([-half.flip(0), half]) / half[-1] * LARGEST).round()


def of_weights(groups: torch.Tensor, rule: Expansion, columns: int) -> torch.Tensor:
    width = columns if rule.group is None else rule.group
    return torch.stack([groups[:, j // width] for j in range(columns)], 1)


@by_rule
@pytest.mark.parametrize("columns", [64, 40, 19])
def test_integers_are_those_of_their_group_and_fit_eight_bits(rule, columns):
    weight = weight_of(6, columns)
    for scale, codebook in fit_codebooks(weight, torch.ones(columns), rule):
        table = of_weights(allowed(codebook), rule, columns)
        assert table.abs().max() <= LARGEST
        positions = weight / scale.unsqueeze(1)
        found = codebook.nearest(positions)
        assert (found.unsqueeze(2) == table).any(2).all()
        nearest = (table - positions.unsqueeze(2)).abs().amin(2)
        # Levels are rounded to integers, so the next one by the exact levels may be an integer further away.
        assert ((found - positions).abs() <= nearest + 1.01).all()
        low, high = (end.expand_as(weight) for end in codebook.ends())
        assert torch.equal(low, table.amin(2)) and torch.equal(high, table.amax(2))
        below, above = codebook.neighbours(positions.clamp(low, high))
        assert ((below <= positions.clamp(low, high) + 1e-4) & (positions.clamp(low, high) <= above + 1e-4)).all()
        assert torch.equal(torch.stack([codebook.column(j, positions[:, j]) for j in range(columns)], 1), found)


@by_rule
@pytest.mark.parametrize("columns", [64, 40, 19])
def test_packing_loses_nothing_and_takes_what_it_says(rule, columns):
    weight = weight_of(6, columns)
    for scale, codebook in fit_codebooks(weight, torch.ones(columns), rule):
        integers = codebook.nearest(weight / scale.unsqueeze(1)).to(torch.int8)
        packed = rule.pack(integers)
        assert packed.dtype == torch.uint8 and packed.shape == (rule.packed_length((6, columns)),)
        assert torch.equal(rule.unpack(packed, (6, columns)), integers)
    assert Expansion.from_text(rule.to_text()) == rule


def test_all_steps_are_packed_exactly():
    rule = Expansion(group=16)
    step = torch.arange(1.0, 16.0).unsqueeze(1)
    integers = allowed(Codebook(expansion=rule, step=step, channels=16)).squeeze(1).to(torch.int8)
    assert torch.equal(rule.unpack(rule.pack(integers), tuple(integers.shape)), integers)


def test_bits_of_a_weight():
    assert Expansion(group=16).bits_per_weight(1152, 1152) == pytest.approx(4 + 4 / 16 + 32 / 1152)
    assert Expansion().bits_per_weight(1152, 1152) == pytest.approx(4 + 32 / 1152)


def test_levels_suit_normally_distributed_weights():
    """The error of 16 normal levels is 1.15 % of the variance (Max 1960, table I); that of equal ones 1.154 %."""
    weight = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))
    errors = []
    for scale, codebook in fit_codebooks(weight, torch.ones(4096), Expansion()):
        errors.append((codebook.nearest(weight / scale.unsqueeze(1)) * scale.unsqueeze(1) - weight).square().mean(1))
    assert float(torch.stack(errors).amin(0).mean()) == pytest.approx(0.00950, rel=0.05)


def test_groups_follow_the_sizes_of_their_weights():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[:, :32] /= 8
    errors = []
    for rule in (Expansion(group=32), Expansion()):
        (scale, codebook), *_ = fit_codebooks(weight, torch.ones(64), rule, several=False)
        rounded = codebook.nearest(weight / scale.unsqueeze(1)) * scale.unsqueeze(1)
        errors.append(float((rounded - weight)[:, :32].square().mean()))
    assert errors[0] < errors[1] / 10


@by_rule
def test_gptq_loses_less_than_the_nearest_integers(rule):
    generator = torch.Generator().manual_seed(1)
    weight, mixing = weight_of(8, 64), torch.randn(64, 64, generator=generator) / 8
    moment = mixing @ mixing.T + 0.01 * torch.eye(64)
    candidates = list(fit_codebooks(weight, moment.diagonal(), rule))
    integers, scale, codebook = gptq_and_codebook(weight, candidates, moment)
    assert torch.equal(rule.unpack(rule.pack(integers), (8, 64)), integers)
    assert (integers.unsqueeze(2) == of_weights(allowed(codebook), rule, 64)).any(2).all()

    def error(integers: torch.Tensor, scale: torch.Tensor) -> float:
        change = integers * scale.unsqueeze(1) - weight
        return float((change @ moment * change).sum())

    plain = min(error(c.nearest(weight / s.unsqueeze(1)), s) for s, c in candidates)
    assert error(integers, scale) < 0.8 * plain


def test_an_interval_is_every_integer():
    interval, positions = Interval(low=-8, high=7), torch.tensor([-9.4, -0.4, 2.5, 8.2])
    assert interval.nearest(positions).tolist() == [-8, 0, 2, 7]
    assert [float(end) for end in interval.ends()] == [-8, 7]
    assert [part.tolist() for part in interval.neighbours(positions)] == [[-10, -1, 2, 8], [-9, 0, 3, 9]]


@pytest.mark.parametrize("group", [8, 32.0, True])
def test_groups_that_cannot_be(group):
    with pytest.raises(ArgumentError, match=f"group is {group}"):
        Expansion(group=group)


def test_what_cannot_be_packed_or_unpacked():
    rule = Expansion(group=16)
    with pytest.raises(ArtifactError, match=r"1 groups of a weight \(1, 16\) hold integers that do not expand from 4"):
        rule.pack(torch.arange(16, dtype=torch.int8).unsqueeze(0) * 7)
    with pytest.raises(
        ArtifactError, match=r"a weight \(1, 16\) .*g16.* takes a uint8 row of 9 bytes, not torch.uint8"
    ):
        rule.unpack(torch.zeros(8, dtype=torch.uint8), (1, 16))
    for text in ("g16", "normal g8", "uniform", "normal g16 ", ""):
        with pytest.raises(ArtifactError, match="describes no expansion of 4 bits"):
            Expansion.from_text(text)
