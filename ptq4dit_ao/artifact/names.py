"""Names that a stored graph may use.

torch.fx prints node, input and attribute names into Python source and runs it. A name from a file is therefore checked
before a graph uses it, and only identifiers pass.
"""

from __future__ import annotations

import functools
import keyword
import re

import torch
from torch.fx import Graph, GraphModule

from ptq4dit_ao.errors import ArtifactError

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# A submodule may be called "0" or "a-b". torch.fx writes getattr(self, "a-b") for it.
_ATTRIBUTE = re.compile(r"[\w-]+", re.ASCII)


def check_identifier(name: object, what: str) -> str:
    """The name itself, if it is an ASCII identifier.

    Raises:
        ArtifactError: it is not.
    """
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise ArtifactError(f"{what} {name!r} is not an identifier; rename it in the model and export again")
    return name


def check_attribute_path(path: object) -> str:
    """The path itself, if it is a dotted path to a tensor that hides no attribute of a module.

    Raises:
        ArtifactError: it is not.
    """
    parts = path.split(".") if isinstance(path, str) else []
    taken = [_attributes_of_graph_module(), *[_attributes_of_module()] * len(parts)]
    if not parts or not all(_ATTRIBUTE.fullmatch(p) and p not in names for p, names in zip(parts, taken, strict=False)):
        raise ArtifactError(
            f"tensor name {path!r} is not a dotted path of free attribute names (letters, digits, _ and -); rename "
            f"the submodule and export again"
        )
    return str(path)


@functools.cache
def _attributes_of_graph_module() -> frozenset[str]:
    # torch.fx adds the two specs to modules that take or return containers.
    return frozenset(dir(GraphModule(torch.nn.Module(), Graph()))) | {"_in_spec", "_out_spec"}


@functools.cache
def _attributes_of_module() -> frozenset[str]:
    return frozenset(dir(torch.nn.Module()))
