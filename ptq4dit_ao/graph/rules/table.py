"""The registry of rules, which the rule files fill."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
    """Register a rule for these op overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"two rules for {target}"
            RULES[target] = function
        return function

    return register
