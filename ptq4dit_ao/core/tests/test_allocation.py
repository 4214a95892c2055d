"""Allocation under a budget, against every choice there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4dit_ao.core import allocate, allocation
from ptq4dit_ao.errors import ArgumentError

OPTION = st.tuples(st.integers(0, 40), st.integers(-8, 8).map(float))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=6)


def split(items):
    return [[cost for cost, _ in options] for options in items], [[error for _, error in options] for options in items]


def total(table, choice):
    return sum(row[k] for row, k in zip(table, choice, strict=True))


@settings(deadline=None)
@given(ITEMS, st.integers(0, 120))
def test_no_choice_within_the_budget_has_less_error(items, spare):
    costs, errors = split(items)
    budget = sum(map(min, costs)) + spare
    choice = allocate(costs, errors, budget)
    every = itertools.product(*(range(len(options)) for options in items))
    assert total(costs, choice) <= budget
    assert total(errors, choice) == min(total(errors, c) for c in every if total(costs, c) <= budget)


def test_a_common_divisor_keeps_large_costs_exact():
    unit = 1152**2
    costs = [[4 * n * unit, 8 * n * unit] for n in (3, 1, 4, 4, 6) * 28]
    errors = [[1.0 / (i + 1), 0.0] for i in range(len(costs))]
    choice = allocate(costs, errors, 504 * unit * 6)
    assert total(costs, choice) == 504 * unit * 6  # to the last bit


@given(ITEMS, st.integers(0, 120))
def test_rounded_up_costs_stay_within_the_budget(items, spare):
    costs, errors = split(items)
    budget = sum(map(min, costs)) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "RESOLUTION", 10)
        choice = allocate(costs, errors, budget)
    assert total(costs, choice) <= budget


def test_a_budget_that_nothing_fits():
    with pytest.raises(ArgumentError, match="the cheapest choice costs 7, and the budget is 6; raise it"):
        allocate([[3, 5], [4, 8]], [[0.0, 0.0], [0.0, 0.0]], 6)
