"""The weights of a converted graph that expand from 4 bits, which its ``meta`` lists."""

from __future__ import annotations

from torch.fx import GraphModule

from ptq4dit_ao.core.expansion import Expansion

_KEY = "ptq4dit_expansions"


def expansions(model: GraphModule) -> dict[str, Expansion]:
    """Path of a weight's integers -> rule by which they expand from 4 bits; entries can be added."""
    found: dict[str, Expansion] = model.meta.setdefault(_KEY, {})
    return found
