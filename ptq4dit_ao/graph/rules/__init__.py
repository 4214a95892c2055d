"""The table of rules: aten op -> what scaling its tensors must have in common.

Adding an op is adding a row to one of these files, with its identity as the docstring, and a test:

* ``movement``: ops that rearrange elements (view, permute, slice, cat, ...),
* ``arithmetic``: ops that compute element by element (add, mul, ...) and products of matrices,
* ``layers``: ops with parameters (linear, norms).
"""

from ptq4dit_ao.graph.rules import arithmetic, layers, movement  # noqa: F401  (they fill the table)
from ptq4dit_ao.graph.rules.table import IGNORED, RULES, rule

__all__ = ["IGNORED", "RULES", "rule"]
