"""Dialect of plain YAML scalars in a recipe: YAML 1.2 rules for PyYAML, which itself follows YAML 1.1.

``1e-5`` is a number, only ``true`` and ``false`` are booleans (``on`` is text), ``010`` is not an octal number, and
``2024-01-01`` is not a date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

import yaml  # type: ignore[import-untyped]

NULL, BOOL, INT, FLOAT, STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))

# Tag, pattern and the characters a match can begin with. A plain scalar that no pattern matches is text.
_PLAIN = [
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (BOOL, r"true|false", ["t", "f"]),
    (INT, r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        FLOAT,
        r"[-+]?([0-9]+\.[0-9]*|\.?[0-9]+(?=[eE])|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
]

_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that parses and resolves tags. Its constructors follow YAML 1.1 and are not used."""

    yaml_implicit_resolvers: ClassVar[_Resolvers] = {}


class Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """A dumper that quotes text that ``Loader`` would read as another type."""

    yaml_implicit_resolvers: ClassVar[_Resolvers] = {}


for _tag, _pattern, _first in _PLAIN:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _represent_text(dumper: Dumper, text: str) -> yaml.Node:
    # PyYAML writes a line break such as U+0085 into single quotes and then reads it back as a space.
    return dumper.represent_scalar(STR, text, style=None if text.isprintable() else '"')


Dumper.add_representer(str, _represent_text)

SCALARS: dict[str, Callable[[str], object]] = {
    BOOL: lambda text: text == "true",
    INT: int,
    # Python writes inf and nan without YAML's dot.
    FLOAT: lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text)),
    STR: str,
}


def is_tagged(node: yaml.Node) -> bool:
    """Whether the file gives ``node`` an explicit tag (``!!str 8``) instead of leaving it to the patterns."""
    plain = getattr(node, "style", None) is None
    return bool(node.tag != Loader("").resolve(type(node), node.value, (plain, not plain)))
