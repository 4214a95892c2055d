"""The registry of rules, which the rule files fill."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.propagation import Rule

aten = torch.ops.aten

RULES: dict[object, Rule] = {}

IGNORED: frozenset[object] = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten.sym_size.int,
        aten.zeros_like.default,
    }
)
"""Ops that read a tensor's shape or dtype, but not its values; a tensor that they return is 0 and has any scale."""


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule for these op overloads, from this package or any other; see docs/maintainers/add_an_op_rule.md.

    Raises:
        ArgumentError: one of them has a rule; none is registered then.
    """

    def register(function: Rule) -> Rule:
        if taken := [target for target in targets if target in RULES]:
            raise ArgumentError(f"{taken[0]} has a rule already, {RULES[taken[0]].__name__}; change that one")
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register
