"""The registry that the rule files fill."""

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
"""Users that read a tensor's shape or type, never its values; a tensor that they make is zero and scales freely."""


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule for these op overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"two rules for {target}"
            RULES[target] = function
        return function

    return register
