"""A multiple-choice knapsack: one option for each item, with the least total error within a cost budget.

It is solved exactly by dynamic programming over the budget. ``least[c]`` is the least error of the items so far at a
cost of at most c. With the next item it becomes ``min over its options of least[c - cost] + error``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ptq4dit_ao.errors import ArgumentError

RESOLUTION = 20_000
"""Maximum number of steps of the budget; costs are rounded up to steps if no common divisor gives fewer."""


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The index of each item's option, with the least total error among all choices that cost at most ``budget``.

    The result is exact if the costs in excess of each item's cheapest option share a divisor of at least
    ``(budget - cheapest) / RESOLUTION``. Otherwise costs are overestimated by up to that much, so that the budget still
    holds.

    Args:
        costs: ``costs[i][k]`` is the cost of item i's option k, >= 0.
        errors: ``errors[i][k]`` is the error of item i's option k, finite; may be negative.
        budget: maximum total cost.

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
