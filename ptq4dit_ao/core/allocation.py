"""Which of several options each item takes, so that the sum of errors is least and the sum of costs within a budget.

A multiple-choice knapsack, solved exactly by dynamic programming over the budget: ``least[c]``, the least error of the
items so far at a cost of at most c, is for the next item ``min over its options of least[c - cost] + error``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ptq4dit_ao.errors import ArgumentError

RESOLUTION = 20_000
"""Steps of the budget, at most: where costs have no common divisor that leaves fewer, they are rounded up to steps."""


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The option of each item: least total error among all choices whose cost is at most ``budget``.

    Exact if the costs beyond the cheapest share a divisor of at least ``(budget - cheapest) / RESOLUTION``; else each
    counts as up to that much more than it is, so that the budget still holds.

    Args:
        costs: of item i's option k, >= 0.
        errors: likewise, finite; may be negative.
        budget: of all together.

    Raises:
        ArgumentError: the cheapest options cost more than the budget.
    """
    cheapest = [min(options) for options in costs]
    spare = budget - sum(cheapest)
    if spare < 0:
        raise ArgumentError(f"the cheapest choice costs {sum(cheapest)}, and the budget is {budget}; raise it")
    extra = [[cost - low for cost in options] for options, low in zip(costs, cheapest, strict=True)]
    step = max(math.gcd(*(cost for options in extra for cost in options)), math.ceil(spare / RESOLUTION), 1)
    steps = [[math.ceil(cost / step) for cost in options] for options in extra]
    capacity = min(spare // step, sum(map(max, steps)))
    least = np.zeros(capacity + 1)
    taken = []
    for options, error in zip(steps, errors, strict=True):
        candidates = np.full((len(options), capacity + 1), np.inf)
        for k, cost in enumerate(options):
            if cost <= capacity:
                candidates[k, cost:] = least[: capacity + 1 - cost] + error[k]
        taken.append(candidates.argmin(0))
        least = candidates.min(0)
    choice, left = [], capacity
    for options, best in zip(reversed(steps), reversed(taken), strict=True):
        choice.append(int(best[left]))
        left -= options[choice[-1]]
    return choice[::-1]
