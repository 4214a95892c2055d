"""The table of rules, which state for each aten op the scales that its tensors must have in common.

To add an op, add a rule to one of these files, with its identity as the docstring, and a test:

* ``movement``: ops that rearrange elements (view, permute, slice, cat, ...),
* ``arithmetic``: elementwise ops (add, mul, ...) and matrix products,
* ``layers``: ops with parameters (linear, norms).
"""

from ptq4dit_ao.graph.rules import arithmetic, layers, movement  # noqa: F401  (they fill the table)
from ptq4dit_ao.graph.rules.registry import IGNORED, RULES, rule

__all__ = ["IGNORED", "RULES", "rule"]
